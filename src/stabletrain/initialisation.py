"""Initial weights by the type of each module: what a parameter is for decides the rule that writes it.

A rule writes matrices (of linear, convolutional, embedding, recurrent and attention layers); everywhere alike, biases
become 0, normalisations the identity, and the row of an embedding's padding 0. A parameter that no rule knows is an
error that names it, so that none is left as it was without anybody noticing.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from stabletrain.errors import ConfigurationError

Writer = Callable[[torch.Tensor], object]
Found = Iterator[tuple[str, Writer]]  # a module's own parameters by name, each with what writes it

LINEAR = (nn.Linear, nn.Bilinear)
# A transposed one stores its channels the other way round: inputs first.
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
RESIDUAL = ("*attention.output.weight", "*feedforward.output.weight", "*.out_proj.weight", "*.linear2.weight")


class Default:
    """What each module's own code draws when it is made.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = layer.weight.clone()
        >>> Default()(layer)
        >>> torch.equal(layer.weight, before)
        True
    """

    def __call__(self, model: nn.Module) -> None:
        """Leave the model as it is."""


class ByType:
    """What the rules have in common; a rule says how a matrix is drawn.

    Args:
        forget_bias: bias of an LSTM's forget gate, so that it begins by remembering.
        others: what becomes of parameters that no rule knows: `error`, or `keep` (as the module's own code made them).

    Raises:
        ConfigurationError: for a `forget_bias` that isn't finite and for another word.

    References:
        R. Jozefowicz et al.: An Empirical Exploration of Recurrent Network Architectures, 2015 (forget bias of 1).
    """

    def __init__(self, *, forget_bias: float = 1.0, others: str = "error") -> None:
        self.forget_bias = _checked("forget_bias", forget_bias, -math.inf)
        if others not in ("error", "keep"):
            raise ConfigurationError(f"initialisation.others is {others!r}; allowed: error, keep.")
        self.others = others

    def matrix(self, weight: torch.Tensor) -> None:
        """Write a weight [out, in, ...] that multiplies features."""
        raise NotImplementedError

    def recurrent(self, weight: torch.Tensor) -> None:
        """Write a square weight [hidden, hidden] that is multiplied again at each time step."""
        self.matrix(weight)

    def embedding(self, weight: torch.Tensor) -> None:
        """Write a table [entries, features]: rows of a length of about 1, whatever the number of features."""
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def __call__(self, model: nn.Module) -> None:
        """Write every parameter of the model, in the order of its modules, from torch's default generators.

        Args:
            model: changed in place; its buffers stay, and its frozen parameters (requires_grad=False).

        Raises:
            ConfigurationError: for a parameter that no rule knows, that isn't there yet (lazy modules), or that a rule
                left unwritten or not finite.

        Example:
            >>> layer = nn.LSTM(3, 4)
            >>> Orthogonal()(layer)
            >>> layer.bias_ih_l0[4:8], layer.bias_hh_l0.count_nonzero()
            (tensor([1., 1., 1., 1.], grad_fn=<SliceBackward0>), tensor(0))
        """
        named = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        unknown = dict(named)
        plan: list[tuple[str, torch.Tensor, Writer]] = []
        for path, module in model.named_modules():
            for name, write in self._rules(module):
                parameter = getattr(module, name)
                full = f"{path}.{name}".lstrip(".")
                if isinstance(parameter, nn.UninitializedParameter):
                    raise ConfigurationError(
                        f"{full} has no shape yet: run one batch through the model before, or use "
                        "initialisation=default."
                    )
                if unknown.pop(id(parameter), None) is not None:  # a shared one is written once, by its first owner
                    plan.append((full, parameter, write))
        if unknown and self.others == "error":
            raise ConfigurationError(
                f"no rule of {type(self).__name__} knows {_listed(list(unknown.values()))}: their modules are of types "
                "of somebody's own. Keep what that code made with initialisation.others=keep, or use "
                "initialisation=default."
            )
        with torch.no_grad():
            for full, parameter, write in plan:
                # Whatever isn't written stays NaN, and is seen.
                parameter.fill_(math.nan)
                write(parameter)
                if not bool(torch.isfinite(parameter).all()):
                    raise ConfigurationError(
                        f"the rule of {type(self).__name__} left {full} unwritten or not finite; use "
                        "initialisation=default, or smaller numbers."
                    )
            self.finish({full: parameter for full, parameter, _ in plan})

    def finish(self, parameters: dict[str, torch.Tensor]) -> None:
        """Do what needs all of the model's parameters, here by name."""

    def _rules(self, module: nn.Module) -> Found:
        """Yield what writes each of a module's own parameters, if its type is known."""
        own = [name for name, parameter in module.named_parameters(recurse=False) if parameter is not None]
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            yield from self._of_recurrent(module, own)
        elif isinstance(module, nn.MultiheadAttention):
            yield from self._of_attention(own)
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            padding = module.padding_idx
            yield "weight", lambda weight: _then_zero_row(self.embedding, weight, padding)
        elif isinstance(module, NORMALISATION):
            yield from ((name, torch.Tensor.zero_ if name == "bias" else _ones) for name in own)
        elif isinstance(module, (*LINEAR, *CONVOLUTION, *TRANSPOSED)):
            turned = isinstance(module, TRANSPOSED)
            yield "weight", (lambda weight: self.matrix(weight.transpose(0, 1))) if turned else self.matrix
            yield from (("bias", torch.Tensor.zero_) for name in own if name == "bias")
        elif isinstance(module, nn.PReLU):
            yield "weight", lambda weight: weight.fill_(0.25)  # torch's own slope

    def _of_recurrent(self, module: nn.Module, own: Sequence[str]) -> Found:
        gates = next(number for kind, number in GATES.items() if kind in _kind(module))
        for name in own:
            if name.startswith("weight_hh"):
                yield name, partial(_each, self.recurrent, gates)
            elif name.startswith("weight_ih"):
                yield name, partial(_each, self.matrix, gates)
            elif name.startswith("weight_hr"):  # an LSTM's projection
                yield name, self.matrix
            elif name.startswith("bias_ih") and gates == GATES["LSTM"]:
                yield name, self._with_forget_bias
            elif name.startswith("bias"):
                yield name, torch.Tensor.zero_

    def _of_attention(self, own: Sequence[str]) -> Found:
        for name in own:
            if name == "in_proj_weight":  # queries, keys and values, one above the other
                yield name, partial(_each, self.matrix, 3)
            elif name.endswith("proj_weight"):
                yield name, self.matrix
            elif name in ("bias_k", "bias_v"):  # one more key and value [1, 1, features], learnt
                yield name, lambda weight: self.embedding(weight[0])
            else:
                yield name, torch.Tensor.zero_

    def _with_forget_bias(self, bias: torch.Tensor) -> None:
        """Gates stand in the order input, forget, cell, output; the other bias, which is added to it, is 0."""
        bias.zero_().chunk(GATES["LSTM"])[1].fill_(self.forget_bias)


class TruncatedNormal(ByType):
    """Normal weights without a tail, the same for each shape.

    Args:
        std: standard deviation of the normal distribution before it is cut, above 0.
        cut: where it is cut, in standard deviations, above 0; at 3 the deviation of what is left is 0.987 std.
        options: as for `ByType`.

    References:
        A. Radford et al.: Language Models are Unsupervised Multitask Learners, 2019 (0.02); Team OLMo: 2 OLMo 2
        Furious, 2025 (cut at 3).

    Example:
        >>> layer = nn.Linear(100, 100)
        >>> TruncatedNormal(0.02)(layer)
        >>> bool(layer.weight.abs().max() <= 0.06), bool((layer.weight.std() - 0.02).abs() < 0.001)
        (True, True)
    """

    def __init__(self, std: float = 0.02, cut: float = 3.0, **options: Any) -> None:
        super().__init__(**options)
        self.std, self.cut = _checked("std", std, 0.0), _checked("cut", cut, 0.0)

    def matrix(self, weight: torch.Tensor) -> None:
        """Draw from the normal distribution between -cut and cut deviations."""
        # torch's own bounds are numbers, not deviations: left at -2 and 2 they would cut nothing.
        bound = self.cut * self.std
        nn.init.trunc_normal_(weight, std=self.std, a=-bound, b=bound)

    embedding = matrix


class Xavier(ByType):
    """Weights of a variance that keeps that of signals and gradients: uniform within gain * sqrt(6 / (in + out)).

    Args:
        gain: factor, above 0; sqrt(2) makes up for ReLU.
        options: as for `ByType`.

    References:
        X. Glorot, Y. Bengio: Understanding the difficulty of training deep feedforward neural networks, 2010.

    Example:
        >>> layer = nn.Linear(2, 4)
        >>> Xavier()(layer)
        >>> bool(layer.weight.abs().max() <= 1.0), layer.bias.tolist()
        (True, [0.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, gain: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.gain = _checked("gain", gain, 0.0)

    def matrix(self, weight: torch.Tensor) -> None:
        """Draw uniformly; a kernel counts each of its places."""
        nn.init.xavier_uniform_(weight, self.gain)


class Orthogonal(Xavier):
    """Matrices that keep the length of a vector, so that a recurrent network neither forgets nor explodes at once.

    Each gate of a recurrent layer has a matrix of its own. A matrix that isn't square has orthonormal rows or columns,
    whichever are fewer; a kernel counts as the matrix [out, in * places].

    Args:
        gain: factor on the matrices, above 0.
        options: as for `ByType`.

    References:
        A. Saxe et al.: Exact solutions to the nonlinear dynamics of learning in deep linear neural networks, 2014;
        M. Arjovsky et al.: Unitary Evolution Recurrent Neural Networks, 2016 (recurrent).

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> Orthogonal()(layer)
        >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(3), atol=1e-6)
        True
    """

    def matrix(self, weight: torch.Tensor) -> None:
        """Draw an orthogonal matrix."""
        _copy_orthogonal(weight, self.gain)

    def recurrent(self, weight: torch.Tensor) -> None:
        """Draw an orthogonal matrix without the gain, which would be multiplied at each time step."""
        _copy_orthogonal(weight, 1.0)


class ScaledResidual(TruncatedNormal):
    """A truncated normal, with what writes to the residual stream divided by sqrt(2 * depth).

    Each block adds to the stream twice, so that the stream's variance would grow with the depth.

    Args:
        std: standard deviation before the cut, above 0.
        cut: where it is cut, in standard deviations, above 0.
        residual: patterns for the names of the weights that write to the stream (`*` is anything).
        depth: number of blocks; None = half the number of such weights.
        options: as for `ByType`.

    Raises:
        ConfigurationError: when the model has no such weight.

    References:
        A. Radford et al.: Language Models are Unsupervised Multitask Learners, 2019.

    Example:
        >>> layer = nn.TransformerEncoderLayer(64, 2, 64)
        >>> ScaledResidual(0.02, depth=8)(layer)
        >>> [round(part.weight.std().item() * 1000) for part in (layer.linear1, layer.linear2)]
        [20, 5]
    """

    def __init__(
        self,
        std: float = 0.02,
        cut: float = 3.0,
        residual: Sequence[str] = RESIDUAL,
        depth: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(std, cut, **options)
        if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
            raise ConfigurationError(
                f"initialisation.depth is {depth!r}; a whole number of at least 1, or null, is allowed."
            )
        self.residual, self.depth = list(residual), depth

    def finish(self, parameters: dict[str, torch.Tensor]) -> None:
        """Scale what writes to the stream."""
        found = [
            parameter
            for name, parameter in parameters.items()
            if any(fnmatch.fnmatchcase(f".{name}", pattern) for pattern in self.residual)
        ]
        if not found:
            raise ConfigurationError(
                f"no weight of the model has a name like {', '.join(self.residual)}, so there is no residual stream to "
                "scale: name the weights that write to it in initialisation.residual, or use "
                f"initialisation=truncated_normal_002. Names: {_listed(list(parameters))}."
            )
        additions = len(found) if self.depth is None else 2 * self.depth
        for parameter in found:
            parameter.mul_(additions**-0.5)


def _kind(module: nn.Module) -> str:
    """Return `LSTM`, `GRU` or `RNN` from what a class or one of its parents is called."""
    return " ".join(parent.__name__ for parent in type(module).__mro__ if parent.__module__.startswith("torch"))


def _each(write: Writer, parts: int, weight: torch.Tensor) -> None:
    for part in weight.chunk(parts):
        write(part)


def _copy_orthogonal(weight: torch.Tensor, gain: float) -> None:
    # Apart, since torch's needs a tensor in one piece and of a type that its decomposition knows.
    drawn = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    weight.copy_(nn.init.orthogonal_(drawn, gain))


def _then_zero_row(write: Writer, weight: torch.Tensor, row: int | None) -> None:
    write(weight)
    if row is not None:
        weight[row].zero_()


def _ones(weight: torch.Tensor) -> object:
    return weight.fill_(1.0)


def _checked(name: str, value: float, above: float) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > above
    if not good:
        allowed = "a finite number" + (f" above {above:g}" if math.isfinite(above) else "")
        raise ConfigurationError(f"initialisation.{name} is {value!r}; {allowed} is allowed.")
    return float(value)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
