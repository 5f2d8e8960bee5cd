"""What is examined: a run's parts, of which every check gets fresh copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.build import build_model
from stabletrain.optimizer import copied
from stabletrain.precision import Precision
from stabletrain.task import Task
from stabletrain.trainer import Run
from stabletrain.tree import map_tensors

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Subject:
    """A run that was built but not begun.

    Attributes:
        run: its parts are only read.
        config: its settings.
        bad_samples: positions in the training part that hold NaN or Inf or have no usable label; the checks of the
            model leave them out, so that each fault is told once.
    """

    run: Run
    config: dict[str, Any]
    bad_samples: list[int] = field(default_factory=list)

    def fresh_model(self) -> nn.Module:
        """Return a copy of the model in its initial state, in training mode, with no gradient."""
        try:
            model = copy.deepcopy(self.run.model)
        except RuntimeError:  # torch copies no tensors that have a history, as old parametrisations keep them
            model = build_model(self.run.settings)
            model.load_state_dict(self.run.model.state_dict())
            model.to(self.run.device)
        model.zero_grad(set_to_none=True)
        return model.train()

    def fresh_task(self) -> Task:
        """Return the task; a copy, where its loss has state that training changes."""
        task = self.run.task
        return task if self.run.objective is None else copy.deepcopy(task)

    def fresh_pair(self) -> tuple[nn.Module, Optimizer]:
        """Return copies of the model and of the optimizer that trains it.

        Raises:
            RuntimeError: torch can't copy the model.
        """
        model, optimizer = copied(self.run.model, self.run.optimizer)
        optimizer.zero_grad(set_to_none=True)
        return model.train(), optimizer

    def batch(self, most: int | None = None) -> Any:
        """Return a batch of training data without bad samples, with memory of its own.

        Args:
            most: samples at most; None: those of a microbatch, but 2 at least.
        """
        loader = self.run.loader
        size = loader.batch_size // (loader.accumulate * loader.ranks)
        bad = set(self.bad_samples)
        good = [index for index in loader.order(0).tolist() if index not in bad]
        data = loader.read(good[: max(2, size) if most is None else most], 0).data
        return map_tensors(torch.clone, data)

    def ignored_label(self) -> int | None:
        """Return the label that the loss passes over, if it says so as torch's losses do."""
        loss = getattr(self.run.task, "loss", None)
        for module in loss.modules() if isinstance(loss, nn.Module) else ():
            found = getattr(module, "ignore_index", None)
            if isinstance(found, int):
                return found
        return None

    def smallest_microbatch(self) -> int:
        """Return how many samples the smallest microbatch of an epoch has."""
        loader = self.run.loader
        largest = loader.batch_size // (loader.accumulate * loader.ranks)
        rest = len(loader.dataset) % loader.batch_size
        if rest == 0 or loader.drop_last:
            return largest
        return rest // math.ceil(rest / largest)

    def precisions(self) -> dict[str, Precision]:
        """Return what the device can compute in, by option, the chosen one first."""
        device = self.run.device
        chosen = self.run.precision
        found = {FORMATS.get(chosen.dtype, str(chosen.dtype)): chosen}
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
            if name not in found:
                found[name] = Precision(dtype, fallback="float32", device=device)
        if device.type == "cuda":
            found.setdefault("tf32", Precision("float32", matmul="tf32", device=device))
        return found


def inputs_of(data: Any) -> Any:
    """Return what the model gets: the first of a pair, else everything."""
    return data[0] if is_pair(data) else data


def targets_of(data: Any) -> Any:
    """Return what it is judged by: the second of a pair, else nothing."""
    return data[1] if is_pair(data) else None


def is_pair(data: Any) -> bool:
    """Return whether a batch is a pair, of inputs and targets."""
    return isinstance(data, (tuple, list)) and len(data) == 2


def with_inputs(data: Any, inputs: Any) -> Any:
    """Return the batch with other inputs."""
    return (inputs, data[1]) if is_pair(data) else inputs


def leaves(tree: Any, samples: int, name: str = "") -> Iterator[tuple[str, Tensor | list[Tensor]]]:
    """Visit what a tree holds for each sample: a tensor [n, ...], or a list of n tensors, with its dotted name.

    Example:
        >>> tree = {"ids": torch.zeros(3, 2), "steps": [torch.zeros(1), torch.zeros(4), torch.zeros(2)]}
        >>> [name for name, leaf in leaves(tree, 3)]
        ['ids', 'steps']
    """
    if isinstance(tree, Tensor):
        if tree.dim() > 0 and len(tree) == samples:
            yield name, tree
    elif isinstance(tree, list) and len(tree) == samples and all(isinstance(item, Tensor) for item in tree):
        yield name, tree
    elif isinstance(tree, (dict, tuple, list)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, item in items:
            yield from leaves(item, samples, f"{name}.{key}" if name else str(key))
