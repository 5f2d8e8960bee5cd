"""Remedies as overrides: only keys and options that this config has."""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

from stabletrain.config import conf_folder, group_names, option_names


def known(config: dict[str, Any], *words: str) -> str:
    """Return the overrides if this config has all of them, else nothing.

    Args:
        config: the run's settings.
        words: `key=value`, with a dotted key for a value inside an option, or `group=option`, after which the keys are
            that option's.

    Example:
        >>> config = {"epochs": 3, "data": {"_target_": "stabletrain.data.from_csv", "nonfinite": "raise"}}
        >>> known(config, "data.nonfinite=drop"), known(config, "data.impute=true"), known(config, "precision=fp32")
        ('data.nonfinite=drop', '', 'precision=fp32')
    """
    chosen = dict(config)
    for word in words:
        key, _, value = word.partition("=")
        if key in group_names():
            if value not in option_names(key):
                return ""
            chosen[key] = yaml.safe_load((conf_folder() / key / f"{value}.yaml").read_text())
        elif not _has(chosen, key):
            return ""
    return " ".join(words)


def first_known(config: dict[str, Any], *choices: str) -> str:
    """Return the first of several overrides that this config has, else nothing."""
    return next((choice for choice in choices if known(config, *choice.split())), "")


def _has(config: dict[str, Any], key: str) -> bool:
    node: Any = config
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def rounded_down(value: float) -> str:
    """Return a number with one digit, not above `value`.

    Example:
        >>> rounded_down(0.0479), rounded_down(3.0), rounded_down(1.99e-5)
        ('0.04', '3', '1e-05')
    """
    digits, _, exponent = f"{value:.6e}".partition("e")
    return f"{float(f'{int(float(digits))}e{exponent}'):g}"
