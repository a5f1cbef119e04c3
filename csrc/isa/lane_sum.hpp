// The only reduction loop of the project: a fixed number of accumulators and a fixed tree, so that a sum has the same
// bits at every instruction-set level. A plain `reduction(+:s)` would leave the order to the compiler (and be one
// latency chain).
//
// The tree goes all the way down: equal terms, as two-valued data have them, round the same way at every step of a
// plain chain, which costs float64 sums of 2048 such terms a dozen units in the last place. Added in pairs they are
// exact.
#pragma once

#include <cstdint>

namespace fastnorm {
namespace {

constexpr int kLanes = 32;

struct Pair {
  double first, second;
};

// Accumulators for one sum or for two. Arrays with names of their own: an array of arrays is not kept in registers.
template <int kWidth>
struct One {
  using Term = double;
  double first[kWidth];

  void clear(int lane) { first[lane] = 0; }
  void add(int lane, double term) { first[lane] += term; }
  void add_pair(int lane, double a, double b) { first[lane] += a + b; }
  void add(int lane, const One& other, int from) { first[lane] += other.first[from]; }
  double get(int lane) const { return first[lane]; }
};

template <int kWidth>
struct Two {
  using Term = Pair;
  double first[kWidth], second[kWidth];

  void clear(int lane) { first[lane] = second[lane] = 0; }
  void add(int lane, Pair term) {
    first[lane] += term.first;
    second[lane] += term.second;
  }
  void add_pair(int lane, Pair a, Pair b) {
    first[lane] += a.first + b.first;
    second[lane] += a.second + b.second;
  }
  void add(int lane, const Two& other, int from) {
    first[lane] += other.first[from];
    second[lane] += other.second[from];
  }
  Pair get(int lane) const { return {first[lane], second[lane]}; }
};

constexpr int kLeaf = 8 * kLanes;  // terms summed without recursion: chains of four pairs

// Lane by lane, the sums of term(i) over the i of [first, first + n) with (i - first) % kLanes == lane; n <= kLeaf.
template <class Lanes, class Term>
inline Lanes leaf_sums(int64_t first, int n, const Term& term) {
  Lanes lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes.clear(lane);
  if (n == kLeaf) {  // a constant count, so that the accumulators stay in registers
    for (int step = 0; step < kLeaf; step += 2 * kLanes) {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes.add_pair(lane, term(first + step + lane), term(first + step + kLanes + lane));
      }
    }
    return lanes;
  }
  int step = 0;
  for (; step + kLanes <= n; step += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes.add(lane, term(first + step + lane));
  }
  const int rest = n - step;
#pragma omp simd
  for (int lane = 0; lane < rest; ++lane) lanes.add(lane, term(first + step + lane));
  return lanes;
}

template <class Lanes, class Term>
inline Lanes tree_sums(int64_t first, int64_t n, const Term& term) {
  if (n <= kLeaf) return leaf_sums<Lanes>(first, static_cast<int>(n), term);
  const int64_t half = (n / 2 + kLeaf - 1) / kLeaf * kLeaf;
  Lanes left = tree_sums<Lanes>(first, half, term);
  const Lanes right = tree_sums<Lanes>(first + half, n - half, term);
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) left.add(lane, right, lane);
  return left;
}

// Sum of term(i) over i in [0, n), in double; term gives a double (One) or a Pair (Two).
template <class Lanes, class Term>
inline typename Lanes::Term lane_sums(int64_t n, const Term& term) {
  Lanes lanes = tree_sums<Lanes>(0, n, term);
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
