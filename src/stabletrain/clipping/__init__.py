"""Gradient clipping with a norm that was measured before.

The guard decides first. Clipping a gradient that holds one NaN would make all of them NaN, and one Inf would set
the healthy ones to 0.
"""

from stabletrain.clipping.adagc import AdaGC
from stabletrain.clipping.agc import AGC
from stabletrain.clipping.autoclip import AutoClip
from stabletrain.clipping.base import Clipping, ParameterClipping
from stabletrain.clipping.fixed import NoClipping, Norm, Value
from stabletrain.clipping.zclip import ZClip

__all__ = ["AGC", "AdaGC", "AutoClip", "Clipping", "NoClipping", "Norm", "ParameterClipping", "Value", "ZClip"]
