"""The Accelerate helper: a run with a bad step equals the run without that step, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader

from guard.worlds import differences, nonfinite
from stabletrain.guard import StepGuard
from stabletrain.integrations.accelerate import guarded

from .parts import batches, network, schedule, state


@pytest.fixture(autouse=True)
def _no_accelerator_before() -> Iterator[None]:
    """Accelerate keeps one state for the whole process."""
    for kept in (AcceleratorState, GradientState, PartialState):
        kept._reset_state()
    return


def train(
    data: Any, *, norm: bool, accumulate: int = 1, precision: str = "no", observe: bool = True, **settings: Any
) -> tuple[StepGuard, dict[str, Any]]:
    """Train as Accelerate's users write it."""
    torch.manual_seed(11)
    for kept in (AcceleratorState, GradientState, PartialState):
        kept._reset_state()
    scaled = precision == "fp16"
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision="no" if scaled else precision
    )
    if scaled:  # Accelerate has fp16 on GPUs only; with its scaler alone the rest of the path is the same
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    model = network(norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(data, batch_size=None), schedule(optimizer)
    )
    guard = guarded(accelerator, model, optimizer, max_norm=0.5, **settings)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            if observe:
                guard.observe(loss)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    guard.stats  # noqa: B018
    return guard, state(accelerator.unwrap_model(model), optimizer, scheduler, accelerator.scaler)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("norm", [False, True])
def test_a_step_with_a_bad_batch_never_happened(norm: bool, accumulate: int, precision: str) -> None:
    window = range(2 * accumulate, 3 * accumulate)
    ends = []
    for data in (
        batches(5 * accumulate, bad=[window[-1]]),
        batches(5 * accumulate, without=window),
    ):
        guard, end = train(data, norm=norm, accumulate=accumulate, precision=precision)
        assert guard.stats.applied == 4
        if not ends:
            assert guard.stats.reasons == {"loss": 1}
        ends.append(end)
    assert not nonfinite(ends[0])
    assert not differences(*ends)


def test_without_the_loss_it_judges_by_gradients() -> None:
    ends = []
    for data in (batches(5, bad=[2]), batches(5, without=[2])):
        guard, end = train(data, norm=True, observe=False)
        ends.append(end)
        if len(ends) == 1:
            assert guard.stats.reasons == {"gradient": 1}
    assert not differences(*ends)
