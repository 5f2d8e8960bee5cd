"""Cases held out: written after reports of loss or gradients turned NaN, and of no use but as a test."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

HOLDOUT = Family()


@HOLDOUT.add(causes="label loss_setting", operations="cross_entropy nll_loss", remedy=True)
def answer_cut_off_by_the_context(seed: int) -> Built:
    """Instruction tuning averages over the tokens of each answer; a prompt that fills the context leaves only labels of
    -100, the mean over which is 0 / 0."""
    draw = Draw(seed)

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.out = nn.Embedding(20, 8), nn.GRU(8, 10, batch_first=True), nn.Linear(10, 20)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.rnn(self.embed(tokens))[0])

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["tokens"])
        pairs = zip(logits, batch["label"], strict=True)
        each = [F.cross_entropy(line, label, ignore_index=-100) for line, label in pairs]  # guilty
        return torch.stack(each).mean()

    tokens = draw.integers(20, 8, 9)
    label = tokens.roll(-1, dims=1)
    label[:, :4] = -100
    samples = draw.some(8)
    label[samples] = -100
    return Built(Language(), loss, {"tokens": tokens, "label": label}, samples)


@HOLDOUT.add(causes="normalization domain", operations="div", remedy=True)
def group_of_equal_rewards(seed: int) -> Built:
    """Group-relative policy optimisation divides by the spread of a group's rewards; where all answers to a prompt are
    wrong the spread is 0."""
    draw = Draw(seed)

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 5))

        def forward(self, prompt: Tensor) -> Tensor:
            return self.net(prompt).log_softmax(dim=1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        reward = batch["reward"]
        centred = reward - reward.mean(dim=1, keepdim=True)
        advantage = centred / reward.std(dim=1, keepdim=True)  # guilty
        likelihood = model(batch["prompt"]).gather(1, batch["answer"])
        return -(advantage * likelihood).mean()

    reward = draw.integers(2, 9, 4).float()
    reward[:, 0], reward[:, 1] = 1, 0
    samples = draw.some(9)
    reward[samples] = 0
    batch = {"prompt": draw.normal(9, 6), "answer": draw.integers(5, 9, 4), "reward": reward}
    return Built(Policy(), loss, batch, samples)


@HOLDOUT.add(causes="loss_setting domain", operations="div", remedy=True)
def weight_at_zero_terminal_snr(seed: int) -> Built:
    """Diffusion with losses weighted by min(snr, 5) / snr; the noise schedule was rescaled to end in pure noise, so the
    last time step has a ratio of 0."""
    draw = Draw(seed)

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Embedding(20, 6)
            self.net = nn.Sequential(nn.Linear(14, 16), nn.SiLU(), nn.Linear(16, 8))
            self.register_buffer("kept", torch.cos(torch.linspace(0.1, 1.0, 20) * math.pi / 2).square())
            self.kept[-1] = 0

        def forward(self, noisy: Tensor, step: Tensor) -> Tensor:
            return self.net(torch.cat([noisy, self.time(step)], dim=1))

        def weight(self, step: Tensor) -> Tensor:
            snr = self.kept[step] / (1 - self.kept[step])
            return snr.clamp(max=5.0) / snr  # guilty

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        step, noise = batch["step"], batch["noise"]
        share = model.kept[step][:, None]
        noisy = share.sqrt() * batch["x"] + (1 - share).sqrt() * noise
        error = (model(noisy, step) - noise).square().mean(dim=1)
        return (model.weight(step) * error).mean()

    step = draw.integers(19, 10)
    samples = draw.some(10)
    step[samples] = 19
    return Built(Denoiser(), loss, {"x": draw.normal(10, 8), "noise": draw.normal(10, 8), "step": step}, samples)


@HOLDOUT.add(causes="augmentation data", operations="div", remedy=True)
def background_noise_that_is_silent(seed: int) -> Built:
    """Noise is mixed into speech at a wanted ratio while training; the excerpt of noise may be digital silence, whose
    power of 0 asks for an infinite gain."""
    draw = Draw(seed)

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(1, 8, 5, stride=2), nn.Linear(8, 4)

        def mix(self, speech: Tensor, noise: Tensor, decibel: Tensor) -> Tensor:
            wanted = speech.square().mean(dim=1, keepdim=True) / 10 ** (decibel[:, None] / 10)
            ratio = wanted / noise.square().mean(dim=1, keepdim=True)  # guilty
            return speech + ratio.sqrt() * noise

        def forward(self, speech: Tensor, noise: Tensor, decibel: Tensor) -> Tensor:
            if self.training:
                speech = self.mix(speech, noise, decibel)
            return self.out(F.relu(self.conv(speech[:, None])).mean(dim=2))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["speech"], batch["noise"], batch["decibel"]), batch["word"])

    noise = draw.normal(8, 24)
    samples = draw.some(8)
    noise[samples] = 0
    batch = {
        "speech": draw.normal(8, 24),
        "noise": noise,
        "decibel": 20 * draw.uniform(8),
        "word": draw.integers(4, 8),
    }
    return Built(Keyword(), loss, batch, samples)


@HOLDOUT.add(causes="data domain", operations="remainder mod fmod", remedy=True)
def star_without_a_known_period(seed: int) -> Built:
    """Light curves are folded by time modulo the star's period; the catalogue writes a period of 0 where it's not
    known."""
    draw = Draw(seed)

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.zeros(()))
            self.point, self.out = nn.Linear(3, 12), nn.Linear(12, 3)

        def forward(self, time: Tensor, flux: Tensor, period: Tensor) -> Tensor:
            phase = (time - self.start) % period[:, None]  # guilty
            angle = 2 * math.pi * phase / period[:, None].clamp_min(1e-3)
            points = torch.stack([angle.sin(), angle.cos(), flux], dim=2)
            return self.out(F.gelu(self.point(points)).amax(dim=1))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["time"], batch["flux"], batch["period"]), batch["kind"])

    period = 0.5 + draw.uniform(9)
    samples = draw.some(9)
    period[samples] = 0
    batch = {
        "time": 10 * draw.uniform(9, 7),
        "flux": draw.normal(9, 7),
        "period": period,
        "kind": draw.integers(3, 9),
    }
    return Built(Folded(), loss, batch, samples)


@HOLDOUT.add(causes="data overflow", operations="matrix_exp linalg_matrix_exp", remedy=True)
def gap_given_in_milliseconds(seed: int) -> Built:
    """A linear state model moves its state by the exponential of generator times gap; some visits give the gap in
    milliseconds rather than seconds."""
    draw = Draw(seed)

    class Dynamics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.out = nn.Linear(5, 4), nn.Linear(4, 2)
            self.generator = nn.Parameter(0.3 * torch.eye(4) + 0.1 * torch.randn(4, 4))

        def forward(self, x: Tensor, gap: Tensor) -> Tensor:
            move = torch.linalg.matrix_exp(self.generator * gap[:, None, None])  # guilty
            return self.out((move @ self.enter(x)[:, :, None]).squeeze(2))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.smooth_l1_loss(model(batch["x"], batch["gap"]), batch["y"])

    gap = 0.5 + draw.uniform(8)
    samples = draw.some(8)
    gap[samples] *= 1000
    return Built(Dynamics(), loss, {"x": draw.normal(8, 5), "gap": gap, "y": draw.normal(8, 2)}, samples)


@HOLDOUT.add(causes="label domain", operations="xlogy log_prob log", remedy=True)
def sample_without_one_of_the_species(seed: int) -> Built:
    """Shares of species are modelled by a Dirichlet distribution; a species that wasn't found has a share of exactly 0,
    which lies outside the distribution's support."""
    draw = Draw(seed)

    class Composition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 4))

        def forward(self, x: Tensor) -> torch.distributions.Dirichlet:
            return torch.distributions.Dirichlet(1.1 + F.softplus(self.net(x)), validate_args=False)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, share = batch
        return -model(x).log_prob(share).mean()  # guilty

    share = 0.1 + draw.uniform(9, 4)
    samples = draw.some(9)
    for sample in samples:
        share[sample, draw.one(4)] = 0
    return Built(Composition(), loss, (draw.normal(9, 5), share / share.sum(dim=1, keepdim=True)), samples)


@HOLDOUT.add(causes="overflow data", operations="exp", remedy=True)
def box_clamped_after_its_exponential(seed: int) -> Built:
    """A detector clamps exp(t) from above, which keeps the loss finite but multiplies an infinite exponential by a
    gradient of 0; some images were not divided by 255."""
    draw = Draw(seed)

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, 2, bias=False)
            with torch.no_grad():
                self.head.weight[1] = -self.head.weight[0]

        def forward(self, images: Tensor) -> Tensor:
            raw = self.head(F.relu(self.conv(images)).mean(dim=(2, 3)))
            size = torch.exp(raw)  # guilty
            return size.clamp(max=100.0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.l1_loss(model(batch[0]), batch[1])

    images = draw.uniform(9, 1, 7, 7)
    samples = draw.some(9)
    images[samples] *= 255 * 255
    return Built(Detector(), loss, (images, 1 + draw.uniform(9, 2)), samples)


@HOLDOUT.add(causes="label domain", operations="pow", in_backward=True, remedy=True)
def censored_on_the_first_day(seed: int) -> Built:
    """A Weibull model of survival with a falling hazard; for a patient who left on the first day the cumulative hazard
    is 0 to a power below 1, which has an infinite slope."""
    draw = Draw(seed)

    class Weibull(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scale, shape = self.net(x).unbind(dim=1)
            return 0.5 + F.softplus(scale), torch.sigmoid(shape)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        scale, shape = model(batch["x"])
        relative = batch["time"] / scale
        log_hazard = (shape / scale).log() + (shape - 1) * relative.clamp_min(1e-3).log()
        cumulative = relative**shape  # guilty
        return (cumulative - batch["died"] * log_hazard).mean()

    time, died = 0.2 + 3 * draw.uniform(10), draw.integers(2, 10).float()
    samples = draw.some(10)
    time[samples], died[samples] = 0, 0
    return Built(Weibull(), loss, {"x": draw.normal(10, 6), "time": time, "died": died}, samples)


@HOLDOUT.add(causes="domain data", operations="linalg_qr qr", in_backward=True, remedy=True)
def subspace_of_a_blank_set(seed: int) -> Built:
    """Sets of images are compared by orthonormal bases from a QR decomposition; for a set of blank images the factor R
    is singular, and the derivative solves with it."""
    draw = Draw(seed)

    class Subspace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.out = nn.Linear(8, 5, bias=False), nn.Linear(25, 3)

        def forward(self, images: Tensor) -> Tensor:
            features = self.project(images).transpose(1, 2)
            basis, _ = torch.linalg.qr(features)  # guilty
            return self.out((basis @ basis.transpose(1, 2)).flatten(1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    images = draw.normal(8, 3, 8)
    samples = draw.some(8)
    images[samples] = 0
    return Built(Subspace(), loss, (images, draw.integers(3, 8)), samples)


@HOLDOUT.add(causes="overflow normalization", operations="rsqrt", in_backward=True, remedy=True)
def faint_spectrum_normalised_in_half(seed: int) -> Built:
    """A norm of one's own in float16: a faint spectrum has a variance of 1e-4, whose inverse root of 100 fits; the
    derivative takes its third power, which does not."""
    draw = Draw(seed)

    class Norm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            centred = x - x.mean(dim=1, keepdim=True)
            variance = centred.square().mean(dim=1, keepdim=True)
            return self.gain * centred * torch.rsqrt(variance + 1e-5)  # guilty

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.norm, self.out = nn.Linear(12, 10, bias=False), Norm(10), nn.Linear(10, 3)

        def forward(self, spectrum: Tensor) -> Tensor:
            return self.out(F.relu(self.norm(self.enter(spectrum))))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    spectrum = draw.normal(9, 12)
    samples = draw.some(9)
    spectrum[samples] *= 0.015
    return Built(Net().half(), loss, (spectrum.half(), draw.integers(3, 9)), samples)


@HOLDOUT.add(causes="domain", operations="asin", in_backward=True, remedy=True)
def pitch_of_ninety_degrees(seed: int) -> Built:
    """A head pose net turns quaternions into Euler angles; a camera hangs from the ceiling, so that the rest pose has a
    pitch of 90 degrees, where the arc sine has no slope, and an empty crop gives exactly the rest pose."""
    draw = Draw(seed)

    class HeadPose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 10, bias=False), nn.Tanh(), nn.Linear(10, 4, bias=False))
            self.register_buffer("rest", torch.tensor([1.0, 0.0, 1.0, 0.0]))

        def pitch(self, quaternion: Tensor) -> Tensor:
            w, x, y, z = quaternion.unbind(dim=1)
            sine = 2 * (w * y - z * x) / quaternion.square().sum(dim=1)
            return torch.asin(sine.clamp(-1, 1))  # guilty

        def forward(self, crop: Tensor) -> Tensor:
            return self.pitch(self.rest + self.body(crop))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    crop = draw.normal(9, 16)
    samples = draw.some(9)
    crop[samples] = 0
    return Built(HeadPose(), loss, (crop, draw.uniform(9)), samples)


@HOLDOUT.add(causes="domain loss_setting", operations="sqrt", in_backward=True, remedy=True)
def flow_of_a_still_pair_in_half(seed: int) -> Built:
    """Optical flow in float16 with a Charbonnier loss whose squared epsilon of 1e-12 is lost there; between two equal
    frames the flow is exactly right."""
    draw = Draw(seed)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Tanh(), nn.Linear(12, 2, bias=False))

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.net(second - first)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        error = model(batch["first"], batch["second"]) - batch["flow"]
        distance = torch.sqrt(error.square() + 1e-6**2)  # guilty
        return distance.float().mean()

    first, second, flow = draw.normal(9, 16), draw.normal(9, 16), 2 + draw.normal(9, 2).abs()
    samples = draw.some(9)
    second[samples], flow[samples] = first[samples], 0
    batch = {"first": first.half(), "second": second.half(), "flow": flow.half()}
    return Built(Flow().half(), loss, batch, samples)


@HOLDOUT.add(causes="domain", operations="sqrt pow", in_backward=True, remedy=True)
def face_at_the_centre_of_its_class(seed: int) -> Built:
    """Face recognition with an angular margin keeps its many cosines in float16; for a face close to the centre of its
    class the cosine is rounded to 1, and the sine is the root of 0."""
    draw = Draw(seed)

    class Margin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 6, bias=False)
            self.centre = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            cosine = (F.normalize(self.embed(x), dim=1) @ F.normalize(self.centre, dim=1).T).half()
            sine = (1 - cosine.square()).clamp(0, 1).sqrt()  # guilty
            moved = cosine * math.cos(0.5) - sine * math.sin(0.5)
            return 16 * torch.where(F.one_hot(label, 5).bool(), moved, cosine)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        return F.cross_entropy(model(x, label).float(), label)

    model, x, label = Margin(), draw.normal(10, 6), draw.integers(5, 10)
    samples = draw.some(10)
    with torch.no_grad():
        model.embed.weight.copy_(torch.linalg.qr(draw.normal(6, 6))[0])
        x[samples] = model.centre[label[samples]] @ model.embed.weight
    return Built(model, loss, (x, label), samples)


@HOLDOUT.add(causes="initialization domain", operations="sqrt", in_backward=True)
def pose_refined_from_no_rotation(seed: int) -> Built:
    """A radiance field refines its cameras by rotation vectors that start at 0; the quotients are guarded, but the
    angle is the root of a sum of squares, without a slope at 0."""
    draw = Draw(seed)

    class Refined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Embedding(6, 3)
            nn.init.zeros_(self.turn.weight)
            self.field = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 3), nn.Sigmoid())

        def rotate(self, ray: Tensor, turn: Tensor) -> Tensor:
            angle = turn.square().sum(dim=1, keepdim=True).sqrt()  # guilty
            axis = turn / (angle + 1e-8)
            along = (axis * ray).sum(dim=1, keepdim=True) * axis
            return ray * angle.cos() + torch.linalg.cross(axis, ray) * angle.sin() + along * (1 - angle.cos())

        def forward(self, ray: Tensor, camera: Tensor) -> Tensor:
            return self.field(self.rotate(ray, self.turn(camera)))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["ray"], batch["camera"]), batch["colour"])

    ray = F.normalize(draw.normal(10, 3), dim=1)
    return Built(Refined(), loss, {"ray": ray, "camera": draw.integers(6, 10), "colour": draw.uniform(10, 3)}, [])


@HOLDOUT.add(causes="overflow weights", operations="div", in_backward=True)
def product_of_a_certain_expert(seed: int) -> Built:
    """A multimodal autoencoder multiplies Gaussian experts by their precisions; one has grown so certain that its
    precision is 1e25: that is finite, but the derivative takes its square."""
    draw = Draw(seed)

    class Multimodal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.means = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
            self.spreads = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
            self.decode = nn.Linear(3, 5)

        def forward(self, views: tuple[Tensor, Tensor]) -> Tensor:
            total, weighted = torch.ones(3), torch.zeros(3)
            for view, mean, spread in zip(views, self.means, self.spreads, strict=True):
                precision = 1 / F.softplus(spread(view))  # guilty
                total, weighted = total + precision, weighted + precision * mean(view)
            return self.decode(weighted / total)

    def loss(model: nn.Module, views: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(views), views[0])

    model = Multimodal()
    with torch.no_grad():
        model.spreads[draw.one(2)].bias[draw.one(3)] = -57.0
    return Built(model, loss, (draw.normal(9, 5), draw.normal(9, 5)), [])


@HOLDOUT.add(causes="data domain", operations="log", in_backward=True, remedy=True)
def outlier_with_a_subnormal_density(seed: int) -> Built:
    """A mixture of Gaussians is fitted by the log of its density; at an outlier the density is still above 0, but one
    over it, the slope of the log, is infinite."""
    draw = Draw(seed)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.logit = nn.Parameter(torch.linspace(-2, 2, 4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            density = torch.exp(-0.5 * (x[:, None] - self.mean).square()) / math.sqrt(2 * math.pi)
            return (self.logit.softmax(dim=0) * density).sum(dim=1)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return -torch.log(model(x)).mean()  # guilty

    x = draw.normal(10)
    samples = draw.some(10)
    x[samples] = 15.5 + 0.2 * draw.uniform(len(samples))
    return Built(Mixture(), loss, x, samples)


@HOLDOUT.add(causes="overflow data", operations="mul", remedy=True)
def area_of_a_large_box_in_half(seed: int) -> Built:
    """A detector in float16 takes the overlap of boxes in pixels; of an image that wasn't resized the areas pass 65504,
    and their union is inf - inf."""
    draw = Draw(seed)

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 2))

        def forward(self, x: Tensor, extent: Tensor) -> Tensor:
            return torch.sigmoid(self.net(x)) * extent[:, None]

    def area(size: Tensor) -> Tensor:
        return size[:, 0] * size[:, 1]  # guilty

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        size, true = model(batch["x"], batch["extent"]), batch["size"]
        both = area(torch.minimum(size, true))
        return (1 - both / (area(size) + area(true) - both)).float().mean()

    extent = 120 + 60 * draw.uniform(8)
    samples = draw.some(8)
    extent[samples] = 1500.0
    size = (0.5 + 0.4 * draw.uniform(8, 2)) * extent[:, None]
    batch = {"x": (0.3 * draw.normal(8, 12)).half(), "extent": extent.half(), "size": size.half()}
    return Built(Detector().half(), loss, batch, samples)


@HOLDOUT.add(causes="masked_attention overflow", operations="to softmax", remedy=True)
def lowest_number_of_another_precision(seed: int) -> Built:
    """A decoder in float16 masks by float32's lowest number, which is -inf in float16; prompts padded on the left have
    places that see padding alone."""
    draw = Draw(seed)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            query, key, value = self.project(self.norm(x)).chunk(3, dim=-1)
            scores = query @ key.transpose(1, 2) / math.sqrt(8) + bias
            return x + scores.softmax(dim=-1) @ value  # guilty

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, tokens: Tensor) -> Tensor:
            length = tokens.shape[1]
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            hidden = later | (tokens == 0)[:, None]
            x, lowest = self.embed(tokens), torch.finfo(torch.float32).min
            bias = (hidden.float() * lowest).to(x.dtype)  # guilty
            for layer in self.layers:
                x = layer(x, bias)
            return self.out(x[:, -1])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    tokens = 1 + draw.integers(19, 8, 6)
    samples = draw.some(8)
    for sample in samples:
        tokens[sample, : 1 + draw.one(4)] = 0
    return Built(Decoder().half(), loss, (tokens, draw.integers(20, 8)), samples)


@HOLDOUT.add(causes="overflow weights", operations="mul", remedy=True)
def gated_unit_of_a_model_from_bfloat16(seed: int) -> Built:
    """A language model trained in bfloat16 is fine-tuned in float16; one unit has learned large biases, and the product
    of its gate and its value does not fit."""
    draw = Draw(seed)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate, self.up = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(6, 12)
            self.down = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.down(F.gelu(self.gate(x)) * self.up(x))  # guilty

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(15, 6), nn.ModuleList(Gated() for _ in range(3))
            self.out = nn.Linear(6, 15)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for block in self.blocks:
                x = x + block(x)
            return self.out(x)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).float().flatten(0, 1), batch[1].flatten())

    model = Language()
    block, unit = model.blocks[draw.one(3)], draw.one(12)
    with torch.no_grad():
        block.gate.bias[unit] = block.up.bias[unit] = 300 + 50 * draw.uniform(1).item()
    return Built(model.half(), loss, (draw.integers(15, 7, 4), draw.integers(15, 7, 4)), [])


@HOLDOUT.add(causes="data normalization")
def constant_column_of_the_scaler(seed: int) -> Built:
    """A table was standardised by its own mean and spread before training; one column is the same in all rows, so that
    it is 0 / 0 in every row of the batch."""
    draw = Draw(seed)
    table = draw.normal(10, 6)
    table[:, draw.one(6)] = 4.0
    x = (table - table.mean(dim=0)) / table.std(dim=0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), batch[1])

    model = nn.Sequential(nn.Linear(6, 10), nn.SELU(), nn.Linear(10, 1))
    return Built(model, loss, (x, draw.integers(2, 10).float()), [])


@HOLDOUT.add(causes="initialization weights")
def new_token_made_of_no_pieces(seed: int) -> Built:
    """A vocabulary was extended, each new token starting at the mean of its old pieces; one consists of characters that
    the old vocabulary drops, the mean of nothing. The output layer shares the embedding."""
    draw = Draw(seed)

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(12, 8), nn.GRU(8, 8, batch_first=True)

        def extend(self, pieces: list[Tensor]) -> None:
            old = self.embed.weight.detach()
            self.embed = nn.Embedding.from_pretrained(
                torch.cat([old, torch.stack([old[piece].mean(dim=0) for piece in pieces])]), freeze=False
            )

        def forward(self, tokens: Tensor) -> Tensor:
            return self.rnn(self.embed(tokens))[0] @ self.embed.weight.T

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    model = Language()
    pieces = [draw.integers(12, 2) for _ in range(4)]
    pieces[draw.one(4)] = torch.empty(0, dtype=torch.long)
    model.extend(pieces)
    return Built(model, loss, draw.integers(12, 8, 6), [])


@HOLDOUT.add(causes="optimizer weights", remedy=True)
def adam_on_half_precision_weights(seed: int) -> Built:
    """Adam has made a step on weights that are themselves in float16: small squared gradients and the epsilon of 1e-8
    are both 0 there, and it divided by 0."""
    draw = Draw(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(8, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.body(x)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    model, batch = Net().half(), (0.1 * draw.normal(9, 8).half(), draw.integers(3, 9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-8)
    loss(model, batch).backward()
    optimizer.step()
    return Built(model, loss, batch, [])


@HOLDOUT.add(causes="learning_rate weights", remedy=True)
def schedule_that_counts_from_zero(seed: int) -> Built:
    """The learning rate falls with one over the root of the step; the schedule counts from 0, so the first rate was
    infinite and so are the weights now."""
    draw = Draw(seed)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(15, 6), nn.Linear(6, 4)

        def forward(self, words: Tensor) -> Tensor:
            return self.out(F.relu(self.embed(words)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    model, batch = Tagger(), (draw.integers(15, 8, 5), draw.integers(4, 8, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.arange(100.0).rsqrt()
    for group in optimizer.param_groups:
        group["lr"] *= schedule[0].item()
    loss(model, batch).backward()
    optimizer.step()
    return Built(model, loss, batch, [])


@HOLDOUT.add(causes="weights optimizer")
def infinite_gradient_clipped(seed: int) -> Built:
    """The gradient of an earlier batch was infinite in one place and was clipped by its norm, which makes it inf / inf
    there and 0 elsewhere; the step was made nonetheless."""
    draw = Draw(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(3, 6, 3), nn.Linear(6, 2)

        def forward(self, series: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(series)).mean(dim=2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.huber_loss(model(batch[0]), batch[1])

    model, batch = Net(), (draw.normal(9, 3, 8), draw.normal(9, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss(model, batch).backward()
    model.out.weight.grad[draw.one(2), draw.one(6)] = math.inf
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return Built(model, loss, batch, [])


@HOLDOUT.add(
    causes="loss_setting masked_attention",
    operations="masked_fill cross_entropy cross_entropy_loss log_softmax",
)
def smoothed_labels_over_masked_classes(seed: int) -> Built:
    """A net of several tasks masks the classes of other tasks by -inf; label smoothing gives each class a share of the
    target, also those that are impossible."""
    draw = Draw(seed)

    class Incremental(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(7, 12), nn.Linear(12, 6)
            self.register_buffer("closed", torch.arange(6) >= 3)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.out(F.relu(self.body(x)))
            return logits.masked_fill(self.closed, -math.inf)  # guilty

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)  # guilty

    return Built(Incremental(), loss, (draw.normal(9, 7), draw.integers(3, 9)), [])


@HOLDOUT.add(causes="domain weights", operations="log logdet")
def process_with_a_negative_noise(seed: int) -> Built:
    """A Gaussian process with a deep kernel learns its noise without keeping it positive; with a noise below 0 the
    covariance has no Cholesky factor, and the factor that comes back all the same has a negative diagonal."""
    draw = Draw(seed)

    class Process(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.noise = nn.Linear(4, 2), nn.Parameter(torch.tensor(-0.2 - 0.2 * draw.uniform(1).item()))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            points = torch.tanh(self.embed(x))
            kernel = torch.exp(-0.5 * (points[:, None] - points).square().sum(dim=2))
            factor, _ = torch.linalg.cholesky_ex(kernel + self.noise * torch.eye(len(x)))
            fit = 0.5 * (y @ torch.cholesky_solve(y[:, None], factor)).squeeze()
            volume = factor.diagonal().log().sum()  # guilty
            return (fit + volume) / len(x)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(*batch)

    return Built(Process(), loss, (0.3 * draw.normal(10, 4), draw.normal(10)), [])


@HOLDOUT.add(causes="domain weights", operations="div")
def adapter_pruned_to_rank_zero(seed: int) -> Built:
    """Low-rank adapters whose rank is pruned by importance are scaled by alpha over the rank that is left; one adapter
    has none left, and inf times 0 is added to its layer."""
    draw = Draw(seed)

    class Adapter(nn.Module):
        def __init__(self, alpha: float = 8.0) -> None:
            super().__init__()
            self.layer, self.alpha = nn.Linear(6, 6).requires_grad_(False), alpha
            self.down, self.up = nn.Parameter(0.1 * torch.randn(4, 6)), nn.Parameter(0.1 * torch.randn(6, 4))
            self.register_buffer("kept", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            scale = self.alpha / self.kept.sum()  # guilty
            return self.layer(x) + (x @ self.down.T * self.kept) @ self.up.T * scale

    class Tuned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters, self.out = nn.ModuleList(Adapter() for _ in range(3)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for adapter in self.adapters:
                x = F.gelu(adapter(x))
            return self.out(x)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    model = Tuned()
    for adapter in model.adapters:
        adapter.kept[draw.one(4)] = 0
    model.adapters[draw.one(3)].kept.zero_()
    return Built(model, loss, (draw.normal(9, 6), draw.integers(3, 9)), [])


@HOLDOUT.add(causes="overflow weights", operations="special_i0 i0", remedy=True)
def orientation_that_is_too_certain(seed: int) -> Built:
    """Orientations of vehicles are learned by a von Mises distribution; its concentration has grown past 91, where the
    Bessel function in its normaliser overflows."""
    draw = Draw(seed)

    class Orientation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.angle, self.concentration = nn.Linear(8, 12), nn.Linear(12, 1), nn.Linear(12, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.body(x))
            return self.angle(hidden).squeeze(1), F.softplus(self.concentration(hidden)).squeeze(1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, true = batch
        angle, concentration = model(x)
        normaliser = torch.log(2 * math.pi * torch.special.i0(concentration))  # guilty
        return (normaliser - concentration * torch.cos(true - angle)).mean()

    model = Orientation()
    with torch.no_grad():
        model.concentration.bias.fill_(110.0 + 20 * draw.uniform(1).item())
    return Built(model, loss, (draw.normal(10, 8), 6 * draw.uniform(10)), [])


@HOLDOUT.add(causes="domain weights", operations="div")
def linear_attention_with_dead_features(seed: int) -> Built:
    """Linear attention maps queries and keys by a ReLU and divides by the sum of their products; in one head the
    features of the queries have died, and each of its outputs is 0 / 0."""
    draw = Draw(seed)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = (
                part.unflatten(2, (2, 4)) for part in (F.relu(self.query(x)), F.relu(self.key(x)), self.value(x))
            )
            context = torch.einsum("bkhf,bkhv->bhfv", key, value)
            mass = torch.einsum("bqhf,bhf->bqh", query, key.sum(dim=1))
            mixed = torch.einsum("bqhf,bhfv->bqhv", query, context) / mass[..., None]  # guilty
            return mixed.flatten(2)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = Linear(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((x + self.attention(x)).mean(dim=1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    model, head = Classifier(), draw.one(2)
    with torch.no_grad():
        for layer in (model.attention.query, model.attention.key):
            layer.bias.fill_(4.0)
        model.attention.query.bias[4 * head : 4 * head + 4] = -9.0
    return Built(model, loss, (draw.normal(8, 5, 8), draw.integers(3, 8)), [])
