"""Attention, routing and pointers of which a mask has left nothing over."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

ATTENTION = Family()


@ATTENTION.add(causes="masked_attention overflow", operations="add softmax", remedy=True)
def two_additive_masks_in_half(seed: int) -> Built:
    """A memory network in float16 adds -60000 for padding and again for stale facts; on an empty story the sum is
    below float16's range for every fact."""
    draw = Draw(seed)

    class MemoryNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.facts, self.question = nn.Embedding(20, 12), nn.Embedding(20, 12)
            self.answer = nn.Linear(12, 5)

        def hop(self, state: Tensor, memory: Tensor, masks: Tensor) -> Tensor:
            scores = (memory @ state[:, :, None]).squeeze(-1)
            scores = scores + masks[:, 0] + masks[:, 1]  # guilty
            weights = scores.softmax(dim=-1)  # guilty
            return state + (weights[:, None] @ memory).squeeze(1)

        def forward(self, story: Tensor, question: Tensor, masks: Tensor) -> Tensor:
            memory, state = self.facts(story), self.question(question)
            for _ in range(2):
                state = self.hop(state, memory, masks)
            return self.answer(state)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        hidden = torch.stack([batch["padded"], batch["stale"]], dim=1)
        masks = -6e4 * hidden.half()
        return F.cross_entropy(model(batch["story"], batch["question"], masks).float(), batch["answer"])

    padded, stale = draw.uniform(9, 6) < 0.3, draw.uniform(9, 6) < 0.3
    padded[:, 0] = False
    samples = draw.some(9)
    padded[samples] = stale[samples] = True
    batch = {
        "story": draw.integers(20, 9, 6),
        "question": draw.integers(20, 9),
        "padded": padded,
        "stale": stale,
        "answer": draw.integers(5, 9),
    }
    return Built(MemoryNet().half(), loss, batch, samples)


@ATTENTION.add(causes="masked_attention domain", operations="div", remedy=True)
def mask_multiplied_and_renormalised(seed: int) -> Built:
    """Attention pooling of a bag multiplies the weights by a mask and divides by what is left, which may be nothing."""
    draw = Draw(seed)

    class AttentionPool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tanh_gate, self.sigmoid_gate = nn.Linear(7, 6), nn.Linear(7, 6)
            self.score = nn.Linear(6, 1)

        def forward(self, patches: Tensor, tissue: Tensor) -> Tensor:
            gate = torch.tanh(self.tanh_gate(patches)) * torch.sigmoid(self.sigmoid_gate(patches))
            weights = self.score(gate).squeeze(-1).softmax(dim=1) * tissue
            weights = weights / weights.sum(dim=1, keepdim=True)  # guilty
            return (weights[:, :, None] * patches).sum(dim=1)

    class Slide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.out = AttentionPool(), nn.Linear(7, 2)

        def forward(self, patches: Tensor, tissue: Tensor) -> Tensor:
            return self.out(self.pool(patches, tissue))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["patches"], batch["tissue"]), batch["grade"])

    tissue = (draw.uniform(10, 6) < 0.5).float()
    tissue[:, 2] = 1
    samples = draw.some(10)
    tissue[samples] = 0
    batch = {"patches": draw.normal(10, 6, 7), "tissue": tissue, "grade": draw.integers(2, 10)}
    return Built(Slide(), loss, batch, samples)


@ATTENTION.add(causes="masked_attention", operations="multi_head_attention_forward softmax", remedy=True)
def multihead_attention_to_no_neighbour(seed: int) -> Built:
    """Torch's own multi-head attention over the neighbours of an agent; an agent that is alone masks all of them."""
    draw = Draw(seed)

    class Interaction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(4, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(16, 2)

        def forward(self, agent: Tensor, others: Tensor, absent: Tensor) -> Tensor:
            query, memory = self.enter(agent)[:, None], self.enter(others)
            seen, _ = self.attention(query, memory, memory, key_padding_mask=absent)  # guilty
            return self.out(torch.cat([query, seen], dim=2).squeeze(1))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["agent"], batch["others"], batch["absent"]), batch["next"])

    absent = draw.uniform(8, 5) < 0.4
    absent[:, 0] = False
    samples = draw.some(8)
    absent[samples] = True
    batch = {"agent": draw.normal(8, 4), "others": draw.normal(8, 5, 4), "absent": absent, "next": draw.normal(8, 2)}
    return Built(Interaction(), loss, batch, samples)


@ATTENTION.add(causes="masked_attention", operations="log_softmax", remedy=True)
def pointer_after_the_last_city(seed: int) -> Built:
    """A pointer network for tours masks what it has visited; a smaller instance runs out of cities before the end."""
    draw = Draw(seed)

    class Pointer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, 10)
            self.cell = nn.LSTMCell(10, 10)
            self.point = nn.Linear(10, 10, bias=False)

        def forward(self, cities: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
            embedded, visited = self.embed(cities), missing.clone()
            hidden = cell = current = embedded.mean(dim=1)
            rows, tours, likelihoods = torch.arange(len(cities)), [], []
            for _ in range(cities.shape[1] - 1):
                hidden, cell = self.cell(current, (hidden, cell))
                scores = (self.point(embedded) @ hidden[:, :, None]).squeeze(-1)
                scores = scores.masked_fill(visited, -math.inf)
                likelihood = torch.log_softmax(scores, dim=1)  # guilty
                choice = likelihood.argmax(dim=1)
                likelihoods.append(likelihood[rows, choice])
                tours.append(cities[rows, choice])
                visited = visited.index_put((rows, choice), torch.tensor(True))
                current = embedded[rows, choice]
            return torch.stack(tours, dim=1), torch.stack(likelihoods, dim=1).sum(dim=1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        tours, likelihood = model(batch["cities"], batch["missing"])
        length = (tours[:, 1:] - tours[:, :-1]).norm(dim=2).sum(dim=1)
        return ((length - 2.0).detach() * likelihood).mean()

    missing = torch.zeros(8, 6, dtype=torch.bool)
    samples = draw.some(8)
    for sample in samples:
        missing[sample, 2 + draw.one(3) :] = True
    return Built(Pointer(), loss, {"cities": draw.uniform(8, 6, 2), "missing": missing}, samples)


@ATTENTION.add(causes="masked_attention", operations="softmax masked_fill")
def every_expert_is_full(seed: int) -> Built:
    """A mixture of experts closes the experts whose load has passed their capacity; the load counter was never reset,
    so that all are closed."""
    draw = Draw(seed)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)) for _ in range(4))
            self.register_buffer("load", torch.zeros(4))
            self.capacity = 50.0

        def route(self, x: Tensor) -> Tensor:
            logits = self.router(x)
            logits[:, self.load > self.capacity] = -math.inf  # guilty
            return logits.softmax(dim=1)  # guilty

        def forward(self, x: Tensor) -> Tensor:
            gates = self.route(x)
            return sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y)

    model = Experts()
    model.load += 51 + 100 * draw.uniform(4)
    return Built(model, loss, (draw.normal(10, 6), draw.normal(10, 3)), [])


@ATTENTION.add(causes="masked_attention domain", operations="sub masked_fill", remedy=True)
def own_logsumexp_over_no_path(seed: int) -> Built:
    """A conditional random field with the forward algorithm by hand; where a sentence's constraints allow no tag at a
    place, the largest score is -inf and is subtracted from itself."""
    draw = Draw(seed)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 6, batch_first=True, bidirectional=True)
            self.emit = nn.Linear(12, 4)
            self.change = nn.Parameter(0.1 * torch.randn(4, 4))

        @staticmethod
        def log_sum(scores: Tensor, dim: int) -> Tensor:
            top = scores.amax(dim=dim, keepdim=True)
            shifted = scores - top  # guilty
            return top.squeeze(dim) + shifted.exp().sum(dim=dim).log()

        def normaliser(self, emission: Tensor) -> Tensor:
            alpha = emission[:, 0]
            for place in range(1, emission.shape[1]):
                alpha = self.log_sum(alpha[:, :, None] + self.change + emission[:, place, None], dim=1)
            return self.log_sum(alpha, dim=1)

        def forward(self, words: Tensor, forbidden: Tensor) -> tuple[Tensor, Tensor]:
            emission = self.emit(self.lstm(words)[0])
            allowed = emission.masked_fill(forbidden, -math.inf)  # guilty
            return emission, self.normaliser(allowed)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        emission, normaliser = model(batch["words"], batch["forbidden"])
        tags = batch["tags"]
        path = emission.gather(2, tags[:, :, None]).squeeze(2).sum(dim=1)
        path = path + model.change[tags[:, :-1], tags[:, 1:]].sum(dim=1)
        return (normaliser - path).mean()

    forbidden = torch.zeros(7, 5, 4, dtype=torch.bool)
    samples = draw.some(7)
    for sample in samples:
        forbidden[sample, 1 + draw.one(4)] = True
    batch = {"words": draw.normal(7, 5, 5), "forbidden": forbidden, "tags": draw.integers(4, 7, 5)}
    return Built(Tagger(), loss, batch, samples)


@ATTENTION.add(causes="masked_attention", operations="softmax", remedy=True)
def window_beyond_the_end(seed: int) -> Built:
    """Local attention with a window of three places around each place; in a short text the later places see padding
    alone, and the mean over all places takes their NaN in."""
    draw = Draw(seed)

    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            scores = torch.einsum("bqd,bkd->bqk", self.query(x), self.key(x)) / math.sqrt(8)
            return torch.einsum("bqk,bkd->bqd", F.softmax(scores + bias, dim=-1), self.value(x))  # guilty

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 8)
            self.layers = nn.ModuleList(Local() for _ in range(2))
            self.out = nn.Linear(8, 3)

        def forward(self, tokens: Tensor, length: Tensor) -> Tensor:
            place = torch.arange(tokens.shape[1])
            near = (place[:, None] - place).abs() <= 1
            seen = near & (place < length[:, None])[:, None]
            bias = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
            x = self.embed(tokens)
            for layer in self.layers:
                x = x + layer(x, bias)
            return self.out(x.mean(dim=1))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["tokens"], batch["length"]), batch["label"])

    length = 7 + draw.integers(2, 9)
    samples = draw.some(9)
    length[samples] = 2 + draw.integers(4, len(samples))
    batch = {"tokens": draw.integers(30, 9, 8), "length": length, "label": draw.integers(3, 9)}
    return Built(Classifier(), loss, batch, samples)
