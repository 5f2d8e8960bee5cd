"""What checkpoints survive: processes killed at random moments, a disk that fills, damaged files.

    python benchmarks/torture.py [--runs 200] [--saves 100] [--regions 200] [--truncations 50] [--seed 0]

Each run is a process of its own that trains a small network with everything that has memory (fp16 loss scale,
averaged weights, BatchNorm, dropout, augmentation, accumulation, spikes, salvage of bad samples, quarantine,
rollback), saves every third update, and is killed (SIGKILL) at least once: a third of the runs during a save, the
others at any moment. Then the same call goes on until it is done. The processes are forked from this one, which has
imported torch, so each starts at once. Exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer's first step would import it, in each process anew
from torch import Tensor, nn

from stabletrain import Policy
from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore, store
from stabletrain.checkpoint.files import Checkpoint, checkpoint_folders, read_files, read_manifest
from stabletrain.data import ArrayDataset, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.optimizer import adamw
from stabletrain.precision import Precision
from stabletrain.tracking import Tracker
from stabletrain.trainer import train

BEGINS, ENDS = b"b", b"e"  # what a run tells its parent about each save
TABLES = ("history.csv", "steps.csv", "quarantine.json")


# ------------------------------------------------------------------------------------------------------ the training


def points(count: int, *, bad: bool) -> ArrayDataset:
    generator = torch.Generator().manual_seed(count)
    targets = torch.arange(count) % 3
    inputs = torch.randn(count, 6, generator=generator) + targets[:, None]
    if bad:
        inputs[[7, 50]] = math.nan
    return ArrayDataset(inputs, targets)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def noisy(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = data
    return inputs + 0.1 * torch.randn_like(inputs), targets


def training(folder: Path, checkpoint: Callable[..., CheckpointStore] = CheckpointStore) -> None:
    """Train to the end, from the last checkpoint in the folder if there is one."""
    run = assemble(
        network(),
        Splits(train=points(160, bad=True), validation=points(48, bad=False)),
        epochs=4,
        batch_size=16,
        accumulate=2,
        optimizer=partial(adamw, lr=1e-2),
        precision=partial(Precision, "float16", initial_scale=2.0**18, growth_interval=10),
        augmentation=noisy,
        guard=Policy(on_rejection="rollback", spikes=True, snapshot_every=7, max_incidents=0),
        ema=partial(ExponentialMovingAverage, decay=0.9),
        checkpoint=partial(checkpoint, every_updates=3, keep_last=3),
        tracking=partial(Tracker, tensorboard=False, progress="none", log_every=1),
        folder=folder,
    )
    train(run)


# -------------------------------------------------------------------------------------------------------- processes


class Child:
    """A forked process that trains, and tells when a save begins and ends."""

    def __init__(self, folder: Path, checkpoint: Callable[..., CheckpointStore] = CheckpointStore) -> None:
        self._reports, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = _in_child(partial(training, folder, checkpoint), told)
            finally:
                os._exit(code)
        os.close(told)

    def wait_for(self, saves: int) -> None:
        """Wait until that many saves have begun, or the process has ended."""
        while saves > 0 and (report := os.read(self._reports, 1)):
            saves -= report == BEGINS

    def kill(self) -> bool:
        """Kill it; return whether it lived."""
        os.kill(self.pid, signal.SIGKILL)
        return self._ended() == -signal.SIGKILL

    def finish(self) -> list[float]:
        """Let it come to its end; return the seconds that each save took."""
        seconds, begun = [], 0.0
        while report := os.read(self._reports, 1):
            if report == BEGINS:
                begun = time.perf_counter()
            else:
                seconds.append(time.perf_counter() - begun)
        code = self._ended()
        if code != 0:
            raise SystemExit(f"a run ended with {code}")
        return seconds

    def _ended(self) -> int:
        os.close(self._reports)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _in_child(work: Callable[[], None], told: int) -> int:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    logging.disable(logging.CRITICAL)
    write = store.write_tensors

    def reported(*arguments: Any, **keywords: Any) -> Any:
        os.write(told, BEGINS)
        entry = write(*arguments, **keywords)
        os.write(told, ENDS)
        return entry

    store.write_tensors = reported  # type: ignore[assignment]
    work()
    return 0


# ------------------------------------------------------------------------------------------------------------ killed


def outcome(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a run came to: all that its last checkpoint holds, and its tables."""
    newest = max((read_manifest(path) for path in checkpoint_folders(folder / "checkpoints")), key=lambda it: it.serial)
    return read_files(newest), {name: (folder / name).read_bytes() for name in TABLES}


def same(one: Any, other: Any) -> bool:
    """Compare two trees bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)


def killed(folder: Path, runs: int, chance: random.Random) -> dict[str, Any]:
    """Kill runs and let them go on; count what was torn and what differs from the undisturbed one."""
    start = time.perf_counter()
    save_seconds = Child(folder / "undisturbed").finish()
    duration, save = time.perf_counter() - start, statistics.median(save_seconds)
    undisturbed = outcome(folder / "undisturbed")
    found = {"runs": runs, "kills": 0, "runs killed in a save": 0, "torn": 0, "runs that differ": 0}
    for number in range(runs):
        place = folder / f"run-{number}"
        found["kills"] += 1
        in_save = number % 3 == 0
        half_written = _kill(place, chance, duration, save, len(save_seconds) if in_save else 0)
        while in_save and not half_written:  # it came too early or too late
            found["kills"] += 1
            half_written = _kill(place, chance, duration, save, 3)
        found["runs killed in a save"] += half_written
        while chance.random() < 0.3:
            found["kills"] += 1
            _kill(place, chance, duration, save, 0)
        Child(place).finish()
        found["torn"] += len(list((place / "checkpoints").glob("*.corrupt")))
        found["runs that differ"] += not same(outcome(place), undisturbed)
        shutil.rmtree(place)
    return found


def _kill(place: Path, chance: random.Random, duration: float, save: float, saves: int) -> bool:
    """Kill a run during one of its next saves, or at any moment; return whether something was left half written."""
    while True:
        child = Child(place)
        if saves > 0:
            child.wait_for(chance.randint(1, saves))
            time.sleep(save * chance.random())
        else:
            time.sleep(duration * chance.random())
        if child.kill():
            return any((place / "checkpoints").glob(".tmp-*"))
        shutil.rmtree(place)  # it was done before: another one, from the beginning


# -------------------------------------------------------------------------------------------------------- full disks


class Crowded(CheckpointStore):
    """A store whose disk has too little room for every second checkpoint; looks at the earlier ones each time."""

    chance = random.Random(0)
    limit = False  # whether the file size limit stands in for a full disk
    refused = looks = lost = 0

    def _publish(self, *arguments: Any, **keywords: Any) -> Path:
        if self.chance.random() < 0.5:
            return super()._publish(*arguments, **keywords)
        before = [read_manifest(path) for path in checkpoint_folders(self.folder)]
        try:
            with (_limited if self.limit else partial(_filled, self.folder))(self.chance.randrange(40_000)):
                return super()._publish(*arguments, **keywords)
        except OSError:
            Crowded.refused += 1
            raise
        finally:
            Crowded.looks += len(before)
            Crowded.lost += sum(not _is_whole(checkpoint) for checkpoint in before)


@contextlib.contextmanager
def _filled(folder: Path, room: int) -> Iterator[None]:
    filler = folder.parent / "filler"
    free = os.statvfs(folder.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def _limited(room: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _is_whole(checkpoint: Checkpoint) -> bool:
    try:
        read_files(checkpoint)
    except Exception:
        return False
    return True


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """Mount a tmpfs of 2 MiB at `place`; yield whether that works here."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], capture_output=True, check=False)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", place], check=True)


def full_disk(folder: Path, saves: int, chance: random.Random) -> dict[str, Any]:
    """Train until so many saves were refused; count the earlier checkpoints that this cost, and runs that differ.

    Args:
        folder: holds the run `undisturbed`.
        saves: how many.
        chance: when, and how much room there is.
    """
    undisturbed = outcome(folder / "undisturbed")[0]
    found = {"disk": "", "saves refused": 0, "looks at earlier ones": 0, "earlier ones lost": 0, "runs that differ": 0}
    with small_disk(folder / "disk") as mounted:
        found["disk"] = "tmpfs of 2 MiB" if mounted else "file size limit"
        while found["saves refused"] < saves:
            counts = _crowded(folder / "disk" / "run", chance.random(), limit=not mounted)
            for name, count in zip(list(found)[1:4], counts, strict=True):
                found[name] += count
            last = outcome(folder / "disk" / "run")[0]
            parts = ("model", "optimizer", "ema", "precision", "guard", "progress")
            differ = not all(same(last["state.pt"][part], undisturbed["state.pt"][part]) for part in parts)
            found["runs that differ"] += differ
            shutil.rmtree(folder / "disk" / "run")
    return found


def _crowded(place: Path, seed: float, *, limit: bool) -> list[int]:
    """Train in a process of its own, whose disk fills again and again; return what its store counted."""
    result, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            Crowded.chance, Crowded.limit = random.Random(seed), limit
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            logging.disable(logging.CRITICAL)
            training(place, partial(Crowded, asynchronous=False))
            training(place)  # the last save may have been refused: the same call makes up for it
            os.write(told, f"{Crowded.refused} {Crowded.looks} {Crowded.lost}".encode())
            code = 0
        finally:
            os._exit(code)
    os.close(told)
    text = os.read(result, 100).decode()
    os.close(result)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise SystemExit("a run on a full disk failed")
    return [int(word) for word in text.split()]


# ------------------------------------------------------------------------------------------------------ damaged files


def damaged(folder: Path, regions: int, truncations: int, chance: random.Random) -> dict[str, Any]:
    """Damage the newest checkpoint of the run `undisturbed`; count how often the one before is used instead."""
    Child(folder / "source").finish()
    newest, before, *_ = sorted(
        (read_manifest(path) for path in checkpoint_folders(folder / "source" / "checkpoints")),
        key=lambda it: -it.serial,
    )
    files = sorted(path for path in newest.path.iterdir())
    found = {"regions flipped": 0, "flips found": 0, "truncations": 0, "truncations found": 0}
    total = sum(path.stat().st_size for path in files)
    for path in files:
        whole = path.read_bytes()
        share = max(2, round(regions * len(whole) / total))  # each file in turn, the larger in more regions
        bounds = [len(whole) * part // share for part in range(share + 1)]
        for first, end in itertools.pairwise(bounds):
            torn = bytearray(whole)
            torn[chance.randrange(first, end)] ^= 1 << chance.randrange(8)
            found["regions flipped"] += 1
            found["flips found"] += _is_found(path, bytes(torn), whole, newest, before)
    for _ in range(truncations):
        path = chance.choice(files)
        whole = path.read_bytes()
        found["truncations"] += 1
        found["truncations found"] += _is_found(path, whole[: chance.randrange(len(whole))], whole, newest, before)
    return found


def _is_found(path: Path, torn: bytes, whole: bytes, newest: Checkpoint, before: Checkpoint) -> bool:
    path.write_bytes(torn)
    checkpoints = CheckpointStore(newest.path.parents[1])
    checkpoints.latest()
    aside = newest.path.with_name(f"{newest.path.name}.corrupt")
    right = aside.is_dir() and checkpoints.found == before.path
    if aside.is_dir():
        aside.rename(newest.path)
    path.write_bytes(whole)
    return right


# ------------------------------------------------------------------------------------------------------------- report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="runs to kill")
    parser.add_argument("--saves", type=int, default=100, help="saves that a full disk refuses")
    parser.add_argument(
        "--regions", type=int, default=200, help="regions of a checkpoint's bytes, one bit flipped in each"
    )
    parser.add_argument("--truncations", type=int, default=50, help="truncations at random places")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # before the first fork: threads don't survive one
    logging.disable(logging.CRITICAL)
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        parts = {
            "killed": partial(killed, Path(name), given.runs, chance),
            "full disk": partial(full_disk, Path(name), given.saves, chance),
            "damaged": partial(damaged, Path(name), given.regions, given.truncations, chance),
        }
        facts = {}
        print("| what | figure | value |\n| --- | --- | --- |")
        for part, work in parts.items():
            facts[part] = work()
            for figure, value in facts[part].items():
                print(f"| {part} | {figure} | {value} |", flush=True)
    bad = [
        *(facts["killed"][figure] for figure in ("torn", "runs that differ")),
        *(facts["full disk"][figure] for figure in ("earlier ones lost", "runs that differ")),
        facts["damaged"]["regions flipped"] - facts["damaged"]["flips found"],
        facts["damaged"]["truncations"] - facts["damaged"]["truncations found"],
    ]
    return int(any(bad))


if __name__ == "__main__":
    sys.exit(main())
