"""Lets contenders take turns and keeps the times. Knows nothing of what they do.

The fastest of many short samples says what the machine can do; the median says how it was on the day.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

# A sample lasts at least this long: the clock and the loop around the call are then below 1 %.
_SAMPLE_SECONDS = 200e-6
_MIN_ROUNDS, _MAX_ROUNDS, _MIN_SAMPLES = 5, 500, 3
# A contender this much slower than the subject of the run takes part in every eighth round only: time for the rest.
_SLOW, _SELDOM = 3.0, 8
# Thread pools of other libraries spin for a while after their work. With threads, each turn starts after this pause.
_PAUSE_SECONDS = 1e-3

Call = Callable[[], Any]


class Timing(NamedTuple):
    """Seconds per call: the fastest and the median sample, and how many samples there were."""

    fastest: float
    median: float
    rounds: int


def sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@contextmanager
def _no_collections() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def take_turns(
    calls: dict[str, Call], seconds: float, *, subject: str, pause: bool, spoil: Call | None = None
) -> dict[str, Timing]:
    """All contenders in turn for about `seconds`. A turn starts with a call that is not timed and fills the caches.

    With `spoil`, which is to fill them with something else, a turn is that and a single call.
    """
    once = {}
    for name, call in calls.items():
        call()  # compiles, faults pages in, starts threads
        once[name] = min(sample(call, 1) for _ in range(3))
    repeats = dict.fromkeys(calls, 1)
    if spoil is None:
        repeats = {name: max(1, round(_SAMPLE_SECONDS / max(time_, 1e-7))) for name, time_ in once.items()}
    patience = _SLOW * once[subject]
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    rounds = 0
    end = time.perf_counter() + seconds
    with _no_collections():
        while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and time.perf_counter() < end):
            for name in order:
                if rounds % _SELDOM and len(samples[name]) >= _MIN_SAMPLES and min(samples[name]) > patience:
                    continue
                if pause:
                    time.sleep(_PAUSE_SECONDS)
                (spoil or calls[name])()
                samples[name].append(sample(calls[name], repeats[name]))
            shuffle(order)  # nobody always follows the same neighbour, whose arrays fill the caches
            rounds += 1
    return {name: Timing(min(times), statistics.median(times), len(times)) for name, times in samples.items()}
