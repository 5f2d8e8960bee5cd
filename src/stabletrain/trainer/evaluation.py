"""Validation and test: measured without changing anything, and looked at as critically as a training step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from stabletrain.collectives import sharded_like
from stabletrain.data import Microbatch, OrderedLoader
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key, keyed
from stabletrain.trainer.interruption import Polled
from stabletrain.trainer.run import Run


def evaluate_all(run: Run, loader: OrderedLoader) -> dict[str, float]:
    """Measure the model on all of validation or test data; the ranks share the work where the task can add up.

    Where every forward is common to all ranks, or the task has no `total`, each rank measures everything.
    """
    run.same_buffers()
    shared = run.ranks.together and run.parallel.tries_alone and "total" in signature(run.task.evaluate).parameters
    batches = Polled(run, loader, shared=shared)
    return evaluate(run, batches, **({"total": run.ranks.total} if shared else {}))


@torch.no_grad()
def evaluate(run: Run, batches: Iterable[Microbatch], **options: Any) -> dict[str, float]:
    """Measure the model, or the average of its weights if there is one, without changing anything.

    Args:
        run: its model is left in the mode it was in.
        batches: of validation or test data.
        options: for the task.

    Returns:
        What the task measures, usually `loss` and more.
    """
    was_training = run.model.training
    averaged = run.ema.applied(run.model) if run.ema is not None else nullcontext()
    run.model.eval()
    try:
        passes = run.precision.lowered(run.model), run.precision.autocast()
        with averaged, passes[0], passes[1], keyed(key(run.seed, "evaluate"), run.device):
            return run.task.evaluate(run.model, batches, **options)
    finally:
        run.model.train(was_training)


def measure_test(run: Run) -> None:
    """Measure the test data with the best checkpoint's weights, or the last ones if none was saved."""
    if run.test is None:
        return
    store = run.checkpoint
    best = run.ranks.from_first(store.best) if store is not None else None
    if best is None or run.checkpoint is None:
        run.metrics["test"] = evaluate_all(run, run.test)
        return
    last = {"model": run.model.state_dict(), "ema": run.ema.state_dict() if run.ema is not None else {}}
    last |= {"loss": run.objective.state_dict()} if run.objective is not None else {}
    last = {part: _cloned(state) for part, state in last.items()}
    try:
        saved = run.checkpoint.load(best.path)
    except ConfigurationError as error:
        problem = str(error)
    else:
        problem = ""
    problems = [said for said in run.ranks.gather(problem) if said]
    if problems:
        run.tracker.warning(f"the best checkpoint can't be read, so the test measures the last weights: {problems[0]}")
        saved = last
    try:
        _put_weights(run, saved)
        run.metrics["test"] = evaluate_all(run, run.test)
    finally:
        _put_weights(run, last)


def _cloned(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    return {name: _cloned(value) for name, value in state.items()} if isinstance(state, dict) else state


def _put_weights(run: Run, state: dict[str, Any]) -> None:
    run.model.load_state_dict(sharded_like(state["model"], run.model.state_dict()))
    if run.ema is not None and state["ema"]:
        average = sharded_like(state["ema"]["average"], run.ema.average)
        run.ema.load_state_dict({**state["ema"], "average": average})
    if run.objective is not None and "loss" in state:
        run.objective.load_state_dict(state["loss"])
