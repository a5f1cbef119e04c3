// What dropout and noise ask of the kernels: how their arrays are walked, which draws decide, and the table of
// functions. Every function works on a range of elements counted in C order, so that any cut of the work gives the same
// bits. No Python, no threads, no allocation here.
#pragma once

#include <cstdint>

namespace fastnorm {

constexpr int kMaxAxes = 64;  // NumPy's own limit

// The place of one set of draws in the generator: docs/dropout.md.
struct PhiloxStream {
  uint64_t seed;
  uint64_t offset;
};

// Element i is kept when its 32-bit draw is below `threshold`, which lies in [0, 2^32].
struct MaskDraw {
  PhiloxStream stream;
  uint64_t threshold;
};

// Up to three operands walked together in C order: result, input (byte strides) and draws (strides counted in draws, 0
// along shared axes) or mask (byte strides). Axes of extent 1 are dropped and neighbours that advance together are
// merged.
struct ElementWalk {
  enum Operand { result, input, mask, operands };
  int axes = 0;
  int64_t extent[kMaxAxes];
  int64_t stride[operands][kMaxAxes];

  // Outermost axis first.
  void append(int64_t n, int64_t result_stride, int64_t input_stride, int64_t mask_stride) {
    if (n == 1) return;
    const int64_t next[operands] = {result_stride, input_stride, mask_stride};
    bool merges = axes > 0;
    for (int k = 0; merges && k < operands; ++k) merges = stride[k][axes - 1] == n * next[k];
    if (!merges) extent[axes++] = 1;
    extent[axes - 1] *= n;
    for (int k = 0; k < operands; ++k) stride[k][axes - 1] = next[k];
  }
};

// y, x: the addresses of element 0. first, count: the elements to work on, which lie inside the walk.
template <class T>
struct DropoutKernels {
  // y = keep ? x * factor : +0, keep being drawn. The innermost mask stride is 0 or 1.
  void (*drop)(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw,
               T factor);
  // The same with a mask of bytes, not 0 = kept, given by the user.
  void (*apply_mask)(char* y, const char* x, const char* keep, const ElementWalk& walk, int64_t first, int64_t count,
                     T factor);
  // y = x + std * z, z being the normal variate of the element; the mask stride is the logical index.
  void (*gaussian_noise)(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count,
                         const PhiloxStream& stream, double std);
  // The rest does not depend on T.
  // keep[0..count) = 1 where kept, for elements first.. of the walk (only its mask strides are read).
  void (*keep_mask)(uint8_t* keep, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw);
  // words[4 n] = Philox4x32 of counters[4 n] under one key, after `rounds` (7 or 10) rounds.
  void (*philox4x32)(uint32_t* words, const uint32_t* counters, int64_t n, const uint32_t key[2], int rounds);
};

}  // namespace fastnorm
