"""Parameter groups: what has no weight decay, and settings of their own by name pattern."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.nn import Parameter

from stabletrain.errors import ConfigurationError
from stabletrain.roles import embeddings, last_linear, matching, without_decay

NoDecay = Literal["auto"] | Sequence[str]


class ModelParameters:
    """A model's parameters, for an optimizer that wants to know which is which; iterates like `model.parameters()`.

    Args:
        model: whose parameters they are.
        loss: a module with parameters of its own, named `loss.<name>` here; they have no weight decay.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> list(ModelParameters(layer)) == list(layer.parameters())
        True
    """

    def __init__(self, model: nn.Module, loss: nn.Module | None = None) -> None:
        self.model, self.loss = model, loss

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Visit them with their names: those of the model in its order, then those of the loss."""
        yield from self.model.named_parameters()
        if self.loss is not None:
            yield from self.loss.named_parameters(prefix="loss")

    def __iter__(self) -> Iterator[Parameter]:
        """Visit them in the same order."""
        return (parameter for _, parameter in self.named_parameters())


Given = ModelParameters | nn.Module | Iterable[Parameter]


class Trained:
    """The parameters that are trained, with what is known of their names and of their part in the model.

    Args:
        given: a model, `ModelParameters`, or bare parameters, of which only the shapes are known.

    Raises:
        ConfigurationError: if none requires a gradient.
    """

    def __init__(self, given: Given) -> None:
        known = ModelParameters(given) if isinstance(given, nn.Module) else given
        self.names: dict[Parameter, str] = {}
        if isinstance(known, ModelParameters):
            of_loss = set(known.loss.parameters()) if known.loss is not None else set()
            self.names = {p: name for name, p in known.named_parameters() if p.requires_grad}
            self.parameters = list(self.names)
            self.without_decay = without_decay(known.model) | of_loss
            self.not_hidden = embeddings(known.model) | last_linear(known.model) | of_loss
        else:
            assert not isinstance(given, (ModelParameters, nn.Module))
            self.parameters = [parameter for parameter in given if parameter.requires_grad]
            self.without_decay = {parameter for parameter in self.parameters if parameter.ndim < 2}
            self.not_hidden = set()
        if not self.parameters:
            raise ConfigurationError(
                "the model has no parameter with requires_grad=True, so there is nothing to train."
            )

    def matching(self, key: str, patterns: Any) -> set[Parameter]:
        """Return those whose names match.

        Raises:
            ConfigurationError: for a pattern that matches nothing, or parameters without names.
        """
        if not self.names:
            raise ConfigurationError(
                f"{key} needs the parameters' names: give the optimizer the model itself in place of its parameters."
            )
        chosen = set(matching(key, patterns, list(self.names.values())))
        return {parameter for parameter, name in self.names.items() if name in chosen}


def grouped(
    trained: Trained,
    settings: Mapping[str, Any],
    *,
    no_decay: NoDecay = "auto",
    groups: Sequence[Mapping[str, Any]] = (),
    kinds: Mapping[Parameter, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Divide parameters into groups of equal settings.

    Args:
        trained: the parameters.
        settings: of all of them, with `lr` and, where the optimizer has it, `weight_decay`.
        no_decay: whose weight decay is 0: `auto` (norms, biases, embeddings; of bare parameters those of fewer than
            two dimensions), or name patterns.
        groups: exceptions, each with `match` (one name pattern or several), and any of the settings, or `lr_factor` on
            the learning rate. The first that matches counts; it wins over `no_decay`.
        kinds: settings of single parameters that differ whatever the user says.

    Returns:
        Groups as torch takes them; those with the base rate come first.

    Raises:
        ConfigurationError: for a pattern that matches nothing, or a setting that the optimizer hasn't.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> settings = {"lr": 0.1, "weight_decay": 0.5}
        >>> found = grouped(Trained(model), settings, groups=[{"match": "1.*", "lr_factor": 10}])
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in found]
        [(1, 0.1, 0.5), (1, 0.1, 0.0), (1, 1.0, 0.5), (1, 1.0, 0.0)]
    """
    decays = "weight_decay" in settings
    if isinstance(no_decay, str) and no_decay != "auto":
        raise ConfigurationError(
            f"optimizer.no_decay is {no_decay!r}; it must be auto or a list of name patterns such as ['*.bias']."
        )
    spared: set[Parameter] = set()
    if decays and no_decay == "auto":
        spared = trained.without_decay
    elif decays and len(no_decay) > 0:
        spared = trained.matching("optimizer.no_decay", no_decay)
    exceptions = [_exception(f"optimizer.groups[{n}]", one, settings, trained) for n, one in enumerate(groups)]
    found: dict[str, dict[str, Any]] = {}
    for parameter in trained.parameters:
        own = {**settings, **((kinds or {}).get(parameter, {}))}
        if parameter in spared:
            own["weight_decay"] = 0.0
        for chosen, factor, changed in exceptions:
            if parameter in chosen:
                own |= changed
                own["lr"] = own["lr"] * factor
                break
        found.setdefault(repr(sorted(own.items())), {"params": [], **own})["params"].append(parameter)
    return sorted(found.values(), key=lambda group: bool(group["lr"] != settings["lr"]))


def _exception(
    key: str, given: Any, settings: Mapping[str, Any], trained: Trained
) -> tuple[set[Parameter], float, dict[str, Any]]:
    """Return the parameters of an exception, the factor on their rate, and the settings that it changes."""
    if not isinstance(given, Mapping) or "match" not in given:
        raise ConfigurationError(f"{key} is {given!r}; it must be like {{match: 'head.*', lr_factor: 10}}.")
    own = {name: value for name, value in given.items() if name not in ("match", "lr_factor")}
    unknown = [name for name in own if name not in settings]
    if unknown:
        raise ConfigurationError(
            f"{key}.{unknown[0]}: this optimizer has no such setting. Allowed: match, lr_factor, {', '.join(settings)}."
        )
    if len(own) == 0 and "lr_factor" not in given:
        raise ConfigurationError(f"{key} changes nothing: give it an lr_factor, or any of {', '.join(settings)}.")
    factor = given.get("lr_factor", 1.0)
    single = ("lr", "weight_decay", "momentum", "eps")  # of Adafactor's two eps torch says what is wrong
    numbers = {name: own[name] for name in single if name in own and not isinstance(own[name], (list, tuple))}
    check_numbers(f"{key}.", lr_factor=factor, **numbers)
    if "betas" in own:
        own["betas"] = pair_of_betas(own["betas"], key)
    return trained.matching(f"{key}.match", given["match"]), float(factor), own


def check_numbers(prefix: str = "optimizer.", **numbers: Any) -> None:
    """Refuse numbers that are negative or not finite.

    Raises:
        ConfigurationError: names the key and the value.
    """
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and value >= 0):
            advice = (
                " (base_lr times lr_scale, unless optimizer.lr is given)" if prefix + name == "optimizer.lr" else ""
            )
            raise ConfigurationError(f"{prefix}{name} is {value!r}{advice}; it must be a finite number of at least 0.")


def pair_of_betas(betas: Iterable[float], key: str = "optimizer") -> tuple[float, float]:
    """Return two decays, each at least 0 and below 1.

    Raises:
        ConfigurationError: names the key and the value.
    """
    given = list(betas)
    if len(given) != 2 or any(not 0 <= beta < 1 for beta in given):
        raise ConfigurationError(f"{key}.betas is {given}; both must be at least 0 and below 1.")
    return given[0], given[1]
