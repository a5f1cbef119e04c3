// Elements walked in runs along the innermost axis, and functions mapped over a run of two arrays of any strides.
// Promises one call per stretch of memory and a vector loop where the memory allows one. Compiled once per
// instruction-set level, inside an anonymous namespace; no standard containers.
#pragma once

#include <cstring>

#include "dropout_kernels.hpp"

namespace fastnorm {
namespace {

// Calls run(length, result, input, mask) for every stretch of elements first .. first + count along the innermost axis;
// result, input and mask are the offsets of its first element. An empty walk is one element.
template <class Run>
inline void for_each_run(const ElementWalk& walk, int64_t first, int64_t count, Run run) {
  if (count <= 0) return;
  if (walk.axes == 0) return run(count, int64_t{0}, int64_t{0}, int64_t{0});
  const int inner = walk.axes - 1;
  int64_t index[kMaxAxes];
  int64_t at[ElementWalk::operands] = {};
  for (int axis = inner; axis >= 0; --axis) {
    index[axis] = first % walk.extent[axis];
    first /= walk.extent[axis];
    for (int k = 0; k < ElementWalk::operands; ++k) at[k] += index[axis] * walk.stride[k][axis];
  }
  while (true) {
    const int64_t rest = walk.extent[inner] - index[inner];
    const int64_t length = rest < count ? rest : count;
    run(length, at[ElementWalk::result], at[ElementWalk::input], at[ElementWalk::mask]);
    count -= length;
    if (count == 0) return;
    for (int k = 0; k < ElementWalk::operands; ++k) at[k] -= index[inner] * walk.stride[k][inner];
    index[inner] = 0;
    for (int axis = inner - 1; axis >= 0; --axis) {
      for (int k = 0; k < ElementWalk::operands; ++k) at[k] += walk.stride[k][axis];
      if (++index[axis] < walk.extent[axis]) break;
      for (int k = 0; k < ElementWalk::operands; ++k) at[k] -= index[axis] * walk.stride[k][axis];
      index[axis] = 0;
    }
  }
}

template <class T>
inline T load(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store(char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Unsigned = uint32_t;
  using Signed = int32_t;
};
template <>
struct Bits<double> {
  using Unsigned = uint64_t;
  using Signed = int64_t;
};

// keep ? value : +0, whatever value is.
template <class T>
[[gnu::always_inline]] inline T kept(bool keep, T value) {
#if defined(__AVX2__)
  return keep ? value : T(0);
#else
  // Compilers turn the selection into a branch here, which a random mask takes at random.
  typename Bits<T>::Unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= -static_cast<typename Bits<T>::Unsigned>(keep);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
#endif
}

template <class T>
inline bool packed(const char* y, const char* x, int64_t y_stride, int64_t x_stride) {
  constexpr int64_t size = sizeof(T);
  return y_stride == size && x_stride == size && reinterpret_cast<uintptr_t>(y) % alignof(T) == 0 &&
         reinterpret_cast<uintptr_t>(x) % alignof(T) == 0;
}

// y[i] = f(x[i], i) for one run, in vectors: where the elements are apart or not aligned, they are brought together in
// a buffer. y may be x itself; the strides are in bytes.
template <class T, class Function>
[[gnu::always_inline]] inline void map_run(char* y, const char* x, int64_t y_stride, int64_t x_stride, int64_t length,
                                           Function f) {
  if (packed<T>(y, x, y_stride, x_stride)) {
    T* yt = reinterpret_cast<T*>(y);
    const T* xt = reinterpret_cast<const T*>(x);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) yt[i] = f(xt[i], i);
    return;
  }
  constexpr int64_t size = 128;
  alignas(64) T buffer[size];
  for (int64_t start = 0; start < length; start += size) {
    const int64_t n = length - start < size ? length - start : size;
    for (int64_t i = 0; i < n; ++i) buffer[i] = load<T>(x + (start + i) * x_stride);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = f(buffer[i], start + i);
    for (int64_t i = 0; i < n; ++i) store<T>(y + (start + i) * y_stride, buffer[i]);
  }
}

struct InnerStrides {
  explicit InnerStrides(const ElementWalk& walk)
      : result(walk.axes ? walk.stride[ElementWalk::result][walk.axes - 1] : 0),
        input(walk.axes ? walk.stride[ElementWalk::input][walk.axes - 1] : 0),
        mask(walk.axes ? walk.stride[ElementWalk::mask][walk.axes - 1] : 0) {}
  int64_t result, input, mask;
};

// One tile of a tiled walk: rows along memory, columns along the draws.
struct DrawTile {
  int64_t rows, columns;
  int64_t at[ElementWalk::operands];  // of its first element
};

// visit(tile) for tiles first .. first + count.
template <class Visit>
inline void for_each_tile(const ElementWalk& walk, int64_t first, int64_t count, const Visit& visit) {
  const int row_axis = walk.axes - 1, column_axis = walk.axes - 2;
  for (int64_t i = first; i < first + count; ++i) {
    int64_t rest = i;
    const int64_t row = rest % row_tiles(walk) * kTileRows;
    rest /= row_tiles(walk);
    const int64_t column = rest % column_tiles(walk) * kTileColumns;
    rest /= column_tiles(walk);
    DrawTile tile;
    for (int k = 0; k < ElementWalk::operands; ++k) {
      tile.at[k] = row * walk.stride[k][row_axis] + column * walk.stride[k][column_axis];
    }
    for (int axis = column_axis - 1; axis >= 0; --axis) {
      for (int k = 0; k < ElementWalk::operands; ++k) tile.at[k] += rest % walk.extent[axis] * walk.stride[k][axis];
      rest /= walk.extent[axis];
    }
    tile.rows = walk.extent[row_axis] - row < kTileRows ? walk.extent[row_axis] - row : kTileRows;
    tile.columns = walk.extent[column_axis] - column < kTileColumns ? walk.extent[column_axis] - column : kTileColumns;
    visit(tile);
  }
}

}  // namespace
}  // namespace fastnorm
