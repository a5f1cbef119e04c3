// Dropout and gaussian noise over any strides: draws come from docs/dropout.md's mapping, elements are walked in C
// order. Promises the same bits for every cut of the range, layout and level. Stores no mask: a window of draws lives
// on the stack. Compiled once per instruction-set level, inside an anonymous namespace; no standard containers.
#pragma once

#include <cassert>
#include <cstring>

#include "isa/normal.hpp"
#include "isa/philox.hpp"

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

// The keep bytes around the place last asked for. Runs ask in rising order nearly always, so most bytes are made once.
class KeepWindow {
 public:
  explicit KeepWindow(const MaskDraw& draw) : draw_(draw) {
    constant_ = draw.threshold == 0 || draw.threshold >> 32 != 0;
    if (constant_) std::memset(keep_, draw.threshold != 0, sizeof keep_);
  }

  // The bytes from element `index` on; `length` is cut to how many there are.
  const uint8_t* at(int64_t index, int64_t* length) {
    if (!constant_ && (index < first_ || index >= first_ + size)) {
      first_ = index - index % size;
      keep_group(keep_, static_cast<uint64_t>(first_) / 8, draw_);
    }
    const int64_t start = constant_ ? 0 : index - first_;
    if (*length > size - start) *length = size - start;
    return keep_ + start;
  }

 private:
  static constexpr int64_t size = 8 * kGroupBlocks;
  MaskDraw draw_;
  bool constant_;
  int64_t first_ = -size;
  uint8_t keep_[size];
};

// The variates around the place last asked for.
class NormalWindow {
 public:
  explicit NormalWindow(const PhiloxStream& stream) : stream_(stream) {}

  const double* at(int64_t index, int64_t* length) {
    if (index < first_ || index >= first_ + size) {
      first_ = index - index % size;
      normal_group(z_, static_cast<uint64_t>(first_) / 2, stream_);
    }
    const int64_t start = index - first_;
    if (*length > size - start) *length = size - start;
    return z_ + start;
  }

 private:
  static constexpr int64_t size = 2 * kGroupBlocks;
  PhiloxStream stream_;
  int64_t first_ = -size;
  double z_[size];
};

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
inline bool packed(const char* y, const char* x, int64_t y_stride, int64_t x_stride) {
  constexpr int64_t size = sizeof(T);
  return y_stride == size && x_stride == size && reinterpret_cast<uintptr_t>(y) % alignof(T) == 0 &&
         reinterpret_cast<uintptr_t>(x) % alignof(T) == 0;
}

// y[i] = f(x[i], i) for one run: a vector loop where both are contiguous and aligned, element by element elsewhere.
// y may be x itself; the strides are in bytes.
template <class T, class Function>
[[gnu::always_inline]] inline void map_run(char* y, const char* x, int64_t y_stride, int64_t x_stride, int64_t length,
                                           Function f) {
  if (packed<T>(y, x, y_stride, x_stride)) {
    T* yt = reinterpret_cast<T*>(y);
    const T* xt = reinterpret_cast<const T*>(x);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) yt[i] = f(xt[i], i);
  } else {
    for (int64_t i = 0; i < length; ++i) store<T>(y + i * y_stride, f(load<T>(x + i * x_stride), i));
  }
}

struct InnerStrides {
  explicit InnerStrides(const ElementWalk& walk)
      : result(walk.axes ? walk.stride[ElementWalk::result][walk.axes - 1] : 0),
        input(walk.axes ? walk.stride[ElementWalk::input][walk.axes - 1] : 0),
        mask(walk.axes ? walk.stride[ElementWalk::mask][walk.axes - 1] : 0) {}
  int64_t result, input, mask;
};

template <class T>
void drop(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw,
          T factor) {
  const InnerStrides inner(walk);
  assert(inner.mask == 0 || inner.mask == 1);
  KeepWindow window(draw);
  for_each_run(walk, first, count, [&](int64_t length, int64_t yo, int64_t xo, int64_t mask) {
    if (inner.mask == 0) {
      int64_t one = 1;
      const bool kept = *window.at(mask, &one) != 0;
      map_run<T>(y + yo, x + xo, inner.result, inner.input, length,
                 [=](T value, int64_t) { return kept ? value * factor : T(0); });
      return;
    }
    while (length > 0) {
      int64_t part = length;
      const uint8_t* keep = window.at(mask, &part);
      map_run<T>(y + yo, x + xo, inner.result, inner.input, part,
                 [=](T value, int64_t i) { return keep[i] ? value * factor : T(0); });
      length -= part;
      mask += part;
      yo += part * inner.result;
      xo += part * inner.input;
    }
  });
}

template <class T>
void apply_mask(char* y, const char* x, const char* keep, const ElementWalk& walk, int64_t first, int64_t count,
                T factor) {
  const InnerStrides inner(walk);
  for_each_run(walk, first, count, [&](int64_t length, int64_t yo, int64_t xo, int64_t mask) {
    const char* k = keep + mask;
    if (inner.mask == 1) {
      map_run<T>(y + yo, x + xo, inner.result, inner.input, length,
                 [=](T value, int64_t i) { return k[i] != 0 ? value * factor : T(0); });
    } else {
      map_run<T>(y + yo, x + xo, inner.result, inner.input, length,
                 [=](T value, int64_t i) { return k[i * inner.mask] != 0 ? value * factor : T(0); });
    }
  });
}

template <class T>
void gaussian_noise(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count,
                    const PhiloxStream& stream, double std) {
  const InnerStrides inner(walk);
  NormalWindow window(stream);
  for_each_run(walk, first, count, [&](int64_t length, int64_t yo, int64_t xo, int64_t mask) {
    while (length > 0) {
      int64_t part = length;
      const double* z = window.at(mask, &part);
      map_run<T>(y + yo, x + xo, inner.result, inner.input, part,
                 [=](T value, int64_t i) { return static_cast<T>(static_cast<double>(value) + std * z[i]); });
      length -= part;
      mask += part;
      yo += part * inner.result;
      xo += part * inner.input;
    }
  });
}

inline void keep_mask(uint8_t* keep, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw) {
  const InnerStrides inner(walk);
  KeepWindow window(draw);
  for_each_run(walk, first, count, [&](int64_t length, int64_t, int64_t, int64_t mask) {
    while (length > 0) {
      int64_t part = length;
      const uint8_t* from = window.at(mask, &part);
      if (inner.mask == 0) {
        part = length;
        std::memset(keep, *from, static_cast<size_t>(part));
      } else {
        std::memcpy(keep, from, static_cast<size_t>(part));
      }
      length -= part;
      mask += part;
      keep += part;
    }
  });
}

template <class T>
constexpr DropoutKernels<T> dropout_table() {
  return {drop<T>, apply_mask<T>, gaussian_noise<T>, keep_mask, philox_blocks};
}

}  // namespace
}  // namespace fastnorm
