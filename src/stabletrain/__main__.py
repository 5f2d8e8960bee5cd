"""The door: `python -m stabletrain [train|export|doctor] [key=value ...]`; picks a command, maps exit codes."""

from __future__ import annotations

import errno
import os
import site
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from stabletrain import config as configs
from stabletrain.errors import ConfigurationError, Interrupted, UnstableTraining
from stabletrain.folder import LOCK_NAME
from stabletrain.sweep import Job, table, unchanged_surroundings, write_table

COMPLETED, FAILED, MISCONFIGURED, UNSTABLE, INTERRUPTED = 0, 1, 2, 3, 75

# What the file system may refuse: a matter of the folder or the disk, not of the program.
_DISK = {
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
}


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
        return _report(error, debug)


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
        _compose(job, [*overrides, *flags])
    except _StopSweep:
        pass
    except Exception as error:
        if len(codes) == 0:  # it never came to a job
            _remove_empty_sweep(overrides)
            return _report_composition(error, overrides, flags, debug)
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
        return _report(error, debug)
    return COMPLETED


def doctor(arguments: Sequence[str], debug: bool = False) -> int:
    """Examine before a run, this environment, or what went wrong in one; see `stabletrain.doctor`.

    What is examined follows from the words: `env`, `run=` or `incident=`, or else the overrides of a run.
    """
    usage = "python -m stabletrain doctor [env | run=<folder> | incident=<folder>] [to=<folder>] [key=value ...]"
    if set(arguments) & {"-h", "--help"}:
        print(
            "Look for what makes training unstable: before a run in its data, model, numbers and settings; after it\n"
            "in an incident: where it began, in which samples, why, and what helps.\n"
            f"usage: {usage}\n"
            "  doctor key=value ...   the run that `train` would make of the same words\n"
            "  doctor run=<folder>    the latest incident of a run; or incident=<folder of one>\n"
            "  doctor env             versions, device, memory, disk\n"
            "  to=<folder>            where doctor.json goes (default: the current folder)\n"
            "exit codes: 0 clean, 1 warnings, 2 bad configuration, 3 broken"
        )
        return COMPLETED
    if any(word.startswith(("run=", "incident=")) for word in arguments):
        return _doctor_after(arguments, debug)
    words = [word for word in arguments if not word.startswith("to=")]
    to = next((word.partition("=")[2] for word in arguments if word.startswith("to=")), None)
    if len(words) > 0 and words[0] == "env":
        configs.named_words([word for word in words[1:] if not word.startswith("debug=")], usage="doctor env")
        return _doctor_env(to, debug)
    return _doctor_before(words, to, debug)


# The first one is the default.
COMMANDS: dict[str, Callable[[Sequence[str], bool], int]] = {
    "train": train,
    "export": export,
    "doctor": doctor,
}


# ---------------------------------------------------------------------------------------------------------- doctor


def _doctor_after(arguments: Sequence[str], debug: bool) -> int:
    usage = "python -m stabletrain doctor [run=<folder>] [incident=<folder>] [time_limit=<seconds>]"
    given = configs.named_words([word for word in arguments if not word.startswith("debug=")], usage)
    if ("run" in given) == ("incident" in given):
        raise ConfigurationError(f"give either run=<folder> or incident=<folder>. Usage: {usage}")
    limit = given.get("time_limit", "60")
    if not limit.replace(".", "", 1).isdigit():
        raise ConfigurationError(f"time_limit={limit}: give a number of seconds. Usage: {usage}")
    _see_users_folder()
    from stabletrain.doctor.after import diagnose_incident, latest_incident

    try:
        incident = Path(given["incident"]) if "incident" in given else latest_incident(given["run"])
        print(diagnose_incident(incident, time_limit=float(limit)))
    except Exception as error:
        return _report(error, debug)
    return COMPLETED


def _doctor_env(to: str | None, debug: bool) -> int:
    from stabletrain.doctor.before.environment import examine_environment, fact_lines

    try:
        report = examine_environment()
        print("\n".join(fact_lines(report.facts)))
        return _tell(report, to)
    except Exception as error:
        return _report(error, debug)


def _doctor_before(arguments: Sequence[str], to: str | None, debug: bool) -> int:
    """Compose the config that `train` would, without a run's folder, and examine the run."""
    overrides, flags = configs.arrange(arguments)
    configs.check_overrides(overrides, flags)
    if any(flag in ("-m", "--multirun") for flag in flags) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("the doctor examines one run in one process; leave -m or torchrun out.")
    codes: list[int] = []

    def job(config: DictConfig) -> None:
        try:
            values = configs.settings(config)
            codes.append(_examine(values, overrides, to))
        except (Exception, KeyboardInterrupt) as error:
            codes.append(_report(error, debug or config.get("debug") is True))

    with tempfile.TemporaryDirectory() as folder:
        try:
            _compose(job, [*overrides, f"hydra.run.dir={folder}", *flags])
        except Exception as error:
            if len(codes) == 0:
                return _report_composition(error, overrides, flags, debug)
    return codes[0] if len(codes) > 0 else COMPLETED  # none: --cfg, --info


def _examine(values: dict[str, Any], overrides: Sequence[str], to: str | None) -> int:
    import torch

    from stabletrain.build import PartFailed
    from stabletrain.doctor.before import examine

    if values["threads"] is not None:
        torch.set_num_threads(values["threads"])
    try:
        report = examine(values, overrides)
    except PartFailed as error:
        raise _refused_value(error) from error.__cause__
    return _tell(report, to)


def _tell(report: Any, to: str | None) -> int:
    """Print what the doctor found, and write it."""
    report.show()
    path = report.write(to)
    print(f"{report.verdict()}; {path}", flush=True)
    return cast("int", report.code)


# ------------------------------------------------------------------------------------------------------------ jobs


def _compose(job: Callable[[DictConfig], Any], words: Sequence[str]) -> None:
    """Let Hydra compose a config from these words, and call `job` with it: once, or for each job of a sweep."""
    configs.stamp.cache_clear()
    _see_users_folder()
    wrapped = hydra.main(version_base="1.3", config_path=configs.conf_location(), config_name="config")(job)
    with _command_line(words):
        wrapped()


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
        codes.append(_report(error, debug or config.get("debug") is True))
        if isinstance(error, UnstableTraining):
            _say_why(folder, values["doctor"]["time_limit"])
        job.error = _message(error)[0]
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
        raise _refused_value(error) from error.__cause__
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


def _refused_value(error: Exception) -> Exception:
    """Return the error of a part as one of the settings, where it is a value that the part refused."""
    cause = error.__cause__
    refused = isinstance(cause, (TypeError, ValueError)) and _users_line(cause) is None
    return ConfigurationError(str(error)) if refused else error


def _conclude(jobs: Sequence[Job], codes: Sequence[int]) -> int:
    """Show a sweep's table, write it, and say whether all of its jobs completed."""
    print(f"\n{table(jobs)}")
    folder = Path(os.path.commonpath([job.folder.parent for job in jobs]))
    if folder.is_dir():
        try:
            write_table(jobs, folder / "sweep.csv")
            print(f"\nsaved in {folder / 'sweep.csv'}")
        except OSError as error:
            return _report(error, False)
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


def _see_users_folder() -> None:
    """Let modules of the user's be imported from the current folder, which the console script leaves out."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Let Hydra see this command line, and let its errors come through as exceptions."""
    before, setting = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")
    sys.argv[1:] = arguments
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv[:] = before
        if setting is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = setting


# -------------------------------------------------------------------------------------------------------- messages


def _report(error: BaseException, debug: bool) -> int:
    """Write one message for an error to stderr, with its traceback under `debug`, and return the exit code."""
    message, code = _message(error)
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        if code in (UNSTABLE, INTERRUPTED):
            return code  # common to all processes, and told by the first
        # The first process says what concerns all, and the launcher ends the others; what is left is this one's own.
        time.sleep(2.0)
        message = f"process {rank}: {message}"
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    hint = "; debug=true shows the traceback" if code == FAILED and not debug else ""
    print(f"stabletrain: {message}{hint}", file=sys.stderr, flush=True)
    return code


def _message(error: BaseException) -> tuple[str, int]:
    if isinstance(error, ConfigurationError):
        return str(error), MISCONFIGURED
    if isinstance(error, UnstableTraining):
        return str(error), UNSTABLE
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        return (
            "interrupted at once, without saving; the same command continues from the last checkpoint, if there is one",
            FAILED,
        )
    if isinstance(error, OSError) and error.errno in _DISK and _users_line(error) is None:
        return (
            f"can't write {error.filename or 'to disk'}: {error.strerror}. Give room or another folder.",
            MISCONFIGURED,
        )
    cause = error.__cause__ if type(error).__name__ == "PartFailed" and error.__cause__ is not None else error
    line = _users_line(cause) or _last_line(cause)
    what = str(error) if cause is not error else f"{type(error).__name__}: {error}"
    return f"{what} ({line})", FAILED


def _report_composition(error: Exception, overrides: Sequence[str], flags: Sequence[str], debug: bool) -> int:
    from stabletrain.config.explain import COMPOSITION_ERRORS, explain

    if isinstance(error, COMPOSITION_ERRORS) and not isinstance(error, ConfigurationError):
        said = ConfigurationError(explain(error, overrides, flags))
        return _report(said.with_traceback(error.__traceback__), debug)
    return _report(error, debug)


def _users_line(error: BaseException) -> str | None:
    """Return file:line of the innermost frame that is neither ours nor an installed package's, if there is one."""
    installed = {
        *site.getsitepackages(),
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib")),
    }
    places = [str(Path(__file__).parent), *installed, "<"]
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not any(frame.filename.startswith(place) for place in places)]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}" if len(theirs) > 0 else None


def _last_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 0 else "no traceback"


if __name__ == "__main__":
    sys.exit(main())
