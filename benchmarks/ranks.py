"""What the guard costs on several ranks: step time of a DistributedDataParallel loop with and without it, interleaved.

    torchrun --standalone --nproc-per-node 2 benchmarks/ranks.py --turns 40

Without: backward, `clip_grad_norm_`, `optimizer.step`. With: the same loop with a StepGuard. Also the bytes that the
guard reduces in a step, counted where torch is asked for them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stabletrain.guard import Policy, StepGuard


def workloads() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]]:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    return {
        "transformer, 3.2 million parameters": (
            lambda: nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(256, 64)),
            lambda: torch.randn(8, 64, 256),
        ),
        "convolutions, 0.3 million parameters": (
            lambda: nn.Sequential(
                *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)),
                *(nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(4096, 64)),
            ),
            lambda: torch.randn(32, 3, 16, 16),
        ),
    }


def loop(model: nn.Module, inputs: torch.Tensor, guarded: bool) -> Callable[[int], float]:
    """Return a function that trains so many steps and returns the seconds of one."""
    network = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    guard = StepGuard(network, optimizer, max_norm=1.0, policy=Policy(spikes=True)) if guarded else None

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            loss = network(inputs).square().mean()
            loss.backward()
            if guard is not None:
                guard.step(loss)
            else:
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        dist.barrier()
        return (time.perf_counter() - start) / steps

    return run


def bytes_of_a_step(run: Callable[[int], float]) -> int:
    """Count the bytes that are handed to `all_reduce` in one step; those of the gradients go another way."""
    counted = []
    reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *options: Any, **more: Any) -> Any:
        counted.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *options, **more)

    dist.all_reduce = counting
    try:
        run(1)
    finally:
        dist.all_reduce = reduce
    return sum(counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    for name, (build, data) in workloads().items():
        torch.manual_seed(dist.get_rank())
        inputs = data()
        bare, guarded = loop(build(), inputs, False), loop(build(), inputs, True)
        bare(20), guarded(20)
        reduced = bytes_of_a_step(guarded)
        pairs = []
        for turn in range(options.turns):
            order = (bare, guarded) if turn % 2 == 0 else (guarded, bare)
            times = {function: function(options.steps) for function in order}
            pairs.append((times[bare], times[guarded]))
        if first:
            without, with_it = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = sorted(b / a for a, b in pairs)
            low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
            print(
                f"{name}: {1e3 * without:.2f} ms without, {1e3 * with_it:.2f} ms with, ratio of medians "
                f"{with_it / without:.3f} (middle 80 % of {len(ratios)} pairs {low:.3f} to {high:.3f}); "
                f"{reduced} bytes reduced by the guard",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
