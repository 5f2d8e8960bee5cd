"""What processes that train together tell each other: sums, common decisions, values from one to all.

Training alone, every call returns what it was given, so callers need not ask how many they are. Every rank has to
make the same calls in the same order, or all of them wait for ever.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stabletrain.errors import ConfigurationError
from stabletrain.tree import is_distributed, map_tensors, tensors

T = TypeVar("T")
MOST_RANKS = 4095  # counts of 12 bits, two of which are exact in one float32


class Ranks:
    """The processes that train together, as one of them sees it.

    Args:
        group: their process group; None: this process trains alone.

    Example:
        >>> alone = Ranks()
        >>> alone.rank, alone.size, alone.gather("a"), alone.any(True)
        (0, 1, ['a'], True)
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Ask the group who and how many."""
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        # Some groups can reduce nothing that lies in host memory.
        self._device = "cuda" if group is not None and dist.get_backend(group) == "nccl" else "cpu"
        if self.size > MOST_RANKS:
            raise ConfigurationError(f"{self.size} processes train together; at most {MOST_RANKS} can.")

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks for all."""
        return self.rank == 0

    @property
    def together(self) -> bool:
        """Whether there are several."""
        return self.size > 1

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks; nothing waits for an accelerator.

        Args:
            tensor: of one shape and type on all ranks; it is not changed.
        """
        if not self.together:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.sums(flag)[0] > 0

    def sums(self, *values: float) -> tuple[float, ...]:
        """Return the sum of each number over all ranks."""
        if not self.together:
            return values
        return tuple(self.total(torch.tensor(values, dtype=torch.float64, device=self._device)).tolist())

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of the ranks."""
        if not self.together:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, compute: Callable[[], T]) -> T:
        """Let the first rank compute something, and return it on every rank; what it raises is raised on every rank."""
        if not self.together:
            return compute()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = compute()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, group_src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        value: T = outcome[0]
        return value

    def from_first_alone(self, compute: Callable[[], T]) -> T | None:
        """Let the first rank compute something that only it keeps; the others get None, or what it raises."""
        kept: list[T] = []
        self.from_first(lambda: kept.append(compute()))
        return kept[0] if kept else None

    def same_buffers(self, module: nn.Module) -> None:
        """Let every rank's buffers be the first rank's: running statistics are each rank's own otherwise."""
        if not self.together:
            return
        for buffer in module.buffers():
            dist.broadcast(buffer, group_src=0, group=self.group)

    def agree(self, loss: Tensor, faults: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce one step's loss and faults in 16 bytes, so that every rank decides the same.

        Faults travel as counts and never as the values that were found: a NaN would be lost in a maximum.

        Args:
            loss: shape [], this rank's.
            faults: bool, shape [6], found by this rank.

        Returns:
            Mean of the ranks' losses where they are finite, shape [], and which faults any rank has found, bool [6].
        """
        counts = faults.to(torch.float32).reshape(3, 2)
        pairs = counts[:, 0] + (MOST_RANKS + 1) * counts[:, 1]
        known = torch.where(torch.isfinite(loss), loss, 0.0).to(torch.float32).reshape(1)
        packet = self.total(torch.cat([pairs, known]))
        second = torch.floor(packet[:3] / (MOST_RANKS + 1))
        first = packet[:3] - (MOST_RANKS + 1) * second
        return packet[3] / self.size, torch.stack([first, second], 1).reshape(6) > 0


def first_to_say(name: str, value: str) -> str:
    """Return what the first process to come here said; for what has to be common before the processes have met.

    Args:
        name: of what is said.
        value: what this process would say.

    Raises:
        ConfigurationError: the launcher offers no place to say it.
    """
    if not started_by_torchrun():
        raise ConfigurationError(
            "several processes were started without torchrun, so they can't agree on the run's name: give name=<own>"
        )
    return bytes(_torchruns_store().compare_set(name, "", value)).decode()


def store_of_this_attempt(rank: int, size: int, timeout: timedelta) -> Any:
    """Return a place in torchrun's store where only the processes that run now meet.

    Torchrun keeps its store when it starts the processes anew, with the addresses of those before in it, and how often
    it did so isn't the same number on each machine (https://github.com/pytorch/pytorch/issues/135712). Whoever connects
    to such an address fails or waits for ever. Here each process says a name that nobody had before, and the first one
    invites the owners of the names it finds, until all have come.

    Args:
        rank: of this process.
        size: number of processes.
        timeout: how long they wait for each other.

    Raises:
        RuntimeError: somebody did not come in time.
    """
    store = _torchruns_store(timeout)
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", own)
        place = bytes(store.get(f"invitation/{own}")).decode()
        store.set(f"{place}/came/{rank}", "")
        return _within(place, store)
    end, missing, invited = time.monotonic() + timeout.total_seconds(), set(range(1, size)), set()
    while missing:
        for other in sorted(missing):
            name = bytes(store.get(f"here/{other}")).decode() if store.check([f"here/{other}"]) else None
            if name is not None and name not in invited:
                store.set(f"invitation/{name}", own)
                invited.add(name)
        missing = {other for other in missing if not store.check([f"{own}/came/{other}"])}
        if missing and time.monotonic() > end:
            raise RuntimeError(f"process 0 has waited {timeout} for processes {sorted(missing)[:8]} of {size}")
        time.sleep(0.005)
    return _within(own, store)


def started_by_torchrun() -> bool:
    """Return whether the launcher offers its store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _within(place: str, store: Any) -> Any:
    return dist.PrefixStore(place, store)  # type: ignore[attr-defined]  # as below


def _torchruns_store(timeout: timedelta = timedelta(minutes=5)) -> Any:
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Public, but not in torch's list of names.
    return dist.TCPStore(*place, is_master=False, timeout=timeout)  # type: ignore[attr-defined]


def ranks_of(modules: Iterable[nn.Module]) -> Ranks:
    """Return the ranks that train these modules: found by torch's wrappers for data parallel training.

    Args:
        modules: `DistributedDataParallel`, modules that `fully_shard` has seen, or any others, trained alone.

    Example:
        >>> ranks_of([nn.Linear(2, 1)]).size
        1
    """
    ranks = all_ranks()
    if not ranks.together:
        return ranks
    for module in modules:
        for part in module.modules():
            if isinstance(part, DistributedDataParallel):
                return Ranks(part.process_group)
        if any(is_distributed(parameter) for parameter in module.parameters()):
            return ranks
    return Ranks()


def all_ranks() -> Ranks:
    """Return all processes of this job as one group, for models that were taken out of torch's wrappers.

    Example:
        >>> all_ranks().size
        1
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()
    return Ranks(dist.group.WORLD)


def whole(tree: Any) -> Any:
    """Return the tree with every sharded tensor in one piece, in host memory; all ranks have to ask at once.

    Example:
        >>> whole({"weight": torch.ones(2)})
        {'weight': tensor([1., 1.])}
    """
    if not any(is_distributed(tensor) for tensor in tensors(tree)):
        return tree
    return map_tensors(lambda tensor: tensor.full_tensor().cpu() if is_distributed(tensor) else tensor, tree)


def sharded_like(tree: Any, pattern: Any) -> Any:
    """Return this rank's shards of whole tensors, divided as those of `pattern` are; without any communication.

    Args:
        tree: the same on all ranks: a tensor, or a dictionary of them.
        pattern: a tensor or a dictionary with the same keys; what isn't sharded there is returned as it is.

    Example:
        >>> sharded_like({"weight": torch.ones(2)}, {"weight": torch.zeros(2)})
        {'weight': tensor([1., 1.])}
    """
    if isinstance(tree, dict) and isinstance(pattern, dict):
        if not any(is_distributed(tensor) for tensor in pattern.values()):
            return tree
        return {name: sharded_like(item, pattern.get(name)) for name, item in tree.items()}
    if not isinstance(tree, Tensor) or not isinstance(pattern, Tensor) or tree.shape != pattern.shape:
        return tree
    if not is_distributed(pattern) or is_distributed(tree):
        return tree
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tree.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)
