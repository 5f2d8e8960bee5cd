"""The environment: versions, device, memory, disk, and what of it doesn't fit together."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.requirements import InvalidRequirement, Requirement

from stabletrain.doctor.before.findings import Finding, Report
from stabletrain.tracking.environment import versions

GIB = 1 << 30
LITTLE_MEMORY, LITTLE_DISK = 1 * GIB, 1 * GIB
NO_DISK = 100 << 20


def examine_environment(folder: Path | str = ".") -> Report:
    """Look at versions, device, memory and disk.

    Args:
        folder: whose disk is looked at.

    Returns:
        A report whose facts are the versions and sizes.
    """
    start = time.monotonic()
    report = Report(subject="env", facts=_facts(Path(folder)))
    for finding in (*_packages(), *_numpy(), *_gpu(report.facts), *_room(report.facts), *_processor(report.facts)):
        report.findings.append(finding)
    report.seconds = time.monotonic() - start
    return report


def fact_lines(facts: dict[str, Any]) -> list[str]:
    """Return the facts as text, one line for each.

    Example:
        >>> fact_lines({"versions": {"python": "3.11"}, "memory_bytes": 2 << 30, "gpus": []})
        ['versions       python 3.11', 'memory         2.0 GiB', 'gpus           none']
    """
    lines = []
    for name, value in facts.items():
        label = name.removesuffix("_bytes")
        lines.append(f"{label:<14} {_shown(name, value)}")
    return lines


def _shown(name: str, value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{inner.removesuffix('_bytes')} {_shown(inner, item)}" for inner, item in value.items())
    if isinstance(value, list):
        return "; ".join(_shown(name, item) for item in value)
    return f"{value / GIB:.1f} GiB" if name.endswith("_bytes") else str(value)


def _finding(severity: Any, check: str, what: str, evidence: str, advice: str = "", remedy: str = "") -> Finding:
    return Finding(
        severity=severity, check=check, where="environment", what=what, evidence=evidence, advice=advice, remedy=remedy
    )


# ------------------------------------------------------------------------------------------------------------ facts


def _facts(folder: Path) -> dict[str, Any]:
    present = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    memory = _memory()
    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "driver": _driver(),
        "gpus": _gpus(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": memory.get("MemTotal"),
        "memory_free_bytes": memory.get("MemAvailable"),
        "disk_free_bytes": shutil.disk_usage(present).free,
        "writable": os.access(present, os.W_OK),
    }


def _cudnn() -> int | None:
    backend: Any = torch.backends.cudnn
    return backend.version() if backend.is_available() else None


def _memory() -> dict[str, int]:
    """Return what Linux says about memory, in bytes, with a container's limit; empty elsewhere."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return {}
    found = {name: int(size) * 1024 for name, size in re.findall(r"^(MemTotal|MemAvailable): +(\d+) kB", text, re.M)}
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        found["MemTotal"] = min(found["MemTotal"], limit)
        found["MemAvailable"] = min(found["MemAvailable"], max(0, limit - used))
    return found


def _driver() -> dict[str, str] | None:
    """Return the NVIDIA driver's version and the newest CUDA that it runs, or None without a driver."""
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = {}
    for name, pattern in (("version", r"Driver Version:\s*([\d.]+)"), ("cuda", r"CUDA Version:\s*([\d.]+)")):
        match = re.search(pattern, said)
        if match:
            found[name] = match.group(1)
    return found or None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": properties.name,
                "architecture": f"sm_{properties.major}{properties.minor}",
                "memory_bytes": total,
                "free_bytes": free,
            }
        )
    return found


# ------------------------------------------------------------------------------------------------------------ checks


def _packages() -> Iterator[Finding]:
    """Yield the packages that this one, torch and what they need require in another version."""
    waiting, seen = ["stabletrain"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in _requirements(needed):
            installed = _version(requirement.name)
            if installed is None or not requirement.specifier.contains(installed, prereleases=True):
                yield _finding(
                    "broken" if installed is None else "warning",
                    "package",
                    f"{requirement.name} is {'missing' if installed is None else installed}",
                    f"{name} {_version(name)} needs {requirement.name}{requirement.specifier}",
                    advice=f"pip install '{requirement.name}{requirement.specifier}'",
                )
            else:
                waiting.append(requirement.name)


def _requirements(lines: Sequence[str]) -> Iterator[Requirement]:
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numpy() -> Iterator[Finding]:
    try:
        same = bool((torch.from_numpy(np.ones(2)).numpy() == 1).all())
        said = "values differ after the way to torch and back"
    except Exception as error:  # built for another major version
        same, said = False, f"{type(error).__name__}: {error}"
    if not same:
        yield _finding(
            "broken",
            "numpy",
            "torch and numpy don't work together",
            f"torch {torch.__version__}, numpy {np.__version__}: {said}",
            advice="Install a numpy of the major version that this torch was built for.",
        )


def _gpu(facts: dict[str, Any]) -> Iterator[Finding]:
    driver, gpus = facts["driver"], facts["gpus"]
    if driver is not None and torch.version.cuda is None and torch.version.hip is None:
        yield _finding(
            "warning",
            "cuda",
            "there is a GPU, but this torch has no CUDA",
            f"torch {torch.__version__}, NVIDIA driver {driver.get('version', 'of unknown version')}",
            advice="Install torch with CUDA from https://pytorch.org, or go on with device=cpu.",
        )
        return
    if driver is not None and torch.version.cuda is not None and "cuda" in driver:
        if int(driver["cuda"].split(".")[0]) < int(torch.version.cuda.split(".")[0]):
            yield _finding(
                "broken",
                "driver",
                "the driver is too old for this torch",
                f"torch was built with CUDA {torch.version.cuda}, the driver {driver.get('version')} runs up to "
                f"{driver['cuda']}",
                advice="Install a newer driver, or torch for an older CUDA.",
                remedy="device=cpu",
            )
            return
        if not gpus:
            yield _finding(
                "warning",
                "cuda",
                "torch can't use the GPU",
                f"driver {driver.get('version')}, torch for CUDA {torch.version.cuda}, CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}",
                advice="Look at CUDA_VISIBLE_DEVICES and at what torch.zeros(1, device='cuda') says.",
            )
    for index, gpu in enumerate(gpus):
        yield from _one_gpu(index, gpu)


def _one_gpu(index: int, gpu: dict[str, Any]) -> Iterator[Finding]:
    try:
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        product = float((ones @ ones).sum())
    except Exception as error:
        yield _finding(
            "broken",
            "gpu",
            f"GPU {index} can't compute",
            f"{gpu['name']} ({gpu['architecture']}): {str(error).splitlines()[0]}; torch has kernels for "
            f"{', '.join(torch.cuda.get_arch_list())}",
            advice="Install a torch that has kernels for it.",
            remedy="device=cpu",
        )
        return
    if product != 64.0**3:
        yield _finding(
            "broken",
            "gpu",
            f"GPU {index} computes wrongly",
            f"{gpu['name']}: a product of ones summed to {product:g}, not {64**3}",
            advice="Don't use this GPU; its memory may be at fault.",
        )
    if gpu["free_bytes"] < LITTLE_MEMORY:
        yield _finding(
            "warning",
            "gpu_memory",
            f"GPU {index} is nearly full",
            f"{gpu['free_bytes'] / GIB:.2f} of {gpu['memory_bytes'] / GIB:.1f} GiB are free",
            advice="End what else uses it, or choose another one as device=cuda:<number>.",
        )
    with torch.cuda.device(index):
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield _finding("note", "bf16", f"GPU {index} has no bfloat16", f"{gpu['name']}; presets take fp16 there")


def _room(facts: dict[str, Any]) -> Iterator[Finding]:
    free, disk = facts["memory_free_bytes"], facts["disk_free_bytes"]
    if free is not None and free < LITTLE_MEMORY:
        yield _finding(
            "warning",
            "memory",
            "little memory",
            f"{free / GIB:.2f} GiB are free",
            advice="End what else uses it; a smaller batch_size helps as well.",
        )
    if not facts["writable"]:
        yield _finding("broken", "disk", "this folder can't be written", str(Path.cwd()), advice="Work in another one.")
    elif disk < LITTLE_DISK:
        yield _finding(
            "broken" if disk < NO_DISK else "warning",
            "disk",
            "little room on the disk",
            f"{disk / GIB:.2f} GiB are free for checkpoints",
            advice="Free some, or keep fewer checkpoints.",
            remedy="checkpoint=none" if disk < NO_DISK else "",
        )


def _processor(facts: dict[str, Any]) -> Iterator[Finding]:
    if facts["processors"] is not None and facts["threads"] > facts["processors"]:
        yield _finding(
            "warning",
            "threads",
            "more threads than processors",
            f"torch uses {facts['threads']} threads, this process may use {facts['processors']} processors",
            remedy=f"threads={facts['processors']}",
        )
