"""The Hugging Face callback: a run with a bad step equals the run without that step, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from guard.worlds import differences, nonfinite
from stabletrain.integrations.huggingface import GuardCallback

from .parts import SAMPLES, batches, network, schedule, state


class Samples(Dataset[Any]):
    """The samples of all batches, in order."""

    def __init__(self, data: list[dict[str, torch.Tensor]]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data) * SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index % SAMPLES] for name, values in self.data[index // SAMPLES].items()}


def train(
    folder: Path, data: Any, callback: GuardCallback | None, *, norm: bool = True, **settings: Any
) -> tuple[Trainer, dict[str, Any]]:
    arguments = TrainingArguments(
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
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(data),
        callbacks=[callback] if callback is not None else [],
        optimizers=(optimizer, schedule(optimizer)),
    )
    trainer.train()
    return trainer, state(model, optimizer, trainer.lr_scheduler)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("norm", [False, True])
def test_a_step_with_a_bad_batch_never_happened(norm: bool, accumulate: int, precision: str, tmp_path: Path) -> None:
    window = range(2 * accumulate, 3 * accumulate)
    ends = []
    for data in (batches(5 * accumulate, bad=[window[-1]]), batches(5 * accumulate, without=window)):
        callback = GuardCallback(max_norm=0.5)
        settings: dict[str, Any] = {"gradient_accumulation_steps": accumulate, "bf16": precision == "bf16"}
        trainer, end = train(tmp_path, data, callback, norm=norm, **settings)
        assert callback.guard is not None and callback.guard.stats.applied == 4
        if not ends:
            assert callback.guard.stats.reasons == {"loss": 1}
            logged = trainer.state.log_history
            assert [entry["guard_rejected"] for entry in logged if "loss" in entry] == [0, 0, 1, 1, 1]
        ends.append(end)
    assert not nonfinite(ends[0])
    assert not differences(*ends)
