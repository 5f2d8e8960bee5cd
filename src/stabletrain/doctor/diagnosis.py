"""What the doctor found, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Cause = Literal[
    "data",
    "label",
    "weights",
    "optimizer",
    "overflow",
    "domain",
    "masked_attention",
    "normalization",
    "learning_rate",
    "initialization",
    "loss_setting",
    "augmentation",
    "not_reproducible",
    "unknown",
]
Confidence = Literal["high", "medium", "low"]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """The first operation that made a NaN or Inf which reached the loss, a gradient or a buffer.

    Args:
        name: as the field calls it; of a backward operation, the forward operation that it belongs to.
        in_backward: whether it happened in the backward pass.
        module: path of the module, empty for the model itself or code outside of it.
        file: of the user's line.
        line: its number, from 1; 0 = unknown.
        code: its text.
        inputs: shape, dtype and range of each tensor that came in, then the numbers among the arguments.
        kernel: what torch ran.
    """

    name: str
    in_backward: bool
    module: str
    file: str
    line: int
    code: str
    inputs: tuple[Any, ...]
    kernel: str


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change that was tried on the replay.

    Args:
        override: what to give on the command line, or to change in the code.
        held: the step is healthy with it, and the updates after it.
        tried_updates: how many updates it was tried for.
        detail: what happened.
        group: which kind of remedy: precision, data, loss, learning rate and clipping, augmentation, model.
    """

    override: str
    held: bool
    tried_updates: int
    detail: str = ""
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was wrong with a step, and what helps.

    Args:
        reproduced: `yes`; `no`: it is healthy this time; `differs`: it goes wrong in another way.
        cause: class of the cause; None: the step is healthy.
        confidence: how sure that is.
        evidence: what speaks for it, a sentence each.
        reached: what isn't finite: the loss, a gradient or a buffer, by name.
        operation: where it began; None where it came in from outside or nothing is known.
        source: what held it before the step, where it came in from outside: `batch 0`, `parameter head.weight`.
        samples: to blame, in rising order: positions in the batch, or indices in the data set for an incident.
        odd: what is odd about each of them, in words.
        remedies: what was tried.
        command: that goes on with the first remedy that held; empty where there is none.
        seconds: how long it took.
    """

    reproduced: Literal["yes", "no", "differs"]
    cause: Cause | None
    confidence: Confidence = "high"
    evidence: tuple[str, ...] = ()
    reached: str | None = None
    operation: Operation | None = None
    source: str | None = None
    samples: tuple[int, ...] | list[int] = ()
    odd: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    command: str = ""
    seconds: float = 0.0

    def content(self) -> dict[str, Any]:
        """Return what `diagnosis.json` holds; NaN and Inf as words."""
        operation = self.operation
        found = {
            "reproduced": self.reproduced,
            "cause": self.cause,
            "confidence": self.confidence,
            "evidence": list(self.evidence),
            "reached": self.reached,
            "operation": operation
            and {
                "name": operation.name,
                "pass": "backward" if operation.in_backward else "forward",
                "module": operation.module,
                "file": operation.file,
                "line": operation.line,
                "code": operation.code,
                "inputs": list(operation.inputs),
                "kernel": operation.kernel,
            },
            "source": self.source,
            "samples": list(self.samples),
            "odd": list(self.odd),
            "remedies": [vars(remedy) for remedy in self.remedies],
            "command": self.command,
            "seconds": round(self.seconds, 2),
        }
        plain: dict[str, Any] = _words(found)
        return plain

    def where(self) -> str:
        """Say in one line where it began."""
        if self.cause is None:
            return "the step is healthy"
        if self.operation is None and self.source is not None:
            return f"{self.source} was not finite before the step"
        if self.operation is None:
            return f"{self.reached} is not finite" if self.reached else "everything is finite"
        way = "the backward pass of " if self.operation.in_backward else ""
        module = f" in {self.operation.module}" if self.operation.module else ""
        place = f" at {self.operation.file}:{self.operation.line}" if self.operation.line else ""
        return f"{way}{self.operation.name}{module}{place}: {self.operation.code}".rstrip(": ")

    def __str__(self) -> str:
        """The whole of it, as one reads it in a notebook."""
        if self.cause is None:
            return "healthy: loss, gradients and buffers are finite"
        lines = [f"cause: {self.cause} (confidence {self.confidence})", f"where: {self.where()}"]
        lines += [f"       {line}" for line in self.evidence]
        if self.samples:
            odd = dict(zip(self.samples, self.odd, strict=False))
            lines.append(
                "samples: " + ", ".join(f"{one}{f' ({odd[one]})' if odd.get(one) else ''}" for one in self.samples)
            )
        held = [remedy for remedy in self.remedies if remedy.held]
        lines += [f"holds: {remedy.override}{f' ({remedy.detail})' if remedy.detail else ''}" for remedy in held]
        lines += [f"doesn't hold: {remedy.override}" for remedy in self.remedies if not remedy.held]
        lines += [f"go on with: {self.command}"] if self.command else []
        return "\n".join(lines)

    __repr__ = __str__


def _words(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _words(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_words(item) for item in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(tree)
    return tree
