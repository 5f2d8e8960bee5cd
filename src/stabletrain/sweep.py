"""Sweeps: many jobs in one process, of which none may leave anything to the next, and the table of them all."""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMPLETED = "completed"


@dataclass(kw_only=True)
class Job:
    """One run of a sweep, as its table shows it."""

    overrides: Sequence[str]  # what sets the job apart, as on the command line
    folder: Path
    metric: str = "loss"  # name of the validation metric by which jobs are compared
    summary: dict[str, Any] = field(default_factory=dict)  # the run's summary.json; empty if it came to none
    error: str = ""  # the message, if the job ended with one

    @property
    def status(self) -> str:
        """The status in the summary; a job with an error has never completed."""
        status = str(self.summary.get("status", "failed"))
        return "failed" if status in (COMPLETED, "running") and self.error != "" else status

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics of the summary, by names such as `final.loss`."""
        return {
            f"{when}.{name}": value
            for when, values in self.summary.get("metrics", {}).items()
            for name, value in (values or {}).items()
        }

    @property
    def value(self) -> float | None:
        """The final validation metric by which jobs are compared."""
        return self.metrics.get(f"final.{self.metric}")

    def read_summary(self) -> None:
        """Take over the run's `summary.json`, if it has one."""
        file = self.folder / "summary.json"
        if file.is_file():
            self.summary = json.loads(file.read_text())


def table(jobs: Sequence[Job]) -> str:
    r"""Return one line for each job: overrides, status, final validation metric.

    Example:
        >>> good = {"status": "completed", "metrics": {"final": {"loss": 0.25}, "test": {"accuracy": 0.5}}}
        >>> print(table([Job(overrides=["seed=0"], folder=Path("a"), summary=good),
        ...              Job(overrides=["seed=1", "base_lr=9"], folder=Path("b"), error="too much\nof it")]))
        job  overrides         status     validation loss  test accuracy  error
          0  seed=0            completed             0.25            0.5
          1  seed=1 base_lr=9  failed                                     too much
    """
    compared = {f"final.{job.metric}": f"validation {job.metric}" for job in jobs}
    tests = {name: name.replace(".", " ") for job in jobs for name in job.metrics if name.startswith("test.acc")}
    columns = {**compared, **tests}
    failed = any(job.error != "" for job in jobs)
    head = ["job", "overrides", "status", *columns.values(), *(["error"] if failed else [])]
    rows = [
        [str(number), " ".join(job.overrides), job.status]
        + [f"{job.metrics[name]:.6g}" if job.metrics.get(name) is not None else "" for name in columns]
        + ([(job.error.splitlines() or [""])[0][:100]] if failed else [])
        for number, job in enumerate(jobs)
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    on_the_right = {0, *range(3, 3 + len(columns))}
    lines = [
        "  ".join(
            cell.rjust(width) if column in on_the_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join(lines)


def write_table(jobs: Sequence[Job], file: Path) -> None:
    """Write all jobs with all their metrics as comma-separated values; the file is whole at any moment.

    Args:
        jobs: the jobs of a sweep.
        file: where to; a file of that name is replaced.
    """
    metrics = sorted({name for job in jobs for name in job.metrics})
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    with temporary.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["job", "overrides", "status", "metric", "value", *metrics, "folder", "error"])
        for number, job in enumerate(jobs):
            values = [job.metrics.get(name, "") for name in metrics]
            value = "" if job.value is None else job.value
            row = [number, " ".join(job.overrides), job.status, job.metric, value, *values, job.folder.name, job.error]
            writer.writerow(row)
    temporary.replace(file)


# -------------------------------------------------------------------------- what a job must not leave to the next one


@contextmanager
def unchanged_surroundings() -> Iterator[None]:
    """Put back what the process has in common for all jobs, whatever the block does to it.

    Covered: torch's default dtype, threads, precision settings, determinism, autocast and gradient modes; the default
    random generators of torch, numpy and Python; environment variables, current folder and import path.
    """
    restore = [*_torch_settings(), *_generators(), *_process()]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _process() -> list[Callable[[], None]]:
    environment, folder, path = dict(os.environ), Path.cwd(), list(sys.path)

    def put_environment_back() -> None:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)

    def put_path_back() -> None:
        sys.path[:] = path

    return [put_environment_back, lambda: os.chdir(folder), put_path_back]


def _generators() -> list[Callable[[], None]]:
    import numpy as np
    import torch

    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    return [
        lambda: random.setstate(python_state),
        lambda: np.random.set_state(numpy_state),
        lambda: torch.random.set_rng_state(torch_state),
    ]


def _torch_settings() -> list[Callable[[], None]]:
    import torch

    dtype, threads, with_gradient = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    anomaly, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    autocast = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}

    def put_modes_back() -> None:
        torch.autograd.set_grad_enabled(with_gradient)
        torch.autograd.set_detect_anomaly(anomaly, check_nan)
        for device, enabled in autocast.items():
            torch.set_autocast_enabled(device, enabled)

    return [
        lambda: torch.set_default_dtype(dtype),
        lambda: torch.set_num_threads(threads),
        lambda: torch.use_deterministic_algorithms(deterministic, warn_only=warn_only),
        put_modes_back,
        *_matmul_precision(),  # before the switches, which it moves
        *_switches(),
    ]


def _matmul_precision() -> list[Callable[[], None]]:
    import torch

    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the backends differ, so there is no one word for them: the switches say it all
        return []
    return [lambda: torch.set_float32_matmul_precision(precision)]


def _switches() -> list[Callable[[], None]]:
    """Return what puts torch's precision and autotuning switches back, for those that this torch has."""
    import torch

    backends = torch.backends
    holders: list[Any] = [backends, backends.cuda.matmul, backends.cudnn, backends.mkldnn]
    holders += [getattr(backends.cudnn, part) for part in ("conv", "rnn") if hasattr(backends.cudnn, part)]
    holders += [getattr(backends.mkldnn, part) for part in ("matmul", "conv", "rnn") if hasattr(backends.mkldnn, part)]
    saved = [
        (holder, name, getattr(holder, name))
        for holder in holders
        for name in ("fp32_precision", "benchmark", "deterministic")
        if hasattr(holder, name)
    ]

    def put_back() -> None:
        for holder, name, value in saved:
            setattr(holder, name, value)

    return [put_back]
