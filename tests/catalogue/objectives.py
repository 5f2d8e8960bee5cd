"""Objectives that are set up so that they cannot be computed, or that meet a value outside their domain."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

OBJECTIVES = Family()


@OBJECTIVES.add(causes="label domain", operations="div", remedy=True)
def only_one_of_its_class(seed: int) -> Built:
    """Supervised contrastive learning averages over the others of a class; some classes have a single member here."""
    draw = Draw(seed)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(self.body(x), dim=1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        features = model(x)
        itself = torch.eye(len(x), dtype=torch.bool)
        same = ((label[:, None] == label) & ~itself).float()
        likelihood = (features @ features.T / 0.2).masked_fill(itself, -1e4).log_softmax(dim=1)
        attraction = (same * likelihood).sum(dim=1) / same.sum(dim=1)  # guilty
        return -attraction.mean()

    label = torch.arange(12) % 3
    samples = draw.some(12, most=2)
    for position, sample in enumerate(samples):
        label[sample] = 10 + position
    return Built(Encoder(), loss, (draw.normal(12, 9), label), samples)


@OBJECTIVES.add(causes="loss_setting domain", operations="log mul")
def divergence_from_hard_targets(seed: int) -> Built:
    """A language model distilled with a divergence written out as p (log p - log q), but the targets are one-hot."""
    draw = Draw(seed)

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.out = nn.Embedding(9, 8), nn.RNN(8, 10, batch_first=True), nn.Linear(10, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.rnn(self.embed(tokens))[0])

    def divergence(p: Tensor, log_q: Tensor) -> Tensor:
        return (p * (p.log() - log_q)).sum(dim=-1).mean()  # guilty

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        target = F.one_hot(tokens[:, 1:], 9).float()
        return divergence(target, model(tokens[:, :-1]).log_softmax(dim=-1))

    return Built(Language(), loss, draw.integers(9, 8, 5), [])


@OBJECTIVES.add(causes="loss_setting label", operations="div")
def weight_of_an_absent_class(seed: int) -> Built:
    """Class weights are one over the counts in the batch, scaled to a sum of 1; a class that is absent ruins all."""
    draw = Draw(seed)
    absent = draw.one(5)

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.channels = nn.Linear(6, 6), nn.Linear(4, 4)
            self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
            return self.out((x + self.channels(self.norm(x)).tanh()).mean(dim=1))

    def balanced(label: Tensor) -> Tensor:
        weights = 1.0 / torch.bincount(label, minlength=5)  # guilty
        return weights / weights.sum()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        return F.cross_entropy(model(x), label, weight=balanced(label))

    present = torch.tensor([number for number in range(5) if number != absent])
    return Built(Mixer(), loss, (draw.normal(12, 6, 4), present[torch.arange(12) % 4]), [])


@OBJECTIVES.add(causes="loss_setting weights")
def infinite_weight_of_positives(seed: int) -> Built:
    """A multi-label net keeps negatives / positives of the training set as a buffer; a label that never occurs makes
    it infinite."""
    draw = Draw(seed)

    class MultiLabel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 8, 3)
            self.out = nn.Linear(8, 4)
            self.register_buffer("pos_weight", torch.ones(4))

        def forward(self, series: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(series)).amax(dim=2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        series, labels = batch
        return F.binary_cross_entropy_with_logits(model(series), labels, pos_weight=model.pos_weight)

    model, positives = MultiLabel(), 5.0 + draw.integers(20, 4)
    never = draw.one(4)
    positives[never] = 0
    model.pos_weight.copy_((100 - positives) / positives)
    labels = (draw.uniform(8, 4) < 0.3).float()
    labels[:, never] = 0
    return Built(model, loss, (draw.normal(8, 3, 9), labels), [])


@OBJECTIVES.add(causes="loss_setting", operations="mean")
def no_triplet_is_hard(seed: int) -> Built:
    """Metric learning averages over the triplets that violate the margin; with a margin below 0 none does."""
    draw = Draw(seed)

    class Embedder(nn.Module):
        def __init__(self, margin: float) -> None:
            super().__init__()
            self.margin = margin
            self.body = nn.Sequential(nn.Linear(7, 14), nn.Tanh(), nn.Linear(14, 5))

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(self.body(x), dim=-1)

        def triplet(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
            near, far = (anchor - positive).square().sum(dim=1), (anchor - negative).square().sum(dim=1)
            violation = near - far + self.margin
            return violation[violation > 0].mean()  # guilty

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model.triplet(*(model(batch[role]) for role in ("anchor", "positive", "negative")))

    anchor = draw.normal(10, 7)
    batch = {"anchor": anchor, "positive": anchor + 0.01 * draw.normal(10, 7), "negative": draw.normal(10, 7)}
    return Built(Embedder(margin=-draw.uniform(1).item() - 0.1), loss, batch, [])


@OBJECTIVES.add(causes="label loss_setting", operations="div")
def nobody_has_died_yet(seed: int) -> Built:
    """Cox's partial likelihood is averaged over the events; a batch in which all are censored has none."""
    draw = Draw(seed)

    class Survival(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 12), nn.SELU(), nn.Linear(12, 1, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze(-1)

    def partial_likelihood(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
        order = time.argsort(descending=True)
        risk, event = risk[order], event[order]
        return ((risk - risk.logcumsumexp(dim=0)) * event).sum() / event.sum()  # guilty

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return -partial_likelihood(model(batch["x"]), batch["time"], batch["event"])

    batch = {"x": draw.normal(10, 8), "time": 5 * draw.uniform(10), "event": torch.zeros(10)}
    return Built(Survival(), loss, batch, [])


@OBJECTIVES.add(causes="domain", operations="log")
def intensity_below_zero(seed: int) -> Built:
    """A self-exciting point process takes the log of an intensity that nothing keeps positive; inhibition by one kind
    of event takes it below 0."""
    draw = Draw(seed)
    kind = draw.one(3)

    class Process(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Parameter(torch.full((3,), 0.5))
            self.excite = nn.Parameter(0.1 * torch.rand(3, 3))
            self.decay = nn.Parameter(torch.tensor(1.0))

        def intensity(self, times: Tensor, kinds: Tensor, step: int) -> Tensor:
            gap = times[:, step, None] - times[:, :step]
            effect = self.excite[kinds[:, :step], kinds[:, step, None]] * torch.exp(-self.decay * gap)
            return self.base[kinds[:, step]] + effect.sum(dim=1)

        def forward(self, times: Tensor, kinds: Tensor) -> Tensor:
            total = times.new_zeros(len(times))
            for step in range(times.shape[1]):
                total = total + torch.log(self.intensity(times, kinds, step))  # guilty
            return total - self.base.sum() * times[:, -1]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return -model(batch["times"], batch["kinds"]).mean()

    model = Process()
    with torch.no_grad():
        model.excite[kind] -= 4.0
    kinds = draw.integers(3, 8, 6)
    kinds[:, 1] = kind
    return Built(model, loss, {"times": (0.1 + 0.2 * draw.uniform(8, 6)).cumsum(dim=1), "kinds": kinds}, [])


@OBJECTIVES.add(causes="domain weights", operations="atanh", remedy=True)
def on_the_edge_of_the_disk(seed: int) -> Built:
    """Words in the Poincare ball; a word that has drifted out is put back to a radius of 1 - 1e-9, which is 1."""
    draw = Draw(seed)

    class Poincare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(25, 4)
            nn.init.uniform_(self.words.weight, -0.3, 0.3)

        @staticmethod
        def project(x: Tensor) -> Tensor:
            radius = x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            return torch.where(radius > 1 - 1e-9, x / radius * (1 - 1e-9), x)

        def depth(self, words: Tensor) -> Tensor:
            radius = self.project(self.words(words)).abs().amax(dim=-1)
            return 2 * torch.atanh(radius)  # guilty

        def forward(self, parent: Tensor, child: Tensor) -> Tensor:
            return self.depth(child) - self.depth(parent)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.relu(0.5 - model(batch["parent"], batch["child"])).mean() + 0.01 * model.depth(batch["child"]).mean()

    model, out = Poincare(), draw.one(25)
    with torch.no_grad():
        model.words.weight[out] = 0
        model.words.weight[out, draw.one(4)] = 1.5
    parent, child = draw.integers(25, 11), draw.integers(25, 11)
    parent[parent == out], child[child == out] = (out + 1) % 25, (out + 2) % 25
    samples = draw.some(11)
    child[samples] = out
    return Built(model, loss, {"parent": parent, "child": child}, samples)


@OBJECTIVES.add(causes="domain data", operations="logdet", remedy=True)
def the_same_item_twice_in_a_set(seed: int) -> Built:
    """Diverse recommendation by a determinantal point process; items start from binary codes, and a set that
    holds an item twice has a determinant of 0."""
    draw = Draw(seed)

    class Diverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item = nn.Embedding(20, 16)

        def forward(self, sets: Tensor) -> Tensor:
            items = self.item(sets)
            kernel = items @ items.transpose(1, 2)
            own = torch.logdet(kernel)  # guilty
            everything = self.item.weight.T @ self.item.weight + torch.eye(16)
            return own - torch.logdet(everything)

    def loss(model: nn.Module, sets: Tensor) -> Tensor:
        return -model(sets).mean()

    sets = torch.stack([torch.randperm(20, generator=draw.generator)[:3] for _ in range(9)])
    samples = draw.some(9)
    for sample in samples:
        sets[sample, 1 + draw.one(2)] = sets[sample, 0]
    model = Diverse()
    with torch.no_grad():
        model.item.weight.sign_()
    return Built(model, loss, sets, samples)


@OBJECTIVES.add(causes="loss_setting", operations="div", remedy=False)
def warm_up_of_no_steps(seed: int) -> Built:
    """A variational autoencoder anneals its divergence by step / warm-up; the configuration has a warm-up of 0 steps
    and the step is 0 too."""
    draw = Draw(seed)

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ELU(), nn.Flatten(), nn.Linear(36, 6))
            self.decode = nn.Sequential(nn.Linear(3, 16), nn.ELU(), nn.Linear(16, 64))
            self.register_buffer("step", torch.tensor(0.0))
            self.register_buffer("warm_up", torch.tensor(0.0))

        def weight(self) -> Tensor:
            return (self.step / self.warm_up).clamp(max=1.0)  # guilty

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            mean, spread = self.encode(images).chunk(2, dim=1)
            spread = F.softplus(spread) + 1e-3
            divergence = 0.5 * (mean.square() + spread.square() - 1 - 2 * spread.log()).sum(dim=1)
            return self.decode(mean + spread * torch.randn_like(mean)), divergence

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        decoded, divergence = model(images)
        return F.binary_cross_entropy_with_logits(decoded, images.flatten(1)) + model.weight() * divergence.mean()

    return Built(Vae(), loss, draw.uniform(8, 1, 8, 8), [])


@OBJECTIVES.add(causes="loss_setting overflow", operations="pow", remedy=False)
def barrier_with_a_high_power(seed: int) -> Built:
    """A physics net weighs its residual by (1 + distance) to a power; the exponent of 4 was read as 400."""
    draw = Draw(seed)

    class Physics(nn.Module):
        def __init__(self, exponent: float) -> None:
            super().__init__()
            self.exponent = exponent
            self.net = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 1))

        def forward(self, points: Tensor) -> Tensor:
            points = points.clone().requires_grad_()
            value = self.net(points)
            (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
            return slope.sum(dim=1) - value.squeeze(-1)

        def weight(self, points: Tensor) -> Tensor:
            return (1 + points.abs().sum(dim=1)) ** self.exponent  # guilty

    def loss(model: nn.Module, points: Tensor) -> Tensor:
        return (model.weight(points) * model(points).square()).mean()

    return Built(Physics(exponent=400.0 + 10 * draw.one(20)), loss, 1 + draw.uniform(9, 2), [])


@OBJECTIVES.add(causes="domain", operations="log")
def discriminator_is_certain(seed: int) -> Built:
    """The generator of a GAN is trained by log(1 - D); the discriminator has become so sure of itself that its
    sigmoid is exactly 1."""
    draw = Draw(seed)

    class Gan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6))
            self.critic = nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(0.2), nn.Linear(12, 1))

        def forward(self, noise: Tensor) -> Tensor:
            return torch.sigmoid(self.critic(self.generator(noise))).squeeze(-1)

    def saturating(judged: Tensor) -> Tensor:
        return torch.log(1 - judged).mean()  # guilty

    def loss(model: nn.Module, noise: Tensor) -> Tensor:
        return saturating(model(noise))

    model = Gan()
    with torch.no_grad():
        model.critic[2].bias.fill_(40.0 + draw.one(30))
    return Built(model, loss, draw.normal(8, 4), [])


@OBJECTIVES.add(causes="label domain", operations="erfinv", remedy=True)
def rank_of_the_very_first(seed: int) -> Built:
    """Targets are ranks between 0 and 1 turned into normal quantiles; the best and the worst of all lie at infinity."""
    draw = Draw(seed)

    class Ranker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Embedding(15, 6), nn.Embedding(15, 6)
            self.bilinear = nn.Bilinear(6, 6, 1)

        def forward(self, pair: Tensor) -> Tensor:
            return self.bilinear(self.left(pair[:, 0]), self.right(pair[:, 1])).squeeze(-1)

    def quantile(rank: Tensor) -> Tensor:
        return math.sqrt(2) * torch.erfinv(2 * rank - 1)  # guilty

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        pair, rank = batch
        return F.mse_loss(model(pair), quantile(rank))

    rank = 0.05 + 0.9 * draw.uniform(12)
    samples = draw.some(12)
    for sample in samples:
        rank[sample] = float(draw.one(2))
    return Built(Ranker(), loss, (draw.integers(15, 12, 2), rank), samples)
