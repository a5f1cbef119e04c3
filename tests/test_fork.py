"""A child made by fork works, whatever the parent did before.

The parent's threads do not exist in the child, and waiting for them would hang. Everything runs in an interpreter of
its own, under a time limit that only a hang can reach.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from subprocess_python import output_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PRELUDE = """
import os, sys
import numpy as np
import fastnorm as fn
from operations import OPERATIONS

fn.set_num_threads(2)
calls = [operation.make(fn, (16, 12, 33, 31)) for operation in OPERATIONS.values()]

def results():
    return [{name: np.ascontiguousarray(a).tobytes() for name, a in call.run().items()} for call in calls]

def in_child(function):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if function() else 2
        except BaseException as problem:
            print(repr(problem), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def test_child_works_after_the_parent_used_threads() -> None:
    output = output_of(
        PRELUDE
        + """
expected = results()
print(in_child(lambda: results() == expected), in_child(lambda: results() == expected))
print(results() == expected)
"""
    )
    assert output.split() == ["0", "0", "True"]


def test_child_of_a_child_and_thread_control_in_it() -> None:
    output = output_of(
        PRELUDE
        + """
expected = results()

def child():
    fn.set_num_threads(4)
    with fn.num_threads(3):
        grandchild = in_child(lambda: results() == expected)
    return grandchild == 0 and fn.get_num_threads() == 4 and results() == expected

print(in_child(child), fn.get_num_threads())
"""
    )
    assert output.split() == ["0", "2"]


def test_child_made_before_any_work_and_parent_afterwards() -> None:
    output = output_of(
        PRELUDE
        + """
in_order = [in_child(lambda: len(results()) == len(calls))]
expected = results()
in_order.append(in_child(lambda: results() == expected))
print(*in_order)
"""
    )
    assert output.split() == ["0", "0"]


def test_fork_while_another_python_thread_computes() -> None:
    output = output_of(
        PRELUDE
        + """
import threading
expected = results()
stop = threading.Event()

def work():
    while not stop.is_set():
        calls[0].run()

other = threading.Thread(target=work)
other.start()
statuses = [in_child(lambda: results() == expected) for _ in range(3)]
stop.set()
other.join()
print(*statuses)
"""
    )
    assert output.split() == ["0", "0", "0"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_pool(method: str, tmp_path: Path) -> None:
    script = tmp_path / "pool_script.py"
    script.write_text(
        """
import multiprocessing
import numpy as np
import fastnorm as fn

def norm(seed):
    x = np.random.default_rng(seed).standard_normal((300, 515)).astype(np.float32)
    y, cache = fn.layer_norm_forward(x)
    return y.sum(dtype=np.float64), fn.layer_norm_backward(x[::-1], cache).dx.sum(dtype=np.float64)

def main():
    fn.set_num_threads(2)
    expected = [norm(seed) for seed in range(6)]
    with multiprocessing.get_context(METHOD).Pool(2) as pool:
        print(pool.map(norm, range(6)) == expected)

if __name__ == "__main__":
    main()
""".replace("METHOD", repr(method)),
        encoding="utf-8",
    )
    assert output_of(script) == "True"
