"""Follows what isn't finite from operation to operation.

An operation whose output isn't finite either passes on what came in, or begins something: an origin. What ends in
finite values, as the -inf of a mask ends in a softmax, was innocent and is forgotten.

An infinity that somebody wrote down (`masked_fill(mask, -inf)`) is meant to be there. Where such a value turns into
NaN, that operation is the origin.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stabletrain.doctor.origin import RANDOM, SELECTIONS, Kind, Origin
from stabletrain.doctor.places import name_of_node, place, plain_name
from stabletrain.finite import is_finite
from stabletrain.incident.statistics import describe

_UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
_MODULE = "stabletrain.module"  # key in the metadata of a node of the autograd graph


History = tuple[str, tuple[Any, ...]]  # an operation, or a source, and the histories of what came in


@dataclass(frozen=True)
class _Call:
    """One operation that was run.

    Args:
        func: what torch ran.
        arguments: all of them, as a flat list.
        inputs: tensors among them, each with its value from before; an operation may write to what it is given.
    """

    func: Any
    arguments: list[Any]
    inputs: list[tuple[Tensor, Tensor]]

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket.__name__)

    @property
    def numbers(self) -> list[float]:
        """The numbers among the arguments."""
        return [item for item in self.arguments if isinstance(item, (int, float)) and not isinstance(item, bool)]

    def bad(self) -> list[tuple[Tensor, Tensor]]:
        """The inputs that aren't finite."""
        return [pair for pair in self.inputs if _is_floating(pair[1]) and not is_finite(pair[1])]

    def writes_infinity(self, output: Tensor) -> bool:
        """Whether an infinity is among the numbers that the caller gave."""
        return any(number in (math.inf, -math.inf) for number in self.numbers) and not bool(torch.isnan(output).any())


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what isn't finite from operation to operation.

    Args:
        sources: tensors that are there before: what they are, their names, themselves.
    """

    def __init__(self, sources: Sequence[tuple[Kind, str, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0  # of operations so far
        self._found: list[Origin] = []
        # By storage, since views share one; the tensors are held, so that no other storage gets the same key.
        self._origins: dict[int, tuple[frozenset[int], Tensor]] = {}
        self._unwritten: dict[int, Tensor] = {}
        # Whatever gets a key that was freed writes its own.
        self._histories: dict[int, History] = {}
        self._roots: dict[int, frozenset[str]] = {}
        self.shown: set[str] = set()  # of what is there before: what a module's operations were given
        self._sources = {_key(tensor): (kind, name) for kind, name, tensor in reversed(sources)}
        self._path: list[str] = []

    # ------------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what it made."""
        kwargs = kwargs or {}
        changed = _changed(func, args, kwargs)
        before = {id(tensor): tensor.detach().clone() for tensor in changed if _is_floating(tensor)}
        outputs = func(*args, **kwargs)
        self.number += 1
        arguments = tree_leaves((args, kwargs))
        tensors = [item for item in arguments if isinstance(item, Tensor)]
        call = _Call(func, arguments, [(tensor, before.get(id(tensor), tensor)) for tensor in tensors])
        made = {id(item): item for item in [*tree_leaves(outputs), *changed] if isinstance(item, Tensor)}
        if call.name == "lift_fresh":  # a constant of the user's
            for tensor in made.values():
                self._histories.pop(_key(tensor), None)
                self._roots.pop(_key(tensor), None)
        elif call.name not in ("detach", "alias") and not _is_view(func):
            for tensor in made.values():
                if _is_floating(tensor):
                    self._look(call, tensor)
            self._trace_back(call, made.values())
        return outputs

    def _trace_back(self, call: _Call, made: Iterable[Tensor]) -> None:
        """Note by which operations, and of what that was there before, each output is made."""
        # Of values of which none was taken only the choice matters.
        chosen = plain_name(call.name) in SELECTIONS and all(one.numel() == 0 for one in made)
        given = [tensor for tensor, _ in call.inputs][1 if chosen else 0 :]
        roots = frozenset(root for tensor in given for root in self._roots_of(tensor))
        if torch.Tag.nondeterministic_seeded in call.func.tags:
            roots |= {RANDOM}
        if self._path:
            self.shown |= {root for tensor in given for root in self._roots_of(tensor)}
        for tensor in made:
            where = _key(tensor)
            parents = [self._history(tensor) for tensor, _ in call.inputs if _key(tensor) != where]
            self._histories[where] = plain_name(call.name), tuple(parents[:3])
            self._roots[where] = roots

    def _roots_of(self, tensor: Tensor) -> frozenset[str]:
        where = _key(tensor)
        if where in self._sources and where not in self._roots:
            return frozenset({" ".join(self._sources[where])})
        return self._roots.get(where, frozenset())

    def _look(self, call: _Call, output: Tensor) -> None:
        where = _key(output)
        if call.name in _UNINITIALISED:
            self._origins.pop(where, None)
            self._unwritten[where] = output
            return
        self._unwritten.pop(where, None)
        if is_finite(output):
            if not _is_part(output):
                self._origins.pop(where, None)
            return
        bad = call.bad()
        known = frozenset(number for tensor, _ in bad for number in self._origins_or_source(tensor))
        if not bad or _makes_more(call, [value for _, value in bad], output):
            known |= {self._begins(call, output, written=call.writes_infinity(output))}
        elif self._turns_into_nan(known, [value for _, value in bad], output):
            known = frozenset({self._begins(call, output, written=False)})
        before = self._origins.get(where, (frozenset(), output))[0] if _is_part(output) else frozenset()
        self._origins[where] = (known | before, output)

    def _turns_into_nan(self, known: frozenset[int], bad: list[Tensor], output: Tensor) -> bool:
        """Whether infinities that were meant to be there become NaN."""
        if not known or not all(self._found[number].written for number in known):
            return False
        return bool(torch.isnan(output).any()) and not any(bool(torch.isnan(value).any()) for value in bad)

    def _begins(self, call: _Call, output: Tensor, *, written: bool) -> int:
        file, line, node = place(sys._getframe(1))
        module = self._path[-1] if self._path else ""
        name = plain_name(call.name)
        if node is not None:
            module = node.metadata.get(_MODULE, module)
            name = name_of_node(node.name()) or name
        self._found.append(
            Origin(
                kind="operation",
                name=name,
                number=self.number,
                in_backward=torch._C._current_autograd_node() is not None,
                kernel=str(call.func),
                module=module,
                file=file,
                line=line,
                code=linecache.getline(file, line).strip(),
                inputs=(*(_describe(value) for _, value in call.inputs), *call.numbers),
                output=_describe(output),
                rows=_bad_rows(output),
                made_of=tuple(tuple(_names(self._history(tensor))) for tensor, _ in call.inputs),
                roots=tuple(self._roots_of(tensor) for tensor, _ in call.inputs),
                written=written,
            )
        )
        return len(self._found) - 1

    # ---------------------------------------------------------------------------------------------------- origins

    def origins_of(self, tensor: Tensor) -> list[Origin]:
        """Return where a tensor's bad values began, those that nobody meant first, then the earliest."""
        numbers = self._origins_or_source(tensor)
        return sorted((self._found[number] for number in numbers), key=lambda origin: (origin.written, origin.number))

    def _origins_or_source(self, tensor: Tensor) -> frozenset[int]:
        where = _key(tensor)
        if where in self._origins:
            return self._origins[where][0]
        kind, name = self._sources.get(where, ("uninitialised" if where in self._unwritten else "constant", ""))
        file, line, _ = place(sys._getframe(1)) if not name else ("", 0, None)  # one without a name is known by its use
        self._found.append(
            Origin(
                kind=kind,
                name=name,
                number=self.number if kind == "constant" else 0,
                file=file,
                line=line,
                code=linecache.getline(file, line).strip(),
                output=_describe(tensor),
                rows=_bad_rows(tensor),
                written=kind == "constant" and not bool(torch.isnan(tensor).any()),
            )
        )
        found = frozenset({len(self._found) - 1})
        self._origins[where] = (found, tensor)
        return found

    def _history(self, tensor: Tensor) -> History | None:
        where = _key(tensor)
        if where in self._sources:
            return " ".join(self._sources[where]), ()
        return self._histories.get(where)

    # ---------------------------------------------------------------------------------------------------- modules

    @contextmanager
    def inside(self, root: nn.Module) -> Iterator[None]:
        """Know at each operation in which module it is, and in the backward pass in which its forward was."""
        with ExitStack() as stack:
            for path, module in root.named_modules():
                handle = module.register_forward_pre_hook(lambda *_, path=path: self._path.append(path))
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _leave(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        path = self._path.pop()
        waiting: list[Any] = [
            item.grad_fn for item in tree_leaves(outputs) if isinstance(item, Tensor) and item.grad_fn
        ]
        while waiting:
            node = waiting.pop()
            if node is None or _MODULE in node.metadata or node.name().endswith("AccumulateGrad"):
                continue
            node.metadata[_MODULE] = path
            waiting.extend(parent for parent, _ in node.next_functions)


def _key(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass without memory of its own
        return id(tensor)


def _is_floating(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0


def _is_part(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes()


def _is_view(func: Any) -> bool:
    return any(item.alias_info is not None and not item.alias_info.is_write for item in func._schema.returns)


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that the operation writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        unmentioned = argument.name in ("running_mean", "running_var")  # of batch normalisation
        if unmentioned or (argument.alias_info is not None and argument.alias_info.is_write):
            found += [item for item in tree_leaves(value) if isinstance(item, Tensor)]
    return found


def _makes_more(call: _Call, bad: list[Tensor], output: Tensor) -> bool:
    """Whether an operation on single elements makes others bad than those that were."""
    if torch.Tag.pointwise not in call.func.tags:
        return False
    taken = torch.zeros(output.shape, dtype=torch.bool, device=output.device)
    for value in bad:
        try:
            taken = taken | (~torch.isfinite(value)).expand_as(output)
        except RuntimeError:
            return False
    return bool((~torch.isfinite(output) & ~taken).any())


def _bad_rows(tensor: Tensor) -> tuple[int, ...]:
    """Return the places along the first dimension that aren't finite."""
    if tensor.dim() == 0:
        return ()
    bad = (~torch.isfinite(tensor)).reshape(tensor.shape[0], -1).any(1)
    return tuple(bad.nonzero().flatten().tolist())


def _names(history: History | None, depth: int = 4) -> Iterator[str]:
    """Visit the operations that made a tensor, latest first."""
    if history is None or (depth == 0 and history[1]):
        return
    name, parents = history
    yield name
    for parent in parents:
        yield from _names(parent, depth - 1)


def _describe(tensor: Tensor) -> dict[str, Any]:
    facts = describe(tensor) if tensor.layout == torch.strided else describe(tensor.to_dense())
    if tensor.is_floating_point() and tensor.layout == torch.strided and tensor.numel() > 0:
        facts["zeros"], facts["negative"] = int((tensor == 0).sum()), int((tensor < 0).sum())
    return facts
