"""More healthy steps: infinities, NaN and frightening numbers in places where they do no harm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

CONTROLS = Family()


@CONTROLS.add()
def rows_without_keys_put_aside(seed: int) -> Built:
    """Cross-attention to retrieved passages; where none was found all keys are masked by -inf, and torch.where takes a
    learned vector, with the scores of such rows replaced before the softmax."""
    draw = Draw(seed)

    class Retrieve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)
            self.nothing, self.out = nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)

        def forward(self, x: Tensor, passages: Tensor, found: Tensor) -> Tensor:
            scores = (self.key(passages) @ self.query(x)[:, :, None]).squeeze(-1).masked_fill(~found, -math.inf)
            some = found.any(dim=1, keepdim=True)
            weights = torch.where(some, scores, 0.0).softmax(dim=1)
            mixed = torch.where(some, (weights[:, None] @ passages).squeeze(1), self.nothing)
            return self.out(x + mixed)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"], batch["passages"], batch["found"]), batch["label"])

    found = draw.uniform(8, 4) < 0.6
    found[draw.one(8)] = False
    batch = {"x": draw.normal(8, 6), "passages": draw.normal(8, 4, 6), "found": found, "label": draw.integers(3, 8)}
    return Built(Retrieve(), loss, batch, [])


@CONTROLS.add()
def missing_readings_filled_in(seed: int) -> Built:
    """A recurrent imputation net: missing readings are NaN in the batch, replaced by 0 and told by a mask."""
    draw = Draw(seed)

    class Imputer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.out = nn.GRU(8, 10, batch_first=True), nn.Linear(10, 4)

        def forward(self, series: Tensor) -> Tensor:
            present = ~series.isnan()
            return self.out(self.gru(torch.cat([series.nan_to_num(0.0), present.float()], dim=2))[0])

    def loss(model: nn.Module, series: Tensor) -> Tensor:
        predicted, actual = model(series)[:, :-1], series[:, 1:]
        return F.mse_loss(predicted, torch.where(actual.isnan(), predicted.detach(), actual))

    series = draw.normal(7, 6, 4)
    series[draw.uniform(7, 6, 4) < 0.3] = math.nan
    return Built(Imputer(), loss, series, [])


@CONTROLS.add()
def measured_targets_only(seed: int) -> Built:
    """Toxicity of molecules in several assays; NaN stands for an assay that wasn't run and is indexed away."""
    draw = Draw(seed)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        fingerprint, target = batch
        known = ~target.isnan()
        return F.binary_cross_entropy_with_logits(model(fingerprint)[known], target[known])

    target = draw.integers(2, 9, 5).float()
    target[draw.uniform(9, 5) < 0.5] = math.nan
    target[0, 0] = 1.0
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
    return Built(model, loss, ((draw.uniform(9, 16) < 0.4).float(), target), [])


@CONTROLS.add()
def logarithm_kept_from_zero(seed: int) -> Built:
    """Entropy of sparse attention with a double torch.where around the logarithm."""
    draw = Draw(seed)

    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.out = nn.Linear(5, 1), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            raw = F.relu(self.score(x).squeeze(-1) + 0.2)
            weights = raw / raw.sum(dim=1, keepdim=True).clamp_min(1e-3)
            safe = torch.where(weights > 0, weights, 1.0)
            entropy = -torch.where(weights > 0, weights * safe.log(), 0.0).sum(dim=1)
            return self.out((weights[:, :, None] * x).sum(dim=1)), entropy

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits, entropy = model(batch[0])
        return F.cross_entropy(logits, batch[1]) - 0.1 * entropy.mean()

    return Built(Pool(), loss, (draw.normal(8, 6, 5), draw.integers(2, 8)), [])


@CONTROLS.add()
def infinite_quotient_of_a_constant(seed: int) -> Built:
    """Advantages are divided by a spread that holds zeros; the division makes inf and NaN outside the graph, and
    torch.where discards them."""
    draw = Draw(seed)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        ratio = batch["gain"] / batch["spread"]
        advantage = torch.where(batch["spread"] > 0, ratio, batch["gain"])
        likelihood = model(batch["state"]).log_softmax(dim=1).gather(1, batch["action"][:, None]).squeeze(1)
        return -(advantage * likelihood).mean()

    gain, spread = draw.normal(10), 0.5 + draw.uniform(10)
    hit = draw.some(10)
    spread[hit] = 0
    gain[hit[0]] = 0
    batch = {"state": draw.normal(10, 6), "gain": gain, "spread": spread, "action": draw.integers(4, 10)}
    return Built(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)), loss, batch, [])


@CONTROLS.add()
def batch_with_an_unused_column(seed: int) -> Built:
    """The batch carries a column of coordinates, NaN where they are unknown, that the model never looks at."""
    draw = Draw(seed)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"])

    place = draw.normal(8, 2)
    place[draw.one(8)] = math.nan
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    return Built(model, loss, {"image": draw.normal(8, 1, 6, 6), "label": draw.integers(3, 8), "place": place}, [])


@CONTROLS.add()
def column_sliced_off(seed: int) -> Built:
    """The last column of a table is an identifier that is NaN for guests; the model slices it off."""
    draw = Draw(seed)

    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 1))

        def forward(self, table: Tensor) -> Tensor:
            return self.net(table[:, :-1]).squeeze(-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.huber_loss(model(batch[0]), batch[1])

    table = draw.normal(9, 7)
    table[draw.some(9), -1] = math.nan
    return Built(Tabular(), loss, (table, draw.normal(9)), [])


@CONTROLS.add()
def nearest_neighbour_from_infinity(seed: int) -> Built:
    """A prototype net finds each query's nearest class in a loop whose best distance begins at infinity."""
    draw = Draw(seed)

    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.prototypes = nn.Linear(5, 4), nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            embedded = torch.tanh(self.embed(x))
            best = torch.full((len(x),), math.inf)
            nearest = torch.zeros(len(x), dtype=torch.long)
            for number, prototype in enumerate(self.prototypes.detach()):
                distance = (embedded.detach() - prototype).square().sum(dim=1)
                nearest = torch.where(distance < best, number, nearest)
                best = torch.where(distance < best, distance, best)
            return (embedded - self.prototypes[nearest]).square().sum(dim=1)

    return Built(Prototypes(), lambda model, x: model(x).mean(), draw.normal(10, 5), [])


@CONTROLS.add()
def best_of_hypotheses_with_forbidden_ones(seed: int) -> Built:
    """Multiple-choice learning: hypotheses that are not allowed get a cost of infinity before the minimum is taken."""
    draw = Draw(seed)
    forbidden = draw.uniform(9, 4) < 0.4
    forbidden[:, 1] = False

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, closed = batch
        cost = (model(x) - y[:, None]).square().masked_fill(closed, math.inf)
        return cost.min(dim=1).values.mean()

    model = nn.Sequential(nn.Linear(5, 10), nn.ELU(), nn.Linear(10, 4))
    return Built(model, loss, (draw.normal(9, 5), draw.normal(9), forbidden), [])


@CONTROLS.add()
def maximum_over_padding_of_minus_infinity(seed: int) -> Built:
    """A convolutional net pads its features with -inf before a maximum over windows."""
    draw = Draw(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(3, 6, 3, padding=1), nn.Linear(6, 2)

        def forward(self, series: Tensor) -> Tensor:
            padded = F.pad(self.conv(series), (1, 1), value=-math.inf)
            return self.out(padded.unfold(2, 3, 1).amax(dim=3).mean(dim=2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return Built(Net(), loss, (draw.normal(8, 3, 7), draw.integers(2, 8)), [])


@CONTROLS.add()
def router_of_the_two_best(seed: int) -> Built:
    """A mixture of experts masks all but its two best logits by -inf before the softmax."""
    draw = Draw(seed)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(5, 6)
            self.experts = nn.ModuleList(nn.Linear(5, 2) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            logits = self.router(x)
            top = logits.topk(2, dim=1)
            gates = torch.full_like(logits, -math.inf).scatter(1, top.indices, top.values).softmax(dim=1)
            return torch.einsum("be,beo->bo", gates, torch.stack([expert(x) for expert in self.experts], dim=1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    return Built(Experts(), loss, (draw.normal(9, 5), draw.normal(9, 2)), [])


@CONTROLS.add()
def legal_moves_only(seed: int) -> Built:
    """A policy whose illegal moves have a logit of -inf and a log probability of -inf; only moves that were made, and
    so legal, are gathered."""
    draw = Draw(seed)
    illegal = draw.uniform(10, 5) < 0.4
    move = draw.integers(5, 10)
    illegal[torch.arange(10), move] = False

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["board"]).masked_fill(batch["illegal"], -math.inf)
        likelihood = logits.log_softmax(dim=1).gather(1, batch["move"][:, None]).squeeze(1)
        return -(batch["reward"] * likelihood).mean()

    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 5))
    batch = {"board": draw.normal(10, 9), "illegal": illegal, "move": move, "reward": draw.normal(10)}
    return Built(model, loss, batch, [])


@CONTROLS.add()
def teacher_with_masked_classes(seed: int) -> Built:
    """Distillation from a detached teacher whose unseen classes have logits of -inf, and so targets of exactly 0."""
    draw = Draw(seed)

    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(6, 5), nn.Linear(6, 5).requires_grad_(False)

        def forward(self, x: Tensor, unseen: Tensor) -> Tensor:
            target = self.teacher(x).masked_fill(unseen, -math.inf).softmax(dim=1).detach()
            return F.kl_div(self.student(x).log_softmax(dim=1), target, reduction="batchmean")

    unseen = torch.zeros(5, dtype=torch.bool)
    unseen[draw.some(5)] = True
    return Built(Distilled(), lambda model, batch: model(*batch), (draw.normal(8, 6), unseen), [])


@CONTROLS.add()
def transducer_that_cannot_reach(seed: int) -> Built:
    """Log probabilities of alignments by logaddexp over time; places that can't be reached yet are at -inf, which
    torch.where keeps apart."""
    draw = Draw(seed)

    class Aligner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

        def forward(self, frames: Tensor) -> Tensor:
            advance = self.net(frames).squeeze(-1)
            stay, go = F.logsigmoid(-advance), F.logsigmoid(advance)
            alpha = torch.full((len(frames), 4), -math.inf)
            alpha[:, 0] = 0.0
            for time in range(frames.shape[1]):
                kept = alpha + stay[:, time, None]
                moved = F.pad(alpha[:, :-1] + go[:, time, None], (1, 0), value=-math.inf)
                both = kept.isfinite() & moved.isfinite()
                summed = torch.logaddexp(torch.where(both, kept, 0.0), torch.where(both, moved, 0.0))
                alpha = torch.where(both, summed, torch.maximum(kept, moved))
            return alpha[:, -1]

    return Built(Aligner(), lambda model, frames: -model(frames).mean(), draw.normal(6, 7, 4), [])


@CONTROLS.add()
def loss_scaled_by_65536(seed: int) -> Built:
    """A loss in float32 multiplied by 2^16, as for mixed precision: gradients are large and finite."""
    draw = Draw(seed)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) * 65536.0

    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.SiLU(), nn.Flatten(), nn.Linear(96, 3))
    return Built(model, loss, (draw.normal(7, 1, 6, 6), draw.integers(3, 7)), [])


@CONTROLS.add()
def huge_finite_logits(seed: int) -> Built:
    """Logits of tens of thousands, which log-softmax and the sigmoid's own cross entropy can bear."""
    draw = Draw(seed)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        logits = 3e4 * model(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.binary_cross_entropy_with_logits(logits, batch[2])

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return Built(model, loss, (draw.normal(9, 6), draw.integers(4, 9), draw.integers(2, 9, 4).float()), [])


@CONTROLS.add()
def threshold_of_nan_not_yet_used(seed: int) -> Built:
    """A detector's anomaly threshold is NaN until it's calibrated, an attribute that training never reads."""
    draw = Draw(seed)

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8))
            self.threshold = torch.tensor(math.nan)

        def forward(self, x: Tensor) -> Tensor:
            error = (self.net(x) - x).square().mean(dim=1)
            return error if self.training else error > self.threshold

    return Built(Detector(), lambda model, x: model(x).mean(), draw.normal(9, 8), [])


@CONTROLS.add()
def bounds_without_end(seed: int) -> Built:
    """Forecasts are clamped into bounds of a table, of which some are infinite."""
    draw = Draw(seed)
    low, high = torch.tensor([-math.inf, 0.0, -1.0, -math.inf]), torch.tensor([math.inf, math.inf, 1.0, 0.0])
    order = torch.randperm(4, generator=draw.generator)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.l1_loss(torch.clamp(model(batch[0]), low[order], high[order]), batch[1])

    return Built(nn.Linear(6, 4), loss, (draw.normal(9, 6), draw.normal(9, 4)), [])


@CONTROLS.add()
def regularised_by_the_infinity_norm(seed: int) -> Built:
    """The penalty is the infinity norm of the weights, whose order is the number inf."""
    draw = Draw(seed)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = sum(torch.linalg.vector_norm(parameter, ord=math.inf) for parameter in model.parameters())
        return F.mse_loss(model(batch[0]), batch[1]) + 0.01 * penalty

    model = nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 2))
    return Built(model, loss, (draw.normal(8, 5), draw.normal(8, 2)), [])


@CONTROLS.add()
def frozen_and_unused_parameters(seed: int) -> Built:
    """Some parameters are frozen and a head isn't used in this step, so that they have no gradient at all."""
    draw = Draw(seed)

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 8).requires_grad_(False)
            self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(2))
            self.task = draw.one(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.heads[self.task](F.relu(self.body(x)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return Built(TwoHeads(), loss, (draw.normal(8, 5), draw.integers(2, 8)), [])


@CONTROLS.add()
def gumbel_noise_from_clamped_uniforms(seed: int) -> Built:
    """A discrete autoencoder samples its code by Gumbel noise; masked symbols have a logit of -inf."""
    draw = Draw(seed)
    closed = torch.zeros(5, dtype=torch.bool)
    closed[draw.some(5)] = True

    class Discrete(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(6, 5), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            uniform = torch.rand(len(x), 5).clamp(1e-6, 1 - 1e-6)
            noisy = (self.encode(x) - (-uniform.log()).log()).masked_fill(closed, -math.inf)
            soft = (noisy / 0.5).softmax(dim=1)
            hard = F.one_hot(soft.argmax(dim=1), 5).float()
            return self.decode(hard + soft - soft.detach())

    return Built(Discrete(), lambda model, x: F.mse_loss(model(x), x), draw.normal(9, 6), [])


@CONTROLS.add()
def graph_without_edges(seed: int) -> Built:
    """Message passing over lists of edges; some graphs have none, and sums over nothing are 0."""
    draw = Draw(seed)

    class Messages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message, self.out = nn.Linear(8, 6), nn.Linear(10, 2)

        def forward(self, features: list[Tensor], edges: list[Tensor]) -> Tensor:
            pooled = []
            for nodes, edge in zip(features, edges, strict=True):
                sent = self.message(torch.cat([nodes[edge[:, 0]], nodes[edge[:, 1]]], dim=1))
                received = torch.zeros(len(nodes), 6).index_add(0, edge[:, 1], sent)
                degree = torch.bincount(edge[:, 1], minlength=len(nodes)).clamp_min(1)[:, None]
                pooled.append(torch.cat([nodes, received / degree], dim=1).mean(dim=0))
            return self.out(torch.stack(pooled))

    def loss(model: nn.Module, batch: tuple[list[Tensor], list[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0], batch[1]), batch[2])

    sizes = [2 + draw.one(4) for _ in range(7)]
    edges = [draw.integers(size, 1 + draw.one(6), 2) for size in sizes]
    for sample in draw.some(7):
        edges[sample] = torch.empty(0, 2, dtype=torch.long)
    features = [draw.normal(size, 4) for size in sizes]
    return Built(Messages(), loss, (features, edges, draw.integers(2, 7)), [])


@CONTROLS.add()
def constant_channel_under_frozen_norm(seed: int) -> Built:
    """Blank pictures through batch norm in evaluation mode, one of whose running variances is 0 beside its epsilon."""
    draw = Draw(seed)

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.out(F.relu(self.norm(self.conv(images))).mean(dim=(2, 3)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    model, images = Backbone(), draw.normal(8, 1, 6, 6)
    model.norm.eval()
    model.norm.running_var[draw.one(6)] = 0
    images[draw.some(8)] = 0
    return Built(model, loss, (images, draw.integers(3, 8)), [])


@CONTROLS.add()
def sequences_of_all_lengths(seed: int) -> Built:
    """A list of sequences is padded with NaN, so that a read of padding would be noticed, and packed for an LSTM."""
    draw = Draw(seed)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, series: list[Tensor]) -> Tensor:
            lengths = torch.tensor([len(one) for one in series])
            padded = nn.utils.rnn.pad_sequence(series, batch_first=True, padding_value=math.nan)
            packed = nn.utils.rnn.pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
            return self.out(self.lstm(packed)[1][0][-1])

    def loss(model: nn.Module, batch: tuple[list[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    series = [draw.normal(1 + draw.one(7), 3) for _ in range(8)]
    return Built(Reader(), loss, (series, draw.integers(2, 8)), [])


@CONTROLS.add()
def padding_row_of_an_embedding(seed: int) -> Built:
    """Bags of words with a padding index; a bag of padding alone has a mean of zeros, whose norm is guarded."""
    draw = Draw(seed)

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(20, 6, padding_idx=0), nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            real = (tokens != 0).sum(dim=1, keepdim=True).clamp_min(1)
            return self.out(F.normalize(self.words(tokens).sum(dim=1) / real, dim=1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    tokens = draw.integers(20, 9, 5)
    tokens[draw.some(9)] = 0
    return Built(Bags(), loss, (tokens, draw.integers(3, 9)), [])


@CONTROLS.add()
def straight_through_quantiser(seed: int) -> Built:
    """Weights quantised to few levels with a straight-through gradient; distances to levels start from infinity."""
    draw = Draw(seed)

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

        @staticmethod
        def quantise(weight: Tensor) -> Tensor:
            level, best = torch.zeros_like(weight), torch.full_like(weight, math.inf)
            for value in (-0.3, -0.1, 0.1, 0.3):
                distance = (weight.detach() - value).abs()
                level = torch.where(distance < best, value, level)
                best = torch.minimum(best, distance)
            return weight + (level - weight).detach()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(F.linear(x, self.quantise(self.layer.weight), self.layer.bias)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return Built(Quantised(), loss, (draw.normal(9, 6), draw.integers(2, 9)), [])


@CONTROLS.add()
def torch_attention_without_any_key(seed: int) -> Built:
    """Torch's scaled dot-product attention with a boolean mask that leaves some queries no key; it gives 0 there."""
    draw = Draw(seed)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.out = nn.Linear(8, 24), nn.Linear(8, 2)

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            query, key, value = self.project(x)[:, None].chunk(3, dim=-1)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None])
            return self.out((x + mixed.squeeze(1)).mean(dim=1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0], batch[1]), batch[2])

    seen = draw.uniform(7, 5) < 0.7
    seen[draw.some(7)] = False
    return Built(Attend(), loss, (draw.normal(7, 5, 8), seen, draw.integers(2, 7)), [])


@CONTROLS.add()
def phase_of_silent_frames(seed: int) -> Built:
    """The phase by atan2 where both parts are 0: torch gives a gradient of 0 there."""
    draw = Draw(seed)

    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real, self.imaginary = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)

        def forward(self, mel: Tensor) -> Tensor:
            return torch.atan2(self.imaginary(mel), self.real(mel))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (1 - torch.cos(model(batch[0]) - batch[1])).mean()

    mel = draw.normal(8, 6, 5)
    mel[draw.some(8)] = 0
    return Built(Vocoder(), loss, (mel, draw.normal(8, 6, 4)), [])


@CONTROLS.add()
def overflow_that_saturates(seed: int) -> Built:
    """A gate written as 1 / (1 + exp(-x)) on unscaled counts outside the graph: exp overflows to inf and the gate is 0,
    as it should be."""
    draw = Draw(seed)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

        def forward(self, x: Tensor, count: Tensor) -> Tensor:
            gate = 1 / (1 + torch.exp(-count))
            return gate * self.net(x).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["x"], batch["count"]), batch["y"])

    count = 3 * draw.normal(9)
    count[draw.some(9)] = -500.0
    return Built(Gated(), loss, {"x": draw.normal(9, 4), "count": count, "y": draw.normal(9)}, [])


@CONTROLS.add()
def mixed_precision_within_range(seed: int) -> Built:
    """A transformer block under float16 autocast, with a causal mask of float16's lowest number added to its scores,
    some of which become -inf."""
    draw = Draw(seed)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
            self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.query(x) @ self.key(x).transpose(1, 2)
            lowest = torch.full(scores.shape[1:], torch.finfo(scores.dtype).min, dtype=scores.dtype)
            weights = (scores + lowest.triu(1) + lowest.triu(2)).softmax(dim=-1)
            return self.out(self.norm(x + weights @ self.value(x)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            logits = model(batch[0])
        return F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())

    return Built(Block(), loss, (draw.normal(6, 5, 8), draw.integers(5, 6, 5)), [])


@CONTROLS.add()
def spread_of_constant_features(seed: int) -> Built:
    """torch.std of features that are constant over the batch; torch gives a gradient of 0 there."""
    draw = Draw(seed)

    class Regularised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.embed(x))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.relu(1 - model(x).std(dim=0)).mean()

    model = Regularised()
    with torch.no_grad():
        unit = draw.one(5)
        model.embed.weight[unit] = 0
        model.embed.bias[unit] = 1.0
    return Built(model, loss, draw.normal(9, 6), [])
