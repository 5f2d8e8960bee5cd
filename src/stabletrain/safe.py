"""Functions whose value and gradient stay finite where the textbook ones have none.

`torch.where` after an operation can't mend its gradient: backwards the infinite slope is multiplied by 0, which is
NaN. So each function here takes the dangerous numbers out before the operation, puts their value in after it, and
gives them the gradient 0. Everywhere else value and gradient are those of torch, bit for bit; no epsilon is added.

What the format of a result can't hold becomes its largest number, and a slope that it can't hold becomes 0. NaN stays
NaN, and so does an infinite argument what torch makes of it, if the function has a value there: neither is caused by
the function, and hiding it would hide its cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stabletrain.errors import ConfigurationError

# The smallest number whose reciprocal the format holds; elsewhere the smallest normal number is one.
_SMALLEST_IN_HALF = 257 * 2.0**-24
# The largest number of each format whose exponential it holds.
_LARGEST_EXPONENT = {
    torch.float16: 11.0859375,
    torch.bfloat16: 88.5,
    torch.float32: 88.72283172607422,
    torch.float64: 709.782712893384,
}
# Norms of elements between these need no scaling, however many they are: neither the squares nor the gradient leave
# the format then.
_ORDINARY = {
    torch.float16: (2.0**-8, 2.0**13),
    torch.bfloat16: (2.0**-48, 2.0**48),
    torch.float32: (2.0**-48, 2.0**48),
    torch.float64: (2.0**-384, 2.0**384),
}
# For smaller largest elements than the first number, the second is the scale; powers of two, which are exact.
_SCALES = {
    torch.float32: ((2.0**-100, 2.0**110), (2.0**-48, 2.0**60), (2.0**48, 1.0), (math.inf, 2.0**-80)),
    torch.float64: ((2.0**-800, 2.0**880), (2.0**-384, 2.0**480), (2.0**384, 1.0), (math.inf, 2.0**-640)),
}


def log(x: Tensor, *, floor: float | None = None) -> Tensor:
    """Return the natural logarithm, and that of `floor` with gradient 0 for everything below it.

    Args:
        x: floating tensor of any shape.
        floor: positive; None or less than that: the smallest number at which the gradient 1 / x fits into the dtype of
            `x` (the smallest normal number, 1.18e-38 in float32 and bfloat16; 1.53e-5 in float16).

    Returns:
        What `torch.log` returns for `x` from `floor` on, also at infinity; log(floor) below, also for 0 and negative
        numbers.

    Raises:
        ConfigurationError: `x` isn't a floating tensor, or `floor` isn't a positive number.

    Example:
        >>> x = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
        >>> log(x)
        tensor([  0.0000, -87.3365, -87.3365], grad_fn=<LogBackward0>)
        >>> torch.autograd.grad(log(x).sum(), x)
        (tensor([1., 0., 0.]),)
    """
    _check(x)
    if floor is not None and not 0 < floor < math.inf:
        raise ConfigurationError(f"safe.log was given floor={floor!r}; give a positive number, or None.")
    smallest = _SMALLEST_IN_HALF if x.dtype == torch.float16 else torch.finfo(x.dtype).tiny
    lowest = smallest if floor is None else max(floor, smallest)
    return torch.log(torch.where(x < lowest, lowest, x))


def sqrt(x: Tensor, *, floor: float = 0.0) -> Tensor:
    """Return the square root, and that of `floor` with gradient 0 for everything up to it.

    Args:
        x: floating tensor of any shape.
        floor: 0 or more. The gradient is at most 1 / (2 sqrt(floor)); with 0 it is finite, but may be as large as 1e22
            in float32.

    Returns:
        What `torch.sqrt` returns for `x` above `floor`, also at infinity; sqrt(floor) for the rest, also for negative
        numbers.

    Raises:
        ConfigurationError: `x` isn't a floating tensor, or `floor` is negative or not finite.

    Example:
        >>> x = torch.tensor([4.0, 0.0, -1.0], requires_grad=True)
        >>> torch.autograd.grad(sqrt(x).sum(), x)
        (tensor([0.2500, 0.0000, 0.0000]),)
        >>> sqrt(x).detach()
        tensor([2., 0., 0.])
    """
    _check(x)
    if not 0 <= floor < math.inf:
        raise ConfigurationError(f"safe.sqrt was given floor={floor!r}; give a finite number of at least 0.")
    low = x <= floor
    return torch.where(low, math.sqrt(floor), torch.sqrt(torch.where(low, 1.0, x)))


def div(numerator: Tensor | float, denominator: Tensor, *, fill: float = 0.0) -> Tensor:
    """Return the quotient, and `fill` with gradient 0 where the denominator is 0.

    Near 0, where the denominator's gradient -a / b^2 doesn't fit into its dtype, that gradient is 0, and the
    numerator's 1 / b stays as long as it fits. A quotient that doesn't fit is the largest number of the dtype, with its
    sign and gradient 0.

    Args:
        numerator: floating tensor or a number.
        denominator: floating tensor; both are broadcast against each other.
        fill: the value of a division by 0, of 0 by 0 too.

    Raises:
        ConfigurationError: an argument isn't a floating tensor.

    Example:
        >>> a, b = torch.ones(3, requires_grad=True), torch.tensor([2.0, 0.0, 1e-30], requires_grad=True)
        >>> quotient = div(a, b)
        >>> quotient.detach()
        tensor([5.0000e-01, 0.0000e+00, 1.0000e+30])
        >>> torch.autograd.grad(quotient.sum(), (a, b))
        (tensor([5.0000e-01, 0.0000e+00, 1.0000e+30]), tensor([-0.2500,  0.0000,  0.0000]))
    """
    _check(denominator)
    if not isinstance(numerator, Tensor):
        numerator = torch.full_like(denominator, numerator, requires_grad=False)
    _check(numerator)
    above, zero = numerator.detach(), denominator == 0
    below = torch.where(zero, 1.0, denominator.detach())
    quotient = above / below
    beyond = _beyond(quotient, quotient.dtype) & ~torch.isinf(above)
    constant = torch.where(zero, fill, torch.where(beyond, _largest(quotient), quotient))
    neither = zero | beyond | _beyond(1.0 / below, numerator.dtype)
    return _apart(
        torch.div, numerator, denominator, neither, ~neither & _beyond(quotient / below, denominator.dtype), constant
    )


def exp(x: Tensor, *, ceiling: float | None = None) -> Tensor:
    """Return the exponential, and that of `ceiling` with gradient 0 for everything above it.

    Args:
        x: floating tensor of any shape.
        ceiling: None or more than that: the largest number whose exponential fits into the dtype of `x` (11.09 in
            float16, 88.5 in bfloat16, 88.72 in float32, 709.8 in float64). The gradient is kept in this dtype, also
            where autocast gives the value another one.

    Returns:
        What `torch.exp` returns up to `ceiling`, also 0 far below; exp(ceiling) above, also at infinity.

    Raises:
        ConfigurationError: `x` isn't a floating tensor, or `ceiling` isn't a number.

    Example:
        >>> x = torch.tensor([0.0, 1000.0], requires_grad=True)
        >>> exp(x).detach()
        tensor([1.0000e+00, 3.4028e+38])
        >>> torch.autograd.grad(exp(x).sum(), x)
        (tensor([1., 0.]),)
    """
    _check(x)
    if ceiling is not None and math.isnan(ceiling):
        raise ConfigurationError("safe.exp was given ceiling=nan; give a number, or None.")
    largest = _LARGEST_EXPONENT[x.dtype]
    highest = largest if ceiling is None else min(ceiling, largest)
    return torch.exp(torch.where(x > highest, highest, x))


def norm(x: Tensor, dim: int | Sequence[int] | None = None, *, keepdim: bool = False) -> Tensor:
    """Return the Euclidean norm, which for a vector of zeros is 0 with gradient 0, and right for any finite vector.

    Vectors so large or small that squares or gradients would leave the format are scaled by a power of two before, or
    measured in float32 if they are in half precision. A norm that the format can't hold is its largest number, with
    gradient 0.

    Args:
        x: floating tensor of any shape.
        dim: of the vectors, one or several; None: all of `x` is one.
        keepdim: whether these dimensions stay, with size 1.

    Raises:
        ConfigurationError: `x` isn't a floating tensor.

    References:
        J. L. Blue: A Portable Fortran Program to Find the Euclidean Norm of a Vector, 1978 (the three ranges).

    Example:
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, 4e-30]], requires_grad=True)
        >>> norm(x, dim=1).detach()
        tensor([5.0000e+00, 0.0000e+00, 5.0000e-30])
        >>> torch.autograd.grad(norm(x, dim=1).sum(), x)
        (tensor([[0.6000, 0.8000],
                [0.0000, 0.0000],
                [0.6000, 0.8000]]),)
    """
    _check(x)
    axes = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if x.numel() == 0:
        empty: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keepdim)
        return empty
    largest = x.detach().abs().amax(axes, keepdim=True)
    low, high = _ORDINARY[x.dtype]
    zero, ordinary = largest == 0, ~((largest < low) | ((largest > high) & ~torch.isinf(largest)))
    plain = torch.linalg.vector_norm(torch.where(ordinary, x, 1.0), dim=axes, keepdim=True)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.ones_like(largest, dtype=wide)
    for limit, factor in reversed(_SCALES[wide]):
        scale = torch.where(largest <= limit, factor, scale)
    extreme = torch.where(ordinary | zero, 1.0, x).to(wide) * torch.where(ordinary | zero, 1.0, scale)
    scaled = torch.linalg.vector_norm(extreme, dim=axes, keepdim=True) / scale
    most = torch.finfo(plain.dtype).max
    beyond = ~ordinary & (scaled > most)
    rescued = torch.where(zero, 0.0, torch.where(beyond, most, scaled)).to(plain.dtype)
    found = torch.where(ordinary, plain, rescued)
    return found if keepdim else found.squeeze(axes)


def acos(x: Tensor) -> Tensor:
    """Return the arc cosine, in radians, with gradient 0 at 1 and -1 and beyond them.

    Args:
        x: floating tensor of any shape.

    Returns:
        What `torch.acos` returns between -1 and 1; 0 from 1 on and pi up to -1, where a cosine was rounded.

    Raises:
        ConfigurationError: `x` isn't a floating tensor.

    Example:
        >>> x = torch.tensor([0.0, 1.0, -1.001], requires_grad=True)
        >>> acos(x).detach()
        tensor([1.5708, 0.0000, 3.1416])
        >>> torch.autograd.grad(acos(x).sum(), x)
        (tensor([-1.,  0.,  0.]),)
    """
    _check(x)
    outside = x.abs() >= 1
    inside = torch.acos(torch.where(outside, 0.0, x))
    limit = torch.where(x > 0, 0.0, torch.full_like(inside, math.pi))
    return torch.where(outside, limit, inside)


def pow(base: Tensor, exponent: Tensor | float, *, fill: float = 0.0) -> Tensor:  # torch's name
    """Return the power, and `fill` with gradient 0 where there is none.

    There is none for 0 to a negative exponent, and for a negative base to an exponent that isn't whole. Where the
    gradient e x^(e - 1) doesn't fit into the base's dtype, as for a root of 0, it is 0; so is the exponent's at bases
    up to 0. A power that doesn't fit is the largest number of the dtype, with its sign and gradient 0.

    Args:
        base: floating tensor.
        exponent: a number, or a floating tensor; both are broadcast against each other.
        fill: the value where there is none.

    Raises:
        ConfigurationError: an argument isn't a floating tensor.

    Example:
        >>> x = torch.tensor([4.0, 0.0, -4.0], requires_grad=True)
        >>> pow(x, 0.5).detach()
        tensor([2., 0., 0.])
        >>> torch.autograd.grad(pow(x, 0.5).sum(), x)
        (tensor([0.2500, 0.0000, 0.0000]),)
    """
    _check(base)
    if isinstance(exponent, Tensor):
        _check(exponent)
    start, power = base.detach(), exponent.detach() if isinstance(exponent, Tensor) else exponent
    known = power if isinstance(power, Tensor) else torch.tensor(power, dtype=torch.float64)
    fractional = torch.isfinite(known) & (known != torch.floor(known))
    undefined = ((start < 0) & fractional) | ((start == 0) & (known < 0))
    start = torch.where(undefined, 1.0, start)
    value = torch.pow(start, power)
    beyond = _beyond(value, value.dtype) & ~torch.isinf(start) & ~torch.isinf(known)
    constant = torch.where(undefined, fill, torch.where(beyond, _largest(value), value))
    neither = undefined | beyond | _beyond(power * torch.pow(start, power - 1), base.dtype)
    if not isinstance(exponent, Tensor):
        return torch.where(neither, constant, torch.pow(torch.where(neither, 1.0, base), exponent))
    slope = value * torch.log(torch.where(start > 0, start, 1.0))
    return _apart(
        torch.pow, base, exponent, neither, ~neither & ((start <= 0) | _beyond(slope, exponent.dtype)), constant
    )


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _LARGEST_EXPONENT:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _LARGEST_EXPONENT)
        raise ConfigurationError(f"stabletrain.safe was given {given}; it takes tensors of {allowed}: convert it.")


def _beyond(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where a format can't hold values; NaN is no such place. Compiled code may keep more digits meanwhile."""
    return values.abs() > torch.finfo(dtype).max


def _largest(values: Tensor) -> Tensor:
    return torch.copysign(torch.full_like(values, torch.finfo(values.dtype).max), values)


def _apart(
    function: Callable[[Tensor, Tensor], Tensor],
    first: Tensor,
    second: Tensor,
    neither: Tensor,
    first_only: Tensor,
    constant: Tensor,
) -> Tensor:
    """Apply a function of two arguments to each place in one of three ways, by the gradients that are to flow there.

    Args:
        function: healthy at (1, 1).
        first: its first argument.
        second: its second argument.
        neither: where no gradient flows, and the value is `constant`.
        first_only: where none flows to the second argument; nowhere else.
        constant: without a graph.
    """
    with_one = neither | first_only
    both = function(torch.where(with_one, 1.0, first), torch.where(with_one, 1.0, second))
    alone = function(torch.where(first_only, first, 1.0), torch.where(first_only, second.detach(), 1.0))
    return torch.where(neither, constant, torch.where(first_only, alone, both))
