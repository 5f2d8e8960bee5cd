"""AGC of NFNets: limit each unit's gradient by the size of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from stabletrain.clipping.base import check_positive
from stabletrain.clipping.scaling import scale_each
from stabletrain.errors import ConfigurationError
from stabletrain.finite import whole_sizes
from stabletrain.roles import last_linear, matching
from stabletrain.tree import is_distributed, local

LEAST_NORM = 1e-6  # of a gradient that is divided by its norm


class AGC:
    """Limits the gradient of each unit to a share of its weights' norm: G_i <- G_i * share * max(|W_i|, eps) / |G_i|.

    A unit is an output: a row of a matrix, a filter of a convolution (everything but the first dimension); of a
    vector or a number, all of it. Units below their limit are left alone, and so are units that hold NaN or Inf.
    The last linear layer is left out, as in the paper.

    Args:
        share: largest norm of a unit's gradient as a share of its weights' norm (lambda in the paper).
        eps: least norm of weights that counts, so that weights of 0 can grow.
        exclude: `auto`: the last linear layer; or name patterns of parameters to leave out, such as ["head.*"].

    Raises:
        ConfigurationError: for a number outside its range, a pattern that matches nothing, or weights sharded along
            another dimension than the first.

    Source:
        Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition Without Normalization"
        (arXiv 2102.06171).

    Example:
        >>> weight = Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> weight.grad = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> AGC().clip([weight], 1.0)
        >>> weight.grad
        tensor([[0.0000e+00, 5.0000e-02],
                [0.0000e+00, 1.0000e-05]])
    """

    limits: ClassVar[bool] = False  # what is left out isn't limited

    def __init__(
        self, share: float = 0.01, eps: float = 1e-3, exclude: Literal["auto"] | Sequence[str] = "auto"
    ) -> None:
        check_positive("clipping.share", share)
        check_positive("clipping.eps", eps)
        if isinstance(exclude, str) and exclude != "auto":
            raise ConfigurationError(
                f"clipping.exclude is {exclude!r}; it must be auto or a list of name patterns such as ['head.*']."
            )
        self.share, self.eps, self.exclude = share, eps, exclude
        self._excluded: set[Parameter] = set()

    def begin(self, models: Sequence[nn.Module], /) -> None:
        """Find the parameters to leave out."""
        if isinstance(self.exclude, str):
            self._excluded = {p for model in models for p in last_linear(model)}
            return
        named = {name: p for model in models for name, p in model.named_parameters()}
        self._excluded = {named[name] for name in matching("clipping.exclude", self.exclude, list(named))}

    @torch.no_grad()
    def clip(self, parameters: Sequence[Parameter], norm: float | Tensor, /, rejected: Tensor | None = None) -> None:
        """Limit each unit's gradient in place; neither the norm of all nor the decision matters here."""
        vectors: list[Parameter] = []
        for parameter in parameters:
            if parameter.grad is None or parameter in self._excluded or parameter.numel() == 0:
                continue
            if sum(size != 1 for size in parameter.shape) < 2:
                vectors.append(parameter)
            else:
                self._limit_units(parameter, parameter.grad)
        if vectors:
            gradients = [p.grad for p in vectors if p.grad is not None]
            weights, sizes = whole_sizes([p.detach() for p in vectors]), whole_sizes(gradients)
            scale_each(gradients, self._factor(sizes, weights), on_host=not isinstance(norm, Tensor))

    def _limit_units(self, parameter: Parameter, gradient: Tensor) -> None:
        weight = parameter.detach()
        if is_distributed(weight) and any(place.is_shard() and not place.is_shard(0) for place in weight.placements):
            raise ConfigurationError(
                f"clipping=agc needs each unit whole on one rank, but a weight of shape {tuple(weight.shape)} is "
                "sharded along another dimension than the first. Use clipping=norm."
            )
        weight, values = local(weight), local(gradient)
        if values.is_sparse:
            summed = values.coalesce()
            if summed.sparse_dim() != 1:
                raise ConfigurationError("clipping=agc takes sparse gradients of rows only. Use clipping=norm.")
            rows = summed.values()
            rows.mul_(self._factor(_units(rows), _units(weight[summed.indices()[0]])))
            gradient.copy_(summed)
        else:
            values.mul_(self._factor(_units(values), _units(weight)))

    def _factor(self, gradients: Tensor, weights: Tensor) -> Tensor:
        limit = self.share * weights.clamp(min=self.eps)
        over = torch.isfinite(gradients) & (gradients > limit)
        return torch.where(over, limit / gradients.clamp(min=LEAST_NORM), torch.ones_like(limit))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: it remembers nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Do nothing."""


def _units(values: Tensor) -> Tensor:
    """Return the norm of each unit, shape [n, 1, ...], in at least float32 and without overflow of the squares."""
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    norms: Tensor = torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True, dtype=wide)
    return norms
