"""Parts in, a run out: the one place where a model, its data and the options of every group come together.

Without Hydra, so that a notebook builds the same run as the command line does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stabletrain.augmentation import Unchanged
from stabletrain.checkpoint import CheckpointStore, has_checkpoints, nonfinite_names
from stabletrain.clipping import Clipping, NoClipping, Norm
from stabletrain.collectives import Ranks
from stabletrain.data import Loader, OrderedLoader, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.errors import ConfigurationError
from stabletrain.fault import Fault, NoFault, Surroundings
from stabletrain.folder import RunFolder, yaml_text
from stabletrain.guard import Policy, StepGuard
from stabletrain.incident import IncidentStore
from stabletrain.loss import CrossEntropy
from stabletrain.optimizer import ModelParameters, adamw, doubts, hyperparameters
from stabletrain.parallel import SingleProcess
from stabletrain.precision import Precision
from stabletrain.quarantine import Quarantine
from stabletrain.ramp import Ramp, Stage
from stabletrain.schedule import Cosine, Schedule
from stabletrain.task import Classification, Task, memory_of
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, Summary, train
from stabletrain.trainer.rollback import Rollback
from stabletrain.weights import put_weights, read_weights


def assemble(
    model: nn.Module,
    splits: Splits,
    *,
    epochs: int,
    batch_size: int = 32,
    accumulate: int = 1,
    seed: int = 0,
    task: Task | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = partial(adamw, lr=1e-4),
    schedule: Callable[..., Schedule] = Cosine,
    ramp: Sequence[Stage | Mapping[str, Any]] = (),
    precision: Callable[..., Precision] = Precision,
    clipping: Clipping = Norm(1.0),  # noqa: B008 (frozen)
    augmentation: Callable[[Any], Any] = Unchanged(),  # noqa: B008 (without state)
    guard: Policy = Policy(),  # noqa: B008 (frozen)
    fault: Fault | None = None,
    ema: Callable[[nn.Module], ExponentialMovingAverage | None] | None = None,
    checkpoint: Callable[[Path], CheckpointStore] = CheckpointStore,
    tracking: Callable[[Path | None], Tracker] = Tracker,
    folder: Path | str | None = None,
    resume: str = "auto",
    init_from: Path | str | None = None,
    init_strict: bool = True,
    parallel: SingleProcess | None = None,
    device: str = "auto",
    workers: int = 0,
    validate_from: int = 0,
    settings: dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Build a run from finished parts; nothing is written before everything has been checked.

    Args:
        model: to train, already initialised.
        splits: training, validation and test data.
        epochs: passes over the training data.
        batch_size: samples per step, of all processes together.
        accumulate: microbatches that a step is divided into on each process.
        seed: decides the order of the samples and everything drawn at random.
        task: how a microbatch becomes a loss; None: classification with cross entropy.
        optimizer: makes the optimizer from the parameters, which know their names and modules (`ModelParameters`).
        schedule: makes the schedule from `total_updates` and `updates_per_epoch`.
        ramp: stages of larger batches and higher rates, entered once training is stable.
        precision: makes the precision from `device`.
        clipping: what limits the gradients.
        augmentation: what is done to a microbatch before the forward pass.
        guard: what counts as a bad step and what follows.
        fault: a rehearsed fault; None: none.
        ema: makes the average of the weights, or None.
        checkpoint: makes the store of checkpoints from the run's folder.
        tracking: makes the tracker from the run's folder.
        folder: where the run leaves its files; None: it leaves none.
        resume: `auto`, `never` (what the folder holds is set aside), `must`, or the path of a checkpoint.
        init_from: weights to begin with: a checkpoint's, a run's or an exported folder, or a `.safetensors` file. A run
            that goes on from a checkpoint of its own doesn't read it.
        init_strict: whether they must fit in every name and shape; otherwise what fits is taken.
        parallel: how several processes train together; None: one process.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        workers: processes that read samples; 0: this one. Data in memory needs none.
        validate_from: updates before which nothing is validated.
        settings: the resolved config, from which the model can be built again and with which a resumed run is compared.
        overrides: what was given on the command line, for the record.

    Returns:
        A run for `train`.

    Raises:
        ConfigurationError: for parts that don't fit each other.
    """
    _check_counts(epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    parallel = parallel if parallel is not None else SingleProcess()
    place = parallel.join(find_device(device))
    ranks = parallel.ranks
    model = model.to(place)
    started_from = _initialise(model, init_from, init_strict, folder, resume)
    loader = Loader(
        splits.train,
        batch_size=batch_size,
        accumulate=accumulate,
        rank=ranks.rank,
        ranks=ranks.size,
        seed=seed,
        workers=workers,
        device=place,
    )
    model = parallel.prepare(model)
    chosen_precision = precision(device=place)
    if chosen_precision.parameters != torch.float32 and type(parallel) is not SingleProcess:
        raise ConfigurationError(
            "precision.parameters=bfloat16 (precision=pure_bf16) needs parallel=none: the wrappers for several "
            "processes hold on to the parameters' format. Give precision=bf16, whose parameters stay float32."
        )
    task = task or Classification(CrossEntropy())
    objective = _objective(task, place, ranks)
    learned = [model] if objective is None else [model, objective]
    chosen_optimizer = optimizer(ModelParameters(model, objective))
    chosen_ramp = Ramp(ramp)
    chosen_ramp.check(epochs, len(splits.train))
    total_steps = chosen_ramp.planned(epochs, lambda size: loader.steps_with(size or batch_size))
    if not 0 <= validate_from < total_steps:
        raise ConfigurationError(
            f"validate_from is {validate_from}, but the run has {total_steps} updates: choose a number of updates from "
            f"0 (always validate) to {total_steps - 1}."
        )
    chosen_schedule = schedule(total_updates=total_steps, updates_per_epoch=loader.steps_per_epoch)
    average = ema(model) if ema is not None else None
    step_guard = StepGuard(
        learned,
        chosen_optimizer,
        clip=None if isinstance(clipping, NoClipping) else clipping,
        scaler=lambda: chosen_precision.scaler,
        policy=guard,
        ranks=ranks,
    )
    chosen_fault = fault or NoFault()
    notes = [
        *splits.notes,
        *(f"{doubt.what}: {doubt.evidence}" for doubt in doubts(chosen_optimizer)),
        *started_from,
        *chosen_precision.notes,
        *chosen_fault.check(
            Surroundings(
                model=model,
                total_steps=total_steps,
                batch_size=batch_size,
                loss_scale=chosen_precision.scales_loss,
                folder=Path(folder) if folder is not None else None,
            )
        ),
    ]
    quarantine = Quarantine()
    if guard.quarantine is not None:
        quarantine.take(guard.quarantine, len(splits.train))
    run_folder = ranks.from_first_alone(lambda: _folder(folder, resume))
    fingerprint = splits.fingerprint()
    store = checkpoint(Path(folder)) if folder is not None else None
    incidents = _incidents(folder, guard)
    tracker = tracking(run_folder.path if run_folder is not None else None)
    if not ranks.first:
        tracker.mute()
    if store is not None:
        store.exempt(nonfinite_names(model.state_dict()))
        store.facts = {"config": _sha256(settings or {}), "data": fingerprint}
    return Run(
        model=model,
        network=parallel.wrap(model),
        task=task,
        optimizer=chosen_optimizer,
        loader=loader,
        validation=_ordered(splits.validation, batch_size, workers, place),
        test=_ordered(splits.test, batch_size, workers, place),
        schedule=chosen_schedule,
        ramp=chosen_ramp,
        clipping=clipping,
        precision=chosen_precision,
        augmentation=augmentation,
        guard=step_guard,
        ema=average,
        checkpoint=store,
        tracker=tracker,
        parallel=parallel,
        epochs=epochs,
        total_steps=total_steps,
        validate_from=validate_from,
        seed=seed,
        device=place,
        fault=chosen_fault,
        quarantine=quarantine,
        incidents=incidents,
        rollback=Rollback(guard) if guard.on_rejection == "rollback" else None,
        folder=run_folder,
        resume=resume,
        identity={
            "seed": seed,
            "batch_size": batch_size,
            "microbatch": batch_size // (accumulate * ranks.size),
            "ramp": chosen_ramp.description(),
            "data": fingerprint,
            "optimizer class": f"{type(chosen_optimizer).__module__}.{type(chosen_optimizer).__qualname__}",
        },
        notes=notes,
        hyperparameters=hyperparameters(chosen_optimizer),
        settings=settings or {},
        overrides=list(overrides),
    )


def fit(model: nn.Module, splits: Splits, *, epochs: int, lr: float = 1e-4, **options: Any) -> Summary:
    """Train `model` on `splits` and return how it ended; the model is changed in place.

    Args:
        model: to train.
        splits: training, validation and test data, for example from `stabletrain.data.split_dataset`.
        epochs: passes over the training data.
        lr: learning rate of AdamW, unless `optimizer` is given.
        options: any other argument of `assemble`.

    Returns:
        Status, counts and metrics.

    Raises:
        ConfigurationError: for arguments that don't fit each other.
        UnstableTraining: when too many steps were rejected.

    Example:
        >>> from stabletrain.data import digits
        >>> from stabletrain.model import ConvNet
        >>> data = digits(seed=0)
        >>> model = ConvNet(in_channels=1, num_classes=10, image_size=(8, 8))
        >>> summary = fit(model, data, epochs=1, lr=1e-3)  # doctest: +ELLIPSIS
        epoch 0 train_loss ...
        0 of 39 steps were rejected
        >>> summary.status, summary.rejected
        ('completed', 0)
    """
    options.setdefault("optimizer", partial(adamw, lr=lr))
    return train(assemble(model, splits, epochs=epochs, **options))


def find_device(name: str) -> torch.device:
    """Return the device that a name stands for.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"device is {name!r}, which can't be used here ({str(error).splitlines()[0]}); allowed: auto, cpu, and "
            "cuda or cuda:<number> where there is a GPU."
        ) from error
    return device


def _objective(task: Task, device: torch.device, ranks: Ranks) -> nn.Module | None:
    """Bring the task's loss to the device, and return it if it has parameters or buffers of its own."""
    loss = getattr(task, "loss", None)
    if isinstance(loss, nn.Module):
        loss.to(device)
    objective = memory_of(task)
    if objective is not None and ranks.together and any(True for _ in objective.parameters()):
        raise ConfigurationError(
            f"the loss {type(objective).__name__} has parameters to be trained, and {ranks.size} processes train "
            "together, which exchange the model's gradients only. Let its numbers be fixed (for info_nce: "
            "loss.learnable=false), or train in one process."
        )
    return objective


def _initialise(
    model: nn.Module, source: Path | str | None, strict: bool, folder: Path | str | None, resume: str
) -> list[str]:
    """Put the weights of `source` into the model, unless the run goes on from a checkpoint; say what was done."""
    if source is None:
        return []
    if resume not in ("auto", "never") or (resume == "auto" and folder is not None and has_checkpoints(folder)):
        return [f"init_from={source} isn't read, because the run goes on from a checkpoint of its own"]
    hint = "Take what fits with init_strict=false, or use the model that these weights are of." if strict else ""
    try:
        return [f"init_from: {put_weights(model, read_weights(source), strict=strict, hint=hint)}"]
    except ConfigurationError as error:
        raise ConfigurationError(f"init_from={source}: {error}") from error


def _sha256(settings: dict[str, Any]) -> str:
    return hashlib.sha256(yaml_text(settings).encode()).hexdigest()


def _folder(folder: Path | str | None, resume: str) -> RunFolder | None:
    """Lock the run's folder, and set aside what an earlier run left there if it isn't to go on."""
    if folder is None:
        return None
    run_folder = RunFolder(folder)
    if resume == "never":
        run_folder.set_aside()
    return run_folder


def _incidents(folder: Path | str | None, guard: Policy) -> IncidentStore | None:
    if folder is None:
        return None
    return IncidentStore(folder, max_incidents=guard.max_incidents, max_bytes=guard.max_incident_bytes)


def _ordered(dataset: Any, batch_size: int, workers: int, device: torch.device) -> OrderedLoader | None:
    """Evaluation needs no gradients, so its batches may be larger."""
    if dataset is None:
        return None
    return OrderedLoader(dataset, batch_size=max(batch_size, 256), workers=workers, device=device)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigurationError(f"{name} is {count!r}; it must be a whole number of at least 1.")
