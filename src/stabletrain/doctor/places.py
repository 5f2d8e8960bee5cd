"""What people call an operation, and where it stands in their code."""

from __future__ import annotations

import re
import site
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_MACHINERY = [str(_PACKAGE / name) for name in ("doctor", "guard", "trainer", "assembly.py", "__main__.py", "config")]
# From these a step is run: frames further out have nothing to do with it.
_CALLERS = tuple(str(_PACKAGE / name) for name in ("trainer/step.py", "doctor/notebook.py", "doctor/replaying.py"))
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


def plain_name(kernel: str) -> str:
    """Return what people call a kernel of torch's.

    Example:
        >>> plain_name("_log_softmax"), plain_name("native_layer_norm"), plain_name("linalg_vector_norm")
        ('log_softmax', 'layer_norm', 'norm')
    """
    name = kernel.strip("_")
    name = re.sub(r"^(cudnn|miopen|mkldnn|mps|native)_(?=batch_norm|group_norm|layer_norm)", "", name)
    if name.startswith("scaled_dot_product"):
        return "scaled_dot_product_attention"
    return _SHORT.get(name, name)


def name_of_node(name: str) -> str:
    """Return the forward operation of a node of the autograd graph.

    Example:
        >>> name_of_node("LogSoftmaxBackward0"), name_of_node("torch::autograd::AccumulateGrad")
        ('log_softmax', '')
    """
    found = re.fullmatch(r"(\w+?)Backward\w*", name.rpartition("::")[2])
    if found is None:
        return ""
    return plain_name(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", found[1]).lower())


def place_of_operation() -> tuple[str, int]:
    """Return file and line that the operation which runs now belongs to, from inside a dispatch mode."""
    file, line, _ = place(sys._getframe(1))
    return file, line


def place(frame: Any) -> tuple[str, int, Any]:
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
        if file in _CALLERS:
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
        if found[1] in _CALLERS:
            return ours
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
