"""Scalers for the columns of a table, with scikit-learn's constructors, methods, fitted attributes and results.

They run on the kernels, work without scikit-learn, and are accepted by its Pipeline, clone and searches where it is
there. As there, and unlike in the rest of this package, integers and lists are taken and converted to float64, and NaN
stands for a missing value; what is refused is refused in words that scikit-learn's own checks of estimators look for.
Refuses sparse matrices, sample weights, and infinity.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

import numpy as np

from . import _check
from ._batch_norm import batch_norm
from ._moments import moments
from ._results import Array

__all__ = ["MinMaxScaler", "NotFittedError", "StandardScaler"]

_S = TypeVar("_S", bound="_Scaler")
# Count (one number, or one for each column), mean and m2.
_Moments: TypeAlias = "tuple[Any, Array, Array]"


class NotFittedError(ValueError, AttributeError):
    """A scaler was used before `fit` or `partial_fit`."""


def _table(X: Any) -> Array:
    """X as a 2-D array of float32 or float64 that holds at least one value; others become float64."""
    if hasattr(X, "toarray") and hasattr(X, "nnz"):
        raise TypeError(f"X is a sparse {type(X).__name__}; expected a dense array: use X.toarray()")
    found = _check.as_ndarray("X", X)
    if found.dtype.kind == "c":
        raise ValueError(f"X has dtype {found.dtype}; expected real numbers. Complex data not supported")
    if found.ndim != 2:
        raise ValueError(
            f"X has shape {_check._shape(found.shape)}; expected two axes (samples, features). Reshape your data: "
            "X.reshape(-1, 1) for a single feature, X.reshape(1, -1) for a single sample"
        )
    if found.dtype not in _check.FLOATS:
        try:
            found = found.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise type(error)(f"X has dtype {found.dtype} and could not be read as numbers: {error}") from error
    for size, what in zip(found.shape, ("sample", "feature"), strict=True):
        if size == 0:
            raise ValueError(f"X has 0 {what}(s) (shape={found.shape}) while a minimum of 1 is required.")
    return found


def _names(X: Any) -> Array | None:
    """The names of a data frame's columns, where all of them are strings."""
    columns = getattr(X, "columns", None)
    if columns is None:
        return None
    names = np.asarray(columns, dtype=object)
    return names if names.ndim == 1 and all(isinstance(name, str) for name in names) and len(names) else None


def _infinite() -> ValueError:
    return ValueError("X contains infinity; expected finite values, or NaN for missing ones")


def _refuse_infinity(X: Array) -> None:
    if bool(np.isinf(X).any()):
        raise _infinite()


def _one_count(count: Any) -> Any:
    """A number where all columns have as many values."""
    return count[0] if np.ndim(count) and count.min() == count.max() else count


def _column_moments(X: Array) -> _Moments:
    """Count, mean and m2 of each column's values that are not NaN; NaN for a column without any."""
    m = moments(X, axis=0)
    count: Any = np.int64(m.count)
    mean, m2 = m.mean, m.m2
    odd = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(m2)))
    if odd.size:
        # NaN goes through to its own column's result, so that only such columns are looked at a second time.
        columns = np.ascontiguousarray(X.T if odd.size == X.shape[1] else X[:, odd].T)
        if bool(np.isinf(columns).any()):
            raise _infinite()
        count = np.full(X.shape[1], m.count)
        for j, column in zip(odd, columns, strict=True):
            kept = column[~np.isnan(column)]
            count[j] = kept.size
            if kept.size:
                part = moments(kept)
                mean[j], m2[j] = part.mean, part.m2
            else:
                mean[j] = m2[j] = np.nan
    return _one_count(count), mean, m2


def _merged(before: _Moments, new: _Moments) -> _Moments:
    """Chan's formula, column by column. A column without values on one side is that of the other."""
    (count, mean, m2), (new_count, new_mean, new_m2) = before, new
    total: Any = count + new_count
    with np.errstate(all="ignore"):
        delta = new_mean - mean
        share = new_count / total
        both_mean = np.where(np.equal(count, 0), new_mean, mean + delta * share)
        both_m2 = np.where(np.equal(count, 0), new_m2, m2 + new_m2 + delta * delta * (count * share))
    none = np.equal(new_count, 0)
    both_mean, both_m2 = np.where(none, mean, both_mean), np.where(none, m2, both_m2)
    return _one_count(total), both_mean, both_m2


def _refuse_overflow(numbers: Array, known: Any, what: str) -> None:
    """Raises where a column has values and yet no finite number, by which it would be scaled to nothing."""
    beyond = np.flatnonzero(~np.isfinite(numbers) & known)
    if beyond.size:
        wider = ", or use float64" if numbers.dtype == np.float32 else ""
        raise ValueError(
            f"column {int(beyond[0])} of X, with what was seen of it before, has {what} beyond the largest "
            f"{numbers.dtype}; expected smaller values: divide them by some power of ten{wider}"
        )


def _extremes(X: Array) -> tuple[Array, Array]:
    """Minimum and maximum of each column's values that are not NaN; NaN for a column without any."""
    low, high = np.fmin.reduce(X, axis=0), np.fmax.reduce(X, axis=0)
    if bool(np.isinf(low).any() or np.isinf(high).any()):
        raise _infinite()
    return low, high


class _Scaler:
    """What both scalers share: parameters as scikit-learn reads and sets them, and the checks of X."""

    copy: bool
    n_features_in_: int
    n_samples_seen_: Any

    @classmethod
    def _parameters(cls) -> list[str]:
        return sorted(name for name in inspect.signature(cls.__init__).parameters if name != "self")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name.

        Parameters
        ----------
        deep : bool, default True
            Ignored: no argument has parameters of its own.

        Returns
        -------
        dict
        """
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self: _S, **params: Any) -> _S:
        """Set constructor arguments; they count from the next call on.

        Parameters
        ----------
        **params
            By name.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            There is no argument of that name. Nothing has been set then.
        """
        for name in params:
            if name not in self._parameters():
                raise ValueError(
                    f"{type(self).__name__} has no parameter {name!r}; expected one of {', '.join(self._parameters())}"
                )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        changed = [
            f"{name}={value!r}" for name, value in self.get_params().items() if value is not defaults[name].default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def _reset(self) -> None:
        """Forget every fit; the constructor's arguments stay."""
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_samples_seen_")

    def __sklearn_tags__(self) -> Any:
        # Asked by scikit-learn alone, which is imported then; nothing else here needs it.
        utils = import_module("sklearn.utils")
        return utils.Tags(
            estimator_type=None,
            target_tags=utils.TargetTags(required=False),
            transformer_tags=utils.TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=utils.InputTags(allow_nan=True),
        )

    def _begin_fit(self, X: Any, first: bool) -> tuple[Array, Callable[[], None]]:
        """X, checked, and what to call once the rest has succeeded; until then nothing is changed."""
        table, names = _table(X), _names(X)
        if not first:
            self._same_features(table, names)
            return table, lambda: None

        def remember() -> None:
            self._reset()
            self.n_features_in_ = table.shape[1]
            if names is not None:
                self.feature_names_in_ = names

        return table, remember

    def _same_number_of_features(self, table: Array) -> None:
        if table.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {table.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} "
                "features as input, as in fit"
            )

    def _same_features(self, table: Array, names: Array | None) -> None:
        self._same_number_of_features(table)
        known = getattr(self, "feature_names_in_", None)
        if known is None and names is not None:
            warnings.warn(
                f"X has feature names, but {type(self).__name__} was fitted without feature names",
                stacklevel=_check.frames_of_the_package(),
            )
        elif known is not None and names is None:
            warnings.warn(
                f"X has no feature names, but {type(self).__name__} was fitted with feature names",
                stacklevel=_check.frames_of_the_package(),
            )
        elif known is not None and names is not None and list(known) != list(names):
            raise ValueError(f"X has the features {list(names)}; expected {list(known)}, in this order, as in fit")

    def _require_fit(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} is not fitted; call fit or partial_fit first")

    def _begin_transform(self, X: Any, copy: Any, *, named: bool = True) -> tuple[Array, Array]:
        """X, checked, and where the result goes: X itself where no copy is wanted and X can be written to."""
        self._require_fit()
        table = _table(X)
        if named:
            self._same_features(table, _names(X))
        else:
            self._same_number_of_features(table)
        _refuse_infinity(table)
        if not (self.copy if copy is None else copy) and table.flags.writeable:
            return table, table
        return table, np.empty_like(table, order="K", subok=False)

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """Names of the columns of the result, which are those of X.

        Parameters
        ----------
        input_features : sequence of str, optional
            Names to use where X had none; must equal those that it had.

        Returns
        -------
        ndarray of str objects
            `x0`, `x1`, ... where no names are known.

        Raises
        ------
        ValueError
            Not fitted, or input_features does not fit.
        """
        self._require_fit()
        known = getattr(self, "feature_names_in_", None)
        if input_features is None:
            return known if known is not None else np.array([f"x{i}" for i in range(self.n_features_in_)], object)
        given = np.asarray(input_features, dtype=object)
        if known is not None and list(known) != list(given):
            raise ValueError(f"input_features is {list(given)}; expected {list(known)}, the feature_names_in_")
        if len(given) != self.n_features_in_:
            raise ValueError(f"input_features has {len(given)} names; expected {self.n_features_in_}")
        return given

    def fit(self: _S, X: Any, y: Any = None) -> _S:
        """Learn from X alone, forgetting earlier fits.

        Parameters
        ----------
        X : array_like
            Shape (samples, features): float32 or float64; other real numbers are converted to float64. NaN is ignored.
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        TypeError
            X is sparse, or holds what is no number.
        ValueError
            X does not have two axes, holds no values, complex ones or infinity, or a column whose range, mean or sum of
            squared deviations is beyond the largest float; a constructor's argument is out of range. The scaler is then
            as it was.
        """
        return self._learn(X, first=True)

    def partial_fit(self: _S, X: Any, y: Any = None) -> _S:
        """Learn from X beside all that was seen before: chunk after chunk gives what one `fit` of them all gives.

        Parameters
        ----------
        X : array_like
            As in `fit`, with the features of the first chunk.
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            As `fit`; the number or the names of the features differ. The scaler is then as it was.
        """
        return self._learn(X, first=not self.__sklearn_is_fitted__())

    def _learn(self: _S, X: Any, *, first: bool) -> _S:
        raise NotImplementedError

    def transform(self, X: Any) -> Array:
        raise NotImplementedError

    def fit_transform(self, X: Any, y: Any = None) -> Array:
        """`fit`, then `transform` of the same X.

        Parameters
        ----------
        X : array_like
            As in `fit`.
        y : ignored

        Returns
        -------
        ndarray

        Raises
        ------
        TypeError, ValueError
            As `fit`.
        """
        return self.fit(X).transform(X)


def _affine(x: Array, mean: Any, var: Any, weight: Any, bias: Any, out: Array) -> Array:
    """(x - mean) / sqrt(var) * weight + bias, column by column, by the kernel that normalises with given statistics."""
    columns = x.shape[1]

    def full(value: Any, dtype: Any) -> Array:
        with np.errstate(over="ignore"):
            return np.broadcast_to(np.asarray(value).astype(dtype), (columns,))

    weight = None if weight is None else full(weight, x.dtype)
    bias = None if bias is None else full(bias, x.dtype)
    return batch_norm(x, full(mean, np.float64), full(var, np.float64), weight, bias, eps=0.0, out=out)


class StandardScaler(_Scaler):
    """Bring every column to mean 0 and variance 1: (x - mean_) / scale_.

    mean_ and var_ are the mean and the biased variance of the column's values that are not NaN, scale_ is sqrt(var_),
    or 1 for a column that is constant up to rounding.

    Parameters
    ----------
    copy : bool, default True
        False overwrites an X of float32 or float64 with its result.
    with_mean, with_std : bool, default True
        Whether to subtract the mean, whether to divide by the scale.

    Attributes
    ----------
    mean_, var_ : ndarray of float64 or None
        NaN for a column without any value. var_ is None without with_std; mean_ is None without both.
    scale_ : ndarray of float64 or None
        None without with_std.
    n_samples_seen_ : int or ndarray of int
        Values seen in each column; a single number where all columns have as many.
    n_features_in_ : int
    feature_names_in_ : ndarray of str objects
        Only where X was a data frame whose column names are all strings.

    Notes
    -----
    Statistics are float64 whatever X is, and exact to a few of its units in the last place: a column of float32 values
    far from 0 loses nothing in `fit`, and nothing in `transform` either, which scikit-learn's does, for it rounds mean_
    to float32 first. A column counts as constant under scikit-learn's rule, var_ <= n u var_ + (n u mean_)^2 with u the
    float64 round-off of 2.2e-16.

    A column of nothing but NaN is no error: its statistics are NaN until `partial_fit` brings values.

    References
    ----------
    T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance", 1983.
    F. Pedregosa et al., "Scikit-learn: Machine Learning in Python", JMLR 12, 2011.
    """

    _seen_: _Moments
    mean_: Array | None
    var_: Array | None
    scale_: Array | None

    def __init__(self, *, copy: bool = True, with_mean: bool = True, with_std: bool = True) -> None:
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std

    def _learn(self, X: Any, *, first: bool) -> StandardScaler:
        table, remember = self._begin_fit(X, first)
        count, mean, m2 = _column_moments(table)
        if not first:
            count, mean, m2 = _merged(self._seen_, (count, mean, m2))
        known = np.greater(count, 0)
        _refuse_overflow(mean, known & (self.with_mean or self.with_std), "a mean")
        _refuse_overflow(m2, known & self.with_std, "squared deviations whose sum is")
        remember()
        self._seen_ = count, mean, m2
        self.n_samples_seen_ = count
        self.mean_ = mean if self.with_mean or self.with_std else None
        self.var_ = self.scale_ = None
        if self.with_std:
            with np.errstate(all="ignore"):
                var = m2 / count
                # The error that a two-pass variance may have: less than that is not told from a constant.
                unit = np.finfo(np.float64).eps
                constant = var <= count * unit * var + (count * mean * unit) ** 2
            self.var_ = var
            self.scale_ = np.where(constant, 1.0, np.sqrt(var))
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Array:
        """(X - mean_) / scale_.

        Parameters
        ----------
        X : array_like
            Shape (samples, features), as in `fit`. NaN stays NaN.
        copy : bool, optional
            In place of the constructor's.

        Returns
        -------
        ndarray
            float32 where X is, float64 otherwise.

        Raises
        ------
        NotFittedError
            A ValueError and an AttributeError.
        TypeError, ValueError
            X is not as in `fit`.
        """
        table, out = self._begin_transform(X, copy)
        mean, scale = self._used()
        if bool(np.all((scale > 1e-150) & (scale < 1e150) | np.isnan(scale))):
            # The root of a float64's square is that float64, unless the square leaves the range.
            return _affine(table, mean, scale * scale, None, None, out)
        with np.errstate(all="ignore"):
            return np.divide(np.subtract(table, mean), scale, out=out, casting="same_kind")

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Array:
        """X * scale_ + mean_, which `transform` came from.

        Parameters
        ----------
        X : array_like
            Shape (samples, features). NaN stays NaN.
        copy : bool, optional
            In place of the constructor's.

        Returns
        -------
        ndarray
            float32 where X is, float64 otherwise.

        Raises
        ------
        NotFittedError
            A ValueError and an AttributeError.
        TypeError, ValueError
            X is not as in `fit`.
        """
        table, out = self._begin_transform(X, copy, named=False)
        mean, scale = self._used()
        return _affine(table, 0.0, 1.0, scale, mean, out)

    def _used(self) -> tuple[Array, Array]:
        """The mean to subtract and the scale to divide by, as the flags have it."""
        mean = self.mean_ if self.with_mean and self.mean_ is not None else np.zeros(self.n_features_in_)
        scale = self.scale_ if self.with_std and self.scale_ is not None else np.ones(self.n_features_in_)
        return np.asarray(mean, np.float64), np.asarray(scale, np.float64)


class MinMaxScaler(_Scaler):
    """Bring every column into a range: (x - data_min_) / (data_max_ - data_min_), stretched to `feature_range`.

    Parameters
    ----------
    feature_range : (float, float), default (0, 1)
        Where the smallest and the largest value of each column go.
    copy : bool, default True
        False overwrites an X of float32 or float64 with its result.
    clip : bool, default False
        Whether values outside what `fit` saw end at the ends of the range.

    Attributes
    ----------
    data_min_, data_max_, data_range_ : ndarray
        Of X's dtype, without regard to NaN; NaN for a column without any value.
    scale_, min_ : ndarray
        transform(x) = x * scale_ + min_. A column whose range is below 10 round-offs of its dtype has the range 1.
    n_samples_seen_ : int
    n_features_in_ : int
    feature_names_in_ : ndarray of str objects
        Only where X was a data frame whose column names are all strings.

    Notes
    -----
    Computed as (x - data_min_) * scale_ + feature_range[0]: the same as x * scale_ + min_ but for its rounding error,
    which does not grow with the distance of the column from 0.

    References
    ----------
    F. Pedregosa et al., "Scikit-learn: Machine Learning in Python", JMLR 12, 2011.
    """

    data_min_: Array
    data_max_: Array
    data_range_: Array
    scale_: Array
    min_: Array

    def __init__(self, feature_range: tuple[float, float] = (0, 1), *, copy: bool = True, clip: bool = False) -> None:
        self.feature_range = feature_range
        self.copy = copy
        self.clip = clip

    def _range(self) -> tuple[float, float]:
        try:
            low, high = self.feature_range
        except (TypeError, ValueError) as error:
            raise TypeError(f"feature_range is {self.feature_range!r}; expected two numbers (low, high)") from error
        low, high = _check.number("feature_range", low), _check.number("feature_range", high)
        if not low < high or np.isinf(low) or np.isinf(high):
            raise ValueError(f"feature_range is {self.feature_range!r}; expected (low, high), finite, low < high")
        return low, high

    def _learn(self, X: Any, *, first: bool) -> MinMaxScaler:
        low, high = self._range()
        table, remember = self._begin_fit(X, first)
        data_min, data_max = _extremes(table)
        count = table.shape[0]
        if not first:
            data_min, data_max = np.fmin(self.data_min_, data_min), np.fmax(self.data_max_, data_max)
            count += self.n_samples_seen_
        with np.errstate(all="ignore"):
            data_range = data_max - data_min
        _refuse_overflow(data_range, ~np.isnan(data_min), "a range")
        remember()
        self.n_samples_seen_ = count
        self.data_min_, self.data_max_, self.data_range_ = data_min, data_max, data_range
        with np.errstate(all="ignore"):
            kind = self.data_range_.dtype.type
            narrow = self.data_range_ < 10 * np.finfo(kind).eps
            self.scale_ = (kind(high) - kind(low)) / np.where(narrow, kind(1), self.data_range_)
            self.min_ = kind(low) - data_min * self.scale_
        return self

    def transform(self, X: Any) -> Array:
        """X * scale_ + min_.

        Parameters
        ----------
        X : array_like
            Shape (samples, features), as in `fit`. NaN stays NaN.

        Returns
        -------
        ndarray
            float32 where X is, float64 otherwise.

        Raises
        ------
        NotFittedError
            A ValueError and an AttributeError.
        TypeError, ValueError
            X is not as in `fit`.
        """
        low, high = self._range()
        table, out = self._begin_transform(X, None)
        _affine(table, self.data_min_, 1.0, self.scale_, low, out)
        return np.clip(out, low, high, out=out) if self.clip else out

    def inverse_transform(self, X: Any) -> Array:
        """(X - min_) / scale_, which `transform` came from.

        Parameters
        ----------
        X : array_like
            Shape (samples, features). NaN stays NaN.

        Returns
        -------
        ndarray
            float32 where X is, float64 otherwise.

        Raises
        ------
        NotFittedError
            A ValueError and an AttributeError.
        TypeError, ValueError
            X is not as in `fit`.
        """
        low, _ = self._range()
        table, out = self._begin_transform(X, None, named=False)
        with np.errstate(all="ignore"):
            return _affine(table, low, 1.0, 1.0 / self.scale_, self.data_min_, out)
