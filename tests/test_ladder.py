"""The ladder of precision: when it goes up and back, what it leaves behind, and that a run goes on from any rung."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

from composed import checked
from processes import run as run_program
from small import Normalised, points
from stabletrain import ConfigurationError, Policy
from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.fault import Fp16Overflow, NanGradient, NanInput, NanLoss, NanValidation, NanWeight
from stabletrain.incident import load_incident
from stabletrain.optimizer import adamw
from stabletrain.precision import Ladder, Plan, Precision
from stabletrain.schedule import Cosine
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.trainer.evaluation import evaluate_all
from stabletrain.trainer.replay import at_incident, replay
from trees import differences

QUICK = partial(Ladder, stable_epochs=1, watch_updates=8)  # six steps an epoch


def make(folder: Path | None, *, validated: bool = True, **options: Any) -> Run:
    data = points(96)
    options = {
        "epochs": 5,
        "batch_size": 16,
        "precision": QUICK,
        "tracking": partial(Tracker, progress="none", log_every=1, tensorboard=False),
        "optimizer": partial(adamw, lr=1e-2),
        "schedule": partial(Cosine, warmup_updates=3),
        "ema": ExponentialMovingAverage,
        **options,
    }
    return assemble(Normalised(), Splits(train=data, validation=data if validated else None), folder=folder, **options)


def falling(run: Run, losses: list[float] | None = None) -> Run:
    """Let the validation loss be what the test says; by default it falls from epoch to epoch."""
    evaluate = run.task.evaluate

    def evaluated(*arguments: Any) -> dict[str, float]:
        place = run.progress.epoch
        loss = 1.0 / (1 + place) if losses is None else losses[min(place, len(losses) - 1)]
        return {**evaluate(*arguments), "loss": loss}

    run.task.evaluate = evaluated  # type: ignore[method-assign]
    return run


def moves(run: Run) -> list[tuple[int, str, str, float | None]]:
    assert run.ladder is not None
    return [(move["update"], move["from"], move["to"], move["scale"]) for move in run.ladder.plan.moves]


UP, HOLD = ("float32", "float16", 1024.0), ("float16", "float16", 4096.0)
BACK = ("float16", "float32", None)


def test_a_healthy_run_climbs_and_says_so_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the numbers of the option itself: two epochs, a hundred updates, 2^10 and 2^12."""
    option = checked("precision=ladder")["precision"]
    precision = partial(Ladder, **{name: value for name, value in option.items() if not name.startswith("_")})
    track = partial(Tracker, progress="lines")
    run = falling(make(tmp_path, precision=precision, batch_size=4, epochs=7, tracking=track))
    steps = run.loader.steps_per_epoch
    train(run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["rejected"] == 0
    first, second = summary["precision_moves"]
    assert first == {
        **{"update": 2 * steps, "epoch": 1, "from": "float32", "to": "float16", "rung": 1},
        **{"reason": "2 stable epochs", "scale": 2.0**10},
    }
    assert second == {
        **{"update": 2 * steps + 100, "epoch": (2 * steps + 99) // steps, "from": "float16", "to": "float16"},
        **{"rung": 2, "reason": "100 updates without a rejected step", "scale": 2.0**12},
    }
    assert run.precision.scaler is not None and run.precision.scaler.get_growth_interval() == 1000
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("precision: ")]
    assert said == [
        f"precision: float32 -> float16 at loss scale 1024 (update {2 * steps}, after 2 stable epochs)",
        f"precision: float16 -> float16 at loss scale 4096 (update {2 * steps + 100}, after 100 updates without a "
        "rejected step)",
    ]
    events = EventAccumulator(str(tmp_path), size_guidance={TENSORS: 0})
    events.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("note/text_summary")]
    assert [text for text in texts if text.startswith("precision: ")] == said
    rungs = [event.value for event in events.Scalars("step/rung")]
    assert sorted(set(rungs)) == [*rungs[:1], 1.0, 2.0] and rungs == sorted(rungs)
    state = run.checkpoint.latest()  # type: ignore[union-attr]
    assert state is not None and state["ladder"]["moves"] == summary["precision_moves"]


@pytest.mark.parametrize("on_device", [False, True])
def test_up_to_the_switch_it_is_float32_bit_for_bit(tmp_path: Path, on_device: bool) -> None:
    def left(name: str, precision: Any) -> dict[str, Any]:
        store = partial(CheckpointStore, keep_last=20, every_updates=1)
        run = falling(make(tmp_path / name, precision=precision, fault=NanGradient(at=3), epochs=4, checkpoint=store))
        run.guard._keep_on_device = on_device
        train(run)
        assert run.checkpoint is not None
        found = run.checkpoint.load(tmp_path / name / "checkpoints" / "step_000000011")
        parts = ("model", "optimizer", "ema", "guard", "totals", "progress")
        return {part: found[part] for part in parts}, run  # type: ignore[return-value]

    (before, plain), (after, climbing) = left("plain", Precision), left("ladder", QUICK)  # type: ignore[misc]
    assert moves(climbing)[0] == (11, *UP)  # type: ignore[arg-type]  # after the second epoch: 11 updates, one rejected
    assert differences(before, after) == []
    assert differences(plain.model.state_dict(), climbing.model.state_dict()) != []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fault", "reason", "policy"),
    [
        (Fp16Overflow, "overflow", "skip"),
        (Fp16Overflow, "overflow", "rollback"),
        (NanGradient, "overflow", "salvage"),  # with a loss scale a NaN of the gradient alone is taken for one
        (NanLoss, "loss", "skip"),
        (NanLoss, "loss", "salvage"),
    ],
)
@pytest.mark.parametrize("on_device", [False, True])
def test_a_rejected_step_after_the_switch_leads_back_and_the_wait_doubles(
    tmp_path: Path, fault: Any, reason: str, policy: Any, on_device: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run = falling(make(tmp_path, fault=fault(at=8), guard=Policy(on_rejection=policy), epochs=7))
    run.guard._keep_on_device = on_device
    with caplog.at_level(logging.WARNING):
        summary = train(run)
    assert summary.status == "completed"
    # Step 8 is the third in float16. The epoch that it spoils and the two after it are float32; then eight updates.
    salvaged = summary.salvaged
    assert salvaged == (policy == "salvage" and reason == "loss")
    at = 9 if salvaged else 8
    assert moves(run) == [(6, *UP), (at, *BACK), (23 + salvaged, *UP), (31 + salvaged, *HOLD)]
    assert summary.precision_moves[1]["reason"] == f"a step was rejected for its {reason}"
    assert [line for line in caplog.messages if line.startswith("precision: ")] == [
        f"precision: float16 -> float32 (update {at}, after a step was rejected for its {reason}); the next try waits "
        "for 2 stable epochs"
    ]


def test_a_rollback_restores_the_state_and_not_the_ladder(tmp_path: Path) -> None:
    """Ruined weights in the watch, and once more when the format is held; copies were made in float16 as well."""

    class Twice(NanWeight):
        def _happens(self, steps: int) -> bool:
            return steps in (9, 38)

    policy = Policy(on_rejection="rollback", snapshot_every=1, rewarm=1)
    run = falling(make(tmp_path, fault=Twice(at=9), guard=policy, epochs=10))
    summary = train(run)
    assert summary.rolled_back == 2 and summary.status == "completed"
    assert [move["rung"] for move in summary.precision_moves] == [1, 0, 1, 2, 0]
    assert [move["reason"] for move in summary.precision_moves if move["rung"] == 0] == ["a rollback"] * 2
    assert run.ladder is not None and run.ladder.plan.wait == 4 and run.precision.scaler is None


@pytest.mark.parametrize("on_rejection", ["skip", "salvage"])
def test_a_salvaged_step_is_trouble_for_the_reduced_format_alone(tmp_path: Path, on_rejection: Any) -> None:
    policy = Policy(on_rejection=on_rejection, max_quarantined=0.5)
    calm = falling(make(tmp_path / "float32", fault=NanInput(at=2), guard=policy, epochs=2))
    train(calm)
    assert len(moves(calm)) == (1 if on_rejection == "salvage" else 0)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.0], [12]),
        ([4.0, 5.0, 4.5, 4.4], [24]),  # the first epoch has nothing to be compared with, the second one rises
        ([4.0, 4.0, 4.0, 4.0], []),
        ([math.nan, 3.0, 2.0, 1.0], [18]),
        ([4.0, 3.9, 3.8, math.nan], [12, 24]),
    ],
)
def test_only_a_falling_validation_loss_counts_as_stable(losses: list[float], expected: list[int]) -> None:
    ladder = partial(Ladder, stable_epochs=2, watch_updates=99)
    run = falling(make(None, precision=ladder), losses)
    train(run)
    assert [move[0] for move in moves(run)] == expected


def test_a_bad_validation_leads_back_from_the_reduced_format(tmp_path: Path) -> None:
    run = make(tmp_path, fault=NanValidation(at=7), epochs=3)
    falling(run)
    train(run)
    assert moves(run)[:2] == [(6, *UP), (12, *BACK)]


def test_without_validation_rejections_alone_decide_and_a_note_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, validated=False, fault=NanLoss(at=2), tracking=partial(Tracker, progress="lines"), epochs=4)
    train(run)
    assert moves(run)[0] == (11, *UP)
    assert capsys.readouterr().out.count("epoch 0 has no validation loss; it is stable if none of its steps was") == 1


def test_bfloat16_needs_no_scale() -> None:
    run = falling(make(None, precision=partial(QUICK, dtype="bfloat16")))
    seen: list[torch.dtype] = []
    train(run)
    assert moves(run) == [(6, "float32", "bfloat16", None), (14, "bfloat16", "bfloat16", None)]
    with run.precision.autocast():
        seen.append(run.model.layers[0](torch.ones(1, 5)).dtype)  # type: ignore[index]
    assert seen == [torch.bfloat16] and run.precision.scaler is None
    assert math.isfinite(evaluate_all(run, run.validation)["loss"])  # type: ignore[arg-type]


def test_it_does_not_go_up_for_no_step_at_all() -> None:
    run = falling(make(None, epochs=1))
    train(run)
    assert moves(run) == []


@settings(max_examples=60, deadline=None)
@given(
    wait=st.integers(1, 3),
    watch=st.integers(1, 4),
    factor=st.integers(1, 3),
    epochs=st.lists(st.tuples(st.lists(st.booleans(), max_size=4), st.integers(0, 4)), max_size=25),
)
def test_the_plan_keeps_to_its_rules(wait: int, watch: int, factor: int, epochs: list[tuple[list[bool], int]]) -> None:
    """Every move is one that the history so far asks for, and none is left out; a copy loaded midway goes the same."""
    plan = Plan(wait, watch, factor)
    rung, calm, held, backs, before = 0, 0, 0, 0, math.inf
    for steps, level in epochs:
        bad = False
        for applied in steps:
            other = Plan()
            other.watch_updates, other.wait_factor = watch, factor
            other.load_state_dict(json.loads(json.dumps(plan.state_dict())))
            plan = other
            was = plan.rung
            reason = plan.after_step(None if applied else "bad")
            bad = bad or not applied
            held = held + 1 if applied else held
            if rung == 1 and not applied:
                rung, calm, backs = 0, 0, backs + 1
            elif rung == 1 and held == watch:
                rung = 2
            assert (plan.rung == rung) and plan.wait == wait * factor**backs
            changed = (rung == 2 and held == watch and applied) or (rung == 0 and not applied and plan.rung != was)
            assert (reason is not None) == changed
        plan.after_epoch(float(level))
        calm = calm + 1 if rung == 0 and not bad and level < before else 0
        before = float(level)
        if rung == 0 and calm >= wait * factor**backs:
            rung, calm, held = 1, 0, 0
        assert plan.rung == rung


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float32"}, "precision.dtype is 'float32'; the ladder leads to bfloat16 or float16"),
        ({"stable_epochs": 0}, "precision.stable_epochs is 0; a whole number from 1 is allowed"),
        ({"watch_updates": 1.5}, "precision.watch_updates is 1.5"),
        ({"wait_factor": True}, "precision.wait_factor is True"),
        ({"raised_scale": 512.0}, "precision.raised_scale is 512.0; it must be a finite number of at least"),
        ({"initial_scale": 0.5}, "the first loss scale is 0.5"),
    ],
)
def test_what_can_not_be_climbed_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Ladder(**options)


# ------------------------------------------------------------------------------------------------------- killed

KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_ladder
test_ladder.be_killed(Path(sys.argv[2]))
"""
DEATHS = (5, 9, 14, 34)  # in float32, in the watch, back in float32, and when the format is held


def eventful(folder: Path, at: int | None) -> Run:
    """Up after six steps, back at step 10, up again after step 24, held from step 30 on; perhaps killed."""
    store = partial(CheckpointStore, every_updates=4, asynchronous=False)
    precision = partial(QUICK, watch_updates=6)
    run = falling(make(folder, epochs=6, fault=NanGradient(at=10), checkpoint=store, precision=precision))
    before = run.fault.before_step

    def before_step(steps: int, microbatches: Any) -> Any:
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(steps, microbatches)

    run.fault.before_step = before_step  # type: ignore[method-assign,assign]
    return run


def be_killed(folder: Path) -> None:
    torch.set_num_threads(1)
    eventful(folder.parent / "warm", None)  # imports, once, what the children need
    rungs = []
    for at in DEATHS:
        child = os.fork()
        if child == 0:
            train(eventful(folder, at))
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        state = CheckpointStore(folder).latest()
        assert state is not None
        rungs.append(state["ladder"]["rung"])
    print(json.dumps(rungs))


def test_killed_on_every_rung_it_comes_to_the_same_bits(tmp_path: Path) -> None:
    done = run_program([sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path / "killed"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 1, 0, 2]
    first, second = eventful(tmp_path / "killed", None), eventful(tmp_path / "calm", None)
    train(first)
    train(second)
    states = [run.checkpoint.latest() for run in (first, second)]  # type: ignore[union-attr]
    assert moves(second) == [(6, *UP), (10, *BACK), (23, *UP), (29, *HOLD)]
    assert differences(*states) == []


# -------------------------------------------------------------------------------------------- known one step later


def test_nothing_that_was_begun_before_a_move_is_left(tmp_path: Path) -> None:
    """With verdicts on the device the next step is under way when a move is made; it begins anew, as if never begun."""

    def left(**options: Any) -> dict[str, Any]:
        run = falling(make(None, precision=partial(QUICK, **options), epochs=3))
        run.guard._keep_on_device = True
        train(run)
        assert len(moves(run)) == (1 if "watch_updates" in options else 2)
        return {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()["state"]}

    never, same, higher = left(watch_updates=99), left(raised_scale=1024.0), left(raised_scale=2048.0)
    assert differences(never, same) == []
    for name, tensor in never["model"].items():
        torch.testing.assert_close(higher["model"][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_copy_made_in_the_reduced_format_does_not_bring_that_back() -> None:
    ladder = Ladder(stable_epochs=1)
    ladder.end_epoch(1.0, update=1, epoch=0)
    copy_of_it = ladder.state_dict()
    assert ladder.end_step("bad", update=2, epoch=1) is not None
    ladder.load_state_dict(copy_of_it)
    assert ladder.dtype == torch.float16
    assert ladder.rolled_back(update=1, epoch=1) is None
    assert (ladder.dtype, ladder.scaler, ladder.plan.wait) == (torch.float32, None, 2)


def test_a_run_goes_on_under_another_precision(tmp_path: Path) -> None:
    """From the ladder to float16 and back to a ladder, which begins in float32 as a new one does."""
    for epochs, precision, scaled in (
        (2, QUICK, True),
        (3, partial(Precision, "float16"), True),
        (4, partial(QUICK, stable_epochs=9), False),
    ):
        run = falling(make(tmp_path, epochs=epochs, precision=precision))
        train(run)
        assert (run.precision.scaler is not None) == scaled and run.progress.epoch == epochs


def test_an_incident_is_replayed_in_the_format_in_which_it_happened(tmp_path: Path) -> None:
    run = falling(make(tmp_path, fault=NanLoss(at=8), epochs=2))
    train(run)
    incident = load_incident(next((tmp_path / "incidents").iterdir()))
    fresh = make(None, fault=NanLoss(at=8), epochs=2)
    with at_incident(fresh, incident):
        assert fresh.precision.dtype == torch.float16
        assert fresh.precision.scaler is not None and fresh.guard.scaler is fresh.precision.scaler
    assert (fresh.precision.dtype, fresh.precision.scaler) == (torch.float32, None)
    assert replay(fresh, incident).reproduces(incident) == "yes"
