"""A state set aside at one moment: copied to host memory that is used again for the next."""

from __future__ import annotations

from typing import Any

import torch

from stabletrain.plain import plain


class Staging:
    """Copies a state so that what happens to it afterwards leaves the copy alone.

    What is copied are storages, as `torch.save` would write them, so tensors that share memory still do. The memory is
    kept: only the first copy has to ask the operating system for it. On an accelerator the copies are queued, into
    pinned memory, behind the work that makes the state and before the work that changes it; nothing waits for them.

    Args:
        copy: False: tensors in host memory are taken as they are, for a writer that is done before they change.

    Example:
        >>> weight = torch.ones(2)
        >>> staged = Staging(copy=True).take({"weight": weight, "same": weight}, "state")
        >>> _ = weight.zero_()
        >>> staged["weight"], staged["same"].data_ptr() == staged["weight"].data_ptr()
        (tensor([1., 1.]), True)
    """

    def __init__(self, *, copy: bool) -> None:
        self._copy = copy
        self._free: dict[str, torch.Tensor] = {}  # bytes, by the name of the first tensor in them
        self._used: dict[str, torch.Tensor] = {}
        self._copies: dict[int, torch.UntypedStorage] = {}  # by the address of what was copied
        self._devices: set[torch.device] = set()
        self._events: list[torch.cuda.Event] = []

    def take(self, tree: Any, name: str) -> Any:
        """Return the tree as `plain` would, with its tensors copied.

        Args:
            tree: what to copy; the copy that was taken before is overwritten.
            name: what to call it in an error.

        Raises:
            TypeError: something in it has a type that needs code to load; says where.
        """
        self._free, self._used = self._used, {}
        self._devices.clear()
        try:
            staged = plain(tree, name, self._staged)
        finally:
            self._copies.clear()
            self._free.clear()  # what this state has no use for
        self._events = [torch.cuda.Event() for _ in self._devices]  # type: ignore[no-untyped-call]
        for event, device in zip(self._events, self._devices, strict=True):
            event.record(torch.cuda.current_stream(device))
        return staged

    def wait(self) -> None:
        """Wait until an accelerator has made the copies."""
        for event in self._events:
            event.synchronize()

    def _staged(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type not in ("cpu", "cuda"):
            return tensor.cpu().clone()
        if tensor.device.type == "cpu" and not self._copy:
            return tensor
        storage = tensor.untyped_storage()
        copied = self._copies.get(storage._cdata)
        if copied is None:
            copied = self._copies[storage._cdata] = self._copied(storage, name)
        same = torch.empty(0, dtype=tensor.dtype)
        return same.set_(copied, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _copied(self, storage: torch.UntypedStorage, name: str) -> torch.UntypedStorage:
        on_cuda = storage.device.type == "cuda"
        buffer = self._free.pop(name, None)
        if buffer is None or len(buffer) != storage.nbytes() or buffer.is_pinned() != on_cuda:
            buffer = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_cuda)
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        buffer.copy_(source, non_blocking=on_cuda)
        if on_cuda:
            self._devices.add(storage.device)
        if self._copy:
            self._used[name] = buffer
        return buffer.untyped_storage()
