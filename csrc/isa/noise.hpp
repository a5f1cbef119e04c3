// Gaussian noise over any strides: elements are walked in C order. Promises the same bits for every cut of the range,
// layout and level. Compiled once per instruction-set level, inside an anonymous namespace; no standard containers.
#pragma once

#include "isa/normal.hpp"
#include "isa/walk_runs.hpp"

namespace fastnorm {
namespace {

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

}  // namespace
}  // namespace fastnorm
