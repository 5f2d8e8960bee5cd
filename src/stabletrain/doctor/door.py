"""The command `doctor`: before a run, after an incident, or of this environment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from stabletrain import config as configs
from stabletrain.errors import ConfigurationError
from stabletrain.messages import COMPLETED, refused_value, report, report_composition


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
        return _after(arguments, debug)
    words = [word for word in arguments if not word.startswith("to=")]
    to = next((word.partition("=")[2] for word in arguments if word.startswith("to=")), None)
    if len(words) > 0 and words[0] == "env":
        configs.named_words([word for word in words[1:] if not word.startswith("debug=")], usage="doctor env")
        return _env(to, debug)
    return _before(words, to, debug)


def _after(arguments: Sequence[str], debug: bool) -> int:
    usage = "python -m stabletrain doctor [run=<folder>] [incident=<folder>] [time_limit=<seconds>]"
    given = configs.named_words([word for word in arguments if not word.startswith("debug=")], usage)
    if ("run" in given) == ("incident" in given):
        raise ConfigurationError(f"give either run=<folder> or incident=<folder>. Usage: {usage}")
    limit = given.get("time_limit", "60")
    if not limit.replace(".", "", 1).isdigit():
        raise ConfigurationError(f"time_limit={limit}: give a number of seconds. Usage: {usage}")
    configs.see_users_folder()
    from stabletrain.doctor.after import diagnose_incident, latest_incident

    try:
        incident = Path(given["incident"]) if "incident" in given else latest_incident(given["run"])
        print(diagnose_incident(incident, time_limit=float(limit)))
    except Exception as error:
        return report(error, debug)
    return COMPLETED


def _env(to: str | None, debug: bool) -> int:
    from stabletrain.doctor.before.environment import examine_environment, fact_lines

    try:
        found = examine_environment()
        print("\n".join(fact_lines(found.facts)))
        return _tell(found, to)
    except Exception as error:
        return report(error, debug)


def _before(arguments: Sequence[str], to: str | None, debug: bool) -> int:
    """Compose the config that `train` would, without a run's folder, and examine the run."""
    overrides, flags = configs.arrange(arguments)
    configs.check_overrides(overrides, flags)
    if any(flag in ("-m", "--multirun") for flag in flags) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("the doctor examines one run in one process; leave -m or torchrun out.")
    codes: list[int] = []

    def job(config: Any) -> None:
        try:
            values = configs.settings(config)
            codes.append(_examine(values, overrides, to))
        except (Exception, KeyboardInterrupt) as error:
            codes.append(report(error, debug or config.get("debug") is True))

    with tempfile.TemporaryDirectory() as folder:
        try:
            configs.compose(job, [*overrides, f"hydra.run.dir={folder}", *flags])
        except Exception as error:
            if len(codes) == 0:
                return report_composition(error, overrides, flags, debug)
    return codes[0] if len(codes) > 0 else COMPLETED  # none: --cfg, --info


def _examine(values: dict[str, Any], overrides: Sequence[str], to: str | None) -> int:
    import torch

    from stabletrain.build import PartFailed
    from stabletrain.doctor.before import examine

    if values["threads"] is not None:
        torch.set_num_threads(values["threads"])
    try:
        found = examine(values, overrides)
    except PartFailed as error:
        raise refused_value(error) from error.__cause__
    return _tell(found, to)


def _tell(found: Any, to: str | None) -> int:
    """Print what the doctor found, and write it."""
    found.show()
    path = found.write(to)
    print(f"{found.verdict()}; {path}", flush=True)
    return cast("int", found.code)
