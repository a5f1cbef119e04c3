// Moments of sets that are columns, about a pivot per set, the mean of a few of its rows (0 where there are but a few):
// float32 data in short trees of float32, checked by what they give; what those cannot do, and float64, in double; sets
// whose pivot was not near their mean once more, about that.
#pragma once

#include "isa/column_sums.hpp"
#include "isa/lane_statistics.hpp"

namespace fastnorm {
namespace {

template <class T>
inline Sum column_sum(const double* hi, const double* lo, int64_t c) {
  Sum sum;
  sum.hi = hi[c];
  if constexpr (kMayOverflow<T>) sum.lo = lo[c];
  return sum;
}

// One set of columns as a plan of its own, for the rare second measurements (set_moments.hpp).
inline Plan single_set(const Plan& plan, int64_t outer, int64_t set) {
  Plan single = plan;
  single.x.data += plan.x.set.offset(outer) + set * plan.columns_per_set * plan.x.column_stride;
  single.x.set = Walk{};
  single.whole = plan.x.element;
  single.whole.push(plan.columns_per_set, plan.x.column_stride);
  single.whole_blocks = cut_blocks(single.whole.count, single.whole.inner_size());
  return single;
}

template <class T>
inline Moments single_moments(const Plan& plan, const NormArgs<T>& args, int64_t outer, int64_t set, Statistic& s) {
  const Plan single = single_set(plan, outer, set);
  Moments moments = set_moments<T>(single, 0, true, 1);
  s = set_statistic(single, 0, args, moments);
  return moments;
}

// How many rows a pivot is taken from. The mean of 16 float64 values is near enough to that of their set but in one of
// 200 sets, which is then read again with those it shares packs with; of 32, always.
template <class T>
inline int64_t sampled_rows(const Columns<T>& columns) {
  int64_t rows = 8;
  if constexpr (kMayOverflow<T>) {
    rows = columns.rows() < 1024 ? 16 : 32;
    while (rows > 4 && rows / 2 * columns.plan().columns_per_set >= 32) rows /= 2;
  }
  while (rows > columns.rows()) rows /= 2;
  return rows;
}

// The first `columns` values of an array, repeated for all places of a line and for those where the next one begins.
template <class V>
inline void repeat(const Lines& lines, V* values) {
  const int64_t end = lines.length + (lines.many ? kPack : 0);
  for (int64_t at = lines.columns; at < end;) {
    const int64_t n = at < end - at ? at : end - at;
    std::memcpy(values + at, values, static_cast<size_t>(n) * sizeof(V));
    at += n;
  }
}

// Numbers per column from numbers per set.
[[gnu::noinline]] inline const double* spread_sets(const double* of_sets, int64_t sets, int64_t width, double* to) {
  if (width == 1) return of_sets;
  if (width <= kNarrowSet) {
    with_narrow_set(width, [&](auto narrow) {
#pragma omp simd
      for (int64_t set = 0; set < sets; ++set) {
        for (int64_t c = 0; c < narrow; ++c) to[set * narrow + c] = of_sets[set];
      }
    });
    return to;
  }
  for (int64_t set = 0; set < sets; ++set) {
    const double number = of_sets[set];  // which the stores might change, for all that compilers know
    for (int64_t c = set * width; c < (set + 1) * width; ++c) to[c] = number;
  }
  return to;
}

// Workspace of the outer index at hand, and of what is known of it; groups that no two threads share have one for all.
// Arrays "per place" have the length of a line.
template <class T>
struct ColumnSpace {
  double* sums;
  // per set: its Statistic, and its variance (0: given, or constant)
  double *mean, *mean_lo, *rstd, *rstd_lo, *scale, *var;
  double *pivot, *done;                       // per set; done: 1 once its moments, or sums of gradients, are known
  double *first, *second, *size;              // sums per set
  double *mean_g, *mean_g_xhat;               // means of gradients per set
  double* of_column[4];                       // numbers of sets, per column
  double *weight, *bias, *dy, *dy_xhat;       // per column
  double* centre[4];                          // mean, rstd, and for float64 mean_lo and scale, per place
  T *subtract, *factor, *factor_lo, *offset;  // y = (x - subtract) * factor + offset, per place
  T *a, *b;         // dx = (dy * factor - a) - (x - subtract) * b: more arrays would be more than half of the time
  T* plain;         // 0 where a place wants double, or a scale
  double* careful;  // per pack of places: some of them are not plain

  static int64_t size_of(const Columns<T>& columns) {
    const int64_t per_line = columns.space_per_line();
    return columns.sums_space() + 19 * per_line + 13 * padded(columns.sets_in_outer()) + padded(per_line / kPack + 2);
  }
  ColumnSpace(double* space, const Columns<T>& columns) {
    const auto take = [&](int64_t count) {
      double* taken = space;
      space += padded(count);
      return taken;
    };
    const int64_t per_line = columns.space_per_line(), sets = columns.sets_in_outer();
    sums = take(columns.sums_space());
    for (double** array : {&mean, &mean_lo, &rstd, &rstd_lo, &scale, &var, &pivot, &done, &first, &second, &size,
                           &mean_g, &mean_g_xhat}) {
      *array = take(sets);
    }
    for (double** array : {&of_column[0], &of_column[1], &of_column[2], &of_column[3], &weight, &bias, &dy, &dy_xhat,
                           &centre[0], &centre[1], &centre[2], &centre[3]}) {
      *array = columns.template line_at<double>(take(per_line));
    }
    for (T** array : {&subtract, &factor, &factor_lo, &offset, &a, &b, &plain}) {
      *array = columns.template line_at<T>(take(per_line));
    }
    careful = take(per_line / kPack + 2);
  }

  Statistic statistic(int64_t set) const { return {mean[set], mean_lo[set], rstd[set], scale[set], 0, rstd_lo[set]}; }
  void keep(int64_t set, const Statistic& s) const {
    mean[set] = s.mean;
    mean_lo[set] = s.mean_lo;
    rstd[set] = s.rstd;
    rstd_lo[set] = s.rstd_lo;
    scale[set] = s.scale;
  }

  // To be called when plain[c] is known for all columns.
  void find_careful(const Lines& lines) const {
    T all = 1;
    const T* const ones = plain;  // a copy, without which compilers make no vectors
#pragma omp simd reduction(* : all)
    for (int64_t c = 0; c < lines.columns; ++c) all *= ones[c];
    for (int64_t pack = 0; pack < lines.length / kPack + 2; ++pack) careful[pack] = 0;
    if (all != 0) return;
    repeat(lines, plain);
    for (int64_t at = 0; at < lines.length + (lines.many ? kPack : 0); ++at) {
      if (plain[at] == 0) careful[at / kPack] = 1;
    }
  }
  // Marks the packs that have columns of sets that are not done; false if there are none.
  bool find_undone(const Columns<T>& columns) const {
    const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer();
    double all = 0;
#pragma omp simd reduction(+ : all)
    for (int64_t set = 0; set < sets; ++set) all += done[set];
    if (all == static_cast<double>(sets)) return false;
    if (width == 1) {
#pragma omp simd
      for (int64_t set = 0; set < sets; ++set) plain[set] = static_cast<T>(done[set]);
    }
    for (int64_t set = 0; width > 1 && set < sets; ++set) {
      for (int64_t c = set * width; c < (set + 1) * width; ++c) plain[c] = static_cast<T>(done[set]);
    }
    find_careful(columns.lines());
    return true;
  }
};

// Numbers per set from numbers per column, by addition.
[[gnu::noinline]] inline const double* add_up_sets(const double* columns, int64_t sets, int64_t width, double* to) {
  if (width == 1) return columns;
  if (width <= kNarrowSet) {
    with_narrow_set(width, [&](auto narrow) {
#pragma omp simd
      for (int64_t set = 0; set < sets; ++set) {
        double sum = 0;
        for (int64_t c = 0; c < narrow; ++c) sum += columns[set * narrow + c];
        to[set] = sum;
      }
    });
    return to;
  }
  for (int64_t set = 0; set < sets; ++set) {
    double sum = 0;
    for (int64_t c = set * width; c < (set + 1) * width; ++c) sum += columns[c];
    to[set] = sum;
  }
  return to;
}

// The same of sums and what they have lost, in two arrays at `to`, by additions that keep what they lose.
struct SetSums {
  const double *sum, *lost;
};
inline SetSums add_up_exactly(const double* hi, const double* lo, int64_t sets, int64_t width, double* const* to) {
  if (width == 1) return {hi, lo};
  double *const sum = to[0], *const lost = to[1];
#pragma omp simd
  for (int64_t set = 0; set < sets; ++set) {
    sum[set] = hi[set * width];
    lost[set] = lo[set * width];
  }
  for (int64_t c = 1; c < width; ++c) {
#pragma omp simd
    for (int64_t set = 0; set < sets; ++set) {
      add_exactly(sum, lost, set, hi[set * width + c]);
      lost[set] += lo[set * width + c];
    }
  }
  return {sum, lost};
}

// Pivots: the mean of some rows of each set, from all over it. Their number is a power of two, so that a constant set's
// pivot is its value.
template <class T>
inline void sample_pivots(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Plan& plan = columns.plan();
  const int64_t rows = sampled_rows(columns);
  const int64_t width = plan.columns_per_set, sets = columns.sets_in_outer();
  const int64_t apart = columns.rows() / rows;
  const Lines unfolded(0, columns.columns());
  double* const sums = space.of_column[0];
  for (int64_t column = 0; column < columns.columns(); column += kTile<T>) {
    const int64_t left = columns.columns() - column, tile = left < kTile<T> ? left : kTile<T>;
    Tile<T> tiles(plan.x, unfolded, outer, column);
    double* const to = sums + column;
    if (tiles.in_place()) {
      const Panel<T> x = tiles.open(0, 1, tile);
      for_packs(tile, [&](auto at) {
        Pack<double> sum = at.template load<double>(x.data);
        for (int64_t row = 1; row < rows; ++row) sum += at.template load<double>(x.data + row * apart * x.stride);
        at.store(to, sum);
      });
      continue;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const T* const x = tiles.read(row * apart, 1, tile).data;
      for (int64_t c = 0; c < tile; ++c) to[c] = (row > 0 ? to[c] : 0) + static_cast<double>(x[c]);
    }
  }
  const double* const totals = add_up_sets(sums, sets, width, space.first);
  const double count = static_cast<double>(rows * width);
#pragma omp simd
  for (int64_t set = 0; set < sets; ++set) space.pivot[set] = static_cast<double>(static_cast<T>(totals[set] / count));
}

// Moments of the sets of one outer index from plain sums of float32 data: done = 1 where these will do (moments_of has
// the reason), true if that was everywhere. Not from short trees, whose roundings the squares of few distinct values
// share: 4 u of y leave no room for that.
inline bool plain_moments(const Columns<float>& columns, int64_t outer, const ColumnSpace<float>& space) {
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer();
  const double count = static_cast<double>(columns.rows() * width), share = 1 / count, eps = columns.args().eps;
  const Operand* const operands[1] = {&columns.plan().x};
  const int64_t ahead = columns.lines_ahead();
  columns.sum<1>(outer, operands, space.sums,
                 [&](const ColumnSums& to, int64_t, int64_t lines, int64_t n, const Panel<float>& x) {
                   const int64_t distance = ahead * x.stride * static_cast<int64_t>(sizeof(float));
                   with_ahead(ahead != 0, [&](auto asks) {
                     for_bands<float, 4>(lines, n, ahead, [&](int64_t band, int64_t count) {
                       add_plainly<decltype(asks)::value>(to, count, n, x.from(band), distance);
                     });
                   });
                 });
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  const double* const first = add_up_sets(sums.first, sets, width, space.first);
  const double* const second = add_up_sets(sums.second, sets, width, space.second);
  const double additions = columns.additions() + kPack;
  double *const means = space.mean, *const rstds = space.rstd, *const vars = space.var, *const done = space.done;
  double *const mean_lo = space.mean_lo, *const rstd_lo = space.rstd_lo, *const scale = space.scale, good_ones = 0;
#pragma omp simd reduction(+ : good_ones)
  for (int64_t set = 0; set < sets; ++set) {
    const double sum = first[set], squares = second[set], mean = sum / count;
    const double m2 = squares - sum * mean, var = m2 * share;
    means[set] = mean;
    mean_lo[set] = 0;
    rstds[set] = var + eps == 0 ? 0 : 1 / std::sqrt(var + eps);
    rstd_lo[set] = 0;
    scale[set] = 1;
    vars[set] = var;
    done[set] = (m2 * kPlainMargin > squares * additions) | (squares == 0) ? 1.0 : 0.0;
    good_ones += done[set];
  }
  return good_ones == static_cast<double>(sets);
}

// Sums of x - pivot and of its square, in double, per column of sets that are not done; of a few float64 terms also
// what rounding took from each of them. kAboutZero: the pivots are 0.
template <bool kAboutZero, class T>
inline void sum_deviations(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Operand* const operands[1] = {&columns.plan().x};
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer(), ahead = columns.lines_ahead();
  double* const pivots = space.centre[0];
  if constexpr (!kAboutZero) {
    const double* const of_columns = spread_sets(space.pivot, sets, width, pivots);
    if (of_columns != pivots) std::memcpy(pivots, of_columns, static_cast<size_t>(sets) * sizeof(double));
    repeat(columns.lines(), pivots);
  }
  const bool few = kMayOverflow<T> && columns.rows() <= kFewLines;
  columns.template sum<1>(outer, operands, space.sums,
                          [&](const ColumnSums& to, int64_t column, int64_t lines, int64_t n, const Panel<T>& x) {
                            const int64_t distance = ahead * x.stride * static_cast<int64_t>(sizeof(T));
                            const auto add = [&](auto asks, auto deviations_from) {
                              add_in_trees<T>(to, lines, n, space.careful + column / kPack, few, [&](auto place) {
                                Pack<double> about(0.0);
                                if constexpr (!kAboutZero) about = place.template load<double>(pivots + column);
                                return [=](auto at, int64_t line) {
                                  const T* from = x.data + line * x.stride;
                                  if constexpr (decltype(asks)::value) prefetch(from + at.start, distance);
                                  return deviations_from(at.template load<double>(from), about);
                                };
                              });
                            };
                            with_ahead(ahead != 0, [&](auto asks) {
                              add(asks, [](const Pack<double>& values, const Pack<double>& about) FASTNORM_LOOPS {
                                if constexpr (kAboutZero) return PackPair{values, values * values};
                                return deviations(values, about);
                              });
                            });
                            if (few) {
                              add(std::false_type{},
                                  [](const Pack<double>& values, const Pack<double>& about) FASTNORM_LOOPS {
                                    if constexpr (kAboutZero)
                                      return PackPair{0.0, lost_in_product(values, values, values * values)};
                                    return lost_deviations(values, about);
                                  });
                            }
                          });
}

// Numbers of sets for the caller, if that wants them; `taken`: of those alone for which it has a 1.
template <class T>
inline void hand_out(const Columns<T>& columns, int64_t outer, double* to, const double* from,
                     const double* taken = nullptr) {
  if (to == nullptr) return;
  double* const first = to + columns.stat(outer, 0);
  const int64_t sets = columns.sets_in_outer(), step = columns.plan().column_stat;
  if (step != 1) {
    for (int64_t set = 0; set < sets; ++set) {
      if (taken == nullptr || taken[set] != 0) first[set * step] = from[set];
    }
  } else if (taken == nullptr) {
    std::memcpy(first, from, static_cast<size_t>(sets) * sizeof(double));
  } else {
#pragma omp simd
    for (int64_t set = 0; set < sets; ++set) {
      if (taken[set] != 0) first[set] = from[set];
    }
  }
}

// The statistic of a set from its moments, kept in the space and for the caller.
template <class T>
inline void finish_column_set(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space, int64_t set,
                              Moments& moments) {
  const double eps = columns.args().eps;
  Statistic s;
  if (needs_scale<T>(moments, eps)) {
    moments = single_moments(columns.plan(), columns.args(), outer, set, s);
  } else {
    s = statistic_of<T>(moments, eps, 1, true);
  }
  space.keep(set, s);
  space.var[set] = moments.m2.value() / moments.count;
  space.done[set] = 1;
  store_statistic(columns.args(), columns.stat(outer, set), moments, s);
}

// Statistics of the sets that are not done from sums about their pivots; `again`: these are their means. Sets whose
// pivot was far from their mean get that as their next one.
inline void finish_sets(const Columns<float>& columns, int64_t outer, const ColumnSpace<float>& space, bool again) {
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer();
  const double count = static_cast<double>(columns.rows() * width);
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  for (int64_t set = 0; set < sets; ++set) {
    if (space.done[set] != 0) continue;
    Sum first, second;
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      first.add(sums.first[c]);
      second.add(sums.second[c]);
    }
    Moments moments = moments_about(space.pivot[set], count, first, second);
    if (again || moments.m2.value() * 0x1p12 >= second.value()) {  // float32 data leaves room in double
      finish_column_set(columns, outer, space, set, moments);
    } else {
      space.pivot[set] = moments.mean;
    }
  }
}
inline void finish_sets(const Columns<double>& columns, int64_t outer, const ColumnSpace<double>& space, bool again) {
  const NormArgs<double>& args = columns.args();
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer();
  const double count = static_cast<double>(columns.rows() * width);
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  const SetSums first = add_up_exactly(sums.first, sums.first_lo, sets, width, &space.of_column[0]);
  const SetSums second = add_up_exactly(sums.second, sums.second_lo, sets, width, &space.of_column[2]);
  double *const mean = space.centre[0], *const mean_lo = space.centre[1], *const var = space.centre[2];
  double *const rstd = space.centre[3], *const rstd_lo = space.weight;
  double *const near = space.dy, *const plain = space.dy_xhat;
  finish_lanes({space.pivot, first.sum, first.lost, second.sum, second.lost},
               {mean, mean_lo, var, rstd, rstd_lo, near, plain}, sets, count, args.eps, kMostSquares);
  const double sure = again ? 1 : 0;
  double taken = 0;
#pragma omp simd reduction(+ : taken)
  for (int64_t set = 0; set < sets; ++set) {
    // Squares that vanish say nothing of how near 0 is to the mean, of which a constant set wants every digit.
    const double zeros = std::fabs(first.sum[set]) + second.sum[set];
    const double seen = (var[set] > 0x1p-900) | (zeros == 0) ? 1.0 : 0.0;
    // Where the pivot was further from 0 than the mean is, the first part could be nearer to it.
    const double both = mean[set] + mean_lo[set], part = both - mean[set];
    mean_lo[set] = (mean[set] - (both - part)) + (mean_lo[set] - part);
    mean[set] = both;
    near[set] = near[set] * seen * (1 - sure) + sure;
    plain[set] *= near[set] * (1 - space.done[set]);
    taken += plain[set];
  }
#pragma omp simd
  for (int64_t set = 0; set < sets; ++set) {
    const bool now = plain[set] != 0;
    const double lo = std::fabs(mean_lo[set]) * rstd[set] < 0x1p-56 ? 0 : mean_lo[set];  // drop_negligible
    space.mean[set] = now ? mean[set] : space.mean[set];
    space.mean_lo[set] = now ? lo : space.mean_lo[set];
    space.rstd[set] = now ? rstd[set] : space.rstd[set];
    space.rstd_lo[set] = now ? rstd_lo[set] : space.rstd_lo[set];
    space.var[set] = now ? var[set] : space.var[set];
    space.scale[set] = now ? 1 : space.scale[set];
    space.done[set] = now ? 1 : space.done[set];
  }
  const bool all = taken == static_cast<double>(sets);
  const double* const some = all ? nullptr : plain;
  hand_out(columns, outer, args.mean, mean, some);
  hand_out(columns, outer, args.mean_lo, mean_lo, some);
  hand_out(columns, outer, args.var, var, some);
  hand_out(columns, outer, args.rstd, rstd, some);
  hand_out(columns, outer, args.rstd_lo, rstd_lo, some);
  if (all) return;
  for (int64_t set = 0; set < sets; ++set) {
    if (space.done[set] != 0) continue;
    if (near[set] == 0) {
      space.pivot[set] = short_mean_of(mean[set], var[set]);
    } else {
      Moments moments = moments_about(space.pivot[set], count, {first.sum[set], first.lost[set]},
                                      {second.sum[set], second.lost[set]});
      finish_column_set(columns, outer, space, set, moments);
    }
  }
}

// Statistics of the sets that are not done yet, in double, kept in the space and for the caller: from sums about a
// pivot, and where that was not near the mean, from sums about the mean. Few rows of float64 are not sampled: their
// sums about 0, from which all differences are exact, are as good about a mean within 0.7 standard deviations of it.
template <class T>
inline void exact_moments(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const bool about_zero = kMayOverflow<T> && columns.rows() < 4 * sampled_rows(columns);
  if (!space.find_undone(columns)) return;
  if (about_zero) {
    for (int64_t set = 0; set < columns.sets_in_outer(); ++set) space.pivot[set] = 0;
    sum_deviations<true>(columns, outer, space);
  } else {
    sample_pivots(columns, outer, space);
    sum_deviations<false>(columns, outer, space);
  }
  finish_sets(columns, outer, space, false);
  if (!space.find_undone(columns)) return;
  sum_deviations<false>(columns, outer, space);
  finish_sets(columns, outer, space, true);
}

// Statistics of all sets of one outer index, kept in the space and for the caller.
template <class T>
inline void measure_outer(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const int64_t sets = columns.sets_in_outer();
  if constexpr (kMayOverflow<T>) {
    for (int64_t set = 0; set < sets; ++set) space.done[set] = 0;
  } else {
    const bool all = plain_moments(columns, outer, space);
    hand_out(columns, outer, args.mean, space.mean);
    hand_out(columns, outer, args.mean_lo, space.mean_lo);
    hand_out(columns, outer, args.var, space.var);
    hand_out(columns, outer, args.rstd, space.rstd);
    if (all) return;
  }
  exact_moments(columns, outer, space);
}

// The statistics a forward left for its backward, or the caller gave; measured again where float64 could not hold them.
template <class T>
inline void take_statistics(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space, bool kept) {
  const NormArgs<T>& args = columns.args();
  const int64_t sets = columns.sets_in_outer(), base = columns.stat(outer, 0), step = columns.plan().column_stat;
  const auto take = [&](double* to, const double* from, double otherwise) {
    if (from && step == 1) {
      std::memcpy(to, from + base, static_cast<size_t>(sets) * sizeof(double));
    } else {
      for (int64_t set = 0; set < sets; ++set) to[set] = from ? from[base + set * step] : otherwise;
    }
  };
  take(space.mean, args.mean, 0);
  take(space.mean_lo, args.mean_lo, 0);
  take(space.rstd, args.rstd, 0);
  take(space.rstd_lo, kept ? args.rstd_lo : nullptr, 0);
  const double *const means = space.mean, *const rstds = space.rstd;
  double *const mean_lo = space.mean_lo, *const scale = space.scale, *const var = space.var, odd = 0;
#pragma omp simd reduction(+ : odd)
  for (int64_t set = 0; set < sets; ++set) {
    const double mean = means[set], rstd = rstds[set];
    const bool plain = (std::fabs(mean) <= 0x1p1000) & (((rstd >= 0x1p-1000) & (rstd < HUGE_VAL)) | (rstd == 0));
    odd += plain ? 0.0 : 1.0;
    mean_lo[set] = std::fabs(mean_lo[set]) * rstd < 0x1p-56 ? 0 : mean_lo[set];  // drop_negligible
    scale[set] = 1;
    var[set] = 0;
  }
  if constexpr (kMayOverflow<T>) {
    for (int64_t set = 0; odd > 0 && set < sets; ++set) {
      const int64_t stat = base + set * step;
      Statistic s;
      if (kept && !args.constant_stats && lost<T>(args.rstd[stat])) {
        single_moments(columns.plan(), args, outer, set, s);
      } else {
        s = given_statistic(args, stat);
      }
      space.keep(set, s);
    }
  }
}

// body(workspace, group, outer index) for all outer indices. False: no memory.
template <class T, class Body>
inline bool for_outer_spaces(const Columns<T>& columns, const Body& body) {
  const int64_t size = ColumnSpace<T>::size_of(columns);
  const int64_t workspaces = columns.workspaces();
  const RawSpace workspace(workspaces * size);
  if (!workspace) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    body(ColumnSpace<T>(workspace.data() + group % workspaces * size, columns), group, outer);
  });
  return true;
}

}  // namespace
}  // namespace fastnorm
