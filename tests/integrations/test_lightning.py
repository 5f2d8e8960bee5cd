"""The Lightning callback: a run with a bad step equals the run without that step, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from guard.worlds import differences, nonfinite
from integrations.loops import Module, fp16, train_lightning
from integrations.parts import CLASSES, FEATURES, SAMPLES, InfiniteGradient, batches
from stabletrain.errors import UnstableTraining
from stabletrain.guard import Policy
from stabletrain.integrations.lightning import GuardCallback

PRECISIONS: dict[str, Any] = {
    "fp32": lambda: {},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": [fp16()]},
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("norm", [False, True])
def test_a_step_with_a_bad_batch_never_happened(norm: bool, accumulate: int, precision: str, fused: bool) -> None:
    window = range(2 * accumulate, 3 * accumulate)
    ends = []
    for data in (batches(5 * accumulate, bad=[window[-1]]), batches(5 * accumulate, without=window)):
        guard = GuardCallback(max_norm=0.5)
        module = Module(norm, fused)
        trainer, end = train_lightning(
            data, module, guard, accumulate_grad_batches=accumulate, **PRECISIONS[precision]()
        )
        assert guard.guard.stats.applied == 4
        ends.append(end)
        if len(ends) == 1:
            assert guard.guard.stats.reasons == {"loss": 1}
            assert trainer.callback_metrics["guard/rejected"] == 1 and trainer.callback_metrics["guard/applied"] == 4
    assert not nonfinite(ends[0])
    assert not differences(*ends)


def test_without_the_guard_the_same_run_ends_in_nan() -> None:
    _, end = train_lightning(batches(5, bad=[2]), Module(), None)
    assert any(name.startswith("model.network.layers.0") for name in nonfinite(end))


def test_a_batch_that_only_ruins_running_statistics_never_happened(caplog: pytest.LogCaptureFixture) -> None:
    guard = GuardCallback()
    with caplog.at_level(logging.WARNING):
        _, end = train_lightning(batches(5, large=[2]), Module(), guard)
    assert guard.guard.stats.reasons == {"buffer": 1}
    assert "step 2 was rejected for its buffer: the size of buffer network.layers.1.running_var went" in caplog.text
    assert not differences(end, train_lightning(batches(5, without=[2]), Module(), None)[1])


def test_lightning_may_clip_after_the_guard_has_looked() -> None:
    ends = [
        train_lightning(data, Module(), callback, gradient_clip_val=clip)[1]
        for data, callback, clip in (
            (batches(5, bad=[2]), GuardCallback(), 0.5),
            (batches(5, without=[2]), None, 0.5),
        )
    ]
    assert not differences(*ends)


class Overflowing(Module):
    """Its third batch overflows."""

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        return InfiniteGradient.apply(loss) if index == 2 else loss


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_is_undone_and_the_scale_halved(fused: bool) -> None:
    guard = GuardCallback(max_norm=0.5)
    trainer, end = train_lightning(batches(5), Overflowing(fused=fused), guard, plugins=[fp16()])
    assert guard.guard.stats.reasons == {"overflow": 1}
    assert end["scaler.scale"] == 128.0 and end["scheduler.last_epoch"] == 4
    assert int(end["model.network.layers.1.num_batches_tracked"]) == 4
    assert trainer.global_step == 5  # Lightning's own counter goes on


def test_too_many_rejections_stop_the_fit() -> None:
    guard = GuardCallback(policy=Policy(max_rejected=1))
    with pytest.raises(UnstableTraining, match="2 of the last 3 steps were rejected"):
        train_lightning(batches(5, bad=[1, 2]), Module(), guard)
    assert guard.guard.attachment is None and guard.guard.stats.applied == 1


def test_counts_go_on_after_a_resumption(tmp_path: Path) -> None:
    first, second = GuardCallback(), GuardCallback()
    data = batches(5, bad=[2])
    trainer, _ = train_lightning(data, Module(), first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    train_lightning(data, Module(), second, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert (first.guard.stats.applied, first.guard.stats.rejected) == (4, 1)
    assert (second.guard.stats.applied, second.guard.stats.rejected) == (8, 2)


class Adversaries(LightningModule):
    """Two networks that train in turn, by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(4)
        self.generator = torch.nn.Sequential(torch.nn.Linear(CLASSES, 8), torch.nn.BatchNorm1d(8),
                                             torch.nn.Linear(8, FEATURES))  # fmt: skip
        self.critic = torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        critic_optimizer, generator_optimizer = self.optimizers()
        noise = torch.nn.functional.one_hot(batch["labels"], CLASSES).float()
        made = self.generator(noise).detach()
        loss = (self.critic(made) - self.critic(batch["inputs"])).mean()
        critic_optimizer.zero_grad()
        self.manual_backward(loss)
        critic_optimizer.step()
        poison = batch.get("poison", torch.zeros(()))
        loss = -self.critic(self.generator(noise) + poison).mean()
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.critic, self.generator)]


def test_in_manual_optimization_each_optimizer_has_its_own_steps() -> None:
    data = batches(5)
    data[2]["poison"] = torch.full((SAMPLES, FEATURES), float("nan"))
    module, guard = Adversaries(), GuardCallback()
    train_lightning(data, module, guard)
    assert [one.stats.reasons for one in guard.guards] == [{}, {"gradient": 1}]
    assert [one.stats.applied for one in guard.guards] == [5, 4]
    assert not nonfinite(dict(module.state_dict()))
    assert int(module.critic[1].num_batches_tracked) == 5 * 2 + 4  # of the rejected step nothing is left
    data = batches(5, bad=[2])
    module, guard = Adversaries(), GuardCallback()
    train_lightning(data, module, guard)
    assert [one.stats.reasons for one in guard.guards] == [{"gradient": 1}, {}]
    assert not nonfinite(dict(module.state_dict()))
    assert int(module.critic[1].num_batches_tracked) == 4 * 2 + 5
