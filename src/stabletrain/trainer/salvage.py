"""A rejected step is run again without its bad samples, and applied.

First the inputs are looked at; what can't be seen there is found by halving: a group of samples is run alone, from
the state before the step, and judged as a step would be.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.data import Microbatch
from stabletrain.guard.verdict import Facts, Verdict
from stabletrain.trainer.run import Run, Step
from stabletrain.trainer.step import begin_step, forward_backward

NO_TRIAL = (
    "the bad samples can't be seen, and no process can try some of them alone here, because its forward waits for the "
    "others (parallel=fsdp2, or sync_batchnorm); the step is skipped"
)
SALVAGEABLE = ("loss", "gradient", "buffer")  # a spike or a bad state is no sample's fault
Probe = Callable[[Sequence[int]], bool]


def salvage(run: Run, step: Step) -> list[int] | None:
    """Find the samples that made the step bad, and apply the step without them.

    Args:
        run: in the state before the step.
        step: was rejected; what is left of it takes its place, with its verdict.

    Returns:
        The bad samples, in rising order; None if the step can't be saved, with everything as it was.
    """
    assert step.verdict is not None
    if step.verdict.reason not in SALVAGEABLE:
        return None
    bad = _of_all_ranks(run, bad_inputs(step.microbatches))
    facts = _run_without(run, step, bad) if bad else None
    if facts is None or facts.reason is not None:
        if run.ranks.together and not run.parallel.tries_alone:
            run.tracker.note(NO_TRIAL)
            return None
        with _without_loss_scale(run):
            found = _of_all_ranks(run, _search(run, step, bad))
        if bad and not found:
            return None
        bad |= found  # none at all: what happened may have passed, so the whole step is run again
        facts = _run_without(run, step, bad)
    if facts is None or facts.reason is not None:
        return None
    step.microbatches = [_reduced(run, step, microbatch, bad) for microbatch in step.microbatches]
    step.verdict = Verdict(facts)
    return sorted(bad)


def is_no_overflow(run: Run, step: Step) -> bool:
    """Tell NaN from overflow: run the step without a loss scale. What is still not finite then is no overflow."""
    with _without_loss_scale(run):
        return _attempt(run, step, commit=False).reason in SALVAGEABLE


@contextmanager
def _without_loss_scale(run: Run) -> Iterator[None]:
    """Let the loss scale be 1 inside the block, so that no gradient overflows for it."""
    scaler = run.precision.scaler
    if scaler is None:
        yield
        return
    scale = scaler.get_scale()
    scaler.update(1.0)
    try:
        yield
    finally:
        scaler.update(scale)


def bad_inputs(microbatches: Sequence[Microbatch]) -> list[int]:
    """Return the samples whose own tensors hold NaN or Inf.

    Example:
        >>> inputs = torch.tensor([[1.0], [float("nan")], [2.0]])
        >>> bad_inputs([Microbatch((inputs, torch.tensor([0, 1, 0])), torch.tensor([7, 8, 9]))])
        [8]
    """
    found: list[int] = []
    for microbatch in microbatches:
        indices = microbatch.indices.tolist()
        rows = _bad_rows(microbatch.data, len(indices))
        found += [index for index, bad in zip(indices, rows, strict=True) if bad]
    return found


def _bad_rows(tree: Any, count: int) -> list[bool]:
    """Whether each of `count` samples holds NaN or Inf, over all tensors and lists with one entry a sample."""
    if isinstance(tree, Tensor):
        if not tree.is_floating_point() or tree.dim() == 0 or len(tree) != count:
            return [False] * count
        rows: list[bool] = (~torch.isfinite(tree)).reshape(count, -1).any(1).tolist()
        return rows
    if isinstance(tree, list) and len(tree) == count and all(isinstance(item, Tensor) for item in tree):
        return [not bool(torch.isfinite(item).all()) for item in tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return _either([False] * count, [_bad_rows(part, count) for part in parts])


def _either(first: list[bool], others: list[list[bool]]) -> list[bool]:
    return [any(flags) for flags in zip(first, *others, strict=True)]


def _of_all_ranks(run: Run, found: Iterable[int]) -> set[int]:
    return {index for indices in run.ranks.gather(sorted(found)) for index in indices}


def _search(run: Run, step: Step, known: set[int]) -> set[int]:
    """Find bad samples by running groups of them alone; none of `known` takes part."""
    smallest = _smallest(run.model)
    good = [index for indices in run.last_good for index in indices.tolist()]
    found: set[int] = set()
    for number, microbatch in enumerate(step.microbatches):
        group = [index for index in microbatch.indices.tolist() if index not in known]

        def is_bad(indices: Sequence[int], number: int = number) -> bool:
            partners = [index for index in good if index not in indices][: max(0, smallest - len(indices))]
            probe = _alone(run, step, number, [*indices, *partners])
            run.guard.begin()
            losses = forward_backward(run, probe, alone=True)
            return run.guard.attempt(losses, commit=False, alone=True).reason in SALVAGEABLE

        only = len(step.microbatches) == 1 and not known and not run.ranks.together
        if group and (only or is_bad(group)):
            found |= set(bisect(is_bad, group, good, smallest))
        else:
            good.extend(group)
    return found


def bisect(is_bad: Probe, group: Sequence[int], good: list[int], smallest: int = 1) -> list[int]:
    """Find the bad members of a group that is bad as a whole.

    A half that must be bad because the other isn't is not tried as a whole; but nobody is accused untried.

    Args:
        is_bad: tries some members; it may add good ones to make up the smallest number.
        group: bad as a whole.
        good: members known to be good; those found here are added.
        smallest: members that can be tried at once.

    Returns:
        The bad members; empty if no part of the group is bad on its own.

    Example:
        >>> bisect(lambda members: 5 in members or 6 in members, range(16), [])
        [5, 6]
    """
    if len(group) == 1:
        return list(group)
    half = len(group) // 2
    left, right = group[:half], group[half:]
    if min(len(left), len(right)) + len(good) < smallest:
        return list(group)  # too few to be told apart
    bad: list[int] = []
    left_is_bad = is_bad(left)
    if left_is_bad:
        bad += bisect(is_bad, left, good, smallest)
    else:
        good += left
    if (not left_is_bad and len(right) > 1) or is_bad(right):
        bad += bisect(is_bad, right, good, smallest)
    else:
        good += right
    return bad


def _run_without(run: Run, step: Step, bad: Collection[int]) -> Facts | None:
    """Run the step without some samples and commit it if it is healthy; None if nothing is left, on any rank."""
    reduced = [_reduced(run, step, microbatch, bad) for microbatch in step.microbatches]
    empty = [len(microbatch.indices) == 0 for microbatch in reduced]
    # Where every forward is common to all ranks, none of them can leave one out.
    missing = all(empty) or (any(empty) and run.ranks.together and not run.parallel.tries_alone)
    if run.ranks.any(missing):
        return None
    return _attempt(run, replace(step, microbatches=reduced), commit=True)


def _reduced(run: Run, step: Step, microbatch: Microbatch, bad: Collection[int]) -> Microbatch:
    kept = [index for index in microbatch.indices.tolist() if index not in bad]
    if len(kept) == len(microbatch.indices):
        return microbatch
    return read_samples(run, step, kept if len(kept) >= _smallest(run.model) else [])


def _alone(run: Run, step: Step, number: int, indices: Sequence[int]) -> Step:
    """The step with only these samples in microbatch `number`, under that microbatch's randomness."""
    empty = Microbatch(None, torch.empty(0, dtype=torch.int64))
    microbatches = [empty] * len(step.microbatches)
    microbatches[number] = read_samples(run, step, indices)
    return replace(step, microbatches=microbatches)


def _smallest(model: nn.Module) -> int:
    """The smallest batch that can be run in training: batch normalisation needs two."""
    return 2 if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()) else 1


def read_samples(run: Run, step: Step, indices: Sequence[int]) -> Microbatch:
    """Read some samples of a step again, as the step saw them."""
    if len(indices) == 0:
        return Microbatch(None, torch.empty(0, dtype=torch.int64))
    return run.fault.before_step(step.number, [run.loader.read(indices, step.epoch)])[0]


def _attempt(run: Run, step: Step, *, commit: bool) -> Facts:
    begin_step(run)
    return run.guard.attempt(forward_backward(run, step), commit=commit)
