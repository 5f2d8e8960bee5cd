"""Numeric formats: of the forward and backward passes, of matrix products, of parameters; and when to change them."""

from stabletrain.precision.formats import DTYPES, Precision
from stabletrain.precision.islands import Float32Islands
from stabletrain.precision.ladder import Ladder, Plan
from stabletrain.precision.masters import in_masters_place
from stabletrain.precision.products import float32_products
from stabletrain.precision.scaler import LossScaler

__all__ = [
    "DTYPES",
    "Float32Islands",
    "Ladder",
    "LossScaler",
    "Plan",
    "Precision",
    "float32_products",
    "in_masters_place",
]
