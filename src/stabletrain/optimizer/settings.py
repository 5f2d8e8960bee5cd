"""An optimizer's settings: the learning rate, what each group has, and a saved state under other settings or groups."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from stabletrain.errors import ConfigurationError
from stabletrain.optimizer.groups import ModelParameters


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Set each group's rate to its base rate times `factor`; return the first group's.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=1e-3)
        >>> set_learning_rate(optimizer, 0.5)
        0.0005
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def copied(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Return copies of a model and of the optimizer that trains it.

    Torch copies of an optimizer only groups and state; other people's keep more in attributes, which are shared.

    Raises:
        RuntimeError: torch can't copy the model.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> other, optimizer = copied(layer, torch.optim.SGD(layer.parameters()))
        >>> optimizer.param_groups[0]["params"][0] is other.weight
        True
    """
    model, twin = copy.deepcopy((model, optimizer))
    for name, value in vars(optimizer).items():
        vars(twin).setdefault(name, value)
    return model, twin


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return each parameter group's settings, without the parameters.

    Example:
        >>> import torch
        >>> hyperparameters(torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=1e-3))[0]["lr"]
        0.001
    """
    names = ("params", "param_names")
    return [
        {name: copy.deepcopy(value) for name, value in group.items() if name not in names}
        for group in optimizer.param_groups
    ]


def with_changed(
    state: dict[str, Any], before: list[dict[str, Any]], now: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Put the settings that were changed since a state was saved into it; the others stay as training left them.

    An optimizer takes its settings from the state that it loads, so a new learning rate would be lost.

    Args:
        state: the optimizer's saved state.
        before: settings of the groups as they were built in the run that saved it.
        now: settings of the groups as they are built now.

    Returns:
        The state to load, and by name what was changed: before and now.

    Raises:
        ConfigurationError: there are more groups or fewer.

    Example:
        >>> saved = {"state": {}, "param_groups": [{"lr": 0.0004, "initial_lr": 0.001, "eps": 1e-8, "params": [0]}]}
        >>> state, changed = with_changed(saved, [{"lr": 0.001, "eps": 1e-8}], [{"lr": 0.005, "eps": 1e-8}])
        >>> state["param_groups"], changed
        ([{'lr': 0.005, 'initial_lr': 0.005, 'eps': 1e-08, 'params': [0]}], {'lr': (0.001, 0.005)})
    """
    if len(before) != len(now):
        raise ConfigurationError(
            f"the optimizer had {len(before)} parameter groups and has {len(now)}; group the parameters as before."
        )
    groups: list[dict[str, Any]] = []
    changed: dict[str, tuple[Any, Any]] = {}
    for saved, old, new in zip(state["param_groups"], before, now, strict=True):
        differing = {name: value for name, value in new.items() if name not in old or not _equal(old[name], value)}
        changed |= {name: (old.get(name), value) for name, value in differing.items()}
        if "lr" in differing and "initial_lr" in saved:
            differing["initial_lr"] = differing["lr"]  # the base rate, from which `set_learning_rate` goes
        groups.append({**saved, **differing})
    return {**state, "param_groups": groups}, changed


def grouping(optimizer: Optimizer, model: nn.Module | ModelParameters) -> list[list[str]] | None:
    """Return the names of each group's parameters, in order; None if the model doesn't know all of them.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> grouping(torch.optim.SGD([{"params": [layer.bias]}, {"params": [layer.weight]}]), layer)
        [['bias'], ['weight']]
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    if any(parameter not in names for group in optimizer.param_groups for parameter in group["params"]):
        return None
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def regrouped(
    state: dict[str, Any],
    settings: list[dict[str, Any]] | None,
    before: Sequence[Sequence[str]] | None,
    optimizer: Optimizer,
    model: nn.Module | ModelParameters,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a saved state in the groups of today's optimizer, each parameter with its own memory and settings.

    Args:
        state: the optimizer's saved state.
        settings: of the groups as they were built in the run that saved it; None: as saved.
        before: names of each saved group's parameters; None: of a version that didn't save them and knew one group.
        optimizer: as it is built now.
        model: whose parameters it trains.

    Returns:
        State and settings for `with_changed`; as they are where the groups are the same, or can't be compared.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> now = torch.optim.SGD([{"params": [layer.bias]}, {"params": [layer.weight]}], lr=0.1)
        >>> saved = {"state": {0: {"m": "weight's"}, 1: {"m": "bias's"}}}
        >>> saved["param_groups"] = [{"lr": 1.0, "params": [0, 1]}]
        >>> regrouped(saved, None, None, now, layer)[0]["state"]
        {0: {'m': "bias's"}, 1: {'m': "weight's"}}
    """
    saved = state["param_groups"]
    settings = list(settings) if settings is not None else [dict(group) for group in saved]
    now = grouping(optimizer, model)
    if before is None and len(saved) == 1:
        before = [[name for name, parameter in model.named_parameters() if parameter.requires_grad]]
    sizes = [len(group["params"]) for group in saved]
    if now is None or before is None or list(map(len, before)) != sizes or [list(names) for names in before] == now:
        return state, settings
    places = {
        name: (number, saved[number]["params"][at])
        for number, names in enumerate(before)
        for at, name in enumerate(names)
    }
    memories: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    built: list[dict[str, Any]] = []
    count = 0
    for names, group in zip(now, optimizer.param_groups, strict=True):
        known = [places[name][0] for name in names if name in places]
        source, own = (
            (saved[known[0]], settings[known[0]]) if known else (group, hyperparameters(optimizer)[len(groups)])
        )
        numbers = range(count, count := count + len(names))
        groups.append({**source, "params": list(numbers)})
        built.append(own)
        for number, name in zip(numbers, names, strict=True):
            if name in places and places[name][1] in state["state"]:
                memories[number] = state["state"][places[name][1]]
    return {**state, "state": memories, "param_groups": groups}, built


def _equal(one: Any, other: Any) -> bool:
    # A pair may come back from a file as a list.
    pairs = (list, tuple)
    return list(one) == list(other) if isinstance(one, pairs) and isinstance(other, pairs) else bool(one == other)
