"""Healthy steps held out: what looks like the reports behind the held-out cases and does no harm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

HOLDOUT_HEALTHY = Family()


@HOLDOUT_HEALTHY.add()
def infinite_ratio_capped_at_the_first_step(seed: int) -> Built:
    """Diffusion weighted by the signal-to-noise ratio; step 0 has no noise, so its ratio is inf, capped at 5."""
    draw = Draw(seed)

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(9, 16), nn.SiLU(), nn.Linear(16, 8))
            self.register_buffer("kept", torch.linspace(1.0, 0.02, 20))

        def forward(self, noisy: Tensor, step: Tensor) -> Tensor:
            return self.net(torch.cat([noisy, step[:, None] / 20], dim=1))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        share = model.kept[batch["step"]]
        weight = (share / (1 - share)).clamp(max=5.0)
        noisy = share.sqrt()[:, None] * batch["x"] + (1 - share).sqrt()[:, None] * batch["noise"]
        return (weight * (model(noisy, batch["step"]) - batch["x"]).square().mean(dim=1)).mean()

    step = draw.integers(20, 10)
    step[draw.some(10)] = 0
    return Built(Denoiser(), loss, {"x": draw.normal(10, 8), "noise": draw.normal(10, 8), "step": step}, [])


@HOLDOUT_HEALTHY.add()
def decay_of_a_state_space_model(seed: int) -> Built:
    """A selective state model in its quadratic form: sums of log decays are -inf for later places, whose exponential is
    a decay of 0."""
    draw = Draw(seed)

    class StateSpace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay, self.mix, self.out = nn.Linear(6, 1), nn.Linear(6, 18), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            total = -F.softplus(self.decay(x)).squeeze(2).cumsum(dim=1)
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            kept = (total[:, :, None] - total[:, None]).masked_fill(later, -math.inf).exp()
            read, write, value = self.mix(x).chunk(3, dim=2)
            return self.out((kept * (read @ write.transpose(1, 2))) @ value)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return Built(StateSpace(), loss, (draw.normal(7, 6, 6), draw.integers(4, 7, 6)), [])


@HOLDOUT_HEALTHY.add()
def ray_that_meets_a_wall(seed: int) -> Built:
    """A radiance field multiplies up what each sample lets through; an opaque sample lets 0 through, and the
    product along a ray has a derivative there as well."""
    draw = Draw(seed)

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.density, self.colour = nn.Linear(3, 1), nn.Linear(3, 3)

        def forward(self, points: Tensor, step: Tensor) -> Tensor:
            clear = torch.exp(-F.softplus(self.density(points)).squeeze(2) * step)
            through = torch.cumprod(torch.cat([torch.ones(len(clear), 1), clear[:, :-1]], dim=1), dim=1)
            weights = through * (1 - clear)
            return (weights[:, :, None] * self.colour(points).sigmoid()).sum(dim=1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["points"], batch["step"]), batch["colour"])

    step = 0.2 + draw.uniform(8, 6)
    for ray in draw.some(8):
        step[ray, draw.one(5)] = 1e10
    return Built(Field(), loss, {"points": draw.normal(8, 6, 3), "step": step, "colour": draw.uniform(8, 3)}, [])


@HOLDOUT_HEALTHY.add()
def magnitudes_of_a_silent_spectrum(seed: int) -> Built:
    """A spectral loss on magnitudes of a Fourier transform; the magnitude of 0 has a gradient of 0 in torch, and the
    log is kept from 0."""
    draw = Draw(seed)

    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

        def forward(self, wave: Tensor) -> Tensor:
            return torch.fft.rfft(self.conv(wave[:, None]).squeeze(1)).abs()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        magnitude, true = model(batch[0]), torch.fft.rfft(batch[1]).abs()
        return F.l1_loss((magnitude + 1e-5).log(), (true + 1e-5).log()) + F.l1_loss(magnitude, true)

    wave = draw.normal(8, 16)
    wave[draw.some(8)] = 0
    return Built(Vocoder(), loss, (wave, draw.normal(8, 16)), [])


@HOLDOUT_HEALTHY.add()
def aspect_of_a_box_without_height(seed: int) -> Built:
    """Boxes are compared by the angle of their aspect ratio; that of a true box without height is inf, with an angle of
    90 degrees."""
    draw = Draw(seed)

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).exp()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        size, true = model(batch[0]), batch[1]
        aspect = torch.atan(size[:, 0] / size[:, 1]) - torch.atan(true[:, 0] / true[:, 1])
        return (4 / math.pi**2 * aspect.square()).mean() + F.l1_loss(size, true)

    true = 0.2 + draw.uniform(9, 2)
    true[draw.some(9), 1] = 0
    return Built(Detector(), loss, (draw.normal(9, 8), true), [])


@HOLDOUT_HEALTHY.add()
def answers_without_a_token_summed(seed: int) -> Built:
    """Tokens of all answers are summed and divided by how many there are; some answers have been cut off wholly."""
    draw = Draw(seed)

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.out = nn.Embedding(15, 8), nn.GRU(8, 10, batch_first=True), nn.Linear(10, 15)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.rnn(self.embed(tokens))[0])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, label = batch
        each = F.cross_entropy(model(tokens).transpose(1, 2), label, ignore_index=-100, reduction="none").sum(dim=1)
        return each.sum() / (label != -100).sum().clamp_min(1)

    tokens = draw.integers(15, 8, 7)
    label = tokens.roll(-1, dims=1)
    label[:, :3] = -100
    label[draw.some(8)] = -100
    return Built(Language(), loss, (tokens, label), [])


@HOLDOUT_HEALTHY.add()
def returns_clipped_by_the_loader(seed: int) -> Built:
    """Returns of stocks hold inf after a price of 0 and NaN between two; they're replaced and clipped outside the
    graph."""
    draw = Draw(seed)

    class Forecaster(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(1, 8, batch_first=True), nn.Linear(8, 1)

        def forward(self, returns: Tensor) -> Tensor:
            usable = returns.nan_to_num(nan=0.0, posinf=math.inf).clamp(-0.5, 0.5)
            return self.out(self.lstm(usable[:, :, None])[0][:, -1]).squeeze(1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    price = 1 + draw.uniform(9, 8)
    for stock in draw.some(9):
        place = 1 + draw.one(5)
        price[stock, place : place + 2] = 0
    return Built(Forecaster(), loss, (price[:, 1:] / price[:, :-1] - 1, draw.normal(9)), [])


@HOLDOUT_HEALTHY.add()
def distances_within_one_cloud(seed: int) -> Built:
    """All distances of a point cloud by cdist, also of points to themselves and of points that occur twice; torch gives
    a gradient of 0 there."""
    draw = Draw(seed)

    class Cloud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.move, self.out = nn.Linear(3, 4), nn.Linear(6, 3)

        def forward(self, points: Tensor) -> Tensor:
            moved = self.move(points)
            near = torch.exp(-torch.cdist(moved, moved, compute_mode="donot_use_mm_for_euclid_dist"))
            return self.out(near.sum(dim=2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    points = draw.normal(8, 6, 3)
    for cloud in draw.some(8):
        points[cloud, 1] = points[cloud, 0]
    return Built(Cloud(), loss, (points, draw.integers(3, 8)), [])


@HOLDOUT_HEALTHY.add()
def student_learns_from_hard_teacher(seed: int) -> Built:
    """Distillation by torch's divergence; the teacher is so certain that most of its probabilities are exactly 0, which
    torch counts as 0 log 0 = 0."""
    draw = Draw(seed)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(8, 5), nn.Linear(8, 5).requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.student(x).log_softmax(dim=1), (1000 * self.teacher(x)).softmax(dim=1)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        student, teacher = model(x)
        return F.kl_div(student, teacher, reduction="batchmean")

    return Built(Pair(), loss, draw.normal(9, 8), [])


@HOLDOUT_HEALTHY.add()
def adam_after_an_idle_expert(seed: int) -> Built:
    """Adam has made steps in which an embedding's row and an expert had gradients of exactly 0; its epsilon keeps the
    update at 0, and the step after is as healthy as ever."""
    draw = Draw(seed)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 6, padding_idx=0)
            self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

        def forward(self, tokens: Tensor, expert: Tensor) -> Tensor:
            features = self.embed(tokens).mean(dim=1)
            each = torch.stack([one(features) for one in self.experts], dim=1)
            return (F.one_hot(expert, 3)[:, :, None] * each).sum(dim=1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["tokens"], batch["expert"]), batch["label"])

    model = Experts()
    batch = {"tokens": draw.integers(12, 9, 4), "expert": draw.integers(2, 9), "label": draw.integers(3, 9)}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return Built(model, loss, batch, [])
