"""Continuing with other settings: what would make it another run is refused, the rest is said and really taken."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from composed import checked
from stabletrain import ConfigurationError, Policy, UnstableTraining
from stabletrain.assembly import assemble
from stabletrain.build import build
from stabletrain.data import ArrayDataset, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.optimizer import adam, adamw, sgd, with_changed
from stabletrain.precision import Precision
from stabletrain.schedule import Constant
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.trainer.changes import changes
from stabletrain.trainer.resume import resume, save

SMALL = ("experiment=tabular", "epochs=1", "batch_size=128", "tracking=none", "device=cpu", "precision=fp32")


def points() -> ArrayDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(96) % 3
    return ArrayDataset(torch.randn(96, 5, generator=generator) + targets[:, None], targets)


def make(folder: Path, *, batch_norm: bool = True, **options: Any) -> Run:
    """A run of 6 steps per epoch; its rate is constant, so that what was set is what is seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8) if batch_norm else nn.ReLU(), nn.Linear(8, 3))
    options = {"epochs": 1, "batch_size": 16, "tracking": partial(Tracker, progress="none", log_every=1), **options}
    options = {"optimizer": partial(adamw, lr=1e-2), "schedule": Constant, **options}
    return assemble(model, Splits(train=points(), validation=points()), folder=folder, **options)


def configured(folder: Path, *overrides: str) -> Run:
    keys = {override.partition("=")[0] for override in overrides}
    return build(checked(*(word for word in SMALL if word.partition("=")[0] not in keys), *overrides), folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a configured run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    train(configured(folder))
    return folder


def resumed(run: Run, source: Path) -> Run:
    """Let a run take up the checkpoint of another folder, without training on."""
    run.resume = str(source)
    resume(run)
    return run


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.hidden=[32]", r"model.hidden was \[64, 64\] and is \[32\]: the weights are those of this model"),
        ("model.dropout=0.5", r"model.dropout was 0.1 and is 0.5: the weights are those of this model"),
        ("data.validation=0.3", r"data.validation was 0.15 and is 0.3: the position in the epoch counts these samples"),
        ("seed=5", r"seed was 0 and is 5: it decides the order of the samples and every random draw"),
        ("batch_size=64", r"batch_size was 128 and is 64: the position in the epoch counts steps of this size"),
        (
            "accumulate=2",
            r"microbatch was 128 and is 64: the model's running statistics are of microbatches of this size",
        ),
        (
            "optimizer=sgd",
            r"optimizer class was 'torch.optim.adamw.AdamW' and is 'torch.optim.sgd.SGD'",
        ),
    ],
)
def test_what_would_be_another_run_is_refused(change: str, said: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=said) as refusal:
        resumed(configured(tmp_path, change), trained)
    advice = r"Set them back, or start a new run.*name=<other> init_from=.*step_000000003"
    assert re.search(advice, str(refusal.value)) is not None


def test_the_data_is_compared_besides_its_settings(tmp_path: Path) -> None:
    rows = [f"{i % 7},{i % 5},{'ab'[i % 7 > 3]}" for i in range(300)]
    (tmp_path / "moved").mkdir()
    for place in (tmp_path / "mine.csv", tmp_path / "moved" / "mine.csv"):
        place.write_text("\n".join(["height,weight,kind", *rows]) + "\n")
    options = ["data=csv", "data.target=kind"]
    train(configured(tmp_path / "run", *options, f"data.path={tmp_path / 'mine.csv'}"))
    moved = tmp_path / "moved" / "mine.csv"
    run = resumed(configured(tmp_path / "other", *options, f"data.path={moved}"), tmp_path / "run")
    assert run.notes[-1] == f"continuing with changed settings: data.path {tmp_path / 'mine.csv'} -> {moved}"
    moved.write_text(moved.read_text().replace("6,1,b", "6,2,b"))
    with pytest.raises(ConfigurationError, match=r"data was '\w{32}' and is '\w{32}': the position in the epoch"):
        resumed(configured(tmp_path / "third", *options, f"data.path={moved}"), tmp_path / "run")


def test_a_run_from_python_is_compared_by_what_it_is(tmp_path: Path) -> None:
    train(make(tmp_path / "run"))
    with pytest.raises(ConfigurationError, match="microbatch was 16 and is 8: the model's running"):
        resumed(make(tmp_path / "a", accumulate=2), tmp_path / "run")
    with pytest.raises(
        ConfigurationError, match=r"optimizer class was 'torch.optim.adamw.AdamW' and is 'torch.optim.adam.A"
    ):
        resumed(make(tmp_path / "b", optimizer=partial(adam, lr=1e-2)), tmp_path / "run")
    run = make(tmp_path / "c")
    half = [{"params": [parameter]} for parameter in run.model.parameters()]
    run = make(tmp_path / "d", optimizer=lambda parameters: torch.optim.AdamW(half, lr=1e-2))
    with pytest.raises(ConfigurationError, match="the optimizer had 2 parameter groups and has 6"):
        resumed(run, tmp_path / "run")


# --------------------------------------------------------------------------------------------------------- taken


def test_nothing_is_said_where_nothing_was_changed(trained: Path, tmp_path: Path) -> None:
    run = resumed(configured(tmp_path, "name=other", "debug=true", "resume=must"), trained)
    assert run.notes == []
    train(make(tmp_path / "python"))
    assert resumed(make(tmp_path / "other"), tmp_path / "python").notes == []


def test_harmless_settings_are_listed(trained: Path, tmp_path: Path) -> None:
    changes = {
        "epochs": ("1", "3"),
        "device": ("cpu", "auto"),
        "workers": ("0", "1"),
        "guard.max_rejected": ("10", "20"),
        "checkpoint.keep_last": ("2", "4"),
        "tracking.log_every": ("10", "1"),
        "optimizer.lr": ("0.003", "0.0005"),
    }
    run = resumed(configured(tmp_path, *(f"{key}={now}" for key, (_, now) in changes.items())), trained)
    [note] = [note for note in run.notes if note.startswith("continuing with changed settings: ")]
    for key, (before, now) in changes.items():
        assert re.search(rf"[ ;]{key} {before} -> {now}(;|$)", note) is not None, note
    assert run.optimizer.param_groups[0]["initial_lr"] == 0.0005


def test_accumulation_may_change_where_nothing_depends_on_it(tmp_path: Path) -> None:
    train(make(tmp_path / "run", batch_norm=False))
    run = resumed(make(tmp_path / "other", batch_norm=False, accumulate=2, epochs=2), tmp_path / "run")
    assert run.notes == ["continuing with changed settings: microbatch 16 -> 8"]
    assert train(run).updates == 12


def test_changed_hyperparameters_are_in_force_and_the_others_stay(tmp_path: Path) -> None:
    """Against a run whose optimizer was changed by hand after it was resumed."""
    before = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    now = {"lr": 5e-3, "betas": (0.8, 0.99), "weight_decay": 0.1}
    train(make(tmp_path / "a", optimizer=partial(adamw, **before)))
    train(make(tmp_path / "b", optimizer=partial(adamw, **before)))

    changed = make(tmp_path / "a", optimizer=partial(adamw, **now), epochs=2)
    train(changed)
    said = "continuing with changed settings: optimizer.lr 0.01 -> 0.005; optimizer.betas (0.9, 0.99) -> (0.8, 0.99)"
    assert changed.notes == [said]
    rates = [line.split(",")[6] for line in (tmp_path / "a" / "steps.csv").read_text().splitlines()[1:]]
    assert rates == ["0.01"] * 6 + ["0.005"] * 6

    by_hand = make(tmp_path / "b", optimizer=partial(adamw, **before), epochs=2)
    resume(by_hand)
    by_hand.resume = "never"  # done already
    for group in by_hand.optimizer.param_groups:
        group |= {"initial_lr": now["lr"], "betas": now["betas"]}
    train(by_hand)
    for name, tensor in by_hand.model.state_dict().items():
        assert torch.equal(changed.model.state_dict()[name], tensor), name


def test_a_change_holds_until_the_next_one(tmp_path: Path) -> None:
    train(make(tmp_path))
    train(make(tmp_path, epochs=2, optimizer=partial(adamw, lr=5e-3)))
    third = make(tmp_path, epochs=3, optimizer=partial(adamw, lr=5e-3))
    train(third)
    assert third.notes == []
    assert third.optimizer.param_groups[0]["lr"] == 5e-3
    fourth = make(tmp_path, epochs=4)
    train(fourth)
    assert fourth.notes == ["continuing with changed settings: optimizer.lr 0.005 -> 0.01"]
    assert fourth.optimizer.param_groups[0]["lr"] == 1e-2


def test_momentum_may_be_switched_on(tmp_path: Path) -> None:
    train(make(tmp_path, optimizer=partial(sgd, lr=1e-2, momentum=0.0)))
    run = make(tmp_path, optimizer=partial(sgd, lr=1e-2, momentum=0.9), epochs=2)
    assert train(run).updates == 12
    assert run.optimizer.state[run.model[0].weight]["momentum_buffer"] is not None


@pytest.mark.parametrize(("before", "now"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float16")])
def test_another_precision_is_taken(before: str, now: str, tmp_path: Path) -> None:
    train(make(tmp_path, precision=partial(Precision, before)))
    run = make(tmp_path, precision=partial(Precision, now, initial_scale=1024.0), epochs=2)
    assert train(run).updates == 12
    if run.precision.scaler is not None:
        assert run.precision.scaler.get_scale() == 1024.0  # it begins afresh


def test_an_average_that_is_new_begins_at_the_trained_weights(tmp_path: Path) -> None:
    train(make(tmp_path))
    average = partial(ExponentialMovingAverage, decay=0.9)
    run = resumed(make(tmp_path / "other", ema=average, epochs=2), tmp_path)
    assert run.ema is not None
    assert run.ema.updates == 0
    for name, parameter in run.model.named_parameters():
        assert torch.equal(run.ema.average[name], parameter), name
    assert train(make(tmp_path, ema=average, epochs=2)).updates == 12
    assert train(make(tmp_path, epochs=3)).updates == 18  # and without it again


def test_another_loss_begins_the_comparison_of_losses_anew(trained: Path, tmp_path: Path) -> None:
    run = configured(tmp_path / "rollback", "guard=rollback", "epochs=2")
    train(run)
    kept = resumed(configured(tmp_path / "same", "guard=rollback", "epochs=2"), tmp_path / "rollback")
    assert len(kept.guard.spikes.state_dict()["norms"]) > 0
    fresh = configured(tmp_path / "fresh", "guard=rollback", "epochs=3", "loss_mode=plain", "loss=focal")
    empty = fresh.guard.state_dict()["spikes"]
    resumed(fresh, tmp_path / "rollback")
    assert fresh.guard.state_dict()["spikes"] == empty != kept.guard.state_dict()["spikes"]
    assert "the losses before and after this change can't be compared" in fresh.notes[-1]
    assert fresh.guard.ledger.applied == 6


def test_a_safer_preset_goes_on_where_another_stopped(tmp_path: Path) -> None:
    """What people want after a run turned bad."""
    options = ("experiment=tabular", "batch_size=128", "device=cpu", "tracking=none")
    train(build(checked(*options, "preset=normal", "epochs=1"), tmp_path))
    run = build(checked(*options, "preset=safe", "epochs=2"), tmp_path)
    summary = train(run)
    assert (summary.status, summary.updates) == ("completed", 6)
    assert "preset normal -> safe" in run.notes[0]


def test_another_policy_is_in_force(tmp_path: Path) -> None:
    train(make(tmp_path, guard=Policy(window=50)))
    run = make(tmp_path, guard=Policy(window=4), epochs=2)
    resume(run)
    assert run.guard.ledger.policy.window == 4
    assert len(run.guard.ledger.state_dict()["recent"]) == 4


def test_what_a_rollback_returns_to_has_the_new_settings_too(tmp_path: Path) -> None:
    """A copy from before the change lies in a checkpoint that a signal asked for."""
    guard = Policy(on_rejection="rollback", max_incidents=0)
    train(make(tmp_path / "run", guard=guard))
    run = resumed(make(tmp_path / "saved", guard=guard), tmp_path / "run")
    save(run)
    assert run.checkpoint is not None
    assert run.checkpoint.wait() is not None
    changed = make(
        tmp_path / "changed",
        guard=guard,
        optimizer=partial(adamw, lr=5e-3),
        ema=partial(ExponentialMovingAverage, decay=0.9),
        epochs=2,
    )
    resumed(changed, tmp_path / "saved")
    assert changed.rollback is not None
    changed.rollback.go_back(changed, UnstableTraining("for once"))
    assert changed.optimizer.param_groups[0]["initial_lr"] == 5e-3
    assert changed.ema is not None
    for name, parameter in changed.model.named_parameters():
        assert torch.equal(changed.ema.average[name], parameter), name


NAMES = ("lr", "betas", "weight_decay", "eps")
HYPERPARAMETERS = st.fixed_dictionaries(
    {"lr": st.sampled_from([0.1, 0.2]), "betas": st.sampled_from([(0.9, 0.99), [0.9, 0.99], (0.8, 0.9)]),
     "weight_decay": st.sampled_from([0.0, 0.1]), "eps": st.sampled_from([1e-8, 1e-6])}
)  # fmt: skip


def plain(value: Any) -> Any:
    """A pair comes back from a config as a list."""
    return tuple(value) if isinstance(value, list) else value


@given(before=HYPERPARAMETERS, now=HYPERPARAMETERS, trained=HYPERPARAMETERS)
def test_what_was_changed_wins_and_nothing_else(
    before: dict[str, Any], now: dict[str, Any], trained: dict[str, Any]
) -> None:
    """Whatever training made of the settings, what the user left alone stays so."""
    saved = {"state": {}, "param_groups": [{**trained, "initial_lr": before["lr"], "params": [0, 1]}]}
    state, changed = with_changed(saved, [before], [now])
    differing = {name for name in NAMES if plain(before[name]) != plain(now[name])}
    assert set(changed) == differing
    [group] = state["param_groups"]
    assert all(group[name] == (now if name in differing else trained)[name] for name in NAMES)
    assert group["initial_lr"] == (now if "lr" in differing else before)["lr"]
    assert group["params"] == [0, 1]


GROUPS = st.dictionaries(
    st.sampled_from(["model", "seed", "guard", "name"]),
    st.recursive(
        st.one_of(st.integers(0, 2), st.sampled_from(["auto", None, float("nan")])),
        lambda inner: st.dictionaries(st.sampled_from(["a", "b", "lr"]), inner, max_size=3),
        max_leaves=6,
    ),
    min_size=1,
)


def leaves(tree: Any, place: str = "") -> dict[str, str]:
    """Every value of a tree as text, by its dotted key."""
    if not isinstance(tree, dict) or tree == {}:
        return {place: repr(tree)}
    return {key: text for name, item in tree.items() for key, text in leaves(item, f"{place}.{name}").items()}


def alike(one: str | None, other: str | None) -> bool:
    """A key that a later version added, with nothing in it, is no change."""
    return one == other or {one, other} in ({None, "None"}, {None, "{}"})


@given(before=GROUPS, after=GROUPS)
def test_exactly_what_differs_is_found(before: dict[str, Any], after: dict[str, Any]) -> None:
    one, other = leaves(before), leaves(after)
    differing = {key.removeprefix(".") for key in {**one, **other} if not alike(one.get(key), other.get(key))}
    found = changes(before, after)
    assert {change.key for change in found} == {key for key in differing if key.split(".")[0] != "name"}
    for change in found:
        assert (change.reason() is not None) == (change.key.split(".")[0] in ("model", "seed"))
