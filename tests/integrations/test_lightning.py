"""The Lightning callback: a run with a bad step equals the run without that step, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from guard.worlds import differences, nonfinite
from stabletrain.integrations.lightning import GuardCallback

from .parts import batches, network, schedule, state


class Module(LightningModule):
    """As a user writes it; `training_step` doesn't go through the module's own `__call__`."""

    def __init__(self, norm: bool = True, fused: bool = False) -> None:
        super().__init__()
        self.network = network(norm)
        self.fused = fused

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.network(**batch)["loss"]
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


def fit(
    data: Sequence[Any], module: LightningModule, callback: GuardCallback | None, **settings: Any
) -> tuple[Trainer, dict[str, Any]]:
    torch.manual_seed(11)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [callback] if callback is not None else [],
            **settings,
        }
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return trainer, state(module, trainer.optimizers[0], schedulers[0] if schedulers else None, scaler)


def fp16() -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


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
        trainer, end = fit(data, module, guard, accumulate_grad_batches=accumulate, **PRECISIONS[precision]())
        assert guard.guard.stats.applied == 4
        ends.append(end)
        if len(ends) == 1:
            assert guard.guard.stats.reasons == {"loss": 1}
            assert trainer.callback_metrics["guard/rejected"] == 1 and trainer.callback_metrics["guard/applied"] == 4
    assert not nonfinite(ends[0])
    assert not differences(*ends)
