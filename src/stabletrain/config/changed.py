"""Other settings than a run had: the same config with a few overrides, for trying them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from stabletrain.config.places import conf_folder, group_names
from stabletrain.errors import ConfigurationError


def changed(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return resolved settings with some overrides on top.

    Args:
        values: plain settings, in which nothing is left open.
        overrides: `group=option` for an option of ours, or `key=value` and `group.key=value`.

    Raises:
        ConfigurationError: there is no such option or key.
    """
    result = copy.deepcopy(values)
    options = [override for override in overrides if override.partition("=")[0] in group_names()]
    composed = _composed(options, values) if options else {}
    for override in overrides:
        path, _, word = override.partition("=")
        if override in options:
            result[path] = composed[path]
            continue
        *parents, name = path.split(".")
        node = result
        for parent in parents:
            node = node.get(parent)  # type: ignore[assignment]
            if not isinstance(node, dict):
                raise ConfigurationError(f"{override} can't be used: there is no {path} in the settings.")
        node[name] = yaml.safe_load(word)
    return result


def _composed(options: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """Compose the options beside the numbers at the root that they may refer to."""
    from stabletrain.config import settings

    roots = [f"{name}={value}" for name, value in values.items() if isinstance(value, (int, float))]
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
            return settings(compose("config", overrides=[*roots, *options]))
    finally:
        GlobalHydra.instance().clear()
        if before is not None:
            GlobalHydra.instance().initialize(before)
