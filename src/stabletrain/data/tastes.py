"""Users with tastes and items with looks and words, generated."""

from __future__ import annotations

import math

import numpy as np

from stabletrain.checks import number, whole
from stabletrain.data.interactions import divided, interaction_splits
from stabletrain.data.splits import Splits
from stabletrain.randomness import key

VISUAL, TEXT = 64, 32  # numbers that describe an item in each modality


def tastes(
    *,
    users: int = 800,
    items: int = 600,
    choices: int = 24,
    factors: int = 8,
    taste: float = 2.5,
    popularity: float = 1.0,
    noise: float = 0.5,
    new_items: float = 0.15,
    negatives: int = 1,
    cold: int = 0,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Generate users who choose items by hidden tastes, with features that tell a part of what is hidden.

    Users and items have hidden factors: vectors of unit length around one of `factors` directions of taste. A user
    chooses items without repetition, each with a probability in proportion to exp(taste * <user, item> * sqrt(factors)
    + popularity * z), where z is a normal number of the item's own. How many, is a Poisson number around `choices`. A
    choice's weight lies between 0 and 2 and is larger the better the item suits the user.

    The features of an item are two views of its factors, neither of which tells all: the visual ones are tanh of
    mixtures of the first 5/8 of the factors, the textual ones mixtures of the last 5/8, both with normal noise, in
    units that differ by orders of magnitude. Nothing tells an item's popularity. New items never train.

    Args:
        users: number of users.
        items: number of items.
        choices: mean of the number of items that a user chooses.
        factors: number of hidden factors.
        taste: how much the choice depends on taste; 0 = not at all.
        popularity: how much it depends on the item alone; 0 = not at all.
        noise: standard deviation of the features' noise, where their signal has one of about 1.
        new_items: share of the items that nobody trains with, from 0 to below 1.
        negatives: items drawn for each training sample.
        cold: an item that was chosen at most so often in training counts as cold.
        validation: share of a user's interactions in the validation part.
        test: share of a user's interactions in the test part.
        seed: number that decides all of it.

    Returns:
        As `interaction_splits`, with the modalities visual (64 features) and text (32).

    Raises:
        ConfigurationError: for numbers that describe no such data.

    Example:
        >>> splits = tastes(users=40, items=50)
        >>> splits.facts["features"], splits.tables["features_text"].shape
        ({'visual': 64, 'text': 32}, torch.Size([50, 32]))
    """
    for name, count, least in (
        ("users", users, 2),
        ("items", items, 10),
        ("choices", choices, 3),
        ("factors", factors, 2),
    ):
        whole(f"{name} of the tastes", count, least)
    for name, value in (("taste", taste), ("popularity", popularity), ("noise", noise)):
        number(f"{name} of the tastes", value, most=100)
    number("new_items of the tastes", new_items, below=1)
    random = np.random.default_rng(key(seed, "tastes"))
    directions = random.standard_normal((factors, factors))
    hidden = []
    for count in (users, items):
        around = directions[random.integers(factors, size=count)] + 0.7 * random.standard_normal((count, factors))
        hidden.append(around / np.linalg.norm(around, axis=1, keepdims=True))
    of_users, of_items = hidden
    liking = taste * math.sqrt(factors) * of_users @ of_items.T + popularity * random.standard_normal(items)
    # The largest of log-probabilities with Gumbel noise are a draw without repetition.
    order = np.argsort(-(liking + random.gumbel(size=liking.shape)), axis=1)
    sizes = np.clip(random.poisson(choices, size=users), 3, items // 2)
    user = np.repeat(np.arange(users), sizes)
    item = np.concatenate([row[:size] for row, size in zip(order, sizes, strict=True)])
    suits = of_users[user] * of_items[item]
    weights = 2 / (1 + np.exp(-math.sqrt(factors) * (suits.sum(1) - suits.sum(1).mean())))
    new = random.permutation(items)[: round(new_items * items)]
    parts = divided(user, item, validation=validation, test=test, seed=seed, cold_items=new)
    told = max(1, round(factors * 5 / 8))
    scaled = of_items * math.sqrt(factors)
    features = {}
    for name, own, width in (("visual", scaled[:, :told], VISUAL), ("text", scaled[:, -told:], TEXT)):
        view = own @ random.standard_normal((told, width)) / math.sqrt(told)
        view = (np.tanh(view) if name == "visual" else view) + noise * random.standard_normal((items, width))
        features[name] = (view + random.normal(0, 5, width)) * np.exp(random.normal(0, 2, width))
    return interaction_splits(
        user,
        item,
        parts,
        user_count=users,
        features=features,
        weights=weights,
        negatives=negatives,
        cold=cold,
        name="tastes",
    )
