"""Loaders whose position is plain data: (epoch, step) says which samples come, whatever was read before."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise, tee
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from stabletrain.checks import whole
from stabletrain.data.arrays import ArrayDataset, Microbatch
from stabletrain.data.splits import check_map_style
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key, keyed_all
from stabletrain.signals import ASKED
from stabletrain.tree import map_tensors, tensors, to_device

Collate = Callable[[list[Any]], Any]
RESIDENT_BYTES = 2 << 30  # data in memory up to this size is kept on the accelerator as a whole


def collate(samples: list[Any]) -> Any:
    """Return the batch of some samples: tensors of one shape stacked, tensors of different shapes as a list.

    Args:
        samples: numbers, tensors, arrays, or tuples or dictionaries of these.

    Returns:
        Whatever `torch.utils.data.default_collate` makes of them, or a list where the shapes differ.

    Example:
        >>> collate([(torch.zeros(2), 0), (torch.zeros(3), 1)])
        ([tensor([0., 0.]), tensor([0., 0., 0.])], tensor([0, 1]))
    """
    first = samples[0]
    if isinstance(first, dict):
        return {name: collate([sample[name] for sample in samples]) for name in first}
    if isinstance(first, (tuple, list)) and not hasattr(first, "_fields"):
        return tuple(collate(list(column)) for column in zip(*samples, strict=True))
    shapes = {tuple(sample.shape) for sample in samples if hasattr(sample, "shape")}
    return [torch.as_tensor(sample) for sample in samples] if len(shapes) > 1 else default_collate(samples)


class _Samples(Dataset[Any]):
    """A data set as worker processes see it: each sample under its own key if the data set is random."""

    def __init__(self, dataset: Any, *parts: int | str) -> None:
        self.dataset = dataset
        self.parts = parts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not getattr(self.dataset, "random", False):
            return self.dataset[index]
        with keyed_all(key(*self.parts, index)):
            return self.dataset[index]


class _Reader:
    """Reads microbatches of a data set by their indices; `parts` are what a random data set's key is made of."""

    def __init__(
        self, dataset: Any, workers: int, device: torch.device | str, collate_function: Collate | None
    ) -> None:
        check_map_style(dataset)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ConfigurationError(
                f"workers is {workers!r}; a whole number from 0 (read in this process) is allowed."
            )
        self.device = torch.device(device)
        self.workers = workers
        self.collate = collate_function or getattr(dataset, "collate", None) or collate
        if isinstance(dataset, ArrayDataset) and self.device.type != "cpu":
            held = sum(item.numel() * item.element_size() for item in tensors([dataset.inputs, dataset.targets]))
            dataset = dataset.to(self.device) if held <= RESIDENT_BYTES else dataset
        self.dataset = dataset

    def read(self, batches: Iterable[torch.Tensor], *parts: int | str) -> Iterator[Microbatch]:
        gather = self._gather(*parts)
        if gather is None:
            yield from self._read_samples(batches, *parts)
        elif self.device.type == "cpu":
            for indices in batches:
                yield Microbatch(gather(indices), indices)
        else:
            for indices in batches:
                yield Microbatch(to_device(map_tensors(_pinned, gather(indices)), self.device), indices)

    def read_once(self, indices: torch.Tensor, *parts: int | str) -> Microbatch:
        """Read a few samples in this process, as `read` would."""
        gather = self._gather(*parts)
        if gather is not None:
            return Microbatch(to_device(gather(indices), self.device), indices)
        samples = _Samples(self.dataset, *parts)
        data = self.collate([samples[index] for index in indices.tolist()])
        return Microbatch(to_device(data, self.device), indices)

    def _gather(self, *parts: int | str) -> Callable[[torch.Tensor], Any] | None:
        """Return what takes whole batches from the data set, if it can."""
        gather: Callable[..., Any] | None = getattr(self.dataset, "gather", None)
        if gather is None or not getattr(self.dataset, "random", False):
            return gather
        return partial(gather, seed=key(*parts))

    def _read_samples(self, batches: Iterable[torch.Tensor], *parts: int | str) -> Iterator[Microbatch]:
        wanted, known = tee(batches)  # workers read ahead of what was yielded
        # A generator of its own, so that torch's default one is not drawn from.
        generator = torch.Generator().manual_seed(key(*parts, "workers"))
        loader: DataLoader[Any] = DataLoader(
            _Samples(self.dataset, *parts),
            batch_sampler=(indices.tolist() for indices in wanted),
            num_workers=self.workers,
            collate_fn=self.collate,
            generator=generator,
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=self.device.type == "cuda",
        )
        for indices, data in zip(known, loader, strict=True):
            yield Microbatch(to_device(data, self.device), indices)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Let a worker process outlive what asks the run to save and end, where a signal goes to the whole process group.

    The trainer, which needs its workers for that long, ends them by SIGTERM; that one is obeyed.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)

    def obey_the_trainer() -> None:
        while signal.sigwaitinfo(ASKED).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey_the_trainer, daemon=True).start()


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.device.type != "cpu" or not torch.cuda.is_available() else tensor.pin_memory()


class Loader:
    """Training batches. The order of an epoch is a function of (seed, epoch), so that any step can be the first.

    A data set with `gather(indices)` is asked for whole batches; any other is read sample by sample, by `workers`
    processes. One that draws random numbers says so by an attribute `random = True`: each sample is then read under a
    key of (seed, epoch, index), and the number of workers or a restart change nothing. Where it has `gather`, it is
    called as `gather(indices, seed=...)` with a key of (seed, epoch), and what it draws for a sample has to follow from
    that and the sample's index, as with `stabletrain.randomness.uniform`.

    Args:
        dataset: map-style data set.
        batch_size: samples per step, all microbatches together.
        accumulate: microbatches per step on each rank; times `ranks` it must divide `batch_size`.
        rank: which of `ranks` processes this is; the microbatches of a step are dealt out in turn.
        ranks: processes that share each step.
        seed: number that decides the order.
        shuffle: False = always the data set's own order.
        drop_last: leave out the last samples of an epoch where they don't fill a step.
        workers: processes that read samples; 0 = this one.
        device: where the batches go. Data in memory up to 2 GiB is moved there once, as a whole.
        collate: makes a batch from a list of samples; None = the data set's own `collate`, or `data.collate`.

    Raises:
        ConfigurationError: for sizes that don't fit each other or the data.

    Example:
        >>> loader = Loader(ArrayDataset(torch.arange(6.0), torch.arange(6)), batch_size=2, seed=3)
        >>> whole = [step[0].indices.tolist() for step in loader.epoch(0)]
        >>> whole[1:] == [step[0].indices.tolist() for step in loader.epoch(0, start=1)]
        True
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        workers: int = 0,
        device: torch.device | str = "cpu",
        collate: Collate | None = None,
    ) -> None:
        whole("batch_size", batch_size)
        whole("accumulate", accumulate)
        self.reader = _Reader(dataset, workers, device, collate)
        self.dataset = dataset
        if batch_size > len(dataset):
            raise ConfigurationError(
                f"batch_size is {batch_size}, but the training part has {len(dataset)} samples: choose a batch_size "
                f"from 1 to {len(dataset)}."
            )
        if batch_size % (accumulate * ranks) != 0:
            shared = "" if ranks == 1 else f" times {ranks} processes"
            raise ConfigurationError(
                f"batch_size {batch_size} can't be divided by accumulate {accumulate}{shared}: choose an accumulate "
                "that divides batch_size (the samples per step), so that all microbatches have one size."
            )
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank, self.ranks = rank, ranks
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._largest = batch_size // (accumulate * ranks)  # samples that a microbatch holds at most

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch from which nothing is left out."""
        return self.steps_with(self.batch_size)

    def steps_with(self, batch_size: int) -> int:
        """Return the steps of an epoch with so many samples per step."""
        samples = len(self.dataset)
        return samples // batch_size if self.drop_last else -(-samples // batch_size)

    def resize(self, batch_size: int) -> None:
        """Take so many samples per step from the next epoch on, in more microbatches rather than larger ones.

        Args:
            batch_size: samples per step; microbatches are as equal as can be, and none is larger than before.

        Example:
            >>> loader = Loader(ArrayDataset(torch.arange(100.0), torch.arange(100)), batch_size=16, accumulate=2)
            >>> loader.resize(50)
            >>> [len(microbatch.indices) for microbatch in next(loader.epoch(0))]
            [7, 7, 7, 7, 7, 7, 8]
        """
        assert 1 <= batch_size <= len(self.dataset), (batch_size, len(self.dataset))
        self.batch_size, self.accumulate = batch_size, self._microbatches(batch_size) // self.ranks

    def _microbatches(self, samples: int) -> int:
        """Return into how many microbatches a step of so many samples is divided, as many for one rank as for all."""
        return -(-samples // (self._largest * self.ranks)) * self.ranks

    def order(self, epoch: int) -> torch.Tensor:
        """Return the samples of an epoch in the order in which they come, int64 [N]."""
        if not self.shuffle:
            return torch.arange(len(self.dataset))
        generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
        return torch.randperm(len(self.dataset), generator=generator)

    def read(self, indices: Sequence[int], epoch: int) -> Microbatch:
        """Read these samples as the epoch would, in this process: the same bytes, collated on their own.

        Args:
            indices: positions in the data set.
            epoch: number of the epoch, from 0, which decides what a random data set draws.
        """
        return self.reader.read_once(torch.tensor(indices, dtype=torch.int64), self.seed, epoch)

    def epoch(self, epoch: int, start: int = 0, excluded: Collection[int] = ()) -> Iterator[list[Microbatch]]:
        """Yield this rank's part of each step of an epoch: `accumulate` microbatches; fewer in a smaller last step.

        Args:
            epoch: number of the epoch, from 0.
            start: first step; what lies before it is not read.
            excluded: samples to leave out. The order of the others stays; an epoch may have fewer steps for it.
        """
        order = self.order(epoch)
        if excluded:
            order = order[~torch.isin(order, torch.tensor(sorted(excluded)))]
        end = len(order) // self.batch_size * self.batch_size if self.drop_last else len(order)
        assert 0 <= start <= -(-end // self.batch_size), (start, end)
        size = self.batch_size
        spans = [(first, min(size, end - first)) for first in range(start * size, end, size)]
        rows = (part for first, count in spans for part in self._own_parts(order, first, count))
        microbatches = self.reader.read(rows, self.seed, epoch)
        for _, count in spans:
            yield list(islice(microbatches, self._microbatches(count) // self.ranks))

    def _own_parts(self, order: torch.Tensor, first: int, count: int) -> Iterator[torch.Tensor]:
        """Yield this rank's microbatches of the step that begins at `first`."""
        return islice(_parts(order, first, count, self._microbatches(count)), self.rank, None, self.ranks)


def _parts(indices: torch.Tensor, first: int, count: int, parts: int) -> Iterator[torch.Tensor]:
    """Yield views of `count` indices from `first` on, in parts that are as equal as can be."""
    bounds = (first + count * number // parts for number in range(parts + 1))
    return (indices[start:end] for start, end in pairwise(bounds))


def _slices(indices: torch.Tensor, first: int, end: int, size: int) -> Iterator[torch.Tensor]:
    """Yield views of `size` indices from `first` to before `end`; plain slices cost a quarter of `torch.split`."""
    return (indices[place : min(place + size, end)] for place in range(first, end, size))


class OrderedLoader:
    """Every sample once, in the data set's order; for evaluation.

    Args:
        dataset: map-style data set.
        batch_size: samples per batch; the last one may be smaller.
        workers: processes that read samples; 0 = this one.
        device: where the batches go.
        collate: makes a batch from a list of samples; None = the data set's own `collate`, or `data.collate`.

    Raises:
        ConfigurationError: for a batch size below 1 and for an empty data set.

    Example:
        >>> loader = OrderedLoader(ArrayDataset(torch.arange(5.0), torch.arange(5)), batch_size=2)
        >>> [batch.indices.tolist() for batch in loader]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
        collate: Collate | None = None,
    ) -> None:
        whole("batch_size", batch_size)
        self.reader = _Reader(dataset, workers, device, collate)
        self.dataset = dataset
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def read(self, indices: Sequence[int]) -> Microbatch:
        """Read these samples, collated on their own."""
        return self.reader.read_once(torch.tensor(indices, dtype=torch.int64), "evaluation")

    def share(self, rank: int, ranks: int) -> Iterator[Microbatch]:
        """Yield every `ranks`-th batch, from number `rank` on."""
        count = len(self.dataset)
        own = islice(_slices(torch.arange(count), 0, count, self.batch_size), rank, None, ranks)
        return self.reader.read(own, "evaluation")

    def __iter__(self) -> Iterator[Microbatch]:
        count = len(self.dataset)
        return self.reader.read(_slices(torch.arange(count), 0, count, self.batch_size), "evaluation")
