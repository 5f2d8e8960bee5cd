"""What a forward pass may change before anyone has decided about the step, and how it is put back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stabletrain.errors import ConfigurationError
from stabletrain.randomness import generators
from stabletrain.tree import local

log = logging.getLogger(__name__)


class BufferSlot(NamedTuple):
    """Where a buffer lives and which tensor stood there."""

    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor | None


class Snapshot:
    """A copy of buffers, of parameters that a forward changes, of randomness, and of what the user names.

    The optimizer needs no copy: a rejected step never reaches it. Parameters are copied whole before the first
    step only, to see which of them a forward changes (`Embedding(max_norm=...)` does); from then on only those.

    Args:
        modules: the modules whose buffers and parameters count.
        extra: more state that a forward changes: tensors, modules (all parameters and buffers), generators,
            or anything with `state_dict` and `load_state_dict`.

    Raises:
        ConfigurationError: for an `extra` that can't be copied and put back.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> snapshot = Snapshot([layer])
        >>> snapshot.take()
        >>> _ = layer(torch.randn(8, 2))
        >>> snapshot.restore()
        >>> layer.running_mean.tolist(), int(layer.num_batches_tracked)
        ([0.0, 0.0], 0)
    """

    def __init__(self, modules: Iterable[nn.Module], extra: Sequence[Any] = ()) -> None:
        """Find what there is to copy; nothing is copied yet."""
        self._modules = list(dict.fromkeys(part for module in modules for part in module.modules()))
        self._parameters = list(
            dict.fromkeys(p for module in self._modules for p in module._parameters.values() if p is not None)
        )
        self._moving = [
            weight
            for module in self._modules
            if getattr(module, "max_norm", None) is not None
            and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        ]
        self._watching = False  # whether parameters that move were looked for already
        self._extra = [_check_extra(item) for item in extra]
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._generators = generators(device)
        self.slots: list[BufferSlot] = []
        self._tensors: list[Tensor] = []  # the buffers' tensors when the copy was taken
        self._copies: list[Tensor] = []
        self._parameter_copies: list[tuple[nn.Parameter, Tensor]] = []
        self._versions: list[int] = []
        self._extra_copies: list[Any] = []
        self._random_states: list[Tensor] = []
        self.taken = False

    @property
    def restorable_on_device(self) -> bool:
        """Whether everything can be put back by operations on the device alone."""
        if self._extra or len(self.slots) != sum(len(module._buffers) for module in self._modules):
            return False
        kept = iter(self._copies)
        for slot in self.slots:
            now, before = slot.owner.get(slot.name), next(kept) if slot.tensor is not None else None
            if (now is None) != (before is None) or (
                now is not None and before is not None and not _alike(now, before)
            ):
                return False
        return True

    @torch.inference_mode(False)
    @torch.no_grad()
    def take(self) -> None:
        """Copy everything a forward may change, into the memory of the copy before."""
        self.slots = [
            BufferSlot(module._buffers, name, tensor)
            for module in self._modules
            for name, tensor in module._buffers.items()
        ]
        tensors = [slot.tensor for slot in self.slots if slot.tensor is not None]
        if not _fit(tensors, self._tensors, self._copies):
            self._tensors, self._copies = tensors, [tensor.clone() for tensor in tensors]
        elif tensors:
            torch._foreach_copy_(self._copies, tensors)
        copied = self._moving if self._watching else self._parameters
        self._parameter_copies = [(parameter, parameter.detach().clone()) for parameter in copied]
        self._versions = [parameter._version for parameter in self._parameters]
        self._extra_copies = [_copy_extra(item) for item in self._extra]
        self._random_states = [generator.get_state() for generator in self._generators]
        self.taken = True

    def note_moved_parameters(self) -> None:
        """Find parameters that the forward changed; called after backward, before anything else changes them."""
        moved = [
            parameter
            for parameter, version in zip(self._parameters, self._versions, strict=True)
            if parameter._version != version
        ]
        if not self._watching:
            # Once, also by value: a change through `.data` doesn't count up the version.
            moved += [parameter for parameter, kept in self._parameter_copies if not _identical(parameter, kept)]
        new = list(set(moved) - set(self._moving))
        if new and self._watching:
            log.warning(
                "a forward changed %d parameters that no forward had changed before; if this step is rejected they "
                "keep that change. From now on they are copied too.",
                len(new),
            )
        self._moving += new
        if not self._watching:
            moving = set(self._moving)
            self._parameter_copies = [(p, kept) for p, kept in self._parameter_copies if p in moving]
            self._watching = True

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as it was when the copy was taken; the copy stays good for a second time."""
        known = {(id(slot.owner), slot.name) for slot in self.slots}
        for owner in (module._buffers for module in self._modules):
            for name in [name for name in owner if (id(owner), name) not in known]:
                del owner[name]
        for slot in self.slots:
            slot.owner[slot.name] = slot.tensor
        for tensor, before in zip(self._tensors, self._copies, strict=True):
            if tensor.shape == before.shape:
                tensor.copy_(before)
            else:
                tensor.data = before.clone()  # it was resized
        for parameter, kept in self._parameter_copies:
            parameter.copy_(kept)
        for item, state in zip(self._extra, self._extra_copies, strict=True):
            _restore_extra(item, state)
        for generator, random_state in zip(self._generators, self._random_states, strict=True):
            generator.set_state(random_state)
        self.taken = False

    @torch.no_grad()
    def restore_where(self, rejected: Tensor) -> None:
        """Put buffers and moved parameters back if `rejected`, without asking the device which it was.

        Args:
            rejected: bool, shape [], on the device of the buffers.
        """
        kept = iter(self._copies)
        for slot in self.slots:
            if slot.tensor is not None:
                current = slot.owner[slot.name]
                assert current is not None
                current.copy_(torch.where(rejected, next(kept), current))
        for parameter, copy_before in self._parameter_copies:
            parameter.copy_(torch.where(rejected, copy_before, parameter))
        self.taken = False

    def buffers(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, current tensor, copy) of each floating buffer."""
        found: list[tuple[str, Tensor, Tensor]] = []
        kept = iter(self._copies)
        for slot in self.slots:
            if slot.tensor is not None:
                before, current = next(kept), slot.owner.get(slot.name)
                if current is not None and current.is_floating_point():
                    found.append((slot.name, current, before))
        return found


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _fit(now: list[Tensor], before: list[Tensor], copies: list[Tensor]) -> bool:
    """Return whether the copies of the tensors before have room for the tensors now."""
    return len(now) == len(before) and all(
        tensor is known and _alike(tensor, kept) for tensor, known, kept in zip(now, before, copies, strict=True)
    )


@torch.no_grad()
def _identical(now: Tensor, before: Tensor) -> bool:
    """Compare with a NaN equal to itself."""
    now, before = local(now), local(before)
    return bool(((now == before) | (torch.isnan(now) & torch.isnan(before))).all())


def _check_extra(item: Any) -> Any:
    if isinstance(item, (Tensor, nn.Module, torch.Generator)):
        return item
    if hasattr(item, "state_dict") and hasattr(item, "load_state_dict"):
        return item
    raise ConfigurationError(
        f"extra holds a {type(item).__name__}, which can't be put back after a rejected step. Allowed: a tensor, a "
        "module, a torch.Generator, or an object with state_dict() and load_state_dict()."
    )


def _copy_extra(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.detach().clone()
    if isinstance(item, torch.Generator):
        return item.get_state()
    if isinstance(item, nn.Module):
        return [tensor.detach().clone() for tensor in (*item.parameters(), *item.buffers())]
    return copy.deepcopy(item.state_dict())


def _restore_extra(item: Any, kept: Any) -> None:
    if isinstance(item, Tensor):
        item.copy_(kept)
    elif isinstance(item, torch.Generator):
        item.set_state(kept)
    elif isinstance(item, nn.Module):
        for tensor, before in zip((*item.parameters(), *item.buffers()), kept, strict=True):
            tensor.copy_(before)
    else:
        item.load_state_dict(copy.deepcopy(kept))  # optimizers keep a reference to what they load
