"""Where a NaN or Inf began, and what the whole of a traced pass showed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stabletrain.doctor.diagnosis import Operation

RANDOM = "random numbers"
SELECTIONS = {"index", "masked_select", "index_select"}
Kind = Literal["operation", "batch", "parameter", "buffer", "constant", "uninitialised"]


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
        roots: what each input is made of in the end: `batch 0`, `parameter head.weight`, `random numbers`.
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
    roots: tuple[frozenset[str], ...] = ()
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
        shown: what of the batch, the parameters and the buffers the operations inside of modules were given.
    """

    reached: str | None
    origins: tuple[Origin, ...]
    operations: int
    losses: tuple[float, ...]
    error: Exception | None = None
    shown: frozenset[str] = frozenset()

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
