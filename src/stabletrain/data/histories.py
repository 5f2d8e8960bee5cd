"""Histories of items and the item that comes next; text embeddings of items; a generator with a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from stabletrain.checks import number
from stabletrain.data.arrays import Integers
from stabletrain.data.splits import Splits, split_indices
from stabletrain.data.table import Floats
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key

PADDING = -1  # the number of no item
Sample = tuple[dict[str, Tensor], Tensor]


def collate_histories(samples: Sequence[Sample]) -> Sample:
    """Return the batch of some histories, padded at their ends to the length of the longest, on the CPU.

    The loader moves the batch to the device as a whole.

    Args:
        samples: pairs of a history, `ids` int64 [L] and `text` float32 [L, D], and the number of the next item.

    Returns:
        `ids` int64 [B, L], -1 in the padding; `text` [B, L, D], 0 there; `mask` bool [B, L], False there; and the next
        items, int64 [B]. L is 1 at least.

    Raises:
        ConfigurationError: for a history whose numbers and text embeddings differ in length.

    Example:
        >>> def history(*ids):
        ...     return {"ids": torch.tensor(ids, dtype=torch.int64), "text": torch.ones(len(ids), 2)}
        >>> inputs, targets = collate_histories([(history(4, 2), torch.tensor(1)), (history(3), torch.tensor(0))])
        >>> inputs["ids"].tolist(), inputs["mask"].tolist(), targets.tolist()
        ([[4, 2], [3, -1]], [[True, True], [True, False]], [1, 0])
    """
    histories = [history for history, _ in samples]
    for history in histories:
        if len(history["ids"]) != len(history["text"]):
            raise ConfigurationError(
                f"a history has {len(history['ids'])} items, but {len(history['text'])} text embeddings: each item "
                "needs one."
            )
    ids = pad_sequence([history["ids"] for history in histories], batch_first=True, padding_value=PADDING)
    text = pad_sequence([history["text"] for history in histories], batch_first=True)
    if ids.shape[1] == 0:
        ids, text = ids.new_full((len(ids), 1), PADDING), text.new_zeros(len(ids), 1, text.shape[2])
    lengths = torch.tensor([len(history["ids"]) for history in histories])
    mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    targets = torch.stack([torch.as_tensor(target, dtype=torch.int64) for _, target in samples])
    return {"ids": ids, "text": text, "mask": mask}, targets


class ItemHistories(Dataset[Sample]):
    """What a user had so far, and what came next.

    The items of all users lie in memory once, one user after the other; a sample is a place in them.

    Args:
        items: numbers of all items in the order in which each user had them, int64 [N].
        starts: for each sample the place where its user's items begin, int64 [S].
        places: for each sample the place of the item that is asked for, int64 [S].
        text: text embedding of each item, float32 [items, D].
        max_length: items of a history at most, the latest ones.

    Example:
        >>> histories = ItemHistories(
        ...     torch.tensor([3, 1, 2]), torch.tensor([0, 0]), torch.tensor([1, 2]), torch.zeros(4, 2), max_length=5
        ... )
        >>> history, target = histories[1]
        >>> history["ids"].tolist(), int(target), histories.targets.tolist()
        ([3, 1], 2, [1, 2])
    """

    collate = staticmethod(collate_histories)

    def __init__(self, items: Tensor, starts: Tensor, places: Tensor, text: Tensor, max_length: int) -> None:
        self.items, self.text = items, text
        self.starts, self.places = torch.maximum(starts, places - max_length), places
        self.targets = items[places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        ids = self.items[self.starts[index] : self.places[index]]
        return {"ids": ids, "text": self.text[ids]}, self.targets[index]


def histories_of(
    sequences: Sequence[Integers],
    text: Tensor,
    *,
    parts: Sequence[Tensor] | None,
    max_length: int,
    name: str,
    notes: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Splits:
    """Divide the users' items into samples of training, validation and test.

    Each item but a user's first one is asked for once, given those before it. Items that don't occur in the training
    part at all, not even in a history, are told to the model as not known.

    Args:
        sequences: for each user the numbers of the items in their order, int64, 2 of them at least.
        text: text embedding of each item, float32 [items, D].
        parts: positions of the users of each part, or None: each user's last item is for the test, the one before it
            for validation, and the others are for training; 4 items of each user are needed.
        max_length: items of a history at most.
        name: for records.
        notes: for the user to read.
        names: of the items.

    Returns:
        Inputs: histories, to be padded by `collate_histories`; targets: numbers of items.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    items = np.concatenate(sequences)
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    owner = np.repeat(np.arange(len(sequences)), lengths)
    place = np.arange(len(items)) - begins[owner]  # within the user's items
    if parts is None:
        left = lengths[owner] - 1 - place
        part_of_place = np.where(left == 0, 2, np.where(left == 1, 1, 0))
    else:
        part_of_user = np.zeros(len(sequences), dtype=np.int64)
        for number, users in enumerate(parts):
            part_of_user[users.numpy()] = number
        part_of_place = part_of_user[owner]
    flat = torch.from_numpy(items.astype(np.int64))

    def histories(number: int) -> ItemHistories | None:
        chosen = np.flatnonzero((part_of_place == number) & (place > 0))
        if len(chosen) == 0:
            return None
        starts = torch.from_numpy(begins[owner[chosen]])
        return ItemHistories(flat, starts, torch.from_numpy(chosen), text, max_length)

    train, validation, test = (histories(number) for number in range(3))
    known = torch.zeros(len(text), dtype=torch.bool)
    known[flat[torch.from_numpy(part_of_place == 0)]] = True
    facts = {"num_classes": len(text), "num_items": len(text), "text_features": text.shape[1]}
    tables = {"text_embeddings": text, "known_items": known}
    told = [*notes]
    if not known.all():
        told.append(f"{int((~known).sum())} of {len(known)} items don't occur in training; their text stands for them.")
    return Splits(train, validation, test, facts, name, told, tuple(names), tables)


def text_embeddings(texts: Sequence[str], features: int = 32, seed: int = 0) -> Floats:
    """Turn texts into embeddings by hashed counts of words, weighted down where they are frequent, and an SVD.

    Words that stand together end up near each other. Nothing has to be downloaded, and the same texts and seed give the
    same numbers.

    Args:
        texts: one for each item.
        features: numbers in an embedding, D.
        seed: of the SVD's random start.

    Returns:
        float64 [N, D], each column of mean 0 and deviation 1; columns for which the texts are too few or too much alike
        are 0.

    Raises:
        ConfigurationError: for features below 1, and for less than 2 texts with words in them.

    References:
        K. Weinberger et al.: Feature Hashing for Large Scale Multitask Learning, ICML 2009; S. Deerwester et al.:
        Indexing by Latent Semantic Analysis, 1990; N. Halko, P.-G. Martinsson, J. Tropp: Finding Structure with
        Randomness, 2011 (the SVD).

    Example:
        >>> one, other, third = text_embeddings(["red fox", "a red fox", "blue whale"], features=1)
        >>> abs(one - other) < abs(one - third)
        array([ True])
    """
    from sklearn.decomposition import TruncatedSVD  # type: ignore[import-untyped, unused-ignore]
    from sklearn.feature_extraction.text import (  # type: ignore[import-untyped, unused-ignore]
        HashingVectorizer,
        TfidfTransformer,
    )

    if isinstance(features, bool) or not isinstance(features, int) or features < 1:
        raise ConfigurationError(
            f"a text embedding was asked for with {features!r} features; a whole number from 1 is allowed."
        )
    # Without signs, so that words which meet in a bucket don't cancel each other to no words at all.
    counts = HashingVectorizer(n_features=1 << 14, norm=None, alternate_sign=False).transform(texts)
    told = int((counts.getnnz(axis=1) > 0).sum())
    if told < 2:
        raise ConfigurationError(
            f"{told} of {len(texts)} texts have a word of 2 letters or more in them; give each item a text, or a file "
            "of embeddings."
        )
    weighted = TfidfTransformer().fit_transform(counts)
    svd = TruncatedSVD(min(features, len(texts) - 1), random_state=key(seed, "text embeddings") % (1 << 32))
    found = svd.fit_transform(weighted.astype(np.float64))
    made = np.zeros((len(texts), features))
    made[:, : found.shape[1]] = scaled_columns(found)
    return made


def scaled_columns(values: Floats) -> Floats:
    """Return columns of mean 0 and deviation 1; those that hardly change, beside the one that does most, are 0."""
    deviation = values.std(0)
    changes = deviation > 1e-6 * max(float(deviation.max()), float(np.abs(values).max()))
    result: Floats = np.where(changes, (values - values.mean(0)) / np.where(changes, deviation, 1.0), 0.0)
    return result


def stories(
    *,
    users: int = 600,
    items: int = 300,
    topics: int = 12,
    parts: int = 5,
    mean_length: float = 8.0,
    follow: float = 0.15,
    stay: float = 0.45,
    back: float = 0.7,
    skew: float = 1.0,
    cold: float = 0.1,
    text_features: int = 32,
    max_length: int = 20,
    validation: float = 0.15,
    test: float = 0.25,
    seed: int = 0,
) -> Splits:
    """Generate what readers read, story after story: titles that tell topics, series, and stories nobody has read yet.

    Stories belong to a topic, and within it to a series of `parts` parts. A title is made of words of the topic, the
    series' own word, the part's number, and words that any title may have; the words themselves are drawn, too. After a
    story a reader takes the series' next part (`follow`), or another story of the topic (`stay`), or goes to another
    topic: `back` to the one before, or else on to the topic that follows this one. Which story of a topic it is, is
    a matter of popularity: the r-th one is chosen in proportion to r to the power of -`skew`. New (`cold`) stories have
    come out after the training readers were done; the other readers have them, too.

    So there is something to be learnt from the last item alone (the next part, the topic), something from the items
    before it (the topic to go back to), and of new stories only what their titles tell.

    Args:
        users: number of readers in all parts together.
        items: number of stories, a multiple of topics times parts.
        topics: number of topics.
        parts: parts of a series.
        mean_length: stories of a reader on average, from 4.
        follow: probability of the series' next part, where there is one.
        stay: probability of another story of the same topic.
        back: probability that the other topic is the one before.
        skew: exponent of the popularity, 0 = all alike.
        cold: share of the stories that training readers don't have.
        text_features: numbers in a title's embedding.
        max_length: items of a history at most.
        validation: share of the validation part, of the readers.
        test: share of the test part, of the readers.
        seed: number that decides which reader goes where and what is drawn.

    Returns:
        Inputs: histories, to be padded by `collate_histories`; targets: numbers of items. The items' titles are
        `classes`.

    Raises:
        ConfigurationError: for numbers that describe no stories.

    Example:
        >>> splits = stories(users=20, items=60, topics=6)
        >>> splits.facts["num_items"], splits.tables["text_embeddings"].shape, splits.classes[0].split()[-1]
        (60, torch.Size([60, 32]), 'one')
    """
    sizes = (users, items, topics, parts, max_length)
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes):
        raise ConfigurationError(
            f"stories were asked for with users {users!r}, items {items!r}, topics {topics!r}, parts {parts!r} and "
            f"max_length {max_length!r}; whole numbers from 1 are allowed."
        )
    if users < 6 or topics < 2 or items % (topics * parts) != 0 or not 4 <= mean_length <= 1000 or parts > len(NUMBERS):
        raise ConfigurationError(
            f"stories were asked for with users {users}, items {items}, topics {topics}, parts {parts} and mean_length "
            f"{mean_length}; allowed are 6 users or more, 2 topics or more, parts from 1 to {len(NUMBERS)}, items "
            f"that are a multiple of topics times parts ({topics * parts}), and a mean_length from 4 to 1000."
        )
    for name, share in (("follow", follow), ("stay", stay), ("back", back), ("cold", cold)):
        number(f"{name}", share, below=1)
    if follow + stay >= 1 or not 0 <= skew <= 10:
        raise ConfigurationError(
            f"follow is {follow}, stay {stay} and skew {skew}; follow and stay together have to be below 1, and a skew "
            "from 0 to 10 is allowed."
        )
    random = np.random.default_rng(key(seed, "stories"))
    titles = _titles(random, items, topics, parts)
    topic_of = np.arange(items) // (items // topics)
    popularity = np.empty(items)
    for topic in range(topics):
        members = np.flatnonzero(topic_of == topic)
        popularity[members] = random.permutation(np.arange(1, len(members) + 1) ** -float(skew))
    # Each topic keeps one story at least that everybody has.
    new = np.zeros(items, dtype=np.bool_)
    new[random.permutation(items)[: round(cold * items)]] = True
    new[[int(np.argmax(np.where(topic_of == topic, popularity, 0.0))) for topic in range(topics)]] = False
    circle = random.permutation(topics)
    after = np.empty_like(circle)
    after[circle] = np.roll(circle, -1)
    chosen = split_indices(users, validation=validation, test=test, seed=seed)
    trains = np.zeros(users, dtype=np.bool_)
    trains[chosen[0].numpy()] = True
    cumulated = {
        of_training: [np.cumsum(np.where((topic_of == topic) & shown, popularity, 0.0)) for topic in range(topics)]
        for of_training, shown in ((True, ~new), (False, np.ones(items, dtype=np.bool_)))
    }

    def pick(of_training: bool, topic: int) -> int:
        sums = cumulated[of_training][topic]
        return int(np.searchsorted(sums, random.random() * sums[-1], side="right"))

    sequences = []
    for user in range(users):
        own = bool(trains[user])
        topic = before = int(random.integers(topics))
        item = pick(own, topic)
        read = [item]
        for _ in range(max(3, int(random.poisson(mean_length - 1)))):
            draw = random.random()
            if draw < follow and item % parts < parts - 1 and not (own and new[item + 1]):
                item += 1
            elif draw < follow + stay:
                item = pick(own, topic)
            else:
                known = before != topic and random.random() < back
                topic, before = (before if known else int(after[topic])), topic
                item = pick(own, topic)
            read.append(item)
        sequences.append(np.array(read, dtype=np.int64))
    text = torch.from_numpy(text_embeddings(titles, text_features, seed).astype(np.float32))
    return histories_of(sequences, text, parts=chosen, max_length=max_length, name="stories", names=titles)


NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SYLLABLES = ("ka", "mo", "ri", "te", "lu", "sha", "ve", "no", "pi", "dra", "zu", "fen", "gol", "bi", "sto", "wy")


def _titles(random: np.random.Generator, items: int, topics: int, parts: int) -> list[str]:
    """Return a title for each item: its series' word, three words of its topic, one of any topic, its part."""
    series = items // parts
    drawn: dict[str, None] = {}  # words in the order in which they were drawn, each once
    while len(drawn) < 8 * topics + series + 10:
        drawn["".join(random.choice(SYLLABLES, 3 if len(drawn) < 2000 else 5))] = None
    words = list(drawn)
    of_topics, of_series, common = words[: 8 * topics], words[8 * topics : 8 * topics + series], words[-10:]
    titles = []
    for item in range(items):
        topic = item // (items // topics)
        told = random.choice(of_topics[8 * topic : 8 * topic + 8], 3, replace=False)
        titles.append(" ".join([of_series[item // parts], *told, random.choice(common), NUMBERS[item % parts]]))
    return titles
