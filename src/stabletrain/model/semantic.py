"""A recommender of the next item that knows items by their number and by their text."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from stabletrain.checks import number, whole
from stabletrain.errors import ConfigurationError
from stabletrain.model.transformer import Attention, Block, FeedForward, Normalisation


class SemanticRecommender(nn.Module):
    """Scores all items by what a history of items makes likely.

    An item's vector is made of its embedding and its projected text by a fusion head: both side by side, a linear
    layer, LayerNorm, GELU, a linear layer; to this the two are added, and the sum is normalised (LayerNorm). Causal
    self-attention reads a history's vectors; the state of its last item, times each item's vector, is that item's
    logit. The text of a history's items comes with the sample; that of all items, which are scored, is a frozen
    parameter, which the data hands over as its table `text_embeddings`.

    An item that doesn't occur in training (the data's table `known_items`) is known by its text alone. For the fusion
    head to learn what that means, training takes some items' embeddings away; and it doesn't push such items down, as
    nobody could have chosen them: there they have the lowest of the logits, as a constant.

    Padding is masked everywhere. A learnt vector stands before each history, so that an empty one is nothing special.
    Logits are computed in float32 at least, whatever the precision.

    Args:
        num_items: number of items, C.
        text_features: numbers in an item's text embedding, D.
        width: size of an item's vector; divisible by `heads`, with an even share for each.
        layers: number of self-attention blocks.
        heads: attention heads of a block.
        feedforward: width of a block's hidden layer as a multiple of `width`.
        dropout: share of values set to 0 in what each block adds, from 0 to below 1.
        id_dropout: share of the items that are known by their text alone in a microbatch of training, from 0 to below
            1.

    Raises:
        ConfigurationError: for sizes that don't fit each other, and shares out of range.

    References:
        W.-C. Kang, J. McAuley: Self-Attentive Sequential Recommendation, ICDM 2018; M. Volkovs, G. Yu, T. Poutanen:
        DropoutNet: Addressing Cold Start in Recommender Systems, NIPS 2017 (id_dropout).

    Example:
        >>> model = SemanticRecommender(num_items=5, text_features=3, width=8)
        >>> ids, mask = torch.tensor([[4, 1], [2, -1]]), torch.tensor([[True, True], [True, False]])
        >>> model({"ids": ids, "text": torch.zeros(2, 2, 3), "mask": mask}).shape
        torch.Size([2, 5])
    """

    text_embeddings: nn.Parameter
    known_items: torch.Tensor

    def __init__(
        self,
        num_items: int,
        text_features: int,
        width: int = 32,
        layers: int = 1,
        heads: int = 2,
        feedforward: int = 2,
        dropout: float = 0.1,
        id_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        sizes = {"num_items": num_items, "text_features": text_features, "width": width, "layers": layers}
        for name, size in {**sizes, "heads": heads, "feedforward": feedforward}.items():
            whole(f"model.{name}", size)
        if width % (2 * heads) != 0:
            raise ConfigurationError(
                f"model.width is {width} with {heads} heads; a multiple of twice the heads is needed, such as "
                f"{2 * heads * max(1, width // (2 * heads))}."
            )
        for name, share in (("dropout", dropout), ("id_dropout", id_dropout)):
            number(f"model.{name}", share, below=1)
        self.id_dropout = id_dropout
        self.text_embeddings = nn.Parameter(torch.zeros(num_items, text_features), requires_grad=False)
        self.register_buffer("known_items", torch.ones(num_items, dtype=torch.bool))
        self.id_embedding = nn.Embedding(num_items, width)
        self.text_projection = nn.Linear(text_features, width)
        self.fusion = nn.Sequential(
            nn.Linear(2 * width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)
        )
        self.item_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(
                Attention(width, heads),
                FeedForward(width, feedforward * width),
                norm="pre",
                norm_gain=True,
                dropout=dropout,
            )
            for _ in range(layers)
        )
        self.final_norm = Normalisation(width, gain=True)
        self.start = nn.Embedding(1, width)
        nn.init.normal_(self.id_embedding.weight, std=0.02)
        nn.init.xavier_uniform_(self.text_projection.weight)
        nn.init.zeros_(self.text_projection.bias)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the logits of all items.

        Args:
            inputs: `ids`, int64 [B, L], the items of a history, the latest one last; `text`, [B, L, D], their text
                embeddings; `mask`, bool [B, L], False where there is padding, whose numbers may be anything.

        Returns:
            Logits [B, C], one for each item.

        Raises:
            ConfigurationError: for text embeddings of another width than the model's.
        """
        ids, text, mask = inputs["ids"], inputs["text"], inputs["mask"]
        if text.shape[2] != self.text_projection.in_features:
            raise ConfigurationError(
                f"the histories' text embeddings have {text.shape[2]} features, but the model was built for "
                f"{self.text_projection.in_features} (model.text_features)."
            )
        embeddings = self._embeddings()
        # Not a product with the mask: what stands in the padding may be NaN.
        own = F.embedding(ids.masked_fill(~mask, 0), embeddings).masked_fill(~mask.unsqueeze(2), 0.0)
        history = self._fused(own, text.masked_fill(~mask.unsqueeze(2), 0.0))
        start = self.start.weight.to(history.dtype).expand(len(ids), 1, -1)
        hidden, mask = torch.cat([start, history], 1), F.pad(mask, (1, 0), value=True)
        positions = torch.arange(mask.shape[1], device=mask.device)
        visible = (positions <= positions[:, None]) & mask[:, None, :]
        for block in self.blocks:
            hidden = block(hidden, visible)
        last = (positions * mask).amax(1)
        state = self.final_norm(hidden[torch.arange(len(last), device=last.device), last])
        items = self._fused(embeddings, self.text_embeddings)
        with torch.autocast(state.device.type, enabled=False):
            logits = _wide(state) @ _wide(items).T / math.sqrt(state.shape[1])
        if not self.training:
            return logits
        # Not `logits.detach()`: its share of the softmax would push all known items up, without an end.
        return torch.where(self.known_items, logits, logits.detach().amin(1, keepdim=True))

    def _embeddings(self) -> torch.Tensor:
        """Return the embedding of each item [C, width]; zeros where an item is known by its text alone."""
        used = self.known_items
        if self.training and self.id_dropout > 0:
            used = used & (torch.rand(len(used), device=used.device) >= self.id_dropout)
        return self.id_embedding.weight.masked_fill(~used.unsqueeze(1), 0.0)

    def _fused(self, embeddings: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return the vectors [..., width] of items with these embeddings and text embeddings."""
        projected = self.text_projection(text.to(self.text_projection.weight.dtype))
        embeddings = embeddings.to(projected.dtype)
        fused = self.fusion(torch.cat([embeddings, projected], -1))
        vectors: torch.Tensor = self.item_norm(embeddings + projected + fused)
        return vectors


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
