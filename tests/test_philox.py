"""The generator against its published answers, and the stream object `Philox`.

The vectors are those of Random123's kat_vectors for philox4x32 with 7 and 10 rounds: zeros, ones, the digits of pi.
"""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core

reference = importlib.import_module("fastnorm.reference._dropout")

PI = ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0")
KNOWN = [
    (7, " ".join(["00000000"] * 4), "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, " ".join(["ffffffff"] * 4), "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, *PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, " ".join(["00000000"] * 4), "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, " ".join(["ffffffff"] * 4), "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, *PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN)
def test_known_answers_in_every_lane(level: str, rounds: int, counter: str, key: str, answer: str) -> None:
    _core.set_isa(level)
    counters = np.tile(np.array(words(counter), np.uint32), (67, 1))  # full vectors of 16 lanes, and a remainder
    found = _core.philox4x32(counters, *words(key), rounds)
    np.testing.assert_array_equal(found, np.tile(np.array(words(answer), np.uint32), (67, 1)))


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN)
def test_known_answers_of_the_reference(rounds: int, counter: str, key: str, answer: str) -> None:
    k0, k1 = words(key)
    found = reference.philox4x32(np.array([words(counter)], np.uint32), k0 + 2**32 * k1, rounds)
    assert found.tolist() == [words(answer)]


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("rounds", [7, 10])
def test_random_counters_agree_with_the_reference(level: str, rounds: int) -> None:
    rng = np.random.default_rng(11)
    _core.set_isa(level)
    for _ in range(5):
        counters = rng.integers(0, 2**32, (501, 4), dtype=np.uint32)
        key = int(rng.integers(0, 2**64, dtype=np.uint64))
        found = _core.philox4x32(counters, key % 2**32, key // 2**32, rounds)
        np.testing.assert_array_equal(found, reference.philox4x32(counters, key, rounds))


@pytest.mark.parametrize("level", _core.isa_levels())
def test_a_million_counters_agree_with_jax(level: str) -> None:
    """JAX's philox4x32 primitive, where installed: another program's words for 2^20 counters of docs/dropout.md."""
    philox = jax_philox()
    _core.set_isa(level)
    seed, offset, first = 2**63 + 987_654_321, 2**40 + 12_345, 2**31 - 2**19
    q = np.arange(first, first + 2**20, dtype=np.uint64)
    halves = np.uint64(2**32 - 1)
    counters = np.stack([q & halves, q >> np.uint64(32), *np.full((2, q.size), 0, np.uint64)], axis=1).astype(np.uint32)
    counters[:, 2:] = offset % 2**32, offset // 2**32
    words = philox(counters, (seed % 2**32, seed // 2**32))
    np.testing.assert_array_equal(_core.philox4x32(counters, seed % 2**32, seed // 2**32), words)
    # The mask that follows from those words: sixteen bits each, low half first; p = 1/2 needs no more.
    expected = words.astype("<u4").view("<u2").reshape(-1) < 2**15
    keep = fn.dropout_mask(2**40, 0.5, rng=fn.Philox(seed, offset), index_range=(8 * first, 8 * (first + q.size)))
    np.testing.assert_array_equal(keep, expected)


def jax_philox() -> Callable[[np.ndarray, tuple[int, int]], np.ndarray]:
    """JAX's own implementation; it is private there, so that its place may change."""
    jax = pytest.importorskip("jax")
    try:
        primitive = importlib.import_module("jax._src.random.philox4x32").philox4x32_p
    except (ImportError, AttributeError):
        pytest.skip(f"jax {jax.__version__} has no philox4x32 where this test looks for it")

    @jax.jit
    def philox(key: np.ndarray, counters: np.ndarray) -> object:
        return jax.numpy.stack(primitive.bind(key[0], key[1], *counters), axis=1)

    return lambda counters, key: np.asarray(philox(np.array(key, np.uint32), np.ascontiguousarray(counters.T)))


def test_core_refuses_other_shapes_and_rounds() -> None:
    with pytest.raises(ValueError, match="shape"):
        _core.philox4x32(np.zeros((3, 5), np.uint32), 0, 0)
    with pytest.raises(ValueError, match="rounds"):
        _core.philox4x32(np.zeros((3, 4), np.uint32), 0, 0, 9)


# ---------------------------------------------------------------------------------------------------------------------
# The stream


def test_attributes_repr_and_equality() -> None:
    rng = fn.Philox(7, 3)
    assert (rng.seed, rng.offset) == (7, 3)
    assert repr(rng) == "Philox(seed=7, offset=3)"
    assert rng == fn.Philox(seed=np.uint64(7), offset=np.int32(3))
    assert rng != fn.Philox(7)
    assert rng != fn.Philox(8, 3)
    assert rng != 7
    assert fn.Philox(2**64 - 1, 2**64 - 1).seed == 2**64 - 1
    with pytest.raises(AttributeError):
        rng.seed = 8  # type: ignore[misc]
    with pytest.raises(TypeError, match="unhashable"):
        hash(rng)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, fn.Philox.copy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_go_their_own_way(clone) -> None:
    rng = fn.Philox(7, 3)
    other = clone(rng)
    assert other == rng
    fn.dropout_mask(5, rng=rng)
    assert (rng.offset, other.offset) == (4, 3)


def test_offset_can_be_set_back() -> None:
    rng = fn.Philox(7, 3)
    first = fn.dropout_mask(100, rng=rng)
    rng.offset = 3
    np.testing.assert_array_equal(fn.dropout_mask(100, rng=rng), first)
    with pytest.raises(ValueError, match=r"offset is -1; expected 0 <= offset < 2\*\*64"):
        rng.offset = -1
    assert rng.offset == 4


def test_offset_wraps_after_64_bits() -> None:
    rng = fn.Philox(7, 2**64 - 1)
    fn.dropout_mask(5, rng=rng)
    assert rng.offset == 0


@pytest.mark.parametrize("name", ["seed", "offset"])
@pytest.mark.parametrize("value", [-1, 2**64, 2**70])
def test_numbers_beyond_64_bits_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}; expected 0 <= {name} < 2\*\*64"):
        fn.Philox(**{"seed": 1, name: value})


@pytest.mark.parametrize("name", ["seed", "offset"])
@pytest.mark.parametrize("value", [True, np.True_, 1.0, "1", None, [1], np.array([1, 2])])
def test_what_is_no_integer_is_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} is .*expected an integer"):
        fn.Philox(**{"seed": 1, name: value})  # type: ignore[arg-type]


def test_threads_sharing_a_stream_get_different_offsets() -> None:
    rng = fn.Philox(99)
    x = np.ones(64)
    with ThreadPoolExecutor(4) as pool:
        offsets = sorted(pool.map(lambda _: fn.dropout_forward(x, rng=rng)[1].offset, range(200)))
    assert offsets == list(range(200))
    assert rng.offset == 200
