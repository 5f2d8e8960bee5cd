"""The first operation that makes a NaN or Inf which reaches the loss, a gradient or a buffer.

Every operation of the forward and backward passes is seen. One whose output isn't finite either passes on what came in,
or begins something: an origin. What ends in finite values, as the -inf of a mask ends in a softmax, was innocent and is
forgotten. What is left leads from the loss, or else from a gradient or a buffer, back to where it began.

An infinity that somebody wrote down (`masked_fill(mask, -inf)`) is meant to be there. Where such a value turns into
NaN, that operation is the origin.
"""

from __future__ import annotations

import linecache
import re
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stabletrain.doctor.diagnosis import Operation
from stabletrain.incident.statistics import describe

HALF = (torch.float16, torch.bfloat16)
Kind = Literal["operation", "batch", "parameter", "buffer", "constant", "uninitialised"]
_UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
_MODULE = "stabletrain.module"  # key in the metadata of a node of the autograd graph
_PACKAGE = Path(__file__).resolve().parents[1]
_MACHINERY = [str(_PACKAGE / name) for name in ("doctor", "guard", "trainer", "assembly.py", "__main__.py")]
_LIBRARIES = [str(Path(torch.__file__).parent), *site.getsitepackages(), "<"]
_LIBRARIES += [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib")]
_SHORT = {  # what people call what torch calls otherwise
    "linalg_vector_norm": "norm",
    "native_batch_norm": "batch_norm",
    "native_dropout": "dropout",
    "native_group_norm": "group_norm",
    "native_layer_norm": "layer_norm",
    "nll_loss_forward": "nll_loss",
    "nll_loss2d_forward": "nll_loss",
    "rsub": "sub",
    "to_copy": "to",
    "weight_norm_interface": "weight_norm",
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a NaN or Inf began.

    Args:
        kind: `operation`; or what held it before: the batch, a parameter, a buffer, a constant, memory nobody wrote to.
        name: of the operation, as the field calls it, or of the tensor.
        number: place among all operations; sources come first.
        in_backward: it began in the backward pass; `name`, `file` and `line` are then those of the forward operation.
        kernel: what torch ran.
        module: path of the innermost module in whose forward it was.
        file: of the user's line, or of ours where no line of the user's was involved.
        line: its number; 0 = unknown.
        code: its text.
        inputs: statistics of each tensor that came in, and the numbers among the arguments.
        output: statistics of what came out.
        rows: places along the first dimension of the output that aren't finite.
        made_of: the operations that made each input, latest first.
        written: an infinity that the caller chose.
    """

    kind: Kind
    name: str
    number: int
    in_backward: bool = False
    kernel: str = ""
    module: str = ""
    file: str = ""
    line: int = 0
    code: str = ""
    inputs: tuple[Any, ...] = ()
    output: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    made_of: tuple[tuple[str, ...], ...] = ()
    written: bool = False

    def has_rows_of(self, count: int) -> bool:
        """Whether the output has one entry a sample along its first dimension, and some of them are finite."""
        return self.output.get("shape", [0])[:1] == [count] and 0 < len(self.rows) < count


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What a traced pass showed.

    Args:
        reached: what isn't finite: `loss`, `gradient of <parameter>` or `buffer <name>`; None: all is finite.
        origins: where it began, the most likely one first; empty where it is not known.
        operations: how many were seen.
        losses: what the pass returned.
        error: that ended it.
    """

    reached: str | None
    origins: tuple[Origin, ...]
    operations: int
    losses: tuple[float, ...]
    error: Exception | None = None

    @property
    def may_be_samples(self) -> bool:
        """Whether a sample may be to blame: not where a parameter or buffer was bad before."""
        return not self.origins or any(origin.kind not in ("parameter", "buffer") for origin in self.origins)

    @property
    def source(self) -> str | None:
        """What held it before the step; None where an operation made it."""
        origin = self.origins[0] if self.origins else None
        return None if origin is None or origin.kind == "operation" else f"{origin.kind} {origin.name}".strip()

    @property
    def operation(self) -> Operation | None:
        """The first bad operation; None where it came in from outside."""
        origin = self.origins[0] if self.origins else None
        if origin is None or origin.kind != "operation":
            return None
        return Operation(
            name=origin.name,
            in_backward=origin.in_backward,
            module=origin.module,
            file=origin.file,
            line=origin.line,
            code=origin.code,
            inputs=origin.inputs,
            kernel=origin.kernel,
        )


def trace(
    run: Callable[[], Sequence[Tensor]], modules: Sequence[nn.Module], batch: Iterable[tuple[str, Tensor]]
) -> Traced:
    """Watch a forward and backward pass.

    Args:
        run: does both, and returns the losses; gradients are looked for at the modules' parameters.
        modules: all that take part.
        batch: the tensors of the batch, with their names.
    """
    names = list(_named(modules))
    mode = _Watch([("batch", name, tensor) for name, tensor in batch] + names)
    with ExitStack() as stack:
        # It records each node's line; its own check, which stops at any NaN, is not wanted.
        stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
        for module in modules:
            stack.enter_context(mode.inside(module))
        stack.enter_context(_quiet())
        losses: list[Tensor] = []
        error: Exception | None = None
        with mode:
            try:
                losses = list(run())
            except (RuntimeError, ValueError, IndexError) as caught:
                error = caught
    bad = first_bad(losses, modules)
    return Traced(
        reached=bad and bad[0],
        origins=tuple(mode.origins_of(bad[1])) if bad is not None else (),
        operations=mode.number,
        losses=tuple(float(loss.detach()) for loss in losses),
        error=error,
    )


def _named(modules: Sequence[nn.Module]) -> Iterator[tuple[Kind, str, Tensor]]:
    for module in modules:
        for name, parameter in module.named_parameters():
            yield "parameter", name, parameter
        for name, buffer in module.named_buffers():
            yield "buffer", name, buffer


def first_bad(losses: Sequence[Tensor], modules: Sequence[nn.Module]) -> tuple[str, Tensor] | None:
    """Return what isn't finite first, of losses, gradients and buffers, and its tensor."""
    names = list(_named(modules))
    for loss in losses:
        if not is_finite(loss):
            return "loss", loss
    for kind, name, tensor in names:
        if kind == "parameter" and tensor.grad is not None and not is_finite(tensor.grad):
            return f"gradient of {name}", tensor.grad
    for kind, name, tensor in names:
        if kind == "buffer" and not is_finite(tensor):
            return f"buffer {name}", tensor
    return None


def is_finite(tensor: Tensor) -> bool:
    """Return whether every element is finite; whole numbers are."""
    values = tensor.detach()
    if values.layout != torch.strided:
        values = values.coalesce().values() if values.is_sparse else values.to_dense()
    return not (values.is_floating_point() or values.is_complex()) or bool(torch.isfinite(values).all())


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch says once that anomaly detection is slow."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        yield


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what isn't finite from operation to operation."""

    def __init__(self, sources: Sequence[tuple[Kind, str, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0
        self._found: list[Origin] = []
        # By storage, since views share one; the tensors are held, so that no other storage gets the same key.
        self._origins: dict[int, tuple[frozenset[int], Tensor]] = {}
        self._made_by: dict[int, tuple[str, tuple[int, ...], Tensor]] = {}
        self._unwritten: dict[int, Tensor] = {}
        self._sources = {_key(tensor): (kind, name) for kind, name, tensor in reversed(sources)}
        self._path: list[str] = []

    # ------------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        changed = _changed(func, args, kwargs)
        before = {id(tensor): tensor.detach().clone() for tensor in changed if _is_floating(tensor)}
        outputs = func(*args, **kwargs)
        self.number += 1
        if name in ("lift_fresh", "detach", "alias") or _is_view(func):
            return outputs
        given = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        inputs = [(tensor, before.get(id(tensor), tensor)) for tensor in given]
        for tensor in {id(t): t for t in [*tree_leaves(outputs), *changed] if isinstance(t, Tensor)}.values():
            if _is_floating(tensor):
                self._look(func, name, args, kwargs, inputs, tensor)
        return outputs

    def _look(
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[tuple[Tensor, Tensor]], output: Tensor
    ) -> None:
        place = _key(output)
        sources = tuple(_key(tensor) for tensor, _ in inputs)
        if name in _UNINITIALISED:
            self._origins.pop(place, None)
            self._unwritten[place] = output
            return
        self._unwritten.pop(place, None)
        self._made_by[place] = (_plain(name), tuple(key for key in sources if key != place), output)
        if is_finite(output):
            if output.numel() * output.element_size() >= output.untyped_storage().nbytes():
                self._origins.pop(place, None)
            return
        bad = [(tensor, value) for tensor, value in inputs if _is_floating(value) and not is_finite(value)]
        known = frozenset(number for tensor, _ in bad for number in self._origins_or_source(tensor))
        written = _is_written(args, kwargs, output)
        if not bad or self._makes_more(func, [value for _, value in bad], output):
            known |= {self._begins(func, name, args, kwargs, inputs, output, written)}
        elif self._turns_into_nan(known, [value for _, value in bad], output):
            known = frozenset({self._begins(func, name, args, kwargs, inputs, output, False)})
        before = self._origins.get(place, (frozenset(), output))[0] if _is_part(output) else frozenset()
        self._origins[place] = (known | before, output)

    def _makes_more(self, func: Any, bad: list[Tensor], output: Tensor) -> bool:
        """Whether an operation on single elements makes others bad than those that were."""
        if torch.Tag.pointwise not in func.tags:
            return False
        taken = torch.zeros(output.shape, dtype=torch.bool, device=output.device)
        for value in bad:
            try:
                taken = taken | (~torch.isfinite(value)).expand_as(output)
            except RuntimeError:
                return False
        return bool((~torch.isfinite(output) & ~taken).any())

    def _turns_into_nan(self, known: frozenset[int], bad: list[Tensor], output: Tensor) -> bool:
        """Whether infinities that were meant to be there become NaN."""
        if not known or not all(self._found[number].written for number in known):
            return False
        return bool(torch.isnan(output).any()) and not any(bool(torch.isnan(value).any()) for value in bad)

    def _begins(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        inputs: list[tuple[Tensor, Tensor]],
        output: Tensor,
        written: bool,
    ) -> int:
        file, line, node = _place(sys._getframe(1))
        module = self._path[-1] if self._path else ""
        called = _plain(name)
        if node is not None:
            module = node.metadata.get(_MODULE, module)
            called = _of_node(node.name()) or called
        described = [_describe(value) for _, value in inputs]
        numbers = [item for item in tree_leaves((args, kwargs)) if isinstance(item, (int, float)) and item is not None]
        rows = (~torch.isfinite(output)).reshape(output.shape[0], -1).any(1).nonzero() if output.dim() > 0 else None
        self._found.append(
            Origin(
                kind="operation",
                name=called,
                number=self.number,
                in_backward=torch._C._current_autograd_node() is not None,
                kernel=str(func),
                module=module,
                file=file,
                line=line,
                code=linecache.getline(file, line).strip(),
                inputs=(*described, *(number for number in numbers if not isinstance(number, bool))),
                output=_describe(output),
                rows=() if rows is None else tuple(rows.flatten().tolist()),
                made_of=tuple(tuple(self._ancestry(_key(tensor))) for tensor, _ in inputs),
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
        place = _key(tensor)
        if place in self._origins:
            return self._origins[place][0]
        kind, name = self._sources.get(place, ("uninitialised" if place in self._unwritten else "constant", ""))
        rows = (~torch.isfinite(tensor)).reshape(tensor.shape[0], -1).any(1).nonzero() if tensor.dim() > 0 else None
        file, line, _ = _place(sys._getframe(1))
        self._found.append(
            Origin(
                kind=kind,
                name=name,
                number=0 if kind != "constant" else self.number,
                file=file if kind in ("constant", "uninitialised") else "",
                line=line if kind in ("constant", "uninitialised") else 0,
                code=linecache.getline(file, line).strip() if kind in ("constant", "uninitialised") else "",
                output=_describe(tensor),
                rows=() if rows is None else tuple(rows.flatten().tolist()),
                written=kind == "constant" and not bool(torch.isnan(tensor).any()),
            )
        )
        found = frozenset({len(self._found) - 1})
        self._origins[place] = (found, tensor)
        return found

    def _ancestry(self, place: int, depth: int = 4) -> Iterator[str]:
        if place in self._sources:
            yield f"{self._sources[place][0]} {self._sources[place][1]}"
        elif depth > 0 and place in self._made_by:
            name, parents, _ = self._made_by[place]
            yield name
            for parent in parents[:3]:
                yield from self._ancestry(parent, depth - 1)

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


# ----------------------------------------------------------------------------------------------------------- tensors


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


def _is_written(args: Any, kwargs: Any, output: Tensor) -> bool:
    """Whether an infinity is among the numbers that the caller gave."""
    numbers = [item for item in tree_leaves((args, kwargs)) if isinstance(item, float)]
    return any(number in (float("inf"), float("-inf")) for number in numbers) and not bool(torch.isnan(output).any())


def _describe(tensor: Tensor) -> dict[str, Any]:
    facts = describe(tensor) if tensor.layout == torch.strided else describe(tensor.to_dense())
    if tensor.is_floating_point() and tensor.layout == torch.strided and tensor.numel() > 0:
        facts["zeros"], facts["negative"] = int((tensor == 0).sum()), int((tensor < 0).sum())
    return facts


# -------------------------------------------------------------------------------------------------------------- names


def _plain(kernel: str) -> str:
    name = kernel.strip("_")
    name = re.sub(r"^(cudnn|miopen|mkldnn|mps|native)_(?=batch_norm|group_norm|layer_norm)", "", name)
    if name.startswith("scaled_dot_product"):
        return "scaled_dot_product_attention"
    return _SHORT.get(name, name)


def _of_node(name: str) -> str:
    """Return the forward operation of a node of the autograd graph.

    Example:
        >>> _of_node("LogSoftmaxBackward0"), _of_node("SqrtBackward0"), _of_node("torch::autograd::AccumulateGrad")
        ('log_softmax', 'sqrt', '')
    """
    found = re.fullmatch(r"(\w+?)Backward\w*", name.rpartition("::")[2])
    if found is None:
        return ""
    return _plain(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", found[1]).lower())


def place_of_operation() -> tuple[str, int]:
    """Return file and line that the operation which runs now belongs to, from inside a dispatch mode."""
    file, line, _ = _place(sys._getframe(1))
    return file, line


def _place(frame: Any) -> tuple[str, int, Any]:
    """Return file, line and, where a node of the autograd graph is what runs, that node."""
    node: Any = torch._C._current_autograd_node()
    place = _users_place(frame, inside_backward=node is not None)
    if node is None or place is not None:
        return *(place or ("", 0)), None
    return *(_place_in(node.metadata.get("traceback_", [])) or ("", 0)), node


def _users_place(frame: Any, *, inside_backward: bool) -> tuple[str, int] | None:
    """Return file and line of the innermost frame of the user's, or else of ours that computes something.

    In the backward pass only what it calls itself counts: functions with a backward of their own, recomputation, hooks.
    """
    ours: tuple[str, int] | None = None
    while frame is not None:
        file = frame.f_code.co_filename
        if inside_backward and frame.f_code.co_name == "_engine_run_backward":
            return ours
        rank = _rank(file)
        if rank == 2:
            return file, frame.f_lineno
        if rank == 1 and ours is None:
            ours = file, frame.f_lineno
        frame = frame.f_back
    return ours


def _place_in(lines: Sequence[str]) -> tuple[str, int] | None:
    """As `_users_place`, in a traceback that was written down."""
    ours: tuple[str, int] | None = None
    for text in reversed(lines):
        found = re.match(r'\s*File "(.+)", line (\d+)', text)
        if found is None:
            continue
        rank = _rank(found[1])
        if rank == 2:
            return found[1], int(found[2])
        if rank == 1 and ours is None:
            ours = found[1], int(found[2])
    return ours


def _rank(file: str) -> int:
    """2: the user's; 1: a part of ours that computes; 0: machinery and libraries."""
    if file.startswith(str(_PACKAGE)):
        return 0 if any(file.startswith(place) for place in _MACHINERY) else 1
    return 0 if any(file.startswith(place) for place in _LIBRARIES) else 2
