"""The copy of what a forward may change."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from stabletrain.guard import Snapshot, StepGuard

from . import models


@pytest.mark.parametrize("name", models.MODELS)
def test_restoring_twice_gives_the_same(name: str) -> None:
    """Two forwards, each undone, from the same copy."""
    model = models.build(name)
    extra = models.outside_state(model)
    snapshot = Snapshot([model], extra)

    def state() -> list[Tensor]:
        outside = [item.get_state() for item in extra if isinstance(item, torch.Generator)]
        outside += [item.clone() for item in extra if isinstance(item, Tensor)]
        counted = [torch.tensor(item.forwards) for item in extra if isinstance(item, models.Counter)]
        return [item.clone() for item in model.state_dict().values()] + outside + counted + [torch.get_rng_state()]

    inputs, words = torch.randn(6, models.FEATURES), torch.randint(models.WORDS, (6,))
    for _ in range(2):
        before = state()
        snapshot.take()
        for _ in range(2):
            model(inputs, words)
            snapshot.note_moved_parameters()
            snapshot.restore()
            after = state()
            assert len(after) == len(before)
            assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
        model(inputs, words)


def test_the_same_tensors_stay_in_place() -> None:
    """Whoever holds a buffer keeps the right one."""
    layer = nn.BatchNorm1d(2)
    held = layer.running_mean
    snapshot = Snapshot([layer])
    snapshot.take()
    layer(torch.randn(4, 2))
    snapshot.restore()
    assert layer.running_mean is held and torch.equal(layer.running_mean, torch.zeros(2))


def test_memory_is_reused_from_step_to_step() -> None:
    layer = nn.BatchNorm1d(2)
    snapshot = Snapshot([layer])
    snapshot.take()
    first = [copied.data_ptr() for _, _, copied in snapshot.buffers()]
    layer(torch.randn(4, 2))
    snapshot.take()
    found = snapshot.buffers()
    assert [copied.data_ptr() for _, _, copied in found] == first
    assert all(torch.equal(now, copied) for _, now, copied in found)


def test_a_first_buffer_of_a_module_that_had_none_is_taken_away() -> None:
    layer = nn.Linear(2, 2)
    snapshot = Snapshot([nn.Sequential(layer)])
    snapshot.take()
    layer.register_buffer("late", torch.ones(1))
    snapshot.restore()
    assert not list(layer.buffers())


def test_a_buffer_of_another_precision_is_copied_anew() -> None:
    layer = nn.BatchNorm1d(2)
    snapshot = Snapshot([layer])
    snapshot.take()
    layer.running_mean.data = torch.full((2,), 1e-12, dtype=torch.float64)
    snapshot.take()
    layer.running_mean.data.fill_(3.0)
    snapshot.restore()
    assert layer.running_mean.dtype == torch.float64 and layer.running_mean.tolist() == [1e-12, 1e-12]


def test_a_module_with_another_kind_of_max_norm_is_no_embedding() -> None:
    class Capped(nn.Module):
        max_norm = 1.0

    snapshot = Snapshot([Capped()])
    snapshot.take()
    snapshot.restore()
    assert not snapshot.taken


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.changes = False

    def forward(self, inputs: Tensor) -> Tensor:
        if self.changes:
            with torch.no_grad():
                self.weight.mul_(0.5)
        return inputs * self.weight


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_a_parameter_that_begins_to_move_is_reported_and_copied_from_then_on() -> None:
    module = Sometimes()
    snapshot = Snapshot([module])
    heard, log = Heard(), logging.getLogger("stabletrain.guard.snapshot")
    log.addHandler(heard)
    for changes, expected in ((False, 1.0), (True, 0.5), (True, 0.5)):
        module.changes = changes
        snapshot.take()
        module(torch.ones(2))
        snapshot.note_moved_parameters()
        snapshot.restore()
        assert module.weight.tolist() == [expected] * 2
    log.removeHandler(heard)
    assert len(heard.messages) == 1 and "changed 1 parameters that no forward had changed before" in heard.messages[0]


def test_after_the_first_step_only_parameters_that_move_are_copied() -> None:
    """Copying them all would cost the memory of a second model."""
    for name, moving in (("batch norm", 0), ("embedding with max_norm", 1), ("parameter changed through .data", 1)):
        model = models.build(name)
        with torch.no_grad():
            model.last.bias[0] = float("nan")  # NaN is what it was before
        guard = StepGuard(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(2):
            loss = model(torch.randn(6, models.FEATURES), torch.zeros(6, dtype=torch.int64)).mean()
            loss.backward()
            assert len(guard._snapshot._parameter_copies) in (moving, len(list(model.parameters())))
            guard.step(loss)
            assert len(guard._snapshot._parameter_copies) == moving
        model(torch.randn(6, models.FEATURES), torch.zeros(6, dtype=torch.int64))
        assert len(guard._snapshot._parameter_copies) == moving


def test_a_module_in_extra_is_copied_whole_also_where_no_change_was_seen() -> None:
    teacher = nn.Linear(2, 2)
    snapshot = Snapshot([nn.Linear(2, 2)], [teacher])
    for changes in (False, True):
        before = teacher.weight.clone()
        snapshot.take()
        teacher.weight.data.add_(1.0 if changes else 0.0)
        snapshot.note_moved_parameters()
        snapshot.restore()
        assert torch.equal(teacher.weight, before)


@pytest.mark.parametrize("rejected", [True, False])
def test_restore_where_selects_and_never_multiplies(rejected: bool) -> None:
    layer = nn.BatchNorm1d(2)
    snapshot = Snapshot([layer])
    snapshot.take()
    layer(torch.full((4, 2), float("nan")))
    changed = {name: item.clone() for name, item in layer.state_dict().items()}
    assert snapshot.restorable_on_device
    snapshot.restore_where(torch.tensor(rejected))
    wanted = nn.BatchNorm1d(2).state_dict() if rejected else changed
    for name, item in layer.state_dict().items():
        torch.testing.assert_close(item, wanted[name], rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("way", models.OWN_BUFFERS)
def test_buffers_that_change_their_form_are_not_left_to_the_device(way: str) -> None:
    model = models.build(f"own buffer {way}")
    snapshot = Snapshot([model])
    snapshot.take()
    model(torch.randn(6, models.FEATURES), torch.zeros(6, dtype=torch.int64))
    assert snapshot.restorable_on_device == (way in ("in place", "through .data", "reassigned"))
