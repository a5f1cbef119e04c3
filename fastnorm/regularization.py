"""Regularisers that are not layers: weight penalties, label smoothing, adversarial steps, early stopping.

Each function is one formula of the literature on an array that its caller holds. Refuses to know about networks:
gradients come in, penalties and targets go out, and nothing is remembered but what `EarlyStopping` has observed.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np

from . import _check
from ._results import Array

__all__ = [
    "EarlyStopping",
    "fgsm_perturbation",
    "l1_penalty",
    "l2_penalty",
    "label_smoothing",
    "weight_decay_",
]


def _finite(name: str, value: Any) -> float:
    """A finite number >= 0."""
    found = _check.number(name, value, 0.0)
    if math.isinf(found):
        raise ValueError(f"{name} is {value!r}; expected a finite number")
    return found


def l1_penalty(weight: Any, strength: float) -> tuple[float, Array]:
    """The L1 penalty and its gradient: strength * sum(abs(weight)), strength * sign(weight).

    Parameters
    ----------
    weight : array_like
        float32 or float64, any shape.
    strength : float
        The factor lambda, >= 0.

    Returns
    -------
    value : float
        Summed in float64.
    gradient : ndarray
        Of weight's shape and dtype; 0 where weight is 0, where the penalty has no derivative but 0 is a subgradient.

    Raises
    ------
    TypeError
        weight is not of float32 or float64, or strength is not a number.
    ValueError
        strength is negative, infinite or NaN.

    References
    ----------
    R. Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
    """
    weight, strength = _check.array("weight", weight), _finite("strength", strength)
    value = strength * float(np.abs(weight).sum(dtype=np.float64))
    return value, np.asarray(np.sign(weight) * weight.dtype.type(strength))


def l2_penalty(weight: Any, strength: float) -> tuple[float, Array]:
    """The L2 penalty and its gradient: strength / 2 * sum(weight^2), strength * weight.

    Parameters
    ----------
    weight : array_like
        float32 or float64, any shape.
    strength : float
        The factor lambda, >= 0. With the half in front, gradient descent at rate eta multiplies the weight by
        1 - eta * lambda, as `weight_decay_` does.

    Returns
    -------
    value : float
        Summed in float64.
    gradient : ndarray
        Of weight's shape and dtype.

    Raises
    ------
    TypeError
        weight is not of float32 or float64, or strength is not a number.
    ValueError
        strength is negative, infinite or NaN.

    References
    ----------
    A. Krogh and J. A. Hertz, "A Simple Weight Decay Can Improve Generalization", 1991.
    """
    weight, strength = _check.array("weight", weight), _finite("strength", strength)
    value = 0.5 * strength * float(np.square(weight, dtype=np.float64).sum())
    return value, np.asarray(weight * weight.dtype.type(strength))


def weight_decay_(weight: Any, strength: float, learning_rate: float) -> Array:
    """Decoupled weight decay, in place: weight <- (1 - learning_rate * strength) * weight.

    To be called beside the optimiser's own step, which sees the gradient of the loss alone: with plain gradient descent
    that equals an L2 penalty, with an adaptive one (Adam) it does not.

    Parameters
    ----------
    weight : ndarray
        float32 or float64, writeable.
    strength : float
        The factor lambda, >= 0.
    learning_rate : float
        The rate eta of the step, >= 0.

    Returns
    -------
    ndarray
        weight itself.

    Raises
    ------
    TypeError
        weight is not an array of float32 or float64, or a number is not one.
    ValueError
        A number is negative, infinite or NaN, learning_rate * strength is above 1 (the sign of the weights would flip),
        or weight cannot be written to. Nothing has been written then.

    References
    ----------
    I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101.
    """
    found = _check.array("weight", weight)
    _check.writeable("weight", weight, found)
    share = _finite("strength", strength) * _finite("learning_rate", learning_rate)
    if not share <= 1:
        raise ValueError(
            f"learning_rate * strength is {learning_rate!r} * {strength!r} = {share:g}; expected at most 1"
        )
    found *= found.dtype.type(1.0 - share)
    kept: Array = weight
    return kept


def label_smoothing(labels: Any, num_classes: int, eps: float = 0.1, *, dtype: Any = np.float32) -> Array:
    """Targets for a classifier: 1 - eps for the true class, eps / (num_classes - 1) for each of the others.

    (Others spread eps over all classes, the true one included: their eps is this one times num_classes /
    (num_classes - 1).)

    Parameters
    ----------
    labels : array_like of int
        The true classes, any shape, 0 to num_classes - 1.
    num_classes : int
        At least 2.
    eps : float, default 0.1
        The probability given away, 0 to 1; 0 gives one-hot targets.
    dtype : numpy.float32 or numpy.float64, default numpy.float32
        Of the result.

    Returns
    -------
    ndarray
        Of shape labels.shape + (num_classes,); each target sums to 1.

    Raises
    ------
    TypeError
        labels are not integers, num_classes is not one, or dtype is neither float32 nor float64.
    ValueError
        A label, num_classes or eps is out of range.

    References
    ----------
    C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens and Z. Wojna, "Rethinking the Inception Architecture for Computer
    Vision", 2015, arXiv:1512.00567.
    """
    found = _check.as_ndarray("labels", labels)
    if found.dtype.kind not in "iu":
        raise TypeError(f"labels has dtype {found.dtype}; expected integers: use np.asarray(labels, dtype=np.intp)")
    classes = _check.integer("num_classes", num_classes)
    if classes < 2:
        raise ValueError(f"num_classes is {classes}; expected at least 2")
    eps = _check.number("eps", eps, 0.0, 1.0)
    dtype = _check.float_dtype("dtype", dtype)
    outside = found[(found < 0) | (found >= classes)]
    if outside.size:
        raise ValueError(f"labels holds {outside.flat[0]}; expected 0 <= label < {classes}, the num_classes")
    targets = np.full((*found.shape, classes), eps / (classes - 1), dtype)
    np.put_along_axis(targets, found.astype(np.intp)[..., None], 1.0 - eps, axis=-1)
    return targets


def fgsm_perturbation(x: Any, dx: Any, eps: float) -> Array:
    """The adversarial example of the fast gradient sign method: x + eps * sign(dx).

    Of all changes of x by at most eps in each value, the one that raises the linearised loss most.

    Parameters
    ----------
    x : array_like
        The example or a batch of them, float32 or float64.
    dx : array_like
        Gradient of the loss with respect to x: x's shape and dtype.
    eps : float
        The size of the change, >= 0.

    Returns
    -------
    ndarray
        A new array of x's shape and dtype; x where dx is 0.

    Raises
    ------
    TypeError
        x is not of float32 or float64, dx's dtype is not x's, or eps is not a number.
    ValueError
        dx's shape is not x's, or eps is negative, infinite or NaN.

    References
    ----------
    I. J. Goodfellow, J. Shlens and C. Szegedy, "Explaining and Harnessing Adversarial Examples", 2014, arXiv:1412.6572.
    """
    x = _check.array("x", x)
    dx = _check.same("dx", dx, x.shape, x.dtype)
    step: Array = np.asarray(np.sign(dx))  # of no axes it would be a scalar
    step *= x.dtype.type(_finite("eps", eps))
    step += x
    return step


class EarlyStopping:
    """Says when a validation loss has stopped falling, and keeps the state of the moment when it was lowest.

    An observation is an improvement when it is below the best so far by more than `min_delta`. Training should stop
    after `patience` observations in a row without one: a shorter rise may precede another fall.

    Parameters
    ----------
    patience : int
        How many observations without improvement are borne, at least 1.
    min_delta : float, default 0.0
        How much lower a loss has to be to count, >= 0.

    Attributes
    ----------
    patience, min_delta : int, float
        As given.
    observations : int
        How many there have been.
    waited : int
        How many of the last ones in a row were no improvement.
    should_stop : bool
        Whether `waited` has reached `patience`.

    Raises
    ------
    TypeError, ValueError
        patience or min_delta is not a number, or out of range.

    References
    ----------
    L. Prechelt, "Early Stopping - But When?", 1998.

    Examples
    --------
    >>> from fastnorm.regularization import EarlyStopping
    >>> stopping = EarlyStopping(patience=2)
    >>> [stopping.update(loss) for loss in (1.0, 0.6, 0.7, 0.5, 0.6, 0.8)]
    [False, False, False, False, False, True]
    >>> stopping.best_loss, stopping.best_observation
    (0.5, 3)
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience = _check.integer("patience", patience)
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; expected at least 1")
        self.min_delta = _finite("min_delta", min_delta)
        self.observations = 0
        self.waited = 0
        self._best: tuple[float, int, Any] | None = None

    @property
    def should_stop(self) -> bool:
        return self.waited >= self.patience

    def update(self, loss: float, state: Any = None) -> bool:
        """Take one observation; returns whether to stop now.

        Parameters
        ----------
        loss : float
            The validation loss. NaN is never an improvement, and infinity only over nothing.
        state : optional
            What would be needed to go back to this moment, a dict of arrays for example. A deep copy is kept while
            this observation is the best, so training may go on in the same arrays.

        Returns
        -------
        bool
            `should_stop`.

        Raises
        ------
        TypeError
            loss is not a number.
        """
        if isinstance(loss, (bool, str, bytes)) or np.ndim(loss) != 0:
            raise TypeError(f"loss is {loss!r} of type {type(loss).__name__}; expected a real number")
        try:
            value = float(loss)
        except (TypeError, ValueError) as error:
            raise TypeError(f"loss is {loss!r} of type {type(loss).__name__}; expected a real number") from error
        first = self._best is None and not math.isnan(value)
        if first or (self._best is not None and value < self._best[0] - self.min_delta):
            self._best = value, self.observations, copy.deepcopy(state)
            self.waited = 0
        else:
            self.waited += 1
        self.observations += 1
        return self.should_stop

    def _found(self, name: str) -> tuple[float, int, Any]:
        if self._best is None:
            seen = "there was no observation: call update(loss) first"
            if self.observations:
                seen = f"all {self.observations} observations were NaN"
            raise ValueError(f"{name} is not known, since {seen}")
        return self._best

    @property
    def best_loss(self) -> float:
        """The lowest loss; ValueError where there was no observation."""
        return self._found("best_loss")[0]

    @property
    def best_observation(self) -> int:
        """Which observation that was, counted from 0; ValueError where there was none."""
        return self._found("best_observation")[1]

    @property
    def best_state(self) -> Any:
        """The state given with it; ValueError where there was no observation."""
        return self._found("best_state")[2]

    def __repr__(self) -> str:
        return f"EarlyStopping(patience={self.patience}, min_delta={self.min_delta:g})"
