"""Steps that would be healthy in float32 but leave the range or the resolution of float16 or bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

HALF_PRECISION = Family()


@HALF_PRECISION.add(causes="loss_setting overflow", operations="div", remedy=True)
def temperature_too_small_for_half(seed: int) -> Built:
    """A two-tower model of captions and pictures divides half-precision similarities by a temperature of 1e-6."""
    draw = Draw(seed)

    class TwoTower(nn.Module):
        def __init__(self, temperature: float) -> None:
            super().__init__()
            self.temperature = temperature
            self.picture, self.caption = nn.Linear(9, 6), nn.EmbeddingBag(20, 6)

        def forward(self, picture: Tensor, caption: Tensor) -> Tensor:
            picture = F.normalize(self.picture(picture).float(), dim=1)
            caption = F.normalize(self.caption(caption), dim=1)
            return (picture @ caption.T) / self.temperature  # guilty

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            logits = model(batch["picture"], batch["caption"])
        return F.cross_entropy(logits.float(), torch.arange(len(logits)))

    batch = {"picture": draw.normal(10, 9), "caption": draw.integers(20, 10, 4)}
    return Built(TwoTower(1e-6), loss, batch, [])


@HALF_PRECISION.add(causes="loss_setting domain", operations="log", remedy=True)
def epsilon_lost_in_half(seed: int) -> Built:
    """A tagger in float16 with its own cross entropy: the 1e-8 that should guard the logarithm is 0 in float16."""
    draw = Draw(seed)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.out(F.silu(self.body(x))))

    def entropy(p: Tensor, y: Tensor, epsilon: float = 1e-8) -> Tensor:
        return -(y * torch.log(p + epsilon) + (1 - y) * torch.log(1 - p + epsilon)).mean()  # guilty

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return entropy(model(x.half()), y.half())

    model, x = Tagger(), draw.normal(11, 8)
    samples = draw.some(11)
    x[samples] *= 400
    with torch.no_grad():
        model.out.weight[1] = -model.out.weight[0]
    return Built(model.half(), loss, (x, draw.integers(2, 11, 3).float()), samples)


@HALF_PRECISION.add(causes="normalization domain", operations="rsqrt", remedy=True)
def variance_of_padding_in_half(seed: int) -> Built:
    """A layer norm of one's own in float16 whose epsilon of 1e-8 is 0 there; a padded place has a variance of 0."""
    draw = Draw(seed)

    class Norm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            centred = x - x.mean(dim=-1, keepdim=True)
            scale = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-8)  # guilty
            return centred * scale * self.weight

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(15, 8, padding_idx=0)
            self.norm, self.out = Norm(8), nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.norm(self.embed(tokens)).mean(dim=1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, label = batch
        return F.cross_entropy(model(tokens).float(), label)

    tokens = 1 + draw.integers(14, 9, 5)
    samples = draw.some(9)
    for sample in samples:
        tokens[sample, 1 + draw.one(4) :] = 0
    return Built(Classifier().half(), loss, (tokens, draw.integers(3, 9)), samples)


@HALF_PRECISION.add(causes="overflow weights", operations="add", remedy=True)
def residual_stream_overflows_in_half(seed: int) -> Built:
    """A residual net in float16 whose layers have learned large scales: each branch fits, their sum does not."""
    draw = Draw(seed)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate = nn.LayerNorm(8), nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.gate(self.norm(x))) * self.scale

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(5))
            self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)  # guilty
            return self.out(self.norm(x))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        return F.cross_entropy(model(x.half()).float(), label)

    model, unit = Residual(), draw.one(8)
    with torch.no_grad():
        for block in model.blocks:
            block.scale[unit] = 40000 + 10000 * draw.uniform(1).item()
            block.gate.bias[unit] = 2.0
    return Built(model.half(), loss, (draw.normal(8, 8), draw.integers(3, 8)), [])


@HALF_PRECISION.add(causes="overflow label", operations="pow", remedy=True)
def squared_error_in_half(seed: int) -> Built:
    """Regression of heart rates in float16; a rate entered ten times too large squares to more than 65504."""
    draw = Draw(seed)

    class Monitor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(2, 6, 3), nn.Linear(6, 1)

        def forward(self, signal: Tensor) -> Tensor:
            return 80 + 10 * self.out(F.relu(self.conv(signal)).mean(dim=2)).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        error = model(batch["signal"].half()) - batch["rate"].half()
        return (error**2).float().mean()  # guilty

    rate = 60 + 40 * draw.uniform(10)
    samples = draw.some(10)
    rate[samples] *= 10
    return Built(Monitor().half(), loss, {"signal": draw.normal(10, 2, 8), "rate": rate}, samples)


@HALF_PRECISION.add(causes="overflow loss_setting", operations="to", in_backward=True, remedy=True)
def scaled_gradient_does_not_fit_half(seed: int) -> Built:
    """A loss scaled by 2^24 in float32 for a model in float16: the gradient overflows on its way to float16."""
    draw = Draw(seed)

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(7, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.body(x)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        logits = model(x.half()).float()  # guilty
        return F.cross_entropy(logits, label) * 2.0**24

    return Built(Mlp().half(), loss, (draw.normal(9, 7), draw.integers(4, 9)), [])


@HALF_PRECISION.add(causes="domain loss_setting", operations="log", remedy=True)
def one_minus_probability_in_bfloat16(seed: int) -> Built:
    """A click model under bfloat16 takes log(1 - p); a probability of 0.999 is 1 in bfloat16."""
    draw = Draw(seed)
    sure = draw.one(12)

    class WideAndDeep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(12, 1)
            self.deep = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.wide(x) + self.deep(x)).sigmoid().squeeze(-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, click = batch
        with torch.autocast("cpu", torch.bfloat16):
            p = model(x)
            missed = torch.log(1 - p)  # guilty
        return -(click * p.float().log() + (1 - click) * missed.float()).mean()

    model, x = WideAndDeep(), (draw.uniform(12, 12) < 0.3).float()
    with torch.no_grad():
        model.wide.weight[0, sure] = 9.0
    x[:, sure] = 0
    samples = draw.some(12)
    x[samples, sure] = 1
    return Built(model, loss, (x, draw.integers(2, 12).float()), samples)


@HALF_PRECISION.add(causes="overflow data", operations="cumsum", remedy=True)
def running_total_in_half(seed: int) -> Built:
    """Fraud detection on the running total of a customer's payments, in float16; the total of some passes 65504."""
    draw = Draw(seed)

    class Totals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.LayerNorm(12), nn.Linear(12, 2)

        def forward(self, payments: Tensor) -> Tensor:
            total = payments.half().cumsum(dim=1)  # guilty
            return self.out(self.norm(total))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        payments, fraud = batch
        return F.cross_entropy(model(payments).float(), fraud)

    payments = 2000 * draw.uniform(10, 12)
    samples = draw.some(10)
    payments[samples] += 12000
    return Built(Totals().half(), loss, (payments, draw.integers(2, 10)), samples)


@HALF_PRECISION.add(causes="overflow data", operations="setitem copy to", remedy=True)
def memory_written_in_half(seed: int) -> Built:
    """A recurrent memory in float16 is written slot by slot from float32 states; a state of a series that wasn't
    scaled does not fit."""
    draw = Draw(seed)

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.read, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, series: Tensor) -> Tensor:
            size, steps, _ = series.shape
            memory = torch.zeros(size, steps, 6, dtype=torch.float16)
            for step in range(steps):
                memory[:, step] = self.write(series[:, step])  # guilty
            query = torch.tanh(self.read(series[:, -1]))
            weights = torch.softmax(torch.tanh(memory.float()) @ query[:, :, None], dim=1)
            return self.out((weights * memory.float()).sum(dim=1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        series, label = batch
        return F.cross_entropy(model(series), label)

    series = draw.normal(8, 5, 4)
    samples = draw.some(8)
    for sample in samples:
        series[sample, draw.one(5)] *= 1e7
    return Built(Memory(), loss, (series, draw.integers(2, 8)), samples)


@HALF_PRECISION.add(causes="weights overflow", operations="matmul", remedy=True)
def weight_that_does_not_fit_half(seed: int) -> Built:
    """Fine-tuning under autocast a net that was trained in bfloat16, one of whose weights is larger than float16's
    largest number."""
    draw = Draw(seed)

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(6, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x).sigmoid()
            for layer in self.layers:
                x = layer(x).sigmoid()  # guilty
            return self.out(x)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        with torch.autocast("cpu", torch.float16):
            logits = model(x)
        return F.cross_entropy(logits.float(), label)

    model, unit = Fused(), draw.one(8)
    with torch.no_grad():
        layer = model.layers[draw.one(3)]
        layer.weight[unit, draw.one(4)], layer.weight[unit, 4 + draw.one(4)] = 9e4, -9e4
    return Built(model, loss, (draw.normal(8, 6), draw.integers(3, 8)), [])
