"""Multi-modal graph convolution: who chose what is a graph, and each modality sends its own messages over it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from stabletrain.checks import number, whole
from stabletrain.errors import ConfigurationError

COMBINATIONS = ("concatenate", "add")


class MMGCN(nn.Module):
    """Scores of items for users, from a graph of users and items and features of the items in several modalities.

    In modality m an item begins with its projected features and a user with a trained preference, both brought to
    length 1: x. In each layer, with the nodes' trained identities e, which all modalities share,

        h = LeakyReLU(mean over the neighbours of W1 x),   s = LeakyReLU(W2 x) + e,
        x' = LeakyReLU(W3 [h, s])  (concatenate)   or   x' = LeakyReLU(W3 h + s)  (add).

    A node's representation is the sum of its x over the modalities, after the last layer; a score is the product of a
    user's and an item's. A node without neighbours has h = 0 and, as it was never trained, e = 0: an item that nobody
    chose yet is known by its features alone. So that the model learns to do with these, a share `unknown` of the items,
    drawn anew in each forward of the training, is treated like that, too.

    The mean over neighbours, the sums over modalities and the scores are computed in float32 at least, whatever the
    precision: sparse sums have no half-precision kernel everywhere, and scores rounded to 8 bits would tie.

    All weights are drawn by Glorot's rule, the tables of preferences and identities too; none stays as memory had it.

    The graph and the features come from the data, as its tables (`stabletrain.data.interaction_splits`): the buffers
    `neighbours` and `starts`, and the frozen parameters `features_<modality>`.

    Args:
        users: number of users.
        items: number of items.
        edges: number of edges, the interactions in training.
        features: number of features of each modality.
        dimension: width of all representations.
        layers: how many times messages are sent.
        combination: `concatenate` or `add`.
        slope: of the LeakyReLU below 0.
        dropout: share of the values of a message that are set to 0, in training, from 0 to below 1.
        unknown: share of the items that are treated as if nobody had chosen them, in training, from 0 to below 1.

    Raises:
        ConfigurationError: for numbers and names that make no model.

    References:
        Y. Wei et al.: MMGCN: Multi-modal Graph Convolution Network for Personalized Recommendation of Micro-video, ACM
        Multimedia 2019 (which has no unknown items). M. Volkovs, G. Yu, T. Poutanen: DropoutNet: Addressing Cold Start
        in Recommender Systems, 2017 (unknown items). X. Glorot, Y. Bengio: Understanding the difficulty of training
        deep feedforward neural networks, 2010.

    Example:
        >>> model = MMGCN(users=3, items=5, edges=4, features={"visual": 6, "text": 2}, dimension=8)
        >>> model.eval()({"user": torch.tensor([2, 0])}).shape
        torch.Size([2, 5])
    """

    neighbours: torch.Tensor
    starts: torch.Tensor

    def __init__(
        self,
        users: int,
        items: int,
        edges: int,
        features: Mapping[str, int],
        dimension: int = 64,
        layers: int = 2,
        combination: str = "concatenate",
        slope: float = 0.01,
        dropout: float = 0.2,
        unknown: float = 0.2,
    ) -> None:
        super().__init__()
        sizes = {"users": users, "items": items, "edges": edges, "dimension": dimension, "layers": layers}
        for name, size in {**sizes, **{f"features.{name}": size for name, size in features.items()}}.items():
            whole(f"model.{name}", size)
        if combination not in COMBINATIONS:
            raise ConfigurationError(f"model.combination is {combination!r}; allowed: {', '.join(COMBINATIONS)}.")
        number("model.slope", slope, most=1)
        for name, share in (("dropout", dropout), ("unknown", unknown)):
            number(f"model.{name}", share, below=1)
        if not features:
            raise ConfigurationError("model.features is empty; at least one modality is needed.")
        self.users, self.items, self.unknown = users, items, unknown
        self.register_buffer("neighbours", torch.zeros(2 * edges, dtype=torch.int64))
        self.register_buffer("starts", torch.zeros(users + items + 1, dtype=torch.int64))
        self.identity = nn.Embedding(users + items, dimension)
        self.modalities = nn.ModuleDict()
        for name, size in features.items():
            self.register_parameter(f"features_{name}", nn.Parameter(torch.zeros(items, size), requires_grad=False))
            self.modalities[name] = Modality(users, size, dimension, layers, combination, slope, dropout)
        nn.init.xavier_uniform_(self.identity.weight)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return scores.

        Args:
            batch: `user` int64 [B]; to train, `item` int64 [B] and `negatives` int64 [B, N] too.

        Returns:
            In training mode the scores of the items [B] and of the negatives [B, N]; in evaluation mode those of all
            items [B, items].
        """
        nodes = self.representations()
        users, items = nodes[: self.users][batch["user"]], nodes[self.users :]
        with torch.autocast(nodes.device.type, enabled=False):
            if not self.training:
                return users @ items.T
            chosen, others = items[batch["item"]], items[batch["negatives"]]
            return (users * chosen).sum(1), (users.unsqueeze(1) * others).sum(2)

    def representations(self) -> torch.Tensor:
        """Return the representation of each user and then of each item, [users + items, dimension]."""
        alone = self.starts.diff() == 0
        if self.training and self.unknown > 0:
            drawn = torch.rand(self.items, device=alone.device) < self.unknown
            alone = torch.cat([alone[: self.users], alone[self.users :] | drawn])
        alone = alone.unsqueeze(1)
        identity = self.identity.weight.masked_fill(alone, 0.0)
        parts = [
            modality(getattr(self, f"features_{name}"), identity, self.neighbours, self.starts, alone)
            for name, modality in self.modalities.items()
        ]
        return torch.stack([_wide(part) for part in parts]).sum(0)


class Modality(nn.Module):
    """The messages of one modality; see `MMGCN`.

    Args:
        users: number of users.
        features: number of features of an item.
        dimension: width of all representations.
        layers: how many times messages are sent.
        combination: `concatenate` or `add`.
        slope: of the LeakyReLU below 0.
        dropout: share of the values of a message that are set to 0, in training.
    """

    def __init__(
        self, users: int, features: int, dimension: int, layers: int, combination: str, slope: float, dropout: float
    ) -> None:
        super().__init__()
        self.slope = slope
        self.dropout = nn.Dropout(dropout)
        self.concatenate = combination == "concatenate"
        self.preference = nn.Embedding(users, dimension)
        self.projection = nn.Linear(features, dimension)
        self.message = nn.ModuleList(nn.Linear(dimension, dimension, bias=False) for _ in range(layers))  # W1
        self.own = nn.ModuleList(nn.Linear(dimension, dimension) for _ in range(layers))  # W2
        width = 2 * dimension if self.concatenate else dimension
        self.combined = nn.ModuleList(nn.Linear(width, dimension) for _ in range(layers))  # W3
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        features: torch.Tensor,
        identity: torch.Tensor,
        neighbours: torch.Tensor,
        starts: torch.Tensor,
        alone: torch.Tensor,
    ) -> torch.Tensor:
        """Return the nodes' representations in this modality, [users + items, dimension].

        Args:
            features: of the items, [items, features].
            identity: of the nodes, [users + items, dimension].
            neighbours: as in `neighbours_mean`.
            starts: as in `neighbours_mean`.
            alone: nodes that hear from nobody, bool [users + items, 1].
        """
        projected = self.projection(features)
        nodes = F.normalize(torch.cat([_wide(self.preference.weight), _wide(projected)]))
        for message, own, combined in zip(self.message, self.own, self.combined, strict=True):
            sent = neighbours_mean(message(nodes), neighbours, starts).masked_fill(alone, 0.0)
            sent = self.dropout(F.leaky_relu(sent, self.slope))
            kept = F.leaky_relu(own(nodes), self.slope) + identity
            mixed = combined(torch.cat([sent, _wide(kept)], 1)) if self.concatenate else combined(sent) + kept
            nodes = F.leaky_relu(mixed, self.slope)
        return nodes


def neighbours_mean(nodes: torch.Tensor, neighbours: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return the mean over each node's neighbours, 0 for a node without any, in float32 at least.

    In one order for each node, so that the same numbers come out each time.

    Args:
        nodes: [N, D].
        neighbours: int64 [E], of all nodes one after the other.
        starts: where each node's neighbours begin, and the end, int64 [N + 1].

    Example:
        >>> neighbours_mean(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1]), torch.tensor([0, 2, 2]))
        tensor([[2.],
                [0.]])
    """
    return F.embedding_bag(neighbours, _wide(nodes), starts, mode="mean", include_last_offset=True)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
