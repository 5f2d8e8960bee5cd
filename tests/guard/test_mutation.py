"""Deletes one statement of the guard at a time, and shows that the other tests of this folder go red each time.

All of them take half an hour, so `make test` takes every 24th; `make test-mutants` takes all.
"""

from __future__ import annotations

import ast
import copy
import inspect
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from stabletrain.guard import (
    attached,
    clipper,
    hooks,
    ledger,
    loss_scale,
    measure,
    on_device,
    snapshot,
    spikes,
    step_guard,
)

from . import (
    test_attached,
    test_attempt,
    test_clipper,
    test_ledger,
    test_loss_scale,
    test_measure,
    test_on_device,
    test_snapshot,
    test_spikes,
    test_transaction,
    test_traps,
)
from .worlds import Case, Poison

NAN, INF = math.nan, math.inf

PARTS = 48  # tests that the work is divided into, for several processes
TAKEN = range(PARTS) if os.environ.get("MUTANTS") == "all" else range(1)

# Everything that copies, puts back, decides where, or leaves the scaler and the schedule right.
TARGETS: list[tuple[Any, tuple[str, ...]]] = [
    (
        snapshot.Snapshot,
        ("__init__", "restorable_on_device", "take", "note_moved_parameters", "restore", "restore_where", "buffers"),
    ),
    (snapshot, ("_fit", "_identical", "_copy_extra", "_restore_extra")),
    (
        step_guard.StepGuard,
        ("step", "begin", "settle", "load_state_dict", "forget", "remove", "_check_begun", "_judge", "_judge_buffers",
         "_judge_optimizers", "_commit", "_note_applied", "_undo", "_drop_gradients", "_stays_on_device",
         "_step_on_device", "attempt", "begun", "discard", "_count", "call_no_overflow", "attach",
         "observe", "_limit_gradients", "_note_committed"),
    ),
    (
        attached.Attachment,
        ("__init__", "observe", "decide", "settle_scale", "remove", "_before", "_is_due", "_prepare", "_after", "_note",
         "_unscale", "_judge"),
    ),
    (attached, ("_values", "_put_back")),
    (step_guard, ("end_step_of_others",)),
    (clipper.Clipper, ("__init__", "__call__", "state_dict", "load_state_dict")),
    (hooks.BeforeForward, ("__call__",)),
    (hooks.AfterLoading, ("__call__",)),
    (hooks.Hook, ("__deepcopy__", "__reduce__")),
    (on_device, ("honours_found_inf", "_bad_buffers", "_prepare_momentum")),
    (on_device.DeviceStep, ("__init__", "run", "_spike", "_unscale", "_update_scale", "_step_unless")),
    (loss_scale, ("tensors", "copies", "put_back")),
    (measure.BufferJudge, ("bad",)),
    (measure, ("bad_learning_rate", "state_tensors", "have_seen_data")),
    (ledger.Ledger, ("record", "take_back", "correct", "check", "forgive", "state_dict", "load_state_dict")),
    (spikes.LogSeries, ("__init__", "add", "median_and_deviation", "state_dict", "load_state_dict", "_enter")),
    (spikes.SpikeWindow, ("__init__", "accept", "limits", "state_dict", "load_state_dict")),
    (spikes, ("describe", "_limit")),
    (spikes.Divergence, ("__init__", "observe", "_allowance", "_is_lost", "state_dict", "load_state_dict")),
]  # fmt: skip

# Statements that may go without anybody noticing, and why.
RANKS = "there are no others here; what several ranks do is held by test_ranks.py"
DECLARED = "declares what `take` fills"
HARMLESS = {
    "Divergence._is_lost: self._lost = 0": "on its way to such a best the average passes the goal, which sets it to 0",
    "Snapshot.__init__: self.slots: list[BufferSlot] = []": DECLARED,
    "Snapshot.__init__: self._parameter_copies: list[tuple[nn.Parameter, Tensor]] = []": DECLARED,
    "Snapshot.__init__: self._versions: list[int] = []": DECLARED,
    "Snapshot.__init__: self._extra_copies: list[Any] = []": DECLARED,
    "Snapshot.__init__: self._random_states: list[Tensor] = []": DECLARED,
    "Attachment.__init__: self._groups: list[dict[str, Any]] = []": "declares what `_prepare` fills",
    "Attachment.__init__: self._nested = 0": "every decision sets it",
    "StepGuard._judge: facts = agreed(facts, self.ranks, device)": RANKS,
    "StepGuard._judge: if self.ranks.together and (not alone): "
    "device = self.optimizers[0].param_groups[0]['param": RANKS,
    "StepGuard._judge: device = self.optimizers[0].param_groups[0]['params'][0].device": RANKS,
    "DeviceStep.run: loss, faults = self._agreed(loss, faults)": RANKS,
    "DeviceStep.run: overflow = faults[FAULTS.index('overflow')] & ~faults[0]": RANKS,
    "stabletrain.guard.snapshot._identical: now, before = (local(now), local(before))": RANKS,
    "StepGuard.attempt: self._snapshot.note_moved_parameters()": "the rejected step that is run again has noted them",
    "stabletrain.guard.measure.bad_learning_rate: return None": "the last line, where Python returns None by itself",
    "stabletrain.guard.on_device._bad_buffers: if not found: return never": "the CPU needs no tensor on a device",
    "stabletrain.guard.on_device._bad_buffers: return never": "the CPU needs no tensor on a device",
}


def host(model: str, place: str, value: float, **settings: Any) -> Callable[[], object]:
    return lambda: test_transaction.check(Case(Poison(place, value), model, **settings))


def device(model: str, place: str, value: float, **settings: Any) -> Callable[[], object]:
    return lambda: test_on_device.check(Case(Poison(place, value), model, **{"optimizer": "fused adamw", **settings}))


CHECKS: list[Callable[[], object]] = [
    host("batch norm and dropout", "loss", NAN),
    host("batch norm", "gradient", NAN, precision="fp16", ema=True),
    host("batch norm", "gradient", 1e30, precision="fp16", clipping="none"),
    host("layer norm", "loss", NAN, precision="fp16", moment="first"),
    host("outside state", "input", NAN),
    *(host(f"own buffer {way}", "loss", INF, ema=True) for way in test_snapshot.models.OWN_BUFFERS),
    host("embedding with max_norm", "label", NAN),
    host("parameter changed through .data", "backward", INF, moment="first"),
    host("sparse embedding", "gradient", NAN, clipping="value"),
    host("new spectral norm", "gradient", INF, parameters="one without gradient"),
    host("batch norm", "forward", 1e30, parameters="two optimizers", precision="fp16"),
    device("batch norm", "loss", NAN, optimizer="fused sgd momentum", moment="first"),
    device("batch norm", "gradient", NAN, precision="fp16"),
    device("batch norm", "loss", NAN, precision="fp16"),
    device("batch norm", "gradient", 1e30, precision="fp16", clipping="none"),
    device("embedding with max_norm", "input", NAN, clipping="none"),
    device("parameter changed through .data", "input", NAN),
    device("batch norm", "forward", 1e30),
    device("own buffer registered late", "loss", NAN),
    device("own buffer None, then set", "loss", NAN),
    device("own buffer resized", "loss", NAN),
]


def suite() -> Iterator[Callable[[], object]]:
    """Give the quick tests of this folder that need no fixture, once for each of their parameters."""
    for module in MODULES:
        for name, test in vars(module).items():
            if not name.startswith("test_") or isinstance(test, ModuleType) or name in SLOW:
                continue
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            wanted = set(inspect.signature(test).parameters)
            choices: list[dict[str, Any]] = [{}]
            for mark in marks:
                names, values = mark.args
                names = [names] if isinstance(names, str) and "," not in names else names
                rows = [dict(zip(names, [row] if len(names) == 1 else row, strict=True)) for row in values]
                choices = [{**choice, **row} for choice in choices for row in rows]
            if wanted == set(choices[0]):
                yield from (lambda t=test, c=choice: t(**c) for choice in choices)


MODULES = (
    *(test_attached, test_traps, test_snapshot, test_measure, test_on_device),
    *(test_spikes, test_attempt, test_ledger, test_loss_scale, test_clipper),
)
SLOW = {
    "test_nothing_is_read_in_the_steady_state",
    "test_a_rejected_step_leaves_no_trace_on_the_device_either",
    "test_optimizers_that_ignore_found_inf_are_never_asked_to_honour_it",
    # A search for the smallest example takes long.
    "test_the_scale_follows_the_rule",
    "test_a_persistent_nan_ends_by_the_budget",
    "test_a_planted_spike_of_twice_the_limit_is_always_caught",
    "test_limits_follow_the_formula",
    "test_losses_that_have_no_logarithm_are_left_out",
    "test_what_is_not_finite_and_positive_was_never_there",
}


@dataclass
class Mutant:
    """One function without one of its statements."""

    owner: Any
    name: str
    statement: str
    function: Any

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.name}: {self.statement}"


def mutants() -> Iterator[Mutant]:
    """Leave out each statement of each target in turn, but docstrings and assertions."""
    for owner, names in TARGETS:
        for name in names:
            original = inspect.getattr_static(owner, name)
            plain = original.fget if isinstance(original, property) else original
            tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
            module = sys.modules[inspect.unwrap(plain).__module__]
            places = [
                (number, field, index)
                for number, node in enumerate(ast.walk(tree))
                for field in ("body", "orelse", "finalbody")
                if number > 0 and isinstance(getattr(node, field, None), list)
                for index in range(len(getattr(node, field)))
            ]
            for number, field, index in places:
                mutated = copy.deepcopy(tree)
                statements = getattr(list(ast.walk(mutated))[number], field)
                gone = statements[index]
                documents = isinstance(gone, ast.Expr) and isinstance(gone.value, ast.Constant)
                if documents or isinstance(gone, (ast.Assert, ast.Pass)):
                    continue
                statements[index] = ast.copy_location(ast.Pass(), gone)
                made: dict[str, Any] = {}
                exec(compile(mutated, f"<{name} without line {gone.lineno}>", "exec"), vars(module), made)
                yield Mutant(owner, name, " ".join(ast.unparse(gone).split())[:90], made[name])


def dies(mutant: Mutant, checks: list[Callable[[], object]]) -> bool:
    """Run the checks against the mutant; the one that finds it goes to the front."""
    original = inspect.getattr_static(mutant.owner, mutant.name)
    setattr(mutant.owner, mutant.name, mutant.function)
    try:
        for index, check in enumerate(checks):
            try:
                check()
            except (Exception, pytest.fail.Exception):
                checks.insert(0, checks.pop(index))
                return True
    finally:
        setattr(mutant.owner, mutant.name, original)
    return False


def test_the_checks_pass_on_the_guard_as_it_is() -> None:
    checks = [*CHECKS, *suite()]
    assert len(checks) > 100
    for check in checks:
        check()


@pytest.mark.parametrize("part", TAKEN)
def test_each_statement_of_the_guard_is_needed(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [*CHECKS, *suite()]
    chosen = list(mutants())[part::PARTS]
    survivors = [str(mutant) for mutant in chosen if not dies(mutant, checks)]
    with capsys.disabled():
        print(f"\n{len(chosen)} statements of the guard left out, one at a time: {len(chosen) - len(survivors)} missed")
    unexcused = [name for name in survivors if name not in HARMLESS]
    assert not unexcused, f"{len(unexcused)} of {len(chosen)} can go without a test noticing:\n" + "\n".join(unexcused)
    needed = [str(mutant) for mutant in chosen if str(mutant) in HARMLESS and str(mutant) not in survivors]
    assert not needed, f"an excuse that isn't needed any more: {needed}"


def test_enough_statements_are_left_out_and_every_excuse_names_one() -> None:
    names = [str(mutant) for mutant in mutants()]
    assert len(names) > 150
    assert set(HARMLESS) <= set(names)
