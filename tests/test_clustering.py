"""Clustering of embeddings: pairs, files and what is kept of them, heads, their teacher, the measures, and bad runs."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import nn

from composed import checked
from stabletrain.assembly import assemble
from stabletrain.build import build
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import ArrayDataset, OrderedLoader, Pairs, Splits, digit_embeddings, embeddings_of_file
from stabletrain.data.pairs import nearest
from stabletrain.doctor.before.rate import examine_rate
from stabletrain.doctor.before.subject import Subject
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.errors import ConfigurationError
from stabletrain.guard import Policy, StepGuard
from stabletrain.initialisation import TruncatedNormal
from stabletrain.loss import TEMI, CrossEntropy
from stabletrain.model import EMATeacher
from stabletrain.model.clustering import ClusterModel, Heads
from stabletrain.optimizer import adamw
from stabletrain.randomness import key, uniform
from stabletrain.task import Clustering, agreement
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from trees import differences

WHOLE: dict[str, Any] = {"validation": 0.2, "test": 0.2, "neighbours": 3}


def points(count: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points around three centres [count, 4], and which centre that is."""
    labels = torch.arange(count) % 3
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator) + 4.0 * torch.eye(4)[labels], labels


def pairs(bad: int | None = None) -> Pairs:
    embeddings, labels = points(48)
    if bad is not None:
        embeddings[bad, 0] = math.nan
    neighbours = torch.arange(48)[:, None].add(torch.tensor([3, 6, 9])) % 48
    return Pairs(embeddings, points(48)[0], neighbours, labels, random=True)


def model(heads: int = 3, **options: Any) -> ClusterModel:
    torch.manual_seed(1)
    return ClusterModel(4, 3, heads=heads, hidden=5, **{"initial": 1.0, "momentum": 0.8, **options})


# ------------------------------------------------------------------------------------------------- the measures


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40))
def test_agreement_is_what_scikit_learn_and_scipy_say(found: list[tuple[int, int]]) -> None:
    clusters, classes = (np.array(part) for part in zip(*found, strict=True))
    table = np.zeros((4, 5))
    np.add.at(table, (clusters, classes), 1)
    measured = agreement(torch.from_numpy(table))
    assert measured["nmi"] == pytest.approx(normalized_mutual_info_score(classes, clusters), abs=1e-9)
    assert measured["ari"] == pytest.approx(adjusted_rand_score(classes, clusters), abs=1e-9)
    best = table[linear_sum_assignment(table, maximize=True)].sum() / len(found)
    assert measured["hungarian_accuracy"] == pytest.approx(best)
    shuffled = agreement(torch.from_numpy(table[[2, 0, 3, 1]]))
    assert shuffled == pytest.approx(measured)


class Told(nn.Module):
    """Answers what the inputs say: logits of each head for student and teacher."""

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits, logits


def test_the_head_with_the_lowest_loss_is_measured_and_one_that_is_not_finite_never() -> None:
    labels = torch.arange(12) % 3
    sure, unsure = 5.0 * torch.eye(3)[labels], 0.01 * torch.eye(3)[torch.zeros_like(labels)]
    logits = torch.stack([unsure, sure, torch.full_like(sure, math.nan)], 1)[:, None].expand(-1, 2, -1, -1)
    task = Clustering(TEMI(3, heads=3, leave_out_bad_heads=True), classes=3)
    for size in (12, 5):  # what batches tell adds up
        found = task.evaluate(Told(), OrderedLoader(ArrayDataset(logits, labels), batch_size=size))
        assert found["nmi"] == pytest.approx(1) and found["ari"] == found["hungarian_accuracy"] == 1
        assert (found["evenness"], found["clusters"]) == (pytest.approx(1), 3)
        assert found["heads_left_out"] == 1 and math.isfinite(found["loss"])
    other = task.evaluate(Told(), OrderedLoader(ArrayDataset(logits[:, :, [0, 0, 2]], labels), batch_size=5))
    assert other["clusters"] == 1 and other["hungarian_accuracy"] == pytest.approx(1 / 3)


def test_without_labels_the_loss_and_the_sizes_are_measured() -> None:
    views = 5.0 * torch.eye(3)[torch.arange(9) % 3][:, None].expand(-1, 2, -1)

    class Unlabelled(ArrayDataset):
        def gather(self, indices: torch.Tensor) -> Any:
            return super().gather(indices)[0]

    loader = OrderedLoader(Unlabelled(views, torch.zeros(9)), batch_size=4)
    found = Clustering(TEMI(3)).evaluate(Told(), loader)
    assert set(found) == {"loss", "evenness", "clusters", "heads_left_out"}
    assert found["clusters"] == 3
    with_classes = Clustering(TEMI(3), classes=4).evaluate(Told(), loader)
    assert (with_classes["nmi"], with_classes["ari"], with_classes["hungarian_accuracy"]) == (0, 0, 0)


def test_the_task_wants_a_loss_of_heads() -> None:
    for loss, message in ((CrossEntropy(), "doesn't go with it"), (nn.Identity(), "has no heads, .* loss=temi")):
        with pytest.raises(ConfigurationError, match=f"{type(loss).__name__}, which {message}"):
            Clustering(loss)
    with pytest.raises(ConfigurationError, match=r"classes of the task is -1"):
        Clustering(TEMI(3), classes=-1)


# ------------------------------------------------------------------------------------------------------ the pairs


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 6))
def test_neighbours_are_the_nearest_by_cosine_and_drawn_by_seed_and_index(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    pool, others = random.normal(size=(12, 3)), random.normal(size=(5, 3))
    unit, queries = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (pool, others))
    own = unit @ unit.T - 9 * np.eye(12)
    found = nearest(pool, count)
    assert np.array_equal(found, np.argsort(-own, 1)[:, :count])
    assert np.array_equal(nearest(pool, 1, others)[:, 0], (queries @ unit.T).argmax(1))
    numbers = torch.from_numpy(pool)
    data = Pairs(numbers, numbers, torch.from_numpy(found), random=True)
    indices = torch.from_numpy(random.permutation(12)[:7])
    chosen = (uniform(seed, indices, 1)[:, 0] * count).long()
    views = data.gather(indices, seed=seed)
    assert torch.equal(views[:, 0], numbers[indices])
    assert torch.equal(views[:, 1], numbers[torch.from_numpy(found)[indices, chosen]])
    assert torch.equal(views[2:3], data.gather(indices[2:3], seed=seed))
    drawn = torch.stack([data.gather(torch.arange(12), seed=key(seed, n))[:, 1] for n in range(60)])
    assert len(torch.unique(drawn[:, 0], dim=0)) == count


def test_a_part_finds_its_neighbours_in_the_training_part_and_never_itself() -> None:
    splits = digit_embeddings(components=8, neighbours=4)
    assert splits.train.random and not splits.test.random
    assert torch.equal(splits.test.pool, splits.train.embeddings)
    assert not (splits.train.neighbours == torch.arange(len(splits.train))[:, None]).any()
    views, labels = splits.test.gather(torch.arange(len(splits.test)))
    expected = torch.from_numpy(nearest(splits.train.embeddings.double().numpy(), 1, views[:, 0].double().numpy()))
    assert torch.equal(views[:, 1], splits.train.embeddings[expected[:, 0]])
    assert (splits.train.targets[expected[:, 0]] == labels).float().mean() > 0.9  # so there is something to learn
    assert splits.facts["num_classes"] == splits.facts["classes"] == 10
    assert digit_embeddings(components=8, neighbours=4, clusters=7).facts["num_classes"] == 7
    for options, message in (({"components": 65}, "components is 65"), ({"neighbours": 5000}, "from 1 to 1258")):
        with pytest.raises(ConfigurationError, match=message):
            digit_embeddings(**options)


# ------------------------------------------------------------------------------------------------------ the files


def contents(splits: Splits) -> list[torch.Tensor]:
    parts = (splits.train, splits.validation, splits.test)
    return [tensor for part in parts for tensor in (part.embeddings, part.neighbours, part.targets)]


def test_every_kind_of_file_gives_the_same(tmp_path: Path) -> None:
    values, labels = points()
    torch.save({"embeddings": values, "labels": labels, "note": "by me"}, tmp_path / "a.pt")
    save_file({"embeddings": values, "labels": labels}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", embeddings=values.numpy(), labels=np.array(["cat", "dog", "emu"])[labels.numpy()])
    torch.save(values, tmp_path / "b.pt")
    found = [embeddings_of_file(tmp_path / name, **WHOLE) for name in ("a.pt", "a.safetensors", "a.npz")]
    for other in found[1:]:
        assert all(map(torch.equal, contents(found[0]), contents(other)))
    assert found[2].classes == ("cat", "dog", "emu")
    train = found[0].train.embeddings.double()
    torch.testing.assert_close(train.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert float((train**2).mean()) == pytest.approx(1, abs=1e-6)
    alone = embeddings_of_file(tmp_path / "b.pt", clusters=3, **WHOLE)
    assert alone.train.targets is None and alone.facts == {"num_classes": 3, "classes": 0, "in_features": 4}
    assert "no labels under 'labels' (it has: embeddings)" in alone.notes[0]
    with pytest.raises(ConfigurationError, match=r"clusters is auto, .* data.clusters=10"):
        embeddings_of_file(tmp_path / "b.pt", **WHOLE)
    torch.save({"embeddings": values.bfloat16(), "labels": labels}, tmp_path / "half.pt")
    raw = embeddings_of_file(tmp_path / "half.pt", scale=False, **WHOLE).train.embeddings
    assert set(map(tuple, raw.tolist())) <= set(map(tuple, values.bfloat16().float().tolist()))


def test_nan_is_refused_dropped_or_zero(tmp_path: Path) -> None:
    values, labels = points()
    values[7, 2], values[31, 0] = math.nan, math.inf
    file = tmp_path / "holes.pt"
    torch.save({"embeddings": values, "labels": labels}, file)
    with pytest.raises(ConfigurationError, match=r"row 7 .* number 2 .* is nan; 2 of 60 samples"):
        embeddings_of_file(file, **WHOLE)
    dropped = embeddings_of_file(file, nonfinite="drop", **WHOLE)
    assert sum(map(len, (dropped.train, dropped.validation, dropped.test))) == 58
    assert "2 of 60 samples were dropped, for a NaN or Inf in the rows 7, 31." in dropped.notes[0]
    zero = embeddings_of_file(file, nonfinite="zero", **WHOLE)
    assert sum(map(len, (zero.train, zero.validation, zero.test))) == 60
    assert all(torch.isfinite(tensor).all() for splits in (dropped, zero) for tensor in contents(splits))
    with pytest.raises(ConfigurationError, match=r"nonfinite is 'dropp'.*Did you mean drop"):
        embeddings_of_file(file, nonfinite="dropp", **WHOLE)


@pytest.mark.parametrize(
    ("held", "options", "message"),
    [
        ({"embedings": torch.zeros(9, 2)}, {}, r"nothing under 'embeddings'.*Did you mean embedings"),
        ({"embeddings": torch.zeros(9)}, {}, r"shape \[9\] .* \[samples, features\] are needed"),
        ({"embeddings": torch.zeros(9, 2, 2)}, {}, r"shape \[9, 2, 2\].*Flatten them"),
        ({"embeddings": torch.zeros(9, 2, dtype=torch.complex64)}, {}, r"type complex64"),
        ({"embeddings": torch.zeros(9, 2), "labels": torch.zeros(8)}, {}, r"one label for each of 9 samples"),
        ({"embeddings": torch.zeros(9, 2), "labels": torch.arange(9)}, {}, r"has 1 sample"),
        ({"note": "nothing"}, {}, r"can't be read: it holds no tensor"),
        ({"embeddings": torch.ones(9, 2)}, {"clusters": 1}, r"clusters is 1; auto or a whole number from 2"),
        (
            {"embeddings": torch.ones(9, 2)},
            {"embed": "nowhere.f"},
            r"data.embed is 'nowhere.f', which can't be imported",
        ),
        ({"embeddings": torch.ones(9, 2)}, {"embed": "builtins.list"}, r"returned a list; a tensor"),
        ({"embeddings": torch.ones(9, 2)}, {"embed": "torch.sum"}, r"what torch.sum returned has the shape \[\]"),
    ],
)
def test_what_a_file_can_have_wrong(tmp_path: Path, held: Any, options: dict[str, Any], message: str) -> None:
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(ConfigurationError, match=message):
        embeddings_of_file(tmp_path / "a.pt", **{**WHOLE, **options})


@pytest.mark.parametrize("name", ["a.pt", "a.npz", "a.safetensors", "a.txt"])
def test_a_file_that_is_none_of_these_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not what the name says")
    with pytest.raises(ConfigurationError, match=r"can't be read|ends with '.txt'; allowed"):
        embeddings_of_file(tmp_path / name, **WHOLE)


CALLS: list[int] = []


def flat(images: torch.Tensor) -> torch.Tensor:
    CALLS.append(len(images))
    return images.flatten(1).bfloat16()


def test_what_was_computed_is_kept_until_the_file_or_a_setting_changes(tmp_path: Path) -> None:
    values, labels = points()
    file = tmp_path / "images.npz"
    np.savez(file, embeddings=values.view(60, 2, 2).numpy(), labels=labels.numpy())
    read = partial(embeddings_of_file, file, embed=f"{__name__}.flat", **WHOLE)
    CALLS.clear()
    first = read()
    kept = {name: tmp_path / f"images.npz.{name}.npz" for name in ("embeddings", "neighbours")}
    assert sorted(tmp_path.iterdir()) == sorted([file, *kept.values()]) and CALLS == [60]

    def spoil(name: str) -> None:
        """Change what is kept so that its use can be seen."""
        with np.load(kept[name]) as archive:
            arrays = dict(archive)
        place = "x" if name == "embeddings" else "test"
        arrays[place] = np.zeros_like(arrays[place])
        np.savez(kept[name], **arrays)

    again = read()
    assert CALLS == [60] and all(map(torch.equal, contents(first), contents(again)))
    assert len([note for note in again.notes if "were taken from" in note]) == 2
    spoil("neighbours")
    assert not read().test.neighbours.any()
    assert all(map(torch.equal, contents(first), contents(read(recompute=True)))) and CALLS == [60, 60]
    spoil("neighbours")
    assert read(seed=1).test.neighbours.any() and CALLS == [60, 60]  # embeddings don't depend on the seed
    for path in kept.values():
        path.write_bytes(path.read_bytes()[:99])  # torn
    assert all(map(torch.equal, contents(first), contents(read()))) and CALLS == [60] * 3
    np.savez(file, embeddings=2 * values.view(60, 2, 2).numpy() + 1, labels=labels.numpy())
    changed = read(cache=str(tmp_path / "elsewhere"))
    assert CALLS == [60] * 4 and len(list((tmp_path / "elsewhere").iterdir())) == 2
    assert all(map(torch.equal, contents(read()), contents(changed))) and CALLS == [60] * 5
    (tmp_path / "taken").write_text("")
    assert any("can't be kept" in note for note in read(cache=str(tmp_path / "taken")).notes)
    assert not any("kept" in note or "taken" in note for note in read(cache=False).notes)


# ------------------------------------------------------------------------------------------------------ the model


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), hidden=st.sampled_from([0, 3]), bad=st.sampled_from([None, 0, 1, 2, 3]))
def test_heads_are_small_networks_side_by_side_and_a_bad_one_leaves_the_others_alone(
    seed: int, hidden: int, bad: int | None
) -> None:
    torch.manual_seed(seed)
    heads = Heads(4, 2, heads=3, hidden=hidden, initial=1.0).double()
    inputs, weights = torch.randn(5, 2, 4).double(), torch.randn(5, 2, 3, 2).double()
    parameters = list(heads.parameters())
    bad = None if bad is None or bad >= len(parameters) else bad
    if bad is not None:  # of head 1
        parameters[bad].data.view(3, -1)[1, 0] = (math.nan, math.inf)[seed % 2]
    expected = []
    for head in (0, 2):
        last = [parameter.view(3, -1, *parameter.shape[1:])[head] for parameter in parameters[-2:]]
        values = inputs
        if heads.first is not None:
            first = [parameter.view(3, -1, *parameter.shape[1:])[head] for parameter in parameters[:2]]
            values = (values @ first[0].T + first[1]).clamp_min(0)
        expected.append(values @ last[0].flatten(1).T + last[1])
    logits = heads(inputs)
    torch.testing.assert_close(logits[:, :, [0, 2]], torch.stack(expected, 2))
    assert bool(torch.isnan(logits[:, :, 1]).all()) == (bad is not None)
    ours = torch.autograd.grad((logits[:, :, [0, 2]] * weights[:, :, [0, 2]]).sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad((torch.stack(expected, 2) * weights[:, :, [0, 2]]).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.view(3, -1)[[0, 2]], other.view(3, -1)[[0, 2]])
        assert not one.view(3, -1)[1].any()  # by nothing that head 1 answered


def test_the_teacher_follows_by_the_formula_and_takes_no_gradient() -> None:
    student = nn.Linear(3, 2).double()
    teacher = EMATeacher(student, momentum=0.9)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    TruncatedNormal(0.02)(teacher)  # writes no frozen parameter
    nn.init.constant_(student.weight, 3.0)
    teacher.follow(student)
    assert torch.equal(teacher.copy.weight, student.weight)  # whole, however it was initialised
    expected = student.weight.detach().clone()
    for value in (1.0, -2.0, 5.0):
        student.weight.data.fill_(value)
        teacher.follow(student)
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(teacher.copy.weight, nn.Parameter(expected, requires_grad=False))
    assert not teacher(torch.ones(1, 3).double()).requires_grad
    with pytest.raises(ConfigurationError, match=r"momentum is 1.0; a number from 0 to below 1"):
        EMATeacher(student, momentum=1.0)


def test_what_went_bad_in_the_student_is_put_back_and_never_followed() -> None:
    student = nn.Linear(3, 2)
    teacher = EMATeacher(student, momentum=0.5)
    teacher.follow(student)
    before = student.weight.detach().clone()
    student.weight.data[1, 2], student.weight.data[0, 1] = math.nan, -math.inf
    teacher.follow(student)
    assert torch.equal(student.weight, before) and torch.equal(teacher.copy.weight, before)
    assert int(teacher.mended) == 2 and int(EMATeacher(student).mended) == 0


@pytest.mark.parametrize("options", [{"heads": 0}, {"hidden": -1}, {"initial": 0.0}, {"initial": math.nan}])
def test_a_model_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"model.{next(iter(options))} is"):
        ClusterModel(4, 3, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_a_bad_head_is_left_out_and_where_all_are_bad_it_is_the_samples(value: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 2, 3, 4), torch.randn(5, 2, 3, 4)
    left, alone = TEMI(4, heads=3, leave_out_bad_heads=True), TEMI(4, heads=2)
    student[1, 0, 1, 2] = value
    student.requires_grad_()
    values, _ = left((student, teacher))
    torch.testing.assert_close(values, alone((student[:, :, [0, 2]], teacher[:, :, [0, 2]]))[0])
    assert torch.equal(left.marginal[1], torch.full((4,), 0.25))
    values.sum().backward()
    assert student.grad is not None and torch.isfinite(student.grad).all() and not student.grad[:, :, 1].any()
    per_head = left.eval().per_head((student, teacher))
    torch.testing.assert_close(
        per_head[:, [0, 2]].mean(1), alone.eval()((student[:, :, [0, 2]], teacher[:, :, [0, 2]]))[0]
    )
    assert per_head[:, 1].isnan().all()
    everywhere = student.detach().clone()
    everywhere[3, 0, :, 2] = value
    as_it_is = TEMI(4, heads=3).eval()
    as_it_is.load_state_dict(left.state_dict())
    values, whole = left((everywhere, teacher))[0], as_it_is((everywhere, teacher))[0]
    assert torch.equal(values.nan_to_num(), whole.nan_to_num()) and bool(values[3].isfinite()) == (value == 1e6)


# ------------------------------------------------------------------------------------------------------- the runs


def made(folder: Path | None = None, data: Pairs | None = None, **options: Any) -> Run:
    defaults: dict[str, Any] = {
        "epochs": 3, "batch_size": 16, "accumulate": 2, "ema": ExponentialMovingAverage, "device": "cpu",
        "optimizer": partial(adamw, lr=1e-2), "guard": Policy(on_rejection="salvage", max_quarantined=0.2),
        "tracking": partial(Tracker, progress="none", tensorboard=False),
        "checkpoint": partial(CheckpointStore, every_updates=2), "folder": folder,
    }  # fmt: skip
    task = Clustering(TEMI(3, heads=3, leave_out_bad_heads=True), classes=3)
    splits = Splits(data or pairs(), pairs(), pairs())
    return assemble(model(), splits, task=task, **{**defaults, **options})


def test_a_rejected_step_never_happened() -> None:
    data = pairs()
    bad = torch.full((8, 2, 4), math.nan)

    def trained(with_bad: bool) -> Any:
        network, loss = model(), TEMI(3, heads=3, leave_out_bad_heads=True)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        average = ExponentialMovingAverage(network)
        guard = StepGuard([network, loss], optimizer)
        for step in range(4):
            views = [data.gather(torch.arange(n, n + 8), seed=step)[0] for n in (0, 8)]
            for batch in ([views[0], bad], views) if with_bad and step in (0, 2) else [views]:
                for part in batch:  # the teacher and the marginal move before the bad part comes
                    value = loss(network(part))[0].mean()
                    value.backward()
                applied = guard.step(value).applied
                assert applied == (batch is views)
                if applied:
                    average.update(network)
        return [network.state_dict(), loss.state_dict(), optimizer.state_dict(), average.state_dict()]

    assert not differences(trained(True), trained(False))


def test_a_salvaged_step_is_the_step_without_the_bad_sample() -> None:
    run = made(data=pairs(bad=5), epochs=1, batch_size=48)
    [microbatches] = list(run.loader.epoch(0))
    summary = train(run)
    assert (summary.updates, summary.salvaged, list(run.quarantine.found)) == (1, 1, [5])
    network, loss = model(), TEMI(3, heads=3, leave_out_bad_heads=True)
    for microbatch in microbatches:
        loss(network(microbatch.data[0][microbatch.indices != 5]))
    assert torch.equal(run.objective.marginal, loss.marginal)
    assert not differences(run.model.teacher.state_dict(), network.teacher.state_dict())


class Killed(BaseException):
    """Takes the place of a kill -9."""


def test_killed_and_resumed_it_ends_at_the_same_bits(tmp_path: Path) -> None:
    def left(run: Run) -> Any:
        assert run.checkpoint is not None
        return {**run.checkpoint.latest(), "metrics": run.metrics}

    whole = made(tmp_path / "whole", pairs(bad=5))
    train(whole)
    for at in (4, 7):
        run = made(tmp_path / "killed", pairs(bad=5))
        note = run.tracker.step

        def step(record: Any, at: int = at, note: Any = note) -> None:
            note(record)
            if record["steps"] == at:
                raise Killed

        run.tracker.step = step  # type: ignore[method-assign]
        with pytest.raises(Killed):
            train(run)
    last = made(tmp_path / "killed", pairs(bad=5))
    train(last)
    assert not differences(left(last), left(whole))
    assert list(last.quarantine.found) == [5]


SHORT = ("experiment=clustering", "preset=stable", "seed=100", "epochs=4", "model.heads=4", "device=cpu", "threads=1",
         "tracking=none", "checkpoint=none")  # fmt: skip
ONE_HEAD = ("fault=large_output", "fault.at=30", "fault.times=30", "fault.module=student.heads.1")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    summary = train(build(checked(*SHORT), tmp_path_factory.mktemp("healthy")))
    assert (summary.rejected, summary.salvaged) == (0, 0)
    return summary.metrics["test"]


@pytest.mark.parametrize(
    ("fault", "salvaged", "named"),
    [
        (("fault=nan_input", "fault.at=0", "fault.samples=13"), None, 13),
        (("fault=nan_weight", "fault.at=30"), 0, 0),
        ((*ONE_HEAD, "precision=fp16"), 0, 0),
    ],
)
def test_a_run_survives_what_goes_wrong(
    tmp_path: Path, healthy: dict[str, float], fault: tuple[str, ...], salvaged: int | None, named: int
) -> None:
    run = build(checked(*SHORT, *fault), tmp_path)
    summary = train(run)
    assert summary.status == "completed" and all(summary.finite.values())
    assert len(summary.quarantined) == named
    assert summary.rejected == 0 and (salvaged is None or summary.salvaged == salvaged)
    assert summary.metrics["test"]["nmi"] > healthy["nmi"] - 0.1
    assert int(run.model.teacher.mended) == (1 if "fault=nan_weight" in fault else 0)


def test_parameters_divided_among_processes_are_refused(tmp_path: Path) -> None:
    run = build(checked(*SHORT, "parallel=fsdp2", "epochs=1"), tmp_path)
    with pytest.raises(ConfigurationError, match=r"EMA teacher .*parallel=fsdp2"):
        train(run)


def test_the_doctor_finds_the_rate_right_where_losses_are_negative(tmp_path: Path) -> None:
    config = checked(*SHORT)
    findings, found = examine_rate(Subject(build(config, tmp_path), config), seconds=5)
    assert found.trials and all(trial.stable for trial in found.trials if trial.rate <= found.configured)
    assert not findings
