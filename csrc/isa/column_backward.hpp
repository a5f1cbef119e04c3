// Backward of Family::column: per column the sums of dy and dy * xhat, which are also the gradients of its parameters;
// weighted and added up they are the two means of a set.
//
//   dy, x, dx: (outer, rows, columns) with any strides;  dweight, dbias: (params)
#pragma once

#include "isa/column_norm.hpp"

namespace fastnorm {
namespace {

// The terms of the gradients' sums, for add_in_short_trees.
template <bool kAhead>
struct GradientTerms {
  const float *x, *dy;
  int64_t x_stride, dy_stride, x_distance, dy_distance;

  FASTNORM_INLINE void move(int64_t columns) {
    x += columns;
    dy += columns;
  }
  FASTNORM_INLINE void next(int64_t lines) {
    x += lines * x_stride;
    dy += lines * dy_stride;
  }
  template <class At>
  FASTNORM_INLINE FloatTerms operator()(At at, int64_t line, const Pack<float>& mean) const {
    const Values here = load(at, line, mean);
    return {here.g, here.g * here.centred};
  }
  // The same, added to those of another line.
  template <class At>
  FASTNORM_INLINE FloatTerms operator()(At at, int64_t line, const Pack<float>& mean, const FloatTerms& other) const {
    const Values here = load(at, line, mean);
    return {other.first + here.g, other.second + here.g * here.centred};
  }

 private:
  struct Values {
    Pack<float> g, centred;
  };
  template <class At>
  FASTNORM_INLINE Values load(At at, int64_t line, const Pack<float>& mean) const {
    const float *const values = x + line * x_stride, *const gradients = dy + line * dy_stride;
    if constexpr (kAhead) {
      prefetch(values + at.start, x_distance);
      prefetch(gradients + at.start, dy_distance);
    }
    return {at.template load<float>(gradients), at.template load<float>(values) - mean};
  }
};

// done = 1 for the sets whose columns are all good; true if that is all of them.
template <class T>
inline bool find_good_sets(const ColumnSpace<T>& space, const double* good, int64_t sets, int64_t width) {
  const double* const good_columns = add_up_sets(good, sets, width, space.first);
  double *const done = space.done, good_ones = 0;
#pragma omp simd reduction(+ : good_ones)
  for (int64_t set = 0; set < sets; ++set) {
    done[set] = good_columns[set] == static_cast<double>(width) ? 1.0 : 0.0;
    good_ones += done[set];
  }
  return good_ones == static_cast<double>(sets);
}

// In `space.sums`, 0 for columns without any dy, of those near the columns whose sets are not done.
inline void look_for_gradients(const Columns<float>& columns, int64_t outer, const ColumnSpace<float>& space) {
  constexpr int64_t kTogether = 4;  // lines: fewer sums, and still read in the order of memory
  space.find_undone(columns);
  const Operand* const operands[1] = {&columns.plan().dy};
  columns.sum<1>(outer, operands, space.sums,
                 [&](const ColumnSums& to, int64_t column, int64_t lines, int64_t n, const Panel<float>& dy) {
                   const double* const wanted = space.careful + column / kPack;
                   const auto look = [&](int64_t first, int64_t count) {
                     const float* const from = dy.data + first * dy.stride;
                     for_packs(n, [&](auto at) FASTNORM_LOOPS {
                       if (wanted[at.start / kPack] == 0) return;
                       Pack<float> any = at.template load<float>(from);
                       for (int64_t k = 1; k < count; ++k) {
                         any = either(any, at.template load<float>(from + k * dy.stride));
                       }
                       at.store(to.first, at.template load<double>(to.first) + widen(magnitude(any)));
                     });
                   };
                   int64_t line = 0;
                   for (; line + kTogether <= lines; line += kTogether) look(line, kTogether);
                   if (line < lines) look(line, lines - line);
                 });
}

// Sums of dy and of dy * xhat per column by short trees, the latter about the float32 next to the mean: no value of x
// is nearer to the mean than that is, so what the sums lose is a few units of the sum of their terms' magnitudes
// wherever the mean is. done = 1 for sets far enough from float32's limits; true if that was everywhere. Columns whose
// sums are both 0 are read once more: without any dy they are good, else something may have vanished.
inline bool short_tree_gradient_sums(const Columns<float>& columns, int64_t outer, const ColumnSpace<float>& space) {
  const Plan& plan = columns.plan();
  const int64_t width = plan.columns_per_set, sets = columns.sets_in_outer(), n = columns.columns();
  const int64_t ahead = columns.lines_ahead();
  const Operand* const operands[2] = {&plan.x, &plan.dy};
  const double* const mean = spread_sets(space.mean, sets, width, space.of_column[0]);
  const double* const mean_lo = spread_sets(space.mean_lo, sets, width, space.of_column[1]);
  const double* const rstd = spread_sets(space.rstd, sets, width, space.of_column[2]);
  float* const pivots = space.subtract;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) pivots[c] = static_cast<float>(mean[c]);
  repeat(columns.lines(), space.subtract);
  columns.sum<2>(outer, operands, space.sums,
                 [&](const ColumnSums& to, int64_t column, int64_t lines, int64_t n, const Panel<float>& x,
                     const Panel<float>& dy) {
                   const auto distance = [&](const Panel<float>& panel) {
                     return ahead_of_group<float>(ahead * panel.stride * static_cast<int64_t>(sizeof(float)), n);
                   };
                   with_ahead(ahead != 0, [&](auto asks) {
                     const GradientTerms<decltype(asks)::value> terms{x.data,    dy.data,     x.stride,
                                                                      dy.stride, distance(x), distance(dy)};
                     const bool in_order = ahead != 0 && n * static_cast<int64_t>(sizeof(float)) > kLongLine;
                     const bool alike = unaligned_values(x.data) == unaligned_values(dy.data);
                     const int64_t shortest = columns.lines().many ? 256 : kLongLine + 1;
                     const int64_t front = alike ? unaligned_front(x, n, shortest) : 0;
                     add_in_short_trees(to, lines, front, n, in_order, space.subtract + column, terms);
                   });
                 });
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  const double least = 0x1p-100 * static_cast<double>(columns.rows());
  double *const good = space.of_column[3], *const nothing = space.centre[0];
  double *const dy_sums = space.dy, *const dy_xhat_sums = space.dy_xhat, any_nothing = 0;
#pragma omp simd reduction(+ : any_nothing)
  for (int64_t c = 0; c < n; ++c) {
    const double dy = sums.first[c], product = sums.second[c];
    const double rest = (mean[c] - static_cast<double>(static_cast<float>(mean[c]))) + mean_lo[c];
    const bool plain = plain_statistic<float>(mean[c], rstd[c], 1);
    const bool ordinary =
        (std::fabs(product) > least) & (std::fabs(product) < kTrustedSize) & (std::fabs(dy) < kTrustedSize);
    good[c] = plain & ordinary ? 1.0 : 0.0;
    nothing[c] = plain & (product == 0) & (dy == 0) ? 1.0 : 0.0;
    any_nothing += nothing[c];
    dy_sums[c] = dy;
    dy_xhat_sums[c] = (product - rest * dy) * rstd[c];
  }
  const bool all_good = find_good_sets(space, good, sets, width);
  if (all_good || any_nothing == 0) return all_good;
  look_for_gradients(columns, outer, space);
  for (int64_t c = 0; c < n; ++c) good[c] += sums.first[c] == 0 ? nothing[c] : 0;
  return find_good_sets(space, good, sets, width);
}

// Sums of dy and of dy * term(x) in trees of double, per column of sets that are not done: terms(of) gives the term of
// some neighbouring columns, of(array) being their numbers.
template <class T, class Terms>
inline void sum_gradients(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space, const Terms& terms) {
  const Plan& plan = columns.plan();
  const int64_t ahead = columns.lines_ahead();
  const Operand* const operands[2] = {&plan.x, &plan.dy};
  columns.template sum<2>(
      outer, operands, space.sums,
      [&](const ColumnSums& to, int64_t column, int64_t lines, int64_t n, const Panel<T>& x, const Panel<T>& dy) {
        const int64_t x_distance = ahead * x.stride * static_cast<int64_t>(sizeof(T));
        const int64_t dy_distance = ahead * dy.stride * static_cast<int64_t>(sizeof(T));
        with_ahead(ahead != 0, [&](auto asks) {
          add_in_trees<T>(to, lines, n, space.careful + column / kPack, false, [&](auto place) {
            const auto of = [&](const double* array) { return place.template load<double>(array + column); };
            return [=, term = terms(of)](auto at, int64_t line) {
              const T *values = x.data + line * x.stride, *gradients = dy.data + line * dy.stride;
              if constexpr (decltype(asks)::value) {
                prefetch(values + at.start, x_distance);
                prefetch(gradients + at.start, dy_distance);
              }
              const Pack<double> g = at.template load<double>(gradients);
              return PackPair{g, g * term(at.template load<double>(values))};
            };
          });
        });
      });
}

// Sums of dy and of dy * (x - short_mean) of float64 data: what the rest of the mean and rstd make of them
// comes afterwards. done = 1 for sets whose products had none of float64's limits near them; true if that was
// everywhere.
inline bool plain_gradient_sums(const Columns<double>& columns, int64_t outer, const ColumnSpace<double>& space) {
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer(), n = columns.columns();
  const double* const mean = spread_sets(space.mean, sets, width, space.of_column[0]);
  const double* const mean_lo = spread_sets(space.mean_lo, sets, width, space.of_column[1]);
  const double* const rstd = spread_sets(space.rstd, sets, width, space.of_column[2]);
  const double* const scale = spread_sets(space.scale, sets, width, space.of_column[3]);
  const double eps = columns.args().eps;
  double* const pivots = space.centre[0];
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) pivots[c] = short_mean(mean[c], rstd[c], varies(rstd[c], eps));
  repeat(columns.lines(), pivots);
  for (int64_t set = 0; set < sets; ++set) space.done[set] = 0;
  space.find_undone(columns);
  sum_gradients(columns, outer, space,
                [=](const auto& of) { return [m = of(pivots)](const Pack<double>& v) { return v - m; }; });
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  double *const good = space.weight, *const dy_sums = space.dy, *const dy_xhat_sums = space.dy_xhat;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const double dy = sums.first[c] + sums.first_lo[c], product = sums.second[c] + sums.second_lo[c];
    const double size = std::fabs(product);
    const bool sound = ((size > 0x1p-800) & (size < 0x1p1000)) | ((size == 0) & (dy == 0));
    good[c] = sound & (rstd[c] > 0x1p-60) & (rstd[c] < 0x1p60) & (scale[c] == 1) ? 1.0 : 0.0;
    dy_sums[c] = std::fabs(sums.first[c]) < HUGE_VAL ? dy : sums.first[c];  // what infinity has lost is NaN
    dy_xhat_sums[c] = (product - ((mean[c] - pivots[c]) + mean_lo[c]) * dy) * rstd[c];
  }
  return find_good_sets(space, good, sets, width);
}

// Sums of dy and of dy * xhat for the sets that are not done, in double.
template <class T>
inline void exact_gradient_sums(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer();
  space.find_undone(columns);
  double *mean = space.centre[0], *rstd = space.centre[1], *mean_lo = space.centre[2], *scale = space.centre[3];
  for (int64_t set = 0; set < sets; ++set) {
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      mean[c] = space.mean[set];
      rstd[c] = space.rstd[set];
      mean_lo[c] = space.mean_lo[set];
      scale[c] = space.scale[set];
    }
  }
  for (double* array : space.centre) repeat(columns.lines(), array);
  sum_gradients(columns, outer, space, [=](const auto& of) {
    return [m = of(mean), lo = of(mean_lo), k = of(scale), r = of(rstd)](Pack<double> v) {
      if constexpr (kMayOverflow<T>) v = v * k;
      v = v - m;
      if constexpr (kMayOverflow<T>) v = v - lo;
      return v * r;
    };
  });
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  for (int64_t set = 0; set < sets; ++set) {
    if (space.done[set] != 0) continue;
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      // Trees of dy alone in float32 can but overflow, in float64 not even that: no x, not one with a NaN, may change
      // the gradient of the bias.
      if (!kMayOverflow<T> && !(std::fabs(space.dy[c]) < kTrustedSize)) space.dy[c] = sums.first[c];
      space.dy_xhat[c] = column_sum<T>(sums.second, sums.second_lo, c).value();
    }
  }
}

// Sums of dy and of dy * xhat per column.
template <class T>
inline void gradient_outer_sums(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  if constexpr (kMayOverflow<T>) {
    if (plain_gradient_sums(columns, outer, space)) return;
  } else {
    if (short_tree_gradient_sums(columns, outer, space)) return;
  }
  exact_gradient_sums(columns, outer, space);
}

// The means of the gradients of each set, and whether dx can be made of them in float32 (done = 1).
inline void gradient_means(const Columns<float>& columns, const ColumnSpace<float>& space) {
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer(), n = columns.columns();
  const double count = static_cast<double>(columns.rows() * width), share = 1 / count;
  const double *const weight = space.weight, *const mean = space.mean, *const rstd = space.rstd;
  const double *const of_dy = space.dy, *const of_dy_xhat = space.dy_xhat;
  double *const dy = space.of_column[0], *const dy_xhat = space.of_column[1], *const size = space.of_column[2];
  double *const mean_g = space.mean_g, *const mean_g_xhat = space.mean_g_xhat, *const done = space.done;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    dy[c] = weight[c] * of_dy[c];
    dy_xhat[c] = weight[c] * of_dy_xhat[c];
    size[c] = size_of_gradient(weight[c], of_dy[c], of_dy_xhat[c]);
  }
  const double* const dy_sums = add_up_sets(dy, sets, width, space.first);
  const double* const dy_xhat_sums = add_up_sets(dy_xhat, sets, width, space.second);
  const double* const sizes = add_up_sets(size, sets, width, space.size);
#pragma omp simd
  for (int64_t set = 0; set < sets; ++set) {
    const double a = dy_sums[set] * share, b = dy_xhat_sums[set] * share;
    const bool plain = sized(sizes[set], count) & plain_statistic<float>(mean[set], rstd[set], 1) &
                       (std::fabs(a) < 0x1p100) & (std::fabs(b * rstd[set]) < 0x1p100);
    mean_g[set] = a;
    mean_g_xhat[set] = b;
    done[set] = plain ? 1.0 : 0.0;
  }
}
inline void gradient_means(const Columns<double>& columns, const ColumnSpace<double>& space) {
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer(), n = columns.columns();
  const double count = static_cast<double>(columns.rows() * width), share = 1 / count;
  const double *const weight = space.weight, *const scale = space.scale;
  const double *const of_dy = space.dy, *const of_dy_xhat = space.dy_xhat;
  double *const dy = space.of_column[0], *const dy_xhat = space.of_column[1], *const lost = space.of_column[2];
  double *const mean_g = space.mean_g, *const mean_g_xhat = space.mean_g_xhat, *const done = space.done;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    dy[c] = weight[c] * of_dy[c];
    dy_xhat[c] = weight[c] * of_dy_xhat[c];
    lost[c] = 0;
  }
  const SetSums a = add_up_exactly(dy, lost, sets, width, &space.centre[0]);
  const SetSums b = add_up_exactly(dy_xhat, lost, sets, width, &space.centre[2]);
#pragma omp simd
  for (int64_t set = 0; set < sets; ++set) {
    // What an infinite sum has lost is NaN, and means nothing.
    const double a_lost = std::fabs(a.sum[set]) < HUGE_VAL ? a.lost[set] : 0;
    const double b_lost = std::fabs(b.sum[set]) < HUGE_VAL ? b.lost[set] : 0;
    mean_g[set] = quotient({a.sum[set], a_lost}, count, share);
    mean_g_xhat[set] = quotient({b.sum[set], b_lost}, count, share);
    done[set] = scale[set] == 1 ? 1.0 : 0.0;
  }
}

// value * rstd * rstd of float64 data, rounded once, where nothing is near the limits. `value` has rstd in it as well,
// and what its rounding took, `rstd_lo`, counts three times.
FASTNORM_INLINE double times_twice(double value, double rstd, double rstd_lo) {
  const TwoTerm once = two_product(value, rstd), twice = two_product(once.hi, rstd);
  const double least = std::fabs(twice.hi), most = std::fabs(value);
  const bool ordinary = (least > 0x1p-700) & (most < 0x1p900) & (rstd > 0x1p-60) & (rstd < 0x1p60);
  return twice.hi + (ordinary ? twice.lo + (once.lo * rstd + 3 * once.hi * rstd_lo) : 0);
}

// The means of each set, and what makes dx of them in each place.
template <class T>
inline void prepare_gradient(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer(), n = columns.columns();
  take_weights(columns, outer, space.weight);
  gradient_means(columns, space);
  const double* const mean = spread_sets(space.mean, sets, width, space.of_column[0]);
  const double* const mean_lo = spread_sets(space.mean_lo, sets, width, space.of_column[1]);
  const double* const rstd = spread_sets(space.rstd, sets, width, space.of_column[2]);
  const double* const done = spread_sets(space.done, sets, width, space.of_column[3]);
  const double* const mean_g = spread_sets(space.mean_g, sets, width, space.centre[0]);
  const double* const mean_g_xhat = spread_sets(space.mean_g_xhat, sets, width, space.centre[1]);
  const double* const rstd_lo = spread_sets(space.rstd_lo, sets, width, space.centre[2]);
  const double eps = columns.args().eps;
  const double any = columns.rows() * width > 1 ? 1 : 0;  // dx of a set of one value is 0, whatever is rounded
  const double* const weight = space.weight;
  T *const subtract = space.subtract, *const factors = space.factor, *const plain = space.plain;
  T *const less = space.a, *const times = space.b;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const T pivot = Pivot<T>::next_to(mean[c], rstd[c], varies(rstd[c], eps));
    const double rest = (mean[c] - static_cast<double>(pivot)) + mean_lo[c];
    const double factor = weight[c] * rstd[c], b = mean_g_xhat[c] * rstd[c];
    const double a = rstd[c] * (mean_g[c] - rest * b);
    bool fine;
    if constexpr (kMayOverflow<T>) {
      const double size = std::fabs(factor), product = std::fabs(b * rstd[c]);
      fine = (((size > 0x1p-300) & (size < 0x1p300)) | (factor == 0)) & (std::fabs(a) < 0x1p900) & (product < 0x1p900) &
             ((product > 0x1p-900) | (mean_g_xhat[c] == 0));
    } else {
      fine = zero_or_moderate(factor) & (std::fabs(a) < 0x1p110) & fit_factor(b * rstd[c]);
    }
    subtract[c] = pivot;
    factors[c] = static_cast<T>(any * factor);
    less[c] = static_cast<T>(any * a);
    times[c] = static_cast<T>(any * (kMayOverflow<T> ? times_twice(mean_g_xhat[c], rstd[c], rstd_lo[c]) : b * rstd[c]));
    plain[c] = fine ? static_cast<T>(done[c]) : T(0);
  }
  for (T* array : {space.subtract, space.factor, space.a, space.b}) repeat(columns.lines(), array);
  space.find_careful(columns.lines());
}

// One value in double, whatever its set.
template <class T>
inline T input_gradient(const Statistic& s, double g, double a, double b, T x) {
  const double xhat = ((static_cast<double>(x) * s.scale - s.mean) - s.mean_lo) * s.rstd;
  return static_cast<T>(s.rstd * ((g - a) - xhat * both_parts(b, s)) * s.scale);
}

// dx of a panel through given statistics, where nothing but dy * weight * rstd comes back, whatever x holds.
template <class T, class Out>
FASTNORM_INLINE void given_gradient_panel(const ColumnSpace<T>& space, int64_t column, int64_t lines, int64_t n,
                                          const Panel<T>& dy, const Panel<T>& dx, Out out) {
  for_packs(n, [&](auto at) FASTNORM_LOOPS {
    const Pack<double> weight = at.template load<double>(space.weight + column);
    const Pack<double> rstd = at.template load<double>(space.centre[0] + column);
    const Pack<double> scale = at.template load<double>(space.centre[1] + column);
    const T* gradients = dy.data;
    T* to = dx.data;
    for (int64_t line = 0; line < lines; ++line, gradients += dy.stride, to += dx.stride) {
      out.store(at, to, rstd * (at.template load<double>(gradients) * weight) * scale);
    }
  });
}

// dx of a panel (asking ahead by groups takes 7 to 35 % from large float32 arrays on AVX2, and nothing from float64):
// in float32 or float64 where the sets' numbers allow it, value by value where they do not.
template <bool kAhead, bool kMends, class T, class Out>
FASTNORM_INLINE void gradient_panel(const Columns<T>& columns, const ColumnSpace<T>& space, int64_t column,
                                    int64_t lines, int64_t n, const Panel<T>& x, const Panel<T>& dy, const Panel<T>& dx,
                                    Out out) {
  const auto distance = [&](const Panel<T>& panel) {
    const int64_t bytes = columns.lines_ahead() * panel.stride * static_cast<int64_t>(sizeof(T));
    return kMayOverflow<T> ? bytes : ahead_of_group<T>(bytes, n);
  };
  const int64_t x_distance = distance(x), dy_distance = distance(dy);
  for_pack_groups<T>(0, n, [&](auto at, auto packs) {
    constexpr int kPacks = decltype(packs)::value;
    Pack<T> mean[kPacks], factor[kPacks], a[kPacks], b[kPacks];
    FASTNORM_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      const int64_t place = column + k * kPack;
      mean[k] = in_register(at.template load<T>(space.subtract + place));
      factor[k] = in_register(at.template load<T>(space.factor + place));
      a[k] = in_register(at.template load<T>(space.a + place));
      b[k] = in_register(at.template load<T>(space.b + place));
    }
    const auto result = [&](const T* values, const T* gradients, int k) FASTNORM_LOOPS {
      const Pack<T> centred = at.template load<T>(values + k * kPack) - mean[k];
      const Pack<T> rest = at.template load<T>(gradients + k * kPack) * factor[k] - a[k];
      return rest - centred * b[k];
    };
    // Copies, for the compiler to keep them in registers.
    const T *values = x.data, *gradients = dy.data;
    T* to = dx.data;
    const int64_t x_step = x.stride, dy_step = dy.stride, dx_step = dx.stride, count = lines;
    const int64_t x_ahead = x_distance, dy_ahead = dy_distance;
    const auto mend_group = [&](const Pack<T>& results, int64_t group, const auto& wrong) {
      return mend(at, results, n - group, wrong, [&](int64_t lane) {
        const int64_t i = group + at.start + lane, c = (column + i) % columns.columns(),
                      set = c / columns.plan().columns_per_set;
        return input_gradient(space.statistic(set), static_cast<double>(gradients[i]) * space.weight[c],
                              space.mean_g[set], space.mean_g_xhat[set], values[i]);
      });
    };
    const auto overflowed = [](int64_t, T number) { return kMends && !std::isfinite(number); };
    if (all_plain(space, column + at.start, kPacks)) {
      for (int64_t line = 0; line < count; ++line) {
        FASTNORM_UNROLL
        for (int k = 0; k < kPacks; ++k) {
          if constexpr (kAhead) {
            prefetch(values + at.start + k * kPack, x_ahead);
            prefetch(gradients + at.start + k * kPack, dy_ahead);
          }
          Pack<T> results = result(values, gradients, k);
          if constexpr (kMends) {
            if (!all_finite(results)) results = mend_group(results, k * kPack, overflowed);
          }
          out.store(at, to + k * kPack, results);
        }
        values += x_step, gradients += dy_step, to += dx_step;
      }
      return;
    }
    for (int64_t line = 0; line < count; ++line) {
      for (int k = 0; k < kPacks; ++k) {
        const int64_t group = k * kPack;
        const T* const plain = space.plain + column + group + at.start;
        const auto wrong = [&](int64_t lane, T number) { return plain[lane] == 0 || overflowed(lane, number); };
        out.store(at, to + group, mend_group(result(values, gradients, k), group, wrong));
      }
      values += x_step, gradients += dy_step, to += dx_step;
    }
  });
}

template <class T>
inline void gradient_outer(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Plan& plan = columns.plan();
  columns.for_pieces_of(true, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
    const Lines& lines = columns.lines();
    Tile<T> x_tile(plan.x, lines, outer, column), dy_tile(plan.dy, lines, outer, column),
        dx_tile(plan.dx, lines, outer, column);
    const int64_t late = lateness(columns.args().past_cache, dx_tile, {&x_tile, &dy_tile});
    columns.for_panels(chunk, column, width, late,
                       [&](int64_t first, int64_t count, int64_t shift, int64_t n) FASTNORM_LOOPS {
                         const Panel<T> x = x_tile.read(first, count, n), dy = dy_tile.read(first, count, n),
                                        dx = dx_tile.open(first, count, n), to = dx.moved(shift);
                         const auto write = [&](auto mends, auto out) {
                           with_ahead(columns.lines_ahead() != 0, [&](auto asks) {
                             for_bands<T, 2>(count, n, columns.lines_ahead(), [&](int64_t band, int64_t band_lines) {
                               gradient_panel<decltype(asks)::value, decltype(mends)::value>(
                                   columns, space, column + shift, band_lines, n, x.moved(shift).from(band),
                                   dy.moved(shift).from(band), to.from(band), out);
                             });
                           });
                         };
                         write_mending<T>(plan.dx_in_place(), [&](auto mends) {
                           if constexpr (decltype(mends)::value) return write(mends, IntoCache{});
                           with_panel_store(columns.args().past_cache, to, [&](auto out) { write(mends, out); });
                         });
                         dx_tile.commit(dx, first, count, n);
                       });
  });
}

template <class T>
inline void given_gradient_outer(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Plan& plan = columns.plan();
  const int64_t width = plan.columns_per_set;
  take_weights(columns, outer, space.weight);
  for (int64_t c = 0; c < columns.columns(); ++c) {
    space.centre[0][c] = space.rstd[c / width];
    space.centre[1][c] = space.scale[c / width];
  }
  for (double* array : {space.weight, space.centre[0], space.centre[1]}) repeat(columns.lines(), array);
  columns.for_pieces_of(true, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
    Tile<T> dy_tile(plan.dy, columns.lines(), outer, column), dx_tile(plan.dx, columns.lines(), outer, column);
    columns.for_panels(chunk, column, width, 0, [&](int64_t first, int64_t count, int64_t, int64_t n) FASTNORM_LOOPS {
      const Panel<T> dy = dy_tile.read(first, count, n), dx = dx_tile.open(first, count, n);
      with_panel_store(columns.args().past_cache, dx,
                       [&](auto out) { given_gradient_panel(space, column, count, n, dy, dx, out); });
      dx_tile.commit(dx, first, count, n);
    });
  });
}

// Sums of dy and dy * xhat per parameter, from rows of `width` of them that may share parameters.
template <class T>
class ParameterTotals {
 public:
  ParameterTotals(int64_t rows, int64_t width, int64_t params)
      : rows_(rows), width_(padded(width)), length_(rows * width_ + padded(params)), space_(kArrays * length_) {
    if (*this) std::memset(space_.data(), 0, static_cast<size_t>(kArrays * length_) * sizeof(double));
  }
  explicit operator bool() const { return static_cast<bool>(space_); }

  void add(int64_t row, const double* dy, const double* dy_xhat, int64_t n) const {
    const ColumnSums sums = at(row * width_);
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      if constexpr (kMayOverflow<T>) {
        add_exactly(sums.first, sums.first_lo, c, dy[c]);
        add_exactly(sums.second, sums.second_lo, c, dy_xhat[c]);
      } else {
        sums.first[c] += dy[c];
        sums.second[c] += dy_xhat[c];
      }
    }
  }

  // The gradients: row i's first parameter is param(i), the others `step` apart.
  template <class Param>
  void finish(const NormArgs<T>& args, int64_t n, int64_t params, int64_t step, const Param& param) const {
    ColumnSums totals = at(0);
    if (rows_ > 1 || n != params || step != 1) {
      totals = at(rows_ * width_);
      for (int64_t row = 0; row < rows_; ++row) {
        const ColumnSums sums = at(row * width_);
        const int64_t first = param(row);
        if (step == 1) {
          add_sums<T>(totals + first, sums, n);
        } else {
          for (int64_t c = 0; c < n; ++c) add_sums<T>(totals + (first + c * step), sums + c, 1);
        }
      }
    }
    const auto store = [&](T* to, const double* hi, const double* lo) {
      if (to == nullptr) return;
      for (int64_t p = 0; p < params; ++p) to[p] = static_cast<T>(column_sum<T>(hi, lo, p).value());
    };
    store(args.dweight, totals.second, totals.second_lo);
    store(args.dbias, totals.first, totals.first_lo);
  }

 private:
  static constexpr int64_t kArrays = kMayOverflow<T> ? 4 : 2;

  ColumnSums at(int64_t place) const {
    const int64_t lo = kMayOverflow<T> ? 2 : 0;
    double* const sums = space_.data() + place;
    return {sums, sums + length_, sums + lo * length_, sums + (lo + 1) * length_};
  }

  int64_t rows_, width_, length_;
  RawSpace space_;
};

template <class T>
bool column_backward(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t width = columns.columns();
  const bool want_params = args.dweight || args.dbias;
  // Sums of the outer indices of a group that share parameters; those with parameters of their own share none.
  bool owns = false;
  for (int axis = 0; axis < plan.set_param.rank; ++axis) owns = owns || plan.set_param.stride[axis] != 0;
  const ParameterTotals<T> totals(want_params ? (owns ? plan.sets : columns.groups()) : 0, width,
                                  want_params ? plan.params : 0);
  if (!totals) return false;
  const auto outer_gradient = [&](const ColumnSpace<T>& space, int64_t group, int64_t outer) {
    take_statistics(columns, outer, space, true);
    gradient_outer_sums(columns, outer, space);
    if (want_params) totals.add(owns ? outer : group, space.dy, space.dy_xhat, width);
    if (args.constant_stats) return given_gradient_outer(columns, outer, space);
    prepare_gradient(columns, outer, space);
    gradient_outer(columns, outer, space);
  };
  if (!for_outer_spaces(columns, outer_gradient)) return false;
  if (want_params) {
    totals.finish(args, width, plan.params, plan.column_param,
                  [&](int64_t row) { return columns.param(owns ? row : 0, 0); });
  }
  return true;
}

}  // namespace
}  // namespace fastnorm
