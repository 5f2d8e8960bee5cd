"""The door: `python -m stabletrain [train|export|doctor] [key=value ...]`; picks a command, maps exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from stabletrain import config as configs
from stabletrain.doctor.door import doctor
from stabletrain.errors import ConfigurationError, Interrupted, UnstableTraining
from stabletrain.folder import LOCK_NAME
from stabletrain.messages import (
    COMPLETED,
    FAILED,
    INTERRUPTED,
    message_of,
    refused_value,
    report,
    report_composition,
)
from stabletrain.sweep import Job, table, unchanged_surroundings, write_table


class _StopSweep(BaseException):
    """Ends a sweep whose job was interrupted; Hydra lets only a BaseException through."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code.

    Args:
        arguments: the command line without the program; None = this process's.

    Returns:
        0 completed, 1 failed, 2 bad configuration or data, 3 stopped unstable, 75 interrupted with a checkpoint saved.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1" or any(
        word.lstrip("+").lower() in ("debug=true", "debug=1") for word in given
    )
    try:
        command, rest = configs.split_command(given, COMMANDS)
        return COMMANDS[command](rest, debug)
    except ConfigurationError as error:
        return report(error, debug)


def train(arguments: Sequence[str], debug: bool = False) -> int:
    """Compose a config from the command line and train; with `-m`, once for each combination."""
    overrides, flags = configs.arrange(arguments)
    configs.check_overrides(overrides, flags)
    _refuse_sweeps_of_ranks(overrides, flags)
    jobs: list[Job] = []
    codes: list[int] = []

    def job(config: DictConfig) -> float | None:
        return _job(config, jobs, codes, debug)

    try:
        configs.compose(job, [*overrides, *flags])
    except _StopSweep:
        pass
    except Exception as error:
        if len(codes) == 0:  # it never came to a job
            _remove_empty_sweep(overrides)
            return report_composition(error, overrides, flags, debug)
    if len(jobs) > 0:
        return _conclude(jobs, codes)
    return codes[0] if len(codes) > 0 else COMPLETED  # no job at all: --help, --cfg, --info


def export(arguments: Sequence[str], debug: bool = False) -> int:
    """Write a run's weights for others to read; see `stabletrain.export.export`."""
    usage = "python -m stabletrain export run=<folder> [checkpoint=best|last|<name>] [to=<folder>]"
    if set(arguments) & {"-h", "--help"}:
        print(f"Write a run's weights as model.safetensors, with the config.yaml of its model.\nusage: {usage}")
        return COMPLETED
    given = configs.named_words([word for word in arguments if not word.startswith("debug=")], usage)
    from stabletrain.export import export as write

    try:
        print(write(**given))
    except Exception as error:
        return report(error, debug)
    return COMPLETED


# The first one is the default.
COMMANDS: dict[str, Callable[[Sequence[str], bool], int]] = {
    "train": train,
    "export": export,
    "doctor": doctor,
}


# ------------------------------------------------------------------------------------------------------------ jobs


def _job(config: DictConfig, jobs: list[Job], codes: list[int], debug: bool) -> float | None:
    """Train once and return the final validation metric; a failure is told here, and raised for sweepers that ask."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = cast("list[str]", OmegaConf.to_container(hydra_config.overrides.task, resolve=False))  # as given
    in_sweep = hydra_config.mode == RunMode.MULTIRUN
    job = Job(overrides=overrides, folder=folder)
    if in_sweep:
        jobs.append(job)
        print(f"job {len(jobs) - 1}: {' '.join(overrides)}", flush=True)
    try:
        values = configs.settings(config)
        job.metric = values["checkpoint"].get("metric", job.metric)
        if not in_sweep:
            return _train(values, folder, overrides, job, codes)
        with unchanged_surroundings():
            return _train(values, folder, overrides, job, codes)
    except (Exception, KeyboardInterrupt) as error:
        _remove_empty(folder)
        codes.append(report(error, debug or config.get("debug") is True))
        if isinstance(error, UnstableTraining):
            _say_why(folder, values["doctor"]["time_limit"])
        job.error = message_of(error)[0]
        if in_sweep and isinstance(error, (Interrupted, KeyboardInterrupt)):
            raise _StopSweep from error
        if in_sweep and not hydra_config.sweeper._target_.endswith(".BasicSweeper"):
            raise
        return None
    finally:
        job.read_summary()


def _train(values: dict[str, Any], folder: Path, overrides: list[str], job: Job, codes: list[int]) -> float | None:
    import torch

    from stabletrain.build import PartFailed, build
    from stabletrain.trainer import train as train_run

    if values["threads"] is not None:
        torch.set_num_threads(values["threads"])
    try:
        run = build(values, folder, overrides)
    except PartFailed as error:
        raise refused_value(error) from error.__cause__
    train_run(run)
    codes.append(COMPLETED)
    job.read_summary()
    return job.value


def _say_why(folder: Path, time_limit: float) -> None:
    """Look into the incident that ended a run, and say in three lines where it was, in which samples, what to do."""
    from stabletrain.doctor.after import diagnose_incident, latest_incident, three_lines

    if time_limit == 0 or int(os.environ.get("RANK", "0")) > 0:
        return
    try:
        incident = latest_incident(folder)
        found = diagnose_incident(incident, time_limit=time_limit, all_remedies=False)
        print("\n".join(three_lines(found, incident)), file=sys.stderr, flush=True)
    except Exception as error:  # whatever it is, the run has ended before
        print(f"stabletrain: no diagnosis: {error}", file=sys.stderr, flush=True)


def _conclude(jobs: Sequence[Job], codes: Sequence[int]) -> int:
    """Show a sweep's table, write it, and say whether all of its jobs completed."""
    print(f"\n{table(jobs)}")
    folder = Path(os.path.commonpath([job.folder.parent for job in jobs]))
    if folder.is_dir():
        try:
            write_table(jobs, folder / "sweep.csv")
            print(f"\nsaved in {folder / 'sweep.csv'}")
        except OSError as error:
            return report(error, False)
    if codes[-1] == INTERRUPTED:
        return INTERRUPTED
    return COMPLETED if all(code == COMPLETED for code in codes) else FAILED


def _remove_empty(folder: Path) -> None:
    """Remove a run's folder that holds nothing but our lock, and `runs/` above it if that holds nothing else."""
    lock = folder / LOCK_NAME
    with suppress(OSError):  # it holds something, or isn't there
        if [entry.name for entry in folder.iterdir()] == [LOCK_NAME] and lock.read_text().strip() == str(os.getpid()):
            lock.unlink()
        folder.rmdir()
        folder.parent.rmdir()


def _remove_empty_sweep(overrides: Sequence[str]) -> None:
    """Remove what Hydra writes before it checks a sweep's options, if that is all there is."""
    named = [override.partition("=")[2] for override in overrides if override.startswith("name=")]
    folder = Path("runs", named[0] if len(named) > 0 else f"sweep-{configs.stamp()}")
    if folder.is_dir() and [entry.name for entry in folder.iterdir()] == ["multirun.yaml"]:
        (folder / "multirun.yaml").unlink()
    _remove_empty(folder)


def _refuse_sweeps_of_ranks(overrides: Sequence[str], flags: Sequence[str]) -> None:
    sweep = any(flag in ("-m", "--multirun") for flag in flags) or "hydra.mode=MULTIRUN" in overrides
    if sweep and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            "a sweep (-m) can't run under torchrun, where each process would run a sweep of its own; start torchrun "
            "once for each combination, or the sweep in one process."
        )


if __name__ == "__main__":
    sys.exit(main())
