"""Randomness as a function of where one stands, not a stream that somebody else may have moved.

A key is a hash of its parts, the same in every process and on every machine. Seeding the default generators directly
costs about 1 microsecond; `torch.manual_seed` costs about 100 because it also visits every other device.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key(*parts: int | str) -> int:
    """Return a number of 63 bits that depends on all `parts` and on nothing else.

    Args:
        parts: whole numbers and words, for example seed, epoch, step, microbatch, rank.

    Returns:
        A number from 0 to 2**63 - 1, from the BLAKE2b hash (RFC 7693) of the parts.

    Example:
        >>> key(0, "sample", 3) == key(0, "sample", 3), key(1, 2) == key(12), key(1) == key("1")
        (True, False, False)
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform(seed: int, indices: torch.Tensor, columns: int) -> torch.Tensor:
    """Return random numbers for each of some samples, whatever other samples are asked for with them.

    Args:
        seed: a number from `key`.
        indices: numbers of the samples, int64 [n].
        columns: numbers for each of them.

    Returns:
        float64 [n, columns], from 0 to below 1; a function of (seed, index, column), on the device of `indices`.

    References:
        G. L. Steele, D. Lea, C. H. Flood: Fast Splittable Pseudorandom Number Generators, 2014 (its mixing function).

    Example:
        >>> torch.equal(uniform(7, torch.tensor([3, 5]), 2)[1:], uniform(7, torch.tensor([5]), 2))
        True
    """
    of_sample = _mixed(_mixed(indices) + _signed(seed * 2 + 1))
    counters = torch.arange(1, columns + 1, device=indices.device) * _signed(0x9E3779B97F4A7C15)
    return _shifted(_mixed(of_sample.unsqueeze(1) + counters), 11).double() * 2.0**-53


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Return 64 bits each of which depends on all the bits of the number; products wrap around."""
    numbers = (numbers ^ _shifted(numbers, 30)) * _signed(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ _shifted(numbers, 27)) * _signed(0x94D049BB133111EB)
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right with zeros coming in, which torch doesn't do with a sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the int64 with the lowest 64 bits of the number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def generators(device: torch.device | str = "cpu") -> list[torch.Generator]:
    """Return torch's default generators that a computation on `device` may draw from."""
    device = torch.device(device)
    found = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = device.index if device.index is not None else torch.cuda.current_device()
        found.append(torch.cuda.default_generators[index])
    return found


@contextmanager
def keyed(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Let torch's default generators start from `seed` inside the block, and put them back afterwards.

    Args:
        seed: a number from `key`.
        device: where the computation draws: the CPU's generator always counts, and this device's.

    Example:
        >>> with keyed(key(0, 1)):
        ...     first = torch.rand(2)
        >>> with keyed(key(0, 1)):
        ...     second = torch.rand(2)
        >>> torch.equal(first, second)
        True
    """
    found = generators(device)
    before = [generator.get_state() for generator in found]
    for generator in found:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(found, before, strict=True):
            generator.set_state(state)


@contextmanager
def keyed_all(seed: int) -> Iterator[None]:
    """Let torch (CPU), numpy and `random` start from `seed` inside the block, and put all three back afterwards.

    For code of the user's that draws from any of them, such as an augmentation in a data set.

    Example:
        >>> with keyed_all(key(0, 1)):
        ...     first = random.random(), float(np.random.rand())
        >>> with keyed_all(key(0, 1)):
        ...     first == (random.random(), float(np.random.rand()))
        True
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        with keyed(seed):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
