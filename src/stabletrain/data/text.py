"""Generated text: a Markov chain whose words come again, so that a model can learn both to count and to look back."""

from __future__ import annotations

import math

import torch

from stabletrain.data.arrays import ArrayDataset
from stabletrain.data.splits import Splits, split_dataset
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key


def text(
    *,
    samples: int = 2000,
    length: int = 32,
    vocabulary: int = 64,
    sharpness: float = 2.0,
    min_period: int = 16,
    max_period: int = 16,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Generate sequences of tokens from a Markov chain, each of which repeats itself after a period of its own.

    The first tokens, up to the period, follow the chain: the next token has the probabilities softmax(sharpness * z),
    with z drawn once for each token from the normal distribution. From there on each token is that of one period
    before. So the chain's table gives the first part, and only attention to what came before gives the second.

    Args:
        samples: number of sequences in all parts together.
        length: tokens of each sequence that are predicted.
        vocabulary: number of tokens.
        sharpness: factor on the chain's logits; 0 = each next token is equally likely.
        min_period: shortest period, tokens.
        max_period: longest period; as long as the sequence = without repetition.
        validation: share of the validation part.
        test: share of the test part.
        seed: number that decides the chain, the sequences and which goes where.

    Returns:
        Inputs int64 [N, length]: the tokens but the last; targets int64 [N, length]: the tokens but the first. The
        facts tell `vocabulary`, also as `num_classes`.

    Raises:
        ConfigurationError: for counts that describe no text.

    Example:
        >>> tokens, targets = text(samples=20, length=6, min_period=3, max_period=3).train[0]
        >>> torch.equal(tokens[:3], tokens[3:]), torch.equal(tokens[1:], targets[:-1])
        (True, True)
    """
    if samples < 1 or length < 1 or vocabulary < 2 or not 0 <= sharpness < math.inf:
        raise ConfigurationError(
            f"text was asked for with samples {samples}, length {length}, vocabulary {vocabulary} and sharpness "
            f"{sharpness}; allowed are at least 1 sample of at least 1 token, a vocabulary of at least 2, and a finite "
            "sharpness from 0."
        )
    if not 1 <= min_period <= max_period:
        raise ConfigurationError(
            f"text was asked for with periods from {min_period} to {max_period}; allowed is 1 <= min_period <= "
            "max_period."
        )
    generator = torch.Generator().manual_seed(key(seed, "text"))
    chain = (sharpness * torch.randn(vocabulary, vocabulary, generator=generator)).softmax(1)
    tokens = torch.empty(samples, length + 1, dtype=torch.int64)
    tokens[:, 0] = torch.randint(vocabulary, (samples,), generator=generator)
    for place in range(1, length + 1):
        tokens[:, place] = torch.multinomial(chain[tokens[:, place - 1]], 1, generator=generator)[:, 0]
    periods = torch.randint(min_period, max_period + 1, (samples, 1), generator=generator)
    tokens = tokens.gather(1, torch.arange(length + 1) % periods)
    data = ArrayDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    splits = split_dataset(data, validation=validation, test=test, seed=seed, name="text")
    splits.facts = {"vocabulary": vocabulary, "num_classes": vocabulary}
    return splits
