"""Losses against formulas in float64 and torch's own, at ordinary and extreme logits, in every precision."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletrain.errors import ConfigurationError
from stabletrain.loss import CrossEntropy, FocalLoss, Loss, WeightedCrossEntropy

GAMMAS = [0.0, 0.1, 0.5, 1.0, 2.0, 5.0]


def problem(seed: int, batch: int = 6, classes: int = 4, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (batch,), generator=generator)


def mixture(seed: int, batch: int = 6, classes: int = 4) -> torch.Tensor:
    return torch.rand(batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)


def formula(logits: torch.Tensor, targets: torch.Tensor, gamma: float, smoothing: float) -> torch.Tensor:
    """The focal loss as it is written in the paper, in float64."""
    classes = logits.shape[1]
    shares = targets if targets.is_floating_point() else F.one_hot(targets, classes).double()
    shares = shares * (1 - smoothing) + smoothing / classes
    p = logits.double().softmax(1)
    return -(shares * (1 - p) ** gamma * p.log()).sum(1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    gamma=st.floats(0, 6),
    smoothing=st.floats(0, 0.9),
    mixed=st.booleans(),
    scale=st.floats(0.1, 5),
)
def test_focal_loss_and_its_gradient_follow_the_formula(
    seed: int, gamma: float, smoothing: float, mixed: bool, scale: float
) -> None:
    logits, targets = problem(seed, scale=scale)
    if mixed:
        targets = mixture(seed)
    ours, reference = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values, weights = FocalLoss(gamma, label_smoothing=smoothing)(ours, targets)
    expected = formula(reference, targets, gamma, smoothing)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    assert weights is None
    values.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-7, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), gamma=st.sampled_from(GAMMAS), smoothing=st.sampled_from([0.0, 0.1]))
def test_focal_loss_in_float32_is_close_to_float64(seed: int, gamma: float, smoothing: float) -> None:
    logits, targets = problem(seed)
    values, _ = FocalLoss(gamma, label_smoothing=smoothing)(logits.float(), targets)
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values.double(), formula(logits.float(), targets, gamma, smoothing), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["class", "smoothed class", "probabilities", "mixed"])
def test_focal_loss_is_finite_at_extreme_logits(gamma: float, dtype: torch.dtype, form: str) -> None:
    extremes = [-1e4, -80.0, -20.0, -17.0, -1.0, 0.0, 1e-8, 1.0, 17.0, 20.0, 80.0, 1e4]
    logits = torch.tensor(list(itertools.product(extremes, repeat=3)), dtype=dtype).requires_grad_()
    targets = torch.arange(len(logits)) % 3
    if form == "probabilities":
        targets = F.one_hot(targets, 3).float()
    elif form == "mixed":
        targets = 0.7 * F.one_hot(targets, 3).float() + 0.3 * F.one_hot((targets + 1) % 3, 3).float()
    values, _ = FocalLoss(gamma, label_smoothing=0.1 if form == "smoothed class" else 0.0)(logits, targets)
    assert torch.isfinite(values).all()
    assert (values >= 0).all()
    (values * 65536).sum().backward()  # as fp16's loss scaling does
    assert logits.grad is not None
    if dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.isfinite(logits.grad).all()
        worst = (values * 0 + 65536 * (1 + gamma * 2e4)).max()
        assert logits.grad.abs().max() <= worst


@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
def test_focal_loss_of_a_hopeless_sample_is_its_cross_entropy(gamma: float) -> None:
    logits = torch.tensor([[1e4, -1e4]])
    values, _ = FocalLoss(gamma)(logits, torch.tensor([1]))
    assert float(values) == 2e4


def test_focal_loss_without_gamma_is_cross_entropy() -> None:
    logits, targets = problem(1)
    torch.testing.assert_close(FocalLoss(0.0)(logits, targets)[0], F.cross_entropy(logits, targets, reduction="none"))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), smoothing=st.floats(0, 0.9), mixed=st.booleans())
def test_cross_entropy_is_that_of_torch(seed: int, smoothing: float, mixed: bool) -> None:
    logits, targets = problem(seed)
    if mixed:
        targets = mixture(seed)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    values, weights = CrossEntropy(smoothing)(logits, targets)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert weights is None
    torch.testing.assert_close(expected, formula(logits, targets, 0.0, smoothing))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_finite_at_extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype).requires_grad_()
    values, _ = CrossEntropy(0.1)(logits, torch.tensor([0, 0]))
    values.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(values).all()
    assert torch.isfinite(logits.grad).all()


def test_the_weighted_mean_is_that_of_torch() -> None:
    logits, targets = problem(3, batch=30)
    counts = [12, 3, 9, 6]
    values, weights = WeightedCrossEntropy(counts)(logits, targets)
    assert weights is not None
    class_weights = torch.tensor([sum(counts) / (4 * count) for count in counts], dtype=torch.float64)
    expected = F.cross_entropy(logits, targets, weight=class_weights)
    torch.testing.assert_close((values * weights).sum() / weights.sum(), expected, rtol=1e-6, atol=0)


def test_every_class_weighs_the_same_in_total() -> None:
    counts = [1, 20, 4]
    targets = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    _, weights = WeightedCrossEntropy(counts)(torch.zeros(25, 3), targets)
    assert weights is not None
    totals = [float(weights[targets == label].sum()) for label in range(3)]
    assert totals == pytest.approx([25 / 3] * 3)


def test_an_absent_class_weighs_nothing_and_stays_finite() -> None:
    loss = WeightedCrossEntropy([5, 0, 5])
    logits = torch.zeros(2, 3, requires_grad=True)
    values, weights = loss(logits, torch.tensor([1, 1]))
    assert weights is not None
    assert weights.tolist() == [0.0, 0.0]
    (values * weights).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(2, 3))


def test_the_weight_of_a_mixture_is_the_mixture_of_weights() -> None:
    loss = WeightedCrossEntropy([1, 3])
    _, weights = loss(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    assert weights is not None
    assert weights.tolist() == pytest.approx([2.0, 0.25 * 2.0 + 0.75 * 2 / 3])


def test_focal_loss_takes_class_weights() -> None:
    logits, targets = problem(5)
    values, weights = FocalLoss(2.0, class_counts=[1, 2, 3, 4])(logits, targets)
    torch.testing.assert_close(values, FocalLoss(2.0)(logits, targets)[0])
    torch.testing.assert_close(weights, WeightedCrossEntropy([1, 2, 3, 4])(logits, targets)[1])


LOSSES: list[Loss] = [
    CrossEntropy(),
    CrossEntropy(0.1),
    WeightedCrossEntropy([3, 1, 2, 2]),
    FocalLoss(),
    FocalLoss(0.5, [3, 1, 2, 2], 0.1),
]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_and_low_precision_outputs_change_nothing(loss: Loss, dtype: torch.dtype, mixed: bool) -> None:
    logits, targets = problem(2)
    if mixed:
        targets = mixture(2).float()
    low = logits.to(dtype)
    expected, expected_weights = loss(low.float(), targets)
    with torch.autocast("cpu", dtype):
        values, weights = loss(low, targets)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None and expected_weights is not None:
        assert weights.dtype == torch.float32
        assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_plain_is_cross_entropy_without_weights(loss: Loss) -> None:
    logits, targets = problem(4)
    values, weights = loss.simplified("plain")(logits, targets)
    assert weights is None
    torch.testing.assert_close(values, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_as_is_changes_nothing(loss: Loss) -> None:
    assert loss.simplified("as_is") is loss


@pytest.mark.parametrize(
    ("loss", "gamma"), [(CrossEntropy(), 0.0), (FocalLoss(2.0), 1.0), (FocalLoss(0.5), 0.5), (CrossEntropy(0.3), 0.0)]
)
def test_smoothed_has_label_smoothing_and_a_mild_gamma(loss: Loss, gamma: float) -> None:
    logits, targets = problem(4)
    values, weights = loss.simplified("smoothed")(logits, targets)
    torch.testing.assert_close(values, formula(logits, targets, gamma, 0.1))
    assert weights is None


@pytest.mark.parametrize("loss", [WeightedCrossEntropy([3, 1, 2, 2]), FocalLoss(2.0, [3, 1, 2, 2])])
def test_smoothed_keeps_class_weights(loss: Loss) -> None:
    logits, targets = problem(4)
    torch.testing.assert_close(loss.simplified("smoothed")(logits, targets)[1], loss(logits, targets)[1])


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_loss_has_no_state_to_save(loss: Loss) -> None:
    assert loss.state_dict() == {}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CrossEntropy(1.0), ["label_smoothing", "1.0", "below 1"]),
        (lambda: CrossEntropy(math.nan), ["label_smoothing", "nan"]),
        (lambda: FocalLoss(-1.0), ["gamma", "-1.0", "from 0"]),
        (lambda: FocalLoss(math.inf), ["gamma", "inf"]),
        (lambda: WeightedCrossEntropy([0, 0]), ["class_counts", "[0, 0]", "auto"]),
        (lambda: WeightedCrossEntropy([]), ["class_counts", "[]"]),
        (lambda: WeightedCrossEntropy([3, -1]), ["class_counts", "-1"]),
        (lambda: CrossEntropy().simplified("simple"), ["loss_mode", "'simple'", "as_is, smoothed, plain"]),
        (lambda: FocalLoss(2.0, [1, 1])(torch.zeros(2, 3), torch.tensor([0, 1])), ["3 outputs", "2 classes"]),
    ],
)
def test_bad_arguments_get_one_message(build: object, words: list[str]) -> None:
    assert callable(build)
    with pytest.raises(ConfigurationError) as error:
        build()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("label", [4, -1, -100])
def test_no_label_is_ignored_silently(loss: Loss, label: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        loss(torch.zeros(2, 4), torch.tensor([0, label]))
