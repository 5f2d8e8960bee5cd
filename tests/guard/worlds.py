"""A training loop as a user writes it, with everything the guard has to leave alone, and ways to poison a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_optimizer import StableAdamW
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop, SparseAdam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from small import Multiply
from stabletrain.clipping import Norm, Value
from stabletrain.guard import Policy, StepGuard, Verdict

from . import models

LARGEST_SQUARE = math.sqrt(torch.finfo(torch.float32).max)
OPTIMIZERS: dict[str, Any] = {
    "adamw fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "adamw loop": lambda p: AdamW(p, lr=0.01, foreach=False),
    "adam amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "sgd momentum": lambda p: SGD(p, lr=0.01, momentum=0.9),
    "sgd nesterov": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "sgd fused": lambda p: SGD(p, lr=0.01, momentum=0.9, fused=True),
    "adagrad": lambda p: Adagrad(p, lr=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "muon": lambda p: Muon(p, lr=0.01),
    "stable adamw": lambda p: StableAdamW(p, lr=0.01),
}
FUSED: dict[str, Any] = {
    "fused adam": lambda p: Adam(p, lr=0.01, fused=True),
    "fused adam amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True, fused=True),
    "fused adamw": lambda p: AdamW(p, lr=0.01, fused=True),
    "fused adagrad": lambda p: Adagrad(p, lr=0.01, fused=True),
    "fused sgd": lambda p: SGD(p, lr=0.01, fused=True),
    "fused sgd momentum": lambda p: SGD(p, lr=0.01, momentum=0.9, fused=True),
    "fused sgd nesterov": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True, fused=True),
}
PARAMETERS = ("one group", "two groups", "one without gradient", "two optimizers")
PLACES = ("input", "label", "loss", "gradient", "forward", "backward")
VALUES = (math.nan, math.inf, 1e30)
PRECISIONS = ("fp32", "bf16", "fp16")
CLIPPINGS = {"none": None, "norm": Norm(0.5), "value": Value(0.05)}
ACCUMULATIONS = ("1", "4, the first bad", "4, the last bad")


@dataclass(frozen=True)
class Poison:
    """What is wrong with one step."""

    place: str
    value: float


@dataclass(frozen=True)
class Case:
    """One combination."""

    poison: Poison
    model: str = "batch norm"
    optimizer: str = "adamw fused"
    precision: str = "fp32"
    clipping: str = "norm"
    accumulation: str = "1"
    ema: bool = False
    moment: str = "later"
    parameters: str = "one group"


class World:
    """Model, optimizers, scaler, average, schedule and guard of one case."""

    def __init__(self, case: Case, **guard_settings: Any) -> None:
        self.case = case
        self.model = models.build(case.model)
        self.unused = case.parameters == "one without gradient"
        if self.unused:
            self.model.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
        self.optimizers = build_optimizers(self.model, case)
        self.scaler = (
            torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) if case.precision == "fp16" else None
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizers[0], lambda update: 1.0 / (1 + 0.1 * update))
        self.extra = models.outside_state(self.model)
        settings = {
            "clip": CLIPPINGS[case.clipping],
            "scaler": self.scaler,
            "scheduler": self.schedule,
            "extra": self.extra,
            "policy": Policy(max_rejected=1000),
        }
        self.guard = StepGuard(self.model, self.optimizers, **{**settings, **guard_settings})
        average = get_ema_multi_avg_fn(0.9)
        # torch's average takes only buffers that keep their number and shape.
        keeps = not case.model.endswith(("None, then set", "registered late", "resized"))
        self.averaged = self.model if keeps else self.model.first
        self.average = AveragedModel(self.averaged, multi_avg_fn=average) if case.ema else None
        self.accumulate = int(case.accumulation[0])
        torch.manual_seed(11)
        self.raw: list[Tensor] = []
        self.applied: list[Tensor] | None = None

    def step(self, position: int, poison: Poison | None = None) -> Verdict:
        """Run one step of the loop; `poison` spoils one of its microbatches."""
        bad = 0 if "first" in self.case.accumulation else self.accumulate - 1
        losses = []
        for index in range(self.accumulate):
            loss = self._forward(position, index, poison if index == bad else None) / self.accumulate
            with self._spoiled_gradient(poison if index == bad else None):
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            losses.append(loss.detach() * self.accumulate)
        self.losses = losses
        scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        self.raw = [p.grad.to_dense().double() / scale for p in self._trained() if p.grad is not None]
        self.applied = None
        verdict = self.guard.step(losses)
        if verdict.applied and self.average is not None:
            self.average.update_parameters(self.averaged)
        return verdict

    def _forward(self, position: int, index: int, poison: Poison | None) -> Tensor:
        inputs, words, targets = batch(position, index)
        place, value = (poison.place, poison.value) if poison is not None else ("", 0.0)
        if place == "input":
            inputs[1, 2] = value
        if place == "label":
            targets[0, 1] = value
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.case.precision)
        with torch.autocast("cpu", kind, enabled=True) if kind is not None else contextlib.nullcontext():
            if place == "forward":
                with torch.no_grad():
                    self.model(inputs * value, words)
            outputs = self.model(inputs, words).float()
        if place == "backward":
            outputs = outputs + (outputs * 0).abs().sqrt() if math.isnan(value) else Multiply.apply(outputs, value)
        loss = (outputs - targets).square().mean()
        return loss + value if place == "loss" else loss

    @contextlib.contextmanager
    def _spoiled_gradient(self, poison: Poison | None) -> Iterator[None]:
        if poison is None or poison.place != "gradient":
            yield
            return

        def spoil(gradient: Tensor) -> Tensor:
            spoiled = gradient.clone()
            spoiled.view(-1)[1] = poison.value
            return spoiled

        handle = self.model.first.weight.register_hook(spoil)
        yield
        handle.remove()

    def _trained(self) -> list[nn.Parameter]:
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers by name, those of modules in `extra` too."""
        found = dict(self.model.named_buffers())
        for module in (item for item in self.extra if isinstance(item, nn.Module)):
            found.update({f"extra.{name}": buffer for name, buffer in module.named_buffers()})
        return found

    def watch_applied(self) -> None:
        """Keep the gradients that the optimizers are given from now on."""

        def keep(optimizer: Optimizer, *_: Any) -> None:
            given = [
                p.grad.to_dense().clone() for g in optimizer.param_groups for p in g["params"] if p.grad is not None
            ]
            self.applied = (self.applied or []) + given

        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(keep)

    def state(self) -> dict[str, Any]:
        """Return every tensor and number there is, by name."""
        found: dict[str, Any] = {}
        flatten("model", self.model.state_dict(), found)
        flatten("buffers", dict(self.model.named_buffers()), found)
        for index, optimizer in enumerate(self.optimizers):
            flatten(f"optimizer {index}", optimizer.state_dict(), found)
        for name, holder in (("scaler", self.scaler), ("average", self.average), ("schedule", self.schedule)):
            if holder is not None:
                flatten(name, holder.state_dict(), found)
        for index, item in enumerate(self.extra):
            state = item.get_state() if isinstance(item, torch.Generator) else item
            flatten(f"extra {index}", state.state_dict() if hasattr(state, "state_dict") else state, found)
        found["randomness"] = torch.get_rng_state()
        found["gradients"] = [p.grad is None for p in self.model.parameters()]
        return found


def batch(position: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, words and targets that depend on the position alone."""
    generator = torch.Generator().manual_seed(100 * position + index)
    inputs = torch.randn(6, models.FEATURES, generator=generator)
    words = torch.randint(models.WORDS, (6,), generator=generator)
    return inputs, words, torch.randn(6, models.OUTPUTS, generator=generator)


def build_optimizers(model: nn.Module, case: Case) -> list[Optimizer]:
    """Split the parameters as the case says; sparse ones and those that Muon doesn't take get their own optimizer."""
    factory = {**OPTIMIZERS, **FUSED}[case.optimizer]
    sparse = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse}
    parameters = [p for p in model.parameters() if p not in sparse]
    found: list[Optimizer] = []
    if case.optimizer == "muon":
        found.append(SGD([p for p in parameters if p.dim() != 2], lr=0.01, momentum=0.9))
        parameters = [p for p in parameters if p.dim() == 2]
    if case.parameters == "two groups":
        groups = [{"params": parameters[:1], "lr": 0.003}, {"params": parameters[1:], "weight_decay": 0.1}]
        found.insert(0, factory(groups))
    elif case.parameters == "two optimizers":
        half = len(parameters) // 2
        found += [factory(parameters[:half]), factory(parameters[half:])]
    else:
        found.insert(0, factory(parameters))
    if sparse:
        found.append(SparseAdam(list(sparse), lr=0.01))
    return found


def flatten(name: str, tree: Any, into: dict[str, Any]) -> None:
    """Put every leaf of a tree of dicts and lists into `into`, by its path."""
    if isinstance(tree, dict):
        for part, item in tree.items():
            flatten(f"{name}.{part}", item, into)
    elif isinstance(tree, (list, tuple)):
        for index, item in enumerate(tree):
            flatten(f"{name}.{index}", item, into)
    else:
        into[name] = tree.clone() if isinstance(tree, Tensor) else tree


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names under which two states differ in any bit."""
    different = [name for name in one.keys() | other.keys() if (name in one) != (name in other)]
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = a.dtype == b.dtype and torch.equal(a, b)
        else:
            same = type(a) is type(b) and (a == b or callable(a))
        if not same:
            different.append(name)
    return sorted(different)


def nonfinite(state: dict[str, Any]) -> list[str]:
    """Return the names of tensors that hold NaN or Inf."""
    return sorted(
        name
        for name, item in state.items()
        if isinstance(item, Tensor) and item.is_floating_point() and not torch.isfinite(item).all()
    )
