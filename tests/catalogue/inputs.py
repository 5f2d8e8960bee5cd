"""Steps spoilt by what is in the batch: readings, labels and what an augmentation makes of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

INPUTS = Family()


@INPUTS.add(causes="data", remedy=True)
def depth_without_return(seed: int) -> Built:
    """A small U-Net on depth images; the camera's driver writes infinity where no light came back."""
    draw = Draw(seed)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(1, 6, 3, padding=1)
            self.bottom = nn.Conv2d(6, 6, 3, padding=1)
            self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
            self.out = nn.Conv2d(12, 1, 1)

        def forward(self, depth: Tensor) -> Tensor:
            skip = F.leaky_relu(self.down(depth), 0.1)
            bottom = F.leaky_relu(self.bottom(F.avg_pool2d(skip, 2)), 0.1)
            return self.out(torch.cat([skip, self.up(bottom)], dim=1))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch["depth"]), batch["mask"])

    depth = 1 + 3 * draw.uniform(7, 1, 8, 8)
    samples = draw.some(7)
    for sample in samples:
        depth[sample, 0, draw.one(8), draw.one(8)] = math.inf
    return Built(UNet(), loss, {"depth": depth, "mask": (draw.uniform(7, 1, 8, 8) < 0.4).float()}, samples)


@INPUTS.add(causes="data domain", operations="log1p", remedy=True)
def refund_in_log_of_price(seed: int) -> Built:
    """A tabular model squeezes prices by log(1 + x); a refund is booked as a price below -1."""
    draw = Draw(seed)

    class Squeeze(nn.Module):
        def forward(self, amounts: Tensor) -> Tensor:
            return torch.log1p(amounts)  # guilty

    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shop = nn.Embedding(12, 4)
            self.numbers = nn.Sequential(Squeeze(), nn.Linear(5, 8), nn.ReLU())
            self.out = nn.Linear(12, 1)

        def forward(self, shop: Tensor, amounts: Tensor) -> Tensor:
            return self.out(torch.cat([self.shop(shop), self.numbers(amounts)], dim=1)).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["shop"], batch["amounts"])
        return F.binary_cross_entropy_with_logits(logits, batch["fraud"])

    amounts = 50 * draw.uniform(14, 5)
    samples = draw.some(14)
    for sample in samples:
        amounts[sample, draw.one(5)] = -2 - 30 * draw.uniform(1).item()
    batch = {"shop": draw.integers(12, 14), "amounts": amounts, "fraud": draw.integers(2, 14).float()}
    return Built(Tabular(), loss, batch, samples)


@INPUTS.add(causes="data overflow", operations="pow", remedy=True)
def fill_value_of_a_raster(seed: int) -> Built:
    """Weather maps whose missing cells hold the format's fill value of 9.97e36; the map's power squares it."""
    draw = Draw(seed)

    class Downscale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 6, 3, padding=1)
            self.out = nn.Linear(6, 1)

        def forward(self, field: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(torch.tanh(field))).mean(dim=(2, 3))).squeeze(-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        field, rain = batch
        return F.l1_loss(model(field) + map_power(field), rain)

    def map_power(field: Tensor) -> Tensor:
        return 0.01 * field.pow(2).mean(dim=(1, 2, 3)).log1p()  # guilty

    field = draw.normal(9, 2, 6, 6)
    samples = draw.some(9)
    for sample in samples:
        field[sample, draw.one(2), draw.one(6), draw.one(6)] = 9.96921e36
    return Built(Downscale(), loss, (field, draw.uniform(9)), samples)


@INPUTS.add(causes="label domain", operations="div", remedy=True)
def votes_of_nobody(seed: int) -> Built:
    """Soft labels are shares of the annotators' votes; nobody has voted on some of the texts."""
    draw = Draw(seed)

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.EmbeddingBag(40, 10, mode="mean")
            self.out = nn.Linear(10, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(torch.tanh(self.words(tokens)))

    def shares(votes: Tensor) -> Tensor:
        return votes / votes.sum(dim=1, keepdim=True)  # guilty

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["tokens"]), shares(batch["votes"]))

    votes = draw.integers(4, 11, 4).float()
    votes[:, 0] += 1
    samples = draw.some(11)
    votes[samples] = 0
    return Built(Bag(), loss, {"tokens": draw.integers(40, 11, 6), "votes": votes}, samples)


@INPUTS.add(causes="label domain", operations="log", remedy=True)
def box_without_width(seed: int) -> Built:
    """A detector regresses log(width / anchor); a click instead of a drawn box has a width or a height of 0."""
    draw = Draw(seed)

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
            self.box = nn.Linear(8, 4)
            self.register_buffer("anchor", torch.tensor([12.0, 20.0]))

        def encode(self, box: Tensor) -> Tensor:
            size = torch.log((box[:, 2:] - box[:, :2]) / self.anchor)  # guilty
            return torch.cat([(box[:, :2] + box[:, 2:]) / 64, size], dim=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.box(self.features(images).mean(dim=(2, 3)))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.smooth_l1_loss(model(batch["image"]), model.encode(batch["box"]))

    corner = 20 * draw.uniform(10, 2)
    box = torch.cat([corner, corner + 4 + 20 * draw.uniform(10, 2)], dim=1)
    samples = draw.some(10)
    for sample in samples:
        side = draw.one(2)
        box[sample, 2 + side] = box[sample, side]
    return Built(Detector(), loss, {"image": draw.normal(10, 3, 11, 11), "box": box}, samples)


@INPUTS.add(causes="augmentation normalization", operations="div", remedy=True)
def augmentation_erases_short_recordings(seed: int) -> Built:
    """Time masking of a fixed width hides all of a short recording, which is then divided by its own spread of 0."""
    draw = Draw(seed)

    class TimeMask(nn.Module):
        def forward(self, spectrogram: Tensor, length: Tensor) -> Tensor:
            if not self.training:
                return spectrogram
            room = (length - 6).clamp_min(0)
            start = (torch.rand(len(length)) * room).long()[:, None]
            place = torch.arange(spectrogram.shape[1])
            return spectrogram.masked_fill(((place >= start) & (place < start + 6))[:, :, None], 0.0)

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.augment = TimeMask()
            self.gru = nn.GRU(5, 10, batch_first=True)
            self.out = nn.Linear(10, 3)

        def forward(self, spectrogram: Tensor, length: Tensor) -> Tensor:
            seen = self.augment(spectrogram, length)
            centred = seen - seen.mean(dim=(1, 2), keepdim=True)
            scaled = centred / centred.abs().amax(dim=(1, 2), keepdim=True)  # guilty
            return self.out(self.gru(scaled)[0][:, -1])

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["spectrogram"], batch["length"]), batch["word"])

    spectrogram, length = draw.normal(8, 14, 5), 10 + draw.integers(5, 8)
    samples = draw.some(8)
    length[samples] = 2 + draw.integers(5, len(samples))
    spectrogram[torch.arange(14) >= length[:, None]] = 0
    batch = {"spectrogram": spectrogram, "length": length, "word": draw.integers(3, 8)}
    return Built(Keyword(), loss, batch, samples)


@INPUTS.add(causes="augmentation data", operations="pow", remedy=True)
def gamma_of_a_negative_pixel(seed: int) -> Built:
    """Random gamma correction while training; some pictures came already centred, with negative pixels."""
    draw = Draw(seed)

    class RandomGamma(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                images = images.pow(0.7 + 0.2 * torch.rand(len(images), 1, 1, 1))  # guilty
            return images

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.augment = RandomGamma()
            self.conv = nn.Conv2d(3, 6, 3, groups=3)
            self.mix = nn.Conv2d(6, 8, 1)
            self.out = nn.Linear(8, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.out(F.gelu(self.mix(self.conv(self.augment(images)))).mean(dim=(2, 3)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, label = batch
        return F.cross_entropy(model(images), label)

    images = 0.05 + 0.9 * draw.uniform(9, 3, 7, 7)
    samples = draw.some(9)
    images[samples] = 2 * images[samples] - 1
    return Built(Net(), loss, (images, draw.integers(4, 9)), samples)


@INPUTS.add(causes="data normalization", operations="div", remedy=True)
def session_of_one_event(seed: int) -> Built:
    """Recommending from sessions standardised one by one; with one event the unbiased variance is 0 / 0."""
    draw = Draw(seed)

    def standardise(session: Tensor) -> Tensor:
        centred = session - session.mean(dim=0)
        variance = centred.square().sum(dim=0) / (len(session) - 1)  # guilty
        return centred / (variance + 1e-5).sqrt()

    class Sessions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 9)
            self.out = nn.Linear(9, 6)

        def forward(self, sessions: list[Tensor]) -> Tensor:
            last = []
            for session in sessions:
                state = session.new_zeros(1, 9)
                for event in standardise(session):
                    state = self.cell(event[None], state)
                last.append(state)
            return self.out(torch.cat(last))

    def loss(model: nn.Module, batch: tuple[list[Tensor], Tensor]) -> Tensor:
        sessions, bought = batch
        return F.cross_entropy(model(sessions), bought)

    sessions = [draw.normal(2 + draw.one(3), 4) for _ in range(7)]
    samples = draw.some(7)
    for sample in samples:
        sessions[sample] = draw.normal(1, 4)
    return Built(Sessions(), loss, (sessions, draw.integers(6, 7)), samples)


@INPUTS.add(causes="data domain", operations="div", remedy=True)
def two_readings_at_one_time(seed: int) -> Built:
    """A model of irregular series steps along the slope between readings; two readings carry the same time stamp."""
    draw = Draw(seed)

    class ControlledNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drive = nn.Linear(8 + 3, 8)
            self.out = nn.Linear(8, 1)

        def forward(self, values: Tensor, times: Tensor) -> Tensor:
            state = values.new_zeros(len(values), 8)
            for step in range(1, values.shape[1]):
                gap = (times[:, step] - times[:, step - 1])[:, None]
                slope = (values[:, step] - values[:, step - 1]) / gap  # guilty
                state = state + gap * torch.tanh(self.drive(torch.cat([state, slope], dim=1)))
            return self.out(state).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["values"], batch["times"]), batch["target"])

    values, times = draw.normal(8, 6, 3), (0.2 + draw.uniform(8, 6)).cumsum(dim=1)
    samples = draw.some(8)
    for sample in samples:
        step = 1 + draw.one(5)
        times[sample, step] = times[sample, step - 1]
        if draw.one(2):
            values[sample, step] = values[sample, step - 1]
    return Built(ControlledNet(), loss, {"values": values, "times": times, "target": draw.normal(8)}, samples)


@INPUTS.add(causes="label domain", operations="lgamma", remedy=True)
def count_of_minus_one(seed: int) -> Built:
    """A negative binomial model of gene counts; a count that is missing is stored as -1, a pole of the log gamma."""
    draw = Draw(seed)

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Linear(6, 12), nn.SiLU())
            self.rate, self.dispersion = nn.Linear(12, 5), nn.Parameter(torch.zeros(5))

        def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
            return F.softplus(self.rate(self.encode(condition))) + 0.1, self.dispersion.exp()

    def log_likelihood(count: Tensor, rate: Tensor, shape: Tensor) -> Tensor:
        combinations = torch.lgamma(count + shape) - torch.lgamma(shape) - torch.lgamma(count + 1)  # guilty
        return combinations + shape * torch.log(shape / (shape + rate)) + count * torch.log(rate / (shape + rate))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        rate, shape = model(batch["condition"])
        return -log_likelihood(batch["count"], rate, shape + 1.5).mean()

    count = draw.integers(9, 10, 5).float()
    samples = draw.some(10)
    for sample in samples:
        count[sample, draw.one(5)] = -1
    return Built(Counts(), loss, {"condition": draw.normal(10, 6), "count": count}, samples)


@INPUTS.add(causes="data domain", operations="log", remedy=True)
def logarithm_in_place_of_silence(seed: int) -> Built:
    """An audio model takes the logarithm of its spectrogram in place; digital silence has an energy of exactly 0."""
    draw = Draw(seed)

    class Frontend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("window", torch.hann_window(16))

        def forward(self, wave: Tensor) -> Tensor:
            frames = wave.unfold(1, 16, 8) * self.window
            energy = torch.fft.rfft(frames).abs().square()
            energy.log_()  # guilty
            return energy.clamp(max=30.0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frontend = Frontend()
            self.conv = nn.Conv1d(9, 8, 3)
            self.out = nn.Linear(8, 3)

        def forward(self, wave: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(self.frontend(wave).transpose(1, 2))).mean(dim=2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        wave, tags = batch
        return F.binary_cross_entropy_with_logits(model(wave), tags)

    wave = draw.normal(9, 64)
    samples = draw.some(9)
    for sample in samples:
        wave[sample, 8 * draw.one(4) :][:32] = 0
    return Built(Tagger(), loss, (wave, draw.integers(2, 9, 3).float()), samples)


@INPUTS.add(causes="data domain", operations="div", remedy=True)
def perspective_of_a_point_in_the_camera(seed: int) -> Built:
    """A point net projects points by dividing a view of their coordinates by the depth; a point lies at depth 0."""
    draw = Draw(seed)

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 8))
            self.out = nn.Linear(8, 4)

        def forward(self, points: Tensor) -> Tensor:
            points = points.clone()
            plane = points[..., :2]
            plane.div_(points[..., 2:])  # guilty
            return self.out(self.lift(points).amax(dim=1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        points, label = batch
        return F.cross_entropy(model(points), label)

    points = draw.normal(8, 10, 3)
    points[..., 2] = 1 + points[..., 2].abs()
    samples = draw.some(8)
    for sample in samples:
        points[sample, draw.one(10), 2] = 0
    return Built(Projected(), loss, (points, draw.integers(4, 8)), samples)
