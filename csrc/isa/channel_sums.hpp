// The two sums of a segment, of dy and of dy * xhat, that give everything in a backward: weighted they are the set's a
// and b, plain they are dbias and dweight. With those of float64 data comes what is left of the mean: its error is
// small beside a standard deviation, but where one outlier makes that, not beside what all others are off the mean (dx
// was off by 25 u).
#pragma once

#include <limits>
#include <type_traits>

#include "isa/set_norm.hpp"
#include "isa/short_trees.hpp"

namespace fastnorm {
namespace {

struct SegmentSums {
  Sum dy, dy_xhat;
  double size = 0;  // the sum of |dy|: what float32 rows are judged by
  Sum rest;         // of x - mean, NaN where it is not known: float64 only
  void add(const SegmentSums& other) {
    dy.add(other.dy);
    dy_xhat.add(other.dy_xhat);
    size += other.size;
    rest.add(other.rest);
  }
};

// Asks for what a first reading of x and dy will want soon, or for nothing.
template <class T>
struct ReadAhead {
  int64_t x_distance, dy_distance;
  ReadAhead(const Plan& plan, int64_t run)
      : x_distance(reading_ahead<T>(plan, plan.x, run)), dy_distance(reading_ahead<T>(plan, plan.dy, run)) {}
  explicit ReadAhead(int64_t distance) : x_distance(distance), dy_distance(distance) {}
  FASTNORM_INLINE void operator()(const T* x, const T* dy) const {
    prefetch(x, x_distance);
    prefetch(dy, dy_distance);
    // Group norm of 56 x 56: 5 % less time, with AVX2 6 %; float64 14 % more.
    if constexpr (!kMayOverflow<T>) hold_back();
  }
};
// Asks for dx, which will be written soon, `distance` bytes from x.
struct ResultsAhead {
  int64_t distance;
  template <class T>
  FASTNORM_INLINE void operator()(const T* x, const T*) const {
    prefetch(x, distance);
  }
};
struct NoReadAhead {
  template <class T>
  FASTNORM_INLINE void operator()(const T*, const T*) const {}
};

// How a run is cut into trees: whole ones, then one of fewer packs, the last of which may be a part of one.
struct TreeCut {
  static constexpr int64_t kTree = kTreePacks * kPack;
  int64_t trees, last;  // `last`: values in the last pack
  int rest;             // packs after the whole trees

  explicit TreeCut(int64_t n)
      : trees(n / kTree), last((n - 1) % kPack + 1), rest(static_cast<int>((n % kTree + kPack - 1) / kPack)) {}

  bool is_one_tree() const { return trees + (rest > 0 ? 1 : 0) == 1; }

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

// Sums in short trees: of dy and of dy * (x - pivot).
template <class T>
struct TreeGradientSums;

template <>
struct TreeGradientSums<float> {
  Pack<double> dy_sum = Pack<double>(0.0), product_sum = Pack<double>(0.0);

  struct Terms {
    Pack<float> dy, product;
    FASTNORM_INLINE friend Terms operator+(const Terms& a, const Terms& b) {
      return {a.dy + b.dy, a.product + b.product};
    }
  };
  FASTNORM_INLINE static Terms terms(const Pack<float>& dy, const Pack<float>& d) { return {dy, dy * d}; }
  FASTNORM_INLINE void add(const Terms& tree) {
    dy_sum += widen(tree.dy);
    product_sum += widen(tree.product);
  }
  FASTNORM_INLINE void finish() {}
};

// Float64 has no digits to spare for chains: trees are added up with what rounding takes. And of x - pivot.
template <>
struct TreeGradientSums<double> {
  HalfPack dy_sum = Pack<double>(0.0), product_sum = Pack<double>(0.0), rest_sum = Pack<double>(0.0);

  struct Terms {
    Pack<double> dy, product, rest;
    FASTNORM_INLINE friend Terms operator+(const Terms& a, const Terms& b) {
      return {a.dy + b.dy, a.product + b.product, a.rest + b.rest};
    }
  };
  FASTNORM_INLINE static Terms terms(const Pack<double>& dy, const Pack<double>& d) { return {dy, dy * d, d}; }
  FASTNORM_INLINE void add(const Terms& tree) {
    dy_sum.add(tree.dy, dy_lost_);
    product_sum.add(tree.product, product_lost_);
    rest_sum.add(tree.rest, rest_lost_);
  }
  // All there is to add: rounding takes nothing.
  FASTNORM_INLINE void take(const Terms& tree) {
    dy_sum += tree.dy;
    product_sum += tree.product;
    rest_sum += tree.rest;
  }
  // To be called once, when all is added.
  FASTNORM_INLINE void finish() {
    dy_sum += dy_lost_;
    product_sum += product_lost_;
    rest_sum += rest_lost_;
  }

 private:
  HalfPack dy_lost_ = Pack<double>(0.0), product_lost_ = Pack<double>(0.0), rest_lost_ = Pack<double>(0.0);
};

// The terms of a run, in trees. What is missing in the last pack is zeros of dy: they add nothing. (To the sum of x -
// pivot they would.)
template <class T, class Ahead>
struct RunTerms {
  const T *x, *dy;
  Pack<T> pivot;
  Ahead ahead;

  template <class At>
  FASTNORM_INLINE auto operator()(At at) const {
    ahead(x + at.start, dy + at.start);
    const Pack<T> g = in_register(at.template load<T>(dy));
    const Pack<T> d = at.template load<T>(x) - pivot;
    if constexpr (kMayOverflow<T>) return TreeGradientSums<T>::terms(g, within(at, d));
    return TreeGradientSums<T>::terms(g, d);
  }
  FASTNORM_INLINE auto whole(int64_t i) const { return (*this)(Whole{i}); }
  // Of kCount packs, of which the last has `values_of_last`.
  template <int kCount>
  FASTNORM_INLINE auto tree(int64_t i, int64_t values_of_last) const {
    const auto last = [&] { return (*this)(Partial{i + (kCount - 1) * kPack, values_of_last}); };
    if constexpr (kCount == 1) return last();
    if constexpr (kCount == 2) return whole(i) + last();
    if constexpr (kCount == 3) return (whole(i) + whole(i + kPack)) + last();
    if constexpr (kCount == 4) return (whole(i) + whole(i + kPack)) + (whole(i + 2 * kPack) + last());
  }
  FASTNORM_INLINE auto whole_tree(int64_t i) const {
    return (whole(i) + whole(i + kPack)) + (whole(i + 2 * kPack) + whole(i + 3 * kPack));
  }
};

// Adds a run.
template <int kRest, class T, class Ahead>
FASTNORM_INLINE void add_run(TreeGradientSums<T>& sums, const T* x, const T* dy, const TreeCut& cut,
                             const Pack<T>& pivot, const Ahead& ahead) {
  const RunTerms<T, Ahead> terms{x, dy, pivot, ahead};
  int64_t i = 0;
  for (int64_t tree = 0; tree < cut.trees; ++tree, i += TreeCut::kTree) sums.add(terms.whole_tree(i));
  if constexpr (kRest > 0) sums.add(terms.template tree<kRest>(i, cut.last));
}
// The same for a run that is one tree and all there is to add.
template <int kRest, class Ahead>
FASTNORM_INLINE void take_run(TreeGradientSums<double>& sums, const double* x, const double* dy, const TreeCut& cut,
                              const Pack<double>& pivot, const Ahead& ahead) {
  const RunTerms<double, Ahead> terms{x, dy, pivot, ahead};
  if constexpr (kRest > 0) {
    sums.take(terms.template tree<kRest>(0, cut.last));
  } else {
    sums.take(terms.whole_tree(0));
  }
}

constexpr double kTrustedSize = 0x1p120;

// Statistics and sums of float64 sets with which products of a few numbers neither overflow nor underflow.
FASTNORM_INLINE bool ordinary_set(double mean, double rstd) {
  return static_cast<bool>((std::fabs(mean) < 0x1p900) & (rstd > 0x1p-100) & (rstd < 0x1p100));
}
constexpr double kLeastOrdinary = 0x1p-900, kMostOrdinary = 0x1p900;

// What a segment or a part of one comes to. `trusted`: nothing overflowed on the way, nor vanished beside so small a
// sum. (Where x is constant the sum is 0, and has to be: what is not trusted is added up again, with care.)
struct TreeTotals {
  double dy, dy_xhat;
  bool trusted;

  template <class T>
  FASTNORM_INLINE static TreeTotals of(double dy, double product, double off, double mean, double rstd) {
    const double magnitude = std::fabs(product);
    const TreeTotals totals{dy, (product + off * dy) * rstd, false};
    if constexpr (kMayOverflow<T>) {
      const bool fit = (std::fabs(dy) < kMostOrdinary) & (magnitude < kMostOrdinary) & (magnitude > kLeastOrdinary);
      return {totals.dy, totals.dy_xhat, static_cast<bool>(fit & ordinary_set(mean, rstd))};
    } else {
      const bool finite = (std::fabs(dy) < kTrustedSize) & (magnitude < kTrustedSize);
      return {totals.dy, totals.dy_xhat, static_cast<bool>(finite & (magnitude > 0x1p-84))};
    }
  }
};

// The sums of one unit; false where they cannot be trusted.
template <class T>
FASTNORM_LOOPS inline bool tree_unit_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit, const Statistic& s,
                                          SegmentSums& total) {
  const Operands<2, false> operands{{&plan.x, &plan.dy}, nullptr};
  const ReadAhead<T> ahead(plan, run);
  const Pivot<T> pivot = Pivot<T>::of(s);
  const Pack<T> pivots(pivot.value);
  TreeGradientSums<T> sums;
  int64_t count = 0;
  visit_unit<T>(plan, operands, run, set, unit, [&](const T* const* in, T*, int64_t, int64_t n) {
    count += n;
    TreeGradientSums<T> inner = sums;
    const TreeCut cut(n);
    cut.with_rest([&](auto rest) { add_run<decltype(rest)::value>(inner, in[0], in[1], cut, pivots, ahead); });
    sums = inner;
  });
  sums.finish();
  if constexpr (kMayOverflow<T>) total.rest.hi = fold(sums.rest_sum) + pivot.off * static_cast<double>(count);
  const TreeTotals totals = TreeTotals::of<T>(fold(sums.dy_sum), fold(sums.product_sum), pivot.off, s.mean, s.rstd);
  total.dy.hi = totals.dy;
  total.dy_xhat.hi = totals.dy_xhat;
  return totals.trusted && s.scale == 1;
}

// The terms of the sums of float64 data, and x - pivot.
using DoubleTerms = LanePair<PackPair, Pack<double>>;

// The sums of one unit, weighted or not. Float32 data is added in plain lanes of double; float64 data has no digits to
// spare: leaves are trees, and added with what rounding takes.
template <class T, class WeightAt>
FASTNORM_LOOPS inline SegmentSums unit_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit,
                                            const Statistic& s, const WeightAt& weight_at) {
  const Operands<2, false> operands{{&plan.x, &plan.dy}, nullptr};
  const Pack<double> rstd(s.rstd);
  SegmentSums total;
  if constexpr (kMayOverflow<T>) {
    const Pivot<T> pivot = Pivot<T>::of(s);
    const Pack<double> scale(s.scale), about(pivot.value);
    ExactSum of_g, of_product, of_x;
    int64_t count = 0;
    visit_unit<T>(plan, operands, run, set, unit, [&](const T* const* in, T*, int64_t first, int64_t n) {
      const T *x = in[0], *dy = in[1];
      const auto weight = weight_at(first);
      const auto terms = [&](auto at) {
        const Pack<double> d = within(at, at.template load<double>(x) * scale - about);
        const Pack<double> g = times(at, at.template load<double>(dy), weight);
        return DoubleTerms{{g, g * (d * rstd)}, d};
      };
      for (int64_t i = 0; i < n; i += kLeaf) {
        const DoubleTerms leaf = leaf_sums<true>(i, n - i < kLeaf ? n - i : kLeaf, terms);
        of_g.add(leaf.first.first);
        of_product.add(leaf.first.second);
        of_x.add(leaf.second);
      }
      count += n;
    });
    total.dy = sum_of(of_g.total());
    total.dy_xhat = sum_of(of_product.total());
    if (pivot.off != 0) total.dy_xhat.add(pivot.off * s.rstd * total.dy.value());
    total.rest.hi = sum_of(of_x.total()).value() + pivot.off * static_cast<double>(count);
  } else {
    const Centre<T> centre(s);
    const int64_t x_ahead = reading_ahead<T>(plan, plan.x, run), dy_ahead = reading_ahead<T>(plan, plan.dy, run);
    PackPair lanes{0.0, 0.0};
    Size size;
    visit_unit<T>(plan, operands, run, set, unit, [&](const T* const* in, T*, int64_t first, int64_t n) {
      const T *x = in[0], *dy = in[1];
      const auto weight = weight_at(first);
      PackPair inner = lanes;
      Size inner_size = size;
      for_packs(n, [&](auto at) {
        prefetch(x + at.start, x_ahead);
        prefetch(dy + at.start, dy_ahead);
        inner += gradient_terms(at, x, dy, centre, rstd, weight);
        inner_size.add(at, dy);
      });
      lanes = inner;
      size = inner_size;
    });
    const Pair sums = fold(lanes);
    total.dy.hi = sums.first;
    total.dy_xhat.hi = sums.second;
    total.size = size.total();
  }
  return total;
}

// The sums of one unit added up with care, where those of its trees cannot be trusted; but for the sum of dy, which
// must not change with what x is.
template <class T>
inline SegmentSums careful_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit, const Statistic& s,
                                const SegmentSums& of_trees) {
  SegmentSums sums = unit_sums<T>(plan, run, set, unit, s, [](int64_t) { return None{}; });
  if (std::fabs(of_trees.dy.hi) < (kMayOverflow<T> ? kMostOrdinary : kTrustedSize)) sums.dy = of_trees.dy;
  sums.rest.hi = std::numeric_limits<double>::quiet_NaN();
  return sums;
}

// A sum divided by the number of its terms, rounded once. share: 1 / count.
FASTNORM_INLINE double quotient(const TwoTerm& sum, double count, double share) {
  const double rounded = sum.hi / count;
  const TwoTerm back = two_product(rounded, count);
  const double rest = (((sum.hi - back.hi) - back.lo) + sum.lo) * share;
  return rounded + (std::fabs(sum.hi) < 0x1p900 ? rest : 0);
}

// The means that the input gradient subtracts, and whether it can be made of them about a pivot, in T.
struct GradientMeans {
  double a = 0, b = 0;
  double pivot_a = 0, b_rstd = 0;  // a and b * rstd as PivotGradient wants them: of float64 data, rounded once
  bool plain = false;

  template <class T>
  static GradientMeans of(const Sum& a, const Sum& b, double size, double count, bool centred, bool plain_weights,
                          const Statistic& s) {
    GradientMeans means = of_sums<T>(centred ? a.value() : 0, b.value(), count, s.mean, s.rstd);
    means.plain = !kMayOverflow<T> && plain_weights && zero_or_moderate(size / count) && means.plain;
    return means;
  }
  // Without a branch, for loops over sets; and without a division, for which float32 results do not ask. Those that
  // end in `lo`: what rounding has taken from the others (from rstd twice, for b has it in it).
  template <class T>
  static GradientMeans of_sums(double a, double b, double count, double mean, double rstd, double rstd_lo = 0,
                               double a_lo = 0, double b_lo = 0) {
    const double share = 1 / count;
    GradientMeans means;
    means.a = kMayOverflow<T> ? a / count : a * share;
    means.b = kMayOverflow<T> ? b / count : b * share;
    if constexpr (kMayOverflow<T>) {
      const TwoTerm product = two_product(b, rstd);
      means.pivot_a = quotient({a, a_lo}, count, share);
      means.b_rstd = quotient({product.hi, product.lo + (b_lo * rstd + 2 * b * rstd_lo)}, count, share);
    } else {
      means.pivot_a = means.a;
      means.b_rstd = means.b * rstd;
    }
    const double most_b = std::fabs(means.b * rstd);
    if constexpr (kMayOverflow<T>) {
      const bool fit = (std::fabs(means.a) < kMostOrdinary) & (most_b < kMostOrdinary);
      means.plain = static_cast<bool>(ordinary_set(mean, rstd) & fit & ((most_b > kLeastOrdinary) | (means.b == 0)));
    } else {
      const bool fit = (std::fabs(means.a) < kMostMean) & (most_b < kMostMean);
      means.plain = static_cast<bool>(moderate(rstd) & (std::fabs(mean) < kMostMean) & fit);
    }
    return means;
  }
};

// The sums of every segment of a call, each kind apart.
template <class T>
class SegmentTable {
 public:
  explicit SegmentTable(int64_t count)
      : space_((kMayOverflow<T> ? 3 : 2) * count),
        dy(space_.data()),
        dy_xhat(dy + count),
        rest(kMayOverflow<T> ? dy + 2 * count : nullptr) {}
  explicit operator bool() const { return static_cast<bool>(space_); }
  SegmentSums operator[](int64_t i) const {
    SegmentSums sums;
    sums.dy.hi = dy[i];
    sums.dy_xhat.hi = dy_xhat[i];
    if constexpr (kMayOverflow<T>) sums.rest.hi = rest[i];
    return sums;
  }
  void put(int64_t i, const SegmentSums& sums) {
    dy[i] = sums.dy.value();
    dy_xhat[i] = sums.dy_xhat.value();
    if constexpr (kMayOverflow<T>) rest[i] = sums.rest.value();
  }

  // When all segments of a set, `count` values, have their sums: makes those of dy * xhat about the mean that x - mean
  // adds up to 0 about. rest_of_mean is what that has more than the one that was kept.
  void centre(int64_t first, int64_t segments, double count, double rstd) {
    if constexpr (kMayOverflow<T>) {
      Sum total;
      for (int64_t i = first; i < first + segments; ++i) total.add(rest[i]);
      const double sum = total.value();
      const bool any = sum != 0 && std::fabs(sum) < kMostOrdinary;  // and known; rstd may be infinite elsewhere
      const double off = any ? sum / count : 0;
      for (int64_t i = first; any && i < first + segments; ++i) dy_xhat[i] -= off * rstd * dy[i];
      rest[first] = off;
    }
  }
  double rest_of_mean(int64_t first) const { return kMayOverflow<T> ? rest[first] : 0; }

 private:
  const Workspace<double> space_;

 public:
  double *const dy, *const dy_xhat, *const rest;
};

// Sums over all sets that share a parameter. Those of float64 data come with what rounding has taken from them: there
// may be thousands of terms.
template <class T>
class SetTotals {
 public:
  explicit SetTotals(int64_t count) : space_(count * (kMayOverflow<T> ? 2 : 1)), count_(count) {}
  explicit operator bool() const { return static_cast<bool>(space_); }

  // Adds `width` neighbouring terms to the totals from `first` on.
  void add(int64_t first, const double* terms, int64_t width) {
    double *const total = space_.data() + first, *const lost = total + count_;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      if constexpr (kMayOverflow<T>) {
        const TwoTerm sum = two_sum(total[j], terms[j]);
        total[j] = sum.hi;
        lost[j] += sum.lo;
      } else {
        total[j] += terms[j];
      }
    }
  }
  T value(int64_t i) const {
    if constexpr (kMayOverflow<T>) return Sum{space_[i], space_[count_ + i]}.value();
    return static_cast<T>(space_[i]);
  }

 private:
  const Workspace<double> space_;
  const int64_t count_;
};

// Parameter gradients from the sums of all segments, added up in order over those that share a parameter: `count` rows
// of `width` sums, the first parameter of row i being param(i).
template <class T, class Param>
inline void reduce_parameter_gradients(const Plan& plan, const NormArgs<T>& args, const SegmentTable<T>& sums,
                                       int64_t count, int64_t width, const Param& param, SetTotals<T>& dy,
                                       SetTotals<T>& dy_xhat) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t to = param(i);
    dy.add(to, sums.dy + i * width, width);
    dy_xhat.add(to, sums.dy_xhat + i * width, width);
  }
  for (int64_t p = 0; p < plan.params; ++p) {
    if (args.dweight) args.dweight[p] = dy_xhat.value(p);
    if (args.dbias) args.dbias[p] = dy.value(p);
  }
}

}  // namespace
}  // namespace fastnorm
