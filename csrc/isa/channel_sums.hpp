// The two sums of a segment, of dy and of dy * xhat, that give everything in a backward: weighted they are the set's a
// and b, plain they are dbias and dweight.
#pragma once

#include <type_traits>

#include "isa/set_norm.hpp"
#include "isa/short_trees.hpp"

namespace fastnorm {
namespace {

struct SegmentSums {
  Sum dy, dy_xhat;
  double size = 0;  // about the sum of |dy|: float32 only
  void add(const SegmentSums& other) {
    dy.add(other.dy);
    dy_xhat.add(other.dy_xhat);
    size += other.size;
  }
};

// Asks for what a first reading of x and dy will want soon, or for nothing.
struct ReadAhead {
  int64_t x_distance, dy_distance;
  ReadAhead(const Plan& plan, int64_t run)
      : x_distance(reading_ahead<float>(plan, plan.x, run)), dy_distance(reading_ahead<float>(plan, plan.dy, run)) {}
  FASTNORM_INLINE void operator()(const float* x, const float* dy) const {
    prefetch(x, x_distance);
    prefetch(dy, dy_distance);
  }
};
struct NoReadAhead {
  FASTNORM_INLINE void operator()(const float*, const float*) const {}
};

// How a run is cut into trees: whole ones, then one of fewer packs, the last of which may be a part of one.
struct TreeCut {
  static constexpr int64_t kTree = kTreePacks * kPack;
  int64_t trees, last;  // `last`: values in the last pack
  int rest;             // packs after the whole trees

  explicit TreeCut(int64_t n)
      : trees(n / kTree), last((n - 1) % kPack + 1), rest(static_cast<int>((n % kTree + kPack - 1) / kPack)) {}

  // call(std::integral_constant<int, rest>): for loops over many runs that are cut the same way.
  template <class Call>
  FASTNORM_INLINE void with_rest(const Call& call) const {
    switch (rest) {
      case 0:
        return call(std::integral_constant<int, 0>{});
      case 1:
        return call(std::integral_constant<int, 1>{});
      case 2:
        return call(std::integral_constant<int, 2>{});
      case 3:
        return call(std::integral_constant<int, 3>{});
      default:
        return call(std::integral_constant<int, 4>{});
    }
  }
};

// Sums of float32 data in short trees: of dy, of dy * (x - pivot) and, for nothing but its size, of |dy|.
struct TreeGradientSums {
  ShortTreeSum dy_sum, product_sum;
  Pack<float> size = Pack<float>(0.0f);

  struct Terms {
    Pack<float> dy, product, size;
    FASTNORM_INLINE friend Terms operator+(const Terms& a, const Terms& b) {
      return {a.dy + b.dy, a.product + b.product, a.size + b.size};
    }
  };
  FASTNORM_INLINE void add(const Terms& tree) {
    dy_sum.add(tree.dy);
    product_sum.add(tree.product);
    size += tree.size;
  }

  // A run. What is missing in the last pack is zeros of dy: they add nothing.
  template <int kRest, class Ahead>
  FASTNORM_INLINE void add_run(const float* x, const float* dy, const TreeCut& cut, const Pack<float>& pivot,
                               const Ahead& ahead) {
    const auto terms = [&](auto at) {
      ahead(x + at.start, dy + at.start);
      const Pack<float> g = in_register(at.template load<float>(dy));
      return Terms{g, g * (at.template load<float>(x) - pivot), magnitude(g)};
    };
    const auto whole = [&](int64_t i) { return terms(Whole{i}); };
    int64_t i = 0;
    for (int64_t tree = 0; tree < cut.trees; ++tree, i += TreeCut::kTree) {
      add((whole(i) + whole(i + kPack)) + (whole(i + 2 * kPack) + whole(i + 3 * kPack)));
    }
    const auto last = [&] { return terms(Partial{i + (kRest - 1) * kPack, cut.last}); };
    if constexpr (kRest == 1) add(last());
    if constexpr (kRest == 2) add(whole(i) + last());
    if constexpr (kRest == 3) add((whole(i) + whole(i + kPack)) + last());
    if constexpr (kRest == 4) add((whole(i) + whole(i + kPack)) + (whole(i + 2 * kPack) + last()));
  }
};

constexpr double kTrustedSize = 0x1p120;

// What a segment or a part of one comes to. `trusted`: nothing overflowed in float32, nor vanished beside so small a
// sum. (Where x is constant the sum is 0, and has to be: what is not trusted is added up again in double.)
struct TreeTotals {
  double dy, dy_xhat;
  bool trusted;

  static TreeTotals of(double dy, double product, double size, double off, double rstd) {
    const double magnitude = std::fabs(product);
    const bool finite = (size < kTrustedSize) & (magnitude < kTrustedSize), large = (magnitude > 0x1p-84) | (size == 0);
    return {dy, (product + off * dy) * rstd, static_cast<bool>(finite & large)};
  }
};

// The sums of one unit of float32 data; false where they cannot be trusted.
FASTNORM_LOOPS inline bool tree_unit_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit, const Statistic& s,
                                          SegmentSums& total) {
  const Operands<2, false> operands{{&plan.x, &plan.dy}, nullptr};
  const ReadAhead ahead(plan, run);
  const Pivot pivot = Pivot::of(s);
  const Pack<float> pivots(pivot.value);
  TreeGradientSums sums;
  visit_unit<float>(plan, operands, run, set, unit, [&](const float* const* in, float*, int64_t, int64_t n) {
    TreeGradientSums inner = sums;
    const TreeCut cut(n);
    cut.with_rest([&](auto rest) { inner.add_run<decltype(rest)::value>(in[0], in[1], cut, pivots, ahead); });
    sums = inner;
  });
  total.size = fold(widen(sums.size));
  const TreeTotals totals =
      TreeTotals::of(fold(sums.dy_sum.lanes), fold(sums.product_sum.lanes), total.size, pivot.off, s.rstd);
  total.dy.hi = totals.dy;
  total.dy_xhat.hi = totals.dy_xhat;
  return totals.trusted;
}

// The sums of one unit, weighted or not. Float32 data is added in plain lanes of double; float64 data has no digits to
// spare and is added in trees.
template <class T, class WeightAt>
FASTNORM_LOOPS inline SegmentSums unit_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit,
                                            const Statistic& s, const WeightAt& weight_at) {
  const Operands<2, false> operands{{&plan.x, &plan.dy}, nullptr};
  const Centre<T, double> centre(s);
  const Pack<double> rstd(s.rstd);
  const int64_t x_ahead = reading_ahead<T>(plan, plan.x, run), dy_ahead = reading_ahead<T>(plan, plan.dy, run);
  SegmentSums total;
  PackPair lanes{0.0, 0.0};
  PairTree tree;
  Size size;
  visit_unit<T>(plan, operands, run, set, unit, [&](const T* const* in, T*, int64_t first, int64_t n) {
    const T *x = in[0], *dy = in[1];
    const auto weight = weight_at(first);
    const auto terms = [&](auto at) { return gradient_terms(at, x, dy, centre, rstd, weight); };
    if constexpr (kMayOverflow<T>) {
      tree.push(tree_sums(0, n, terms));
    } else {
      PackPair inner = lanes;
      Size inner_size = size;
      for_packs(n, [&](auto at) {
        prefetch(x + at.start, x_ahead);
        prefetch(dy + at.start, dy_ahead);
        inner += terms(at);
        inner_size.add(at, dy);
      });
      lanes = inner;
      size = inner_size;
    }
  });
  const Pair sums = fold(kMayOverflow<T> ? tree.total() : lanes);
  total.dy.add(sums.first);
  total.dy_xhat.add(sums.second);
  total.size = kMayOverflow<T> ? 0 : size.total();
  return total;
}

// The sums of one unit added up in double, where those of its trees cannot be trusted; but for the sum of dy, which
// must not change with what x is.
inline SegmentSums careful_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit, const Statistic& s,
                                const SegmentSums& of_trees) {
  SegmentSums sums = unit_sums<float>(plan, run, set, unit, s, [](int64_t) { return None{}; });
  if (of_trees.size < kTrustedSize) sums.dy = of_trees.dy;
  return sums;
}

// The means that the input gradient subtracts, and whether float32 can hold what is made of them.
struct GradientMeans {
  double a = 0, b = 0;
  bool in_float = false;

  template <class T>
  static GradientMeans of(const Sum& a, const Sum& b, double size, double count, bool centred, bool plain_weights,
                          const Statistic& s) {
    GradientMeans means = of_sums<T>(centred ? a.value() : 0, b.value(), size, count, s.mean, s.rstd);
    means.in_float = !kMayOverflow<T> && plain_weights && means.in_float;
    return means;
  }
  // Without a branch, for loops over sets; and without a division, for which float32 results do not ask.
  template <class T>
  static GradientMeans of_sums(double a, double b, double size, double count, double mean, double rstd) {
    const double share = 1 / count;
    GradientMeans means;
    means.a = kMayOverflow<T> ? a / count : a * share;
    means.b = kMayOverflow<T> ? b / count : b * share;
    const bool fits = moderate(rstd) & (std::fabs(mean) < kMostMean);
    const bool fit =
        zero_or_moderate(size * share) & (std::fabs(means.a) < kMostMean) & (std::fabs(means.b * rstd) < kMostMean);
    means.in_float = static_cast<bool>(fits & fit);
    return means;
  }
};

// The sums of every segment of a call; those of float32 data, in which each digit of a double is to spare, lie apart.
template <class T>
class SegmentTable {
 public:
  explicit SegmentTable(int64_t count) : sums_(count) {}
  explicit operator bool() const { return static_cast<bool>(sums_); }
  const SegmentSums& operator[](int64_t i) const { return sums_[i]; }
  void put(int64_t i, const SegmentSums& sums) { sums_[i] = sums; }

 private:
  const Workspace<SegmentSums> sums_;
};

template <>
class SegmentTable<float> {
 public:
  explicit SegmentTable(int64_t count)
      : space_(3 * count), dy(space_.data()), dy_xhat(dy + count), size(dy + 2 * count) {}
  explicit operator bool() const { return static_cast<bool>(space_); }
  SegmentSums operator[](int64_t i) const {
    SegmentSums sums;
    sums.dy.hi = dy[i];
    sums.dy_xhat.hi = dy_xhat[i];
    sums.size = size[i];
    return sums;
  }
  void put(int64_t i, const SegmentSums& sums) {
    dy[i] = sums.dy.value();
    dy_xhat[i] = sums.dy_xhat.value();
    size[i] = sums.size;
  }

 private:
  const Workspace<double> space_;

 public:
  double *const dy, *const dy_xhat, *const size;
};

// A sum where every digit counts in float64, and any order will do for float32 data.
template <class T>
inline void accumulate(Sum& sum, const Sum& term) {
  if constexpr (kMayOverflow<T>) {
    sum.add(term);
  } else {
    sum.hi += term.hi;
  }
}

// Parameter gradients from the sums of all segments, added up in order over those that share a parameter: `count` rows
// of `width` sums, the first parameter of row i being param(i); `totals` are two times plan.params zeros.
template <class Param>
inline void reduce_parameter_gradients(const Plan& plan, const NormArgs<float>& args, const SegmentTable<float>& sums,
                                       int64_t count, int64_t width, const Param& param, double* totals) {
  double *const dy = totals, *const dy_xhat = totals + plan.params;
  for (int64_t i = 0; i < count; ++i) {
    double *to_dy = dy + param(i), *to_dy_xhat = dy_xhat + param(i);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      to_dy[j] += sums.dy[i * width + j];
      to_dy_xhat[j] += sums.dy_xhat[i * width + j];
    }
  }
  for (int64_t p = 0; p < plan.params; ++p) {
    if (args.dweight) args.dweight[p] = static_cast<float>(dy_xhat[p]);
    if (args.dbias) args.dbias[p] = static_cast<float>(dy[p]);
  }
}
template <class Param>
inline void reduce_parameter_gradients(const Plan& plan, const NormArgs<double>& args, const SegmentTable<double>& sums,
                                       int64_t count, int64_t width, const Param& param, Sum* totals) {
  Sum *const dy = totals, *const dy_xhat = totals + plan.params;
  for (int64_t i = 0; i < count * width; ++i) {
    const int64_t to = param(i / width) + i % width;
    dy[to].add(sums[i].dy);
    dy_xhat[to].add(sums[i].dy_xhat);
  }
  for (int64_t p = 0; p < plan.params; ++p) {
    if (args.dweight) args.dweight[p] = dy_xhat[p].value();
    if (args.dbias) args.dbias[p] = dy[p].value();
  }
}

}  // namespace
}  // namespace fastnorm
