"""What a case of the catalogue is: a small real model that goes wrong, and what an honest expert would say about it.

The statement to blame carries the comment `guilty` in its source. Where a value is bad before any operation has run (in
the batch, in a parameter, in a buffer) there is no operation and no such statement.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GUILTY = "# guilty"

# Spellings of one and the same operation: as Python calls it, as autograd calls it, as the dispatcher calls it.
SPELLINGS = {
    "div": ("truediv", "itruediv", "rtruediv", "rdiv", "true_divide", "divide", "reciprocal"),
    "mul": ("imul", "rmul", "multiply"),
    "add": ("iadd", "radd"),
    "sub": ("isub", "rsub", "subtract"),
    "pow": ("ipow", "rpow", "square", "pow_tensor_scalar", "pow_tensor_tensor"),
    "matmul": ("rmatmul", "linear", "addmm", "mm", "bmm", "baddbmm", "mv", "dot", "einsum"),
    "norm": ("linalg_vector_norm", "vector_norm", "linalg_norm", "frobenius_norm"),
    "softmax": ("safe_softmax",),
    "conv": ("conv1d", "conv2d", "convolution", "mkldnn_convolution", "thnn_conv2d", "slow_conv2d_forward"),
    "layer_norm": ("native_layer_norm",),
    "batch_norm": ("native_batch_norm", "batch_norm_with_update", "batch_norm_impl_index"),
    "weight_norm": ("weight_norm_interface",),
    "svd": ("linalg_svd",),
    "eigh": ("linalg_eigh",),
    "var": ("var_mean",),
    "std": ("std_mean",),
    "masked_fill": ("setitem", "index_put", "index_put_impl"),
    "lstm": ("mkldnn_rnn_layer", "lstm_cell", "thnn_fused_lstm_cell"),
    "max": ("amax",),
    "min": ("amin",),
    "acos": ("arccos",),
    "acosh": ("arccosh",),
    "atanh": ("arctanh",),
    "atan2": ("arctan2",),
    "erfinv": ("special_erfinv",),
    "entr": ("special_entr",),
    "lgamma": ("special_gammaln",),
    "log1p": ("special_log1p",),
    "logdet": ("slogdet", "linalg_slogdet"),
    "to": ("to_copy", "half", "bfloat16", "float", "double", "type"),
    "scaled_dot_product_attention": ("scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention_math"),
}
CANONICAL = {spelling: name for name, spellings in SPELLINGS.items() for spelling in spellings}


@dataclass
class Built:
    """A model, a loss and a batch that make one bad (or healthy) step.

    Args:
        model: the model, in the mode (training, evaluation) in which the step is made.
        loss: gives a scalar from (model, batch).
        batch: a tree of tensors; samples lie along the first axis, or are the items of a list.
        samples: positions in the batch without which the step is healthy; empty where no sample is to blame.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    batch: Any
    samples: list[int]


@dataclass(frozen=True)
class Case:
    """One cause, and the answers that are right.

    Args:
        name: the case's name.
        build: gives a variant from a seed, which draws the place that is hit.
        operations: names of the first bad operation that are right; empty where a value is bad before any operation.
        in_backward: whether that operation's derivative, not the operation, makes the value.
        causes: causes that are right; none for a healthy control.
        remedy: whether some general remedy could hold (precision, samples left out, learning rate, no augmentation).
    """

    name: str
    build: Callable[[int], Built]
    operations: frozenset[str]
    in_backward: bool
    causes: frozenset[str]
    remedy: bool

    @property
    def healthy(self) -> bool:
        return not self.causes


class Family(list[Case]):
    """The cases of one file, in order; `add` is the decorator that makes a case of a function of a seed."""

    def add(
        self, *, causes: str = "", operations: str = "", in_backward: bool = False, remedy: bool = False
    ) -> Callable[[Callable[[int], Built]], Case]:
        def register(function: Callable[[int], Built]) -> Case:
            case = Case(
                name=function.__name__,
                build=function,
                operations=frozenset(operations.split()),
                in_backward=in_backward,
                causes=frozenset(causes.split()),
                remedy=remedy,
            )
            self.append(case)
            return case

        return register


class Draw:
    """Seeded random numbers; the global generator is set too, so that layers start from the same weights each time."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def one(self, count: int) -> int:
        """A position below `count`."""
        return int(torch.randint(count, (1,), generator=self.generator))

    def some(self, count: int, most: int = 3) -> list[int]:
        """From one to `most` positions below `count`, sorted."""
        number = 1 + self.one(most)
        return sorted(torch.randperm(count, generator=self.generator)[:number].tolist())


def canonical(operation: str) -> str:
    """One name for an operation, however a tool spells it.

    Example:
        >>> [canonical(name) for name in ("__truediv__", "_log_softmax", "LinalgEighBackward0", "aten::addmm.default")]
        ['div', 'log_softmax', 'eigh', 'matmul']
    """
    name = operation.rsplit("::", 1)[-1].split(".")[0]
    name = re.sub(r"Backward\d*$", "", name)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    name = re.sub(r"_backward(_data)?$", "", name)
    return CANONICAL.get(name, name)


def right_operation(case: Case, operation: str) -> bool:
    return canonical(operation) in {canonical(name) for name in case.operations}


def guilty_lines(case: Case) -> tuple[str, frozenset[int]]:
    """The file of a case and the numbers of the lines of its guilty statements, none where no operation is to blame."""
    lines, start = inspect.getsourcelines(case.build)
    file = inspect.getsourcefile(case.build)
    assert file is not None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    simple = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    guilty: set[int] = set()
    for number in (position for position, line in enumerate(lines, start=1) if GUILTY in line):
        around = [node for node in simple if node.lineno <= number <= (node.end_lineno or node.lineno)]
        assert len(around) == 1, f"{case.name}: `{GUILTY}` belongs to one simple statement"
        guilty |= set(range(around[0].lineno, (around[0].end_lineno or around[0].lineno) + 1))
    return file, frozenset(start + number - 1 for number in guilty)


def batch_size(batch: Any) -> int:
    """The number of samples: the length of the first list of tensors or of the first tensor in the tree."""
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, dict):
        return batch_size(next(iter(batch.values())))
    if isinstance(batch, list):
        return len(batch)
    return batch_size(batch[0])


def without(batch: Any, samples: Iterable[int]) -> Any:
    """The batch without some of its samples; what has another length than the batch is left as it is."""
    size, gone = batch_size(batch), set(samples)
    kept = [position for position in range(size) if position not in gone]

    def cut(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[kept] if part.ndim > 0 and len(part) == size else part
        if isinstance(part, dict):
            return {name: cut(item) for name, item in part.items()}
        if isinstance(part, list):
            return [part[position] for position in kept]
        return tuple(cut(item) for item in part)

    return cut(batch)
