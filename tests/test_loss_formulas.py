"""Losses against their formulas, written out in float64 as in the papers, or against torch where that is right."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stabletrain.errors import ConfigurationError
from stabletrain.loss import (
    BPR,
    CTC,
    TEMI,
    BinaryCrossEntropy,
    BinaryFocalLoss,
    CrossEntropy,
    Dice,
    FocalLoss,
    GaussianNLL,
    Huber,
    InfoNCE,
    KLDivergence,
    MeanSquaredError,
    SupervisedContrastive,
    ZLoss,
)


def normal(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(seed: int, below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(outputs: list[Tensor], ours: object, theirs: object) -> None:
    """Compare values and gradients of two functions of the outputs."""
    assert callable(ours) and callable(theirs)
    found = []
    for function in (ours, theirs):
        leaves = [output.clone().requires_grad_() for output in outputs]
        values = function(*leaves)
        grads = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
        found.append([values.detach(), *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_the_gradient_of_a_certain_answer_is_that_of_float64() -> None:
    logits = torch.tensor([[25.0, 0.0], [0.0, 18.0]], requires_grad=True)
    for loss in (CrossEntropy(), FocalLoss(2.0), FocalLoss(0.5)):
        for targets in (torch.tensor([0, 1]), torch.eye(2)):
            exact = logits.detach().double().requires_grad_()
            values, _ = loss(logits, targets)
            p = exact.softmax(1)[[0, 1], [1, 0]]  # of the wrong class
            rest = torch.log1p(-p)
            gamma = getattr(loss, "gamma", 0.0)
            expected = -(p**gamma) * rest
            torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-5, atol=0)
            grad, exact_grad = (
                torch.autograd.grad(one.sum(), leaf)[0] for one, leaf in ((values, logits), (expected, exact))
            )
            torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), weight=st.floats(0.2, 5), smoothing=st.floats(0, 0.9), soft=st.booleans())
def test_binary_cross_entropy_is_that_of_torch(seed: int, weight: float, smoothing: float, soft: bool) -> None:
    targets = normal(seed + 1, 6, 3).sigmoid() if soft else whole(seed, 2, 6, 3).double()
    smooth = targets * (1 - smoothing) + smoothing / 2
    assert_same(
        [normal(seed, 6, 3, scale=5)],
        lambda x: BinaryCrossEntropy(weight, smoothing)(x, targets)[0],
        lambda x: F.binary_cross_entropy_with_logits(
            x, smooth, reduction="none", pos_weight=torch.tensor(weight, dtype=torch.float64)
        ).mean(1),
    )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), gamma=st.floats(0, 5), alpha=st.sampled_from([None, 0.25, 0.9]))
def test_binary_focal_loss_follows_the_formula(seed: int, gamma: float, alpha: float | None) -> None:
    targets = whole(seed, 2, 6)

    def formula(x: Tensor) -> Tensor:
        p = x[:, 0].sigmoid()
        for_yes = -((1 - p) ** gamma) * p.log() * (alpha if alpha is not None else 1)
        for_no = -(p**gamma) * (1 - p).log() * (1 - alpha if alpha is not None else 1)
        return torch.where(targets == 1, for_yes, for_no)

    assert_same([normal(seed, 6, 1)], lambda x: BinaryFocalLoss(gamma, alpha)(x, targets)[0], formula)


@pytest.mark.parametrize("shares", [False, True])
def test_dice_follows_the_formula(shares: bool) -> None:
    labels = whole(1, 3, 4, 5, 2)
    hot = F.one_hot(labels, 3).movedim(-1, 1).double()
    targets = normal(3, 4, 3, 5, 2).softmax(1) if shares else labels

    def formula(x: Tensor) -> Tensor:
        p, t = x.softmax(1).flatten(2), (targets if shares else hot).flatten(2)
        return 1 - ((2 * (p * t).sum(2) + 0.5) / (p.sum(2) + t.sum(2) + 0.5)).mean(1)

    assert_same([normal(2, 4, 3, 5, 2)], lambda x: Dice(smooth=0.5)(x, targets)[0], formula)
    yes = whole(4, 2, 4, 5, 2)

    def of_one(x: Tensor) -> Tensor:
        p, t = x.sigmoid().flatten(1), yes.double().flatten(1)
        return 1 - (2 * (p * t).sum(1) + 0.5) / (p.sum(1) + t.sum(1) + 0.5)

    assert_same([normal(2, 4, 1, 5, 2)], lambda x: Dice(smooth=0.5)(x, yes)[0], of_one)


@pytest.mark.parametrize("label", [0, 1])
def test_the_dice_loss_of_a_certain_place_keeps_its_digits(label: int) -> None:
    narrow = torch.tensor([[[22.0], [0.0]]], requires_grad=True)
    wide = narrow.detach().double().requires_grad_()
    p, t = wide.softmax(1)[0, :, 0], torch.eye(2, dtype=torch.float64)[label]
    expected = ((p * (1 - t) + t * p.flip(0)) / (p + t + 1)).mean()  # the other class's p is 1 - p
    values, _ = Dice()(narrow, torch.tensor([[label]]))
    torch.testing.assert_close(values[0].double(), expected, rtol=1e-5, atol=0)
    (grad,), (exact,) = torch.autograd.grad(values.sum(), narrow), torch.autograd.grad(expected, wide)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=0)


def test_an_empty_mask_that_is_predicted_empty_has_no_dice_loss() -> None:
    values, weights = Dice()(torch.full((2, 1, 4), -1e4), torch.zeros(2, 4))
    assert values.tolist() == [0.0, 0.0]
    assert weights is None


def test_errors_are_those_of_torch() -> None:
    targets = normal(5, 6, 3)
    for ours, theirs in (
        (MeanSquaredError(), lambda x: F.mse_loss(x, targets, reduction="none").mean(1)),
        (Huber(0.7), lambda x: F.huber_loss(x, targets, reduction="none", delta=0.7).mean(1)),
    ):
        assert_same([normal(6, 6, 3)], lambda x, ours=ours: ours(x, targets)[0], theirs)


def test_gaussian_nll_is_that_of_torch() -> None:
    targets, log_variance = normal(7, 6), torch.cat([normal(8, 4), torch.tensor([-50.0, -20.0], dtype=torch.float64)])
    expected = F.gaussian_nll_loss(mean := normal(9, 6), targets, log_variance.exp(), eps=1e-6, reduction="none")
    torch.testing.assert_close(GaussianNLL()((mean, log_variance), targets)[0], expected)
    assert_same(
        [mean, log_variance.exp()],
        lambda m, v: GaussianNLL(log_variance=False)((m, v), targets)[0],
        lambda m, v: F.gaussian_nll_loss(m, targets, v, eps=1e-6, reduction="none"),
    )
    one = torch.stack([mean, log_variance], 1)
    assert torch.equal(GaussianNLL()(one, targets)[0], GaussianNLL()((mean, log_variance), targets)[0])


def test_a_variance_below_its_floor_can_come_back() -> None:
    spread = torch.tensor([-100.0, 1.0], dtype=torch.float64, requires_grad=True)
    values, _ = GaussianNLL()((torch.zeros(2, dtype=torch.float64), spread), torch.ones(2))
    (grad,) = torch.autograd.grad(values.sum(), spread)
    assert float(grad[0]) == pytest.approx(0.5 * (1 - 1e6))


def test_bpr_follows_the_formula() -> None:
    assert_same(
        [normal(10, 5), normal(11, 5, 3)],
        lambda p, n: BPR()((p, n))[0],
        lambda p, n: -(p[:, None] - n).sigmoid().log().mean(1),
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_follows_the_formula(symmetric: bool) -> None:
    def formula(a: Tensor, b: Tensor) -> Tensor:
        alike = F.cosine_similarity(a[:, None], b[None], dim=2) / 0.2
        own = torch.arange(5)
        there = F.cross_entropy(alike, own, reduction="none")
        return 0.5 * (there + F.cross_entropy(alike.T, own, reduction="none")) if symmetric else there

    assert_same([normal(12, 5, 3), normal(13, 5, 3)], lambda a, b: InfoNCE(0.2, symmetric)((a, b))[0], formula)


def test_a_learned_temperature_stays_within_its_bounds_and_can_come_back() -> None:
    loss, views = InfoNCE(0.01, learnable=True), (normal(1, 4, 3), normal(2, 4, 3))
    assert [name for name, _ in loss.named_parameters()] == ["log_temperature"]
    at_the_bound = loss(views)[0]
    with torch.no_grad():
        loss.log_temperature.fill_(math.log(1e-6))
    values, _ = loss(views)
    torch.testing.assert_close(values, at_the_bound, rtol=1e-6, atol=0)
    values.sum().backward()
    assert float(loss.log_temperature.grad) < 0  # a step along it makes the temperature rise


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), views=st.sampled_from([1, 2, 3]), classes=st.integers(1, 5))
def test_supervised_contrastive_loss_follows_the_formula(seed: int, views: int, classes: int) -> None:
    labels, temperature = whole(seed, classes, 5), 0.3
    values, weights = SupervisedContrastive(temperature)(x := normal(seed, 5, views, 4), labels)
    z = F.normalize(x.flatten(0, 1), dim=1)
    owner = [sample for sample in range(5) for _ in range(views)]
    anchors: list[list[float]] = [[] for _ in range(5)]
    for i, sample in enumerate(owner):
        others = [a for a in range(len(z)) if a != i]
        below = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
        positives = [a for a in others if labels[owner[a]] == labels[sample]]
        if positives:
            terms = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / below) for p in positives]
            anchors[sample].append(-sum(terms) / len(terms))
    assert weights is not None
    assert weights.tolist() == [float(len(found) > 0) for found in anchors]
    expected = [sum(found) / len(found) if found else 0.0 for found in anchors]
    assert values.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kullback_leibler_divergence_is_that_of_torch(temperature: float) -> None:
    targets = torch.cat([normal(14, 4, 3).softmax(1), torch.eye(3, dtype=torch.float64)])
    logits, teacher = normal(15, 7, 3), normal(16, 7, 3)

    def divergence(x: Tensor, q: Tensor) -> Tensor:
        return temperature**2 * F.kl_div((x / temperature).log_softmax(1), q, reduction="none").sum(1)

    assert_same([logits], lambda x: KLDivergence(temperature)(x, targets)[0], lambda x: divergence(x, targets))
    assert_same(
        [logits],
        lambda x: KLDivergence(temperature, target_logits=True)(x, teacher)[0],
        lambda x: divergence(x, (teacher / temperature).softmax(1)),
    )
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    torch.testing.assert_close(KLDivergence()(logits, labels)[0], F.cross_entropy(logits, labels, reduction="none"))


def test_ctc_is_the_sum_over_all_alignments() -> None:
    logits, target, blank = normal(17, 1, 4, 3), [1, 2], 0
    p = logits[0].softmax(1)

    def collapsed(path: tuple[int, ...]) -> list[int]:
        return [label for label, _ in itertools.groupby(path) if label != blank]

    paths = [path for path in itertools.product(range(3), repeat=4) if collapsed(path) == target]
    likelihood = sum(math.prod(float(p[step, label]) for step, label in enumerate(path)) for path in paths)
    values, weights = CTC()(logits, torch.tensor([[1, 2, -1]]))
    assert values.tolist() == pytest.approx([-math.log(likelihood) / 2])
    assert weights is not None
    assert weights.tolist() == [1.0]


def test_ctc_is_that_of_torch_and_leaves_out_what_fits_no_alignment() -> None:
    logits, lengths = normal(18, 4, 5, 4), torch.tensor([5, 4, 3, 2])
    targets = torch.tensor([[1, 2, 3], [3, 3, -1], [1, 1, 1], [2, -1, -1]])
    counts = torch.tensor([3, 2, 3, 1])
    expected = F.ctc_loss(
        logits.log_softmax(2).transpose(0, 1), targets.clamp_min(0), lengths, counts, reduction="none"
    )
    assert torch.isinf(expected[2])  # three equal labels need five steps
    logits.requires_grad_()
    values, weights = CTC()((logits, lengths), targets)
    assert weights is not None
    assert weights.tolist() == [1, 1, 0, 1]
    assert float(values[2].detach()) == 0.0
    kept = torch.tensor([0, 1, 3])
    torch.testing.assert_close(values[kept], (expected / counts)[kept])
    (grad,) = torch.autograd.grad(values.sum(), logits)
    assert torch.equal(grad[2], torch.zeros(5, 4, dtype=torch.float64))
    assert float(grad[1, 4].abs().sum()) == 0.0  # beyond the length


def temi_formula(student: Tensor, teacher: Tensor, marginal: Tensor, beta: float, weighting: bool) -> Tensor:
    """As in the paper, with probabilities and not with their logarithms."""
    p, q = (student / 0.1).softmax(3), (teacher / 0.04).softmax(3)
    pairs = [(v, w) for v in range(p.shape[1]) for w in range(p.shape[1]) if v != w]
    information = sum(((p[:, v] * q[:, w]) ** beta / marginal).sum(2).log() for v, w in pairs) / len(pairs)
    weight = sum((q[:, v] * q[:, w]).sum(2).mean(1) for v, w in pairs) / len(pairs)
    return -information.mean(1) * (weight if weighting else 1)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), beta=st.floats(0.5, 1), views=st.sampled_from([2, 3]), weighting=st.booleans())
def test_temi_follows_the_formula(seed: int, beta: float, views: int, weighting: bool) -> None:
    student, teacher = normal(seed, 5, views, 2, 4, scale=0.2), normal(seed + 1, 5, views, 2, 4, scale=0.1)
    loss = TEMI(4, heads=2, beta=beta, teacher_weighting=weighting).double()
    loss.marginal.copy_(normal(seed + 2, 2, 4).softmax(1))
    before = loss.marginal.clone()
    moved = 0.9 * before + 0.1 * (teacher / 0.04).softmax(3).mean((0, 1))
    values, weights = loss((student, teacher))
    assert weights is None
    torch.testing.assert_close(loss.marginal, moved)
    torch.testing.assert_close(values, temi_formula(student, teacher, moved, beta, weighting))
    kept = loss.marginal.clone()
    torch.testing.assert_close(loss.eval()({"student": student, "teacher": teacher})[0], values)
    assert torch.equal(loss.marginal, kept)  # only training moves it
    teacher.requires_grad_()
    assert not loss((student, teacher))[0].requires_grad


def test_temi_can_leave_out_a_head_that_went_bad() -> None:
    student, teacher = normal(1, 5, 2, 2, 3), normal(2, 5, 2, 2, 3)
    bad = student.clone()
    bad[3, 1, 0, 2] = math.nan
    bad.requires_grad_()
    loss, alone = TEMI(3, heads=2, leave_out_bad_heads=True).double(), TEMI(3).double()
    values, _ = loss((bad, teacher))
    torch.testing.assert_close(values, alone((student[:, :, 1], teacher[:, :, 1]))[0])
    (grad,) = torch.autograd.grad(values.sum(), bad)
    assert torch.equal(grad[:, :, 0], torch.zeros(5, 2, 3, dtype=torch.float64))
    torch.testing.assert_close(loss.marginal, torch.cat([torch.full((1, 3), 1 / 3).double(), alone.marginal]))
    assert torch.isnan(TEMI(3, heads=2).double()((bad, teacher))[0][3])


@pytest.mark.parametrize("inner", [CrossEntropy(0.1), FocalLoss(2.0, [1, 2, 3]), KLDivergence()])
def test_the_z_loss_adds_the_square_of_the_log_partition(inner: torch.nn.Module) -> None:
    logits, targets = normal(19, 6, 3), whole(20, 3, 6)
    values, weights = ZLoss(inner, 0.01)(logits, targets)
    expected, expected_weights = inner(logits, targets)
    torch.testing.assert_close(values, expected + 0.01 * logits.exp().sum(1).log() ** 2)
    assert weights is expected_weights or torch.equal(weights, expected_weights)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: BinaryCrossEntropy(0.0), ["positive_weight", "above 0"]),
        (lambda: BinaryFocalLoss(alpha=1.0), ["alpha", "below 1"]),
        (lambda: Dice(0.0), ["smooth", "above 0"]),
        (lambda: Huber(math.inf), ["delta", "inf"]),
        (lambda: GaussianNLL(floor=-1.0), ["floor", "-1.0"]),
        (lambda: InfoNCE(0.001), ["temperature", "0.01 to 100"]),
        (lambda: SupervisedContrastive(math.nan), ["temperature", "nan"]),
        (lambda: KLDivergence(0.0), ["temperature", "from 0.05"]),
        (lambda: CTC(blank=-1), ["blank", "-1"]),
        (lambda: CTC(blank=1, padding=1), ["blank and padding", "-1"]),
        (lambda: TEMI(1), ["num_classes", "from 2"]),
        (lambda: TEMI(3, beta=0.4), ["beta", "0.5 to 1"]),
        (lambda: TEMI(3, student_temperature=0.01), ["student_temperature", "0.05"]),
        (lambda: TEMI(3, teacher_temperature=0.01), ["teacher_temperature", "0.04"]),
        (lambda: ZLoss(MeanSquaredError()), ["MeanSquaredError", "FocalLoss", "loss@loss.loss"]),
        (lambda: CrossEntropy(ignore_index=0.5), ["ignore_index", "0.5"]),
        (lambda: MeanSquaredError()(torch.zeros(4, 1), torch.zeros(4, 2)), ["[4, 1]", "[4, 2]"]),
        (lambda: MeanSquaredError()(torch.zeros(4, 1), torch.zeros(1, 4)), ["[4, 1]", "[1, 4]"]),
        (lambda: MeanSquaredError()((torch.zeros(4),), torch.zeros(4)), ["tuple", "one tensor"]),
        (lambda: BPR()(torch.zeros(4, 3)), ["[4, 3]", "scores"]),
        (lambda: InfoNCE()((torch.zeros(4, 3), torch.zeros(4, 2))), ["[4, 3]", "[4, 2]"]),
        (lambda: SupervisedContrastive()(torch.zeros(4, 3), torch.zeros(4)), ["float32", "class numbers"]),
        (lambda: CTC()(torch.zeros(4, 3), torch.zeros(4, 2)), ["[4, 3]", "steps"]),
        (lambda: TEMI(3)((torch.zeros(4, 2, 3), torch.zeros(4, 2, 2))), ["[4, 2, 1, 2]", "[B, 2 or more, 1, 3]"]),
    ],
)
def test_what_cannot_be_used_gets_one_message(build: object, words: list[str]) -> None:
    assert callable(build)
    with pytest.raises(ConfigurationError) as error:
        build()
    assert all(word in str(error.value) for word in words), error.value
