// Moments of float64 sets, from one reading where the data allow it. Sums about zero first: x - 0 loses nothing, and
// where the mean is but a part of a standard deviation they are as good as sums about the mean. Other sets are read
// again, about the mean that the first reading gave, and what lies too far from zero for that by blocks
// (set_moments.hpp).
#pragma once

#include <type_traits>

#include "isa/runs.hpp"
#include "isa/set_moments.hpp"

namespace fastnorm {
namespace {

// What the values are taken about.
struct AboutZero {};
struct About {
  Pack<double> pivot;
  explicit About(double value) : pivot(value) {}
};

// Sums of d and d * d (kCentred) or of x * x alone: leaves are trees, and added with what rounding takes, so that a sum
// is off by no more than a leaf's four additions in a chain, however many values there are.
template <bool kCentred, class Pivot>
class Deviations {
 public:
  ExactSum sum, squares;

  explicit Deviations(Pivot pivot = Pivot{}) : pivot_(pivot) {}

  // n <= kLeaf values, the place they begin at being a multiple of kLeaf in their run.
  FASTNORM_INLINE void add_leaf(const double* x, int64_t n) {
    add(leaf_sums<kAboutZero>(0, n, [&](auto at) { return terms(at, x); }));
  }
  // The same of a known shape (with_leaf_shape).
  template <class Packs, class HasRest>
  FASTNORM_INLINE void add_leaf(const double* x, Packs packs, HasRest has_rest, int64_t rest) {
    add(leaf_sums<kAboutZero>(0, packs, has_rest, rest, [&](auto at) { return terms(at, x); }));
  }
  // `distance` as prefetch has it, 0: nothing is asked for.
  FASTNORM_INLINE void add_leaf_asking(const double* x, int64_t n, int64_t distance) {
    if (distance != 0) ask_for(x, n, distance);
    add_leaf(x, n);
  }
  FASTNORM_INLINE void add_run(const double* x, int64_t n, int64_t distance) {
    for (; n > kLeaf; n -= kLeaf, x += kLeaf) add_leaf_asking(x, kLeaf, distance);
    add_leaf_asking(x, n, distance);
  }

 private:
  static constexpr bool kAboutZero = std::is_same<Pivot, AboutZero>::value;

  template <class At>
  FASTNORM_INLINE auto terms(At at, const double* x) const {
    const Pack<double> loaded = at.template load<double>(x);
    // (Of a part, which is loaded with a mask, compilers would keep a copy in memory for this.)
    const Pack<double> v = kCentred && std::is_same<At, Whole>::value ? in_register(loaded) : loaded;
    if constexpr (!kCentred) {
      return v * v;
    } else if constexpr (kAboutZero) {
      return PackPair{v, v * v};
    } else {
      return deviations(v, pivot_.pivot);
    }
  }
  FASTNORM_INLINE void add(const PackPair& leaf) {
    sum.add(leaf.first);
    squares.add(leaf.second);
  }
  FASTNORM_INLINE void add(const Pack<double>& leaf) { squares.add(leaf); }

  Pivot pivot_;
};

// Runs from this length on are leaves of their own; shorter ones are copied together, block by block.
constexpr int64_t kLeastRun = 32;

// The elements of a chunk in its set.
inline Range chunk_elements(const Plan& plan, int64_t chunk) {
  const Blocks& blocks = plan.whole_blocks;
  const int64_t first = chunk * kChunkBlocks;
  const int64_t last = (first + kChunkBlocks < blocks.count ? first + kChunkBlocks : blocks.count) - 1;
  return {blocks.start(first), blocks.start(last) + blocks.size(last)};
}

// Do the sets of x lie in runs that are read where they are?
inline bool runs_in_place(const Plan& plan) {
  const Walk& whole = plan.whole;
  if (!plan.x.aligned || whole.rank > 2) return false;
  return whole.rank == 0 ||
         (whole.stride[whole.rank - 1] == sizeof(double) && (whole.rank == 1 || whole.inner_size() >= kLeastRun));
}

// visit(x, n) for the runs of a chunk, n <= kBlock: a cut that depends on x alone, not on where results go.
template <class Visit>
inline void for_set_runs(const Plan& plan, int64_t set, int64_t chunk, const Visit& visit) {
  const Walk& whole = plan.whole;
  const Range range = chunk_elements(plan, chunk);
  char* const base = plan.x.data + plan.x.set.offset(set);
  const int64_t inner = whole.inner_size();
  if (runs_in_place(plan)) {
    const int64_t step = whole.rank == 2 ? whole.stride[0] : 0;
    for_runs(range, inner, kBlock, [&](int64_t run, int64_t offset, int64_t, int64_t n) {
      visit(reinterpret_cast<const double*>(base + run * step) + offset, n);
    });
    return;
  }
  alignas(64) double buffer[kBlock];
  const Port<double> x(base, whole, plan.x.aligned);
  const int64_t length = inner >= kLeastRun ? inner : kBlock / inner * inner;
  for_runs(range, length, kBlock,
           [&](int64_t, int64_t, int64_t first, int64_t n) { visit(x.read(first, n, buffer), n); });
}

// The sums of a chunk: two, or that of squares alone.
template <bool kCentred, class Pivot>
FASTNORM_LOOPS inline void chunk_deviations(const Plan& plan, int64_t set, int64_t chunk, Pivot pivot, Sum& sum,
                                            Sum& squares) {
  Deviations<kCentred, Pivot> all(pivot);
  const int64_t distance = reading_ahead<double>(plan, plan.x, runs_in_place(plan) ? plan.whole.inner_size() : 0);
  for_set_runs(plan, set, chunk, [&](const double* x, int64_t n) { all.add_run(x, n, distance); });
  if (kCentred) sum = sum_of(all.sum.total());
  squares = sum_of(all.squares.total());
}

// Moments of a chunk, about zero, or next to the mean, or by blocks.
[[gnu::noinline]] inline Moments measure_chunk(const Plan& plan, int64_t set, int64_t chunk, bool centred) {
  const Range range = chunk_elements(plan, chunk);
  const double count = static_cast<double>(range.end - range.begin);
  Sum sum, squares;
  if (!centred) {
    chunk_deviations<false>(plan, set, chunk, AboutZero{}, sum, squares);
    Moments moments;
    moments.count = count;
    moments.m2 = squares;
    return moments;
  }
  chunk_deviations<true>(plan, set, chunk, AboutZero{}, sum, squares);
  Moments moments = moments_about(0, count, sum, squares);
  if (near_mean(moments, sum, squares)) return moments;
  const double pivot = short_mean_of(moments.mean, moments.m2.value() / count);
  chunk_deviations<true>(plan, set, chunk, About(pivot), sum, squares);
  moments = moments_about(pivot, count, sum, squares);
  return near_mean(moments, sum, squares) ? moments : chunk_moments<double>(plan, set, chunk, true, 1);
}

inline Moments measure_chunks(const Plan& plan, int64_t set, bool centred) {
  return merge_tree<true>(0, moment_chunks(plan),
                          [&](int64_t chunk) { return measure_chunk(plan, set, chunk, centred); });
}

}  // namespace
}  // namespace fastnorm
