"""Which keys there are: at the root, and inside options what their `_target_` takes."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stabletrain.config.places import group_names, option_names, root_keys
from stabletrain.config.words import did_you_mean
from stabletrain.errors import ConfigurationError

READ_ELSEWHERE = {"schedule": {"ramp"}}  # keys of an option that its target doesn't take
SPECIAL_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}  # Hydra's own, in any option


def check_keys(values: dict[str, Any], unresolved: dict[str, Any]) -> None:
    """Refuse keys that nothing reads: at the root, and inside options what their `_target_` doesn't take.

    A root key of somebody's own is allowed where another value refers to it as `${key}`.

    Args:
        values: the config as plain containers.
        unresolved: the same before interpolation.

    Raises:
        ConfigurationError: names the key, the keys there are and the nearest of them.
    """
    referred = set(re.findall(r"\$\{\s*(\w+)", repr(unresolved)))
    known = root_keys() | referred
    for key in values:
        if key not in known:
            raise ConfigurationError(
                f"unknown key {key!r}: nothing reads it.{did_you_mean(key, known)} "
                f"Keys at the root: {', '.join(sorted(root_keys()))}."
            )
    for group in group_names():
        if not isinstance(values.get(group), dict) or "_target_" not in values[group]:
            raise ConfigurationError(
                f"group {group} needs an option with a _target_; choose one: {group}={'|'.join(option_names(group))}."
            )
        elsewhere = READ_ELSEWHERE.get(group, set())
        _check_node(group, {key: value for key, value in values[group].items() if key not in elsewhere})


def _check_node(path: str, node: Any) -> None:
    if isinstance(node, list):
        for position, item in enumerate(node):
            _check_node(f"{path}[{position}]", item)
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_arguments(path, node, locate(path, node["_target_"]))
    for key, item in node.items():
        _check_node(f"{path}.{key}", item)


def _check_arguments(path: str, node: dict[str, Any], target: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature: their own error will have to do
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    positional_only = {parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY}
    takes = {parameter.name for parameter in parameters} - positional_only
    unknown = [key for key in node if key not in takes | SPECIAL_KEYS]
    if len(unknown) == 0:
        return
    at_run_time = {one.name for one in parameters if one.default is one.empty and node.get("_partial_") is True}
    settable = sorted(takes - at_run_time | set(node) & takes)
    raise ConfigurationError(
        f"unknown key '{path}.{unknown[0]}': {node['_target_']} doesn't take it.{did_you_mean(unknown[0], settable)} "
        f"Keys of {path}: {', '.join(settable) if len(settable) > 0 else 'none'}."
    )


def locate(path: str, target: Any) -> Callable[..., Any]:
    """Import what a `_target_` names.

    Args:
        path: the config key that holds it, for messages.
        target: a dotted name such as `mypkg.models.Net`.

    Raises:
        ConfigurationError: there is no such module or no such name in it; says where Python looked.
    """
    names = str(target).split(".")
    if not isinstance(target, str) or len(names) < 2 or "" in names:
        raise ConfigurationError(f"{path}._target_={target} is no dotted name; write package.module.Class.")
    found: Any = _import(path, target, names[0])
    for depth, name in enumerate(names[1:], start=1):
        module = ".".join(names[: depth + 1])
        is_package = inspect.ismodule(found) and hasattr(found, "__path__")
        if is_package and not hasattr(found, name) and importlib.util.find_spec(module) is not None:
            _import(path, target, module)
        if not hasattr(found, name):
            holder = ".".join(names[:depth])
            where = getattr(found, "__file__", None)
            raise ConfigurationError(
                f"{path}._target_={target}: {holder}{f' ({where})' if where is not None else ''} has no {name!r}."
                f"{did_you_mean(name, [one for one in dir(found) if not one.startswith('_')])}"
            )
        found = getattr(found, name)
    if not callable(found):
        raise ConfigurationError(f"{path}._target_={target} is a {type(found).__name__}; name a class or a function.")
    return found  # type: ignore[no-any-return]


def _import(path: str, target: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise  # the module is there, and what it imports is not
        raise ConfigurationError(
            f"{path}._target_={target} can't be imported: there is no module {module!r}. Python looked in the current "
            f"folder {Path.cwd()} and in {', '.join(place for place in sys.path[1:] if place)}. Start from the folder "
            f"that holds {module}.py or {module}/, or install it."
        ) from error
