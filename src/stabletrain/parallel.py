"""How many processes train together, and how: torch's own DistributedDataParallel and fully_shard do the work.

A launcher (torchrun) starts the processes and tells each its rank; without one, every option trains in one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stabletrain.collectives import Ranks, started_by_torchrun, store_of_this_attempt
from stabletrain.errors import ConfigurationError


class SingleProcess:
    """One process, one device.

    Example:
        >>> parallel = SingleProcess()
        >>> parallel.join(torch.device("cpu")), parallel.ranks.size
        (device(type='cpu'), 1)
        >>> parallel.wrap(nn.Identity())
        Identity()
    """

    def __init__(self) -> None:
        self.ranks = Ranks()
        self._began_group = False

    @property
    def tries_alone(self) -> bool:
        """Whether one rank can run the model by itself, while the others do something else."""
        return True

    def join(self, device: torch.device) -> torch.device:
        """Meet the other processes.

        Args:
            device: where the run is to compute.

        Returns:
            Where this process computes.

        Raises:
            ConfigurationError: when a launcher has started several processes: each would train alone.
        """
        count = _processes()
        if count > 1:
            raise ConfigurationError(
                f"parallel=none under a launcher with {count} processes: each would train the same model alone. Give "
                "parallel=ddp or parallel=fsdp2, or start one process."
            )
        return device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model, on its device, as the optimizer is to see it."""
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what training calls instead of the model."""
        return model

    def begin_step(self, model: nn.Module) -> None:
        """Do what has to be done before a step's first forward."""

    def close(self) -> None:
        """Leave the other processes."""
        if self._began_group and dist.is_initialized():
            dist.destroy_process_group()
        self._began_group = False


class _Group(SingleProcess):
    """Several processes, each with a device of its own: GPUs over NCCL, CPUs over gloo."""

    name = ""

    def __init__(self, *, timeout_minutes: float = 30.0) -> None:
        super().__init__()
        if not timeout_minutes > 0:
            raise ConfigurationError(f"parallel.timeout_minutes is {timeout_minutes}; give a number above 0.")
        self._timeout = timedelta(minutes=timeout_minutes)
        self._device = torch.device("cpu")

    def join(self, device: torch.device) -> torch.device:
        """Meet the other processes, and take the GPU with this one's number on its machine."""
        if device.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= torch.cuda.device_count():
                raise ConfigurationError(
                    f"parallel={self.name}: process {local} of this machine has no GPU; there are "
                    f"{torch.cuda.device_count()}. Start as many processes as there are GPUs, or give device=cpu."
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            store: Any = None  # torch finds one by what the environment says
            if size == 1:
                store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in its list of names
            elif started_by_torchrun():
                store = store_of_this_attempt(rank, size, self._timeout)
            dist.init_process_group(backend, timeout=self._timeout, store=store, rank=rank, world_size=size)
            self._began_group = True
        self.ranks = Ranks(dist.group.WORLD)
        self._device = device
        return device


class DataParallel(_Group):
    """The whole model in every process; gradients are averaged (torch's DistributedDataParallel).

    Args:
        sync_batchnorm: let batch normalisation see the samples of all processes; GPUs only.
        timeout_minutes: how long a process waits for the others.

    Raises:
        ConfigurationError: for a switch that the device doesn't know.

    Source:
        Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
    """

    name = "ddp"

    def __init__(self, *, sync_batchnorm: bool = False, timeout_minutes: float = 30.0) -> None:
        super().__init__(timeout_minutes=timeout_minutes)
        self.sync_batchnorm = sync_batchnorm

    @property
    def tries_alone(self) -> bool:
        """With synchronised batch normalisation, no rank can."""
        return not self.sync_batchnorm

    def join(self, device: torch.device) -> torch.device:
        """Meet the other processes."""
        if self.sync_batchnorm and device.type != "cuda":
            raise ConfigurationError(
                "parallel.sync_batchnorm=true needs GPUs: torch's SyncBatchNorm has no CPU kernel. Give false, or a "
                "model with GroupNorm or LayerNorm."
            )
        return super().join(device)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Replace the batch normalisations, where they are to be synchronised."""
        if not self.sync_batchnorm:
            return model
        synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return synchronised

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the wrapper whose backward averages the gradients."""
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        return DistributedDataParallel(model)


class FullySharded(_Group):
    """Parameters, gradients and optimizer state divided among the processes (torch's fully_shard, "FSDP2").

    Args:
        min_parameters: a part of the model with at least so many parameters is gathered and freed on its own.
        timeout_minutes: how long a process waits for the others.

    Raises:
        ConfigurationError: for a negative number.

    Source:
        Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", in its form per parameter.
    """

    name = "fsdp2"

    def __init__(self, *, min_parameters: int = 100_000, timeout_minutes: float = 30.0) -> None:
        super().__init__(timeout_minutes=timeout_minutes)
        if min_parameters < 0:
            raise ConfigurationError(f"parallel.min_parameters is {min_parameters}; give a whole number from 0.")
        self.min_parameters = min_parameters

    @property
    def tries_alone(self) -> bool:
        """Every forward gathers parameters from all ranks."""
        return False

    def prepare(self, model: nn.Module) -> nn.Module:
        """Divide the parameters, from the innermost parts outward."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device.type, (self.ranks.size,))
        for part in _large_parts(model, self.min_parameters):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def begin_step(self, model: nn.Module) -> None:
        """Let all ranks begin with the first one's buffers, as DistributedDataParallel does by itself."""
        self.ranks.same_buffers(model)


def gradients_wait(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Return a context in which a microbatch that isn't the step's last one exchanges no gradients."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    return nullcontext()


def _large_parts(model: nn.Module, min_parameters: int) -> Iterable[nn.Module]:
    """Yield what to divide on its own: the smallest parts that are large enough, and that are called as a whole."""
    for child in model.children():
        if sum(parameter.numel() for parameter in child.parameters()) < max(1, min_parameters):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # their forward is never called
            yield from _large_parts(child, min_parameters)
        else:
            yield child


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
