"""A slice of a dropout mask from docs/dropout.md alone: pure Python, no NumPy, no fastnorm.

Promises the same masks as `fastnorm.dropout_mask`, so that a mask can be reproduced where fastnorm is not. Refuses to
be fast. Run it as

    python examples/mask_from_spec.py --seed 2026 --offset 5 --p 0.5 --start 0 --stop 16
"""

from __future__ import annotations

import argparse

WORD = 2**32


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Section 1: Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 // WORD ^ c1 ^ k0, p1 % WORD, p0 // WORD ^ c3 ^ k1, p0 % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def block(q: int, domain: int, seed: int, offset: int) -> tuple[int, int, int, int]:
    """Section 2: four words of one block."""
    return philox((q % WORD, q // WORD + domain * 2**30, offset % WORD, offset // WORD), (seed % WORD, seed // WORD))


def index_without_shared_axes(i: int, shape: tuple[int, ...], shared_axes: tuple[int, ...]) -> int:
    """Section 3: from the C-order index in the shape to that of the draw."""
    index, stride = 0, 1
    for axis in reversed(range(len(shape))):
        i, position = divmod(i, shape[axis])
        if axis not in shared_axes:
            index += position * stride
            stride *= shape[axis]
    return index


def keep(i: int, p: float, seed: int, offset: int) -> bool:
    """Section 4: is element i kept?"""
    q, h = divmod(i, 8)
    high, low = (block(q, domain, seed, offset)[h // 2] >> 16 * (h % 2) & 0xFFFF for domain in (0, 1))
    return high * 2**16 + low < round((1 - p) * 2**32)


def mask(
    start: int,
    stop: int,
    p: float,
    seed: int,
    offset: int = 0,
    shape: tuple[int, ...] | None = None,
    shared_axes: tuple[int, ...] = (),
) -> list[bool]:
    """Section 5: elements start to stop of the flattened mask. The shape matters for shared axes only."""
    indices = (index_without_shared_axes(i, shape, shared_axes) if shape else i for i in range(start, stop))
    return [keep(i, p, seed, offset) for i in indices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--offset", type=int, default=5)
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--stop", type=int, default=16)
    arguments = parser.parse_args()
    kept = mask(arguments.start, arguments.stop, arguments.p, arguments.seed, arguments.offset)
    print("".join("1" if k else "0" for k in kept))


if __name__ == "__main__":
    main()
