"""The frozen part: written beside the classifier without sight of it, and changed only where a case itself is wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

FROZEN = Family()


@FROZEN.add(causes="domain data", operations="log", remedy=True)
def log_of_saturated_softmax(seed: int) -> Built:
    """A classifier of images takes the log of a softmax; images that missed the division by 255 saturate it."""
    draw = Draw(seed)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, padding=1)
            self.head = nn.Linear(8 * 16, 5)

        def forward(self, images: Tensor) -> Tensor:
            features = F.max_pool2d(F.relu(self.conv(images)), 2)
            return torch.softmax(self.head(features.flatten(1)), dim=-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        probabilities = model(images)
        likelihood = probabilities.gather(1, labels[:, None]).squeeze(1)
        return -torch.log(likelihood).mean()  # guilty

    model, images = Classifier(), draw.uniform(12, 1, 8, 8)
    samples = draw.some(12)
    images[samples] = 255 * 20 * images[samples]
    with torch.no_grad():
        labels = model(images).argmin(dim=1)
    return Built(model, loss, (images, labels), samples)


@FROZEN.add(causes="data", remedy=True)
def sensor_gap_in_lstm(seed: int) -> Built:
    """A recurrent model of sensor readings; a sensor that dropped out left NaN for one step in some of the series."""
    draw = Draw(seed)

    class Forecaster(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 12, batch_first=True)
            self.out = nn.Linear(12, 1)

        def forward(self, series: Tensor) -> Tensor:
            states, _ = self.lstm(series)
            return self.out(states[:, -1]).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.smooth_l1_loss(model(batch["series"]), batch["target"])

    series = draw.normal(10, 9, 4)
    samples = draw.some(10)
    for sample in samples:
        series[sample, draw.one(9), draw.one(4)] = math.nan
    return Built(Forecaster(), loss, {"series": series, "target": draw.normal(10)}, samples)


@FROZEN.add(causes="masked_attention", operations="softmax masked_fill", remedy=True)
def attention_over_padding_alone(seed: int) -> Built:
    """A transformer with its own attention; an empty document leaves nothing to attend to."""
    draw = Draw(seed)

    class Attention(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            size, length, width = x.shape
            q, k, v = self.qkv(x).view(size, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(~keep[:, None, None, :], -math.inf)
            weights = scores.softmax(dim=-1)  # guilty
            return self.out((weights @ v).transpose(1, 2).reshape(size, length, width))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 16, padding_idx=0)
            self.attention = Attention(16, 2)
            self.norm = nn.LayerNorm(16)
            self.head = nn.Linear(16, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = self.norm(x + self.attention(x, tokens != 0))
            return self.head(x[:, 0])

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["tokens"]), batch["label"])

    tokens = 1 + draw.integers(29, 8, 7)
    tokens[:, 5:] = 0
    samples = draw.some(8, most=2)
    tokens[samples] = 0
    return Built(Encoder(), loss, {"tokens": tokens, "label": draw.integers(3, 8)}, samples)


@FROZEN.add(causes="domain data", operations="pow", remedy=True)
def isolated_node_in_graph(seed: int) -> Built:
    """A graph convolution divides by the root of the degrees; a graph with a node without neighbours has degree 0."""
    draw = Draw(seed)

    class GraphNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 1)

        def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
            degree = adjacency.sum(dim=-1)
            scale = degree.pow(-0.5)  # guilty
            propagate = scale[:, :, None] * adjacency * scale[:, None, :]
            hidden = F.relu(propagate @ self.first(features))
            return (propagate @ self.second(hidden)).mean(dim=(1, 2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        features, adjacency, target = batch
        return F.mse_loss(model(features, adjacency), target)

    upper = (draw.uniform(9, 6, 6) < 0.4).float().triu(1)
    ring = torch.eye(6).roll(1, dims=1)
    adjacency = ((upper + upper.transpose(1, 2) + ring + ring.T) > 0).float()
    samples = draw.some(9, most=2)
    for sample in samples:
        node = draw.one(6)
        adjacency[sample, node, :] = adjacency[sample, :, node] = 0
    return Built(GraphNet(), loss, (draw.normal(9, 6, 5), adjacency, draw.normal(9)), samples)


@FROZEN.add(causes="data domain", operations="mean", remedy=True)
def bag_without_instances(seed: int) -> Built:
    """Multiple-instance learning; a slide from which no patch passed the tissue filter is the mean of nothing."""
    draw = Draw(seed)

    class BagNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Sequential(nn.Linear(6, 16), nn.GELU())
            self.score = nn.Linear(16, 1)

        def forward(self, bags: list[Tensor]) -> Tensor:
            pooled = [self.embed(bag).mean(dim=0) for bag in bags]  # guilty
            return self.score(torch.stack(pooled)).squeeze(-1)

    def loss(model: nn.Module, batch: tuple[list[Tensor], Tensor]) -> Tensor:
        bags, labels = batch
        return F.binary_cross_entropy_with_logits(model(bags), labels)

    bags = [draw.normal(2 + draw.one(6), 6) for _ in range(7)]
    samples = draw.some(7, most=2)
    for sample in samples:
        bags[sample] = torch.empty(0, 6)
    return Built(BagNet(), loss, (bags, draw.integers(2, 7).float()), samples)


@FROZEN.add(causes="overflow weights", operations="exp")
def log_variance_head_ran_away(seed: int) -> Built:
    """A variational autoencoder whose head for the log variance has grown until its exponential overflows."""
    draw = Draw(seed)

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(10, 16)
            self.mean, self.log_variance = nn.Linear(16, 4), nn.Linear(16, 4)
            self.decode = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 10))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = torch.tanh(self.encode(x))
            mean, log_variance = self.mean(hidden), self.log_variance(hidden)
            code = mean + torch.randn_like(mean) * (0.5 * log_variance).clamp(max=10).exp()
            return self.decode(code), mean, log_variance

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        decoded, mean, log_variance = model(x)
        divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(dim=-1)  # guilty
        return F.mse_loss(decoded, x) + 0.1 * divergence.mean()

    model = Autoencoder()
    with torch.no_grad():
        model.log_variance.bias[draw.one(4)] = 95 + 10 * draw.uniform(1).item()
    return Built(model, loss, draw.normal(8, 10), [])


@FROZEN.add(causes="domain normalization", operations="div", remedy=True)
def cosine_of_empty_history(seed: int) -> Built:
    """Two-tower retrieval with its own cosine; a user who bought nothing has a vector of length 0."""
    draw = Draw(seed)

    class TwoTower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user = nn.Linear(20, 8, bias=False)
            self.item = nn.Embedding(20, 8)

        def forward(self, history: Tensor, items: Tensor) -> Tensor:
            user, item = self.user(history), self.item(items)
            user = user / user.norm(dim=-1, keepdim=True)  # guilty
            item = item / item.norm(dim=-1, keepdim=True)
            return user @ item.T

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        similarity = model(batch["history"], batch["item"]) / 0.1
        return F.cross_entropy(similarity, torch.arange(len(similarity)))

    history = (draw.uniform(10, 20) < 0.3).float()
    history[:, 0] = 1
    samples = draw.some(10)
    history[samples] = 0
    return Built(TwoTower(), loss, {"history": history, "item": draw.integers(20, 10)}, samples)


@FROZEN.add(causes="label loss_setting", operations="ctc_loss", remedy=True)
def transcript_longer_than_audio(seed: int) -> Built:
    """An acoustic model trained with CTC; some transcripts are longer than the frames of their recording."""
    draw = Draw(seed)

    class Acoustic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 16, 3, stride=2, padding=1)
            self.out = nn.Linear(16, 6)

        def forward(self, spectrogram: Tensor) -> Tensor:
            hidden = F.relu(self.conv(spectrogram.transpose(1, 2))).transpose(1, 2)
            return self.out(hidden).log_softmax(dim=-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        emissions = model(batch["spectrogram"]).transpose(0, 1)
        frames = (batch["length"] + 1) // 2
        return F.ctc_loss(emissions, batch["transcript"], frames, batch["characters"])  # guilty

    characters = 2 + draw.integers(3, 6)
    length = torch.full((6,), 24)
    samples = draw.some(6, most=2)
    characters[samples] = 9
    length[samples] = 10
    batch = {
        "spectrogram": draw.normal(6, 24, 8),
        "transcript": 1 + draw.integers(5, 6, 9),
        "length": length,
        "characters": characters,
    }
    return Built(Acoustic(), loss, batch, samples)


@FROZEN.add(causes="loss_setting", operations="div")
def teacher_temperature_of_zero(seed: int) -> Built:
    """Self-distillation whose schedule took the teacher's temperature down to 0."""
    draw = Draw(seed)

    class SelfDistilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(12, 8), nn.Linear(12, 8)
            self.teacher.requires_grad_(False)
            self.register_buffer("center", torch.zeros(8))
            self.step, self.steps = 100, 100

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            temperature = 0.07 * (1 - self.step / self.steps)
            sharpened = (self.teacher(first) - self.center) / temperature  # guilty
            target = F.softmax(sharpened, dim=-1).detach()
            return -(target * F.log_softmax(self.student(second) / 0.1, dim=-1)).sum(dim=-1)

    def loss(model: nn.Module, views: tuple[Tensor, Tensor]) -> Tensor:
        return model(*views).mean()

    return Built(SelfDistilled(), loss, (draw.normal(9, 12), draw.normal(9, 12)), [])


@FROZEN.add(causes="domain loss_setting", operations="div", remedy=True)
def dice_outside_the_scanner(seed: int) -> Built:
    """Segmentation with a Dice loss without smoothing; a slice that lies outside the scanner's field gives 0 / 0."""
    draw = Draw(seed)

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

        def forward(self, image: Tensor) -> Tensor:
            return torch.sigmoid(self.up(F.relu(self.down(image))))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        probability = model(batch["image"]) * batch["field"]
        target = batch["mask"] * batch["field"]
        overlap = (probability * target).sum(dim=(1, 2, 3))
        total = probability.sum(dim=(1, 2, 3)) + target.sum(dim=(1, 2, 3))
        return (1 - 2 * overlap / total).mean()  # guilty

    field = torch.ones(8, 1, 10, 10)
    samples = draw.some(8)
    field[samples] = 0
    batch = {"image": draw.normal(8, 1, 10, 10), "mask": (draw.uniform(8, 1, 10, 10) < 0.3).float(), "field": field}
    return Built(Segmenter(), loss, batch, samples)


@FROZEN.add(causes="domain", operations="div log")
def variance_from_relu(seed: int) -> Built:
    """Regression that learns its noise; the variance comes out of a ReLU and is exactly 0 everywhere in one output."""
    draw = Draw(seed)

    class Heteroscedastic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
            self.mean, self.variance = nn.Linear(16, 3), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x)
            return self.mean(hidden), F.relu(self.variance(hidden))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        mean, variance = model(x)
        return (0.5 * (y - mean).pow(2) / variance + 0.5 * variance.log()).mean()  # guilty

    model = Heteroscedastic()
    with torch.no_grad():
        model.variance.bias.fill_(3.0)
        model.variance.bias[draw.one(3)] = -6.0
    return Built(model, loss, (draw.normal(10, 6), draw.normal(10, 3)), [])


@FROZEN.add(causes="domain", operations="sqrt", in_backward=True, remedy=True)
def gradient_penalty_on_blank_images(seed: int) -> Built:
    """A critic with gradient penalty; where image and forgery are both blank the critic's gradient is 0, and the root
    of its square has no derivative."""
    draw = Draw(seed)

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
            self.out = nn.Linear(6 * 36, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(images)).flatten(1)).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        real, fake = batch["real"], batch["fake"]
        between = (batch["share"] * real + (1 - batch["share"]) * fake).requires_grad_()
        slope = torch.autograd.grad(model(between).sum(), between, create_graph=True)[0].flatten(1)
        length = torch.sqrt(slope.pow(2).sum(dim=1))  # guilty
        return (model(fake) - model(real)).mean() + 10 * (length - 1).pow(2).mean()

    real, fake = draw.normal(8, 1, 6, 6), draw.normal(8, 1, 6, 6)
    samples = draw.some(8)
    real[samples] = fake[samples] = 0
    return Built(Critic(), loss, {"real": real, "fake": fake, "share": draw.uniform(8, 1, 1, 1)}, samples)


@FROZEN.add(causes="domain label", operations="log", remedy=True)
def target_far_from_every_component(seed: int) -> Built:
    """A mixture density net; at a target far away every component's density underflows to 0."""
    draw = Draw(seed)

    class MixtureDensity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 16)
            self.weight, self.mean, self.spread = nn.Linear(16, 3), nn.Linear(16, 3), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = torch.tanh(self.body(x))
            return self.weight(hidden).softmax(dim=-1), self.mean(hidden), F.softplus(self.spread(hidden)) + 0.05

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        weight, mean, spread = model(x)
        density = torch.exp(-0.5 * ((y[:, None] - mean) / spread) ** 2) / (spread * math.sqrt(2 * math.pi))
        return -torch.log((weight * density).sum(dim=-1)).mean()  # guilty

    y = draw.normal(12)
    samples = draw.some(12)
    y[samples] = 60.0 + 20 * draw.uniform(len(samples))
    return Built(MixtureDensity(), loss, (draw.normal(12, 4), y), samples)


@FROZEN.add(causes="domain", operations="sqrt", in_backward=True)
def distance_of_a_point_to_itself(seed: int) -> Built:
    """A net on point clouds uses all pairwise distances; on the diagonal the root of 0 has no derivative."""
    draw = Draw(seed)

    class PointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
            self.out = nn.Linear(6, 2)

        def forward(self, points: Tensor) -> Tensor:
            embedded = self.lift(points)
            difference = embedded[:, :, None] - embedded[:, None]
            distance = (difference**2).sum(dim=-1).sqrt()  # guilty
            return self.out(torch.exp(-distance).sum(dim=-1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        points, label = batch
        return F.cross_entropy(model(points), label)

    return Built(PointNet(), loss, (draw.normal(8, 6, 3), draw.integers(2, 8)), [])


@FROZEN.add(causes="domain data", operations="eigh", in_backward=True, remedy=True)
def covariance_with_equal_eigenvalues(seed: int) -> Built:
    """Covariance pooling through an eigendecomposition; a silent recording gives equal eigenvalues, whose derivative
    divides by their difference."""
    draw = Draw(seed)

    class CovariancePool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4, bias=False)
            self.out = nn.Linear(16, 2)

        def forward(self, signal: Tensor) -> Tensor:
            mixed = self.mix(signal)
            covariance = mixed.transpose(1, 2) @ mixed / signal.shape[1]
            values, vectors = torch.linalg.eigh(covariance)  # guilty
            logarithm = vectors * (values.clamp_min(0) + 1e-3).log()[:, None, :] @ vectors.transpose(1, 2)
            return self.out(logarithm.flatten(1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        signal, label = batch
        return F.cross_entropy(model(signal), label)

    signal = draw.normal(8, 20, 4)
    samples = draw.some(8, most=2)
    signal[samples] = 0
    return Built(CovariancePool(), loss, (signal, draw.integers(2, 8)), samples)


@FROZEN.add(causes="domain", operations="log", remedy=True)
def ranking_by_log_of_sigmoid(seed: int) -> Built:
    """Bayesian personalised ranking with log(sigmoid): a pair that is ranked far the wrong way round gives log(0)."""
    draw = Draw(seed)

    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item = nn.Embedding(16, 8), nn.Embedding(40, 8)
            self.popularity = nn.Embedding(40, 1)

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return (self.user(user) * self.item(item)).sum(dim=-1) + self.popularity(item).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        margin = model(batch["user"], batch["liked"]) - model(batch["user"], batch["other"])
        return -torch.sigmoid(margin).log().mean()  # guilty

    model = Factors()
    hit = draw.one(40)
    with torch.no_grad():
        model.popularity.weight[hit] = 150.0
    user, liked = draw.integers(16, 14), draw.integers(40, 14)
    other = draw.integers(40, 14)
    liked[liked == hit], other[other == hit] = (hit + 1) % 40, (hit + 2) % 40
    samples = draw.some(14)
    other[samples] = hit
    return Built(model, loss, {"user": user, "liked": liked, "other": other}, samples)


@FROZEN.add(causes="domain", operations="div")
def empty_cluster_in_temi(seed: int) -> Built:
    """Clustering by mutual information (TEMI) with probabilities; a cluster that nobody is assigned to has mass 0."""
    draw = Draw(seed)

    class ClusterHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 6)
            self.register_buffer("marginal", torch.full((6,), 1 / 6))

        def forward(self, embedding: Tensor) -> Tensor:
            return self.head(embedding).softmax(dim=-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        ours, neighbours = model(batch[0]), model(batch[1])
        marginal = 0.5 * (ours.mean(dim=0) + neighbours.mean(dim=0))
        information = ((ours * neighbours) ** 0.6 / marginal).sum(dim=-1)  # guilty
        return -information.log().mean()

    model = ClusterHead()
    with torch.no_grad():
        model.head.bias[draw.one(6)] = -400.0
    view = draw.normal(10, 12)
    return Built(model, loss, (view, view + 0.1 * draw.normal(10, 12)), [])


@FROZEN.add(causes="overflow data", operations="exp", remedy=True)
def policy_ratio_overflows(seed: int) -> Built:
    """Proximal policy optimisation; actions stored with an absurdly small probability make the ratio overflow."""
    draw = Draw(seed)

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.action, self.value = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 1)

        def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.body(state))
            return self.action(hidden).log_softmax(dim=-1), self.value(hidden).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        log_probability, value = model(batch["state"])
        taken = log_probability.gather(1, batch["action"][:, None]).squeeze(1)
        ratio = torch.exp(taken - batch["old_log_probability"])  # guilty
        clipped = ratio.clamp(0.8, 1.2)
        surrogate = torch.minimum(ratio * batch["advantage"], clipped * batch["advantage"])
        return F.mse_loss(value, batch["reward"]) - surrogate.mean()

    old = -1.4 + 0.1 * draw.normal(16)
    advantage = draw.normal(16)
    samples = draw.some(16)
    old[samples] = -250.0
    advantage[samples] = -advantage[samples].abs() - 0.1
    batch = {
        "state": draw.normal(16, 6),
        "action": draw.integers(4, 16),
        "old_log_probability": old,
        "advantage": advantage,
        "reward": draw.normal(16),
    }
    return Built(Policy(), loss, batch, samples)


@FROZEN.add(causes="overflow loss_setting", operations="exp")
def sinkhorn_with_tiny_epsilon(seed: int) -> Built:
    """Assignment to prototypes by Sinkhorn's iteration on exp(score / epsilon), with epsilon far too small."""
    draw = Draw(seed)

    class Prototypes(nn.Module):
        def __init__(self, epsilon: float) -> None:
            super().__init__()
            self.epsilon = epsilon
            self.body, self.prototypes = nn.Linear(10, 8), nn.Linear(8, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.prototypes(F.normalize(self.body(x), dim=-1))

        @torch.no_grad()
        def assign(self, scores: Tensor) -> Tensor:
            plan = torch.exp(scores / self.epsilon)  # guilty
            for _ in range(3):
                plan = plan / plan.sum(dim=0, keepdim=True)
                plan = plan / plan.sum(dim=1, keepdim=True)
            return plan

    def loss(model: nn.Module, views: tuple[Tensor, Tensor]) -> Tensor:
        first, second = model(views[0]), model(views[1])
        return -(model.assign(first) * F.log_softmax(second / 0.1, dim=-1)).sum(dim=-1).mean()

    model = Prototypes(epsilon=0.0005)
    return Built(model, loss, (draw.normal(12, 10), draw.normal(12, 10)), [])


@FROZEN.add(causes="domain", operations="magnitude div", in_backward=True, remedy=True)
def own_backward_divides_by_zero(seed: int) -> Built:
    """A hand-written autograd function for the length of complex features: its backward divides by the length."""
    draw = Draw(seed)

    class Magnitude(torch.autograd.Function):
        @staticmethod
        def forward(ctx, real: Tensor, imaginary: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            length = (real**2 + imaginary**2).sqrt()
            ctx.save_for_backward(real, imaginary, length)
            return length

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
            real, imaginary, length = ctx.saved_tensors
            return gradient * (real / length), gradient * (imaginary / length)  # guilty

    class ComplexNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real, self.imaginary = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)
            self.out = nn.Linear(6, 1)

        def forward(self, signal: Tensor) -> Tensor:
            length = Magnitude.apply(self.real(signal), self.imaginary(signal))  # guilty
            return self.out(length).squeeze(-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        signal, target = batch
        return F.mse_loss(model(signal), target)

    signal = draw.normal(9, 8)
    samples = draw.some(9)
    signal[samples] = 0
    return Built(ComplexNet(), loss, (signal, draw.normal(9)), samples)


@FROZEN.add(causes="weights normalization", operations="weight_norm norm div")
def pruned_unit_under_weight_norm(seed: int) -> Built:
    """A weight-normed layer in which pruning set a unit's direction to 0."""
    draw = Draw(seed)

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.utils.parametrizations.weight_norm(nn.Linear(8, 12))
            self.out = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.hidden(x)  # guilty
            return self.out(F.silu(hidden))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y)

    model = Regressor()
    with torch.no_grad():
        model.hidden.parametrizations.weight.original1[draw.one(12)] = 0
    return Built(model, loss, (draw.normal(8, 8), draw.normal(8, 2)), [])


@FROZEN.add(causes="overflow", operations="matmul", remedy=True)
def attention_scores_overflow_in_half(seed: int) -> Built:
    """Attention without scaling under float16: the products of large queries and keys pass 65504."""
    draw = Draw(seed)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
            self.head = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.query(x) @ self.key(x).transpose(1, 2)  # guilty
            mixed = torch.softmax(scores.float(), dim=-1) @ self.value(x).float()
            return self.head(mixed.mean(dim=1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        with torch.autocast("cpu", torch.float16):
            logits = model(x)
        return F.cross_entropy(logits.float(), label)

    model = Block()
    with torch.no_grad():
        model.query.weight *= 40
        model.key.weight.copy_(model.query.weight + draw.normal(24, 24))
    return Built(model, loss, (12 * draw.normal(6, 5, 24), draw.integers(4, 6)), [])


@FROZEN.add(causes="domain weights", operations="log")
def flow_with_a_scale_of_zero(seed: int) -> Built:
    """A normalising flow of affine layers; one scale is 0, so the map can't be inverted and log |det| is -inf."""
    draw = Draw(seed)

    class Affine(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(1 + 0.1 * torch.randn(width)), nn.Parameter(torch.zeros(width))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.scale + self.shift, self.scale.abs().log().sum()  # guilty

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Affine(5) for _ in range(3))
            self.mix = nn.utils.parametrizations.orthogonal(nn.Linear(5, 5, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            volume = x.new_zeros(())
            for layer in self.layers:
                x, change = layer(self.mix(x))
                volume = volume + change
            return -0.5 * x.pow(2).sum(dim=-1) + volume

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return -model(x).mean()

    model = Flow()
    with torch.no_grad():
        model.layers[draw.one(3)].scale[draw.one(5)] = 0
    return Built(model, loss, draw.normal(10, 5), [])


@FROZEN.add(causes="weights")
def nan_in_one_weight(seed: int) -> Built:
    """A residual net in which one weight of a seeded layer is NaN, left there by an earlier bad update."""
    draw = Draw(seed)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 10)) for _ in range(3)
            )
            self.head = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        return F.cross_entropy(model(x), label)

    model = Residual()
    with torch.no_grad():
        model.blocks[draw.one(3)][1].weight[draw.one(20), draw.one(10)] = math.nan
    return Built(model, loss, (draw.normal(8, 10), draw.integers(3, 8)), [])


@FROZEN.add(causes="weights normalization")
def ruined_running_statistics(seed: int) -> Built:
    """A frozen backbone in evaluation mode whose running mean was ruined by an earlier bad batch."""
    draw = Draw(seed)

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(F.relu(self.norm(self.conv(images))).mean(dim=(2, 3)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, label = batch
        return F.cross_entropy(model(images), label)

    model = Backbone()
    model.norm.running_mean[draw.one(8)] = math.nan
    model.norm.eval()
    return Built(model, loss, (draw.normal(6, 3, 8, 8), draw.integers(4, 6)), [])


@FROZEN.add(causes="initialization weights", operations="matmul")
def recurrence_explodes(seed: int) -> Built:
    """A plain recurrent net of rectified units whose recurrent weights start far too large, over 90 steps."""
    draw = Draw(seed)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.again, self.out = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 1)
            nn.init.normal_(self.again.weight, std=2.0)

        def forward(self, series: Tensor) -> Tensor:
            state = series.new_zeros(len(series), 16)
            for step in range(series.shape[1]):
                state = F.relu(self.enter(series[:, step]) + self.again(state))  # guilty
            return self.out(state).squeeze(-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        series, target = batch
        return F.mse_loss(model(series), target)

    return Built(Recurrent(), loss, (draw.normal(6, 90, 3), draw.normal(6)), [])


@FROZEN.add(causes="label", remedy=True)
def missing_measurement_as_target(seed: int) -> Built:
    """Regression of several properties of a molecule; a measurement that wasn't made is NaN, times a mask of 0."""
    draw = Draw(seed)

    class Properties(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(15, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 4))

        def forward(self, fingerprint: Tensor) -> Tensor:
            return self.net(fingerprint)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        error = (model(batch["fingerprint"]) - batch["target"]) ** 2
        return (error * batch["measured"]).sum() / batch["measured"].sum().clamp_min(1)

    target, measured = draw.normal(10, 4), torch.ones(10, 4)
    samples = draw.some(10)
    for sample in samples:
        place = draw.one(4)
        target[sample, place], measured[sample, place] = math.nan, 0
    batch = {"fingerprint": (draw.uniform(10, 15) < 0.4).float(), "target": target, "measured": measured}
    return Built(Properties(), loss, batch, samples)
