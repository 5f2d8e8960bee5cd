"""From what was seen to a class of cause.

The rules are tried from the plainest to the vaguest, and the first that applies decides. What none of them knows is
called unknown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.doctor.diagnosis import Cause, Confidence
from stabletrain.doctor.gain import gain
from stabletrain.doctor.origin import RANDOM, SELECTIONS, Origin, Traced
from stabletrain.doctor.samples import chosen
from stabletrain.incident.statistics import named_tensors
from stabletrain.quarantine import what_is_odd

Finding = tuple[Cause, Confidence, str]

SOFTMAXES = {"softmax", "log_softmax", "logsumexp", "scaled_dot_product_attention", "sparse_softmax"}
NORMALIZATIONS = {
    *("layer_norm", "batch_norm", "group_norm", "instance_norm", "weight_norm", "rms_norm", "fused_rms_norm"),
    *("std", "var", "std_mean", "var_mean"),
}
SPREADS = {"std", "var", "std_mean", "var_mean"}
# Operations that are defined or have a derivative only on a part of the numbers.
DOMAINS = {
    *("log", "log2", "log10", "log1p", "logit", "xlogy", "sqrt", "rsqrt", "div", "reciprocal", "acos", "asin", "acosh"),
    *("atanh", "atan2", "erfinv", "lgamma", "digamma", "special_xlogy", "special_entr", "special_ndtri", "norm"),
    *("cdist", "cdist_forward", "euclidean_dist", "remainder", "fmod", "float_power", "linalg_svd", "linalg_eigh"),
    *("linalg_inv", "linalg_cholesky", "linalg_eig", "linalg_qr", "linalg_pinv", "linalg_slogdet", "linalg_solve"),
    *("pow", "floor_divide", "igamma", "polygamma", "pdist_forward", "cosine_similarity", "dist", "linalg_inv_ex"),
    *("linalg_cholesky_ex", "linalg_solve_ex", "linalg_det", "logdet", "log_normal"),
}
SINGULAR_AT_ZERO = {"log", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "div", "norm"}
EXPONENTIALS = {"exp", "exp2", "expm1", "cosh", "sinh", "softplus", "linalg_matrix_exp"}
LOSSES = {"nll_loss", "ctc_loss", "binary_cross_entropy", "kl_div", "cross_entropy", "nll_loss_nd", "multi_margin_loss"}
TOO_STRONG = 8.0  # gain of a weight that explodes in a few layers
ENORMOUS_GAIN, ENORMOUS_VALUE = 1e3, 1e6  # beyond what anybody initialises a weight with
_LABEL_NAMES = re.compile(r"(^|[._])(y|label|labels|target|targets|truth|answer|answers)([._]|$)", re.IGNORECASE)
_TEMPERATURE = re.compile(r"temp|tau\b|logit_scale|inv_scale|_t\b", re.IGNORECASE)


@dataclass
class Facts:
    """What is known about a step that went bad.

    Args:
        traced: what the trace showed.
        batch: the data.
        count: number of its samples.
        samples: those to blame, as positions in the batch.
        modules: all that took part, with the state before the step.
        updates: how many there were before; None: not known.
    """

    traced: Traced
    batch: Any
    count: int
    samples: Sequence[int]
    modules: Sequence[nn.Module]
    updates: int | None = None

    @property
    def odd(self) -> tuple[str, ...]:
        """What is odd about each sample, in words."""
        return tuple(what_is_odd(chosen(self.batch, self.count, [sample])) for sample in self.samples)


def classify(facts: Facts) -> tuple[Cause, Confidence, tuple[str, ...]]:
    """Return the class of the cause, how sure it is, and what speaks for it."""
    if not facts.traced.origins:
        return "unknown", "low", ("the values could not be followed to where they began",)
    origin = facts.traced.origins[0]
    for rule in RULES:
        found = rule(origin, facts)
        if found is not None:
            cause, confidence, why = found
            return cause, confidence, tuple(line for line in (why, *_description(origin)) if line)
    return "unknown", "low", tuple(_description(origin))


def _from_outside(origin: Origin, facts: Facts) -> Finding | None:
    output = origin.output
    bad = f"{output.get('nan', 0)} NaN and {output.get('inf', 0)} Inf"
    if origin.kind == "batch":
        cause: Cause = "label" if _is_label(origin.name, facts.batch) else "data"
        return cause, "high", f"the batch's tensor {origin.name or '(itself)'} holds {bad}"
    if origin.kind in ("parameter", "buffer"):
        if facts.updates == 0:
            return "initialization", "high", f"{origin.kind} {origin.name} held {bad} before the first update"
        if origin.kind == "parameter" and _looks_uninitialised(origin.name, facts.modules):
            return "initialization", "medium", f"parameter {origin.name} looks like memory that nobody wrote to"
        return "weights", "high", f"{origin.kind} {origin.name} held {bad} before the step"
    if origin.kind == "uninitialised":
        return "initialization", "high", f"memory that nobody wrote to is read: {bad}"
    if origin.kind == "constant":
        code = origin.code
        if re.search(r"weight|temp|alpha|gamma|tau|scale|loss", code, re.IGNORECASE):
            return "loss_setting", "medium", f"a constant holds {bad}"
        return "unknown", "low", f"a constant holds {bad}"
    return None


def _masked(origin: Origin, facts: Facts) -> Finding | None:
    tensors = _tensors(origin)
    mask = re.search(r"mask|attn|attention|score|adj|pad", origin.code, re.IGNORECASE)
    if origin.name in SOFTMAXES and not origin.in_backward:
        if any(item["inf"] > 0 and item["nan"] == 0 for item in tensors) or origin.name.startswith("scaled_dot"):
            return "masked_attention", "high", "a row of the softmax has no entry left: all are -inf"
        return None
    if origin.written and mask is not None:
        return "masked_attention", "medium", "an infinity that stands for a mask reached the loss"
    if origin.name in ("mul", "add", "sub") and any(item["inf"] > 0 for item in tensors) and mask is not None:
        return "masked_attention", "medium", "an infinity that stands for a mask became NaN (0 x inf, or inf - inf)"
    return None


def _augmentation(origin: Origin, facts: Facts) -> Finding | None:
    roots = frozenset(root for one in origin.roots for root in one)
    kinds = {root.partition(" ")[0] for root in roots - {RANDOM}}
    if origin.in_backward or RANDOM not in roots or kinds != {"batch"}:
        return None
    return "augmentation", "medium", "the batch is changed at random, before any parameter of the model takes part"


def _loss_setting(origin: Origin, facts: Facts) -> Finding | None:
    code, tensors = origin.code, _tensors(origin)
    if origin.name == "ctc_loss":
        return "loss_setting", "medium", "CTC has no alignment where an input is shorter than its target"
    if origin.name in LOSSES and not origin.in_backward:
        if any(item["inf"] > 0 for item in tensors):
            return "loss_setting", "high", "the loss's weights hold an infinity"
        return "loss_setting", "medium", "the mean over no labels: all are ignored, or the weights of all are 0"
    exponent = [number for number in _numbers(origin) if 0 < number < 1]
    if origin.name == "pow" and origin.in_backward and re.search(r"gamma|focal", code, re.IGNORECASE) is not None:
        return "loss_setting", "high", "a focal exponent below 1 has an infinite derivative where p is 1"
    if origin.name == "pow" and origin.in_backward and exponent and re.search(r"1(\.0)?\s*-", code):
        return "loss_setting", "medium", f"(1 - p)^{exponent[0]:g} has an infinite derivative where p is 1"
    divided = origin.name in ("div", "reciprocal", "exp", "mul") and not origin.in_backward
    parents = [name for names in origin.made_of for name in names if name.startswith(("parameter", "buffer"))]
    small = [item for item in tensors if math.prod(item["shape"]) == 1]
    if divided and (_TEMPERATURE.search(code) or (small and any(_TEMPERATURE.search(name) for name in parents))):
        return "loss_setting", "high", "a temperature has left the range that the loss can bear"
    return None


def _normalization(origin: Origin, facts: Facts) -> Finding | None:
    if _is_huge(facts) is not None:
        return None
    if origin.name in NORMALIZATIONS:
        few = [item for item in _tensors(origin) if math.prod(item["shape"]) <= 1]
        if origin.name in SPREADS and few:
            return "normalization", "high", "the spread of a single value is not defined"
        return "normalization", "high", "values without any spread (or too many to square) are normalized"
    if origin.name in ("div", "reciprocal", "rsqrt", "sqrt", "pow"):
        denominators = origin.made_of[-1] if origin.made_of else ()
        if any(name in SPREADS for name in denominators) or _is_manual_variance(denominators):
            return "normalization", "high", "values are divided by their spread, which is 0"
    return None


def _data(origin: Origin, facts: Facts) -> Finding | None:
    huge = _is_huge(facts)
    if huge is not None and origin.name not in SOFTMAXES:
        return "data", "high" if "inf" in huge else "medium", huge
    empty = [number for number, item in enumerate(_tensors(origin)) if 0 in item["shape"]]
    if empty and origin.name in ("mean", "median", "std", "var", "div"):
        kinds, made_of = _kinds(origin, empty[0], facts), origin.made_of[empty[0]] if origin.made_of else ()
        if "parameter" in kinds and set(made_of[:1]) <= SELECTIONS:
            return "loss_setting", "medium", "a mean over what the model's outputs select, which is nothing"
        return "label" if kinds == {"label"} else "data", "medium", "a mean over nothing: no element was selected"
    return None


def _overflow(origin: Origin, facts: Facts) -> Finding | None:
    tensors, output = _tensors(origin), origin.output
    largest = max((_largest(item) for item in tensors), default=0.0)
    if origin.name in EXPONENTIALS and largest > math.log(torch.finfo(torch.float32).max):
        return "overflow", "high", f"{origin.name} of values up to {largest:.3g} is beyond what float32 can hold"
    if origin.in_backward and origin.name in SINGULAR_AT_ZERO and not any(_at_zero(item) for item in tensors):
        return "overflow", "medium", f"the derivative of {origin.name} is beyond what {output.get('dtype')} can hold"
    if origin.name in DOMAINS and not _is_pure_overflow(origin):
        return None
    if output.get("inf", 0) == 0 and output.get("nan", 0) > 0 and not any(_largest(item) > 1e18 for item in tensors):
        return None  # no value too large was seen
    dtypes = {item["dtype"] for item in tensors} | {output.get("dtype", "")}
    half = dtypes & {"float16", "bfloat16"}
    if half:
        limit = torch.finfo(torch.float16).max if "float16" in half else torch.finfo(torch.bfloat16).max
        return (
            "overflow",
            "high",
            f"values up to {largest:.3g} go into {origin.name}; {sorted(half)[0]} ends at {limit:.3g}",
        )
    if origin.name in (*EXPONENTIALS, "pow", "square"):
        return "overflow", "high", f"{origin.name} of values up to {largest:.3g} is beyond what float32 can hold"
    badly, beyond = _badly_scaled(facts.modules)
    if facts.updates is None and beyond:
        return "weights", "medium", f"{badly}, as no initialisation does, but a step that was too large"
    if badly and facts.updates in (None, 0):
        return "initialization", "medium", badly
    if badly:
        return "learning_rate", "medium", f"{badly}, after {facts.updates} updates"
    return "overflow", "medium", f"values up to {largest:.3g} go into {origin.name}"


def _domain(origin: Origin, facts: Facts) -> Finding | None:
    if origin.name not in DOMAINS:
        return None
    tensors = _tensors(origin)
    half = {item["dtype"] for item in tensors} & {"float16", "bfloat16"}
    if half and _tiny_number(origin.code):
        return "overflow", "medium", f"a number too small for {sorted(half)[0]} is added, and is lost"
    zeros, negative = (any(item.get(what, 0) > 0 for item in tensors) for what in ("zeros", "negative"))
    at = "at 0" if zeros else "of a negative number" if negative else "outside of its range"
    way = "the derivative of " if origin.in_backward else ""
    what = f"{way}{origin.name} {at}"
    kinds = _kinds(origin, -1 if origin.name in ("div", "floor_divide", "fmod", "remainder") else 0, facts)
    if not origin.in_backward and kinds == {"label"}:
        return "label", "medium", f"{what}, of what the labels alone decide"
    if not origin.in_backward and kinds and kinds <= {"parameter", "buffer"}:
        begun: Cause = "initialization" if facts.updates == 0 or "buffer" in kinds else "weights"
        return begun, "medium", f"{what}, of what the model's state alone decides"
    return "domain", "high" if zeros or negative else "medium", what


def _product(origin: Origin, facts: Facts) -> Finding | None:
    if any(item["inf"] > 0 for item in _tensors(origin)) and origin.name in ("mul", "add", "sub", "mm", "bmm", "addmm"):
        return "domain", "medium", "an infinity that was meant to be there became NaN (0 x inf, or inf - inf)"
    return None


Rule = Callable[[Origin, Facts], "Finding | None"]
RULES: tuple[Rule, ...] = (
    _from_outside,
    _masked,
    _augmentation,
    _loss_setting,
    _normalization,
    _data,
    _overflow,
    _domain,
    _product,
)


# -------------------------------------------------------------------------------------------------------------- facts


def _tensors(origin: Origin) -> list[dict[str, Any]]:
    return [item for item in origin.inputs if isinstance(item, dict)]


def _at_zero(item: dict[str, Any]) -> bool:
    return bool(item.get("zeros", 0) or item.get("negative", 0))


def _numbers(origin: Origin) -> list[float]:
    return [float(item) for item in origin.inputs if isinstance(item, (int, float))]


def _largest(item: dict[str, Any]) -> float:
    return float(max(abs(item["min"] or 0.0), abs(item["max"] or 0.0)))


def _is_label(name: str, batch: Any) -> bool:
    if _LABEL_NAMES.search(name):
        return True
    first = name.split(".")[0]
    return isinstance(batch, (tuple, list)) and len(batch) > 1 and first == str(len(batch) - 1)


def _is_huge(facts: Facts) -> str | None:
    """Say so if the samples to blame hold far larger numbers than the others."""
    if not facts.samples or len(facts.samples) >= facts.count:
        return None
    theirs = _range(facts.batch, facts.count, facts.samples)
    others = _range(facts.batch, facts.count, [p for p in range(facts.count) if p not in set(facts.samples)])
    for name, largest in theirs.items():
        usual = others.get(name, 0.0)
        if largest > 1e3 * max(usual, 1e-3):
            return f"the samples' tensor {name or '(itself)'} reaches {largest:.3g}; that of the others {usual:.3g}"
    return None


def _range(batch: Any, count: int, samples: Sequence[int]) -> dict[str, float]:
    found = {}
    for name, tensor in named_tensors(chosen(batch, count, samples)):
        if tensor.is_floating_point() and tensor.numel() > 0:
            found[name] = float(tensor.detach().abs().nan_to_num(0.0, math.inf, math.inf).max())
    return found


def _badly_scaled(modules: Sequence[nn.Module]) -> tuple[str, bool]:
    """Name a weight that is far too large, and say whether it is beyond any initialisation."""
    found: list[tuple[float, str]] = []
    for name, parameter in _weights(modules):
        found.append((gain(parameter), f"{name} multiplies its input by about {gain(parameter):.3g}"))
    strongest, what = max(found, default=(0.0, ""))
    for module in modules:
        for name, parameter in module.named_parameters():
            largest = float(parameter.detach().abs().max()) if parameter.numel() > 0 else 0.0
            if largest > ENORMOUS_VALUE:
                return f"{name} holds numbers up to {largest:.3g}", True
    return (what, strongest > ENORMOUS_GAIN) if strongest > TOO_STRONG else ("", False)


def _kinds(origin: Origin, which: int, facts: Facts) -> set[str]:
    """Return what one of the inputs is made of: `label`, `batch`, `parameter`, `buffer`, `random`."""
    if not origin.roots:
        return set()
    kinds = set()
    for root in origin.roots[which]:
        kind, _, name = root.partition(" ")
        unseen = root not in facts.traced.shown  # by the model, so that only the loss uses it
        kinds.add("label" if kind == "batch" and (unseen or _is_label(name, facts.batch)) else kind)
    return kinds


def _weights(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for module in modules:
        for part_name, part in module.named_modules():
            if isinstance(part, nn.Embedding):
                continue
            for name, parameter in part.named_parameters(prefix=part_name, recurse=False):
                if parameter.dim() >= 2 and parameter.is_floating_point() and parameter.numel() > 0:
                    yield name, parameter


def _looks_uninitialised(name: str, modules: Sequence[nn.Module]) -> bool:
    """Memory that was used before holds numbers of all sizes."""
    for module in modules:
        for found, parameter in module.named_parameters():
            if found == name:
                values = parameter.detach().abs()
                values = values[torch.isfinite(values) & (values > 0)]
                return values.numel() > 1 and float(values.max() / values.min()) > 1e20
    return False


def _is_manual_variance(names: Sequence[str]) -> bool:
    """A mean of squares of differences, of which a root may have been taken."""
    return "mean" in names and ("pow" in names or "square" in names) and "sub" in names


def _is_pure_overflow(origin: Origin) -> bool:
    """An operation on numbers that it is defined for, whose result is too large."""
    tensors = _tensors(origin)
    if origin.in_backward or not tensors or origin.output.get("nan", 0) > 0:
        return False
    if origin.name == "pow":
        return all(number > 1 for number in _numbers(origin)[:1])
    return origin.name == "div" and all(item.get("zeros", 0) == 0 for item in tensors[1:])


def _tiny_number(code: str) -> bool:
    return any(float(found) < 6e-8 for found in re.findall(r"\d+(?:\.\d*)?e-\d+", code))


def _description(origin: Origin) -> list[str]:
    """Say what went in, a line each."""
    if origin.kind != "operation":
        return []
    lines = []
    for item in origin.inputs[:6]:
        if isinstance(item, dict):
            bad = f", {item['nan']} NaN, {item['inf']} Inf" if item["nan"] or item["inf"] else ""
            span = "no finite value" if item["min"] is None else f"from {item['min']:.4g} to {item['max']:.4g}"
            zeros = f", {item['zeros']} zeros" if item.get("zeros") else ""
            lines.append(f"input {item['dtype']} {item['shape']}: {span}{zeros}{bad}")
    return lines
