"""Several ranks for a test: real processes, real gloo, and an end to waiting."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 60.0  # seconds for one case; a rank that waits for one that decided otherwise would wait for ever

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "stabletrain.assembly"])


def run_ranks(function: Callable[[Any], Any], size: int, cases: Sequence[Any], limit: float = LIMIT) -> list[list[Any]]:
    """Call `function` for each case in `size` processes that form a group.

    Args:
        function: of a module that the processes can import, such as `rank_cases`.
        size: number of ranks.
        cases: what to call it with, one after the other.
        limit: seconds for each of them, until the ranks are killed and the test fails.

    Returns:
        For each case what each rank returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_rank, args=(theirs, folder, rank, size, function, cases))
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            return [_answers([connection for _, connection in ranks], case, limit) for case in cases]
        finally:
            for process, connection in ranks:
                connection.close()
                process.join(5.0)
                process.kill()
                process.join()


def _answers(connections: Sequence[Any], case: Any, limit: float) -> list[Any]:
    end = time.monotonic() + limit
    outcomes = [_receive(connection, end) for connection in connections]
    failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(outcomes) if not fine]
    assert not failed, f"{case}\n" + "\n".join(failed)
    return [outcome for _, outcome in outcomes]


def _receive(connection: Any, end: float) -> tuple[bool, Any]:
    if not connection.poll(max(0.0, end - time.monotonic())):
        return False, "gave no answer within the limit"
    try:
        answer: tuple[bool, Any] = pickle.loads(connection.recv_bytes())
    except EOFError:
        return False, "died"
    return answer


def _rank(
    connection: Any, folder: str, rank: int, size: int, function: Callable[[Any], Any], cases: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    # What torchrun would say; a store in a file needs no free port.
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)})
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for case in cases:
        try:
            answer = True, function(case)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))  # tensors by value, not as files shared with a process that ends
        if not answer[0]:
            return
    dist.barrier()
    dist.destroy_process_group()
