"""From the command line to checked, plain settings: where `conf/` is, what may be given, and what is said otherwise."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stabletrain.config.compose import compose as compose
from stabletrain.config.compose import see_users_folder as see_users_folder
from stabletrain.config.keys import check_keys
from stabletrain.config.line import arrange as arrange
from stabletrain.config.line import check_overrides as check_overrides
from stabletrain.config.line import named_words as named_words
from stabletrain.config.line import split_command as split_command
from stabletrain.config.parts import with_parts
from stabletrain.config.places import conf_folder as conf_folder
from stabletrain.config.places import conf_location as conf_location
from stabletrain.config.places import group_names as group_names
from stabletrain.config.places import option_names as option_names
from stabletrain.config.resolvers import stamp as stamp  # the import registers what the configs use
from stabletrain.config.values import check_values
from stabletrain.errors import ConfigurationError


def settings(config: DictConfig) -> dict[str, Any]:
    """Turn a composed config into checked, plain containers.

    Args:
        config: what Hydra composed, without its `hydra` node.

    Returns:
        Dictionaries, lists, numbers and words only; every interpolation is resolved.

    Raises:
        ConfigurationError: a key or a value can't be used.
    """
    unresolved = _plain(config, resolve=False)
    check_values(unresolved)
    try:
        values = _plain(config, resolve=True)
    except MissingMandatoryValue as error:
        raise ConfigurationError(f"{error.full_key} has no value; give it as {error.full_key}=<value>.") from error
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"the config can't be resolved: {str(error).splitlines()[0]}") from error
    check_values(values)
    values = with_parts(values)
    check_keys(values, unresolved)
    return {**values, "name": str(values["name"])}


def _plain(config: DictConfig, *, resolve: bool) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
