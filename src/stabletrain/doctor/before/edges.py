"""Edge cases: batches that come sooner or later, and inputs that grow, in each precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stabletrain.doctor.before.findings import Finding, shortened
from stabletrain.doctor.before.numbers import wider
from stabletrain.doctor.before.observe import Observation, observe
from stabletrain.doctor.before.overrides import known
from stabletrain.doctor.before.subject import Subject, inputs_of, leaves, targets_of, with_inputs
from stabletrain.precision import Precision
from stabletrain.tree import map_tensors, tensors

SAMPLES = 8
FACTORS = (1e2, 1e4, 1e6)


def examine_edges(subject: Subject) -> tuple[list[Finding], dict[str, dict[str, str]]]:
    """Run each edge case that the data and the model can have, on fresh copies, in each precision.

    Returns:
        Findings, and by case and precision what came of it: `ok`, what isn't finite, or how the batch was refused.
    """
    precisions = subject.precisions()
    chosen = next(iter(precisions))
    said: dict[str, dict[str, str]] = {}
    findings: list[Finding] = []
    single = subject.smallest_microbatch() == 1
    for case, data in edge_cases(subject):
        seen = {name: observe(subject, data, one) for name, one in precisions.items() if _fits(data, one)}
        said[case] = {name: shortened(one.said) for name, one in seen.items()}
        findings += _judged(subject, case, chosen, seen, single)
    return _merged(findings), said


def edge_cases(subject: Subject) -> Iterator[tuple[str, Any]]:
    """Yield the name and the batch of each edge case that applies."""
    data = subject.batch(SAMPLES)
    inputs, targets = inputs_of(data), targets_of(data)
    samples = _samples(data)
    yield "a batch of 1", subject.batch(1)
    yield "equal samples", _repeated(data, samples)
    yield "all-zero input", with_inputs(data, map_tensors(_zeros, inputs))
    if any(tensor.is_floating_point() for tensor in tensors(inputs)):
        for factor in FACTORS:
            yield f"inputs times {factor:.0e}".replace("e+0", "e"), with_inputs(data, _scaled(inputs, factor))
    yield from _masks(data, inputs, samples)
    yield from _lengths(data, inputs, samples)
    if isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.dim() == 1:
        yield "one class only", with_targets(data, torch.full_like(targets, int(targets[0])))
        ignored = subject.ignored_label()
        if ignored is not None:
            yield "all labels ignored", with_targets(data, torch.full_like(targets, ignored))


def with_targets(data: Any, targets: Tensor) -> Any:
    """Return the batch with other targets."""
    return (data[0], targets)


def _samples(data: Any) -> int:
    targets = targets_of(data)
    if isinstance(targets, Tensor) and targets.dim() > 0:
        return len(targets)
    first = next(tensors(data))
    return len(first) if first.dim() > 0 else 1


def _zeros(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.bool else torch.zeros_like(tensor)


def _scaled(inputs: Any, factor: float) -> Any:
    return map_tensors(lambda tensor: tensor * factor if tensor.is_floating_point() else tensor, inputs)


def _repeated(tree: Any, samples: int) -> Any:
    """Return a batch in which each sample is the first one."""
    if isinstance(tree, Tensor):
        return tree[:1].expand_as(tree).clone() if tree.dim() > 0 and len(tree) == samples else tree
    if isinstance(tree, list) and len(tree) == samples and all(isinstance(item, Tensor) for item in tree):
        return [tree[0].clone() for _ in tree]
    if isinstance(tree, dict):
        return {name: _repeated(item, samples) for name, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_repeated(item, samples) for item in tree)
    return tree


def _masks(data: Any, inputs: Any, samples: int) -> Iterator[tuple[str, Any]]:
    """Yield a batch whose first sample attends to nothing; what a mask's True means isn't known, so both are tried."""
    for name, leaf in leaves(inputs, samples):
        is_mask = isinstance(leaf, Tensor) and leaf.dim() > 1 and (leaf.dtype == torch.bool or "mask" in name)
        if not is_mask or (leaf.is_floating_point() and not bool(((leaf == 0) | (leaf == 1)).all())):  # type: ignore[union-attr]
            continue
        for value in (True, False):
            yield f"fully masked attention ({name} all {value})", with_inputs(data, _with_first(inputs, leaf, value))


def _lengths(data: Any, inputs: Any, samples: int) -> Iterator[tuple[str, Any]]:
    for name, leaf in leaves(inputs, samples):
        if isinstance(leaf, list) and len({len(item) for item in leaf if item.dim() > 0}) > 1:
            empty = [leaf[0][:0], *leaf[1:]]
            yield "empty sequence", with_inputs(data, _replaced(inputs, leaf, empty))
        elif isinstance(leaf, Tensor) and leaf.dim() == 1 and not leaf.is_floating_point() and "length" in name:
            yield f"empty sequence ({name} is 0)", with_inputs(data, _with_first(inputs, leaf, 0))


def _with_first(inputs: Any, leaf: Any, value: Any) -> Any:
    changed = leaf.clone()
    changed[0] = value
    return _replaced(inputs, leaf, changed)


def _replaced(tree: Any, old: Any, new: Any) -> Any:
    if tree is old:
        return new
    if isinstance(tree, dict):
        return {name: _replaced(item, old, new) for name, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_replaced(item, old, new) for item in tree)
    return tree


def _fits(data: Any, precision: Precision) -> bool:
    """Return whether the inputs themselves are numbers of the precision's format."""
    limit = torch.finfo(precision.dtype).max
    floats = [tensor for tensor in tensors(inputs_of(data)) if tensor.is_floating_point() and tensor.numel() > 0]
    return all(float(tensor.abs().max()) <= limit for tensor in floats)


def _judged(subject: Subject, case: str, chosen: str, seen: dict[str, Observation], single: bool) -> Iterator[Finding]:
    bad = {name: one for name, one in seen.items() if not one.finite}
    if case == "a batch of 1":
        refused = chosen in seen and seen[chosen].error is not None
        if single and (refused or chosen in bad):
            yield _single(subject, seen[chosen])
            return
    elif (
        chosen in seen
        and seen[chosen].error is not None
        and case in ("equal samples", "all-zero input", "one class only")
    ):
        yield Finding(
            severity="warning",
            check="edge",
            where="numbers",
            what=f"{case}: refused",
            evidence=shortened(seen[chosen].said, 200),
            advice="Let the model take such a batch: it will come.",
        )
        return
    if not bad:
        return
    factor = float(case.rpartition(" ")[2]) if case.startswith("inputs times") else 0.0
    if chosen not in bad:
        # That a narrower format ends sooner is no fault of the model.
        if factor > FACTORS[0]:
            return
        severity = "note"
    else:
        severity = "note" if factor == FACTORS[-1] or (chosen == "fp16" and factor > FACTORS[0]) else "warning"
    name = chosen if chosen in bad else next(iter(bad))
    where = bad[name].first_bad_module()
    healthy = [one for one in seen if one not in bad and seen[one].error is None]
    remedy = wider(subject.config, chosen) if chosen in bad else ""
    yield Finding(
        severity=severity,  # type: ignore[arg-type]
        check="edge",
        where="numbers",
        what=f"{case}: not finite in {', '.join(bad)}",
        evidence=bad[name].said + (f"; the first module is {where}" if where else ""),
        remedy=remedy if remedy.partition("=")[2] in healthy else "",
        advice=_advice(case),
    )


def _advice(case: str) -> str:
    if case.startswith("fully masked"):
        return "Let each sample attend to something, or set the output of a row without any to 0 before the softmax."
    if case.startswith("inputs times"):
        return "Normalise the inputs, or compute exp, squares and sums of this size in a way that can't overflow."
    if case.startswith("empty sequence"):
        return "Refuse samples without a time step, or divide by the number of steps only where it isn't 0."
    if case in ("one class only", "all labels ignored"):
        return "Divide the loss by the number of terms only where it isn't 0."
    if case == "a batch of 1":
        return "A deviation over one sample is 0/0: use correction=0, or statistics that don't depend on the batch."
    return "Add a small number before what is divided by, or before the root that is taken."


def _single(subject: Subject, seen: Observation) -> Finding:
    loader = subject.run.loader
    if loader.accumulate > 1:
        remedy = known(subject.config, "accumulate=1")
    else:
        remedy = f"batch_size={min(32, len(loader.dataset))}" if loader.batch_size == 1 else ""
    return Finding(
        severity="broken",
        check="single_sample",
        where="numbers",
        what="microbatches of 1 sample, which can't be trained on",
        evidence=f"batch_size {loader.batch_size} / accumulate {loader.accumulate}, {len(loader.dataset)} samples; "
        f"{shortened(seen.said, 120)}",
        remedy=remedy,
        advice="" if remedy else "Choose a batch_size whose last step has more samples.",
    )


def _merged(findings: list[Finding]) -> list[Finding]:
    """Keep the smallest factor of inputs that overflow: larger ones say the same."""
    kept: list[Finding] = []
    for one in findings:
        grown = one.what.startswith("inputs times")
        if not (grown and any(other.what.startswith("inputs times") for other in kept)):
            kept.append(one)
    return kept
