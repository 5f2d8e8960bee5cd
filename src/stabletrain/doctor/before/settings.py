"""The settings: numbers that are known to make training unstable, before anything is run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.doctor.before.findings import Finding
from stabletrain.doctor.before.overrides import first_known, known
from stabletrain.doctor.before.subject import FORMATS, Subject
from stabletrain.optimizer import doubts

SMALL_TEMPERATURE = 0.01  # logits of 1 become 100, whose exponential overflows float32 unless its maximum is subtracted
LARGE_LOGIT_SCALE = math.log(100.0)  # CLIP's limit
SMALL_BATCH = 8  # samples from which BatchNorm takes its statistics
SMALL_PART = 16  # the same under accumulation
_TEMPERATURES = ("temperature", "temp", "tau")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def examine_settings(subject: Subject) -> list[Finding]:
    """Return the settings that don't go together, or are known for trouble."""
    checks = (_temperatures, _focal, _optimizer, _module_eps, _warm_up, _batch_norm)
    return [finding for check in checks for finding in check(subject)]


def _finding(severity: Any, check: str, what: str, evidence: str, remedy: str = "", advice: str = "") -> Finding:
    return Finding(
        severity=severity, check=check, where="settings", what=what, evidence=evidence, remedy=remedy, advice=advice
    )


def _modules(subject: Subject) -> Iterator[tuple[str, nn.Module]]:
    """Visit the modules of the model and of the loss, which may have settings and parameters of its own."""
    for name, module in subject.run.model.named_modules():
        yield (f"model.{name}" if name else "model"), module
    loss = getattr(subject.run.task, "loss", None)
    if isinstance(loss, nn.Module):
        for name, module in loss.named_modules():
            yield (f"loss.{name}" if name else "loss"), module


def _temperatures(subject: Subject) -> Iterator[Finding]:
    told: set[float] = set()
    for key, number in _numbers(subject.config):
        name = key.rpartition(".")[2].lower()
        if (name in _TEMPERATURES or name.endswith("temperature")) and number < SMALL_TEMPERATURE:
            told.add(number)
            yield _too_cold(key, number, remedy=known(subject.config, f"{key}=0.1"))
    for place, module in _modules(subject):
        value: float | None
        for name, found in {**vars(module), **dict(module.named_parameters(recurse=False))}.items():
            value = _scalar(found)
            if value is None:
                continue
            word = name.lower()
            if word in _TEMPERATURES or word.endswith("temperature"):
                is_log = word.startswith("log")
                if not is_log and value < SMALL_TEMPERATURE and value not in told:
                    yield _too_cold(f"{place}.{name}", value)
            elif word == "logit_scale" and isinstance(found, Tensor) and value > LARGE_LOGIT_SCALE + 1e-3:
                yield _finding(
                    "warning",
                    "temperature",
                    "a logit scale that is very high",
                    f"{place}.{name} is {value:.4g}; exp of it multiplies the logits, by more than 100",
                    advice="Begin at ln(1 / 0.07), and limit it to ln 100 in forward.",
                )


def _too_cold(key: str, value: float, remedy: str = "") -> Finding:
    return _finding(
        "broken" if value <= 0 else "warning",
        "temperature",
        "a temperature of 0 or less" if value <= 0 else "a temperature that is very low",
        f"{key} is {value:g}" + ("" if value <= 0 else f": logits are multiplied by {1 / value:.3g}"),
        remedy=remedy,
        advice="" if remedy else "Choose 0.05 or more.",
    )


def _numbers(node: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield key, float(node)


def _scalar(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _focal(subject: Subject) -> Iterator[Finding]:
    for place, module in _modules(subject):
        gamma = getattr(module, "gamma", None)
        if "focal" in type(module).__name__.lower() and isinstance(gamma, (int, float)) and 0 < gamma < 1:
            yield _finding(
                "warning",
                "focal_gamma",
                "a focal gamma below 1",
                f"{place}.gamma is {gamma:g}: the slope of (1 - p)^gamma grows without limit as p comes near 1",
                remedy=known(subject.config, "loss.gamma=1.0"),
                advice="" if known(subject.config, "loss.gamma=1.0") else "Choose a gamma of 1 or more, or 0.",
            )


def _optimizer(subject: Subject) -> Iterator[Finding]:
    for doubt in doubts(subject.run.optimizer):
        narrow = doubt.dtype not in (torch.float32, torch.float64)
        remedy = {
            "eps": f"optimizer.eps={'1e-4' if narrow else '1e-8'}",
            "weight_decay": "optimizer.weight_decay=0.01",
            "rate": "base_lr=1e-4",
        }[doubt.kind]
        rate = subject.run.optimizer.param_groups[0].get("lr", 0.0)
        yield _finding(
            "broken" if doubt.broken else "warning",
            doubt.kind,
            doubt.what,
            doubt.evidence,
            remedy=known(subject.config, remedy),
            advice="The learning rate is the larger part of it." if doubt.kind == "weight_decay" and rate >= 1 else "",
        )


def _module_eps(subject: Subject) -> Iterator[Finding]:
    dtype = subject.run.precision.dtype
    for place, module in _modules(subject):
        eps = getattr(module, "eps", None)
        if not isinstance(eps, float):
            continue
        # Torch's own normalisations compute in float32, whatever autocast says.
        format_used = torch.float32 if isinstance(module, _NORMS) else dtype
        if float(torch.tensor(eps, dtype=format_used)) == 0.0:
            remedy = first_known(subject.config, "precision=bf16") if eps > 0 and dtype == torch.float16 else ""
            yield _finding(
                "warning",
                "eps",
                f"an eps that is 0 in {FORMATS.get(format_used, str(format_used))}",
                f"{place}.eps is {eps:g} ({type(module).__name__}): equal values give 0/0",
                remedy=remedy,
                advice="" if remedy else "Choose 1e-5 or more (in float16: 1e-4 or more).",
            )


def _warm_up(subject: Subject) -> Iterator[Finding]:
    run = subject.run
    beginning = max(2, run.total_steps // 4)
    factors = [run.schedule(update) for update in range(beginning)]
    if max(factors) <= 0 or factors[0] < 0.9 * max(factors):
        return
    epochs = run.total_steps / max(1, run.loader.steps_per_epoch)
    own = subject.config["schedule"].get("warmup_epochs")
    if subject.config["schedule"].get("warmup_from", 0.1) >= 0.9 and own not in (None, 0):
        remedy = known(subject.config, "warmup_from=0.1")
    else:
        # The option takes it from the root, unless its own value stands in the way.
        length = f"{0.05 * epochs:g}"
        from_root = own is not None and own == subject.config.get("warmup_epochs")
        remedy = first_known(
            subject.config, f"warmup_epochs={length}" if from_root else f"schedule.warmup_epochs={length}"
        )
    yield _finding(
        "warning",
        "warm_up",
        "no warm-up of the learning rate",
        f"the first update is made with {factors[0]:.0%} of the base rate, the highest in the first quarter is "
        f"{max(factors):.0%}",
        remedy=remedy or known(subject.config, "schedule=cosine"),
    )


def _batch_norm(subject: Subject) -> Iterator[Finding]:
    run = subject.run
    found = [name for name, module in run.model.named_modules() if isinstance(module, _BATCH_NORMS)]
    if not found:
        return
    loader = run.loader
    size = loader.batch_size // (loader.accumulate * loader.ranks)
    accumulated = loader.accumulate > 1
    enough = SMALL_PART if accumulated else SMALL_BATCH
    if size >= enough and not accumulated:
        return
    larger = loader.accumulate * enough
    if accumulated and loader.batch_size >= SMALL_PART:
        remedy = known(subject.config, "accumulate=1")
    else:
        remedy = f"batch_size={larger}" if larger <= len(loader.dataset) else ""
    without = known(subject.config, "model.batch_norm=false")
    yield _finding(
        "warning" if size < enough else "note",
        "batch_norm",
        f"BatchNorm over {size} sample{'s' if size > 1 else ''}" + (" of each step's" if accumulated else ""),
        f"{len(found)} BatchNorm modules ({found[0]}, ...) take their statistics from batch_size {loader.batch_size} / "
        f"accumulate {loader.accumulate} = {size} samples",
        remedy=remedy,
        advice="Or normalise without the batch: " + (without or "GroupNorm or LayerNorm in place of BatchNorm") + ".",
    )
