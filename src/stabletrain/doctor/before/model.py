"""The model as it is initialised: its parameters, its outputs, its first loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.doctor.before.findings import Finding, listed
from stabletrain.doctor.before.observe import Observation
from stabletrain.doctor.before.subject import Subject, targets_of
from stabletrain.doctor.gain import gain
from stabletrain.tree import local

LARGEST_GAIN, SMALLEST_GAIN = 5.0, 1e-3
HUGE = 1e6  # no scheme draws such a weight
WIDE_LOGITS = 10.0
_SCALED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def examine_parameters(model: nn.Module) -> list[Finding]:
    """Return what is wrong with a model's parameters and buffers; nothing is changed."""
    findings: list[Finding] = []
    bad = {name: _odd(local(tensor.detach())) for name, tensor in model.named_parameters()}
    for name, module in model.named_modules():
        for inner, buffer in module.named_buffers(recurse=False):
            # A mask of -Inf is a constant as many models keep it.
            if bool(torch.isnan(buffer).any()) or (
                isinstance(module, _NORMS) and not bool(torch.isfinite(buffer).all())
            ):
                bad[f"{name}.{inner}".lstrip(".")] = _odd(local(buffer))
    broken = {name: said for name, said in bad.items() if said}
    if broken:
        name = next(iter(broken))
        findings.append(
            Finding(
                severity="broken",
                check="parameters",
                where="model",
                what="parameters or buffers that aren't finite",
                evidence=f"{len(broken)} of them: {listed(list(broken))}; {name} holds {broken[name]}",
                advice="Initialise them (torch.empty leaves what was in memory), or take other weights (init_from).",
            )
        )
    findings += list(_initialised(model, set(broken)))
    return findings


def _odd(tensor: Tensor) -> str:
    if not tensor.is_floating_point():
        return ""
    nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    parts = [f"{count} {name}" for count, name in ((nan, "NaN"), (inf, "Inf")) if count]
    return f"{' and '.join(parts)} of {tensor.numel()} values" if parts else ""


def _initialised(model: nn.Module, skip: set[str]) -> Iterator[Finding]:
    for prefix, module in model.named_modules():
        for inner, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{inner}".lstrip(".")
            values = local(parameter.detach())
            if name in skip or not values.is_floating_point() or values.numel() < 2:
                continue
            largest = float(values.abs().max())
            tiny = (values != 0) & (values.abs() < torch.finfo(values.dtype).tiny)
            if largest > HUGE or bool(tiny.any()):
                yield _warning(
                    "uninitialised",
                    f"{name} looks uninitialised",
                    f"its values reach {largest:.3g}" if largest > HUGE else f"{int(tiny.sum())} values are subnormal",
                    "Initialise it: torch.empty leaves what was in memory.",
                )
            elif (
                values.dim() > 1
                and min(values.shape) > 1
                and largest > 0
                and float(values.min()) == float(values.max())
            ):
                yield _warning(
                    "uninitialised",
                    f"{name} has one value everywhere",
                    f"all of its {values.numel()} values are {largest:.4g}, so all units compute the same and stay so",
                    "Draw its values at random.",
                )
            elif isinstance(module, _SCALED) and values.dim() > 1:
                yield from _scaled(name, values)


def _scaled(name: str, values: Tensor) -> Iterator[Finding]:
    inputs = values[0].numel()
    found = gain(values)
    if found > LARGEST_GAIN or 0 < found < SMALLEST_GAIN:
        yield _warning(
            "scale",
            f"{name} is scaled too {'high' if found > 1 else 'low'}",
            f"root mean square {found / math.sqrt(inputs):.3g} with {inputs} inputs: {found:.3g} times 1/sqrt(inputs), "
            "where 0.5 to 1.5 keeps the signal's size",
            f"Draw it with a standard deviation of about {1 / math.sqrt(inputs):.2g} (torch.nn.init.kaiming_normal_).",
        )


def _warning(check: str, what: str, evidence: str, advice: str) -> Finding:
    return Finding(severity="warning", check=check, where="model", what=what, evidence=evidence, advice=advice)


def examine_start(subject: Subject, seen: Observation, data: Any) -> tuple[list[Finding], dict[str, Any]]:
    """Compare outputs and loss at the start with what an untrained model should give.

    Args:
        subject: the run.
        seen: of the batch `data`, in float32.
        data: the batch.

    Returns:
        Findings, and the measured loss beside the expected one: that of equal probabilities, ln C for cross entropy.
    """
    output = seen.output
    if not isinstance(output, Tensor) or output.dim() != 2 or not math.isfinite(seen.loss):
        return [], {"loss": seen.loss}
    findings, facts = [], {"loss": seen.loss, "logits": float(output.float().square().mean().sqrt())}
    constant = len(output) > 1 and bool((output == output[0]).all())
    if constant:
        findings.append(
            _warning(
                "constant_output",
                "the output doesn't depend on the input",
                f"all {len(output)} samples of a batch have the same output",
                "Look for a layer that is dead, or weights that are 0.",
            )
        )
    loss = getattr(subject.run.task, "loss", None)
    classifies = getattr(subject.run.task, "name", "classification") == "classification"
    if loss is None or not classifies or output.shape[1] < 2:
        return findings, facts
    try:
        with torch.no_grad():
            per_sample, weights = loss(torch.zeros_like(output, dtype=torch.float32), targets_of(data))
    except Exception:  # a loss of the user's own with another form
        return findings, facts
    total = per_sample.sum() if weights is None else (per_sample * weights).sum()
    weight = len(per_sample) if weights is None else float(weights.sum())
    expected = float(total) / weight if weight > 0 else 0.0
    facts["expected_loss"] = expected
    pretrained = subject.config.get("init_from") is not None
    high, low = seen.loss > 1.5 * expected + 0.5, seen.loss < 0.5 * expected and not pretrained
    if (high or low) and not constant:
        classes = output.shape[1]
        findings.append(
            _warning(
                "first_loss",
                f"the first loss is too {'high' if high else 'low'}",
                f"{seen.loss:.4g}, where equal probabilities for {classes} classes give {expected:.4g} (cross entropy: "
                f"ln {classes} = {math.log(classes):.4g}); the logits have a root mean square of {facts['logits']:.3g}",
                "Scale the last layer's initial weights down."
                if high
                else "Look for the label among the inputs, or for weights that were trained before.",
            )
        )
    return findings, facts
