"""The Hugging Face callback: a run with a bad step equals the run without that step, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from guard.worlds import differences, nonfinite
from integrations.loops import train_huggingface
from integrations.parts import batches
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
