"""Who chose what: training samples that draw what wasn't chosen, and users with what is held out for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from stabletrain.checks import whole
from stabletrain.data.arrays import Integers
from stabletrain.data.splits import Splits, check_shares
from stabletrain.data.table import Floats
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key, uniform

TRAINING, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class Lists:
    """A list of whole numbers for each of some rows, laid one after the other.

    Attributes:
        values: int64 [N], rising within each list.
        starts: where each list begins, and the end, int64 [rows + 1].

    Example:
        >>> Lists.of(torch.tensor([2, 0, 2]), torch.tensor([5, 4, 1]), rows=3).padded(torch.tensor([2, 1]))
        tensor([[ 1,  5],
                [-1, -1]])
    """

    values: torch.Tensor
    starts: torch.Tensor

    @staticmethod
    def of(rows_of: torch.Tensor, values: torch.Tensor, rows: int) -> Lists:
        """Return the lists of pairs (row, value), int64 [N] each."""
        span = int(values.max()) + 1 if len(values) > 0 else 1
        flat = (rows_of * span + values).sort().values
        starts = torch.searchsorted(flat, torch.arange(rows + 1) * span)
        return Lists(flat % span, starts)

    def lengths(self) -> torch.Tensor:
        """Return the length of each list, int64 [rows]."""
        return self.starts.diff()

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the lists of these rows side by side, int64 [n, longest of them], filled up with -1."""
        starts, lengths = self.starts[rows], self.lengths()[rows]
        offsets = torch.arange(int(lengths.max()) if len(rows) > 0 else 0)
        there = offsets < lengths.unsqueeze(1)
        places = (starts.unsqueeze(1) + offsets).masked_fill(~there, 0)
        return self.values[places].masked_fill(~there, -1) if there.any() else torch.full(there.shape, -1)


def complement(lists: Lists, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the numbers at these places among those, from 0 on, that are not in a row's list.

    The k-th number of a list (from 0) has `value - k` others before it. So before the r-th of the others there are as
    many listed numbers as have at most r others before them; a bisection in all rows at once counts them.

    Args:
        lists: without repetition within a list.
        rows: int64 [n].
        places: int64 [n, columns], from 0.

    Returns:
        int64 [n, columns].

    Example:
        >>> lists = Lists.of(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2, 3]), rows=1)
        >>> complement(lists, torch.tensor([0]), torch.tensor([[0, 1, 2]]))
        tensor([[1, 4, 5]])
    """
    start = lists.starts[rows].unsqueeze(1)
    low, high = torch.zeros_like(places), lists.lengths()[rows].unsqueeze(1).expand_as(places).clone()
    longest = int(lists.lengths().max()) if len(lists.starts) > 1 else 0
    last = max(0, len(lists.values) - 1)
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        open_ = low < high
        before = lists.values[(start + middle).clamp_max(last)] - middle
        passed = open_ & (before <= places)
        low, high = torch.where(passed, middle + 1, low), torch.where(open_ & ~passed, middle, high)
    return places + low


class Interactions(Dataset[dict[str, torch.Tensor]]):
    """Samples to train on: a user, an item that the user chose, and items that the user didn't choose.

    Those are drawn evenly from the items that somebody chose in training, without those that this user chose there. An
    item that nobody ever chose isn't among them: that it wasn't chosen tells nothing, since it may be new.

    Args:
        users: int64 [N].
        items: int64 [N]; no pair twice.
        weights: of each sample's loss, float32 [N].
        negatives: how many items are drawn for each sample.

    Raises:
        ConfigurationError: for less than one negative, and for a user who chose every item.

    Example:
        >>> data = Interactions(torch.tensor([0, 0, 1]), torch.tensor([4, 7, 9]), torch.ones(3), negatives=2)
        >>> sample = data.gather(torch.tensor([1]), seed=3)
        >>> sample["user"], sample["item"], sample["negatives"], sample["weight"]
        (tensor([0]), tensor([7]), tensor([[9, 9]]), tensor([1.]))
    """

    random = True

    def __init__(self, users: torch.Tensor, items: torch.Tensor, weights: torch.Tensor, *, negatives: int = 1) -> None:
        whole("negatives", negatives)
        self.users, self.items, self.weights, self.negatives = users, items, weights, negatives
        seen, compact = np.unique(items.numpy(), return_inverse=True)
        self.seen = torch.from_numpy(seen)
        self._chosen = Lists.of(users, torch.from_numpy(compact), int(users.max()) + 1)
        self._others = len(self.seen) - self._chosen.lengths()
        if bool((self._others <= 0).any()):
            user = int((self._others <= 0).nonzero()[0])
            raise ConfigurationError(
                f"user number {user} (from 0) chose each of the {len(self.seen)} items that anybody chose in training, "
                "so there is none to compare with. Leave such users out, or give more interactions."
            )

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = self.gather(torch.tensor([index]), seed=int(torch.randint(1 << 62, ())))
        return {name: values[0] for name, values in drawn.items()}

    def gather(self, indices: torch.Tensor, *, seed: int) -> dict[str, torch.Tensor]:
        """Return the batch of these samples.

        Args:
            indices: positions, int64 [n], on the CPU.
            seed: together with a sample's position it decides what is drawn for it.

        Returns:
            `user` and `item` int64 [n], `negatives` int64 [n, negatives], `weight` float32 [n].
        """
        users = self.users[indices]
        drawn = uniform(seed, indices, self.negatives)
        others = self._others[users].unsqueeze(1)
        places = (drawn * others).long().minimum(others - 1)
        return {
            "user": users,
            "item": self.items[indices],
            "negatives": self.seen[complement(self._chosen, users, places)],
            "weight": self.weights[indices],
        }


class HeldOut(Dataset[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]):
    """Samples to evaluate on: a user, the items held out for that user, and those that are known and don't count.

    Args:
        held_out: for every user; those with none are no samples.
        known: for every user, what is left out of the ranking.
        cold: which items count as cold, bool [items].

    Example:
        >>> held_out = Lists.of(torch.tensor([1, 1]), torch.tensor([3, 0]), rows=2)
        >>> known = Lists.of(torch.tensor([0, 1]), torch.tensor([2, 2]), rows=2)
        >>> HeldOut(held_out, known, torch.arange(4) == 3)[0]
        ({'user': tensor(1)}, {'held_out': tensor([0, 3]), 'cold': tensor([False,  True]), 'known': tensor([2])})
    """

    def __init__(self, held_out: Lists, known: Lists, cold: torch.Tensor) -> None:
        self.users = held_out.lengths().nonzero().squeeze(1)
        self.held_out, self.known, self.cold = held_out, known, cold

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        inputs, targets = self.gather(torch.tensor([index]))
        return {name: row[0] for name, row in inputs.items()}, {name: row[0] for name, row in targets.items()}

    def collate(self, samples: list[Any]) -> Any:
        """Return the batch of some samples; lists of different lengths are filled up with -1."""
        users = torch.stack([inputs["user"] for inputs, _ in samples])
        return self.gather(torch.searchsorted(self.users, users))

    def gather(self, indices: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the batch of these samples.

        Args:
            indices: positions, int64 [n], on the CPU.

        Returns:
            Inputs: `user` int64 [n]. Targets: `held_out` int64 [n, H] and `known` int64 [n, K], filled up with -1, and
            `cold` bool [n, H].
        """
        users = self.users[indices]
        held_out = self.held_out.padded(users)
        cold = self.cold[held_out.clamp_min(0)] & (held_out >= 0)
        return {"user": users}, {"held_out": held_out, "cold": cold, "known": self.known.padded(users)}


def divided(
    users: Integers,
    items: Integers,
    *,
    validation: float,
    test: float,
    seed: int,
    cold_items: Integers | None = None,
    time: Floats | None = None,
) -> Integers:
    """Divide each user's interactions into training, validation and test.

    Of each user a share goes to validation and test, rounded, at least one of each if there are three; a user with
    fewer trains with all of them. Which ones, the seed decides, or the time: the last ones are for the test, those
    before for validation. Interactions with cold items never train: they go to validation or test, by the seed.

    Args:
        users: int64 [N].
        items: int64 [N].
        validation: share of the validation part, from 0 (no such part) to below 1.
        test: share of the test part, likewise.
        seed: number that decides.
        cold_items: numbers of the items that nobody trains with; None = none.
        time: of each interaction [N], in any unit; of two at the same time the earlier row comes first. None = by the
            seed.

    Returns:
        0 (training), 1 (validation) or 2 (test) for each interaction, int64 [N].

    Example:
        >>> time = np.array([3.0, 1.0, 4.0, 2.0])
        >>> divided(np.zeros(4, int), np.arange(4), validation=0.25, test=0.25, seed=0, time=time)
        array([1, 0, 2, 0])
    """
    check_shares(validation, test)
    random = np.random.default_rng(key(seed, "interactions"))
    order = random.permutation(len(users)) if time is None else np.argsort(time, kind="stable")
    parts: Integers = np.full(len(users), TRAINING, dtype=np.int64)
    is_cold = np.isin(items, cold_items) if cold_items is not None else np.zeros(len(items), dtype=bool)
    if is_cold.any() and validation + test > 0:
        parts[is_cold] = np.where(
            random.random(int(is_cold.sum())) * (validation + test) < validation, VALIDATION, TEST
        )
    order = order[~is_cold[order]]
    order = order[np.argsort(users[order], kind="stable")]
    own, first, count = np.unique(users[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(first, count)

    def held(share: float) -> Integers:
        wanted = np.maximum(np.floor(share * count + 0.5), 1) if share > 0 else np.zeros(len(own))
        return np.where(count >= 3, wanted, 0).astype(np.int64)

    for_validation = held(validation)
    # One is left for each other part.
    wanted_test = np.minimum(held(test), np.maximum(count - 1 - (for_validation > 0), 0))
    wanted_validation = np.minimum(for_validation, np.maximum(count - 1 - wanted_test, 0))
    from_end = np.repeat(count, count) - 1 - place
    last, before = np.repeat(wanted_test, count), np.repeat(wanted_test + wanted_validation, count)
    parts[order] = np.where(from_end < last, TEST, np.where(from_end < before, VALIDATION, TRAINING))
    return parts


def interaction_splits(
    users: Integers,
    items: Integers,
    parts: Integers,
    *,
    user_count: int,
    features: Mapping[str, Floats],
    weights: Floats | None = None,
    negatives: int = 1,
    cold: int = 0,
    limit: float | None = 10.0,
    name: str = "interactions",
    notes: list[str] | None = None,
) -> Splits:
    """Return the parts, with the graph of the training interactions and the items' features as tables.

    A feature is standardised by the items that somebody chose in training; one that doesn't change there becomes 0.

    Args:
        users: int64 [N], from 0 to user_count - 1.
        items: int64 [N], from 0; no pair twice.
        parts: of each interaction, as from `divided`.
        user_count: number of users.
        features: of the items by modality, finite [items, F].
        weights: of each interaction's loss, [N]; None = 1.
        negatives: items drawn for each training sample.
        cold: an item that was chosen at most so often in training counts as cold.
        limit: standardised features are kept from -limit to limit; None = no limit.
        name: name for records.
        notes: sentences for the user to read.

    Returns:
        Training samples as `Interactions` has them, the others as `HeldOut`. Tables: `neighbours` int64 [2 E], of all
        users and then all items, where items are numbered after the users; `starts` int64 [users + items + 1], where
        each node's neighbours begin; `features_<modality>` float32 [items, F]. Facts: `users`, `items`, `edges`,
        `features` (modality -> F).

    Raises:
        ConfigurationError: for parts without samples and numbers that make no sense.

    References:
        Y. Wei et al.: MMGCN: Multi-modal Graph Convolution Network for Personalized Recommendation of Micro-video,
        2019.
    """
    whole("cold", cold, 0)
    if limit is not None and (isinstance(limit, bool) or not 0 < limit < math.inf):
        raise ConfigurationError(f"limit is {limit!r}; a finite number above 0 is allowed, or null for none.")
    item_count = len(next(iter(features.values())))
    train = parts == TRAINING
    if not train.any():
        raise ConfigurationError(f"{name}: no interaction is left to train on; give more, or smaller shares.")
    user, item = torch.from_numpy(users), torch.from_numpy(items)
    loss_weights = torch.ones(len(users)) if weights is None else torch.from_numpy(weights.astype(np.float32))
    chosen = torch.from_numpy(train)
    dataset = Interactions(user[chosen], item[chosen], loss_weights[chosen], negatives=negatives)
    nodes = torch.cat([user[chosen], item[chosen] + user_count])
    others = torch.cat([item[chosen] + user_count, user[chosen]])
    graph = Lists.of(nodes, others, user_count + item_count)
    counts = np.bincount(items[train], minlength=item_count)
    used = np.flatnonzero(counts)
    is_cold = torch.from_numpy(counts <= cold)
    evaluated: list[HeldOut | None] = []
    for part, before in ((VALIDATION, train), (TEST, parts != TEST)):
        inside, known = torch.from_numpy(parts == part), torch.from_numpy(before)
        held_out = Lists.of(user[inside], item[inside], user_count)
        part_of = HeldOut(held_out, Lists.of(user[known], item[known], user_count), is_cold)
        evaluated.append(part_of if len(part_of) > 0 else None)
    tables = {"neighbours": graph.values, "starts": graph.starts}
    tables |= {f"features_{word}": _standardized(table, used, limit) for word, table in features.items()}
    facts: dict[str, Any] = {
        "users": user_count,
        "items": item_count,
        "edges": int(train.sum()),
        "features": {word: int(table.shape[1]) for word, table in features.items()},
    }
    return Splits(dataset, evaluated[0], evaluated[1], facts, name, list(notes or ()), tables=tables)


def _standardized(table: Floats, used: Integers, limit: float | None) -> torch.Tensor:
    known = table[used].astype(np.float64)
    # In units of the largest value, so that squares don't overflow.
    unit = np.maximum(np.abs(known).max(axis=0), 1e-300)
    mean, deviation = (known / unit).mean(axis=0), (known / unit).std(axis=0)
    constant = deviation <= 1e-12
    scaled = np.where(constant, 0.0, (table / unit - mean) / np.where(constant, 1.0, deviation))
    largest = float(np.finfo(np.float32).max) if limit is None else limit
    return torch.from_numpy(scaled.clip(-largest, largest).astype(np.float32))
