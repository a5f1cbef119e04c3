"""Layers: the norms and dropout of this package with their parameters, gradients and running statistics held for you.

Constructed as PyTorch's modules of the same names, with the same entries in `state_dict`, so that a trained state moves
either way. A layer computes nothing itself: every number comes from the functions, and so do the messages about x.
Refuses to be a framework: no graph, no optimiser; `forward`, then `backward`, in the order that the program says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import _check, _philox
from ._batch_norm import batch_norm_backward, batch_norm_forward
from ._dropout import drop_connect_backward, drop_connect_forward, dropout_backward, dropout_forward
from ._group_norm import group_norm_backward, group_norm_forward
from ._instance_norm import instance_norm_backward, instance_norm_forward
from ._layer_norm import layer_norm_backward, layer_norm_forward
from ._moments import moments
from ._philox import Philox, Rng
from ._results import Array
from ._rms_norm import rms_norm_backward, rms_norm_forward

__all__ = [
    "BatchNorm",
    "DropConnect",
    "Dropout",
    "GroupNorm",
    "IncompatibleKeys",
    "InstanceNorm",
    "Layer",
    "LayerNorm",
    "RMSNorm",
]

_L = TypeVar("_L", bound="Layer")


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(..., strict=False)` passed over.

    Attributes
    ----------
    missing_keys, unexpected_keys : list of str
        Entries that the layer has and the state has not, and the other way round.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def _size(name: str, value: Any) -> int:
    found = _check.integer(name, value)
    if found < 1:
        raise ValueError(f"{name} is {found}; expected at least 1")
    return found


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected True or False")
    return bool(value)


def _eps(value: Any) -> float:
    found = _check.number("eps", value, 0.0)
    if math.isinf(found):
        raise ValueError(f"eps is {value!r}; expected a finite number")
    return found


def _input(x: Any, wanted: np.dtype[Any] | None) -> Array:
    """x as an array, of the dtype that is wanted, if any is."""
    given = _check.array("x", x)
    if wanted is not None and given.dtype != wanted:
        raise TypeError(
            f"x has dtype {given.dtype}; expected {wanted}, the dtype of the layer: use "
            f"{_check.conversion('x', x, f'np.{wanted}')}, or make the layer with dtype=np.{given.dtype}"
        )
    return given


def _channels(x: Array, rank: int, channel_axis: int, name: str, wanted: int) -> tuple[Array, int]:
    """x, and its channel axis, which has `wanted` channels."""
    _check.rank("x", x, rank)
    axis = _check.axis("channel_axis", channel_axis, x.ndim)
    if x.shape[axis] != wanted:
        raise ValueError(
            f"x has shape {_check._shape(x.shape)}, {x.shape[axis]} channels on axis {axis}; "
            f"expected {wanted}, the {name} of the layer"
        )
    return x, axis


class Layer:
    """What all layers have in common: a mode, parameters with their gradients, and a state that can be saved.

    Attributes
    ----------
    training : bool
        The mode: True after `train()` and at first, False after `eval()`.

    Notes
    -----
    A layer keeps what the backward of its last forward needs, x among it, until the next forward. It is one object
    with a state, so two threads must not use one layer at once.
    """

    #: Entries of the state that are updated by gradients, and those that a forward updates.
    _parameter_names: tuple[str, ...] = ()
    _buffer_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.training = True
        self._gradients: dict[str, Array | None] = {}
        self._cache: Any = None

    def forward(self, x: Any) -> Array:
        """The layer's output for x; also remembers what `backward` needs."""
        raise NotImplementedError

    def __call__(self, x: Any) -> Array:
        return self.forward(x)

    def backward(self, dy: Any) -> Array:
        """The gradient with respect to x of the last forward; overwrites the gradients of the parameters.

        Parameters
        ----------
        dy : array_like
            Gradient of the loss with respect to the last forward's result: its shape and dtype.

        Returns
        -------
        ndarray
            dx, of x's shape and dtype.

        Raises
        ------
        TypeError, ValueError
            dy does not fit the last forward, or there was none. The gradients are then as they were.
        """
        raise NotImplementedError

    def _saved(self) -> Any:
        if self._cache is None:
            raise ValueError(f"{type(self).__name__}.backward needs a forward before it: call forward(x) first")
        return self._cache

    def train(self: _L, mode: bool = True) -> _L:
        """Turn training on (or off, with mode=False); returns the layer."""
        self.training = _flag("mode", mode)
        return self

    def eval(self: _L) -> _L:
        """Turn training off, as for inference; returns the layer."""
        return self.train(False)

    def parameters(self) -> dict[str, Array]:
        """The parameters by name: the arrays themselves, so that updating them in place trains the layer."""
        found = {name: getattr(self, name) for name in self._parameter_names}
        return {name: value for name, value in found.items() if value is not None}

    def gradients(self) -> dict[str, Array | None]:
        """The gradients by the names of `parameters()`, as the last `backward` left them; None before the first."""
        return {name: self._gradients.get(name) for name in self.parameters()}

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters and running statistics, by PyTorch's names.

        Returns
        -------
        dict of str to ndarray
            `weight`, `bias`, `running_mean`, `running_var` and `num_batches_tracked` (int64, no axes), those that the
            layer has, in this order. Later training does not change them.
        """
        state = {name: value.copy() for name, value in self.parameters().items()}
        for name in self._buffer_names:
            value = getattr(self, name)
            if value is not None:
                state[name] = np.array(value, np.int64 if name == "num_batches_tracked" else None)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Take parameters and running statistics from a state: of this class, or of PyTorch's module of this name.

        Parameters
        ----------
        state_dict : mapping of str to array_like
            Entries as in `state_dict()`; tensors on the CPU will do as well as arrays. They are copied into the
            layer's own arrays.
        strict : bool, default True
            False passes over entries that are missing or unexpected.

        Returns
        -------
        IncompatibleKeys
            The names passed over; both lists are empty with strict=True.

        Raises
        ------
        TypeError
            An entry's dtype is not the layer's: nothing is cast.
        ValueError
            Entries are missing, unexpected or of another shape, running_var or num_batches_tracked is negative. The
            message names all of them. Nothing has been changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}; expected a mapping from names to arrays")
        own = self.state_dict()
        missing = [name for name in own if name not in state_dict]
        unexpected = [name for name in state_dict if name not in own]
        wrong: list[str] = []
        if _flag("strict", strict):
            wrong += [f"{name} is missing (shape {_check._shape(own[name].shape)})" for name in missing]
            wrong += [f"{name} is unexpected" for name in unexpected]
        found: dict[str, Array] = {}
        wrong_dtypes: list[str] = []
        for name in own:
            if name not in state_dict:
                continue
            value, want = _check.as_ndarray(f"state_dict[{name!r}]", state_dict[name]), own[name]
            counts = name == "num_batches_tracked"
            if value.shape != want.shape:
                wrong.append(f"{name} has shape {_check._shape(value.shape)}, expected {_check._shape(want.shape)}")
            elif value.dtype.kind not in "iu" if counts else value.dtype != want.dtype:
                wrong_dtypes.append(
                    f"{name} has dtype {value.dtype}, expected {'an integer' if counts else want.dtype}"
                )
            elif name in ("running_var", "num_batches_tracked") and bool(np.any(value < 0)):
                wrong.append(f"{name} holds {value.min()!r}, expected no negative values")
            # A copy, for the state may hold this layer's own arrays under other names.
            found[name] = value.copy()
        if wrong or wrong_dtypes:
            error = ValueError if wrong else TypeError
            raise error(f"state_dict does not fit this {type(self).__name__}: {'; '.join(wrong + wrong_dtypes)}")
        for name, value in found.items():
            if name == "num_batches_tracked":
                setattr(self, name, int(value))
            else:
                np.copyto(getattr(self, name), value)
        return IncompatibleKeys(missing, unexpected)

    def _describe(self) -> str:
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._describe()})"

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: everything but what the last forward left, which belongs to its arrays."""
        return self.__dict__ | {"_cache": None}


class _Norm(Layer):
    """A layer with a weight and a bias, either of which may be None."""

    _parameter_names: tuple[str, ...] = ("weight", "bias")

    weight: Array | None
    bias: Array | None

    def __init__(self, shape: tuple[int, ...], weight: bool, bias: bool, eps: Any, dtype: Any) -> None:
        super().__init__()
        self.eps = _eps(eps)
        self.dtype = _check.float_dtype("dtype", dtype)
        self.weight = np.ones(shape, self.dtype) if weight else None
        self.bias = np.zeros(shape, self.dtype) if bias else None

    def _of_weight(self) -> np.dtype[Any] | None:
        return None if self.weight is None else self.weight.dtype

    def _keep(self, grads: tuple[Array, Array | None, Array | None]) -> Array:
        dx, self._gradients["weight"], self._gradients["bias"] = grads
        return dx


class _ChannelNorm(_Norm):
    """A norm whose parameters run along the channels; with running statistics where they are asked for."""

    _buffer_names = ("running_mean", "running_var", "num_batches_tracked")
    _least_rank = 2

    def __init__(
        self,
        num_features: Any,
        eps: Any,
        momentum: Any,
        affine: Any,
        track_running_stats: Any,
        channel_axis: Any,
        dtype: Any,
    ) -> None:
        self.num_features = _size("num_features", num_features)
        self.affine = _flag("affine", affine)
        super().__init__((self.num_features,), self.affine, self.affine, eps, dtype)
        self.momentum = None if momentum is None else _check.number("momentum", momentum, 0.0, 1.0)
        self.track_running_stats = _flag("track_running_stats", track_running_stats)
        self.channel_axis = _check.integer("channel_axis", channel_axis)
        self.running_mean = np.zeros(self.num_features, self.dtype) if self.track_running_stats else None
        self.running_var = np.ones(self.num_features, self.dtype) if self.track_running_stats else None
        self.num_batches_tracked: int | None = 0 if self.track_running_stats else None

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batches seen."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean[...], self.running_var[...], self.num_batches_tracked = 0, 1, 0

    def _checked(self, x: Any) -> tuple[Array, int]:
        # Running statistics may be kept more precisely than x.
        x = _input(x, self._of_weight() or (None if self.running_mean is None else self.dtype))
        return _channels(x, self._least_rank, self.channel_axis, "num_features", self.num_features)

    def _with_running_statistics(self, x: Array) -> Array:
        y, self._cache = batch_norm_forward(
            x,
            self.weight,
            self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            channel_axis=self.channel_axis,
            eps=self.eps,
            training=False,
        )
        return y

    def _describe(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, channel_axis={self.channel_axis}, dtype={self.dtype}"
        )


class BatchNorm(_ChannelNorm):
    """Batch normalization of any rank, as PyTorch's BatchNorm1d, BatchNorm2d and BatchNorm3d.

    y = (x - mean) / sqrt(var + eps) * weight + bias, channel by channel: in training with the mean and the biased
    variance of the batch, which also move the running statistics; in evaluation with the running statistics, or with
    those of the batch where there are none.

    Parameters
    ----------
    num_features : int
        The number of channels C.
    eps : float, default 1e-5
        Added to the variance, >= 0.
    momentum : float or None, default 0.1
        The weight of the new batch in running = (1 - momentum) * running + momentum * batch. None takes
        1 / num_batches_tracked, so that the running statistics are the plain average over all batches.
    affine : bool, default True
        Whether there are a weight (at first 1) and a bias (at first 0), of shape (C,).
    track_running_stats : bool, default True
        Whether there are running statistics.
    channel_axis : int, default 1
        Where the channels are. Axis 0 is the batch, or axis 1 where the channels are axis 0.
    dtype : numpy.float32 or numpy.float64, default numpy.float32
        Of the parameters and running statistics, and so of x.

    Attributes
    ----------
    weight, bias : ndarray or None
        The parameters, updated in place by whoever trains.
    running_mean, running_var : ndarray or None
        At first 0 and 1; the variance is the unbiased one.
    num_batches_tracked : int or None
        How many batches have moved them. An empty batch does not count.

    Raises
    ------
    TypeError, ValueError
        At construction and in `forward`, as from `fastnorm.batch_norm_forward`; nothing has been changed then.

    References
    ----------
    S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        channel_axis: int = 1,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, channel_axis, dtype)

    def forward(self, x: Any) -> Array:
        """Normalise x of shape (N, C, ...), or with the channels on `channel_axis`; the mode decides with what."""
        x, _ = self._checked(x)
        if self.running_mean is not None and not self.training:
            return self._with_running_statistics(x)
        tracked = None if self.num_batches_tracked is None else self.num_batches_tracked + (x.size > 0)
        momentum = self.momentum
        if momentum is None and tracked:
            momentum = 1.0 / tracked
        y, self._cache = batch_norm_forward(
            x,
            self.weight,
            self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            momentum=momentum,
            channel_axis=self.channel_axis,
            eps=self.eps,
        )
        self.num_batches_tracked = tracked
        return y

    def backward(self, dy: Any) -> Array:
        return self._keep(batch_norm_backward(dy, self._saved()))


class InstanceNorm(_ChannelNorm):
    """Instance normalization of any rank from 3, as PyTorch's InstanceNorm1d, InstanceNorm2d and InstanceNorm3d.

    y = (x - mean) / sqrt(var + eps) * weight + bias with the mean and the biased variance over the spatial axes of each
    channel of each sample. With `track_running_stats`, training moves running statistics by the batch's average of
    those means and (unbiased) variances, and evaluation normalises with the running ones.

    Parameters
    ----------
    num_features : int
        The number of channels C.
    eps : float, default 1e-5
        Added to the variance, >= 0.
    momentum : float or None, default 0.1
        The weight of the new batch in the running statistics. None averages over all batches, as in `BatchNorm`
        (PyTorch's InstanceNorm leaves them at 0 and 1 then).
    affine : bool, default False
        Whether there are a weight (at first 1) and a bias (at first 0), of shape (C,).
    track_running_stats : bool, default False
        Whether there are running statistics.
    channel_axis : int, default 1
        Where the channels are. Axis 0 is the batch, or axis 1 where the channels are axis 0.
    dtype : numpy.float32 or numpy.float64, default numpy.float32
        Of the parameters and running statistics, and so of x.

    Attributes
    ----------
    weight, bias : ndarray or None
        The parameters, updated in place by whoever trains.
    running_mean, running_var : ndarray or None
        At first 0 and 1.
    num_batches_tracked : int or None
        Counts the batches where momentum is None; stays 0 otherwise, as PyTorch's does.

    Raises
    ------
    TypeError, ValueError
        At construction and in `forward`, as from `fastnorm.instance_norm_forward`; a single value per channel where
        running statistics are to be moved. Nothing has been changed then.

    References
    ----------
    D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization", 2016, arXiv:1607.08022.
    """

    _least_rank = 3

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        channel_axis: int = 1,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, channel_axis, dtype)

    def forward(self, x: Any) -> Array:
        """Normalise x of shape (N, C, ...), or with the channels on `channel_axis`; the mode decides with what."""
        x, axis = self._checked(x)
        if self.running_mean is not None and not self.training:
            return self._with_running_statistics(x)
        batch = self._statistics(x, axis) if self.running_mean is not None and x.size > 0 else None
        y, self._cache = instance_norm_forward(x, self.weight, self.bias, channel_axis=self.channel_axis, eps=self.eps)
        if batch is not None:
            self._move(*batch)
        return y

    def _statistics(self, x: Array, axis: int) -> tuple[Array, Array]:
        """The averages over the samples of each channel's mean and unbiased variance."""
        sample_axis = 1 if axis == 0 else 0
        m = moments(x, tuple(a for a in range(x.ndim) if a not in (axis, sample_axis)))
        if m.count < 2:
            raise ValueError(
                f"x has shape {_check._shape(x.shape)}, one value per channel of a sample, which has no variance; "
                "expected at least two to move running statistics: construct with track_running_stats=False"
            )
        over_samples = 1 if axis == 0 else 0
        return m.mean.mean(axis=over_samples), m.var(ddof=1).mean(axis=over_samples)

    def _move(self, mean: Array, var: Array) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        momentum = self.momentum
        if momentum is None:
            self.num_batches_tracked += 1
            momentum = 1.0 / self.num_batches_tracked
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            running[...] = (1.0 - momentum) * running.astype(np.float64) + momentum * batch

    def backward(self, dy: Any) -> Array:
        cache = self._saved()
        found = (batch_norm_backward if cache.function == "batch_norm" else instance_norm_backward)(dy, cache)
        return self._keep(found)


class GroupNorm(_Norm):
    """Group normalization of any rank, as PyTorch's GroupNorm.

    y = (x - mean) / sqrt(var + eps) * weight + bias with the mean and the biased variance over a group of channels and
    the spatial axes of each sample; the same in training and evaluation.

    Parameters
    ----------
    num_groups : int
        Into how many groups the channels are divided; it must divide num_channels.
    num_channels : int
        The number of channels C.
    eps : float, default 1e-5
        Added to the variance, >= 0.
    affine : bool, default True
        Whether there are a weight (at first 1) and a bias (at first 0), of shape (C,).
    channel_axis : int, default 1
        Where the channels are. Axis 0 is the batch, or axis 1 where the channels are axis 0.
    dtype : numpy.float32 or numpy.float64, default numpy.float32
        Of the parameters, and so of x.

    Attributes
    ----------
    weight, bias : ndarray or None
        The parameters, updated in place by whoever trains.

    Raises
    ------
    TypeError, ValueError
        At construction and in `forward`, as from `fastnorm.group_norm_forward`.

    References
    ----------
    Y. Wu and K. He, "Group Normalization", 2018, arXiv:1803.08494.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        channel_axis: int = 1,
        dtype: Any = np.float32,
    ) -> None:
        self.num_groups, self.num_channels = _size("num_groups", num_groups), _size("num_channels", num_channels)
        if self.num_channels % self.num_groups:
            raise ValueError(
                f"num_groups is {self.num_groups}; expected a divisor of num_channels, {self.num_channels}"
            )
        self.affine = _flag("affine", affine)
        self.channel_axis = _check.integer("channel_axis", channel_axis)
        super().__init__((self.num_channels,), self.affine, self.affine, eps, dtype)

    def forward(self, x: Any) -> Array:
        """Normalise x of shape (N, C, ...), or with the channels on `channel_axis`."""
        x = _input(x, self._of_weight())
        x, _ = _channels(x, 2, self.channel_axis, "num_channels", self.num_channels)
        y, self._cache = group_norm_forward(
            x, self.num_groups, self.weight, self.bias, channel_axis=self.channel_axis, eps=self.eps
        )
        return y

    def backward(self, dy: Any) -> Array:
        return self._keep(group_norm_backward(dy, self._saved()))

    def _describe(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}, affine={self.affine}, "
            f"channel_axis={self.channel_axis}, dtype={self.dtype}"
        )


class _RowNorm(_Norm):
    """A norm over the last axes, whose shape is the layer's."""

    def __init__(self, normalized_shape: Any, weight: bool, bias: bool, eps: Any, dtype: Any) -> None:
        given = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        if isinstance(normalized_shape, str) or len(given) == 0:
            raise ValueError(f"normalized_shape is {normalized_shape!r}; expected an int or at least one of them")
        self.normalized_shape = tuple(_size("normalized_shape", n) for n in given)
        self.elementwise_affine = weight
        super().__init__(self.normalized_shape, weight, bias, eps, dtype)

    def _checked(self, x: Any) -> tuple[Array, int]:
        """x, and its first normalised axis."""
        x = _input(x, self._of_weight())
        axis = -len(self.normalized_shape)
        if x.ndim < -axis or x.shape[axis:] != self.normalized_shape:
            ending = ", ".join(map(str, self.normalized_shape))
            raise ValueError(
                f"x has shape {_check._shape(x.shape)}; expected (..., {ending}), the normalized_shape of the layer"
            )
        return x, axis

    def _describe(self) -> str:
        bias = f", bias={self.bias is not None}" if "bias" in self._parameter_names and self.elementwise_affine else ""
        return (
            f"{self.normalized_shape}, eps={self.eps:g}, elementwise_affine={self.elementwise_affine}{bias}, "
            f"dtype={self.dtype}"
        )


class LayerNorm(_RowNorm):
    """Layer normalization over the last axes, as PyTorch's LayerNorm.

    y = (x - mean) / sqrt(var + eps) * weight + bias with the mean and the biased variance of each sample over the axes
    of `normalized_shape`; the same in training and evaluation.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The shape of the axes that are normalised together: x.shape ends in it.
    eps : float, default 1e-5
        Added to the variance, >= 0.
    elementwise_affine : bool, default True
        Whether there is a weight, at first 1, of `normalized_shape`.
    bias : bool, default True
        Whether there is a bias, at first 0, beside the weight.
    dtype : numpy.float32 or numpy.float64, default numpy.float32
        Of the parameters, and so of x.

    Attributes
    ----------
    weight, bias : ndarray or None
        The parameters, updated in place by whoever trains.

    Raises
    ------
    TypeError, ValueError
        At construction and in `forward`, as from `fastnorm.layer_norm_forward`.

    References
    ----------
    J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: Any = np.float32,
    ) -> None:
        affine = _flag("elementwise_affine", elementwise_affine)
        super().__init__(normalized_shape, affine, _flag("bias", bias) and affine, eps, dtype)

    def forward(self, x: Any) -> Array:
        """Normalise x, whose last axes are `normalized_shape`."""
        x, axis = self._checked(x)
        y, self._cache = layer_norm_forward(x, self.weight, self.bias, axis=axis, eps=self.eps)
        return y

    def backward(self, dy: Any) -> Array:
        return self._keep(layer_norm_backward(dy, self._saved()))


class RMSNorm(_RowNorm):
    """Root-mean-square normalization over the last axes, as PyTorch's RMSNorm.

    y = x / sqrt(mean(x^2) + eps) * weight over the axes of `normalized_shape`; the same in training and evaluation.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The shape of the axes that are normalised together: x.shape ends in it.
    eps : float, default 1e-5
        Added to the mean square, >= 0. (PyTorch's default is the round-off unit of x's dtype.)
    elementwise_affine : bool, default True
        Whether there is a weight, at first 1, of `normalized_shape`.
    dtype : numpy.float32 or numpy.float64, default numpy.float32
        Of the weight, and so of x.

    Attributes
    ----------
    weight : ndarray or None
        The parameter, updated in place by whoever trains.

    Raises
    ------
    TypeError, ValueError
        At construction and in `forward`, as from `fastnorm.rms_norm_forward`.

    References
    ----------
    B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """

    _parameter_names = ("weight",)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        *,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(normalized_shape, _flag("elementwise_affine", elementwise_affine), False, eps, dtype)

    def forward(self, x: Any) -> Array:
        """Normalise x, whose last axes are `normalized_shape`."""
        x, axis = self._checked(x)
        y, self._cache = rms_norm_forward(x, self.weight, axis=axis, eps=self.eps)
        return y

    def backward(self, dy: Any) -> Array:
        return self._keep(rms_norm_backward(dy, self._saved()))


def _stream(rng: Any) -> Philox | np.random.Generator:
    """Where a layer's masks come from, call after call: a seed starts a stream, others are used as they are."""
    _philox.require(rng)
    return rng if isinstance(rng, (Philox, np.random.Generator)) else Philox(rng)


class Dropout(Layer):
    """Dropout: in training each element is zero with probability p and the others are divided by P(keep).

    In evaluation y is a copy of x.

    Parameters
    ----------
    p : float, default 0.5
        The probability of dropping, 0 to 1.
    rng : int, numpy.random.Generator or fastnorm.Philox
        A seed starts a stream of its own; a generator or a stream is shared with whoever else draws from it. Every
        forward in training draws a new mask.
    shared_axes : int or tuple of int, default ()
        One draw is shared along these axes: (2, 3) drops whole channels of an (N, C, H, W) array, as PyTorch's
        Dropout2d.

    Raises
    ------
    TypeError, ValueError
        At construction and in `forward`, as from `fastnorm.dropout_forward`.

    References
    ----------
    N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, "Dropout: a simple way to prevent neural
    networks from overfitting", JMLR 15, 2014.
    """

    def __init__(self, p: float = 0.5, *, rng: Rng, shared_axes: int | tuple[int, ...] = ()) -> None:
        super().__init__()
        self.p = _check.number("p", p, 0.0, 1.0)
        self.rng = _stream(rng)
        self.shared_axes = shared_axes
        _check.axes("shared_axes", shared_axes, _check.MAX_RANK)

    def forward(self, x: Any) -> Array:
        """Drop in training; copy in evaluation, which draws nothing."""
        p, rng = (self.p, self.rng) if self.training else (0.0, 0)
        y, self._cache = dropout_forward(x, p, rng=rng, shared_axes=self.shared_axes)
        return y

    def backward(self, dy: Any) -> Array:
        return dropout_backward(dy, self._saved())

    def _describe(self) -> str:
        return f"p={self.p:g}, rng={self.rng!r}" + (f", shared_axes={self.shared_axes}" if self.shared_axes else "")


class DropConnect(Layer):
    """DropConnect: dropout on the weights of a layer; each call draws a new mask in training.

    `forward(weight)` gives the weights to use, `backward(dy)` the gradient of the weights from that of those used. In
    evaluation the weights come back as a copy.

    Parameters
    ----------
    p : float, default 0.5
        The probability of dropping, 0 to 1.
    rng : int, numpy.random.Generator or fastnorm.Philox
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        At construction and in `forward`, as from `fastnorm.drop_connect_forward`.

    References
    ----------
    L. Wan, M. Zeiler, S. Zhang, Y. LeCun and R. Fergus, "Regularization of neural networks using DropConnect", ICML
    2013.
    """

    def __init__(self, p: float = 0.5, *, rng: Rng) -> None:
        super().__init__()
        self.p = _check.number("p", p, 0.0, 1.0)
        self.rng = _stream(rng)

    def forward(self, x: Any) -> Array:
        """The weights x with some dropped in training; a copy in evaluation, which draws nothing."""
        p, rng = (self.p, self.rng) if self.training else (0.0, 0)
        y, self._cache = drop_connect_forward(x, p, rng=rng)
        return y

    def backward(self, dy: Any) -> Array:
        return drop_connect_backward(dy, self._saved())

    def _describe(self) -> str:
        return f"p={self.p:g}, rng={self.rng!r}"
