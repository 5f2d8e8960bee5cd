"""From plain settings to finished parts: the one place where the options' targets are called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from stabletrain.assembly import assemble
from stabletrain.data import Splits, split_dataset, with_facts
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key, keyed_all

if TYPE_CHECKING:
    from stabletrain.trainer import Run

# Groups whose parts need objects of the run: how these are given, besides what the option says.
RUN_TIME: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # group: (positions, keywords)
    "task": (("loss",), ()),
    "optimizer": (("parameters",), ()),
    "schedule": ((), ("total_updates", "updates_per_epoch")),
    "precision": ((), ("device",)),
    "ema": (("model",), ()),
    "checkpoint": (("folder",), ()),
    "tracking": (("folder",), ()),
}
ROOT_ARGUMENTS = (
    *("epochs", "batch_size", "accumulate", "seed", "device", "workers", "resume", "init_from", "init_strict"),
    "validate_from",
)


class PartFailed(RuntimeError):
    """The code behind an option failed; its own error is the cause."""


def build(config: dict[str, Any], folder: Path | str, overrides: Sequence[str] = ()) -> Run:
    """Build every part that a config names and put them together; nothing is written before all of it is checked.

    Args:
        config: checked, plain settings, as from `stabletrain.config.settings`.
        folder: the run's folder.
        overrides: what was given on the command line, for the records.

    Returns:
        A run, ready for `stabletrain.trainer.train`.

    Raises:
        ConfigurationError: an option can't be used.
        PartFailed: the code behind an option failed.
    """
    splits = build_data(config)
    config = with_facts(config, splits)
    schedule = {**config["schedule"]}
    ramp = schedule.pop("ramp", None) or ()  # the trainer's, whatever the schedule
    options = {**config, "schedule": schedule}
    groups = ("loss", "augmentation", "guard", "clipping", "fault", "parallel", *RUN_TIME)
    parts = {group: _part(group, options) for group in groups}
    model = build_model(config)
    hand_over(splits.tables, model)
    loss, make_task = parts.pop("loss"), parts.pop("task")
    mode, notes = config["loss_mode"], []
    with _named("loss", config):
        if mode != "as_is" and mode not in getattr(loss, "modes", {}):
            notes = [f"loss_mode={mode} changes nothing: {type(loss).__name__} has nothing to simplify"]
        loss = loss.simplified(mode) if hasattr(loss, "simplified") else loss
    run = assemble(
        model,
        splits,
        task=make_task(loss),
        **parts,
        ramp=ramp,
        **{name: config[name] for name in ROOT_ARGUMENTS},
        folder=Path(folder),
        settings=config,
        overrides=overrides,
    )
    run.notes += notes
    return run


def build_data(config: dict[str, Any]) -> Splits:
    """Build the data that a config names, divided into its parts.

    Raises:
        ConfigurationError: the data can't be used.
        PartFailed: its own code failed.
    """
    with keyed_all(key(config["seed"], "data")):
        return _splits(_part("data", config), config["seed"])


def build_undivided(config: dict[str, Any]) -> Any:
    """Build a map-style data set as it is before it is divided and checked; None where an option has no such stage.

    Raises:
        ConfigurationError: the data set can't be built.
        PartFailed: its own code failed.
    """
    node = config["data"].get("dataset", config["data"])
    if not isinstance(node, dict) or "_target_" not in node:
        return None
    with keyed_all(key(config["seed"], "data")):
        data = _part("data", {**config, "data": node})
    return None if isinstance(data, Splits) else data


def build_model(config: dict[str, Any]) -> nn.Module:
    """Build the model that a config names, with the weights that its seed gives.

    Args:
        config: plain settings in which no `auto` is left, as a checkpoint holds them.

    Raises:
        ConfigurationError: the model can't be built from these options.
        PartFailed: its own code failed.
    """
    with keyed_all(key(config["seed"], "model")):
        model = _part("model", config)
    if not isinstance(model, nn.Module):
        target = config["model"]["_target_"]
        raise ConfigurationError(f"model: {target} built a {type(model).__name__}; it must build a torch.nn.Module.")
    if "initialisation" in config:  # a checkpoint from before there was such a group has none
        initialise = _part("initialisation", config)
        with keyed_all(key(config["seed"], "initialisation")), _named("initialisation", config):
            initialise(model)
    return model


@torch.no_grad()
def hand_over(tables: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Copy the data's tables into the model's own buffers and frozen parameters of the same names.

    A frozen parameter (`nn.Parameter(torch.empty(...), requires_grad=False)`) is the better place for a large one:
    buffers are copied before each step. Tables that the model has no place for are left out.

    Args:
        tables: of `Splits`.
        model: changed in place.

    Raises:
        ConfigurationError: for a place of another shape, and for one that is trained.

    Example:
        >>> model = nn.Module()
        >>> model.register_buffer("edges", torch.zeros(2, 3, dtype=torch.int64))
        >>> hand_over({"edges": torch.ones(2, 3, dtype=torch.int64)}, model)
        >>> int(model.edges.sum())
        6
    """
    places = {**model._parameters, **model._buffers}
    for name, table in tables.items():
        place = places.get(name)
        if place is None:
            continue
        if place.requires_grad:
            raise ConfigurationError(
                f"the data gives the model its table {name}, but the model trains its own parameter {name}. Make it a "
                "buffer, or nn.Parameter(..., requires_grad=False), or give it another name."
            )
        if place.shape != table.shape:
            raise ConfigurationError(
                f"the data's table {name} has the shape {list(table.shape)}, but the model has {list(place.shape)} for "
                "it. Build the model by the facts of the data: write auto for its sizes."
            )
        place.copy_(table)


def _part(group: str, config: dict[str, Any]) -> Any:
    """Build the part of a group; one that needs objects of the run stays a partial with checked arguments."""
    node = {**config[group], "_partial_": True} if group in RUN_TIME else config[group]
    with _named(group, config):
        part = instantiate(node, _convert_="all")
    if not isinstance(part, functools.partial):
        return part
    _check_arguments(group, node["_target_"], part)

    def call(*arguments: Any, **keywords: Any) -> Any:
        with _named(group, config):
            return part(*arguments, **keywords)

    return call


def _check_arguments(group: str, target: str, part: functools.partial[Any]) -> None:
    positions, keywords = RUN_TIME.get(group, ((), ()))
    try:
        signature = inspect.signature(part.func)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*positions, *part.args, **{**dict.fromkeys(keywords), **part.keywords})
    except TypeError as error:
        run, option = ", ".join([*positions, *keywords]), ", ".join(part.keywords)
        raise ConfigurationError(f"{group}: {target} can't be called with {run} and {option}: {error}.") from error


@contextmanager
def _named(group: str, config: dict[str, Any]) -> Iterator[None]:
    """Let an error inside the block say which group and which target it comes from, without Hydra's wrapping."""
    target = config[group]["_target_"]
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ConfigurationError):
            raise cause from None
        if isinstance(cause, InstantiationException):
            raise ConfigurationError(f"{group} ({target}): {str(cause).splitlines()[0]}") from error
        raise PartFailed(f"{group} ({target}): {type(cause).__name__}: {cause}") from cause


def _splits(data: Any, seed: int) -> Splits:
    """Return what a `data` option built; a bare map-style data set is divided by the seed."""
    return data if isinstance(data, Splits) else split_dataset(data, seed=seed)
