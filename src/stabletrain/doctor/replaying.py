"""A step of a run, from its incident: what the doctor looks at and tries."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabletrain.augmentation import Unchanged
from stabletrain.build import PartFailed
from stabletrain.checkpoint.files import STATE_NAME, read_files, read_manifest
from stabletrain.config.changed import changed
from stabletrain.data import Microbatch, Splits
from stabletrain.doctor.built import built
from stabletrain.doctor.origin import Traced
from stabletrain.doctor.samples import chosen, guilty
from stabletrain.doctor.trace import trace
from stabletrain.errors import ConfigurationError
from stabletrain.incident import Incident, load_incident
from stabletrain.incident.statistics import named_tensors
from stabletrain.optimizer import set_learning_rate
from stabletrain.trainer.evaluation import evaluate
from stabletrain.trainer.replay import at_incident
from stabletrain.trainer.run import Run, Step
from stabletrain.trainer.salvage import bad_inputs
from stabletrain.trainer.step import forward_backward
from stabletrain.tree import map_tensors

QUIET = ("tracking=none", "checkpoint=none")


class IncidentData(torch.utils.data.Dataset[Any]):
    """Stands in for data that isn't at hand: what the step saw, over and over.

    Args:
        batch: of the incident.
        count: samples in it.
        length: at least the largest index that the incident names.
    """

    def __init__(self, batch: Any, count: int, length: int) -> None:
        self._batch, self._count, self._length = batch, count, length

    def __len__(self) -> int:
        """Return how many samples there seem to be."""
        return self._length

    def __getitem__(self, index: int) -> Any:
        """Return one of the incident's samples."""
        return map_tensors(lambda tensor: tensor[0], chosen(self._batch, self._count, [index % self._count]))


def incident_data(folder: str) -> Splits:
    """Build the stand-in, as an option of the group `data`."""
    incident = load_incident(folder)
    number = next(number for number, indices in enumerate(incident.indices) if len(indices) > 0)
    length = 1 + max(int(indices.max()) for indices in incident.indices if len(indices) > 0)
    enough = max(length, 4 * int(incident.settings["batch_size"]))
    return Splits(train=IncidentData(incident.batches[number], len(incident.indices[number]), enough), validation=None)


@contextmanager
def run_of(incident: Incident, folder: Path, overrides: Sequence[str] = ()) -> Iterator[tuple[Run, bool]]:
    """Build the run that an incident is of, in a folder that goes away, and say whether its data is at hand.

    Args:
        incident: from `load_incident`.
        folder: where it was loaded from.
        overrides: changes to its settings.

    Raises:
        ConfigurationError: the incident holds no settings, or they can't be built.
    """
    if not incident.settings:
        raise ConfigurationError(
            "the incident holds no settings, as it is of a run that was put together in Python; give "
            "stabletrain.diagnose the model, the loss and the batch."
        )
    values = {**changed(incident.settings, [*QUIET, *overrides]), "init_from": None}
    # A list of samples to leave out changes nothing about this step, and may be gone.
    values["guard"] = {name: value for name, value in values["guard"].items() if name != "quarantine"}
    stand_in = {"_target_": "stabletrain.doctor.replaying.incident_data", "folder": str(folder)}
    with ExitStack() as stack:
        try:
            run, at_hand = stack.enter_context(built(values)), True
        except (ConfigurationError, PartFailed, OSError):
            run, at_hand = stack.enter_context(built({**values, "data": stand_in})), False
        yield run, at_hand


@dataclass
class Replay:
    """What can be done with the step of an incident; each time it begins from the state before it.

    Args:
        run: built from the incident's settings.
        incident: what happened.
    """

    run: Run
    incident: Incident

    def traced(self) -> Traced:
        """Run it under the trace."""
        run = self.run
        with at_incident(run, self.incident) as step:
            names = [
                (f"{number}.{name}" if len(step.microbatches) > 1 else name, tensor)
                for number, microbatch in enumerate(step.microbatches)
                for name, tensor in named_tensors(microbatch.data)
            ]
            return trace(lambda: self._losses(step), [run.model], names)

    def samples(self, traced: Traced, end: float) -> list[int]:
        """Find the samples to blame, as places among all of the step's."""
        with at_incident(self.run, self.incident) as step:
            indices = step.indices()
            known = {*bad_inputs(step.microbatches), *(entry["index"] for entry in self.incident.samples)}
            hints = [place for place, index in enumerate(indices) if index in known]
            if not hints and len(step.microbatches) == 1:
                hints = next((list(o.rows) for o in traced.origins if o.has_rows_of(len(indices))), [])

            def is_bad(places: Sequence[int]) -> bool:
                if time.monotonic() > end:
                    raise TimeoutError
                return self.is_bad(_reduced(step, places))

            try:
                return guilty(is_bad, len(indices), hints)
            except TimeoutError:
                return []

    def is_bad(self, step: Step) -> bool:
        """Whether the guard would reject a step that begins here."""
        self.run.guard.begin()
        try:
            if self.incident.kind == "validation":
                bad = not self._is_valid(step)
                self.run.guard.discard()
                return bad
            losses = self._losses(step)
        except (RuntimeError, ValueError, IndexError):  # too few samples for what the model does
            self.run.guard.discard()
            return False
        return self.run.guard.attempt(losses, commit=False, alone=True).reason is not None

    def indices(self) -> list[int]:
        """Return the step's samples, as indices in the data set."""
        return [index for indices in self.incident.indices for index in indices.tolist()]

    def healthy_without_augmentation(self) -> bool:
        """Whether there is an augmentation, and the step is healthy with the data as it is."""
        if isinstance(self.run.augmentation, Unchanged):
            return False
        before, self.run.augmentation = self.run.augmentation, Unchanged()
        try:
            with at_incident(self.run, self.incident) as step:
                return not self.is_bad(step)
        finally:
            self.run.augmentation = before

    def goes_on(
        self,
        updates: int,
        at_hand: bool,
        end: float,
        *,
        rate: float | None = None,
        without: Sequence[int] = (),
        state: Path | None = None,
    ) -> tuple[bool, int]:
        """Apply the step and some that follow it, and put everything back.

        Args:
            updates: how many to try after the step.
            at_hand: whether there is data for them.
            end: by `time.monotonic`; nothing is begun after it.
            rate: learning rate to use; None: the run's.
            without: places of samples that the step leaves out.
            state: checkpoint whose weights and optimizer the step begins with; None: the incident's.

        Returns:
            Whether all of them were healthy, and how many there were, the incident's included.
        """
        run = self.run
        with at_incident(run, self.incident) as step:
            if without:
                step = _reduced(step, [place for place in range(len(step.indices())) if place not in set(without)])
            if state is not None:
                learned = read_files(read_manifest(state))[STATE_NAME]
                run.model.load_state_dict(learned["model"])
                run.optimizer.load_state_dict(learned["optimizer"])
            if self.incident.kind == "validation":
                return not self.is_bad(step), 0
            if rate is not None:
                groups = run.optimizer.param_groups
                base = groups[0].get("initial_lr", groups[0]["lr"])
                for group in groups:
                    # Each keeps its own factor.
                    group["initial_lr"] = rate * (group.get("initial_lr", group["lr"]) / base if base else 1.0)
            done = 0
            following = self._following(step, updates) if at_hand else iter(())
            for current in (step, *following):
                run.guard.begin()
                losses = self._losses(current)
                set_learning_rate(run.optimizer, run.schedule(run.progress.updates))
                if run.guard.attempt(losses, commit=True).reason is not None:
                    return False, done
                run.progress.updates += 1
                done += 1
                if time.monotonic() > end:
                    break
            return True, done

    def _following(self, step: Step, updates: int) -> Iterator[Step]:
        loader = self.run.loader
        if step.index + 1 >= loader.steps_per_epoch:
            return
        batches = loader.epoch(step.epoch, step.index + 1, self.run.quarantine.frozen)
        for number, microbatches in zip(range(1, updates + 1), batches, strict=False):
            yield replace(step, index=step.index + number, number=step.number + number, microbatches=microbatches)

    def _is_valid(self, step: Step) -> bool:
        """Whether all metrics of a validation are finite."""
        metrics = evaluate(self.run, [microbatch for microbatch in step.microbatches if len(microbatch.indices) > 0])
        return all(map(math.isfinite, self.run.fault.validation(self.run.progress.steps, metrics).values()))

    def _losses(self, step: Step) -> list[Tensor]:
        if self.incident.kind != "validation":
            return forward_backward(self.run, step, alone=True)
        run = self.run
        run.model.eval()
        losses = []
        with torch.no_grad(), run.precision.lowered(run.model), run.precision.autocast():
            for microbatch in step.microbatches:
                if len(microbatch.indices) > 0:
                    output = run.task.step(run.model, microbatch.data)
                    losses.append(output.loss_sum / max(float(output.weight), 1.0))
        return losses


def _reduced(step: Step, places: Sequence[int]) -> Step:
    """The step with some of its samples only."""
    kept, begin, microbatches = set(places), 0, []
    for microbatch in step.microbatches:
        count = len(microbatch.indices)
        own = [place - begin for place in range(begin, begin + count) if place in kept]
        begin += count
        if len(own) < count:
            data = chosen(microbatch.data, count, own) if own else None
            microbatch = Microbatch(data, microbatch.indices[own])
        microbatches.append(microbatch)
    return replace(step, microbatches=microbatches)
