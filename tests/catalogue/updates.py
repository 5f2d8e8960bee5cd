"""More steps spoilt by the update before them, or by a normalisation of pictures, features or weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

UPDATES = Family()


@UPDATES.add(causes="learning_rate weights", operations="matmul", in_backward=True, remedy=True)
def binary_recurrence_after_a_large_step(seed: int) -> Built:
    """A recurrent net of signs with straight-through gradients after one step with a learning rate of 1e4: its states
    stay -1 and 1, but the gradient grows with each of 40 steps back in time."""
    draw = Draw(seed)

    class Binary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.again, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, series: Tensor) -> Tensor:
            state = series.new_zeros(len(series), 8)
            for step in range(series.shape[1]):
                drive = self.enter(series[:, step]) + self.again(state)  # guilty
                state = drive + (drive.sign() - drive).detach()
            return self.out(state)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        series, label = batch
        return F.mse_loss(model(series), F.one_hot(label, 2).float())

    model, batch = Binary(), (draw.normal(6, 40, 3), draw.integers(2, 6))
    optimizer = torch.optim.SGD(model.again.parameters(), lr=1e4)
    loss(model, batch).backward()
    optimizer.step()
    return Built(model, loss, batch, [])


@UPDATES.add(causes="optimizer weights", operations="matmul")
def weight_decay_that_overshoots(seed: int) -> Built:
    """Decay times learning rate is 50 where it must stay below 1, so that each step multiplied the weights by -49; they
    are still finite after 12 steps, but what two layers make of them isn't."""
    draw = Draw(seed)

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.3), nn.Linear(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.net(x) - self.net(-x))  # guilty

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.mse_loss(model(x), (x > 0).float())

    model, x = Autoencoder(), draw.normal(9, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=100.0)
    for _ in range(12):
        optimizer.zero_grad()
        F.l1_loss(torch.tanh(model.net(x)), x).backward()
        optimizer.step()
    return Built(model, loss, x, [])


@UPDATES.add(causes="optimizer weights")
def step_normalised_by_a_zero_gradient(seed: int) -> Built:
    """An optimizer of one's own scales each gradient to a length of 1; an expert to which nothing was routed had a
    gradient of 0, and its weights became NaN."""
    draw = Draw(seed)
    idle = draw.one(3)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(5, 3)
            self.experts = nn.ModuleList(nn.Linear(5, 2) for _ in range(3))

        def forward(self, x: Tensor, share: Tensor) -> Tensor:
            gates = self.router(x).softmax(dim=1) * share
            return sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["x"], batch["share"]), batch["y"])

    model = Experts()
    share = torch.ones(9, 3)
    share[:, idle] = 0
    batch = {"x": draw.normal(9, 5), "share": share, "y": draw.normal(9, 2)}
    loss(model, batch).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad / parameter.grad.norm()
    return Built(model, loss, {**batch, "share": torch.ones(9, 3)}, [])


@UPDATES.add(causes="normalization data", operations="div", remedy=True)
def blank_slice_through_own_instance_norm(seed: int) -> Built:
    """A U-Net with an instance norm of one's own, without an epsilon, inside its down path; a slice outside the body is
    constant in every channel."""
    draw = Draw(seed)

    class InstanceNorm(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(channels, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True)
            x = x - mean
            x /= variance.clamp_min(0).pow(0.5).detach()  # guilty
            return x * self.weight

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Conv2d(1, 4, 3, bias=False)
            self.down = nn.Sequential(InstanceNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1))
            self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
            self.out = nn.Conv2d(8, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            skip = self.enter(images)
            return self.out(torch.cat([skip, self.up(self.down(skip))], dim=1))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["tissue"])

    image = draw.normal(7, 1, 8, 8)
    samples = draw.some(7)
    image[samples] = 0
    return Built(UNet(), loss, {"image": image, "tissue": draw.integers(2, 7, 6, 6)}, samples)


@UPDATES.add(causes="normalization weights", operations="div")
def standardised_weights_of_a_zeroed_filter(seed: int) -> Built:
    """Convolutions with standardised weights, (w - mean) / std; pruning set one filter of one layer to 0."""
    draw = Draw(seed)

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight.flatten(1)
            centred = flat - flat.mean(dim=1, keepdim=True)
            scaled = centred / flat.std(dim=1, keepdim=True)  # guilty
            return F.conv2d(x, scaled.view_as(self.weight) / 3, self.bias)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Standardised(2, 5, 3), Standardised(5, 5, 3)])
            self.out = nn.Linear(5, 3)

        def forward(self, images: Tensor) -> Tensor:
            for layer in self.layers:
                images = F.gelu(layer(images))
            return self.out(images.mean(dim=(2, 3)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, label = batch
        return F.cross_entropy(model(images), label)

    model = Net()
    with torch.no_grad():
        model.layers[draw.one(2)].weight[draw.one(5)] = 0
    return Built(model, loss, (draw.normal(8, 2, 7, 7), draw.integers(3, 8)), [])


@UPDATES.add(causes="augmentation data", operations="div", remedy=True)
def brightness_of_a_black_picture(seed: int) -> Built:
    """Brightness augmentation sets each picture's mean to a random value; a black picture has a mean of 0."""
    draw = Draw(seed)

    class Brightness(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            if not self.training:
                return images
            wanted = 0.3 + 0.4 * torch.rand(len(images), 1, 1, 1)
            return images * (wanted / images.mean(dim=(1, 2, 3), keepdim=True))  # guilty

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.augment = Brightness()
            self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 6))

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return F.cosine_similarity(self.body(self.augment(first)), self.body(self.augment(second)), dim=1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["first"], batch["second"]), batch["same"])

    first, second = 0.05 + draw.uniform(8, 3, 8, 8), 0.05 + draw.uniform(8, 3, 8, 8)
    samples = draw.some(8)
    for sample in samples:
        (first, second)[draw.one(2)][sample] = 0
    return Built(Siamese(), loss, {"first": first, "second": second, "same": draw.integers(2, 8).float()}, samples)
