"""Count, mean and sum of squared deviations over any axes, exact enough to merge across blocks, processes, machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _check, _core, _verify


def _sum(terms: list[Any]) -> Any:
    """Sum with its rounding errors added back (Neumaier), so that the order of the terms hardly matters."""
    total, errors = np.zeros_like(terms[0]), np.zeros_like(terms[0])
    for term in terms:
        new = total + term
        larger, smaller = np.where(abs(total) >= abs(term), (total, term), (term, total))
        errors = errors + ((larger - new) + smaller)
        total = new
    return np.where(np.isfinite(errors), total + errors, total)


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one or many sets of values.

    Attributes
    ----------
    count : int
        Values in each set.
    mean : ndarray or float
        Their mean, float64.
    m2 : ndarray or float
        Sum of squared deviations from the mean, float64.
    """

    count: int
    mean: Any
    m2: Any

    def var(self, ddof: int = 0) -> Any:
        """Variance, m2 / (count - ddof)."""
        if _check.integer("ddof", ddof) >= self.count:
            raise ValueError(f"ddof is {ddof}; expected less than the count, {self.count}")
        return self.m2 / (self.count - ddof)

    def std(self, ddof: int = 0) -> Any:
        """Standard deviation, the square root of `var(ddof)`."""
        return np.sqrt(self.var(ddof))

    @staticmethod
    def merge(*parts: Moments) -> Moments:
        """Moments of the union of disjoint sets.

        mean = sum(n_i mean_i) / n and m2 = sum(m2_i + n_i (mean_i - mean)^2): all parts at once, so that their order
        changes the result by no more than the last bit.

        Parameters
        ----------
        *parts : Moments
            At least one; all of the same shape.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError
            An argument is not Moments.
        ValueError
            No argument, or shapes that differ.

        References
        ----------
        T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance", 1983.
        """
        if not parts:
            raise ValueError("merge got no moments; expected at least one")
        for i, part in enumerate(parts):
            if not isinstance(part, Moments):
                raise TypeError(
                    f"argument {i} of merge is of type {type(part).__name__}; expected Moments: merge(m1, m2)"
                )
            if np.shape(part.mean) != np.shape(parts[0].mean):
                raise ValueError(
                    f"argument {i} of merge has shape {np.shape(part.mean)}; expected {np.shape(parts[0].mean)}, "
                    "that of the first"
                )
        parts = tuple(part for part in parts if part.count > 0) or parts[:1]
        if len(parts) == 1:
            return parts[0]
        count = sum(part.count for part in parts)
        # Means relative to the first-sorted one: what they have in common would only cost digits.
        # In units of a power of two, in which the difference of two finite means is finite.
        unit = 4.0 if any(bool(np.any(np.abs(part.mean) > 2.0**1000)) for part in parts) else 1.0
        origin = parts[0].mean / unit
        for part in parts[1:]:
            origin = np.minimum(origin, part.mean / unit)
        with np.errstate(all="ignore"):
            offsets = [np.asarray(part.mean / unit - origin) for part in parts]
            shift = _sum([offset * (part.count / count) for part, offset in zip(parts, offsets, strict=True)])
            m2 = _sum(
                [np.asarray(part.m2, dtype=np.float64) for part in parts]
                + [part.count * ((offset - shift) * unit) ** 2 for part, offset in zip(parts, offsets, strict=True)]
            )
            return Moments(count, ((origin + shift) * unit)[()], m2[()])


def moments(x: Any, axis: int | tuple[int, ...] | None = None) -> Moments:
    """Count, mean and sum of squared deviations of x over `axis`.

    mean = sum(x) / count, m2 = sum((x - mean)^2).

    Parameters
    ----------
    x : array_like
        float32 or float64, any strides.
    axis : int or tuple of int, optional
        Axes to reduce, like `numpy.mean`'s; None reduces all.

    Returns
    -------
    Moments
        mean and m2 are float64, of x's shape without the reduced axes.

    Raises
    ------
    TypeError
        x is not of float32 or float64 in native byte order.
    ValueError
        An axis is out of range or repeated, or there is nothing to reduce for a result that is not empty.

    References
    ----------
    T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance", 1983.
    """
    x = _check.array("x", x)
    axes = tuple(range(x.ndim)) if axis is None else _check.axes("axis", axis, x.ndim)
    reduced = [a in axes for a in range(x.ndim)]
    shape = tuple(n for n, gone in zip(x.shape, reduced, strict=True) if not gone)
    if any(n == 0 for n, gone in zip(x.shape, reduced, strict=True) if gone) and 0 not in shape:
        raise ValueError(f"x has shape {x.shape}, with nothing to reduce over axis={axis}; expected at least one value")

    def kernel() -> Moments:
        count, mean, m2 = _core.moments(x, reduced)
        return Moments(count, mean.reshape(shape)[()], m2.reshape(shape)[()])

    return _verify.run("moments", kernel, (x,), {"axis": axes}) if _verify.active() else kernel()
