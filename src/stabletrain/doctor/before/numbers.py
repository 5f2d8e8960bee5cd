"""The numbers of a healthy batch: what overflows, what vanishes, what is dead, in each precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from stabletrain.doctor.before.findings import Finding, listed, shortened
from stabletrain.doctor.before.observe import Observation, Seen, observe
from stabletrain.doctor.before.overrides import first_known, known
from stabletrain.doctor.before.subject import Subject

LITTLE_HEADROOM = 4.0
VANISHING, EXPLODING = 1e-5, 1e5  # gradient at the first module over that at the last
LARGE_GRADIENT, SMALL_GRADIENT = 1e4, 1e-8  # norm over all parameters
DEAD_SHARE = 0.9  # of a module's units
_RECTIFIERS = {"ReLU", "ReLU6", "Threshold", "Hardtanh"}


def wider(config: dict[str, Any], precision: str) -> str:
    """Return the override that gives more range than a precision has."""
    return first_known(config, *(("precision=bf16", "precision=fp32") if precision == "fp16" else ("precision=fp32",)))


def examine_numbers(subject: Subject, seen: dict[str, Observation]) -> list[Finding]:
    """Judge a batch that was run in each precision.

    Args:
        subject: the run.
        seen: by precision, the chosen one first.
    """
    chosen = next(iter(seen))
    findings = list(_overflows(subject, chosen, seen[chosen]))
    if seen[chosen].error is not None:
        return findings
    if findings == []:
        for name, other in seen.items():
            bad = other.first_bad_module()
            if name != chosen and not other.finite:
                findings.append(
                    Finding(
                        severity="note",
                        check="overflow",
                        where="numbers",
                        what=f"{name} wouldn't do",
                        evidence=f"there {other.said}" + (f", from module {bad}" if bad else ""),
                        advice=f"Stay with precision={chosen}.",
                    )
                )
    exact = seen.get("fp32", seen[chosen])
    if exact.finite and exact.error is None:
        findings += _gradients(subject, exact)
        if chosen == "fp16":
            findings += _underflows(subject, seen[chosen], exact)
    return findings


def headroom(seen: dict[str, Observation]) -> dict[str, dict[str, float]]:
    """Return by precision and module by what factor its outputs may grow before they overflow."""
    return {
        name: {module: one.headroom for module, one in other.modules.items()}
        for name, other in seen.items()
        if other.error is None
    }


def _overflows(subject: Subject, precision: str, seen: Observation) -> Iterator[Finding]:
    if seen.error is not None:
        yield Finding(
            severity="broken",
            check="forward",
            where="model",
            what="a healthy batch can't be trained on",
            evidence=shortened(f"{type(seen.error).__name__}: {seen.error}", 300),
            advice="Correct the model, or choose one that fits the data and the loss.",
        )
        return
    bad = seen.first_bad_module()
    if not math.isfinite(seen.loss):
        yield Finding(
            severity="broken",
            check="loss",
            where="numbers",
            what=f"the loss isn't finite in {precision}",
            evidence=f"{seen.loss} on a batch of finite inputs"
            + (
                f"; the first module whose output isn't finite is {bad}" if bad else "; all modules' outputs are finite"
            ),
            **_wider_or(
                subject, precision, seen, "Look at what this module, or the loss, divides by or takes the root of."
            ),
        )
        return
    gradients = seen.bad_gradients()
    if gradients:
        yield Finding(
            severity="broken",
            check="gradient",
            where="numbers",
            what=f"gradients aren't finite in {precision}",
            evidence=f"the loss is {seen.loss:.4g}, but the gradients of {listed(gradients)} hold NaN or Inf"
            + (", at any loss scale" if precision == "fp16" else ""),
            **_wider_or(
                subject,
                precision,
                seen,
                "Look for a root, a logarithm or a division at a point where its slope is infinite.",
            ),
        )
    tight = {name: one for name, one in seen.modules.items() if one.headroom < LITTLE_HEADROOM and one.finite}
    if tight:
        name = min(tight, key=lambda module: tight[module].headroom)
        one = tight[name]
        yield Finding(
            severity="warning",
            check="headroom",
            where="numbers",
            what=f"little room to the end of {str(one.dtype).removeprefix('torch.')}",
            evidence=f"module {name} ({one.kind}) reaches {one.largest:.4g} of {torch.finfo(one.dtype).max:.4g}: "
            f"{one.headroom:.2f} times",
            **_wider_or(subject, precision, seen, "Scale its inputs or weights down, or normalise before it."),
        )


def _wider_or(subject: Subject, precision: str, seen: Observation, advice: str) -> dict[str, Any]:
    """Return a wider precision as the remedy, if the batch is healthy there; else the advice."""
    remedy = wider(subject.config, precision) if precision != "fp32" else ""
    if remedy:
        name = remedy.partition("=")[2]
        other = observe(subject, subject.batch(), subject.precisions()[name])
        if other.finite and other.error is None:
            return {"remedy": remedy}
    return {"advice": advice}


def _underflows(subject: Subject, half: Observation, exact: Observation) -> Iterator[Finding]:
    lost = [
        name
        for name, gradient in half.gradients.items()
        if gradient is not None
        and not bool(gradient.any())
        and (full := exact.gradients.get(name)) is not None
        and bool(full.any())
    ]
    if lost:
        higher = known(subject.config, "fp16_initial_scale=65536") if half.scale < 65536 else ""
        yield Finding(
            severity="warning",
            check="underflow",
            where="numbers",
            what="gradients that vanish in fp16",
            evidence=f"{listed(lost)}: all 0 at a loss scale of {half.scale:g}, but not in fp32",
            remedy=higher or wider(subject.config, "fp16"),
        )


def _gradients(subject: Subject, seen: Observation) -> Iterator[Finding]:
    missing = [name for name, gradient in seen.gradients.items() if gradient is None]
    zero = [name for name, gradient in seen.gradients.items() if gradient is not None and not bool(gradient.any())]
    if zero:
        zero = _still_zero(subject, zero)
    if missing:
        yield Finding(
            severity="warning",
            check="no_gradient",
            where="model",
            what="parameters without a gradient",
            evidence=f"{listed(missing)}: the loss doesn't depend on them",
            advice="Use them in forward, or leave them out (or set requires_grad=False).",
        )
    dead = [
        name
        for name, one in seen.modules.items()
        if one.kind in _RECTIFIERS and one.zero >= DEAD_SHARE and not _is_classifier(seen.modules, name)
    ]
    if zero or dead:
        parts = [f"the gradients of {listed(zero)} are exactly 0, also after an update"] if zero else []
        parts += [
            f"{seen.modules[name].zero:.0%} of the units of {name} are 0 for the whole batch" for name in dead[:3]
        ]
        yield Finding(
            severity="broken" if zero and len(zero) == len(seen.gradients) else "warning",
            check="dead",
            where="model",
            what="dead layers",
            evidence="; ".join(parts),
            advice="Look at the initial weights and biases before them, and at what cuts the graph (detach, rounding).",
        )
    elif not missing:
        yield from _flow(subject, seen)


def _is_classifier(modules: dict[str, Seen], name: str) -> bool:
    return name == list(modules)[-1]


def _still_zero(subject: Subject, names: list[str]) -> list[str]:
    """Return which of these gradients are 0 after a small step too; a branch that starts at 0 comes alive by then."""
    model, precision = subject.fresh_model(), subject.precisions()["fp32"]
    for number in range(2):
        seen = observe(subject, subject.batch(), precision, model=model)
        if not seen.finite or seen.error is not None:
            return names
        if number == 0:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None and not parameter.grad.is_sparse:
                        norm = float(torch.linalg.vector_norm(parameter.grad))
                        size = max(1e-3, float(torch.linalg.vector_norm(parameter)))
                        parameter.sub_(parameter.grad, alpha=1e-2 * size / norm if norm > 0 else 0.0)
    return [name for name in names if (left := seen.gradients.get(name)) is not None and not bool(left.any())]


def _flow(subject: Subject, seen: Observation) -> Iterator[Finding]:
    known_gradients = [gradient for gradient in seen.gradients.values() if gradient is not None]
    norms = [
        float(torch.linalg.vector_norm(gradient.double())) for gradient in known_gradients if not gradient.is_sparse
    ]
    total = math.sqrt(sum(norm**2 for norm in norms))
    with_weights = {name for name, module in subject.run.model.named_modules() if _has_weights(module)}
    flow = {
        name: one.gradient for name, one in seen.modules.items() if name in with_weights and 0 < one.gradient < math.inf
    }
    names = list(flow)
    ratio = flow[names[0]] / flow[names[-1]] if len(names) > 1 and flow[names[-1]] > 0 else 1.0
    evidence = f"the gradient at {names[0]} is {ratio:.1e} times that at {names[-1]}" if len(names) > 1 else ""
    if ratio < VANISHING or 0 < total < SMALL_GRADIENT:
        yield Finding(
            severity="warning",
            check="vanishing",
            where="model",
            what="vanishing gradients",
            evidence=evidence if ratio < VANISHING else f"the gradient norm of all parameters is {total:.1e}",
            advice="Normalise between the layers, add residual connections, or use ReLU in place of sigmoid and tanh.",
        )
    elif ratio > EXPLODING or total > LARGE_GRADIENT:
        clip = subject.config.get("clipping", {}).get("max_norm")
        yield Finding(
            severity="warning",
            check="exploding",
            where="model",
            what="exploding gradients",
            evidence=evidence if ratio > EXPLODING else f"the gradient norm of all parameters is {total:.1e}",
            remedy=known(subject.config, "clipping=norm_tight") if clip is None or clip > 1.0 else "",
            advice="Scale the initial weights down, or normalise between the layers.",
        )


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
