"""The one call of Hydra: from the words of a command line to a config."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from omegaconf import DictConfig

from stabletrain.config.places import conf_location
from stabletrain.config.resolvers import stamp


def compose(job: Callable[[DictConfig], Any], words: Sequence[str]) -> None:
    """Let Hydra compose a config from these words, and call `job` with it: once, or for each job of a sweep."""
    stamp.cache_clear()
    see_users_folder()
    wrapped = hydra.main(version_base="1.3", config_path=conf_location(), config_name="config")(job)
    with _command_line(words):
        wrapped()


def see_users_folder() -> None:
    """Let modules of the user's be imported from the current folder, which the console script leaves out."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Let Hydra see this command line, and let its errors come through as exceptions."""
    before, setting = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")
    sys.argv[1:] = arguments
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv[:] = before
        if setting is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = setting
