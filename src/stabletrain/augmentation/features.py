"""Augmentations of numbers in tables and time series: noise, jitter, features left out."""

from __future__ import annotations

from typing import Any

import torch

from stabletrain.checks import number
from stabletrain.errors import ConfigurationError
from stabletrain.tree import map_tensors


class Unchanged:
    """The data as it is.

    Example:
        >>> Unchanged()(("inputs", "targets"))
        ('inputs', 'targets')
    """

    def __call__(self, data: Any) -> Any:
        """Return what was given."""
        return data


class Noise:
    """Add normal noise to the inputs.

    Args:
        std: standard deviation of the noise, in the unit of the inputs; 0 or more.

    Raises:
        ConfigurationError: for a negative or non-finite `std`.

    Example:
        >>> inputs, targets = Noise(0.1)((torch.zeros(2, 3), torch.tensor([0, 1])))
        >>> inputs.shape, bool((inputs != 0).all()), targets
        (torch.Size([2, 3]), True, tensor([0, 1]))
    """

    def __init__(self, std: float) -> None:
        self.std = number("std of the noise", std)

    def __call__(self, data: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return the data with noise on each floating tensor of the inputs (others are left as they are).

        Args:
            data: the pair (inputs, targets).
        """
        inputs, targets = data
        return map_tensors(self._disturbed, inputs), targets

    def _disturbed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.std * torch.randn_like(tensor) if tensor.is_floating_point() else tensor


class Jitter:
    """Time series that are louder or softer, moved, and silent for a while.

    Each sample has, for each feature, a factor from the normal distribution around 1 and an offset from that around 0,
    and a span of time in which all features are 0. The span's length is uniform from 0 to `mask` of the sample's own
    length, in whole steps, and its place uniform.

    Args:
        scale: standard deviation of the factor; 0 or more.
        shift: standard deviation of the offset, in the unit of the inputs; 0 or more.
        mask: largest share of the time steps that are set to 0, from 0 to 1.

    Raises:
        ConfigurationError: for a number outside its range.

    References:
        T. Um et al.: Data Augmentation of Wearable Sensor Data, 2017 (scale); D. Park et al.: SpecAugment, 2019 (mask).

    Example:
        >>> inputs, _ = Jitter(scale=0.1, shift=0.1, mask=0.5)(([torch.ones(4, 2), torch.ones(7, 2)], None))
        >>> [tuple(sequence.shape) for sequence in inputs]
        [(4, 2), (7, 2)]
    """

    def __init__(self, scale: float = 0.1, shift: float = 0.1, mask: float = 0.1) -> None:
        self.scale = number("scale of the jitter", scale)
        self.shift = number("shift of the jitter", shift)
        self.mask = number("mask of the jitter", mask, most=1.0)

    def __call__(self, data: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return the data with changed inputs.

        Args:
            data: the pair (inputs, targets); inputs of a floating type [B, T, F], or a list of B sequences [length, F].

        Raises:
            ConfigurationError: for inputs of another kind.
        """
        inputs, targets = data
        series = Rows.of(inputs, "jitter")
        features = series.values.shape[1]
        normal = torch.randn(2, series.samples, features, device=series.values.device, dtype=series.values.dtype)
        factor, offset = 1 + self.scale * normal[0], self.shift * normal[1]
        lengths = series.lengths.to(torch.float32)
        share, place = torch.rand(2, series.samples, device=lengths.device)
        # Whole numbers from 0 to the largest, each as likely; a share just below 1 may round up to one more.
        longest = (self.mask * lengths).floor()
        span = torch.minimum((share * (longest + 1)).floor(), longest)
        start = torch.minimum((place * (lengths - span + 1)).floor(), lengths - span)
        since = series.times - start[series.owner]
        silent = (since >= 0) & (since < span[series.owner])
        changed = series.values * factor[series.owner] + offset[series.owner]
        return series.back(changed.masked_fill(silent[:, None], 0.0)), targets


class FeatureDropout:
    """Leave out features of a sample: each is 0 with the same probability, at all of the sample's time steps.

    In standardised data 0 is the mean, so that a feature left out says nothing. What stays is not scaled up: an input
    is a measurement, not one of many summands.

    Args:
        share: probability that a feature is left out, from 0 to below 1.

    Raises:
        ConfigurationError: for a share outside its range.

    Example:
        >>> inputs, _ = FeatureDropout(0.5)((torch.ones(3, 5), None))
        >>> sorted(set(inputs.flatten().tolist()) | {0.0, 1.0})
        [0.0, 1.0]
    """

    def __init__(self, share: float = 0.1) -> None:
        self.share = number("share of the feature dropout", share, below=1.0)

    def __call__(self, data: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return the data with some features set to 0.

        Args:
            data: the pair (inputs, targets); inputs of a floating type: tables [B, F], series [B, T, F], images [B, C,
                H, W] (whole channels), or a list of B sequences [length, F].

        Raises:
            ConfigurationError: for inputs of another kind.
        """
        inputs, targets = data
        if isinstance(inputs, torch.Tensor) and inputs.is_floating_point() and inputs.dim() in (2, 4):
            shape = inputs.shape[:2] + (1,) * (inputs.dim() - 2)
            return inputs.masked_fill(torch.rand(shape, device=inputs.device) < self.share, 0.0), targets
        series = Rows.of(inputs, "feature_dropout")
        gone = torch.rand(series.samples, series.values.shape[1], device=series.values.device) < self.share
        return series.back(series.values.masked_fill(gone[series.owner], 0.0)), targets


class Rows:
    """Time series of one length or of many, laid end to end, so that one operation reaches all of them.

    Attributes:
        values: all time steps of all samples [N, F].
        owner: the sample of each step, int64 [N].
        times: the place of each step in its sample, int64 [N].
        lengths: number of steps of each sample, int64 [B].
        samples: number of samples, B.
    """

    def __init__(self, inputs: torch.Tensor | list[torch.Tensor]) -> None:
        self.inputs = inputs
        self.samples = len(inputs)
        self.values = inputs.flatten(0, 1) if isinstance(inputs, torch.Tensor) else torch.cat(inputs)
        self._lengths = [len(sequence) for sequence in inputs]
        device = self.values.device
        self.lengths = torch.tensor(self._lengths).to(device, non_blocking=True)
        samples = torch.arange(self.samples, device=device)
        # Told the total, it needn't ask the device for it.
        self.owner = torch.repeat_interleave(samples, self.lengths, output_size=len(self.values))
        self.times = torch.arange(len(self.values), device=device) - (self.lengths.cumsum(0) - self.lengths)[self.owner]

    @classmethod
    def of(cls, inputs: Any, option: str) -> Rows:
        """Return the rows of a tensor [B, T, F] or a list of sequences [length, F].

        Raises:
            ConfigurationError: for inputs that are no time series; `option` is who asks.
        """
        tensor = isinstance(inputs, torch.Tensor) and inputs.dim() == 3 and inputs.is_floating_point()
        listed = isinstance(inputs, (list, tuple)) and len(inputs) > 0
        if tensor or (listed and all(_is_sequence(item) for item in inputs)):
            return cls(inputs if tensor else list(inputs))
        raise ConfigurationError(
            f"augmentation={option} was given {described(inputs)} as inputs; floating time series are needed, a tensor "
            "[B, T, F] or a list of sequences [length, F]. Choose augmentation=noise or augmentation=none."
        )

    def back(self, values: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Return other values of the rows in the form in which the inputs came."""
        if isinstance(self.inputs, torch.Tensor):
            return values.view_as(self.inputs)
        return list(torch.split(values, self._lengths))


def _is_sequence(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.dim() == 2 and item.is_floating_point()


def described(inputs: Any) -> str:
    """Say what inputs are, for a message.

    Example:
        >>> described(torch.zeros(2, 3)), described([1])
        ('a torch.float32 tensor [2, 3]', 'a list')
    """
    if isinstance(inputs, torch.Tensor):
        return f"a {inputs.dtype} tensor {list(inputs.shape)}"
    return f"a {type(inputs).__name__}"
