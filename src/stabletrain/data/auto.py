"""What a config takes from the data: each `auto` in it."""

from __future__ import annotations

from typing import Any

from stabletrain.data.splits import Splits
from stabletrain.errors import ConfigurationError

AUTO_GROUPS = (
    "model",
    "task",
    "loss",
    "augmentation",
    "fault",
)  # groups in which the value `auto` is taken from the data


def with_facts(config: dict[str, Any], splits: Splits) -> dict[str, Any]:
    """Return the config with each `auto` in the options of AUTO_GROUPS replaced by what the data tells.

    Args:
        config: plain settings; they stay as they are.
        splits: whose facts are taken.

    Raises:
        ConfigurationError: the data doesn't tell what an `auto` asks for.

    Example:
        >>> import torch
        >>> from stabletrain.data import ArrayDataset
        >>> splits = Splits(ArrayDataset(torch.zeros(4, 3), torch.tensor([0, 1, 1, 2])))
        >>> with_facts({"model": {"in_features": "auto", "hidden": 8}}, splits)
        {'model': {'in_features': 3, 'hidden': 8}}
    """

    def fill(path: str, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: fill(f"{path}.{inner}", inner, item) for inner, item in value.items()}
        if isinstance(value, list):
            return [fill(f"{path}[{position}]", name, item) for position, item in enumerate(value)]
        if value != "auto":
            return value
        if name not in splits.facts:
            known = ", ".join(f"{fact}={_short(told)}" for fact, told in splits.facts.items())
            raise ConfigurationError(
                f"{path} is auto, but the data ({splits.name}) doesn't tell {name}; it tells {known or 'nothing'}. "
                f"Give it as {path}=<value>."
            )
        return splits.facts[name]

    return {group: fill(group, group, node) if group in AUTO_GROUPS else node for group, node in config.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
