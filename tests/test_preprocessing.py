"""Scalers: scikit-learn's results on its own data and its habits, exactness beyond it, and what is refused.

What does not need scikit-learn is tested against NumPy in float64; the comparison is skipped where it is not installed.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastnorm.preprocessing import MinMaxScaler, NotFittedError, StandardScaler
from subprocess_python import output_of

DTYPES = [np.float32, np.float64]
FITTED = {
    "StandardScaler": ("mean_", "var_", "scale_", "n_samples_seen_", "n_features_in_"),
    "MinMaxScaler": ("data_min_", "data_max_", "data_range_", "scale_", "min_", "n_samples_seen_", "n_features_in_"),
}
SCALERS = [StandardScaler, MinMaxScaler]
CLASSES = {scaler.__name__: scaler for scaler in SCALERS}


@pytest.fixture(scope="module")
def sk() -> Any:
    """scikit-learn, whose own import may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sklearn")
        import sklearn.base
        import sklearn.compose
        import sklearn.datasets
        import sklearn.linear_model
        import sklearn.model_selection
        import sklearn.pipeline
        import sklearn.preprocessing
    return sklearn


def with_gaps(x: np.ndarray) -> np.ndarray:
    """A tenth of the values missing, and a column with one value left."""
    x = x.copy()
    x[np.random.default_rng(0).random(x.shape) < 0.1] = np.nan
    x[1:, 0] = np.nan
    x[0, 0] = 3
    return x


def odd_columns(n: int) -> np.ndarray:
    """Constant, nearly constant, tiny, huge, and far from 0."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(n, 9))
    z[:, 0] = 0
    z[:, 1] = 0.1
    z[:, 2] = 1e8 + 1e-9 * z[:, 2]
    z[:, 3] = 3 + 1e-14 * z[:, 3]
    z[:, 4] *= 1e-30
    z[:, 5] *= 1e30
    z[:, 6] += 1e6
    z[:, 7] = np.arange(n) == 0
    return z


DATA: dict[str, Callable[[Any], np.ndarray]] = {
    **{
        name: (lambda sk, name=name: getattr(sk.datasets, f"load_{name}")().data)
        for name in ("iris", "wine", "breast_cancer", "diabetes", "digits")
    },
    "linnerud": lambda sk: sk.datasets.load_linnerud().data,
    "wine with gaps": lambda sk: with_gaps(sk.datasets.load_wine().data),
    "digits with gaps": lambda sk: with_gaps(sk.datasets.load_digits().data),
    "odd columns": lambda sk: odd_columns(301),
    "one sample": lambda sk: np.array([[1.0, -2.0, 0.0]]),
    "integers": lambda sk: np.array([[0, 1, 5], [7, 1, -2], [4, 1, 9]]),
    "a list": lambda sk: [[0, 0], [0, 0], [1, 1], [1, 1]],
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("StandardScaler", {}),
    ("StandardScaler", {"with_mean": False}),
    ("StandardScaler", {"with_std": False}),
    ("StandardScaler", {"with_mean": False, "with_std": False}),
    ("MinMaxScaler", {}),
    ("MinMaxScaler", {"feature_range": (-2, 3)}),
    ("MinMaxScaler", {"clip": True}),
]


def assert_same(ours: Any, theirs: Any, rtol: float, atol: Any, what: str) -> None:
    if theirs is None:
        assert ours is None, what
        return
    assert np.shape(ours) == np.shape(theirs), what
    assert np.isnan(ours).tolist() == np.isnan(theirs).tolist(), what
    assert np.all(np.isnan(ours) | (np.abs(ours - theirs) <= rtol * np.abs(theirs) + atol)), what


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("data", DATA)
def test_same_results_as_scikit_learn(sk: Any, data: str, name: str, options: dict[str, Any]) -> None:
    x = DATA[data](sk)
    ours, theirs = CLASSES[name](**options), getattr(sk.preprocessing, name)(**options)
    assert ours.fit(x) is ours
    theirs.fit(x)
    x = np.asarray(x, np.float64)
    size = np.nanmax(np.abs(x), axis=0)
    for attribute in FITTED[name]:
        wanted, found = getattr(theirs, attribute), getattr(ours, attribute)
        if attribute == "var_" and wanted is not None:
            # Of a column that counts as constant, scikit-learn's variance is rounding noise; ours is the exact one.
            wanted, found = (np.where(s.scale_ == 1, 0, s.var_) for s in (theirs, ours))
        assert_same(found, wanted, 1e-12, 1e-15 * size if attribute in ("mean_", "min_") else 0, attribute)
    y, expected = ours.transform(x), theirs.transform(x)
    assert y.dtype == expected.dtype
    # What the two may differ by: the rounding of terms that are as large as x / scale and all but cancel.
    scale = np.ones(x.shape[1]) if theirs.scale_ is None else theirs.scale_
    terms = size / scale if name == "StandardScaler" else size * scale
    excess = np.abs(y - expected) / (1e-12 * np.abs(expected) + 2.0**-50 * (terms + 1))
    assert np.nanmax(excess) < 1
    assert np.isnan(y).tolist() == np.isnan(expected).tolist()
    back = np.abs(ours.inverse_transform(y) - theirs.inverse_transform(expected))
    assert np.nanmax(back / (1e-12 * size + 1e-15)) < 1


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_same_results_as_scikit_learn_in_float32(sk: Any, name: str, options: dict[str, Any]) -> None:
    x = sk.datasets.load_wine().data.astype(np.float32)
    ours = CLASSES[name](**options).fit(x)
    theirs = getattr(sk.preprocessing, name)(**options).fit(x)
    for attribute in FITTED[name]:
        wanted, found = getattr(theirs, attribute), getattr(ours, attribute)
        assert_same(found, wanted, 1e-5 if attribute == "min_" else 1e-6, 0, attribute)
        if isinstance(wanted, np.ndarray):
            assert found.dtype == wanted.dtype, attribute
    y, expected = ours.transform(x), theirs.transform(x)
    assert y.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.inverse_transform(y), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_float32_far_from_zero_is_exact(mean: float) -> None:
    """Statistics to a few u of float64, results to 4 u of float32: rounding the mean first would lose mean * u."""
    x = (mean + np.random.default_rng(2).normal(size=(2000, 3))).astype(np.float32)
    exact = x.astype(np.longdouble)
    scaler = StandardScaler().fit(x)
    np.testing.assert_allclose(scaler.mean_, exact.mean(0).astype(float), rtol=1e-15)
    np.testing.assert_allclose(scaler.var_, exact.var(0).astype(float), rtol=1e-14)
    y = (exact - exact.mean(0)) / exact.std(0)
    assert np.max(np.abs(scaler.transform(x) - y) / np.maximum(1, np.abs(y))) < 4 * 2.0**-24
    low, high = exact.min(0), exact.max(0)
    found = MinMaxScaler().fit_transform(x)
    assert found.min() == 0
    np.testing.assert_allclose(found, ((exact - low) / (high - low)).astype(float), rtol=0, atol=4 * 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearly_constant_columns_have_scale_one(dtype: Any) -> None:
    x = np.full((1000, 3), 0.1, dtype)
    x[:, 1] = 1e6
    x[:, 2] = np.linspace(5, 5 * (1 + 2e-16), 1000)
    scaler = StandardScaler().fit(x)
    assert scaler.scale_.tolist() == [1, 1, 1]
    assert scaler.var_[:2].tolist() == [0, 0]
    assert scaler.transform(x)[:, :2].tolist() == [[0, 0]] * 1000
    y = MinMaxScaler((-1, 4)).fit_transform(x)
    np.testing.assert_allclose(y, -1, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("scaler", SCALERS)
def test_chunks_give_what_one_fit_gives(scaler: Any, gaps: bool, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(500, 7)) * 10.0 ** rng.integers(-3, 4, 7) + rng.normal(0, 100, 7)).astype(dtype)
    x[:, 3] = 2.5
    if gaps:
        x[rng.random(x.shape) < 0.2] = np.nan
        x[:100, 5] = np.nan  # the first chunks have no value here, and none at all in the next one
        x[:, 6] = np.nan
    whole, chunks = scaler().fit(x), scaler()
    for part in np.split(x, [1, 2, 90, 100, 333]):
        chunks.partial_fit(part)
    for attribute in FITTED[scaler.__name__]:
        a, b = getattr(chunks, attribute), getattr(whole, attribute)
        np.testing.assert_allclose(a, b, rtol=1e-13, err_msg=attribute)
    np.testing.assert_allclose(chunks.transform(x), whole.transform(x), rtol=8 * np.finfo(dtype).eps, atol=1e-13)
    refitted = chunks.fit(x[:50])
    np.testing.assert_array_equal(refitted.scale_, scaler().fit(x[:50]).scale_)


@pytest.mark.parametrize("scaler", SCALERS)
def test_a_column_of_nan_is_nan_until_values_come(scaler: Any) -> None:
    x = np.array([[1, np.nan, 2.0], [3, np.nan, np.nan], [5, np.nan, 7]])
    fitted = scaler().fit(x)
    assert np.isnan(fitted.scale_).tolist() == [False, True, False]
    assert np.isnan(fitted.transform(x)).tolist() == np.isnan(x).tolist()
    if scaler is StandardScaler:
        assert fitted.n_samples_seen_.tolist() == [3, 0, 2]
        assert np.isnan(fitted.mean_).tolist() == [False, True, False]
    fitted.partial_fit(np.array([[1.0, 4.0, 1.0], [1.0, 8.0, 1.0]]))
    assert np.isfinite(fitted.scale_).all()
    if scaler is StandardScaler:
        assert (fitted.mean_[1], fitted.var_[1]) == (6, 4)
    else:
        assert (fitted.data_min_[1], fitted.data_max_[1]) == (4, 8)


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("order", ["C", "F", "sliced", "read-only"])
def test_layouts_give_the_same_and_x_stays(scaler: Any, order: str) -> None:
    x = np.random.default_rng(4).normal(3, 2, (60, 5)).astype(np.float32)
    wide = np.zeros((120, 10), np.float32)
    wide[::2, 1::2] = x
    given = {"C": x, "F": np.asfortranarray(x), "sliced": wide[::2, 1::2], "read-only": x.copy()}[order]
    if order == "read-only":
        given.flags.writeable = False
    before = given.copy()
    expected = scaler().fit(x)
    fitted = scaler(copy=False) if order == "read-only" else scaler()
    np.testing.assert_array_equal(fitted.fit_transform(given), expected.transform(x))
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("scaler", SCALERS)
def test_copy_false_writes_into_x(scaler: Any) -> None:
    x = np.random.default_rng(5).normal(3, 2, (60, 5))
    expected = scaler().fit_transform(x)
    given = x.copy()
    fitted = scaler(copy=False)
    assert fitted.fit_transform(given) is given
    np.testing.assert_array_equal(given, expected)
    assert fitted.inverse_transform(given) is given
    np.testing.assert_allclose(given, x, rtol=1e-13)
    if scaler is StandardScaler:
        assert fitted.transform(given, copy=True) is not given


def test_clip_and_range() -> None:
    x = np.array([[0.0, 10.0], [1.0, 20.0]])
    scaler = MinMaxScaler((2, 4), clip=True).fit(x)
    assert scaler.transform(np.array([[-5.0, 15.0], [9.0, np.nan]]))[:, 0].tolist() == [2, 4]
    np.testing.assert_allclose(scaler.min_ + scaler.scale_ * x, [[2, 2], [4, 4]])


def test_magnitudes_at_the_ends_of_the_range() -> None:
    """Squares of scales below 1e-154 or above 1e154 leave float64's range; the scales themselves do not."""
    x = np.random.default_rng(6).normal(size=(50, 2))
    np.testing.assert_allclose(StandardScaler().fit_transform(x * [1e-140, 1e140]).std(0), [1, 1], rtol=1e-12)
    scaler = StandardScaler().fit(x)
    scaler.mean_, scaler.scale_ = np.zeros(2), np.array([1e-200, 1e200])
    np.testing.assert_allclose(scaler.transform(x * [1e-200, 1e200]), x, rtol=1e-15)


class Frame:
    """As much of a data frame as the scalers look at."""

    def __init__(self, values: np.ndarray, columns: list[Any]) -> None:
        self.values, self.columns = values, columns

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.values, dtype)


@pytest.mark.parametrize("scaler", SCALERS)
def test_feature_names(scaler: Any) -> None:
    x = np.random.default_rng(7).normal(size=(5, 2))
    fitted = scaler().fit(Frame(x, ["a", "b"]))
    assert fitted.feature_names_in_.tolist() == ["a", "b"]
    assert fitted.get_feature_names_out().tolist() == ["a", "b"]
    fitted.transform(Frame(x, ["a", "b"]))
    with pytest.raises(ValueError, match=r"features \['b', 'a'\]; expected \['a', 'b'\]"):
        fitted.transform(Frame(x, ["b", "a"]))
    with pytest.warns(UserWarning, match="no feature names"):
        fitted.transform(x)
    with pytest.raises(ValueError, match="input_features"):
        fitted.get_feature_names_out(["a", "c"])
    fitted.fit(x)
    assert not hasattr(fitted, "feature_names_in_")
    assert fitted.get_feature_names_out().tolist() == ["x0", "x1"]
    assert fitted.get_feature_names_out(["u", "v"]).tolist() == ["u", "v"]
    with pytest.warns(UserWarning, match="fitted without"):
        fitted.transform(Frame(x, ["a", "b"]))
    assert not hasattr(scaler().fit(Frame(x, [0, 1])), "feature_names_in_")


@pytest.mark.parametrize("scaler", SCALERS)
def test_parameters_copies_and_pickles(scaler: Any) -> None:
    made = scaler(copy=False)
    assert made.get_params() == {**scaler().get_params(), "copy": False}
    assert repr(made) == f"{scaler.__name__}(copy=False)"
    assert made.set_params(copy=True) is made
    assert repr(made) == f"{scaler.__name__}()"
    with pytest.raises(ValueError, match="no parameter 'with_median'; expected one of"):
        made.set_params(copy=False, with_median=True)
    assert made.copy is True
    x = np.random.default_rng(8).normal(size=(9, 2))
    made.fit(x)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        np.testing.assert_array_equal(twin.transform(x), made.transform(x))


@pytest.mark.parametrize("scaler", SCALERS)
def test_accepted_by_scikit_learn(sk: Any, scaler: Any) -> None:
    """clone, Pipeline, ColumnTransformer, cross-validated search, tags, and the check that a scaler is fitted."""
    x, y = sk.datasets.load_wine(return_X_y=True)
    theirs = getattr(sk.preprocessing, scaler.__name__)
    twin = sk.base.clone(scaler(copy=False))
    assert (type(twin), twin.copy) == (scaler, False)
    scores = [
        sk.pipeline.make_pipeline(s(), sk.linear_model.LogisticRegression(max_iter=1000))
        .fit(x[::2], y[::2])
        .score(x, y)
        for s in (scaler, theirs)
    ]
    assert scores[0] == scores[1] > 0.9
    pipeline = sk.pipeline.Pipeline([("scale", scaler()), ("classify", sk.linear_model.LogisticRegression())])
    grid = {"scale__copy": [True, False], "classify__C": [0.1, 1.0]}
    search = sk.model_selection.GridSearchCV(pipeline, grid, cv=3).fit(x, y)
    assert search.best_score_ > 0.9
    assert scaler.__name__ in repr(search)
    columns = sk.compose.ColumnTransformer([("some", scaler(), [0, 3])], remainder="passthrough").fit(x)
    np.testing.assert_allclose(columns.transform(x)[:, :2], theirs().fit_transform(x[:, [0, 3]]), rtol=1e-9, atol=1e-12)
    assert columns.get_feature_names_out()[:2].tolist() == ["some__x0", "some__x3"]
    tags = sk.utils.get_tags(scaler())
    assert tags.input_tags.allow_nan
    assert tags.transformer_tags.preserves_dtype == ["float64", "float32"]
    with pytest.raises(sk.exceptions.NotFittedError):
        sk.utils.validation.check_is_fitted(scaler())
    sk.utils.validation.check_is_fitted(scaler().fit(x))


@pytest.mark.parametrize("scaler", SCALERS)
def test_passes_scikit_learns_checks_of_estimators(sk: Any, scaler: Any) -> None:
    from sklearn.utils import estimator_checks

    if "on_fail" not in inspect.signature(estimator_checks.check_estimator).parameters:
        pytest.skip("this scikit-learn does not report its checks one by one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = estimator_checks.check_estimator(scaler(), on_fail=None, on_skip=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")}
    assert failed == {}
    assert sum(r["status"] == "passed" for r in results) > 40


def test_nothing_imports_scikit_learn() -> None:
    code = """
    import sys, numpy as np
    from fastnorm.preprocessing import MinMaxScaler, StandardScaler
    for scaler in (StandardScaler(), MinMaxScaler()):
        scaler.fit_transform(np.eye(3)), scaler.get_params(), repr(scaler)
    print([name for name in sys.modules if name.startswith(("sklearn", "scipy"))])
    """
    assert output_of(code) == "[]"


GOOD = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.arange(3.0), ValueError, "X has shape (3,); expected two axes"),
        (np.ones((2, 3, 4)), ValueError, "X has shape (2, 3, 4)"),
        (np.ones((0, 3)), ValueError, "X has 0 sample(s) (shape=(0, 3))"),
        (np.ones((3, 0)), ValueError, "X has 0 feature(s) (shape=(3, 0))"),
        (np.ones((4, 2)), ValueError, "X has 2 features, but {name} is expecting 3"),
        (np.array([[1, 2, np.inf]]), ValueError, "X contains infinity"),
        (np.array([[1, np.nan, -np.inf]], np.float32), ValueError, "X contains infinity"),
        (np.ones((4, 3), complex), ValueError, "X has dtype complex128"),
        ([["a", "b", "c"]], ValueError, "could not be read as numbers"),
        ([[1, {}, 2]], TypeError, "could not be read as numbers"),
        (None, TypeError, "X is None"),
    ],
)
def test_wrong_tables_are_refused_and_change_nothing(scaler: Any, x: Any, error: Any, words: str) -> None:
    fitted = scaler().fit(GOOD)
    before = {k: copy.copy(v) for k, v in vars(fitted).items()}
    calls = [fitted.partial_fit, fitted.transform, fitted.inverse_transform]
    if "features" not in words:
        calls.append(fitted.fit)
    for call in calls:
        with pytest.raises(error) as caught:
            call(x)
        assert words.format(name=scaler.__name__) in str(caught.value)
    for name, value in before.items():
        np.testing.assert_equal(getattr(fitted, name), value)


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("method", ["transform", "partial_fit"])
def test_warnings_are_about_the_line_that_called(scaler: Any, method: str) -> None:
    fitted = scaler().fit(GOOD)
    fitted.feature_names_in_ = np.array(["a", "b", "c"], dtype=object)
    with pytest.warns(UserWarning, match="X has no feature names") as caught:
        getattr(fitted, method)(GOOD)
    assert [warning.filename for warning in caught] == [__file__]


def test_columns_beyond_the_largest_float_are_refused_and_change_nothing() -> None:
    """They were scaled by 1 or 0 without a word."""
    wide = np.array([[1.0, 1e160], [0.0, -1e160], [2.0, 0.0]])
    cases = [
        (StandardScaler, wide, "column 1 of X, .* has squared deviations whose sum is beyond the largest float64"),
        (MinMaxScaler, wide * 1.5e148, "column 1 of X, .* has a range beyond the largest float64"),
        (
            MinMaxScaler,
            np.array([[3e38], [-3e38]], np.float32),
            "column 0 of X, .* range beyond the largest float32.* or use float64",
        ),
    ]
    for scaler, x, words in cases:
        fitted = scaler().fit(x[:1])
        before = {k: copy.copy(v) for k, v in vars(fitted).items()}
        for call in (fitted.fit, fitted.partial_fit):
            with pytest.raises(ValueError, match=words):
                call(x)
        for name, value in before.items():
            np.testing.assert_equal(getattr(fitted, name), value)
    mean = StandardScaler(with_std=False).fit(wide).mean_
    assert mean is not None
    assert mean.tolist() == [1, 0]
    np.testing.assert_allclose(StandardScaler().fit_transform(wide * 1e-10).std(axis=0), 1)


def test_sparse_matrices_are_refused(sk: Any) -> None:
    from scipy import sparse

    for scaler in SCALERS:
        with pytest.raises(TypeError, match="sparse"):
            scaler().fit(sparse.eye(3).tocsr())


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("method", ["transform", "inverse_transform", "get_feature_names_out"])
def test_not_fitted(scaler: Any, method: str) -> None:
    for error in (NotFittedError, ValueError, AttributeError):
        with pytest.raises(error, match=f"this {scaler.__name__} is not fitted; call fit or partial_fit first"):
            getattr(scaler(), method)(*([GOOD] if "transform" in method else []))


@pytest.mark.parametrize("value", [(1, 1), (2, 1), (0, np.nan), (0, np.inf), (0,), 3, ("a", "b")])
def test_ranges_that_are_none(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="feature_range"):
        MinMaxScaler(value).fit(GOOD)
