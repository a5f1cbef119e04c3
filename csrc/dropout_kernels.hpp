// What dropout and noise ask of the kernels: how their arrays are walked, which draws decide, and the table of
// functions. Every function works on a range of elements or tiles, so that any cut of the work gives the same bits. No
// Python, no threads, no allocation here.
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

// Up to three operands walked together, in any order of the axes: result, input (byte strides) and draws (strides
// counted in draws, 0 along shared axes) or mask (byte strides). Axes of extent 1 are dropped and neighbours that
// advance together are merged.
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

namespace {

// A walk whose innermost axis is not that of the draws, which is then the one before it: the plane of both is worked on
// in tiles.
constexpr int64_t kTileRows = 64, kTileColumns = 248;  // 248 draws in a row, wherever they start, lie in 32 blocks
inline bool is_tiled(const ElementWalk& walk) {
  return walk.axes >= 2 && walk.stride[ElementWalk::mask][walk.axes - 1] > 1;
}
inline int64_t row_tiles(const ElementWalk& walk) { return (walk.extent[walk.axes - 1] + kTileRows - 1) / kTileRows; }
inline int64_t column_tiles(const ElementWalk& walk) {
  return (walk.extent[walk.axes - 2] + kTileColumns - 1) / kTileColumns;
}
inline int64_t tiles_of(const ElementWalk& walk) {
  int64_t planes = 1;
  for (int axis = 0; axis < walk.axes - 2; ++axis) planes *= walk.extent[axis];
  return planes * column_tiles(walk) * row_tiles(walk);
}

}  // namespace

// Where the arrays of a call are: what no cache holds is asked for ahead, and written past the caches unless its pages
// are new (the system clears those, and their lines are in the cache already).
struct Reach {
  bool ask_ahead = false, past_cache = false;
};

// y, x: the addresses of element 0. first, count: the elements to work on, which lie inside the walk.
template <class T>
struct DropoutKernels {
  // y = keep ? x * factor : +0, keep being drawn. The innermost mask stride is 0 or 1.
  void (*drop)(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw,
               T factor, Reach reach);
  // The same for tiles first .. first + count of a tiled walk. Not every element is kept, nor dropped.
  void (*drop_tiles)(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count,
                     const MaskDraw& draw, T factor);
  // s = residual + (keep ? x * factor : +0) for elements in a row, the first having the logical index `index`; without
  // a residual s = keep ? x * factor : +0. s goes past the caches to `past_cache` as well, unless that is nullptr; the
  // two are at the same place in a line.
  void (*drop_add)(T* s, const T* x, const T* residual, int64_t index, int64_t count, const MaskDraw& draw, T factor,
                   T* past_cache);
  // g += ds, dx = keep ? g * factor : +0; g stays as it is without ds. dx may be g, unless it goes past the caches. g
  // goes past them to `g_past_cache` as well, as s does.
  void (*add_drop)(T* dx, T* g, const T* ds, int64_t index, int64_t count, const MaskDraw& draw, T factor,
                   bool past_cache, T* g_past_cache);
  // The same as drop with a mask of bytes, not 0 = kept, given by the user.
  void (*apply_mask)(char* y, const char* x, const char* keep, const ElementWalk& walk, int64_t first, int64_t count,
                     T factor);
  // y = x + std * z, z being the normal variate of the element; the mask stride is the logical index.
  void (*gaussian_noise)(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count,
                         const PhiloxStream& stream, double std);
  // The same for tiles first .. first + count of a tiled walk.
  void (*noise_tiles)(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count,
                      const PhiloxStream& stream, double std);
  // The rest does not depend on T.
  // keep[0..count) = 1 where kept, else 0, for elements first.. of the walk (only its mask strides are read).
  void (*keep_mask)(uint8_t* keep, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw);
  // bits[0 .. (count + 7) / 8) = those bytes, eight in one, the first in the highest bit: numpy.packbits.
  void (*pack_bits)(uint8_t* bits, const uint8_t* keep, int64_t count);
  // words[4 n] = Philox4x32 of counters[4 n] under one key, after `rounds` (7 or 10) rounds.
  void (*philox4x32)(uint32_t* words, const uint32_t* counters, int64_t n, const uint32_t key[2], int rounds);
};

}  // namespace fastnorm
