"""The Accelerate helper: a run with a bad step equals the run without that step, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from guard.worlds import differences, nonfinite
from integrations.loops import forget_accelerator, train_accelerate
from integrations.parts import batches, network
from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard import Policy
from stabletrain.integrations.accelerate import guarded


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
        guard, end = train_accelerate(data, norm=norm, accumulate=accumulate, precision=precision)
        assert guard.stats.applied == 4
        if not ends:
            assert guard.stats.reasons == {"loss": 1}
        ends.append(end)
    assert not nonfinite(ends[0])
    assert not differences(*ends)


def test_without_the_loss_it_judges_by_gradients() -> None:
    ends = []
    for data in (batches(5, bad=[2]), batches(5, without=[2])):
        guard, end = train_accelerate(data, norm=True, observe=False)
        ends.append(end)
        if len(ends) == 1:
            assert guard.stats.reasons == {"gradient": 1}
    assert not differences(*ends)


def test_a_batch_that_only_ruins_running_statistics_never_happened(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        guard, end = train_accelerate(batches(5, large=[2]), norm=True)
    assert guard.stats.reasons == {"buffer": 1} and "step 2 was rejected for its buffer" in caplog.text
    assert not differences(end, train_accelerate(batches(5, without=[2]), norm=True)[1])


def test_an_overflow_is_undone_and_the_scale_halved() -> None:
    guard, end = train_accelerate(batches(5), norm=True, precision="fp16", overflow=True)
    assert guard.stats.reasons == {"overflow": 1}
    assert end["scaler.scale"] == 128.0 and end["scheduler.last_epoch"] == 4
    assert int(end["model.layers.1.num_batches_tracked"]) == 4


def test_too_many_rejections_stop_the_loop() -> None:
    with pytest.raises(UnstableTraining, match="2 of the last 3 steps were rejected"):
        train_accelerate(batches(5, bad=[1, 2]), norm=True, policy=Policy(max_rejected=1))


def test_counts_are_saved_with_the_accelerators_state(tmp_path: Path) -> None:
    forget_accelerator()
    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    guard = guarded(accelerator, model, optimizer)
    for batch in batches(3, bad=[1]):
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    saved = guard.state_dict()
    accelerator.save_state(str(tmp_path))
    for batch in batches(2):
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    accelerator.load_state(str(tmp_path))
    assert guard.state_dict() == saved and guard.stats.steps == 3


def test_the_scale_is_right_when_it_is_saved(tmp_path: Path) -> None:
    forget_accelerator()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    guard = guarded(accelerator, model, optimizer)
    for batch in batches(2, bad=[1]):
        loss = model(**batch)["loss"]
        guard.observe(loss)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert guard.stats.reasons == {"loss": 1} and accelerator.scaler.get_scale() == 128.0
    accelerator.save_state(str(tmp_path))
    saved = torch.load(tmp_path / "scaler.pt")
    assert saved["scale"] == 256.0 and saved["_growth_tracker"] == 1


def test_an_optimizer_that_was_not_prepared_is_refused() -> None:
    model = network()
    with pytest.raises(ConfigurationError, match=r"the optimizer is a SGD; give the one that accelerator\.prepare"):
        guarded(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters()))
