"""Models that are in a bad state before the step: by an optimizer, a learning rate, an initialization or a buffer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

STATES = Family()


@STATES.add(causes="optimizer weights")
def adam_without_epsilon(seed: int) -> Built:
    """Adam with an epsilon of 0 has made a step on a batch in which one feature was always 0: its weights' update was
    0 / 0."""
    draw = Draw(seed)

    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.out = nn.Linear(9, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.enter(x)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        return F.cross_entropy(model(x), label)

    model, before = Tabular(), draw.normal(8, 9)
    before[:, draw.one(9)] = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=0.0)
    loss(model, (before, draw.integers(2, 8))).backward()
    optimizer.step()
    return Built(model, loss, (draw.normal(8, 9), draw.integers(2, 8)), [])


@STATES.add(causes="optimizer weights")
def momentum_of_nine(seed: int) -> Built:
    """Momentum was set to 9 where 0.9 was meant, and the embedding of a sentence model grew until it was NaN."""
    draw = Draw(seed)

    class Sentence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.EmbeddingBag(12, 5, mode="sum")
            self.out = nn.Linear(5, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.words(tokens))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, label = batch
        return F.cross_entropy(model(tokens), label)

    model, batch = Sentence(), (draw.integers(12, 10, 4), draw.integers(3, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=9.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return Built(model, loss, batch, [])


@STATES.add(causes="learning_rate weights", operations="matmul", remedy=True)
def step_with_a_learning_rate_of_1e12(seed: int) -> Built:
    """A plain deep net after one step of gradient descent with a learning rate of 1e12 for 1e-2: all weights are
    finite, but the products of five layers are not."""
    draw = Draw(seed)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (*self.layers, self.out):
                x = F.leaky_relu(layer(x), 0.2)  # guilty
            return x

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        return F.cross_entropy(model(x), label)

    model, batch = Deep(), (draw.normal(10, 8), draw.integers(3, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e12)
    loss(model, batch).backward()
    optimizer.step()
    return Built(model, loss, batch, [])


@STATES.add(causes="learning_rate weights", operations="mul", remedy=True)
def factors_after_a_large_step(seed: int) -> Built:
    """Word vectors from co-occurrence counts after one step with a learning rate of 1e24: the factors are finite, but
    their products overflow."""
    draw = Draw(seed)

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.context = nn.Embedding(14, 6), nn.Embedding(14, 6)
            self.bias = nn.Embedding(14, 1)

        def forward(self, word: Tensor, context: Tensor) -> Tensor:
            product = self.word(word) * self.context(context)  # guilty
            return product.sum(dim=1) + self.bias(word).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        error = model(batch["word"], batch["context"]) - batch["count"].log()
        return F.huber_loss(error, torch.zeros_like(error))

    model = Vectors()
    batch = {"word": draw.integers(14, 12), "context": draw.integers(14, 12), "count": 1.0 + draw.integers(30, 12)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e24)
    loss(model, batch).backward()
    optimizer.step()
    return Built(model, loss, batch, [])


@STATES.add(causes="learning_rate overflow", operations="exp", remedy=True)
def coupling_after_a_large_step(seed: int) -> Built:
    """A flow of affine couplings on data of small spread; Adam with a learning rate of 300 took its log scales past
    what exp can bear in one step."""
    draw = Draw(seed)

    class Coupling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Linear(2, 2)
            nn.init.zeros_(self.shift.weight)
            nn.init.zeros_(self.shift.bias)
            self.log_scale = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            fixed, moved = x.chunk(2, dim=1)
            moved = moved * torch.exp(self.log_scale) + self.shift(fixed)  # guilty
            return torch.cat([moved, fixed], dim=1), self.log_scale.sum()

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.couplings = nn.ModuleList(Coupling() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            volume = x.new_zeros(())
            for coupling in self.couplings:
                x, change = coupling(x)
                volume = volume + change
            return -0.5 * x.square().sum(dim=1) + volume

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return -model(x).mean()

    model, x = Flow(), 0.1 * draw.normal(10, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=300.0)
    loss(model, x).backward()
    optimizer.step()
    return Built(model, loss, x, [])


@STATES.add(causes="initialization weights", operations="conv")
def gain_of_a_million(seed: int) -> Built:
    """A temporal convolutional net initialised with a gain of 1e6, which its eight layers multiply."""
    draw = Draw(seed)

    class Temporal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Conv1d(2, 6, 1)
            self.layers = nn.ModuleList(nn.Conv1d(6, 6, 3, padding=2**i, dilation=2**i) for i in range(8))
            self.out = nn.Linear(6, 2)
            for layer in self.layers:
                nn.init.xavier_uniform_(layer.weight, gain=1e6)

        def forward(self, series: Tensor) -> Tensor:
            hidden = self.enter(series)
            for layer in self.layers:
                hidden = F.relu(layer(hidden))  # guilty
            return self.out(hidden.mean(dim=2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        series, label = batch
        return F.cross_entropy(model(series), label)

    return Built(Temporal(), loss, (draw.normal(8, 2, 10), draw.integers(2, 8)), [])


@STATES.add(causes="initialization weights")
def prior_of_a_constant_label(seed: int) -> Built:
    """A multi-task net starts its biases at the log odds of the labels; one label is always 1, with infinite odds."""
    draw = Draw(seed)

    class MultiTask(nn.Module):
        def __init__(self, share: Tensor) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(7, 10), nn.Mish())
            self.heads = nn.ModuleList(nn.Linear(10, 1) for _ in share)
            with torch.no_grad():
                for head, part in zip(self.heads, share, strict=True):
                    head.bias.copy_(torch.logit(part))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body(x)
            return torch.cat([head(hidden) for head in self.heads], dim=1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        return F.binary_cross_entropy_with_logits(model(x), labels)

    labels = torch.tensor([[0.0], [1.0]]).repeat(6, 4)
    labels[:, draw.one(4)] = 1
    return Built(MultiTask(labels.mean(dim=0)), loss, (draw.normal(12, 7), labels), [])


@STATES.add(causes="initialization weights", operations="div")
def length_scale_starts_at_zero(seed: int) -> Built:
    """A layer of radial basis functions divides by learned length scales, one of which was initialised with 0."""
    draw = Draw(seed)

    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres, self.scale = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            points, centres = x / self.scale, self.centres / self.scale  # guilty
            return torch.exp(-0.5 * (points[:, None] - centres).square().sum(dim=2))

    class Process(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.out = Kernel(), nn.Linear(7, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.kernel(x)).squeeze(-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y)

    model = Process()
    with torch.no_grad():
        model.kernel.scale[draw.one(3)] = 0
    return Built(model, loss, (draw.normal(9, 3), draw.normal(9)), [])


@STATES.add(causes="initialization normalization", operations="div")
def zero_layer_under_spectral_norm(seed: int) -> Built:
    """The last layer of a critic starts at 0, as residual branches do, and is then divided by its spectral norm."""
    draw = Draw(seed)

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 8)
            branch = nn.Linear(8, 8)
            nn.init.zeros_(branch.weight)
            self.branch = nn.utils.parametrizations.spectral_norm(branch)
            self.out = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.leaky_relu(self.body(x), 0.2)
            hidden = hidden + self.branch(hidden)  # guilty
            return self.out(hidden).squeeze(-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        real, fake = batch
        return F.relu(1 - model(real)).mean() + F.relu(1 + model(fake)).mean()

    return Built(Critic(), loss, (draw.normal(8, 6), draw.normal(8, 6)), [])


@STATES.add(causes="weights normalization", operations="batch_norm")
def negative_running_variance(seed: int) -> Built:
    """A checkpoint was averaged with negative weights, and one running variance of a frozen layer is below 0."""
    draw = Draw(seed)

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(2 if i == 0 else 6, 6, 3) for i in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
            self.out = nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                images = F.leaky_relu(norm(conv(images)), 0.1)  # guilty
            return self.out(images.mean(dim=(2, 3)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, label = batch
        return F.cross_entropy(model(images), label)

    model = Backbone()
    model.norms.eval()
    model.norms[draw.one(2)].running_var[draw.one(6)] = -0.3
    return Built(model, loss, (draw.normal(8, 2, 7, 7), draw.integers(3, 8)), [])


@STATES.add(causes="domain", operations="div")
def code_that_is_never_chosen(seed: int) -> Built:
    """A vector-quantised autoencoder keeps its codes as running sums over running counts; a code that was never chosen
    becomes 0 / 0. Loss and gradients are still finite, the code book isn't."""
    draw = Draw(seed)

    class Quantiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randn(5, 3))
            self.register_buffer("sums", torch.zeros(5, 3))
            self.register_buffer("counts", torch.zeros(5))

        @torch.no_grad()
        def update(self, x: Tensor, chosen: Tensor) -> None:
            self.counts.mul_(0.9).add_(0.1 * chosen.sum(dim=0))
            self.sums.mul_(0.9).add_(0.1 * chosen.T @ x)
            self.codes.copy_(self.sums / self.counts[:, None])  # guilty

        def forward(self, x: Tensor) -> Tensor:
            chosen = F.one_hot(torch.cdist(x, self.codes).argmin(dim=1), 5).float()
            quantised = chosen @ self.codes
            self.update(x.detach(), chosen)
            return x + (quantised - x).detach()

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.quantise, self.decode = nn.Linear(8, 3), Quantiser(), nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.quantise(torch.tanh(self.encode(x))))

    model = Autoencoder()
    model.quantise.codes[draw.one(5)] = 50.0
    return Built(model, lambda model, x: F.mse_loss(model(x), x), draw.normal(40, 8), [])


@STATES.add(causes="initialization normalization", operations="div")
def running_mean_before_the_first_update(seed: int) -> Built:
    """Values of a critic are scaled by running moments corrected for their start at 0; the first step divides by a
    correction that is still 0."""
    draw = Draw(seed)

    class Scaler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("mean", "square", "weight"):
                self.register_buffer(name, torch.zeros(()))

        def scale(self, returns: Tensor) -> Tensor:
            mean, square = (moment / self.weight for moment in (self.mean, self.square))  # guilty
            return (returns - mean) / (square - mean.square()).clamp_min(1e-2).sqrt()

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaler = Scaler()
            self.net = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 1))

        def forward(self, state: Tensor) -> Tensor:
            return self.net(state).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.smooth_l1_loss(model(batch["state"]), model.scaler.scale(batch["return"]))

    return Built(Critic(), loss, {"state": draw.normal(10, 5), "return": 3 + draw.normal(10)}, [])


@STATES.add(causes="optimizer weights")
def moments_restored_for_other_weights(seed: int) -> Built:
    """Adam's second moments were restored in the wrong order and hold a negative number; the root of it made one weight
    of a graph net NaN."""
    draw = Draw(seed)

    class GraphNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
            spread = adjacency / adjacency.sum(dim=2, keepdim=True)
            return self.second(torch.tanh(spread @ self.first(features))).mean(dim=1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["features"], batch["adjacency"]), batch["label"])

    adjacency = ((draw.uniform(8, 5, 5) < 0.4) | torch.eye(5, dtype=torch.bool)).float()
    batch = {"features": draw.normal(8, 5, 4), "adjacency": adjacency, "label": draw.integers(2, 8)}
    model = GraphNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        optimizer.state[model.second.weight]["exp_avg_sq"][draw.one(2), draw.one(8)] = -math.pi
    return Built(model, loss, batch, [])
