"""The Hugging Face callback: a run with a bad step equals the run without that step, bit for bit."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from guard.worlds import differences, nonfinite
from integrations.loops import train_huggingface
from integrations.parts import batches, state
from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard import Policy
from stabletrain.integrations.huggingface import GuardCallback


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("norm", [False, True])
def test_a_step_with_a_bad_batch_never_happened(norm: bool, accumulate: int, precision: str, tmp_path: Path) -> None:
    window = range(2 * accumulate, 3 * accumulate)
    ends = []
    for data in (batches(5 * accumulate, bad=[window[-1]]), batches(5 * accumulate, without=window)):
        callback = GuardCallback(max_norm=0.5)
        settings: dict[str, Any] = {"gradient_accumulation_steps": accumulate, "bf16": precision == "bf16"}
        trainer, end = train_huggingface(tmp_path, data, callback, norm=norm, **settings)
        assert callback.guard is not None and callback.guard.stats.applied == 4
        if not ends:
            assert callback.guard.stats.reasons == {"loss": 1}
            logged = trainer.state.log_history
            assert [entry["guard_rejected"] for entry in logged if "loss" in entry] == [0, 0, 1, 1, 1]
        ends.append(end)
    assert not nonfinite(ends[0])
    assert not differences(*ends)


def test_without_the_guard_the_same_run_ends_in_nan(tmp_path: Path) -> None:
    _, end = train_huggingface(tmp_path, batches(5, bad=[2]), None)
    assert "model.layers.0.weight" in nonfinite(end)


def test_a_batch_that_only_ruins_running_statistics_never_happened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = GuardCallback()
    with caplog.at_level(logging.WARNING):
        trainer, end = train_huggingface(tmp_path, batches(5, large=[2]), callback)
    assert "step 2 was rejected for its buffer" in caplog.text
    assert trainer.state.global_step == 5 and trainer.state.log_history[-1]["guard_rejected_buffer"] == 1
    assert not differences(end, train_huggingface(tmp_path, batches(5, without=[2]), None)[1])


class Sentences(Dataset[Any]):
    """Sequences given as embeddings, of which one holds a NaN."""

    def __init__(self, steps: int, per_step: int, bad: int | None = None, without: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(steps, per_step, 5, 8, generator=generator)
        labels = torch.randint(12, (steps, per_step, 5), generator=generator)
        if bad is not None:
            inputs[bad, 1, 2, 3] = math.nan
        kept = [step for step in range(steps) if step != without]
        self.inputs, self.labels = inputs[kept].flatten(0, 1), labels[kept].flatten(0, 1)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self.inputs[index], "labels": self.labels[index]}


def test_a_language_model_of_transformers_with_the_trainers_own_optimizer(tmp_path: Path) -> None:
    ends = []
    for data in (Sentences(4, 4, bad=2), Sentences(4, 4, without=2)):
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            train_sampling_strategy="sequential",
        )
        torch.manual_seed(5)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        callback = GuardCallback(max_norm=1.0)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
        assert callback.guard is not None and callback.guard.stats.applied == 3
        ends.append((callback.guard.stats.reasons, state(model, trainer.optimizer)))
    assert ends[0][0] == {"loss": 1}
    assert not nonfinite(ends[0][1])
    assert not differences(ends[0][1], ends[1][1])


def test_clipping_by_the_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"max_grad_norm is 1\.0, but .* set max_grad_norm=0"):
        train_huggingface(tmp_path, batches(2), GuardCallback(), max_grad_norm=1.0)


def test_too_many_rejections_stop_the_training(tmp_path: Path) -> None:
    with pytest.raises(UnstableTraining, match="2 of the last 3 steps were rejected"):
        train_huggingface(tmp_path, batches(5, bad=[1, 2]), GuardCallback(policy=Policy(max_rejected=1)))


def test_counts_go_on_after_a_resumption(tmp_path: Path) -> None:
    callback = GuardCallback(max_norm=0.5, policy={"max_rejected": 3})
    saving = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}
    whole, end = train_huggingface(tmp_path, batches(5, bad=[1]), callback, **saving)
    trainer, resumed = train_huggingface(
        tmp_path, batches(5, bad=[1]), GuardCallback(max_norm=0.5), resume=True, **saving
    )
    [callback] = [one for one in trainer.callback_handler.callbacks if isinstance(one, GuardCallback)]
    assert callback.guard is not None and callback.policy.max_rejected == 3
    assert (callback.guard.stats.applied, callback.guard.stats.rejected) == (4, 1)
    assert not nonfinite(resumed)
    assert whole.state.global_step == trainer.state.global_step == 5
    del end["randomness"], resumed["randomness"]  # the trainer itself doesn't take that up where it was
    assert not differences(end, resumed)
