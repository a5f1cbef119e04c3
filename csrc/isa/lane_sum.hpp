// The only reduction loop of the project: a fixed number of accumulators and a fixed tree, so that a sum has the same bits
// at every instruction-set level. A plain `reduction(+:s)` would leave the order to the compiler (and be one latency chain).
#pragma once

#include <cstdint>

namespace fastnorm {
namespace {

constexpr int kLanes = 32;

struct Pair {
  double first, second;
  void operator+=(Pair other) {
    first += other.first;
    second += other.second;
  }
};

// Accumulators for one sum or for two. Arrays with names of their own: an array of arrays is not kept in registers.
template <int kWidth>
struct One {
  using Term = double;
  double first[kWidth];

  void clear(int lane) { first[lane] = 0; }
  void set(int lane, double term) { first[lane] = term; }
  void add(int lane, double term) { first[lane] += term; }
  void add(int lane, const One& other, int from) { first[lane] += other.first[from]; }
  double get(int lane) const { return first[lane]; }
};

template <int kWidth>
struct Two {
  using Term = Pair;
  double first[kWidth], second[kWidth];

  void clear(int lane) { first[lane] = second[lane] = 0; }
  void set(int lane, Pair term) {
    first[lane] = term.first;
    second[lane] = term.second;
  }
  void add(int lane, Pair term) {
    first[lane] += term.first;
    second[lane] += term.second;
  }
  void add(int lane, const Two& other, int from) {
    first[lane] += other.first[from];
    second[lane] += other.second[from];
  }
  Pair get(int lane) const { return {first[lane], second[lane]}; }
};

// Sum of term(i) over i in [0, n), in double; term gives a double (One) or a Pair (Two).
template <class Lanes, class Term>
inline typename Lanes::Term lane_sums(int64_t n, const Term& term) {
  Lanes lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes.clear(lane);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes.add(lane, term(i + lane));
  }
  if (i < n) {
    // Accumulators of their own: indexing `lanes` by a variable would keep it out of the registers.
    Lanes tail;
    for (int lane = 0; lane < kLanes; ++lane) tail.clear(lane);
    const int rest = static_cast<int>(n - i);
#pragma omp simd
    for (int lane = 0; lane < rest; ++lane) tail.set(lane, term(i + lane));
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes.add(lane, tail, lane);
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma omp simd
    for (int lane = 0; lane < width; ++lane) lanes.add(lane, lanes, lane + width);
  }
  return lanes.get(0);
}

template <class Term>
inline double sum(int64_t n, const Term& term) {
  return lane_sums<One<kLanes>>(n, term);
}

template <class Term>
inline Pair sum_pairs(int64_t n, const Term& term) {
  return lane_sums<Two<kLanes>>(n, term);
}

}  // namespace
}  // namespace fastnorm
