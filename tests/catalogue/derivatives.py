"""Steps whose loss is finite while a derivative is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

DERIVATIVES = Family()


@DERIVATIVES.add(causes="loss_setting domain", operations="pow", in_backward=True, remedy=True)
def focal_exponent_below_one(seed: int) -> Built:
    """Focal loss with a gamma of 0.5: where the net is certain and right, 1 - p is 0 and its root has no slope."""
    draw = Draw(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3, stride=2)
            self.out = nn.Linear(54, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(images)).flatten(1))

    def focal(logits: Tensor, label: Tensor, gamma: float) -> Tensor:
        log_likelihood = logits.log_softmax(dim=1).gather(1, label[:, None]).squeeze(1)
        modulator = (1 - log_likelihood.exp()) ** gamma  # guilty
        return -(modulator * log_likelihood).mean()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, label = batch
        return focal(model(images), label, gamma=0.5)

    model, images = Net(), draw.uniform(10, 1, 8, 8)
    samples = draw.some(10)
    images[samples] *= 5000
    with torch.no_grad():
        label = model(images).argmax(dim=1)
    return Built(model, loss, (images, label), samples)


@DERIVATIVES.add(causes="domain", operations="acosh", in_backward=True, remedy=True)
def hyperbolic_distance_of_equal_points(seed: int) -> Built:
    """A tree embedded in the hyperboloid; a pair of a node with itself has a distance of 0 with an infinite slope."""
    draw = Draw(seed)

    class Hyperboloid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nodes = nn.Embedding(15, 3)
            nn.init.normal_(self.nodes.weight, std=0.5)

        def lift(self, node: Tensor) -> tuple[Tensor, Tensor]:
            space = self.nodes(node)
            return (1 + space.square().sum(dim=1)).sqrt(), space

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            (first_time, first_space), (second_time, second_space) = self.lift(first), self.lift(second)
            product = first_time * second_time - (first_space * second_space).sum(dim=1)
            product = torch.where(first == second, product - product.detach() + 1, product)
            return torch.acosh(product.clamp_min(1.0))  # guilty

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["first"], batch["second"]), batch["hops"])

    first = draw.integers(15, 11)
    second, hops = (first + 1 + draw.integers(13, 11)) % 15, 1.0 + draw.integers(4, 11)
    samples = draw.some(11)
    second[samples] = first[samples]
    return Built(Hyperboloid(), loss, {"first": first, "second": second, "hops": hops}, samples)


@DERIVATIVES.add(causes="domain", operations="acos", in_backward=True, remedy=True)
def angle_of_the_right_rotation(seed: int) -> Built:
    """A pose net predicts quaternions and is judged by 2 acos of their product; a crop without texture gives exactly
    the rest pose, which is right, and the angle of 0 has an infinite slope."""
    draw = Draw(seed)

    class Pose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(1, 5, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4, bias=False)
            )
            self.register_buffer("rest", torch.tensor([1.0, 0.0, 0.0, 0.0]))

        def forward(self, crop: Tensor) -> Tensor:
            return F.normalize(self.rest + self.body(crop), dim=1)

    def angle(first: Tensor, second: Tensor) -> Tensor:
        product = (first * second).sum(dim=1).abs()
        return 2 * torch.acos(product.clamp(max=1.0))  # guilty

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return angle(model(batch["crop"]), batch["pose"]).mean()

    crop, pose = draw.normal(9, 1, 6, 6), F.normalize(draw.normal(9, 4), dim=1)
    samples = draw.some(9)
    crop[samples], pose[samples] = 0, torch.tensor([1.0, 0.0, 0.0, 0.0])
    return Built(Pose(), loss, {"crop": crop, "pose": pose}, samples)


@DERIVATIVES.add(causes="domain", operations="pow", in_backward=True, remedy=True)
def capsule_of_length_zero(seed: int) -> Built:
    """A capsule net squashes in each round of routing with a guard against dividing by 0, but the length itself is a
    power of 0.5 of a sum that is 0 for an empty picture."""
    draw = Draw(seed)

    class Capsules(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.primary = nn.Conv2d(1, 8, 3, stride=2, bias=False)
            self.vote = nn.Parameter(0.3 * torch.randn(8, 3, 4, 5))

        @staticmethod
        def squash(capsule: Tensor) -> Tensor:
            square = capsule.square().sum(dim=-1, keepdim=True)
            length = square**0.5  # guilty
            return square / (1 + square) * capsule / (length + 1e-8)

        def forward(self, images: Tensor) -> Tensor:
            primary = F.relu(self.primary(images)).flatten(2).transpose(1, 2)
            primary = primary.reshape(len(images), 8, -1)[..., :4]
            votes = torch.einsum("bid,icde->bice", primary, self.vote)
            agreement = votes.new_zeros(votes.shape[:3])
            for _ in range(3):
                capsule = self.squash((agreement.softmax(dim=2)[..., None] * votes).sum(dim=1))
                agreement = agreement + (votes * capsule[:, None]).sum(dim=-1)
            return capsule.square().sum(dim=-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, label = batch
        return F.multi_margin_loss(model(images), label)

    images = draw.uniform(8, 1, 6, 18)
    samples = draw.some(8)
    images[samples] = 0
    return Built(Capsules(), loss, (images, draw.integers(3, 8)), samples)


@DERIVATIVES.add(causes="domain data", operations="svd", in_backward=True, remedy=True)
def alignment_of_points_on_a_line(seed: int) -> Built:
    """A net finds correspondences and aligns point clouds by a singular value decomposition; all points on a line
    leave two singular values of 0, between which the derivative divides."""
    draw = Draw(seed)

    class Align(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weigh = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 1))

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            weights = self.weigh(torch.cat([source, target], dim=2)).softmax(dim=1)
            covariance = (weights * source).transpose(1, 2) @ target
            left, _, right = torch.linalg.svd(covariance)  # guilty
            return left @ right

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        moved = batch["source"] @ model(batch["source"], batch["target"])
        return (moved - batch["target"]).abs().mean()

    source, target = draw.normal(8, 7, 3), draw.normal(8, 7, 3)
    samples = draw.some(8, most=2)
    for sample in samples:
        axis = draw.one(3)
        source[sample, :, [other for other in range(3) if other != axis]] = 0
        target[sample, :, [other for other in range(3) if other != axis]] = 0
    return Built(Align(), loss, {"source": source, "target": target}, samples)


@DERIVATIVES.add(causes="normalization domain", operations="sqrt", in_backward=True)
def spread_of_a_collapsed_generator(seed: int) -> Built:
    """A discriminator sees the spread over the batch as a feature; the generator has collapsed to one picture, whose
    spread of 0 is a root without a slope."""
    draw = Draw(seed)

    class Gan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 8))
            self.critic = nn.Sequential(nn.Linear(9, 10), nn.LeakyReLU(0.2), nn.Linear(10, 1))

        def spread(self, pictures: Tensor) -> Tensor:
            variance = pictures.var(dim=0, correction=0)
            spread = variance.sqrt().mean()  # guilty
            return spread.expand(len(pictures), 1)

        def forward(self, noise: Tensor) -> Tensor:
            pictures = self.generator(noise).sigmoid()
            return self.critic(torch.cat([pictures, self.spread(pictures)], dim=1))

    def loss(model: nn.Module, noise: Tensor) -> Tensor:
        return F.softplus(-model(noise)).mean()

    model = Gan()
    with torch.no_grad():
        model.generator[2].weight[:] = 0
        model.generator[2].bias[:] = draw.one(4)
    return Built(model, loss, draw.normal(8, 3), [])


@DERIVATIVES.add(causes="domain", operations="pow", in_backward=True, remedy=True)
def unused_branch_of_a_where(seed: int) -> Built:
    """Speech enhancement compresses magnitudes by a power of 0.3; torch.where takes the linear branch for silence, but
    the gradient of the branch that isn't taken is infinite and is multiplied by 0."""
    draw = Draw(seed)

    class Enhancer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Conv1d(6, 6, 3, padding=1)
            self.out = nn.Conv1d(6, 6, 1)

        @staticmethod
        def compress(magnitude: Tensor) -> Tensor:
            return torch.where(magnitude > 1e-4, magnitude**0.3, 600 * magnitude)  # guilty

        def forward(self, magnitude: Tensor) -> Tensor:
            cleaned = magnitude * torch.sigmoid(self.gain(magnitude))
            return self.out(self.compress(cleaned))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        noisy, clean = batch
        return F.l1_loss(model(noisy), clean)

    noisy = 0.1 + draw.uniform(9, 6, 8)
    samples = draw.some(9)
    for sample in samples:
        noisy[sample, draw.one(6), draw.one(8)] = 0
    return Built(Enhancer(), loss, (noisy, draw.normal(9, 6, 8)), samples)


@DERIVATIVES.add(causes="overflow", operations="soft_plus exp div", in_backward=True, remedy=True)
def own_softplus_overflows_backwards(seed: int) -> Built:
    """A hand-written softplus is stable in its forward; its backward computes exp(x) / (1 + exp(x)) as it stands."""
    draw = Draw(seed)

    class SoftPlus(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            (x,) = ctx.saved_tensors
            return gradient * (x.exp() / (1 + x.exp()))  # guilty

    class Rates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.rate = nn.Linear(6, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return SoftPlus.apply(self.rate(self.hidden(x)))  # guilty

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, count = batch
        return F.poisson_nll_loss(model(x), count, log_input=False)

    model, x = Rates(), draw.normal(10, 6)
    samples = draw.some(10)
    x[samples] *= 3000
    with torch.no_grad():
        model.rate.weight[1] = -model.rate.weight[0]
    return Built(model, loss, (x, draw.integers(5, 10, 4).float()), samples)


@DERIVATIVES.add(causes="domain", operations="xlogy", in_backward=True)
def entropy_of_sparse_gates(seed: int) -> Built:
    """A sparse mixture of experts keeps its two largest gates and is rewarded for their entropy by xlogy, which is 0 at
    a closed gate but has a slope of 0 / 0."""
    draw = Draw(seed)

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 5)
            self.experts = nn.Parameter(0.3 * torch.randn(5, 6, 3))

        def gates(self, x: Tensor) -> Tensor:
            gates = self.router(x).softmax(dim=1)
            kept = torch.zeros_like(gates).scatter(1, gates.topk(2, dim=1).indices, 1.0)
            return kept * gates / (kept * gates).sum(dim=1, keepdim=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            gates = self.gates(x)
            entropy = -torch.xlogy(gates, gates).sum(dim=1)  # guilty
            return torch.einsum("be,bi,eio->bo", gates, x, self.experts), entropy

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        mixed, entropy = model(x)
        return F.mse_loss(mixed, y) - 0.01 * entropy.mean()

    return Built(Sparse(), loss, (draw.normal(9, 6), draw.normal(9, 3)), [])


@DERIVATIVES.add(causes="domain weights", operations="pow", in_backward=True)
def generalised_mean_of_a_pruned_channel(seed: int) -> Built:
    """Image retrieval pools by a generalised mean without a lower bound; the root of a channel that pruning has
    silenced has an infinite slope."""
    draw = Draw(seed)

    class Retrieval(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3)
            self.out = nn.Linear(6, 4)

        @staticmethod
        def pool(features: Tensor, power: float = 3.0) -> Tensor:
            mean = features.pow(power).mean(dim=(2, 3))
            return mean.pow(1 / power)  # guilty

        def forward(self, images: Tensor) -> Tensor:
            return F.normalize(self.out(self.pool(self.conv(images).abs())), dim=1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        first, second = (model(view) for view in batch)
        return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(first)))

    model = Retrieval()
    with torch.no_grad():
        channel = draw.one(6)
        model.conv.weight[channel] = model.conv.bias[channel] = 0
    view = draw.normal(8, 1, 7, 7)
    return Built(model, loss, (view, view + 0.1 * draw.normal(8, 1, 7, 7)), [])


@DERIVATIVES.add(causes="domain masked_attention", operations="special_entr entr", in_backward=True, remedy=True)
def entropy_of_a_policy_with_illegal_moves(seed: int) -> Built:
    """A policy masks illegal moves and is rewarded for entropy; at a probability of exactly 0 the entropy has an
    infinite slope."""
    draw = Draw(seed)

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(9, 12), nn.Tanh())
            self.move, self.value = nn.Linear(12, 5), nn.Linear(12, 1)

        def forward(self, board: Tensor, illegal: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(board)
            return self.move(hidden).masked_fill(illegal, -1e9).softmax(dim=1), self.value(hidden).squeeze(-1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        probability, value = model(batch["board"], batch["illegal"])
        taken = probability.gather(1, batch["move"][:, None]).squeeze(1)
        entropy = torch.special.entr(probability).sum(dim=1)  # guilty
        advantage = batch["reward"] - value.detach()
        return (F.mse_loss(value, batch["reward"]) - (advantage * taken.log()).mean()) - 0.01 * entropy.mean()

    illegal = torch.zeros(10, 5, dtype=torch.bool)
    samples = draw.some(10)
    for sample in samples:
        illegal[sample, 1 + draw.one(4)] = True
    batch = {
        "board": draw.normal(10, 9),
        "illegal": illegal,
        "move": torch.zeros(10, dtype=torch.long),
        "reward": draw.normal(10),
    }
    return Built(Policy(), loss, batch, samples)
