"""What the numbers and words at the root of a config may be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from stabletrain.config.words import did_you_mean
from stabletrain.errors import ConfigurationError


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return holds, f"a whole number, {least} or more"


def _number(least: float, most: float = math.inf) -> tuple[Callable[[Any], bool], str]:
    def holds(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and least <= value <= most

    return holds, f"a finite number, {least:g} or more" if most == math.inf else f"a number from {least:g} to {most:g}"


def _one_of(*words: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in words, f"one of {', '.join(words)}"


def _or_null(rule: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


def _is_device(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None


def _is_name(value: Any) -> bool:
    parts = str(value).split("/")
    return isinstance(value, (str, int, float)) and all(part not in ("", ".", "..") for part in parts)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_name, "the name of a folder under runs/"),
    "resume": (lambda value: isinstance(value, str) and value != "", "auto, never, must or the path of a checkpoint"),
    "init_from": (
        lambda value: value is None or (isinstance(value, str) and value != ""),
        "the path of a checkpoint, a run, an export or a .safetensors file, or null",
    ),
    "init_strict": (lambda value: isinstance(value, bool), "true or false"),
    "seed": _whole(0),
    "epochs": _whole(1),
    "batch_size": _whole(1),
    "accumulate": _whole(1),
    "base_lr": _number(0),
    "lr_scale": _number(0),
    "warmup_epochs": _number(0),
    "warmup_from": _number(0, 1),
    "loss_mode": _one_of("as_is", "smoothed", "plain"),
    "fp16_initial_scale": _number(1),
    "fp16_growth_interval": _whole(1),
    "checkpoint_every_updates": _or_null(_whole(1)),
    "device": (_is_device, "auto, cpu, cuda or cuda:<number>"),
    "threads": _or_null(_whole(1)),
    "workers": _whole(0),
    "validate_from": _whole(0),
    "log_every": _whole(1),
    "debug": (lambda value: isinstance(value, bool), "true or false"),
    "optimizer.lr": _number(0),
    "doctor.time_limit": _number(0),
}


def check_values(values: dict[str, Any]) -> None:
    """Refuse numbers and words at the root that make no sense; values not yet resolved are passed over.

    Args:
        values: the config as plain containers.

    Raises:
        ConfigurationError: names the key, the value and what is allowed.
    """
    for key, (holds, allowed) in RULES.items():
        group, dot, inner = key.partition(".")
        holder = values if dot == "" else values.get(group)
        name = group if dot == "" else inner
        if not isinstance(holder, dict) or name not in holder or _is_open(holder[name]) or holds(holder[name]):
            continue
        given = holder[name]
        hint = did_you_mean(given, re.findall(r"\w+", allowed)) if isinstance(given, str) else ""
        raise ConfigurationError(f"{key}={_shown(given)} is not allowed; {key} is {allowed}.{hint}")
    batch_size, accumulate = values.get("batch_size"), values.get("accumulate")
    if isinstance(batch_size, int) and isinstance(accumulate, int) and batch_size % accumulate != 0:
        raise ConfigurationError(
            f"batch_size={batch_size} can't be split into accumulate={accumulate} microbatches of one size; "
            f"take an accumulate that divides {batch_size}, such as {math.gcd(batch_size, accumulate)}."
        )


def _is_open(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
