"""The data: what no step can use, what overflows, what misleads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from stabletrain.data import OrderedLoader
from stabletrain.doctor.before.findings import Finding, listed, shortened
from stabletrain.doctor.before.overrides import first_known, known
from stabletrain.doctor.before.scan import Scan, find_outliers, scan
from stabletrain.doctor.before.subject import FORMATS, Subject

SCALES_APART = 1e4
IMBALANCE = 10.0  # most frequent class over rarest
MANY_DUPLICATES = 0.01  # share of the training part
# Squares of larger numbers overflow float32: norms, variances and squared errors are made of squares.
SQUARE_OVERFLOWS = math.sqrt(torch.finfo(torch.float32).max)


def examine_data(subject: Subject, classes: int | None = None, *, progress: bool = True) -> list[Finding]:
    """Read all data once and return what is wrong with it; `subject.bad_samples` becomes the unusable ones.

    Args:
        subject: the run.
        classes: number of the model's outputs, where it is a classifier.
        progress: show bars on stderr, where that is a terminal.
    """
    run, limit = subject.run, input_limit(subject.run.precision.dtype)
    parts: list[tuple[str, Any, Callable[[Sequence[int]], Any]]] = [
        ("training", run.loader.dataset, lambda indices: run.loader.read(indices, 0).data)
    ]
    parts += [
        (name, loader.dataset, partial(_read_ordered, loader))
        for name, loader in (("validation", run.validation), ("test", run.test))
        if loader is not None
    ]
    scans = {name: scan(name, len(dataset), read, limit=limit, progress=progress) for name, dataset, read in parts}
    training, ignored = scans["training"], subject.ignored_label()
    for found in scans.values() if ignored is not None else ():
        found.labels = {index: label for index, label in found.labels.items() if label != ignored}
    findings = [one for found in scans.values() for one in broken_samples(found, subject.config, classes)]
    for found in scans.values():
        findings += _overflowing(found, subject.config, run.precision.dtype)
    findings += _columns(training, parts[0][2], subject.config, progress)
    findings += _classes(scans, subject, classes)
    findings += _repeated(scans)
    out_of_range = [index for index, label in training.labels.items() if not _allowed(label, classes)]
    subject.bad_samples = sorted({*training.unusable(), *(out_of_range if classes is not None else [])})
    return findings


def _read_ordered(loader: OrderedLoader, indices: Sequence[int]) -> Any:
    return loader.read(indices).data


def input_limit(dtype: torch.dtype) -> float:
    """Return the magnitude above which an input can't be used in a precision.

    Example:
        >>> input_limit(torch.float16), f"{input_limit(torch.float32):.3g}"
        (65504.0, '1.84e+19')
    """
    return min(float(torch.finfo(dtype).max), SQUARE_OVERFLOWS)


def _allowed(label: int, classes: int | None) -> bool:
    return label >= 0 and (classes is None or label < classes)


def _finding(found: Scan, samples: Sequence[int], **content: Any) -> Finding:
    share = f"{len(samples)} of {found.samples} samples: {listed(samples)}"
    evidence = content.pop("evidence", "")
    return Finding(
        where=f"data, {found.part}",
        evidence=f"{share}{'; ' + evidence if evidence else ''}",
        samples=list(samples),
        **content,
    )


def broken_samples(found: Scan, config: dict[str, Any], classes: int | None) -> Iterator[Finding]:
    """Yield what makes samples unusable: NaN, Inf, no content, no usable label, an error when they are read."""
    for kind, name, samples in (("nan", "NaN", found.nan), ("inf", "Inf", found.inf)):
        if samples:
            yield _finding(
                found,
                samples,
                severity="broken",
                check=kind,
                what=f"{name} in the inputs",
                **_leave_out(found, samples, config),
            )
    if found.empty:
        yield _finding(
            found,
            found.empty,
            severity="broken",
            check="empty",
            what="samples without content",
            evidence="an input has no element, such as a sequence without a time step",
            advice="Leave these samples out of the data.",
        )
    if found.bad_labels:
        yield _finding(
            found,
            found.bad_labels,
            severity="broken",
            check="nonfinite_label",
            what="NaN or Inf in the labels",
            advice="Label these samples, or leave them out of the data.",
        )
    if found.unreadable:
        index, said = next(iter(found.unreadable.items()))
        yield _finding(
            found,
            sorted(found.unreadable),
            severity="broken",
            check="unreadable",
            what="samples that can't be read",
            evidence=f"sample {index}: {shortened(said)}",
            advice="Correct the data set, or leave these samples out.",
        )
    if found.unbatched:
        yield Finding(
            severity="broken",
            check="batch",
            where=f"data, {found.part}",
            what="samples that can be read, but not put into one batch",
            evidence=shortened(found.unbatched),
            advice="Give the samples one shape, or the data set a method collate(samples).",
        )
    yield from _broken_labels(found, config, classes)
    if found.zero and len(found.zero) < found.samples:
        yield _finding(
            found, found.zero, severity="note", check="all_zero", what="samples whose inputs are all 0", advice=""
        )


def _broken_labels(found: Scan, config: dict[str, Any], classes: int | None) -> Iterator[Finding]:
    wrong = [index for index, label in found.labels.items() if not _allowed(label, classes)]
    if wrong and (classes is not None or min(found.labels.values()) < 0):
        labels = sorted({found.labels[index] for index in wrong})
        top = f"; the model has {classes} outputs, for labels from 0 to {classes - 1}" if classes is not None else ""
        only_above = labels[0] >= 0
        yield _finding(
            found,
            wrong,
            severity="broken",
            check="label_range",
            what="labels out of range",
            evidence=f"label{'s' if len(labels) > 1 else ''} {listed(labels)}{top}",
            remedy=known(config, f"model.num_classes={labels[-1] + 1}") if only_above else "",
            advice="" if only_above else "Number the classes from 0, and leave samples without a label out.",
        )
    if found.mixtures:
        yield _finding(
            found,
            found.mixtures,
            severity="warning",
            check="label_mixture",
            what="labels that are no distribution over the classes",
            evidence="they hold a negative share, or don't sum to 1",
            advice="Divide each label by its sum, if it is meant as a distribution.",
        )


def _leave_out(found: Scan, samples: Sequence[int], config: dict[str, Any]) -> dict[str, str]:
    remedy = known(config, "data.nonfinite=drop")
    if found.part == "training" and not remedy:
        allowed = config["guard"].get("max_quarantined", 0.05)
        if len(samples) <= allowed * found.samples:
            remedy = known(config, "guard=salvage", "guard.scan=true")
    if remedy:
        return {"remedy": remedy}
    return {"advice": "Correct these samples, or leave them out of the data."}


def _overflowing(found: Scan, config: dict[str, Any], dtype: torch.dtype) -> Iterator[Finding]:
    if not found.largest:
        return
    name, limit = FORMATS.get(dtype, str(dtype)), input_limit(dtype)
    largest = max(found.largest.values())
    in_half = dtype == torch.float16
    standardize = known(config, "data.standardize=true") if not config["data"].get("standardize", True) else ""
    remedy = standardize or (first_known(config, "precision=bf16", "precision=fp32") if in_half else "")
    yield _finding(
        found,
        sorted(found.largest),
        severity="broken",
        check="overflow",
        what=f"inputs that overflow in {name}",
        evidence=f"up to {largest:.3g}, beyond {limit:.3g}" + ("" if in_half else ", whose square is Inf in float32"),
        remedy=remedy,
        advice="" if remedy else "Scale the inputs, or correct these values.",
    )


def _columns(
    found: Scan, read: Callable[[Sequence[int]], Any], config: dict[str, Any], progress: bool
) -> Iterator[Finding]:
    outliers: dict[str, list[int]] = {}
    for name, columns in found.columns.items():
        label = f"data, {found.part}" + (f", input {name}" if name else "")
        constant = columns.constant()
        if constant:
            values = [f"{float(columns.least[column]):.4g}" for column in constant[:10]]
            by_features = " (data.features)" if "features" in config["data"] else ""
            yield Finding(
                severity="warning",
                check="constant",
                where=label,
                what="columns that are constant" if len(columns.count) > 1 else "an input that is constant",
                evidence=f"{len(constant)} of {len(columns.count)} columns: {listed(constant)}, with the value "
                f"{', '.join(dict.fromkeys(values))}",
                advice=f"Leave them out{by_features}: they tell nothing, and dividing by their deviation gives NaN.",
            )
        yield from _scales(label, columns.spread(), config)
        if columns.with_outliers():
            outliers[name] = columns.with_outliers()
    if not outliers:
        return
    for name, samples in find_outliers(found, read, outliers, progress).items():
        columns = found.columns[name]
        column = outliers[name][0]
        extreme = max(float(columns.largest[column]), float(columns.least[column]), key=abs)
        yield _finding(
            found,
            samples,
            severity="warning",
            check="outlier",
            what="outliers",
            evidence=f"in column{'s' if len(outliers[name]) > 1 else ''} {listed(outliers[name])}"
            f"{f' of input {name}' if name else ''}; column {column} reaches {extreme:.4g}, its median is "
            f"{float(columns.median()[column]):.4g} and 90 % of it lie within {float(columns.spread()[column]):.4g}",
            advice="Correct these values, limit them, or take the logarithm of the column.",
        )


def _scales(label: str, spread: torch.Tensor, config: dict[str, Any]) -> Iterator[Finding]:
    moving = torch.nonzero(spread > 0).flatten()
    if len(moving) < 2:
        return
    least, largest = (int(moving[place]) for place in (spread[moving].argmin(), spread[moving].argmax()))
    ratio = float(spread[largest] / spread[least])
    if ratio < SCALES_APART:
        return
    remedy = known(config, "data.standardize=true")
    yield Finding(
        severity="warning",
        check="scales",
        where=label,
        what="columns of very different scale",
        evidence=f"column {largest} varies by {float(spread[largest]):.3g}, column {least} by "
        f"{float(spread[least]):.3g}: {ratio:.1e} times less",
        remedy=remedy,
        advice="" if remedy else "Standardise the columns: subtract the training part's mean, divide by its deviation.",
    )


def _classes(scans: dict[str, Scan], subject: Subject, classes: int | None) -> Iterator[Finding]:
    counts = Counter(label for label in scans["training"].labels.values() if _allowed(label, classes))
    if classes is None or not counts:
        return
    for name, found in scans.items():
        there = set(found.labels.values())
        missing = [number for number in range(classes) if number not in there]
        if missing and there and name != "test":
            yield Finding(
                severity="warning" if name == "training" else "note",
                check="missing_class",
                where=f"data, {name}",
                what="classes without a sample",
                evidence=f"{len(missing)} of {classes} classes: {listed(missing)}",
                advice="Add samples of them"
                + (", or give the model fewer outputs (model.num_classes)." if name == "training" else "."),
            )
    (most, top), (rarest, bottom) = counts.most_common()[0], counts.most_common()[-1]
    loss = getattr(subject.run.task, "loss", None)
    parts = loss.modules() if isinstance(loss, torch.nn.Module) else [loss]
    weighs = any(getattr(part, "class_weights", None) is not None for part in parts)
    if top >= IMBALANCE * bottom and not weighs:
        words = ["loss=weighted", *(["loss_mode=as_is"] if subject.config["loss_mode"] == "plain" else [])]
        yield Finding(
            severity="warning",
            check="imbalance",
            where="data, training",
            what="classes of very different size",
            evidence=f"class {most} has {top} samples, class {rarest} has {bottom}",
            remedy=known(subject.config, *words),
        )


def _repeated(scans: dict[str, Scan]) -> Iterator[Finding]:
    training = scans["training"]
    places: dict[bytes, list[int]] = {}
    for index, digest in training.usable_hashes():
        places.setdefault(digest, []).append(index)
    groups = [group for group in places.values() if len(group) > 1]
    further = sorted(index for group in groups for index in group[1:])
    torn = [group for group in groups if len({training.labels.get(index, 0) for index in group}) > 1]
    if further:
        example = torn[0] if torn else groups[0]
        many = len(further) >= MANY_DUPLICATES * training.samples
        yield _finding(
            training,
            further,
            severity="warning" if many or torn else "note",
            check="duplicate",
            what="samples that repeat others" + (", some with another label" if torn else ""),
            evidence=f"for example {' and '.join(map(str, example[:2]))} have the same inputs"
            + (f" and the labels {' and '.join(str(training.labels[index]) for index in example[:2])}" if torn else ""),
            advice="Leave the repetitions out" + (", and find out which label is right." if torn else "."),
        )
    for name in ("validation", "test"):
        found = scans.get(name)
        shared = [index for index, digest in found.usable_hashes() if digest in places] if found is not None else []
        if found is not None and shared:
            yield _finding(
                found,
                shared,
                severity="warning",
                check="leak",
                what=f"samples that are in the training and the {name} part",
                evidence=f"for example {name} sample {shared[0]} is training sample "
                f"{places[found.hashes[shared[0]]][0]}; its metrics look better than they are",
                advice="Leave them out of one part; repetitions have to go before the data are divided.",
            )
