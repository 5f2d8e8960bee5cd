"""Muon for the hidden matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.optim import AdamW, Muon, Optimizer

from stabletrain.errors import ConfigurationError
from stabletrain.optimizer.groups import Given, NoDecay, Trained, check_numbers, grouped, pair_of_betas
from stabletrain.tree import is_distributed

_PARTS: dict[str, Callable[..., Optimizer]] = {"muon": Muon, "adamw": AdamW}
_MUON = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")


class MuonWithAdamW(Optimizer):
    """One optimizer of which each group is stepped by torch's Muon or by torch's AdamW.

    `param_groups` and `state` are one list and one mapping, so a state saves, loads and copies like any other's. A
    group says in `kind` which of the two it belongs to.

    Args:
        groups: with complete settings, as torch's own optimizers make them, and `kind`.

    Example:
        >>> from torch import nn
        >>> layer = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        >>> optimizer = muon(layer, lr=0.01)
        >>> [(group["kind"], len(group["params"])) for group in optimizer.param_groups]
        [('muon', 1), ('adamw', 2), ('adamw', 1)]
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        complete: list[dict[str, Any]] = []
        for kind, make in _PARTS.items():
            own = [group for group in groups if group["kind"] == kind]
            complete += make(own).param_groups if own else []
        super().__init__(complete, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, make in _PARTS.items():
            # The groups and the state are this optimizer's; a part only knows how to step. It isn't kept, because
            # torch's copies of an optimizer hold groups and state alone.
            part: Optimizer = make([torch.zeros(1, 1, requires_grad=True)])
            part.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            part.state = self.state
            part.step()
        return loss


def muon(
    parameters: Given,
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: NoDecay = "auto",
    groups: Sequence[Mapping[str, Any]] = (),
) -> Optimizer:
    """Build Muon for the hidden matrices, with AdamW for embeddings, the last linear layer, and what isn't a matrix.

    B <- momentum B + (1 - momentum) g; W <- (1 - lr decay) W - rate O((1 - momentum) g + momentum B), or O(B) without
    nesterov, where O makes a matrix nearly orthogonal by `ns_steps` steps of Newton and Schulz in bfloat16. With
    `match_rms_adamw` the rate is 0.2 sqrt(max(rows, columns)) lr, so that one learning rate serves both parts; with
    `original` it is sqrt(max(1, rows / columns)) lr. The update's size doesn't depend on the gradient's, so that spikes
    do little.

    Args:
        parameters: the model, or its parameters; bare parameters are told apart by their shapes only.
        lr: base learning rate of both parts.
        momentum: decay of the matrices' running sum.
        nesterov: look ahead along the momentum.
        ns_steps: steps of the iteration that makes a matrix orthogonal.
        adjust_lr: how the rate follows the shape.
        betas: AdamW's decays.
        eps: AdamW's, added to the root of the second average.
        weight_decay: share of a weight taken away each update, times the learning rate.
        no_decay: as for `adamw`.
        groups: as for `adamw`.

    Raises:
        ConfigurationError: for a number outside its range, a model without hidden matrices, or sharded ones.

    Source:
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is
        Scalable for LLM Training" (arXiv 2502.16982), for the rate.
    """
    check_numbers(lr=lr, momentum=momentum, eps=eps, weight_decay=weight_decay)
    if adjust_lr not in ("match_rms_adamw", "original"):
        raise ConfigurationError(f"optimizer.adjust_lr is {adjust_lr!r}; allowed: match_rms_adamw, original.")
    if not (isinstance(ns_steps, int) and 1 <= ns_steps < 100):
        raise ConfigurationError(f"optimizer.ns_steps is {ns_steps!r}; it must be a whole number from 1 to 99.")
    trained = Trained(parameters)
    hidden = {p for p in trained.parameters if p.ndim == 2 and p not in trained.not_hidden}
    if not hidden:
        raise ConfigurationError(
            "optimizer=muon is for hidden matrices, and this model has none: all its parameters are vectors, "
            "convolutions, embeddings or the last linear layer. Use optimizer=adamw."
        )
    if any(is_distributed(parameter) for parameter in hidden):
        raise ConfigurationError(
            "optimizer=muon needs whole matrices, and parallel=fsdp2 divides them. Use parallel=ddp or optimizer=adamw."
        )
    own: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
    own |= {"ns_steps": ns_steps, "adjust_lr_fn": adjust_lr, "betas": pair_of_betas(betas), "eps": eps}
    kinds = {p: {"kind": "muon" if p in hidden else "adamw"} for p in trained.parameters}
    found = grouped(trained, own, no_decay=no_decay, groups=groups, kinds=kinds)
    return MuonWithAdamW([_of_its_kind(group) for group in found])


def _of_its_kind(group: dict[str, Any]) -> dict[str, Any]:
    """Return the group with the settings that its kind has; Muon's own eps is that of its norm."""
    if group["kind"] == "muon":
        return {name: group[name] for name in ("params", "kind", *_MUON) if name in group and name != "eps"}
    return {name: group[name] for name in ("params", "kind", "lr", "betas", "eps", "weight_decay")}
