"""Interactions: what is drawn and what isn't, the division, the generator, and somebody's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from stabletrain.data import HeldOut, Interactions, OrderedLoader, from_interaction_table, tastes
from stabletrain.data.interactions import TEST, TRAINING, VALIDATION, Lists, complement, divided
from stabletrain.errors import ConfigurationError

SETS = st.lists(st.sets(st.integers(0, 11)), min_size=1, max_size=5)


def lists_of(sets: list[set[int]]) -> Lists:
    pairs = [(row, value) for row, values in enumerate(sets) for value in values]
    rows, values = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return Lists.of(rows, values, len(sets))


# ------------------------------------------------------------------------------------------------------- what is drawn


@settings(max_examples=60, deadline=None)
@given(sets=SETS)
def test_the_complement_is_exact(sets: list[set[int]]) -> None:
    lists = lists_of(sets)
    rows = torch.arange(len(sets)).flip(0)
    found = complement(lists, rows, torch.arange(8).expand(len(sets), 8))
    for row, others in zip(rows.tolist(), found.tolist(), strict=True):
        assert others == [number for number in range(20) if number not in sets[row]][:8]


@settings(max_examples=40, deadline=None)
@given(sets=SETS, data=st.data())
def test_lists_are_padded_with_minus_one(sets: list[set[int]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(sets) - 1), min_size=1, max_size=4))
    padded = lists_of(sets).padded(torch.tensor(rows))
    assert padded.shape[1] == max(len(sets[row]) for row in rows)
    for row, values in zip(rows, padded.tolist(), strict=True):
        assert values == sorted(sets[row]) + [-1] * (padded.shape[1] - len(sets[row]))


def test_negatives_are_drawn_evenly_and_never_from_what_the_user_chose() -> None:
    data = tastes(users=30, items=60, choices=8, negatives=4, seed=100).train
    everything = torch.arange(len(data))
    seen = set(data.items.tolist())
    counts = np.zeros(60)
    for seed in range(60):
        batch = data.gather(everything, seed=seed)
        for user, negatives in zip(batch["user"].tolist(), batch["negatives"].tolist(), strict=True):
            assert not set(negatives) & set(data.items[data.users == user].tolist())
            if user == 7:
                np.add.at(counts, negatives, 1)
    others = sorted(seen - set(data.items[data.users == 7].tolist()))
    assert counts.sum() == counts[others].sum() > 500
    assert chisquare(counts[others]).pvalue > 1e-4


def test_what_is_drawn_follows_from_seed_and_position_alone() -> None:
    data = tastes(users=30, items=60, choices=8, negatives=2, seed=100).train
    whole = data.gather(torch.arange(50), seed=5)["negatives"]
    assert torch.equal(data.gather(torch.tensor([40, 3, 7]), seed=5)["negatives"], whole[[40, 3, 7]])
    assert not torch.equal(data.gather(torch.arange(50), seed=6)["negatives"], whole)


def test_a_user_who_chose_everything_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"user number 1 .* chose each of the 2 items"):
        Interactions(torch.tensor([0, 1, 1]), torch.tensor([4, 4, 9]), torch.ones(3))
    with pytest.raises(ConfigurationError, match="negatives is 0"):
        Interactions(torch.tensor([0, 1]), torch.tensor([4, 9]), torch.ones(2), negatives=0)


# -------------------------------------------------------------------------------------------------------- the division


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1),
    cold=st.sets(st.integers(0, 9), max_size=3),
    validation=st.sampled_from([0.0, 0.15, 0.4]),
    test=st.sampled_from([0.0, 0.15, 0.5]),
    timed=st.booleans(),
)
def test_each_user_is_divided_by_shares_and_by_time(
    pairs: set[tuple[int, int]], cold: set[int], validation: float, test: float, timed: bool
) -> None:
    users, items = np.array(sorted(pairs)).T
    time = np.random.default_rng(0).permutation(len(users)).astype(float) if timed else None
    parts = divided(
        users, items, validation=validation, test=test, seed=3, cold_items=np.array(sorted(cold)), time=time
    )
    is_cold = np.isin(items, sorted(cold))
    if validation + test > 0:
        assert not (parts[is_cold] == TRAINING).any()
    for user in np.unique(users):
        own = (users == user) & ~is_cold
        count = int(own.sum())
        for part, share in ((TEST, test), (VALIDATION, validation)):
            found = int((parts[own] == part).sum())
            assert found == 0 if count < 3 or share == 0 else 1 <= found <= share * count + 1
        if count >= 3:
            assert (parts[own] == TRAINING).any()
        if time is not None:
            assert (np.diff(parts[own][np.argsort(time[own])]) >= 0).all()


def test_what_is_held_out_is_nowhere_in_training() -> None:
    splits = tastes(users=60, items=50, choices=10, seed=100)
    train = set(zip(splits.train.users.tolist(), splits.train.items.tolist(), strict=True))
    parts = []
    for part in (splits.validation, splits.test):
        inputs, targets = part.gather(torch.arange(len(part)))
        held_out = {
            (user, item)
            for user, row in zip(inputs["user"].tolist(), targets["held_out"].tolist(), strict=True)
            for item in row
            if item >= 0
        }
        known = {
            (user, item)
            for user, row in zip(inputs["user"].tolist(), targets["known"].tolist(), strict=True)
            for item in row
            if item >= 0
        }
        assert held_out and not held_out & train and not held_out & known
        parts.append((held_out, known))
    users = set(splits.test.users.tolist())
    assert {pair for pair in train | parts[0][0] if pair[0] in users} == parts[1][1]
    # The graph: training interactions in both directions and nothing else.
    neighbours, starts = splits.tables["neighbours"], splits.tables["starts"]
    edges = [(node, other) for node in range(110) for other in neighbours[starts[node] : starts[node + 1]].tolist()]
    there = {(user, 60 + item) for user, item in train}
    assert sorted(edges) == sorted(there | {(item, user) for user, item in there})


def test_cold_items_are_those_that_training_has_rarely() -> None:
    for cold in (0, 5):
        splits = tastes(users=60, items=50, choices=10, cold=cold, seed=100)
        counts = splits.train.items.bincount(minlength=50)
        _, targets = splits.test.gather(torch.arange(len(splits.test)))
        there = targets["held_out"] >= 0
        assert torch.equal(targets["cold"][there], counts[targets["held_out"][there]] <= cold)
        assert targets["cold"].any() and not targets["cold"][~there].any()


def test_a_batch_of_users_is_the_same_however_it_is_read() -> None:
    part = tastes(users=20, items=30, choices=6, seed=100).test
    inputs, targets = part.gather(torch.tensor([3, 1]))
    by_sample = part.collate([part[3], part[1]])
    assert torch.equal(inputs["user"], by_sample[0]["user"])
    assert all(torch.equal(targets[name], by_sample[1][name]) for name in targets)
    assert isinstance(part, HeldOut) and len(next(iter(OrderedLoader(part, batch_size=7))).indices) == 7


# ------------------------------------------------------------------------------------------------------- the generator


def test_the_generator_follows_its_seed_and_its_features_tell_tastes() -> None:
    one, same, other = (tastes(users=60, items=80, seed=seed).fingerprint() for seed in (100, 100, 101))
    assert one == same != other
    splits = tastes(users=300, items=200, seed=100)
    for name, width in (("visual", 64), ("text", 32)):
        table = splits.tables[f"features_{name}"]
        assert table.shape == (200, width) and bool(torch.isfinite(table).all()) and float(table.abs().max()) <= 10
        # Items whose features are alike were chosen by the same users more often than by chance.
        chosen = torch.zeros(300, 200)
        chosen[splits.train.users, splits.train.items] = 1
        chosen = torch.nn.functional.normalize(chosen - chosen.mean(0), dim=0)
        looks = torch.nn.functional.normalize(table, dim=1)
        pairs = torch.triu_indices(200, 200, 1)
        together = (chosen.T @ chosen)[pairs[0], pairs[1]]
        alike = (looks @ looks.T)[pairs[0], pairs[1]]
        assert float(torch.corrcoef(torch.stack([together, alike]))[0, 1]) > 0.2
    new = splits.train.items.bincount(minlength=200) == 0
    assert 25 <= int(new.sum()) <= 40  # 30 are new


@pytest.mark.parametrize(
    "wrong", [{"users": 1}, {"items": True}, {"taste": -1.0}, {"new_items": 1.0}, {"cold": -1}, {"validation": 1.0}]
)
def test_what_the_generator_refuses_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="validation part" if "validation" in wrong else next(iter(wrong))):
        tastes(**wrong)


# ---------------------------------------------------------------------------------------------------------- own files


def write(folder: Path, rows: str, header: str = "user_id:token\titem_id:token\trating:float\ttimestamp:float") -> Path:
    path = folder / "chosen.inter"
    path.write_text("\n".join([header, *rows.split(";")]).replace(" ", "\t") + "\n")
    return path


ROWS = "anna x 5 4;anna y 1 1;anna z 4 3;anna x 2 2;ben w 3 1;ben z 3 2;ben y 2 3"
LOOKS = np.array([[1.0, 7.0], [2.0, 7.0], [4.0, 7.0], [0.0, 7.0], [9.0, 7.0]])  # of w, x, y, z, v


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    np.save(tmp_path / "looks.npy", LOOKS)
    np.savez(tmp_path / "words.npz", words=LOOKS[:, :1], other=LOOKS)
    (tmp_path / "items.txt").write_text("w\nx\ny\nz\nv\n")
    features = {"looks": tmp_path / "looks.npy", "words": tmp_path / "words.npz"}
    return {"path": write(tmp_path, ROWS), "features": features, "items_file": tmp_path / "items.txt"}


def test_a_table_and_its_features_are_read(files: dict[str, Any]) -> None:
    splits = from_interaction_table(**files, timestamp="timestamp", rating="rating", weighted=True)
    # Of a repeated pair the last row stays; each user's last one is for the test, the one before for validation.
    assert splits.facts == {"users": 2, "items": 5, "edges": 2, "features": {"looks": 2, "words": 1}}
    assert splits.train.users.tolist() == [0, 1] and splits.train.items.tolist() == [2, 0]
    assert splits.train.weights.tolist() == [1.0, 3.0]
    assert splits.validation[0][1]["held_out"].tolist() == [1] and splits.test[0][1]["held_out"].tolist() == [3]
    assert splits.test[1][1]["known"].tolist() == [0, 3]
    # Standardised by the items of the training part, 4.0 and 1.0; what doesn't change counts as 0.
    expected = (LOOKS - [2.5, 0.0]) / [1.5, 1.0] * [1.0, 0.0]
    np.testing.assert_allclose(splits.tables["features_looks"], expected, rtol=1e-6)
    assert any("repeat a user" in note for note in splits.notes) and any("don't change" in n for n in splits.notes)
    assert any("1 of 5 items were chosen by nobody" in note for note in splits.notes)


def test_rows_may_be_numbers_and_low_ratings_left_out(tmp_path: Path) -> None:
    np.save(tmp_path / "looks.npy", LOOKS)
    path = tmp_path / "chosen.csv"
    path.write_text("who,what,stars\n" + "\n".join(f"{n % 3},{n % 5},{n % 4}" for n in range(15)) + "\n")
    options: dict[str, Any] = {"user": "who", "item": "what", "rating": "stars", "min_rating": 1}
    splits = from_interaction_table(path, {"looks": tmp_path / "looks.npy"}, **options, validation=0, test=0)
    assert len(splits.train) == 11 and splits.validation is None and splits.test is None
    assert splits.train.weights.tolist() == [1.0] * 11
    held = from_interaction_table(path, {"looks": tmp_path / "looks.npy"}, **options, new_items=0.2)
    assert len(held.train.seen) <= 4
    assert any(bool(part[0][1]["cold"].any()) for part in (held.validation, held.test))


@pytest.mark.parametrize(("rule", "filled"), [("zero", 0.0), ("median", 1.5)])
def test_bad_features_are_found_and_handled_by_rule(files: dict[str, Any], rule: str, filled: float) -> None:
    looks = LOOKS.copy()
    looks[2, 0] = np.nan
    looks[1, 1] = np.inf
    np.save(files["features"]["looks"], looks)
    with pytest.raises(ConfigurationError, match=r"looks in .* 2 numbers in 2 of 5 rows .* row 1, column 1"):
        from_interaction_table(**files)
    splits = from_interaction_table(**files, nonfinite=rule, validation=0, test=0)
    train = np.array([1.0, 2.0, filled, 0.0])
    expected = (filled - train.mean()) / train.std()
    assert splits.tables["features_looks"][2, 0] == pytest.approx(expected, rel=1e-5)
    assert any("2 numbers that were NaN or Inf" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": "user"}, "no column 'user'"),
        ({"features": {}}, "at least one modality"),
        ({"features": {"a.b": "looks.npy"}}, "a word of letters"),
        ({"features": {"looks": "nothing.npy"}}, "can't be read"),
        ({"features": {"looks": "items.txt"}}, "its name ends with '.txt'"),
        ({"features": {"looks": "words.npz"}}, "no array looks"),
        ({"features": {"looks": "short.npy"}}, "names 5 items, but the features have 2 rows"),
        ({"features": {"looks": "looks.npy", "more": "short.npy"}}, "have 2 rows"),
        ({"features": {"looks": "flat.npy"}}, "shape"),
        ({"features": {"looks": "words.npy"}}, "real numbers"),
        ({"features": {"looks": "constant.npy"}}, "nothing to learn from"),
        ({"items_file": None}, "without items_file, items are numbers"),
        ({"items_file": "twice.txt"}, "'w' more than once"),
        ({"items_file": "without.txt"}, "'z', for which there are no features"),
        ({"rating": "user_id"}, "not a number"),
        ({"weighted": True}, "need the name"),
        ({"rating": "rating", "min_rating": 9}, "no row has a rating"),
        ({"nonfinite": "medain"}, "Did you mean median"),
        ({"new_items": 1.0}, "new_items"),
        ({"limit": 0}, "limit"),
        ({"validation": 0.5, "test": 0.5}, "nothing to train on"),
    ],
)
def test_files_that_cannot_be_used_are_refused(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("short.npy", LOOKS[:2])
    np.save("flat.npy", LOOKS[:, 0])
    np.save("words.npy", np.array([["a"]] * 5))
    np.save("constant.npy", LOOKS[:, 1:])
    Path("twice.txt").write_text("w\nx\ny\nz\nw\n")
    Path("without.txt").write_text("w\nx\ny\nv\nu\n")
    with pytest.raises(ConfigurationError, match=message):
        from_interaction_table(**{**files, **change})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("anna x 5 4;ben  1 1", "line 3: the column 'item_id' is empty"),
        ("anna x 5 4;ben y 1 nan", "line 3: the column 'timestamp' holds 'nan'"),
        ("anna x 5 4;ben y 0 1", "line 3: the rating is 0.0"),
    ],
)
def test_bad_rows_are_named_with_their_line(files: dict[str, Any], tmp_path: Path, rows: str, message: str) -> None:
    write(tmp_path, rows)
    with pytest.raises(ConfigurationError, match=message):
        from_interaction_table(**files, timestamp="timestamp", rating="rating", weighted=True)
