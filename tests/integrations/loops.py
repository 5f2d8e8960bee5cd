"""The three libraries' loops, as their users write them, with and without the guard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, Dataset

from integrations.parts import SAMPLES, InfiniteGradient, network, schedule, state
from stabletrain.guard import StepGuard
from stabletrain.integrations import huggingface, lightning
from stabletrain.integrations.accelerate import guarded


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


def train_lightning(
    data: Sequence[Any],
    module: LightningModule,
    callback: lightning.GuardCallback | None,
    ckpt_path: Path | None = None,
    **settings: Any,
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
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return trainer, state(module, trainer.optimizers[0], schedulers[0] if schedulers else None, scaler)


def fp16() -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


class Samples(Dataset[Any]):
    """The samples of all batches, in order."""

    def __init__(self, data: list[dict[str, torch.Tensor]]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data) * SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index % SAMPLES] for name, values in self.data[index // SAMPLES].items()}


def train_huggingface(
    folder: Path,
    data: Any,
    callback: huggingface.GuardCallback | None,
    *,
    norm: bool = True,
    resume: bool = False,
    **settings: Any,
) -> tuple[transformers.Trainer, dict[str, Any]]:
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": SAMPLES,
            "num_train_epochs": 1,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            **settings,
        }
    )
    model = network(norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(11)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(data),
        callbacks=[callback] if callback is not None else [],
        optimizers=(optimizer, schedule(optimizer)),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, state(model, optimizer, trainer.lr_scheduler)


def forget_accelerator() -> None:
    """Reset what Accelerate keeps for the whole process."""
    for kept in (AcceleratorState, GradientState, PartialState):
        kept._reset_state()


def train_accelerate(
    data: Any,
    *,
    norm: bool,
    accumulate: int = 1,
    precision: str = "no",
    observe: bool = True,
    overflow: bool = False,
    **settings: Any,
) -> tuple[StepGuard, dict[str, Any]]:
    """Train as Accelerate's users write it."""
    torch.manual_seed(11)
    forget_accelerator()
    scaled = precision == "fp16"
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision="no" if scaled else precision
    )
    if scaled:  # Accelerate has fp16 on GPUs only; with its scaler alone the rest of the path is the same
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    model = network(norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(Samples(data), batch_size=SAMPLES), schedule(optimizer)
    )
    guard = guarded(accelerator, model, optimizer, max_norm=0.5, **settings)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            if overflow and guard.stats.steps == 2:
                loss = InfiniteGradient.apply(loss)
            if observe:
                guard.observe(loss)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return guard, state(accelerator.unwrap_model(model), optimizer, scheduler, accelerator.scaler)
