"""A small decoder-only transformer whose switches widen the range of learning rates that it trains at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError

NORMS = ("pre", "post", "sandwich")
ROTARY_BASE = 10_000.0


class Transformer(nn.Module):
    """Predicts each next token from the tokens up to it, by layers of causal attention and feedforward networks.

    Positions enter by rotation of queries and keys, so that there is no longest sequence. A token is told apart from
    padding by its number: anything below 0 is padding, neither looked at nor looking.

    Args:
        vocabulary: number of tokens, and so of logits.
        width: size of the residual stream; divisible by `heads`, with an even share for each.
        layers: number of blocks.
        heads: attention heads of a block.
        feedforward: width of a block's hidden layer as a multiple of `width`.
        dropout: share of values set to 0 in what each block adds, from 0 to below 1.
        norm: `pre` (normalise what a block's parts read, and the stream once at its end), `post` (normalise the stream
            after each addition) or `sandwich` (as pre, and normalise what is added as well).
        norm_gain: let each normalisation learn a factor for each feature.
        embedding_norm: normalise the embeddings, where the stream begins.
        head_norm: normalise the rows of the head's weight, so that (without gains) no logit is above sqrt(width).
        qk_norm: normalise queries and keys of each head, which bounds the attention scores.
        score_clamp: attention scores are clamped to [-score_clamp, score_clamp]; None = not.
        logit_soft_cap: logits become cap * tanh(logits / cap); None = not.

    Raises:
        ConfigurationError: for sizes that don't fit each other, and for a switch outside its range.

    References:
        A. Vaswani et al.: Attention Is All You Need, 2017 (post); R. Xiong et al.: On Layer Normalization in the
        Transformer Architecture, 2020 (pre); J. Su et al.: RoFormer, 2021 (rotary positions); M. Dehghani et al.:
        Scaling Vision Transformers to 22 Billion Parameters, 2023 (qk-norm); Gemma Team: Gemma 2, 2024 (soft cap).

    Example:
        >>> model = Transformer(vocabulary=7, width=8, layers=2, heads=2, qk_norm=True)
        >>> model(torch.tensor([[0, 3, 6], [2, 1, -1]])).shape
        torch.Size([2, 3, 7])
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 64,
        layers: int = 3,
        heads: int = 2,
        feedforward: int = 4,
        dropout: float = 0.0,
        norm: str = "pre",
        norm_gain: bool = True,
        embedding_norm: bool = False,
        head_norm: bool = False,
        qk_norm: bool = False,
        score_clamp: float | None = None,
        logit_soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(vocabulary=vocabulary, width=width, layers=layers, heads=heads, feedforward=feedforward)
        if norm not in NORMS:
            raise ConfigurationError(f"model.norm is {norm!r}; allowed: {', '.join(NORMS)}.")
        for name, bound in (("score_clamp", score_clamp), ("logit_soft_cap", logit_soft_cap)):
            if bound is not None and not 0 < bound < math.inf:
                raise ConfigurationError(f"model.{name} is {bound!r}; a finite number above 0, or null, is allowed.")
        self.logit_soft_cap = logit_soft_cap
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(width))
        self.embedding_norm = Normalisation(width, gain=norm_gain) if embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                Attention(width, heads, qk_norm=qk_norm, norm_gain=norm_gain, score_clamp=score_clamp),
                FeedForward(width, feedforward * width),
                norm=norm,
                norm_gain=norm_gain,
                dropout=dropout,
            )
            for _ in range(layers)
        )
        self.final_norm = Normalisation(width, gain=norm_gain) if norm != "post" else nn.Identity()
        head = UnitRows if head_norm else nn.Linear
        self.head: nn.Linear = head(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logits of each position's next token.

        Args:
            tokens: int64 [B, T], below 0 where there is padding, on either side; or a list of B tensors [length].

        Returns:
            Logits [B, T, vocabulary]; those of padding mean nothing, and are finite.
        """
        if not isinstance(tokens, torch.Tensor):
            tokens = pad_sequence(list(tokens), batch_first=True, padding_value=-1)
        real = tokens >= 0
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        visible = (positions <= positions[:, None]) & real[:, None, :]  # [B, T, T]: from a query, which keys
        hidden = self.embedding_norm(self.embedding(tokens.clamp_min(0)))
        for block in self.blocks:
            hidden = block(hidden, visible)
        logits: torch.Tensor = self.head(self.final_norm(hidden))
        return logits if self.logit_soft_cap is None else self.logit_soft_cap * (logits / self.logit_soft_cap).tanh()


class Block(nn.Module):
    """Attention, then a feedforward network, each added to the residual stream."""

    def __init__(
        self, attention: Attention, feedforward: FeedForward, *, norm: str, norm_gain: bool, dropout: float
    ) -> None:
        super().__init__()
        self.pre = norm != "post"
        width = attention.output.out_features
        added = [Normalisation(width, gain=norm_gain) if norm == "sandwich" else nn.Identity() for _ in range(2)]
        self.attention_out_norm, self.feedforward_out_norm = added
        self.attention_norm = Normalisation(width, gain=norm_gain)
        self.attention = attention
        self.feedforward_norm = Normalisation(width, gain=norm_gain)
        self.feedforward = feedforward
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Return the stream [B, T, width] after this block."""
        if self.pre:
            added = self.attention(self.attention_norm(hidden), visible)
            hidden = hidden + self.dropout(self.attention_out_norm(added))
            added = self.feedforward(self.feedforward_norm(hidden))
            hidden = hidden + self.dropout(self.feedforward_out_norm(added))
        else:
            hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, visible)))
            hidden = self.feedforward_norm(hidden + self.dropout(self.feedforward(hidden)))
        return hidden


class Attention(nn.Module):
    """Each position takes a weighted mean of the values at the positions that it may see.

    Args:
        width: size of the residual stream.
        heads: number of means, each over its own share of the width.
        qk_norm: normalise each head's queries and keys.
        norm_gain: let that normalisation learn a factor for each feature.
        score_clamp: bound of the scores' size; None = none.

    Example:
        >>> visible = torch.tensor([[[False, False], [True, True]]])  # the first position may see nothing
        >>> Attention(4, 2, qk_norm=True)(torch.ones(1, 2, 4), visible)[0, 0]
        tensor([0., 0., 0., 0.], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool = False, norm_gain: bool = True, score_clamp: float | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.score_clamp = score_clamp
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        share = width // heads
        self.query_norm = Normalisation(share, gain=norm_gain) if qk_norm else nn.Identity()
        self.key_norm = Normalisation(share, gain=norm_gain) if qk_norm else nn.Identity()

    def forward(self, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Return what is added to the stream.

        Args:
            hidden: [B, T, width].
            visible: from each query, which keys it may look at; bool [B, T, T]. A row without any gives 0.

        Returns:
            [B, T, width].
        """
        query, key, value = (self._by_head(part(hidden)) for part in (self.query, self.key, self.value))
        query, key = rotated(self.query_norm(query)), rotated(self.key_norm(key))
        # In float32 whatever the precision: the largest score decides over the others by its exponential.
        scores = _wide(query @ key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
        if self.score_clamp is not None:
            scores = scores.clamp(-self.score_clamp, self.score_clamp)
        hidden_from = ~visible[:, None]
        # The smallest number instead of -inf: the softmax of a row of -inf is NaN, and so is its gradient.
        weights = scores.masked_fill(hidden_from, torch.finfo(scores.dtype).min).softmax(-1)
        mixed = weights.masked_fill(hidden_from, 0.0).to(value.dtype) @ value
        added: torch.Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return added

    def _by_head(self, projected: torch.Tensor) -> torch.Tensor:
        """From [B, T, width] to [B, heads, T, width / heads]."""
        return projected.reshape(*projected.shape[:2], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, at each position by itself."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden, bias=False)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what is added to the stream [B, T, width]."""
        added: torch.Tensor = self.output(F.gelu(self.hidden(hidden)))
        return added


class UnitRows(nn.Linear):
    """A linear layer that divides each row of its weight by the row's length, so that only the direction counts.

    Example:
        >>> layer = UnitRows(3, 5, bias=False)
        >>> bool(layer(torch.tensor([0.0, 0.6, 0.8])).abs().max() <= 1.0)
        True
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the features' products with the directions [..., out_features]."""
        return F.linear(features, F.normalize(self.weight, dim=1), self.bias)


class Normalisation(nn.RMSNorm):
    """Features divided by their root mean square, in float32 whatever the precision.

    Example:
        >>> Normalisation(2, gain=False)(torch.tensor([3.0, 4.0]))
        tensor([0.8485, 1.1314])
    """

    def __init__(self, width: int, *, gain: bool) -> None:
        # torch's own epsilon is that of the type: 0.008 in bfloat16, which small values don't outweigh.
        super().__init__(width, eps=1e-6, elementwise_affine=gain)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the features [..., width] with a root mean square of 1, times the gain, in the type they came in."""
        wide = _wide(features)
        weight = self.weight.to(wide.dtype) if self.elementwise_affine else None
        return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(features.dtype)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def rotated(vectors: torch.Tensor) -> torch.Tensor:
    """Turn each pair of features by its position, so that the product of two vectors depends on their distance.

    Args:
        vectors: [..., T, features], with an even number of features.

    Returns:
        The same shape and type; the vectors keep their length. Feature i is paired with feature i + features / 2, and
        turned by position * base^(-2 i / features) radians, base 10,000.

    Example:
        >>> turned = rotated(torch.ones(3, 4))
        >>> torch.equal(turned[0], torch.ones(4)), torch.allclose(turned.norm(dim=1), torch.full((3,), 2.0))
        (True, True)
    """
    length, features = vectors.shape[-2:]
    half = features // 2
    # In float32: bfloat16 has no room for positions above 256.
    rates = ROTARY_BASE ** (-torch.arange(half, device=vectors.device, dtype=torch.float32) / half)
    angles = torch.arange(length, device=vectors.device, dtype=torch.float32)[:, None] * rates
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        whole(f"model.{name}", size)
    width, heads = sizes["width"], sizes["heads"]
    if width % (2 * heads) != 0:
        raise ConfigurationError(
            f"model.width={width} can't be divided into model.heads={heads} heads of an even number of features, which "
            f"rotary positions need; take a width divisible by {2 * heads}."
        )
