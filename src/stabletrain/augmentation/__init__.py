"""Augmentations: callables from a microbatch's data to other data of the same kind.

They draw from torch's default generators, which the trainer seeds by position, so that a step can be run again; where
the data is, with one operation for the whole microbatch.
"""

from __future__ import annotations

from stabletrain.augmentation.composition import Composition
from stabletrain.augmentation.features import FeatureDropout, Jitter, Noise, Unchanged
from stabletrain.augmentation.images import RandomCropFlip
from stabletrain.augmentation.mixing import CutMix, Mixup

__all__ = ["Composition", "CutMix", "FeatureDropout", "Jitter", "Mixup", "Noise", "RandomCropFlip", "Unchanged"]
