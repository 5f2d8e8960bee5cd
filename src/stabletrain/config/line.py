"""The command line before Hydra sees it: which command, and overrides in the form that Hydra understands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from stabletrain.config.places import SELECTORS, group_names, option_names
from stabletrain.config.words import did_you_mean
from stabletrain.errors import ConfigurationError

ADDED = (*SELECTORS, "fault")  # groups that come on top of a run: people write them with a plus, or without
_FLAGS_WITH_VALUE = {
    *("--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun"),
    *("--cfg", "-c"),
}


def split_command(arguments: Sequence[str], commands: Iterable[str]) -> tuple[str, list[str]]:
    """Split a bare first word off the command line: it is the command; without one it is the first of `commands`.

    Example:
        >>> split_command(["seed=1"], ["train"]), split_command(["train", "seed=1"], ["train"])
        (('train', ['seed=1']), ('train', ['seed=1']))

    Raises:
        ConfigurationError: the word is no command.
    """
    allowed = list(commands)
    if len(arguments) == 0 or not re.fullmatch(r"[A-Za-z][\w-]*", arguments[0]):
        return allowed[0], list(arguments)
    if arguments[0] not in allowed:
        raise ConfigurationError(
            f"{arguments[0]!r} is no command; allowed: {', '.join(allowed)}."
            f"{did_you_mean(arguments[0], allowed)} Settings are written key=value."
        )
    return arguments[0], list(arguments[1:])


def arrange(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Bring a command line into the form that Hydra understands in every order.

    `+preset=`, `+experiment=` and `+fault=` become the plain form, and overrides go before flags (Hydra's parser
    refuses overrides on both sides of a flag).

    Args:
        arguments: the command line after the command.

    Returns:
        The overrides, and the flags with their values.

    Example:
        >>> arrange(["seed=1", "-m", "+preset=normal,safe"])
        (['seed=1', 'preset=normal,safe'], ['-m'])

    Raises:
        ConfigurationError: a preset, an experiment or a fault is given twice, or not by its name.
    """
    overrides: list[str] = []
    flags: list[str] = []
    for position, argument in enumerate(arguments):
        before = flags[-1] if position > 0 and len(flags) > 0 and arguments[position - 1] == flags[-1] else ""
        is_value = before in _FLAGS_WITH_VALUE or (before in ("--info", "-i") and "=" not in argument)
        (flags if is_value or argument.startswith("-") else overrides).append(argument)
    for selector in ADDED:
        given = [override for override in overrides if re.match(rf"[+]*{selector}=", override)]
        if len(given) > 1:
            raise ConfigurationError(f"{selector} is given {len(given)} times ({' '.join(given)}); give it once.")
    plain = [re.sub(rf"^[+]+({'|'.join(ADDED)})=", r"\1=", override) for override in overrides]
    return plain, flags


def check_overrides(overrides: Sequence[str], flags: Sequence[str]) -> None:
    """Refuse what Hydra would answer with a traceback or not at all: no option for a group, a word that sets nothing.

    Raises:
        ConfigurationError: names the override and the options there are.
    """
    more = config_folders(flags)
    groups = [*SELECTORS, *group_names()]
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.lstrip("+").strip()
        if key.startswith("~") and key[1:] in groups:
            key, equals, value = key[1:], "=", ""
        if equals == "" and not key.startswith("~"):
            raise ConfigurationError(f"{override!r} sets nothing; write it as key=value.{did_you_mean(key, groups)}")
        if key in groups and value.strip() in ("", "null", "None", "~"):
            allowed = option_names(key, more)
            raise ConfigurationError(
                f"{override!r} leaves {key} without an option; allowed: {', '.join(allowed)}."
                + (" Leave it out for the default." if "none" not in allowed else f" Write {key}=none to go without.")
            )


def named_words(arguments: Sequence[str], usage: str) -> dict[str, str]:
    """Read the words of a command that composes no config, each `name=value`.

    Args:
        arguments: the words after the command.
        usage: how the command is written; a name in brackets may be left out.

    Example:
        >>> named_words(["run=runs/mine"], "export run=<folder> [to=<folder>]")
        {'run': 'runs/mine'}

    Raises:
        ConfigurationError: a word has no name or no value, an unknown or a repeated name, or one is missing.
    """
    allowed = re.findall(r"(\w+)=<?", usage)
    needed = re.findall(r"(?<!\[)\b(\w+)=<?", usage)
    found: dict[str, str] = {}
    for word in arguments:
        name, _, value = word.partition("=")
        if value == "" or name not in allowed:
            raise ConfigurationError(f"{word!r} can't be used here.{did_you_mean(name, allowed)} Usage: {usage}")
        if name in found:
            raise ConfigurationError(f"{name} is given twice; give it once. Usage: {usage}")
        found[name] = value
    missing = [name for name in needed if name not in found]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)} is missing. Usage: {usage}")
    return found


def config_folders(flags: Sequence[str]) -> list[Path]:
    """Return the folder that follows `--config-dir`, if it is given."""
    found = []
    for position, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(Path(value if equals != "" else "".join(flags[position + 1 : position + 2])).resolve())
    return found
