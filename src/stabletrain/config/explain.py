"""What Hydra's and OmegaConf's errors mean, in terms of what was given and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from stabletrain.config.line import config_folders
from stabletrain.config.places import SELECTORS, conf_folder, group_names, option_names
from stabletrain.config.words import did_you_mean

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)  # what composing a config raises


def explain(error: BaseException, overrides: Sequence[str], flags: Sequence[str]) -> str:
    """Say in one message why a config could not be composed.

    Args:
        error: what Hydra raised before the run began.
        overrides: the overrides on the command line.
        flags: the flags on the command line, with their values.

    Returns:
        What was given, what is allowed, what to do.
    """
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} can't be read: {str(error).splitlines()[0]}. Write key=value; put a value with "
            "brackets, commas, spaces or = into quotes, as in 'key=\"a value\"'."
        )
    if isinstance(error, MissingConfigException):
        return _missing(error, flags)
    refused = re.match(r"Could not override '(.+?)'", str(error))
    if refused is not None:
        return _unknown_key(refused[1], overrides, flags)
    if str(error).startswith("Config group override must be a string"):
        return "an option's name is read as a number or null; put it into quotes, as in \"model='1e3'\"."
    text = str(error).partition("Config search path")[0].strip()
    cause = str(error.__cause__).splitlines()[0] if error.__cause__ is not None and str(error.__cause__) else ""
    lines = [line.strip() for line in [*text.splitlines(), cause] if line.strip() not in ("", "See")]
    return "the config can't be composed: " + "; ".join(dict.fromkeys(lines))


def _missing(error: MissingConfigException, flags: Sequence[str]) -> str:
    missing = re.sub(r"\.ya?ml$", "", error.missing_cfg_file or "")
    group, slash, option = missing.rpartition("/")
    if slash == "":
        return f"there is no config {missing!r} (--config-name); leave it out, or give the folder with --config-dir."
    allowed = sorted(set(error.options or []) | set(option_names(group, config_folders(flags))))
    if len(allowed) == 0:
        return f"unknown group {group!r}; allowed: {', '.join([*SELECTORS, *group_names()])}."
    return f"{group}={option} is no option; allowed: {', '.join(allowed)}.{did_you_mean(option, allowed)}"


def _unknown_key(key: str, overrides: Sequence[str], flags: Sequence[str]) -> str:
    known = _known(overrides, flags)
    group = key.split(".")[0]
    holder = known.get(group)
    if "." in key and isinstance(holder, DictConfig):
        keys = [name for name in _dotted(known) if name.startswith(f"{group}.")]
        more = f" What else {holder['_target_']} takes can be added as +{group}.<key>=." if "_target_" in holder else ""
        inside = [name.partition(".")[2] for name in keys]
        return f"unknown key {key!r}.{did_you_mean(key, keys)} Keys of {group}: {', '.join(inside) or 'none'}.{more}"
    roots = [str(name) for name in known]
    near = did_you_mean(key, _dotted(known)) or did_you_mean(group, roots)
    return f"unknown key {key!r}.{near} Groups and keys at the root: {', '.join(sorted(roots))}."


def _known(overrides: Sequence[str], flags: Sequence[str]) -> DictConfig:
    """Return the config with the options that were chosen and nothing else that was given."""
    groups = {*SELECTORS, *group_names()}
    chosen = [override for override in overrides if override.partition("=")[0] in groups and "," not in override]
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in config_folders(flags))}]"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        try:
            return compose("config", overrides=[*chosen, *search])
        except COMPOSITION_ERRORS:  # one of the options is wrong too: the defaults do for a hint
            return compose("config")


def _dotted(config: DictConfig) -> list[str]:
    def names(prefix: str, node: Any) -> list[str]:
        if not isinstance(node, dict):
            return []
        own = [f"{prefix}{key}" for key in node if not str(key).startswith("_")]
        return own + [name for key, item in node.items() for name in names(f"{prefix}{key}.", item)]

    return names("", OmegaConf.to_container(config, resolve=False))
