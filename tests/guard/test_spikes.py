"""Spikes: finite steps far above recent history; and divergence, a loss that climbs and stays up."""

from __future__ import annotations

import io
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard import Policy, StepGuard, Verdict, spikes
from stabletrain.guard.spikes import Divergence, LogSeries, SpikeWindow

from .worlds import Case, Poison, World, differences

NAN, INF = math.nan, math.inf
positive = st.floats(min_value=1e-30, max_value=1e30)
ways = pytest.mark.parametrize("keep_on_device", [False, True])


def expected_limit(values: Sequence[float], floor: float, size: int = 128) -> float:
    """Compute the limit by its formula, in float64 and by sorting."""
    logarithms = [math.log(value) for value in values[-size:]]
    median = statistics.median(logarithms)
    deviation = statistics.median(abs(logarithm - median) for logarithm in logarithms)
    usual = math.exp(median) * min(math.exp(min(6 * deviation, 100)), 1000)
    return max(usual, floor * max(value * 0.5 ** (age / 500) for age, value in enumerate(reversed(values))))


def noise(seed: int, count: int, spread: float, level: float = 1.0) -> list[float]:
    """Draw numbers whose logarithms are normally distributed."""
    draw = random.Random(seed)
    return [level * math.exp(draw.gauss(0, spread)) for _ in range(count)]


class Told:
    """A guarded model of one weight whose steps have exactly the loss and the gradient norm that are asked for."""

    def __init__(self, keep_on_device: bool = False, **policy: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, fused=True)
        settings = {"spikes": True, "max_rejected": 1000, "window": 1000, **policy}
        self.guard = StepGuard(
            self.model, self.optimizer, max_norm=1.0, policy=Policy(**settings), keep_on_device=keep_on_device
        )

    def step(self, loss: float = 1.0, norm: float = 1.0) -> Verdict:
        output = self.model(torch.ones(1, 1, dtype=torch.float64)).sum()
        value = output - output.detach() + loss
        value.backward()
        assert self.model.weight.grad is not None
        self.model.weight.grad.fill_(norm)
        verdict = self.guard.step(value)
        self.guard.settle()
        return verdict

    @property
    def weight(self) -> Tensor:
        return self.model.weight.detach().clone()


# The window.


@pytest.mark.parametrize("count", [*range(1, 40), 100, 127, 128, 129, 300])
@pytest.mark.parametrize("ties", [False, True])
def test_median_and_deviation_are_those_of_the_latest_values(count: int, ties: bool) -> None:
    series = LogSeries(128)
    values = noise(count, count, 2.0)
    values = [math.exp(round(math.log(value))) for value in values] if ties else values
    for value in values:
        series.add(value)
    logarithms = [math.log(value) for value in values[-128:]]
    median = statistics.median(logarithms)
    deviation = statistics.median(abs(logarithm - median) for logarithm in logarithms)
    assert series.median_and_deviation() == pytest.approx((median, deviation), abs=1e-12)
    assert len(series) == min(count, 128) and series.state_dict()["logarithms"] == logarithms


@given(st.lists(positive, min_size=10, max_size=60), st.lists(positive, min_size=10, max_size=60))
def test_limits_follow_the_formula(losses: list[float], norms: list[float]) -> None:
    window = SpikeWindow(16, floor=5.0, loss_floor=3.0)
    for loss in losses:
        window.accept(loss=loss, grad_norm=NAN)
    for norm in norms:
        window.accept(loss=NAN, grad_norm=norm)
    expected = expected_limit(losses, 3.0, 16), expected_limit(norms, 5.0, 16)
    assert window.limits() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("deviation", "limit"), [(0.0, 5.0), (0.2, 5.0 * math.exp(0.2)), (0.5, math.exp(3)), (2.0, 1000.0)]
)
def test_the_limit_has_a_floor_and_a_cap(deviation: float, limit: float) -> None:
    window = SpikeWindow(floor=5.0)
    for position in range(128):
        window.accept(loss=1.0, grad_norm=math.exp(deviation if position % 2 else -deviation))
    assert window.limits()[1] == pytest.approx(limit)


def test_a_peak_fades_by_half_in_500_updates() -> None:
    window = SpikeWindow(floor=5.0)
    window.accept(loss=1.0, grad_norm=1000.0)
    for _ in range(500):
        window.accept(loss=1.0, grad_norm=1.0)
    assert window.limits()[1] == pytest.approx(2500.0)
    for _ in range(5000):
        window.accept(loss=1.0, grad_norm=1.0)
    assert window.limits()[1] == pytest.approx(5.0)


def test_a_network_that_has_learned_its_data_may_still_be_wrong_once() -> None:
    """The median falls to a millionth; a gradient as large as in the beginning is healthy, one beyond is not."""
    window = SpikeWindow(floor=10.0)
    for update in range(300):
        window.accept(loss=1.0, grad_norm=5.0 * math.exp(-update / 20))
    assert 5.0 < window.limits()[1] < 50.0


def test_there_is_no_limit_before_ten_updates() -> None:
    window = SpikeWindow()
    for _ in range(9):
        window.accept(loss=1.0, grad_norm=1.0)
        assert window.limits() == (INF, INF)
    window.accept(loss=1.0, grad_norm=-1.0)
    assert window.limits()[0] < INF and window.limits()[1] == INF
    window.accept(loss=1.0, grad_norm=1.0)
    assert window.limits()[1] < INF


JUNK = (NAN, INF, -INF, 0.0, -0.0, -1.0, -1e300)


@given(st.lists(st.one_of(positive, st.sampled_from(JUNK)), max_size=60))
def test_what_is_not_finite_and_positive_was_never_there(values: list[float]) -> None:
    told, spared = SpikeWindow(12), SpikeWindow(12)
    for value in values:
        told.accept(loss=value, grad_norm=value)
        if value in JUNK or math.isnan(value):
            continue
        spared.accept(loss=value, grad_norm=value)
        assert told.limits() == spared.limits()
    assert told.state_dict() == spared.state_dict() and told.limits() == spared.limits()


def test_the_largest_and_smallest_floats_are_no_trouble() -> None:
    window = SpikeWindow()
    for _ in range(10):
        window.accept(loss=1.7e308, grad_norm=5e-324)
    assert all(math.isfinite(limit) for limit in window.limits())


def test_the_window_goes_on_from_its_state() -> None:
    window, values = SpikeWindow(20), noise(3, 90, 1.0)
    for value in values[:50]:
        window.accept(loss=value, grad_norm=1 / value)
    file = io.BytesIO()
    torch.save(window.state_dict(), file)
    file.seek(0)
    other = SpikeWindow(20)
    for _ in range(30):
        other.accept(loss=9.0, grad_norm=9.0)
    assert other.limits() != window.limits()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.limits() == window.limits()
    for value in values[50:]:
        for one in (window, other):
            one.accept(loss=value, grad_norm=1 / value)
        assert other.limits() == window.limits() and other.state_dict() == window.state_dict()


def test_a_smaller_window_keeps_the_latest_values() -> None:
    window, smaller, fresh = SpikeWindow(100), SpikeWindow(12), SpikeWindow(12)
    for value in noise(4, 60, 1.0):
        window.accept(loss=value, grad_norm=value)
        fresh.accept(loss=value, grad_norm=value)
    smaller.load_state_dict(window.state_dict())
    assert smaller.state_dict() == fresh.state_dict() and smaller.limits() == fresh.limits()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"spike_window": 9}, "spike_window is 9; it must be at least 10"),
        ({"spike_floor": 0.5}, "spike_floor is 0.5; it must be a finite number of at least 1"),
        ({"spike_floor": NAN}, "spike_floor is nan"),
        ({"spike_floor": INF}, "spike_floor is inf"),
    ],
)
def test_a_window_that_cannot_work_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Policy(**settings)
    assert Policy(spike_window=10, spike_floor=1.0).spike_window == 10


def test_both_excesses_are_described() -> None:
    assert spikes.describe(1.0, 2.0, (1.0, 2.0)) is None
    assert spikes.describe(3.0, 2.0, (1.5, 2.0)) == "the loss is 3, above 1.5, the limit from recent updates"
    both = spikes.describe(3.0, 5.0, (1.5, 2.5))
    assert both is not None and both.startswith("the gradient norm is 5, above 2.5") and "and the loss is 3" in both


# The guard.


@ways
@pytest.mark.parametrize("place", ["loss", "gradient norm"])
def test_a_spike_is_rejected_from_the_tenth_update_on(place: str, keep_on_device: bool) -> None:
    told = Told(keep_on_device)
    for _ in range(9):
        assert told.step().applied
    loss_limit, norm_limit = 10.0 * told.guard.spikes.loss_floor, 10.0 * told.guard.spikes.floor
    spike = {"loss": loss_limit} if place == "loss" else {"norm": norm_limit}
    assert told.step(1.0, 1.0).applied
    weight, window = told.weight, told.guard.spikes.state_dict()
    for _ in range(300):
        verdict = told.step(**spike)
        assert (verdict.applied, verdict.reason) == (False, "spike")
        assert verdict.detail.startswith(f"the {place} is ") and "above" in verdict.detail
        assert (verdict.loss, verdict.grad_norm) == (spike.get("loss", 1.0), pytest.approx(spike.get("norm", 1.0)))
    assert torch.equal(told.weight, weight) and told.guard.spikes.state_dict() == window
    assert told.step().applied and told.guard.spikes.state_dict() != window
    assert told.guard.stats.reasons == {"spike": 300}


@ways
def test_before_that_there_is_no_telling(keep_on_device: bool) -> None:
    told = Told(keep_on_device)
    for _ in range(9):
        assert told.step().applied
    assert told.step(1e9, 1e9).applied


@ways
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(10, 160),
    spread=st.floats(0, 4),
    level=st.floats(1e-20, 1e20),
    place=st.sampled_from(["loss", "norm"]),
)
def test_a_planted_spike_of_twice_the_limit_is_always_caught(
    keep_on_device: bool, seed: int, count: int, spread: float, level: float, place: str
) -> None:
    """Whatever came before; half the limit passes, and none of the rejected steps is remembered."""
    told = Told(keep_on_device)
    for value in noise(seed, count, spread, level):
        told.step(value, value)
    limits = dict(zip(("loss", "norm"), told.guard.spikes.limits(), strict=True))
    usual = dict.fromkeys(limits, min(limits.values()) / 2)
    weight, window = told.weight, told.guard.spikes.state_dict()
    for _ in range(3):
        verdict = told.step(**{**usual, place: 2 * limits[place]})
        assert verdict.reason == "spike" and torch.equal(told.weight, weight)
    assert told.guard.spikes.state_dict() == window and told.step(**usual).applied


@ways
def test_only_applied_steps_are_remembered(keep_on_device: bool) -> None:
    told, spared = Told(keep_on_device), Told(keep_on_device)
    for position, value in enumerate(noise(6, 60, 0.5)):
        if position % 4 == 1:
            assert not told.step(NAN if position % 8 == 1 else INF, value).applied
        if position % 4 == 2:
            assert not told.step(value, INF).applied
        if position % 4 == 3 and position > 12:
            assert told.step(value, 1e9 * value).reason == "spike"
        for one in (told, spared):
            assert one.step(value, value).applied
        assert told.guard.spikes.limits() == spared.guard.spikes.limits()
    assert told.guard.spikes.state_dict() == spared.guard.spikes.state_dict()


@ways
def test_other_faults_are_named_first(keep_on_device: bool) -> None:
    told = Told(keep_on_device)
    for _ in range(12):
        told.step()
    assert told.step(NAN, 1e9).reason == "loss"
    assert told.step(1e9, INF).reason == "gradient"
    told.optimizer.param_groups[0]["lr"] = -1.0
    assert told.step(1e9, 1e9).reason == "optimizer"


@ways
def test_losses_of_zero_and_below_have_no_limit(keep_on_device: bool) -> None:
    told = Told(keep_on_device)
    for position in range(200):
        assert told.step(-1000.0 if position % 2 else 0.0).applied
    assert told.guard.spikes.limits()[0] == INF and told.step(1e6).applied
    assert told.step(-1.0, 1e6).reason == "spike"


@ways
@pytest.mark.parametrize("policy", [{"spikes": False}, {"on_rejection": "none"}])
def test_without_the_rule_everything_finite_is_applied(policy: dict[str, Any], keep_on_device: bool) -> None:
    told = Told(keep_on_device, **policy)
    for _ in range(20):
        told.step()
    assert told.step(1e9, 1e9).applied


def test_the_policy_sets_window_and_floor() -> None:
    told = Told(spike_floor=500.0, spike_window=10)
    for norm in [1.0] * 30 + [10.0] * 10:
        told.step(norm=norm)
    assert told.guard.spikes.limits()[1] == pytest.approx(5000.0)


@ways
def test_the_window_travels_with_the_guard(keep_on_device: bool) -> None:
    told, other = Told(keep_on_device), Told(keep_on_device)
    values = noise(7, 60, 1.0)
    for value in values[:40]:
        told.step(value, value)
    other.guard.load_state_dict(told.guard.state_dict())
    assert other.guard.spikes.limits() == told.guard.spikes.limits() != (INF, INF)
    assert other.guard.state_dict() == told.guard.state_dict()
    assert other.step(1.0, 2 * other.guard.spikes.limits()[1]).reason == "spike"


def test_a_level_that_rises_for_good_spends_the_budget() -> None:
    told = Told(max_rejected=5)
    for _ in range(20):
        told.step()
    for _ in range(5):
        assert told.step(norm=2000.0).reason == "spike"
    with pytest.raises(UnstableTraining, match=r"6 of the last 26 steps .* for its spike: the gradient norm is 2000"):
        told.step(norm=2000.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@ways
def test_a_rejected_spike_leaves_no_trace(precision: str, keep_on_device: bool) -> None:
    """With batch normalisation, momentum, loss scaling and a schedule: as if the step had never been run."""
    case = Case(Poison("loss", 1e6), "batch norm", "fused adamw", precision)
    policy = Policy(max_rejected=1000, spikes=True)
    poisoned, holed = (World(case, keep_on_device=keep_on_device, policy=policy) for _ in range(2))
    for position in range(16):
        if position in (11, 13):
            assert poisoned.step(position, case.poison).reason == "spike"
            continue
        for world in (poisoned, holed):
            assert world.step(position).applied
    for world in (poisoned, holed):
        world.guard.settle()
    assert not differences(poisoned.state(), holed.state())
    assert poisoned.guard.spikes.state_dict() == holed.guard.spikes.state_dict()


# Divergence.


def first_alarm(losses: Sequence[float], **how: Any) -> int | None:
    detector = Divergence(**how)
    return next((index for index, loss in enumerate(losses) if detector.observe(loss) is not None), None)


def allowance(logarithms: list[float], updates: int) -> float:
    """By how much their mean may be off: a root of their number, or two standard errors if that is less."""
    count, unknown = len(logarithms), math.log(math.sqrt(updates / len(logarithms)))
    if count < 3:
        return unknown
    return min(unknown, max(math.log(1.5), 2 * statistics.stdev(logarithms) / math.sqrt(count)))


def expected_alarm(losses: Sequence[float], factor: float, updates: int) -> int | None:
    """Say when the detector speaks, by its definition."""
    logarithms = list(map(math.log, losses))
    averages = [math.fsum(logarithms[:count]) / count for count in range(1, updates + 1)]
    levels = [average + allowance(logarithms[:count], updates) for count, average in enumerate(averages, start=1)]
    for logarithm in logarithms[updates:]:
        averages.append(averages[-1] + (logarithm - averages[-1]) / updates)
        levels.append(averages[-1])
    above = lost = 0
    goal = math.inf
    for index, average in enumerate(averages):
        best = min(levels[: index + 1])
        above = above + 1 if average > best + math.log(factor) else 0
        if index < 3 or best < averages[2] - math.log(2):
            lost = 0
        elif lost:
            lost = lost + 1 if average > goal else 0
        elif average > best + math.log(factor):
            lost, goal = 1, min(best, averages[2]) + math.log(0.9)
        if above == updates or lost == 2 * updates:
            return index
    return None


@pytest.mark.parametrize(("factor", "updates"), [(3.0, 20), (1.5, 7), (2.0, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_divergence_is_what_its_definition_says(seed: int, factor: float, updates: int) -> None:
    draw = random.Random(seed)
    levels = [*(5 * 0.97**step for step in range(80)), *(0.45 * 1.03**step for step in range(150))]
    losses = [level * math.exp(draw.gauss(0, 0.3)) for level in levels]
    expected = expected_alarm(losses, factor, updates)
    assert expected is not None and first_alarm(losses, factor=factor, updates=updates) == expected


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 500,
        [5 * 0.98**step for step in range(500)],
        noise(8, 500, 1.0),
        [*[1.0] * 100, *[1e4] * 5, *[1.0] * 300],  # a few high ones
        [*[1.0] * 100, *[2.5] * 400],  # up, but by less than the factor
        [0.3, *[2.0] * 400],  # the first one low by chance
    ],
)
def test_healthy_losses_do_not_diverge(losses: list[float]) -> None:
    assert first_alarm(losses, factor=3.0, updates=50) is None


def test_what_a_few_scattered_losses_show_is_no_level_to_be_held_to() -> None:
    divergence = Divergence(factor=2.0, updates=200)
    scattered = [-3.0, 1.0] * 5 + [-2.0, 2.0] * 300  # logarithms; by chance, the first ones are lower
    assert not any(divergence.observe(math.exp(one)) for one in scattered)


def test_a_divergence_that_was_saved_with_less_in_it_is_taken_up() -> None:
    divergence = Divergence(factor=2.0, updates=20)
    divergence.load_state_dict({"seen": 5, "average": 0.5, "square": 0.5, "best": 0.4, "above": 1, "first": 0.6})
    assert (divergence.at_ease, divergence.wary) == (False, False)


def test_a_training_that_explodes_at_once_has_diverged() -> None:
    alarm = first_alarm([2.5, *[1000.0] * 60, *[100.0] * 60], factor=3.0, updates=50)
    assert alarm is not None and 49 < alarm < 60


def test_a_training_that_explodes_and_ends_at_chance_has_diverged() -> None:
    """As digits do at 100 times the right rate: up to ten times the first loss, and back to that of a guess."""
    rise = [2.4 * (1 + 12 * math.sin(math.pi * min(step, 110) / 110)) for step in range(400)]
    losses = [loss * math.exp(jitter) for loss, jitter in zip(rise, map(math.log, noise(4, 400, 0.3)), strict=True)]
    alarm = first_alarm(losses, factor=3.0, updates=50)
    assert alarm is not None and alarm < 100


def collapsed(height: float) -> list[float]:
    """Thrown off for 24 updates, and then at the loss of a guess for ever."""
    return [*[2.0] * 20, *[height] * 24, *[2.3] * 300]


def detector_after(losses: Sequence[float], wary: bool) -> tuple[Divergence, list[str | None]]:
    detector = Divergence(factor=3.0, updates=20)
    detector.wary = wary
    return detector, [detector.observe(loss) for loss in losses]


@pytest.mark.parametrize(("height", "wary"), [(14.0, False), (6.0, True)])
def test_a_training_that_falls_back_to_a_guess_has_diverged(height: float, wary: bool) -> None:
    """Not for long enough to be seen as above its best, but it had learned next to nothing, and never does."""
    losses = collapsed(height)
    _, said = detector_after(losses, wary)
    first = next(index for index, words in enumerate(said) if words is not None)
    rise = next(n for n in range(len(losses)) if not detector_after(losses[: n + 1], wary)[0].at_ease)
    assert (first, 25 < rise < 44) == (rise + 39, True)
    words = said[first]
    assert words is not None and "hasn't come down to 1.8, below its best, for 40 updates; it is at 2." in words


@pytest.mark.parametrize("wary", [False, True])
@pytest.mark.parametrize(
    "losses",
    [
        [*[2.0] * 20, *[14.0] * 24, *[0.5] * 300],  # better than ever afterwards
        [*[2.0] * 20, *[0.5] * 60, *[2.3] * 7, *[0.6] * 300],  # it had learned much
        [*[2.0] * 20, *[3.0] * 300],  # by less than the root of the factor
        [*[2.0] * 2, *[3.6] * 300],  # that is its first level
    ],
)
def test_others_are_left_alone(losses: list[float], wary: bool) -> None:
    detector, said = detector_after(losses, wary)
    assert set(said) == {None}
    assert detector.at_ease


def test_the_count_goes_on_from_its_state() -> None:
    for cut in (2, 3, 30, 60):
        first, second = Divergence(updates=20), Divergence(updates=20)
        first.wary = cut > 3
        for loss in collapsed(14.0)[:cut]:
            first.observe(loss)
        for _ in range(50):
            second.observe(30.0)
        second.load_state_dict(first.state_dict())
        for loss in collapsed(14.0)[cut:]:
            assert first.observe(loss) == second.observe(loss)
        assert first.state_dict() == second.state_dict()


def test_an_alarm_says_how_far_above_the_best() -> None:
    detector = Divergence(factor=3.0, updates=10)
    said = [detector.observe(loss) for loss in [0.5] * 20 + [8.0] * 100]
    assert said[-1] is not None and "above 3 times its best level of 0.5 for 96 updates; it is at 7.999" in said[-1]


def test_a_return_below_the_factor_begins_the_count_anew() -> None:
    losses = [*[1.0] * 10, *[20.0] * 9, *[0.01] * 6, *[20.0] * 200]
    detector = Divergence(factor=3.0, updates=10)
    for loss in losses[:25]:
        assert detector.observe(loss) is None
    assert detector.state_dict()["above"] == 0


@given(st.lists(st.one_of(positive, st.sampled_from(JUNK)), max_size=60))
def test_losses_that_have_no_logarithm_are_left_out(losses: list[float]) -> None:
    told, spared = Divergence(updates=5), Divergence(updates=5)
    for loss in losses:
        said = told.observe(loss)
        if loss in JUNK or math.isnan(loss):
            assert said is None
        else:
            assert said == spared.observe(loss)
    assert told.state_dict() == spared.state_dict()


@pytest.mark.parametrize("loss", JUNK)
def test_such_a_loss_leaves_the_detector_as_it_is(loss: float) -> None:
    detector = Divergence(updates=5)
    detector.observe(2.0)
    before = detector.state_dict()
    assert detector.observe(loss) is None and detector.state_dict() == before


def test_the_detector_goes_on_from_its_state() -> None:
    losses = [*noise(9, 40, 0.2), *noise(10, 100, 0.2, 30.0)]
    whole = Divergence(updates=10)
    said = [whole.observe(loss) for loss in losses]
    for cut in (5, 39, 55):
        first, second = Divergence(updates=10), Divergence(updates=10)
        for loss in losses[:cut]:
            first.observe(loss)
        second.load_state_dict(first.state_dict())
        assert [second.observe(loss) for loss in losses[cut:]] == said[cut:]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"factor": 1.0}, "diverged_factor is 1.0; it must be a finite number above 1"),
        ({"factor": INF}, "diverged_factor is inf"),
        ({"updates": 0}, "diverged_updates is 0; it must be at least 1"),
    ],
)
def test_a_detector_that_cannot_work_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Divergence(**settings)
