"""Where the configs are, and which groups and options they offer."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from stabletrain.errors import ConfigurationError

SELECTORS = ("preset", "experiment")  # directories of conf/ whose options choose other options


def conf_location() -> str:
    """Return what Hydra calls the config path: the installed package's configs, or the checkout's `conf/`."""
    if importlib.util.find_spec("stabletrain.conf") is not None:
        return "pkg://stabletrain.conf"
    return str(conf_folder())


@functools.cache
def conf_folder() -> Path:
    """Return the folder that holds `config.yaml` and a folder for each group.

    Raises:
        ConfigurationError: the installation holds no configs.
    """
    found = importlib.util.find_spec("stabletrain.conf")
    places = [Path(place) for place in (found.submodule_search_locations or [])] if found is not None else []
    places.append(Path(__file__).resolve().parents[3] / "conf")
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    raise ConfigurationError(
        f"stabletrain's configs are missing: no config.yaml in {' or '.join(map(str, places))}. Install it again."
    )


def group_names() -> list[str]:
    """Return the names of the groups whose options are parts of a run (all but `preset` and `experiment`)."""
    return sorted(set(_folders(conf_folder())) - set(SELECTORS))


def option_names(group: str, more: Sequence[Path] = ()) -> list[str]:
    """Return the options of a group, from `conf/` and from the folders in `more` (somebody's `--config-dir`)."""
    return sorted({file.stem for folder in (conf_folder(), *more) for file in (folder / group).glob("*.yaml")})


def _folders(place: Path) -> list[str]:
    return [entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(("_", "."))]


@functools.cache
def root_keys() -> frozenset[str]:
    """Return the keys that a composed config may have at its root: those of `config.yaml`, and the groups."""
    primary = OmegaConf.load(conf_folder() / "config.yaml")
    return frozenset(str(key) for key in primary) - {"defaults", "hydra"} | set(group_names())
