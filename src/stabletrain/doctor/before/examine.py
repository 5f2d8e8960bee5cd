"""All checks of a run, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.build import PartFailed, build_data, build_undivided
from stabletrain.data import OrderedLoader
from stabletrain.doctor.before.data import broken_samples, examine_data, input_limit
from stabletrain.doctor.before.edges import examine_edges
from stabletrain.doctor.before.findings import Finding, Report
from stabletrain.doctor.before.model import examine_parameters, examine_start
from stabletrain.doctor.before.numbers import examine_numbers, headroom
from stabletrain.doctor.before.observe import observe
from stabletrain.doctor.before.rate import examine_rate
from stabletrain.doctor.before.scan import scan
from stabletrain.doctor.before.settings import examine_settings
from stabletrain.doctor.before.subject import Subject, inputs_of
from stabletrain.doctor.built import built
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key, keyed_all
from stabletrain.task import Classification

SMALL_MODEL = 1_000_000  # parameters


def examine(config: dict[str, Any], overrides: Sequence[str] = (), *, progress: bool = True) -> Report:
    """Build a run in a temporary folder and look at its data, model, numbers and settings; nothing is trained.

    Args:
        config: checked, plain settings, as from `stabletrain.config.settings`.
        overrides: what was given on the command line, for the headline.
        progress: show bars on stderr, where that is a terminal.

    Raises:
        ConfigurationError: the settings can't be used for a reason that isn't in the data.
    """
    start = time.monotonic()
    given = [word for word in overrides if word.partition("=")[0] not in ("experiment", "preset")]
    report = Report(subject=" ".join([f"experiment={config['experiment']}", f"preset={config['preset']}", *given]))
    with ExitStack() as stack:
        try:
            run = stack.enter_context(built(config))
        except (ConfigurationError, PartFailed) as error:
            if isinstance(error, PartFailed) or not _is_in_data(config):
                raise
            report.findings += undivided(config, progress=progress) or [_no_data(error)]
        else:
            examine_run(Subject(run, config), report, progress=progress)
    report.seconds = time.monotonic() - start
    return report


def examine_run(subject: Subject, report: Report, *, progress: bool = True) -> None:
    """Add to the report what is found in a run's parts, which stay as they are."""
    run = subject.run
    precisions = subject.precisions()
    chosen = next(iter(precisions))
    with keyed_all(key(run.seed, "doctor")), _threads(subject):
        report.findings += examine_data(subject, _outputs(subject), progress=progress)
        parameters = examine_parameters(run.model)
        report.findings += parameters
        report.findings += examine_settings(subject)
        report.facts |= {"device": str(run.device), "precision": chosen, "samples": len(run.loader.dataset)}
        if len(subject.bad_samples) == len(run.loader.dataset) or any(one.severity == "broken" for one in parameters):
            report.facts["left_out"] = "numbers and learning rate: there is no healthy sample, or no healthy weight"
            return
        batch = subject.batch()
        seen = {name: observe(subject, subject.batch(), precision) for name, precision in precisions.items()}
        numbers = examine_numbers(subject, seen)
        report.findings += numbers
        found, report.facts["start"] = examine_start(subject, seen["fp32"], batch)
        report.findings += found
        report.facts["headroom"] = headroom(seen)
        if any(one.severity == "broken" for one in numbers):
            report.facts["left_out"] = "edge cases and learning rate: a healthy batch fails already"
            return
        found, report.facts["edge_cases"] = examine_edges(subject)
        report.findings += found
        found, rates = examine_rate(subject)
        report.findings += found
        report.facts["learning_rate"] = rates.facts


@contextmanager
def _threads(subject: Subject) -> Iterator[None]:
    """Let a small model compute in one thread: more of them wait for each other longer than they compute."""
    before = torch.get_num_threads()
    small = sum(parameter.numel() for parameter in subject.run.model.parameters()) < SMALL_MODEL
    if small and subject.run.device.type == "cpu" and subject.config["threads"] is None:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def undivided(config: dict[str, Any], *, progress: bool = True) -> list[Finding]:
    """Look at a data set that can't be divided into parts, as it is."""
    try:
        data = build_undivided(config)
        loader = OrderedLoader(data, batch_size=1)
    except (ConfigurationError, PartFailed):
        return []
    found = scan(
        "all", len(data), lambda indices: loader.read(indices).data, limit=input_limit(torch.float32), progress=progress
    )
    classes = config["model"].get("num_classes")
    return list(broken_samples(found, config, classes if isinstance(classes, int) else None))


def _is_in_data(config: dict[str, Any]) -> bool:
    try:
        build_data(config)
    except ConfigurationError:
        return True
    return False


def _no_data(error: Exception) -> Finding:
    return Finding(
        severity="broken",
        check="data",
        where="data",
        what="the data can't be used",
        evidence=str(error),
        advice="Do what the message says; the other checks come after it.",
    )


def _outputs(subject: Subject) -> int | None:
    """Return the number of a classifier's outputs, or None."""
    if not isinstance(subject.run.task, Classification):
        return None
    model: nn.Module = subject.fresh_model().eval()
    try:
        with torch.no_grad():
            output = model(inputs_of(subject.batch(2)))
    except Exception:  # what is wrong with it is told by the check of the numbers
        found = subject.config["model"].get("num_classes")
        return found if isinstance(found, int) else None
    return int(output.shape[1]) if isinstance(output, Tensor) and output.dim() == 2 else None
