"""The dispatcher and what it dispatches to: each level runs, is chosen by FASTNORM_ISA, and gives the same bits.

The objects of the levels are looked into with nm and objdump: a weak symbol in one of them would let the linker hand
AVX-512 code to a machine without it. Objects of the last build are used where the tree has them, else one is compiled.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import fastnorm as fn
from conftest import ROOT
from fastnorm import _core
from operations import LAYOUTS, OPERATIONS, Call
from subprocess_python import output_of, run_python

LEVELS = _core.isa_levels()
COMPILED = tuple(_core.build_info()["levels"].split(","))
KERNELS = ROOT / "csrc" / "isa" / "kernels.cpp"


def digest(call: Call) -> dict[str, str]:
    return {
        name: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16] + str(a.shape)
        for name, a in call.run().items()
    }


def test_levels_are_listed_best_first() -> None:
    best_first = [level for level in ("avx512", "avx2", "baseline") if level in LEVELS]
    assert list(LEVELS) == best_first
    assert LEVELS[-1] == "baseline"
    assert set(LEVELS) <= set(COMPILED)


def test_the_best_level_is_chosen_at_import() -> None:
    assert output_of("from fastnorm import _core; print(_core.isa())") == LEVELS[0]


@pytest.mark.parametrize("level", LEVELS)
def test_environment_chooses_the_level(level: str) -> None:
    assert output_of("from fastnorm import _core; print(_core.isa())", FASTNORM_ISA=level) == level


@pytest.mark.parametrize("bad", ["sse9", "AVX2 ", "avx", "baseline,avx2"])
def test_unknown_level_in_the_environment_is_an_error(bad: str) -> None:
    done = run_python("import fastnorm", FASTNORM_ISA=bad)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError"), last
    assert "FASTNORM_ISA" in last
    assert bad.strip() in last
    assert all(level in last for level in LEVELS), "the message lists what can be chosen"


def test_set_isa() -> None:
    for level in LEVELS:
        _core.set_isa(level)
        assert _core.isa() == level
    with pytest.raises(ValueError, match="sse9") as caught:
        _core.set_isa("sse9")
    assert all(level in str(caught.value) for level in LEVELS)
    assert _core.isa() == LEVELS[-1]


UNSUPPORTED = sorted({"avx512", "avx2"} - set(LEVELS))


@pytest.mark.skipif(not UNSUPPORTED, reason="this CPU runs every level of this build")
@pytest.mark.parametrize("level", UNSUPPORTED)
def test_a_level_that_this_machine_lacks_is_an_error(level: str) -> None:
    with pytest.raises(ValueError, match=level):
        _core.set_isa(level)
    done = run_python("import fastnorm", FASTNORM_ISA=level)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ValueError")


# Around lanes (16, 32, 64), short runs (512), and past a block (2048); ranks 2 to 4.
SHAPES = [(3, 6, 5), (2, 6, 31, 3), (5, 63), (4, 6, 129), (2, 3, 513), (3, 2, 2051), (33, 6, 7, 2)]


@pytest.mark.skipif(len(LEVELS) < 2, reason="one level only")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_bits_at_every_level(name: str, dtype: type) -> None:
    operation = OPERATIONS[name]
    for shape in SHAPES:
        if len(shape) < operation.min_rank:
            continue
        for options in operation.variants if len(shape) < 4 else operation.variants[:1]:
            for layout in ("contiguous", "channels_last", "sliced"):
                call = operation.make(fn, shape, dtype, layout=LAYOUTS[layout], **options)
                bits = {}
                for level in LEVELS:
                    _core.set_isa(level)
                    bits[level] = digest(call)
                _core.set_isa(LEVELS[0])
                assert all(found == bits["baseline"] for found in bits.values()), (shape, options, layout)


@pytest.mark.skipif(len(LEVELS) < 2, reason="one level only")
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_bits_at_every_level_on_hard_values(name: str) -> None:
    """Large offsets, the ends of float32's range, NaN and Inf: where a level's slow branches would part ways."""
    operation = OPERATIONS[name]
    rng = np.random.default_rng(11)
    for center, spread in [(1e6, 1.0), (0.0, 1e37), (0.0, 1e-37), (3.0, 0.0)]:
        x = (center + spread * rng.standard_normal((5, 6, 41))).astype(np.float32)
        for special in (None, np.nan, np.inf):
            if special is not None:
                x[2, 3, 17] = special
            changed = {"weight": x} if operation.name.startswith("drop_connect") else {"x": x}
            if operation.name in ("dropout_mask",):
                continue
            bits = []
            for level in LEVELS:
                _core.set_isa(level)
                bits.append(digest(operation.make(fn, x.shape, **changed)))
            assert all(found == bits[0] for found in bits), (center, spread, special)


@pytest.mark.skipif(len(LEVELS) < 2, reason="one level only")
@pytest.mark.parametrize("magnitude", [1e-320, 1e-312, 1e-306, 1e-300, 1e-200, 1e-160, 1e-155, 1e160, 1e200, 1e300])
def test_same_bits_at_every_level_near_the_ends_of_float64(magnitude: float) -> None:
    """A level without fused steps takes many, parts of which overflow or underflow before their result does."""
    rng = np.random.default_rng(11)
    for n in (7, 41, 1025, 1343):
        weight, dy = rng.standard_normal(n), rng.standard_normal((3, n))
        for offset in (0, 0.3, 5, 1e6):
            x = (rng.standard_normal((3, n)) + offset) * magnitude
            for eps in (1e-5, 1e-300, 0.0):
                bits = []
                for level in LEVELS:
                    _core.set_isa(level)
                    with np.errstate(all="ignore"):
                        y, cache = fn.layer_norm_forward(x, weight, weight, eps=eps)
                        rms, rms_cache = fn.rms_norm_forward(x, weight, eps=eps)
                        columns, columns_cache = fn.batch_norm_forward(x.T, eps=eps)
                        results = [y, cache.mean, cache.rstd, rms, columns, columns_cache.mean, columns_cache.batch_var]
                        results += [*fn.layer_norm_backward(dy, cache), *fn.rms_norm_backward(dy, rms_cache)]
                        results += [fn.instance_norm(x[:, None], weight[:1], weight[:1], eps=eps)]
                    bits.append([None if a is None else a.tobytes() for a in results])
                _core.set_isa(LEVELS[0])
                assert all(found == bits[0] for found in bits), (n, offset, eps)


@pytest.mark.skipif(len(LEVELS) < 2, reason="one level only")
@pytest.mark.parametrize("exponents", [(800, -332), (1000, -332), (1000, -103), (900, 100), (-900, 400), (-500, -400)])
def test_same_bits_at_every_level_of_large_and_small_factors(exponents: tuple[int, int]) -> None:
    """dy times a weight: what they are split into must not overflow either, nor vanish."""
    rng = np.random.default_rng(23)
    for shape in ((4, 3, 1), (7, 2, 3), (5, 4, 41)):
        x, dy = rng.standard_normal((2, *shape))
        dy *= 2.0 ** exponents[0]
        for function in OPERATIONS:
            if not function.endswith("_norm_backward") or function.startswith("dropout"):
                continue
            weight = 2.0 ** exponents[1] * rng.uniform(1, 2, shape[-1 if function[0] in "lr" else 1])
            bits = []
            for level in LEVELS:
                _core.set_isa(level)
                bits.append(digest(OPERATIONS[function].make(fn, shape, np.float64, x=x, dy=dy, weight=weight)))
            _core.set_isa(LEVELS[0])
            assert all(found == bits[0] for found in bits), (function, shape)


def compiler_for(level: str) -> list[str]:
    """A compiler and the build's flags for a level, read from CMake's own files, so that the tests follow them."""
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    isa_cmake = (ROOT / "cmake" / "isa.cmake").read_text(encoding="utf-8")
    common = re.search(r"set\(FASTNORM_KERNEL_FLAGS ([^)]*)\)", isa_cmake)
    own = re.search(rf"fastnorm_add_isa\({level}([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert common
    assert own
    flags = [*common[1].split(), *own[1].split(), "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd"]
    return [compiler, *flags, f"-DFASTNORM_ISA={level}", f"-I{ROOT / 'csrc'}"]


def compile_kernels(level: str, directory: Path) -> Path:
    """One object as the build makes it."""
    target = directory / f"{level}.o"
    command = [*compiler_for(level), "-c", str(KERNELS), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


# The fused step against the C library's: ties, cancellation, factors far apart, overflow and infinities among them.
MULTIPLY_ADD = r"""
#include <cmath>
#include <cstdio>
#include <random>
#include "isa/places.hpp"
using fastnorm::Pack;
static std::mt19937_64 random_bits(1);
static double number(int exponent) {  // of few bits, or of many
  const uint64_t bits = random_bits();
  const double fractions[] = {double(bits % 64), 1 + double(bits >> 12) * 0x1p-52, 1 + double(bits % 16) * 0x1p-52,
                              1 + double(bits % 1024) * 0x1p-26};
  return std::ldexp(fractions[random_bits() % 4], exponent) * (random_bits() & 1 ? 1 : -1);
}
int main() {
  long wrong = 0;
  for (int round = 0; round < 200000; ++round) {
    double a[16], b[16], cs[16], y[16];
    for (int i = 0; i < 16; ++i) {
      double& c = cs[i];
      c = random_bits() % 8 == 0 ? 0 : number(int(random_bits() % 120) - 60);
      if (c == 0) c = -0.0;  // as SplitMean has it
      a[i] = number(int(random_bits() % 60) - 30);
      b[i] = number(int(random_bits() % 60) - 30);
      if (random_bits() % 8 == 0 && a[i] != 0) b[i] = (-c + double(random_bits() % 5) * std::fabs(c) * 0x1p-53) / a[i];
      if (random_bits() % 50 == 0) a[i] = std::ldexp(a[i], random_bits() & 1 ? 400 : -900);
      if (random_bits() % 8 == 0) a[i] = random_bits() & 1 ? HUGE_VAL : 0x1.8p1023;  // given statistics
      if (std::isinf(a[i]) && b[i] == 0) b[i] = 1;  // a NaN has no sign to compare
    }
    const fastnorm::Whole all{0};
    all.store(y, fastnorm::multiply_add(all.load<double>(a), all.load<double>(b), all.load<double>(cs)));
    for (int i = 0; i < 16; ++i) {
      const double exact = std::fma(a[i], b[i], cs[i]);
      wrong += std::memcmp(&exact, &y[i], sizeof exact) != 0;
    }
  }
  std::printf("%ld\n", wrong);
}
"""


@pytest.mark.parametrize("level", LEVELS)
def test_the_fused_step_rounds_once_at_every_level(level: str, tmp_path: Path) -> None:
    source, program = tmp_path / "multiply_add.cpp", tmp_path / "multiply_add"
    source.write_text(MULTIPLY_ADD, encoding="utf-8")
    command = [*compiler_for(level), str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout == "0\n"


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if not KERNELS.exists():
        pytest.skip("the C++ sources are not beside the tests")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    sources = [path for path in (ROOT / "csrc").rglob("*.?pp") if "bindings" not in path.relative_to(ROOT).parts]
    newest = max(path.stat().st_mtime for path in sources)
    directory = tmp_path_factory.mktemp("objects")
    found = {}
    for level in COMPILED:
        built = [
            path
            for path in (ROOT / "build").glob(f"*/CMakeFiles/fastnorm_isa_{level}.dir/csrc/isa/kernels.cpp.o")
            if path.stat().st_mtime >= newest and "sanitize" not in path.parts and "debug" not in path.parts
        ]
        found[level] = built[0] if built else compile_kernels(level, directory)
    return found


@pytest.mark.parametrize("level", COMPILED)
def test_objects_have_no_weak_symbols_and_no_initialisers(objects: dict[str, Path], level: str) -> None:
    symbols = subprocess.run(
        ["nm", "--demangle", str(objects[level])], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kinds = [(match[1], match[2]) for line in symbols if (match := re.match(r"[0-9a-f ]* ([A-Za-z?]) (.*)", line))]
    assert kinds, "nm printed nothing"
    # Undefined weak symbols (lower case) belong to others; what this object defines must be local, but for its table.
    assert [name for kind, name in kinds if kind in "WVu"] == []
    assert [name for kind, name in kinds if "_GLOBAL__sub_I" in name] == []
    exported = [name for kind, name in kinds if kind in "TDRBGSC"]
    assert exported == [f"fastnorm::kernels_{level}"]


@functools.cache
def instructions(path: Path) -> str:
    return subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif("avx2" not in COMPILED, reason="not an x86-64 build")
def test_each_level_is_made_of_its_own_instructions(objects: dict[str, Path]) -> None:
    wide = {level: set(re.findall(r"%([xyz]mm)\d", instructions(path))) for level, path in objects.items()}
    assert wide["baseline"] == {"xmm"}
    assert "ymm" in wide["avx2"]
    assert "zmm" not in wide["avx2"]
    assert "zmm" in wide["avx512"]
    # Contraction would give each level bits of its own. The exceptions are sums of exact products (vec.hpp) and what
    # rounding took from a product (moments.hpp), which is the fused product less the rounded one.
    for level in ("avx2", "avx512"):
        contracted = r"\tvf(nm(add|sub)\d{3}[ps][sd]|msub\d{3}[ps]s|madd\d{3}(ps|ss|sd))"
        assert not re.search(contracted, instructions(objects[level])), level
