"""Recommendation: the ranking measures and the model against their formulas, and runs with what its authors met."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torch import nn

from composed import checked
from stabletrain.build import build
from stabletrain.data import OrderedLoader, tastes
from stabletrain.errors import ConfigurationError
from stabletrain.loss import BPR, CrossEntropy
from stabletrain.model import MMGCN
from stabletrain.precision import Precision
from stabletrain.task import Ranks, Recommendation
from stabletrain.trainer import train

# ------------------------------------------------------------------------------------------------- ranking measures


@st.composite
def rankings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with many ties, wanted items and known ones, which don't overlap."""
    items, users = draw(st.integers(4, 9)), draw(st.integers(1, 4))
    scores = torch.tensor(draw(st.lists(st.integers(-2, 2), min_size=items * users, max_size=items * users)))
    wanted, known = torch.full((users, 3), -1), torch.full((users, 2), -1)
    for user in range(users):
        order = draw(st.permutations(range(items)))
        for table, chosen in (
            (wanted, order[: draw(st.integers(0, 3))]),
            (known, order[3 : 3 + draw(st.integers(0, 1))]),
        ):
            table[user, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return scores.double().view(users, items), wanted, known


def by_hand(scores: torch.Tensor, wanted: list[int], known: list[int], top: int) -> tuple[float, float]:
    """Recall and NDCG of one user in plain numbers; a tied item gets the mean over the places of its tie."""
    left = [item for item in range(len(scores)) if item not in known]
    found, gained = 0.0, 0.0
    for item in wanted:
        before = sum(float(scores[other]) > float(scores[item]) for other in left)
        tied = sum(float(scores[other]) == float(scores[item]) for other in left)
        places = [place for place in range(before + 1, before + tied + 1) if place <= top]
        found += len(places) / tied
        gained += sum(1 / math.log2(place + 1) for place in places) / tied
    best = sum(1 / math.log2(place + 1) for place in range(1, min(top, len(wanted)) + 1))
    return (found / len(wanted), gained / best) if wanted else (0.0, 0.0)


@settings(max_examples=80, deadline=None)
@given(ranking=rankings(), top=st.integers(1, 8), chunk=st.integers(1, 5))
def test_recall_and_ndcg_are_their_formulas(ranking: Any, top: int, chunk: int) -> None:
    scores, wanted, known = ranking
    ranks = Ranks.among_all(scores, wanted, known, chunk)
    recall, ndcg = ranks.recall(top), ranks.ndcg(top)
    for user, row in enumerate(scores):
        own, hidden = ([item for item in table[user].tolist() if item >= 0] for table in (wanted, known))
        assert (float(recall[user]), float(ndcg[user])) == pytest.approx(by_hand(row, own, hidden, top), abs=1e-12)
        if own:
            left = [item for item in range(len(row)) if item not in hidden]
            relevant = np.isin(left, own).astype(float)
            assert float(ndcg[user]) == pytest.approx(ndcg_score([relevant], [row[left].numpy()], k=top), abs=1e-9)


def test_a_model_that_knows_nothing_does_as_well_as_chance() -> None:
    wanted = torch.tensor([[0, 1], [98, 99]])
    assert Ranks.among_all(torch.zeros(2, 100), wanted).recall(20).tolist() == pytest.approx([0.2, 0.2])


def test_a_nan_among_the_scores_is_seen() -> None:
    scores = torch.rand(3, 9)
    scores[1, 4] = math.nan
    ranks = Ranks.among_all(scores, torch.tensor([[0], [1], [2]]), torch.tensor([[3], [4], [5]]))
    assert ranks.recall(2).isnan().tolist() == ranks.ndcg(2).isnan().tolist() == [False, True, False]


# ----------------------------------------------------------------------------------------------------------- the task


class Fixed(nn.Module):
    """Scores that were chosen before, for each user."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.scores[batch["user"]]


def test_evaluation_is_the_plain_formula_however_users_are_batched() -> None:
    splits = tastes(users=23, items=40, choices=9, seed=100)
    scores = torch.randn(23, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    task = Recommendation(BPR(), top=10)
    found = task.evaluate(Fixed(scores), OrderedLoader(splits.test, batch_size=30))
    losses, recalls, ndcgs, colds = [], [], [], []
    for inputs, targets in (splits.test[index] for index in range(len(splits.test))):
        row, own, known = scores[inputs["user"]], targets["held_out"].tolist(), targets["known"].tolist()
        others = [item for item in range(40) if item not in own and item not in known]
        losses.append(np.mean([math.log1p(math.exp(float(row[o] - row[item]))) for item in own for o in others]))
        recall, ndcg = by_hand(row, own, known, 10)
        recalls.append(recall)
        ndcgs.append(ndcg)
        cold = [item for item, is_cold in zip(own, targets["cold"].tolist(), strict=True) if is_cold]
        colds += [by_hand(row, cold, known, 10)[0]] if cold else []
    assert len(colds) > 5 and max(colds) > 0
    expected = {"loss": losses, "recall_at_10": recalls, "ndcg_at_10": ndcgs, "cold_recall_at_10": colds}
    assert found == pytest.approx({name: float(np.mean(values)) for name, values in expected.items()}, rel=1e-9)
    # In smaller batches, and shared by two processes that add up what they saw.
    assert task.evaluate(Fixed(scores), OrderedLoader(splits.test, batch_size=4)) == pytest.approx(found, rel=1e-9)
    batches = list(OrderedLoader(splits.test, batch_size=4))
    seen: list[torch.Tensor] = []
    task.evaluate(Fixed(scores), batches[::2], total=lambda own: seen.append(own) or own)
    shared = task.evaluate(Fixed(scores), batches[1::2], total=lambda own: own + seen[0])
    assert shared == pytest.approx(found, rel=1e-9)


def test_a_sample_counts_with_its_weight() -> None:
    class Given(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor]) -> Any:
            return batch["chosen"], batch["other"]

    chosen, other = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.5, 0.5]])
    batch = {"chosen": chosen, "other": other, "weight": torch.tensor([1.0, 3.0, 0.0])}
    output = Recommendation(BPR()).step(Given(), batch)
    losses = F.softplus(other.double() - chosen.double().unsqueeze(1)).mean(1)
    torch.testing.assert_close(output.per_sample_loss.double(), losses)
    torch.testing.assert_close(output.loss_sum.double(), losses[0] + 3 * losses[1])
    assert float(output.weight) == 4
    with pytest.raises(ConfigurationError, match="data=interactions"):
        Recommendation(BPR()).step(Given(), chosen)
    with pytest.raises(ConfigurationError, match="loss CrossEntropy"):
        Recommendation(CrossEntropy())
    with pytest.raises(ConfigurationError, match=r"task\.top is 0"):
        Recommendation(BPR(), top=0)


# ---------------------------------------------------------------------------------------------------------- the model

CHOSEN = [(0, 0), (0, 2), (1, 2), (2, 1), (2, 2), (3, 0)]  # of 4 users and 5 items; nobody chose 3 and 4


def network(**options: Any) -> MMGCN:
    torch.manual_seed(3)
    model = MMGCN(4, 5, 6, {"visual": 3, "text": 2}, **{"dimension": 4, "dropout": 0.0, "unknown": 0.0, **options})
    model = model.double()
    others: list[list[int]] = [[] for _ in range(9)]
    for user, item in CHOSEN:
        others[user].append(4 + item)
        others[4 + item].append(user)
    model.neighbours.copy_(torch.tensor([other for own in others for other in own]))
    model.starts.copy_(torch.tensor([0, *np.cumsum([len(own) for own in others])]))
    with torch.no_grad():
        model.features_visual.normal_()
        model.features_text.normal_()
    return model


def by_a_loop(model: MMGCN, slope: float, concatenate: bool) -> torch.Tensor:
    """The formulas of the paper, node by node."""
    total = torch.zeros(9, 4, dtype=torch.float64)
    for name, part in model.modalities.items():
        items = [part.projection.weight @ f + part.projection.bias for f in getattr(model, f"features_{name}")]
        nodes = [node / node.norm() for node in [*part.preference.weight, *items]]
        for layer in range(2):
            changed = []
            for node, own in enumerate(nodes):
                others = [4 + i for u, i in CHOSEN if u == node] + [u for u, i in CHOSEN if 4 + i == node]
                heard = sum((part.message[layer].weight @ nodes[o] for o in others), torch.zeros(4).double())
                heard = F.leaky_relu(heard / max(1, len(others)), slope)
                kept = F.leaky_relu(part.own[layer].weight @ own + part.own[layer].bias, slope)
                kept = kept + model.identity.weight[node] if others else kept
                weight, bias = part.combined[layer].weight, part.combined[layer].bias
                mixed = weight @ torch.cat([heard, kept]) if concatenate else weight @ heard + kept
                changed.append(F.leaky_relu(mixed + bias, slope))
            nodes = changed
        total = total + torch.stack(nodes)
    return total


@pytest.mark.parametrize("combination", ["concatenate", "add"])
def test_the_model_is_the_formula(combination: str) -> None:
    model = network(combination=combination, slope=0.2)
    expected = by_a_loop(model, 0.2, combination == "concatenate")
    found = model.representations()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad((nodes**2).sum(), wanted) for nodes in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    user, item = torch.tensor([3, 0, 1]), torch.tensor([4, 1, 1])
    negatives = torch.tensor([[0, 1], [3, 4], [2, 0]])
    everything = expected[user] @ expected[4:].T
    torch.testing.assert_close(model.eval()({"user": user}), everything)
    positive, negative = model.train()({"user": user, "item": item, "negatives": negatives})
    torch.testing.assert_close(positive, everything.gather(1, item.unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(negative, everything.gather(1, negatives))


def test_unknown_items_are_like_those_that_nobody_chose_in_training_alone() -> None:
    model = network(unknown=0.999999, layers=1)
    batch = {"user": torch.arange(4)}
    healthy = model.eval()(batch)
    assert torch.equal(model(batch), healthy)
    # What an item was chosen by doesn't matter once it is unknown, nor what was learnt for it.
    items = model.train().representations()[4:].detach()
    with torch.no_grad():
        model.identity.weight[4:] += 1
        model.neighbours.copy_(torch.where(model.neighbours < 4, (model.neighbours + 1) % 4, model.neighbours))
    torch.testing.assert_close(model.representations()[4:], items)
    assert not torch.allclose(model.eval()(batch), healthy)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_scores_are_wide_whatever_the_precision(precision: str) -> None:
    model = network().float().eval()
    wide = model({"user": torch.arange(4)})
    with Precision(precision).autocast():
        scores = model({"user": torch.arange(4)})
        chosen, others = model.train()(
            {"user": torch.arange(4), "item": torch.arange(4), "negatives": torch.arange(4).unsqueeze(1)}
        )
    assert {scores.dtype, chosen.dtype, others.dtype} == {torch.float32}
    torch.testing.assert_close(scores, wide, rtol=0.05, atol=0.02)
    assert len(scores.unique()) == scores.numel()  # no ties by rounding


def test_every_weight_is_drawn_by_glorots_rule() -> None:
    model = MMGCN(40, 50, 6, {"visual": 30}, dimension=16)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter = parameter.detach()
        if parameter.dim() == 1:
            assert not parameter.any(), name
            continue
        bound = math.sqrt(6 / sum(parameter.shape))
        assert 0.9 * bound < float(parameter.abs().max()) <= bound, name
        assert float(parameter.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15), name


def test_many_layers_of_means_do_not_explode() -> None:
    norms = [float(network(layers=layers).representations().detach().norm()) for layers in (1, 30)]
    assert norms[1] < 2 * norms[0]


@pytest.mark.parametrize(
    "wrong",
    [{"users": 0}, {"layers": True}, {"combination": "both"}, {"slope": 2.0}, {"unknown": 1.0}, {"features": {}}],
)
def test_what_makes_no_model_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"model\.{next(iter(wrong))}"):
        MMGCN(**{"users": 2, "items": 2, "edges": 2, "features": {"visual": 2}, **wrong})


# ------------------------------------------------------------------------------------------------------------- runs

SMALL = [
    *(
        "experiment=recommendation",
        "data.users=150",
        "data.items=120",
        "batch_size=256",
        "model.dimension=16",
        "seed=100",
    ),
    *("threads=1", "device=cpu", "tracking=none", "checkpoint=none"),
]


def trained(folder: Path, *more: str) -> tuple[Any, Any]:
    given = [*SMALL, *more]
    run = build(checked(*given), folder, given)
    return run, train(run)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    run, summary = trained(tmp_path_factory.mktemp("healthy"), "preset=stable", "base_lr=2e-2")
    assert (summary.status, summary.rejected, summary.salvaged) == ("completed", 0, 0)
    train_items = run.loader.dataset.items.bincount(minlength=120).double()
    popular = run.task.evaluate(Fixed(train_items.expand(150, 120)), run.test)
    found = dict(run.metrics["test"])
    assert found["recall_at_20"] > 1.25 * popular["recall_at_20"]
    # Without interactions all of these are equal; features tell them apart.
    assert found["cold_recall_at_20"] > popular["cold_recall_at_20"] == 0
    return found


def test_a_run_ranks_better_than_popularity_and_finds_new_items(healthy: dict[str, float]) -> None:
    assert set(healthy) == {"loss", "recall_at_20", "ndcg_at_20", "cold_recall_at_20"}


def test_bad_samples_are_named_and_the_ranking_stays(tmp_path: Path, healthy: dict[str, float]) -> None:
    more = ("base_lr=2e-2", "fault=nan_input", "fault.at=0", "fault.times=2", "fault.samples=10")
    run, summary = trained(tmp_path, "preset=stable", *more)
    assert (summary.status, summary.rejected) == ("completed", 0)
    assert len(run.fault.indices) == 20 and summary.quarantined == run.fault.indices
    assert abs(run.metrics["test"]["recall_at_20"] - healthy["recall_at_20"]) < 0.05


@pytest.mark.parametrize(
    "fault",
    [
        ("fault=fp16_overflow", "fault.at=4", "fault.times=3"),
        ("fault=large_output", "fault.at=4", "fault.times=2", "fault.module=modalities.visual.combined.1"),
        ("fault=nan_loss", "fault.at=4", "fault.times=2"),
    ],
    ids=["overflowing gradients", "exploding messages", "loss"],
)
def test_what_its_authors_met_leaves_no_trace(tmp_path: Path, fault: tuple[str, ...]) -> None:
    run, summary = trained(tmp_path, "preset=stable", "precision=fp16", "epochs=4", *fault)
    assert summary.status == "completed" and all(summary.finite.values())
    assert summary.rejected + summary.salvaged >= 2
    assert run.metrics["test"]["recall_at_20"] > 0


def test_the_experiment_clips_at_5_and_grows_its_scale_every_2000_steps() -> None:
    config = checked("experiment=recommendation", "preset=normal", "precision=fp16")
    assert config["clipping"]["max_norm"] == 5.0 and config["fp16_growth_interval"] == 2000
    assert config["precision"]["growth_interval"] == 2000


def test_the_initialisation_of_the_group_fits_the_model(tmp_path: Path) -> None:
    given = [*SMALL, "initialisation=xavier"]
    model = build(checked(*given), tmp_path, given).model
    assert isinstance(model, MMGCN)
    assert bool(model.features_visual.any()) and len(model.neighbours) == 2 * int(model.starts[150])
