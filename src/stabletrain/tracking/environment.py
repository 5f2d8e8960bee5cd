"""Where and with what a run was made."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from stabletrain import __version__

_PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "scikit-learn", "pytorch-optimizer", "tensorboard")
_BEFORE_A_PATH = r"(?:(?<=file://)|(?<![^\s=,:;'\"\[\](){}]))"
_FOLDERS = re.compile(_BEFORE_A_PATH + r"/(?!/)(?:[^/\s=,:;'\"\[\](){}]+/)*")


def describe_environment(*, device: torch.device | str = "cpu", seed: int | None = None) -> dict[str, Any]:
    """Return versions, device, number of threads, git commit, seed and command line.

    Args:
        device: where the run computes.
        seed: the run's seed.

    Returns:
        A dictionary of plain values; `git_commit` is None outside a git repository or without git.
    """
    device = torch.device(device)
    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "seed": seed,
        "command": shortened(sys.orig_argv),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python, this program and what its results depend on; None for what isn't installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "stabletrain": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """Return the commit of the git repository that the program was started in, or None."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def shortened(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with the folders of absolute paths left out.

    Example:
        >>> shortened(["/usr/bin/python", "-m", "stabletrain", "data.path=/home/me/x.csv", "name=a/b"])
        ['python', '-m', 'stabletrain', 'data.path=x.csv', 'name=a/b']
    """
    return [_FOLDERS.sub("", word) for word in words]
