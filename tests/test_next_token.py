"""Next-token prediction: the loss is a mean over tokens, padding counts nowhere, and generated text is what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from composed import checked
from stabletrain.assembly import assemble
from stabletrain.build import build
from stabletrain.data import ArrayDataset, OrderedLoader, Splits, text
from stabletrain.errors import ConfigurationError
from stabletrain.loss import CrossEntropy, FocalLoss, WeightedCrossEntropy
from stabletrain.model import Transformer
from stabletrain.optimizer import adamw
from stabletrain.task import NextToken
from stabletrain.trainer import train

LOSSES = {"plain": CrossEntropy(), "weighted": WeightedCrossEntropy([5, 1, 2, 4]), "focal": FocalLoss(2.0)}


def logits_and_targets(number: int, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    targets = torch.randint(4, (6, length), generator=generator)
    targets[torch.rand(6, length, generator=generator) < 0.4] = -1
    targets[0, 0] = 3
    return torch.randn(6, length, 4, generator=generator), targets


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_weighted_mean_over_the_tokens_with_a_target(name: str) -> None:
    loss = LOSSES[name]
    for number in range(5):
        logits, targets = logits_and_targets(number)
        logits.requires_grad_()
        output = NextToken(loss).step(nn.Identity(), (logits, targets))
        real = targets >= 0
        per_token, weights = loss(logits[real].double(), targets[real])
        weights = torch.ones_like(per_token) if weights is None else weights
        torch.testing.assert_close(output.loss_sum.double(), (per_token * weights).sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.as_tensor(output.weight).double(), weights.double().sum())
        assert output.per_sample_loss is not None
        assert output.per_sample_loss.shape == (6,)
        for sample in range(6):
            if bool(real[sample].any()):
                alone = NextToken(loss).step(nn.Identity(), (logits[sample : sample + 1], targets[sample : sample + 1]))
                torch.testing.assert_close(output.per_sample_loss[sample], (alone.loss_sum / alone.weight).detach())
        output.loss_sum.backward()
        assert logits.grad is not None
        assert int(logits.grad[~real].count_nonzero()) == 0


def test_probabilities_are_targets_too() -> None:
    logits, targets = logits_and_targets(3)
    targets = targets.clamp_min(0)
    soft = nn.functional.one_hot(targets, 4).float()
    for loss in LOSSES.values():
        task = NextToken(loss)
        hard_output, soft_output = (task.step(nn.Identity(), (logits, one)) for one in (targets, soft))
        torch.testing.assert_close(soft_output.loss_sum, hard_output.loss_sum)
        torch.testing.assert_close(torch.as_tensor(soft_output.weight), torch.as_tensor(hard_output.weight))
        scores = [
            task.evaluate(nn.Identity(), OrderedLoader(ArrayDataset(logits, one), batch_size=4))
            for one in (targets, soft)
        ]
        assert scores[0] == pytest.approx(scores[1])
    soft[1, 2] = math.nan  # a bad label is seen, not passed over
    assert math.isnan(NextToken(CrossEntropy()).step(nn.Identity(), (logits, soft)).loss_sum.item())


def test_what_stands_where_there_is_no_target_means_nothing() -> None:
    logits, targets = logits_and_targets(1)
    task = NextToken(CrossEntropy())
    before = task.step(nn.Identity(), (logits, targets))
    logits = logits.masked_fill((targets < 0)[:, :, None], math.nan)
    after = task.step(nn.Identity(), (logits, targets))
    assert torch.equal(after.loss_sum, before.loss_sum)
    nothing = task.step(nn.Identity(), (logits, torch.full_like(targets, -100)))
    assert (nothing.loss_sum.item(), float(nothing.weight)) == (0.0, 0.0)
    assert nothing.per_sample_loss is not None
    assert int(nothing.per_sample_loss.count_nonzero()) == 0


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_evaluation_is_the_mean_over_all_tokens_whatever_the_batch_size(batch_size: int) -> None:
    logits, targets = logits_and_targets(2)
    model = nn.Sequential(nn.Dropout(0.5))
    metrics = NextToken(CrossEntropy()).evaluate(
        model, OrderedLoader(ArrayDataset(logits, targets), batch_size=batch_size)
    )
    real = targets >= 0
    expected = nn.functional.cross_entropy(logits[real], targets[real])
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float((logits.argmax(2) == targets)[real].float().mean()))
    assert model.training
    assert model[0].training


def test_lists_of_sequences_are_evaluated_and_trained_on_like_padded_ones() -> None:
    sequences = [torch.arange(length) % 4 for length in (2, 5, 3)]
    pair = ([one[:-1] for one in sequences], [one[1:] for one in sequences])
    model, task = Transformer(4, width=8, layers=1), NextToken(CrossEntropy())
    together = task.step(model, pair)
    alone = [task.step(model, (one[None, :-1], one[None, 1:])) for one in sequences]
    torch.testing.assert_close(together.loss_sum, sum(one.loss_sum for one in alone))
    assert float(together.weight) == 1 + 4 + 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda task: task.step(nn.Identity(), (torch.zeros(2, 3), torch.zeros(2, 3).long())),
            ["[2, 3]", "vocabulary"],
        ),
        (lambda task: task.step(nn.Identity(), (torch.zeros(2, 3, 4), torch.zeros(2, 2).long())), ["[2, 2]"]),
        (lambda task: task.step(nn.Identity(), (torch.zeros(2, 3, 4), torch.zeros(2, 3))), ["float32", "int64"]),
        (
            lambda task: task.step(nn.Identity(), (torch.zeros(1, 1, 4), torch.tensor([[4]]))),
            ["token 4", "0 to 3", "model.vocabulary"],
        ),
        (lambda task: task.evaluate(nn.Identity(), []), ["nothing to evaluate"]),
    ],
)
def test_what_does_not_fit_is_told(make: Callable[[NextToken], Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        make(NextToken(CrossEntropy()))
    assert all(word in str(error.value) for word in words), error.value


# ------------------------------------------------------------------------------------------------------------- the text


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 20),
    vocabulary=st.integers(2, 30),
    least=st.integers(1, 12),
    more=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_a_text_repeats_itself_after_a_period_of_its_own(
    length: int, vocabulary: int, least: int, more: int, seed: int
) -> None:
    options = {"samples": 12, "length": length, "vocabulary": vocabulary, "min_period": least}
    splits = text(**options, max_period=least + more, seed=seed)  # type: ignore[arg-type]
    whole = torch.cat([torch.cat([part.inputs, part.targets[:, -1:]], 1) for part in (splits.train, splits.validation)])
    assert whole.shape == (len(splits.train) + len(splits.validation), length + 1)
    assert torch.equal(splits.train.inputs[:, 1:], splits.train.targets[:, :-1])
    assert int(whole.min()) >= 0
    assert int(whole.max()) < vocabulary
    assert splits.facts == {"vocabulary": vocabulary, "num_classes": vocabulary}
    for sequence in whole:
        periods = [p for p in range(least, least + more + 1) if torch.equal(sequence[p:], sequence[: length + 1 - p])]
        assert periods, sequence
    assert splits.fingerprint() == text(**options, max_period=least + more, seed=seed).fingerprint()  # type: ignore[arg-type]


def test_a_text_follows_a_markov_chain_of_the_sharpness_asked_for() -> None:
    def pairs(sharpness: float) -> torch.Tensor:
        data = text(samples=20_000, length=9, vocabulary=5, sharpness=sharpness, min_period=99, max_period=99).train
        counts = torch.zeros(25).scatter_add_(
            0, (data.inputs * 5 + data.targets).flatten(), torch.ones(data.inputs.numel())
        )
        return (counts.view(5, 5) / counts.view(5, 5).sum(1, keepdim=True)).double()

    torch.testing.assert_close(pairs(0.0), torch.full((5, 5), 0.2, dtype=torch.float64), rtol=0, atol=0.01)
    # The logits of softmax(s z) are s z up to a constant: twice the sharpness, twice the differences.
    soft, sharp = (pairs(sharpness).log() for sharpness in (0.5, 1.0))
    torch.testing.assert_close(sharp - sharp[:, :1], 2 * (soft - soft[:, :1]), rtol=0, atol=0.25)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocabulary": 1}, ["vocabulary 1", "at least 2"]),
        ({"length": 0}, ["length 0"]),
        ({"sharpness": math.inf}, ["sharpness inf"]),
        ({"min_period": 9, "max_period": 8}, ["from 9 to 8"]),
        ({"min_period": 0}, ["from 0"]),
    ],
)
def test_a_text_that_is_none_is_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        text(**options)
    assert all(word in str(error.value) for word in words), error.value


def test_a_model_learns_to_look_back() -> None:
    # Each token is equally likely, so that only what came a period before tells the next one.
    options = {"length": 8, "vocabulary": 8, "sharpness": 0.0, "min_period": 4, "max_period": 4}
    splits = text(samples=4000, **options)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(8, width=32, layers=2, norm="sandwich", qk_norm=True)
    summary = train(
        assemble(
            model, splits, epochs=1, batch_size=32, task=NextToken(CrossEntropy()), optimizer=partial(adamw, lr=2e-2)
        )
    )
    # A target is told by the token one period before for 5 of the 8, and by nothing for the other 3.
    assert 0.95 * 3 / 8 * math.log(8) < summary.metrics["final"]["loss"] < 0.75 * math.log(8)


def test_the_experiment_is_put_together_from_its_options(tmp_path: Any) -> None:
    run = build(checked("experiment=text", "data.samples=60", "device=cpu", "tracking=none"), tmp_path)
    assert isinstance(run.model, Transformer)
    assert isinstance(run.task, NextToken)
    assert run.model.head.out_features == 64
    smoothed = build(
        checked("experiment=text", "preset=stable", "data.samples=60", "device=cpu", "tracking=none"), tmp_path / "s"
    )
    assert smoothed.task.loss.label_smoothing == 0.1


def test_a_data_set_of_sequences_of_different_length_trains() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randint(5, (length,), generator=generator) for length in (3, 9, 4, 12) * 8]

    class Lines(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(whole)

        def __getitem__(self, index: int) -> Any:
            return whole[index][:-1], whole[index][1:]

    run = assemble(
        Transformer(5, width=8, layers=1),
        Splits(Lines(), facts={"vocabulary": 5}),
        epochs=1,
        batch_size=8,
        accumulate=2,
        task=NextToken(CrossEntropy()),
    )
    summary = train(run)
    assert (summary.status, summary.updates, summary.rejected) == ("completed", 4, 0)
