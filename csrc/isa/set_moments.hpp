// Moments and statistics of one set: block by block along all its elements, merged in a tree whose shape depends on the
// number of blocks alone. A chain of merges would lose a little of the mean at every block, and a set can have 2^15.
#pragma once

#include <cmath>

#include "isa/moments.hpp"
#include "isa/walk_io.hpp"

namespace fastnorm {
namespace {

template <bool exact, class Leaf>
inline Moments merge_tree(int64_t first, int64_t end, const Leaf& leaf) {
  if (end - first == 1) return leaf(first);
  const int64_t middle = first + (end - first) / 2;
  Moments left = merge_tree<exact>(first, middle, leaf);
  left.template merge<exact>(merge_tree<exact>(middle, end, leaf));
  return left;
}

// A chunk is the part of a set that one thread may take.
inline int64_t moment_chunks(const Plan& plan) { return (plan.whole_blocks.count + kChunkBlocks - 1) / kChunkBlocks; }

template <class T>
inline Port<T> whole_port(const Plan& plan, int64_t set) {
  return Port<T>(plan.x.data + plan.x.set.offset(set), plan.whole, plan.x.aligned);
}

template <class T>
inline Moments chunk_moments(const Plan& plan, int64_t set, int64_t chunk, bool centred, double scale) {
  alignas(64) T buffer[kBlock];
  const Port<T> x = whole_port<T>(plan, set);
  const Blocks& blocks = plan.whole_blocks;
  const int64_t first = chunk * kChunkBlocks;
  const int64_t end = first + kChunkBlocks < blocks.count ? first + kChunkBlocks : blocks.count;
  return merge_tree<kMayOverflow<T>>(first, end, [&](int64_t block) {
    const int64_t n = blocks.size(block);
    const T* values = x.read(blocks.start(block), n, buffer);
    return centred ? block_moments(values, n, scale) : block_squares(values, n, scale);
  });
}

template <class T>
inline Moments set_moments(const Plan& plan, int64_t set, bool centred, double scale) {
  return merge_tree<kMayOverflow<T>>(0, moment_chunks(plan),
                                     [&](int64_t chunk) { return chunk_moments<T>(plan, set, chunk, centred, scale); });
}

// The power of two that brings a set's largest magnitude near 1, within what squares and eps can bear; 0 if not all
// finite.
template <class T>
inline double scale_of_set(const Plan& plan, int64_t set) {
  alignas(64) T buffer[kBlock];
  const Port<T> x = whole_port<T>(plan, set);
  double largest = 0;
  bool finite = true;
  for (int64_t block = 0; block < plan.whole_blocks.count; ++block) {
    const int64_t n = plan.whole_blocks.size(block);
    const T* values = x.read(plan.whole_blocks.start(block), n, buffer);
    for (int64_t i = 0; i < n; ++i) {
      const double magnitude = std::fabs(static_cast<double>(values[i]));
      finite = finite && magnitude <= 0x1.fffffffffffffp1023;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  if (!finite) return 0;
  if (largest == 0) return 1;
  const int exponent = std::ilogb(largest);
  return std::ldexp(1.0, exponent > 960 ? -960 : exponent < -900 ? 900 : -exponent);
}

// A set's statistic from its moments; float64 sets that overflow or underflow are measured again, scaled (rare, so
// free).
template <class T>
inline Statistic set_statistic(const Plan& plan, int64_t set, const NormArgs<T>& args, Moments& moments) {
  double scale = 1;
  if (needs_scale<T>(moments, args.eps)) {
    const double better = scale_of_set<T>(plan, set);
    if (better != 0 && better != 1) {
      scale = better;
      moments = set_moments<T>(plan, set, args.centred, scale);
    }
    if (moments.m2.value() == 0) {  // constant: x - mean is 0 without a scale, under which a small eps would vanish
      moments.mean /= scale;
      moments.mean_lo /= scale;
      scale = 1;
    }
  }
  return statistic_of<T>(moments, args.eps, scale, args.centred);
}

template <class T>
inline Statistic given_statistic(const NormArgs<T>& args, int64_t stat) {
  return statistic_from<T>(args.mean ? args.mean[stat] : 0, args.mean_lo ? args.mean_lo[stat] : 0, args.rstd[stat],
                           args.rstd_lo ? args.rstd_lo[stat] : 0);
}

// The statistic a forward left for its backward; measured again where float64 could not hold it.
template <class T>
inline Statistic kept_statistic(const Plan& plan, const NormArgs<T>& args, int64_t set) {
  const int64_t stat = plan.set_stat.offset(set);
  if (args.constant_stats || !lost<T>(args.rstd[stat])) {
    Statistic s = given_statistic(args, stat);
    s.of_x = varies(args.rstd[stat], args.eps);
    return s;
  }
  Moments moments = set_moments<T>(plan, set, args.centred, 1);
  return set_statistic(plan, set, args, moments);
}

}  // namespace
}  // namespace fastnorm
