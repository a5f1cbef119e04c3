// The only reduction loop of the project: a fixed number of accumulators and a fixed tree, so that a sum has the same bits
// at every instruction-set level. A plain `reduction(+:s)` would leave the order to the compiler (and be one latency chain).
#pragma once

#include <cstdint>

namespace fastnorm {
namespace {

constexpr int kLanes = 32;

template <int K>
struct Terms {
  double v[K];
};

// Sums of term(i).v[k] over i in [0, n), in double.
template <int K, class Term>
inline Terms<K> lane_sums(int64_t n, const Term& term) {
  double lanes[K][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const Terms<K> t = term(i + lane);
      for (int k = 0; k < K; ++k) lanes[k][lane] += t.v[k];
    }
  }
  if (i < n) {
    // An array of its own: indexing `lanes` by a variable would keep the accumulators out of the registers.
    double tail[K][kLanes] = {};
    const int rest = static_cast<int>(n - i);
#pragma omp simd
    for (int lane = 0; lane < rest; ++lane) {
      const Terms<K> t = term(i + lane);
      for (int k = 0; k < K; ++k) tail[k][lane] = t.v[k];
    }
    for (int k = 0; k < K; ++k) {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) lanes[k][lane] += tail[k][lane];
    }
  }
  Terms<K> sums;
  for (int k = 0; k < K; ++k) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma omp simd
      for (int lane = 0; lane < width; ++lane) lanes[k][lane] += lanes[k][lane + width];
    }
    sums.v[k] = lanes[k][0];
  }
  return sums;
}

}  // namespace
}  // namespace fastnorm
