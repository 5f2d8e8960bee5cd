"""Next items: padding, text, cold items, how a recommender is judged, histories from files, and runs with bad ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.sparse import coo_matrix
from scipy.stats import rankdata
from torch import nn

from composed import checked
from stabletrain.build import build
from stabletrain.data import (
    ArrayDataset,
    ItemHistories,
    Loader,
    OrderedLoader,
    collate_histories,
    item_sequences,
    stories,
    text_embeddings,
)
from stabletrain.errors import ConfigurationError
from stabletrain.loss import CrossEntropy
from stabletrain.model import SemanticRecommender
from stabletrain.precision import Precision
from stabletrain.task import NextItem
from stabletrain.trainer import train
from stabletrain.tree import tensors

ITEMS, FEATURES = 9, 4
SMALL: dict[str, Any] = {"users": 40, "items": 60, "topics": 6}


def samples_of(lengths: list[int], seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [
        (
            {
                "ids": torch.from_numpy(random.integers(ITEMS, size=length)),
                "text": torch.from_numpy(random.normal(size=(length, FEATURES))).float(),
            },
            torch.tensor(int(random.integers(ITEMS))),
        )
        for length in lengths
    ]


def recommender(**options: Any) -> SemanticRecommender:
    torch.manual_seed(1)
    model = SemanticRecommender(ITEMS, FEATURES, **{"width": 8, "dropout": 0.0, "id_dropout": 0.0, **options})
    with torch.no_grad():
        model.text_embeddings.normal_()
        model.id_embedding.weight.normal_()
    return model


# --------------------------------------------------------------------------------------------------- the collator


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_the_collator_pads_on_the_cpu_and_keeps_what_there_is(lengths: list[int], seed: int) -> None:
    samples = samples_of(lengths, seed)
    inputs, targets = collate_histories(samples)
    longest = max(1, *lengths)
    assert inputs["ids"].shape == inputs["mask"].shape == (len(lengths), longest)
    assert inputs["text"].shape == (len(lengths), longest, FEATURES)
    assert inputs["mask"].sum(1).tolist() == lengths
    assert targets.tolist() == [int(target) for _, target in samples]
    for row, (history, _) in enumerate(samples):
        real = inputs["mask"][row]
        assert torch.equal(inputs["ids"][row][real], history["ids"])
        assert torch.equal(inputs["text"][row][real], history["text"])
        assert (inputs["ids"][row][~real] == -1).all() and not inputs["text"][row][~real].any()
    assert all(tensor.device.type == "cpu" for tensor in tensors((inputs, targets)))


def test_the_collator_refuses_items_without_a_text() -> None:
    with pytest.raises(ConfigurationError, match="2 items, but 1 text"):
        collate_histories([({"ids": torch.tensor([1, 2]), "text": torch.zeros(1, 3)}, torch.tensor(0))])


class Own:
    """A data set of somebody's own that names the collator."""

    collate = staticmethod(collate_histories)

    def __init__(self, lengths: list[int]) -> None:
        self.samples = samples_of(lengths)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@pytest.mark.parametrize("dataset", [Own([3, 1, 0, 5]), stories(**SMALL).train], ids=["own", "stories"])
def test_batches_go_to_the_device_as_a_whole(dataset: Any) -> None:
    for device in ("cpu", "meta"):  # a device that every machine has, and on which nothing can be forgotten
        for [microbatch] in Loader(dataset, batch_size=2, device=device, shuffle=False).epoch(0):
            found = list(tensors(microbatch.data))
            assert len(found) == 4 and {tensor.device.type for tensor in found} == {device}
            expected = collate_histories([dataset[index] for index in microbatch.indices.tolist()])
            assert [tensor.shape for tensor in tensors(expected)] == [tensor.shape for tensor in found]
            if device == "cpu":
                assert all(map(torch.equal, tensors(expected), found))


# ------------------------------------------------------------------------------------------------------ the model


def item_vectors(model: SemanticRecommender, embeddings: np.ndarray[Any, Any], text: np.ndarray[Any, Any]) -> Any:
    """The formula of the fusion head, in float64."""

    def weights(layer: nn.Module) -> tuple[Any, Any]:
        return layer.weight.detach().numpy(), layer.bias.detach().numpy()  # type: ignore[union-attr, operator]

    def normalised(values: Any, layer: nn.Module) -> Any:
        gain, bias = weights(layer)
        return (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + 1e-5) * gain + bias

    erf = np.vectorize(math.erf, otypes=[np.float64])
    matrix, bias = weights(model.text_projection)
    projected = text @ matrix.T + bias
    first, norm, _, second = model.fusion
    matrix, bias = weights(first)
    hidden = normalised(np.concatenate([embeddings, projected], -1) @ matrix.T + bias, norm)
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    matrix, bias = weights(second)
    return normalised(embeddings + projected + hidden @ matrix.T + bias, model.item_norm)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), extra=st.integers(0, 3), seed=st.integers(0, 9))
def test_logits_are_the_formula_whatever_the_padding_holds(lengths: list[int], extra: int, seed: int) -> None:
    model = recommender().double().eval()
    model.known_items[2] = False
    samples = samples_of(lengths, seed)
    inputs, _ = collate_histories([*samples, *samples_of([max(lengths) + extra], seed)])
    inputs["text"] = inputs["text"].double().masked_fill(~inputs["mask"].unsqueeze(2), math.nan)
    inputs["ids"] = inputs["ids"].masked_fill(~inputs["mask"], 7 * ITEMS)
    logits = model(inputs)
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)

    embeddings = model.id_embedding.weight.detach().numpy() * model.known_items.numpy()[:, None]
    items = item_vectors(model, embeddings, model.text_embeddings.numpy())
    for row, (history, _) in enumerate(samples):
        ids, text = history["ids"].numpy(), history["text"].double().numpy()
        own = torch.from_numpy(item_vectors(model, embeddings[ids], text).reshape(-1, 8))
        hidden = torch.cat([model.start.weight, own])[None]
        for block in model.blocks:
            hidden = block(hidden, torch.ones(1, len(ids) + 1, len(ids) + 1, dtype=torch.bool).tril())
        state = model.final_norm(hidden[0, -1]).detach()
        np.testing.assert_allclose(logits[row].detach(), items @ state.numpy() / math.sqrt(8), rtol=1e-9, atol=1e-9)


def test_one_bad_history_is_its_own_affair() -> None:
    model = recommender()
    inputs, _ = collate_histories(samples_of([4, 3, 5]))
    healthy = model(inputs)
    inputs["text"][1] = math.nan
    bad = model(inputs)
    assert torch.equal(bad[[0, 2]], healthy[[0, 2]]) and bad[1].isnan().all()


def test_what_the_weights_are_at_first() -> None:
    torch.manual_seed(0)
    model = SemanticRecommender(3000, 40, width=24)
    embedding, projection = model.id_embedding.weight.detach(), model.text_projection.weight.detach()
    assert float(embedding.std()) == pytest.approx(0.02, rel=0.02) and abs(float(embedding.mean())) < 1e-3
    bound = math.sqrt(6 / (40 + 24))  # Glorot and Bengio, 2010
    assert 0.9 * bound < float(projection.abs().max()) <= bound
    assert float(projection.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not model.text_projection.bias.any() and not model.text_embeddings.requires_grad


def test_items_that_training_never_sees_are_known_by_their_text_and_not_pushed_down() -> None:
    model = recommender()
    model.known_items[[3, 5]] = False
    inputs, targets = collate_histories(samples_of([4, 3]))
    inputs["ids"][0, 0] = 3
    before = model.eval()(inputs)
    text_gradient = model.train()(inputs)
    assert torch.equal(text_gradient[:, 3], text_gradient.amin(1)) and torch.equal(
        text_gradient[:, 3], text_gradient[:, 5]
    )
    CrossEntropy()(text_gradient, targets.masked_fill((targets == 3) | (targets == 5), 0))[0].sum().backward()
    assert not model.id_embedding.weight.grad[[3, 5]].any() and model.id_embedding.weight.grad[4].any()
    with torch.no_grad():
        model.id_embedding.weight[3] += 1.0
        assert torch.equal(model.eval()(inputs), before)
        model.text_embeddings[3] += 1.0
    after = model(inputs)
    assert not torch.equal(after[:, 3], before[:, 3]) and torch.equal(after[:, 4], before[:, 4])


def test_training_takes_embeddings_away_and_evaluation_does_not() -> None:
    model = recommender(id_dropout=0.5)
    inputs, _ = collate_histories(samples_of([4, 3]))
    assert not torch.equal(model.train()(inputs), model(inputs))
    assert torch.equal(model.eval()(inputs), model(inputs))
    with torch.no_grad():
        model.id_embedding.weight.zero_()
    assert torch.equal(model.train()(inputs), model(inputs))  # nothing else is drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6}, "multiple of twice the heads"),
        ({"id_dropout": 1.0}, "id_dropout is 1.0"),
        ({"layers": 0}, "layers is 0"),
    ],
)
def test_sizes_that_make_no_model_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SemanticRecommender(5, 3, **options)
    with pytest.raises(ConfigurationError, match="3 features, but the model was built for 4"):
        recommender()({**collate_histories(samples_of([2]))[0], "text": torch.zeros(1, 2, 3)})


# ------------------------------------------------------------------------------------------------------- the task


@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.integers(1, 12), items=st.integers(2, 15), k=st.integers(1, 5))
def test_ranks_are_those_of_a_library_and_add_up(data: st.DataObject, count: int, items: int, k: int) -> None:
    seed = data.draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, size=(count, items)).astype(np.float64)  # many ties
    targets = random.integers(items, size=count)
    counts = random.integers(0, 2, size=items)
    ranks = np.array([rankdata(-row)[target] for row, target in zip(scores, targets, strict=True)])
    task = NextItem(CrossEntropy(), k=k, class_counts=counts.tolist())
    loader = OrderedLoader(ArrayDataset(torch.from_numpy(scores), torch.from_numpy(targets)), batch_size=5)
    found = task.evaluate(nn.Identity(), loader)
    assert found[f"hit_rate_at_{k}"] == pytest.approx((ranks <= k).mean())
    assert found["mrr"] == pytest.approx((1 / ranks).mean())
    cold = counts[targets] == 0
    assert (f"cold_hit_rate_at_{k}" in found) == ("cold_mrr" in found) == bool(cold.any())
    if cold.any():
        assert found[f"cold_hit_rate_at_{k}"] == pytest.approx((ranks[cold] <= k).mean())
        assert found["cold_mrr"] == pytest.approx((1 / ranks[cold]).mean())
    parts: list[torch.Tensor] = []
    task.evaluate(nn.Identity(), loader, lambda own: parts.append(own) or own)  # type: ignore[func-returns-value]
    assert task.evaluate(nn.Identity(), iter(()), lambda own: own + parts.pop(0)) == found


def test_what_knows_nothing_is_in_the_middle_and_what_is_nan_is_not_first() -> None:
    def mrr(logits: torch.Tensor) -> float:
        data = OrderedLoader(ArrayDataset(logits, torch.tensor([0, 3])), batch_size=2)
        return NextItem(CrossEntropy()).evaluate(nn.Identity(), data)["mrr"]

    assert mrr(torch.ones(2, 9)) == pytest.approx(1 / 5)
    assert math.isnan(mrr(torch.ones(2, 9).index_fill(1, torch.tensor([4]), math.nan)))
    with pytest.raises(ConfigurationError, match="k of the task is 0"):
        NextItem(CrossEntropy(), k=0)
    with pytest.raises(ConfigurationError, match="scores 2 items"):
        NextItem(CrossEntropy(), class_counts=[1, 2, 3]).evaluate(
            nn.Identity(), OrderedLoader(ArrayDataset(torch.ones(1, 2), torch.tensor([0])), batch_size=1)
        )


# ------------------------------------------------------------------------------------------------------- the data


def test_the_generator_is_a_function_of_its_seed_and_its_titles_tell_topics() -> None:
    one, same, other = (stories(**SMALL, seed=seed) for seed in (5, 5, 6))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint() and one.classes == same.classes
    known, text = one.tables["known_items"], one.tables["text_embeddings"]
    assert (~known).sum() >= 4  # 6 are new; others may never be drawn
    assert known[one.train.targets].all() and known[one.train[0][0]["ids"]].all()
    spans = [set(part.starts.tolist()) for part in (one.train, one.validation, one.test)]
    assert not (spans[0] & spans[2] or spans[0] & spans[1] or spans[1] & spans[2])  # no user is in two parts
    topics = torch.arange(60) // 10
    nearest = (nn.functional.normalize(text, dim=1) @ nn.functional.normalize(text, dim=1).T).fill_diagonal_(-2)
    assert (topics[nearest.argmax(1)] == topics).float().mean() > 0.7  # by chance 0.15


@pytest.mark.parametrize(
    "wrong", [{"items": 61}, {"users": 5}, {"follow": 0.6, "stay": 0.5}, {"cold": 1.0}, {"parts": 2.5}, {"skew": -1}]
)
def test_stories_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        stories(**{**SMALL, **wrong})


def test_histories_are_what_came_before() -> None:
    sequence = torch.tensor([4, 1, 3, 2, 0])
    data = ItemHistories(sequence, torch.zeros(4, dtype=torch.int64), torch.arange(1, 5), torch.eye(5), max_length=3)
    found = [(history["ids"].tolist(), int(target)) for history, target in (data[index] for index in range(4))]
    assert found == [([4], 1), ([4, 1], 3), ([4, 1, 3], 2), ([1, 3, 2], 0)]
    assert torch.equal(data[2][0]["text"], torch.eye(5)[[4, 1, 3]])


def test_text_embeddings() -> None:
    texts = [f"{kind} {animal}" for kind in ("red", "blue", "green") for animal in ("fox", "whale", "owl")]
    made = text_embeddings(texts, 5, seed=3)
    np.testing.assert_array_equal(made, text_embeddings(texts, 5, seed=3))
    used = made.std(0) > 0
    np.testing.assert_allclose(made.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(made[:, used].std(0), 1)
    assert used.sum() >= 4
    twins = text_embeddings(["same words", "same words", "other ones"], 6)
    assert np.isfinite(twins).all() and np.allclose(twins[0], twins[1]) and not twins[:, 2:].any()
    for wrong, message in ((["a", "!"], "0 of 2 texts have a word"), (["red fox", ""], "1 of 2 texts")):
        with pytest.raises(ConfigurationError, match=message):
            text_embeddings(wrong)
    with pytest.raises(ConfigurationError, match="0 features"):
        text_embeddings(texts, 0)


# ---------------------------------------------------------------------------------------------------- own files


READS = [("ann", name, time) for time, name in enumerate("abcde")] + [("bob", n, 9 - t) for t, n in enumerate("dcbae")]


def written(folder: Path, rows: list[tuple[Any, ...]], header: str = "user,item,time", name: str = "reads.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_the_last_items_are_held_out_in_the_order_of_the_column(tmp_path: Path) -> None:
    path = written(
        tmp_path, [(user, item, time, f"word {item}{item}") for user, item, time in READS], "user,item,time,text"
    )
    splits = item_sequences(path, order="time", text_features=3)

    def told(part: Any) -> list[tuple[str, str]]:
        names = splits.classes
        return [("".join(names[i] for i in history["ids"]), names[target]) for history, target in part]

    bob = "eabcd"  # his times fall
    assert told(splits.test) == [("abcd", "e"), (bob[:4], bob[4])]
    assert told(splits.validation) == [("abc", "d"), (bob[:3], bob[3])]
    assert told(splits.train) == [("a", "b"), ("ab", "c"), (bob[:1], bob[1]), (bob[:2], bob[2])]
    assert splits.tables["known_items"].tolist() == [True, True, True, False, True]
    dates = [(user, item, f"2026-11-{10 + time}", f"word {item}{item}") for user, item, time in READS]
    again = item_sequences(written(tmp_path, dates, "user,item,time,text"), order="time", text_features=3)
    assert again.fingerprint() == splits.fingerprint()
    by_user = item_sequences(path, order="time", split="user", validation=0.0, test=0.5, min_interactions=2)
    assert (len(by_user.train), by_user.validation, len(by_user.test)) == (4, None, 4)


def test_embeddings_of_each_kind_of_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = 1e5 * random.normal(size=(6, 3))  # one item nobody had
    reads = written(tmp_path, [(user, "abcde".index(item), time) for user, item, time in READS])
    np.save(tmp_path / "e.npy", values)
    np.savez(tmp_path / "e.npz", other=values[:2], text=values)
    torch.save(torch.from_numpy(values), tmp_path / "e.pt")
    save_file({"text": torch.from_numpy(values)}, tmp_path / "e.safetensors")
    found = [
        item_sequences(reads, order="time", embeddings=tmp_path / f"e.{kind}", array="text" if kind == "npz" else None)
        for kind in ("npy", "npz", "pt", "safetensors")
    ]
    assert len({splits.fingerprint() for splits in found}) == 1
    known = values[:5]  # numbers go up to 4
    expected = torch.from_numpy((known - known.mean(0)) / known.std(0)).float()
    torch.testing.assert_close(found[0].tables["text_embeddings"], expected)
    listed = written(tmp_path, [(name,) for name in "54321"], "item", "items.csv")
    renamed = written(tmp_path, [(u, 5 - "abcde".index(i), t) for u, i, t in READS], name="renamed.csv")
    by_row = item_sequences(renamed, order="time", items=listed, embeddings=tmp_path / "e.npy")
    torch.testing.assert_close(by_row.tables["text_embeddings"], expected)
    assert [int(target) for _, target in by_row.test] == [int(target) for _, target in found[0].test]

    values[1, 2] = math.inf
    np.save(tmp_path / "bad.npy", values)
    bad = tmp_path / "bad.npy"
    with pytest.raises(ConfigurationError, match=r"row 1 \(from 0\), of the item '1'.*1 of 5 rows"):
        item_sequences(reads, order="time", embeddings=bad)
    zero = item_sequences(reads, order="time", embeddings=bad, nonfinite="zero")
    assert not zero.tables["text_embeddings"][1].any() and torch.isfinite(zero.tables["text_embeddings"]).all()
    dropped = item_sequences(reads, order="time", embeddings=bad, nonfinite="drop")
    assert not (dropped.train.items == 1).any() and len(dropped.train.items) == 8 and "left out" in dropped.notes[0]


def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path: Path) -> None:
    texts = "user,item,time,text"
    good = [(user, item, time, f"word {item}{item}") for user, item, time in READS]
    np.save(tmp_path / "short.npy", np.ones((3, 2)))
    np.save(tmp_path / "flat.npy", np.ones(3))
    np.savez(tmp_path / "two.npz", a=np.ones((9, 2)), b=np.ones((9, 2)))
    for kind in ("npy", "npz", "pt", "safetensors"):
        (tmp_path / f"torn.{kind}").write_bytes(b"PK\x03\x04 torn")
    listed = written(tmp_path, [("a", "x")], "item,text", "items.csv")
    twice = written(tmp_path, [("a", "x"), ("b", "y"), ("a", "z")], "item,text", "twice.csv")
    numbered = [(user, "abcde".index(item), time, "x") for user, item, time in READS]
    for rows, header, options, message in (
        (good, texts, {"user": "usr"}, "no column 'usr'.*Did you mean user"),
        ([*good, ("", "a", 3, "x")], texts, {}, "line 12.*'user' is empty"),
        ([*good, ("ann", "a", "", "x")], texts, {"order": "time"}, "line 12.*'time' is ''"),
        ([*good, ("ann", "a", "now", "x")], texts, {"order": "time"}, "line 12.*'now', but '0' in line 2"),
        ([("ann", "f", 3, " "), *good], texts, {}, "line 2.*'f' has no text"),
        (good, texts, {"text": "title"}, "no column 'title'"),
        (good, texts, {"text": None}, "nothing tells what the items are"),
        (good, texts, {"items": listed}, "line 3.*'b' is not among the 1 items"),
        (good, texts, {"items": twice}, "line 4.*'a' stands in line 2, too"),
        (good, texts, {"embeddings": tmp_path / "short.npy"}, "line 2: the item is 'a'.*whole number"),
        (numbered, texts, {"embeddings": tmp_path / "short.npy"}, "3 rows, but there are 5 items: '3' and 1 more"),
        (numbered, texts, {"embeddings": tmp_path / "flat.npy"}, r"shape \[3\]"),
        (numbered, texts, {"embeddings": tmp_path / "two.npz"}, "has 'a', 'b'; `array` is None"),
        (numbered, texts, {"embeddings": tmp_path / "torn.npy"}, "can't be read"),
        (numbered, texts, {"embeddings": tmp_path / "torn.npz"}, "can't be read"),
        (numbered, texts, {"embeddings": tmp_path / "torn.pt"}, "can't be read"),
        (numbered, texts, {"embeddings": tmp_path / "torn.safetensors"}, "can't be read"),
        (numbered, texts, {"embeddings": tmp_path / "none.csv"}, "can't be read"),
        (good, texts, {"min_interactions": 6}, "none of 2 users has 6 rows"),
        (good, texts, {"min_interactions": 3}, "from 4 is allowed with split=last"),
        (good, texts, {"split": "users"}, "Did you mean user"),
        (good, texts, {"nonfinite": "skip"}, "raise, zero, drop"),
        ([], texts, {}, "is empty"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            item_sequences(written(tmp_path, rows, header), **options)
    left = item_sequences(written(tmp_path, [*good, ("cy", "a", 1, "x")], texts))
    assert "1 of 3 users with fewer than 4 rows are left out" in left.notes[0]


# ------------------------------------------------------------------------------------------------------ the runs


def small(*more: str) -> list[str]:
    words = ["experiment=semantic_recommendation", "data.users=30", "data.items=60", "data.topics=6", "epochs=1"]
    return [*words, "device=cpu", "tracking=none", "checkpoint=none", "seed=3", *more]


def ran(folder: Path, *more: str) -> Any:
    run = build(checked(*small(*more)), folder, small(*more))
    return run, train(run)


def test_a_step_has_two_samples_and_safe_takes_one_at_a_time() -> None:
    def told(*words: str) -> tuple[Any, ...]:
        config = checked("experiment=semantic_recommendation", *words)
        return config["batch_size"], config["accumulate"], config["precision"]["dtype"], config["loss_mode"]

    assert told("preset=safe") == (2, 2, "float32", "plain")
    assert told("preset=stable") == (2, 1, "bfloat16", "smoothed")
    assert told()[:2] == (2, 1)
    assert told("preset=safe", "accumulate=1")[:2] == (2, 1)
    assert told("preset=safe", "batch_size=6")[:2] == (6, 6)


def test_bad_texts_are_named_and_survived(tmp_path: Path) -> None:
    for preset in ("stable", "safe"):  # salvaged with the sample that is left, and with the microbatch that is left
        run, summary = ran(
            tmp_path / preset,
            f"preset={preset}",
            "fault=nan_input",
            "fault.at=3",
            "fault.times=3",
            "guard.max_quarantined=0.5",
        )
        assert (summary.status, summary.rejected) == ("completed", 0) and summary.salvaged >= 3
        assert summary.quarantined == run.fault.indices and len(run.fault.indices) == 3
        assert all(summary.finite.values()) and math.isfinite(summary.metrics["test"]["mrr"])


def test_empty_histories_are_nothing_special(tmp_path: Path) -> None:
    run, summary = ran(tmp_path, "preset=stable", "fault=empty_input", "fault.at=3", "fault.samples=2")
    assert (summary.status, summary.rejected, summary.salvaged) == ("completed", 0, 0)
    assert len(run.fault.indices) == 2
    assert all(summary.finite.values()) and math.isfinite(summary.metrics["test"]["mrr"])


def test_an_overflow_of_the_projection_is_undone(tmp_path: Path) -> None:
    _, summary = ran(
        tmp_path,
        "preset=stable",
        "precision=fp16",
        "fault=large_output",
        "fault.at=3",
        "fault.times=2",
        "fault.module=text_projection",
    )
    assert summary.status == "completed" and summary.rejected + summary.salvaged == 2
    assert all(summary.finite.values()) and math.isfinite(summary.metrics["test"]["mrr"])


def test_embeddings_of_a_large_scale_overflow_by_hand_and_train_here(tmp_path: Path) -> None:
    """The failure that its authors met: text embeddings as they come, through a projection, in half precision."""
    values = 1e6 * np.random.default_rng(0).normal(size=(5, 3))
    with Precision("float16").autocast(), torch.no_grad():
        assert not torch.isfinite(nn.Linear(3, 8)(torch.from_numpy(values).float())).all()
    reads = written(tmp_path, [(f"u{n}", (n + t) % 5, t) for n in range(8) for t in range(6)])
    np.save(tmp_path / "e.npy", values)
    run = build(
        checked(
            *("experiment=semantic_recommendation", "preset=stable", "data=item_sequences", f"data.path={reads}"),
            *(f"data.embeddings={tmp_path / 'e.npy'}", "data.order=time", "precision=fp16", "tracking=none"),
            *("device=cpu", "checkpoint=none", "epochs=2"),
        ),
        tmp_path / "run",
    )
    summary = train(run)
    assert (summary.status, summary.rejected) == ("completed", 0) and summary.updates == 24


def test_it_learns_more_than_counting_does(tmp_path: Path) -> None:
    words = small("preset=normal", "data.users=400", "data.items=300", "data.topics=12", "batch_size=16", "epochs=6")
    run = build(checked(*words, "base_lr=1e-2"), tmp_path)
    summary = train(run)
    assert summary.rejected == 0
    found, part, test = summary.metrics["test"], run.loader.dataset, run.test.dataset
    last = part.items[part.places - 1].numpy()
    pairs = coo_matrix((np.ones(len(last)), (last, part.targets.numpy())), shape=(300, 300)).toarray()
    popular = np.bincount(part.targets.numpy(), minlength=300).astype(np.float64)
    for scores in (popular[None].repeat(len(test), 0), pairs[test.items[test.places - 1].numpy()] + 1e-6 * popular):
        counted = run.task.evaluate(
            nn.Identity(), OrderedLoader(ArrayDataset(torch.from_numpy(scores), test.targets), batch_size=256)
        )
        assert found["hit_rate_at_10"] > counted["hit_rate_at_10"] + 0.03
        assert found["mrr"] > counted["mrr"]
        assert counted["cold_hit_rate_at_10"] == 0.0
    assert found["cold_hit_rate_at_10"] > 0.15  # by chance 0.03
