// Moments of sets that are columns: float32 data by plain sums, checked like those of other sets (moments.hpp); what
// they cannot do, and float64, about a pivot per set, the mean of its first rows; sets whose first rows are not like
// the others once more, about their mean.
#pragma once

#include "isa/column_sums.hpp"

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

// Are moments about this pivot as good as about the mean? Float32 data leaves room in double, float64 data does not.
template <class T>
inline bool near_mean(double m2, double squares) {
  return m2 * (kMayOverflow<T> ? 1.5 : 0x1p12) >= squares;
}

// Pivots: the mean of the first rows of each set.
template <class T>
inline void first_means(const Columns<T>& columns, int64_t outer, double* pivots) {
  const Plan& plan = columns.plan();
  constexpr int64_t kSample = kMayOverflow<T> ? 8 * kSlab : kSlab;
  const int64_t rows = columns.rows() < kSample ? columns.rows() : kSample, width = plan.columns_per_set;
  const Lines rows_apart(0, columns.columns());  // no folding
  for (int64_t column = 0; column < columns.columns(); column += kTile<T>) {
    const int64_t left = columns.columns() - column, tile = left < kTile<T> ? left : kTile<T>;
    Tile<T> tiles(plan.x, rows_apart, outer, column);
    for (int64_t c = 0; c < tile; ++c) pivots[column + c] = 0;
    for (int64_t first = 0; first < rows; first += kSlab) {
      const int64_t count = rows - first < kSlab ? rows - first : kSlab;
      const Panel<T> x = tiles.read(first, count, tile);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < tile; ++c) pivots[column + c] += static_cast<double>(x.data[r * x.stride + c]);
      }
    }
  }
  const double count = static_cast<double>(rows * width);
  for (int64_t first = 0; first < columns.columns(); first += width) {
    double sum = 0;
    for (int64_t c = first; c < first + width; ++c) sum += pivots[c];
    for (int64_t c = first; c < first + width; ++c) pivots[c] = sum / count;
  }
}

// The first `columns` values of an array, repeated for all places of a line.
template <class V>
inline void repeat(const Lines& lines, V* values) {
  for (int64_t at = lines.columns; at < lines.length; ++at) values[at] = values[at - lines.columns];
}

// Workspace of one group of outer indices, and of what is known of the outer index at hand. Arrays "per place" have
// the length of a line.
template <class T>
struct ColumnSpace {
  double *sums, *pivots, *done;       // done: per set, 1 once its moments are known
  double* centre[4];                  // mean, rstd, and for float64 mean_lo and scale, per place
  double *dy, *dy_xhat, *size;        // sums per column
  T *mean, *mean_lo, *factor, *bias;  // y = ((x - mean) - mean_lo) * factor + bias, per place
  T *rstd, *a, *b;                    // dx = rstd * ((dy * weight - a) - centred * b)
  T* plain;                           // 0 where a place wants double, or a scale
  Statistic* statistics;              // per set
  double *mean_g, *mean_g_xhat;       // per set
  double* careful;                    // per pack of places: some of them are not plain

  static int64_t size_of(const Columns<T>& columns) {
    return columns.sums_space() + 16 * columns.lines().length + 8 * columns.sets_in_outer() +
           columns.lines().length / kPack + 8;
  }
  ColumnSpace(double* space, const Columns<T>& columns) {
    const auto take = [&](int64_t count) {
      double* taken = space;
      space += count;
      return taken;
    };
    const int64_t length = columns.lines().length, sets = columns.sets_in_outer();
    sums = take(columns.sums_space());
    for (double** array : {&pivots, &centre[0], &centre[1], &centre[2], &centre[3], &dy, &dy_xhat, &size}) {
      *array = take(length);
    }
    for (T** array : {&mean, &mean_lo, &factor, &bias, &rstd, &a, &b, &plain}) {
      *array = reinterpret_cast<T*>(take(length));
    }
    done = take(sets);
    statistics = reinterpret_cast<Statistic*>(take(4 * sets));
    mean_g = take(sets);
    mean_g_xhat = take(sets);
    careful = take(length / kPack + 1);
  }

  // To be called when plain[c] is known for all columns.
  void find_careful(const Lines& lines) const {
    bool all = true;
    for (int64_t c = 0; c < lines.columns; ++c) all = all && plain[c] != 0;
    for (int64_t at = 0; at < lines.length; at += kPack) careful[at / kPack] = 0;
    if (all) return;
    repeat(lines, plain);
    for (int64_t at = 0; at < lines.length; ++at) {
      if (plain[at] == 0) careful[at / kPack] = 1;
    }
  }
};

// Moments of the sets of one outer index from plain sums: finish(set, moments) and done = 1 where these will do. True
// if that was everywhere.
template <class Finish>
inline bool plain_moments(const Columns<float>& columns, int64_t outer, const ColumnSpace<float>& space,
                          const Finish& finish) {
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer();
  const double count = static_cast<double>(columns.rows() * width);
  const Operand* const operands[1] = {&columns.plan().x};
  const int64_t ahead = columns.lines_ahead();
  columns.sum<1>(outer, operands, space.sums,
                 [ahead](const ColumnSums& to, int64_t, int64_t lines, int64_t n, const Panel<float>& x) {
                   add_plainly(to, lines, n, x, ahead);
                 });
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  bool all = true;
  for (int64_t set = 0; set < sets; ++set) {
    PlainTotals totals;
    totals.additions = columns.additions();
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      totals.sum += sums.first[c];
      totals.squares += sums.second[c];
    }
    Moments moments;
    const bool good = moments_of(totals, count, true, moments);
    space.done[set] = good;
    if (good) finish(set, moments);
    all = all && good;
  }
  return all;
}

// Moments of all sets of one outer index: finish(set, moments). `precise`: in any case from deviations.
template <class T, class Finish>
inline void outer_moments(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space, bool precise,
                          const Finish& finish) {
  const Plan& plan = columns.plan();
  const int64_t width = plan.columns_per_set, sets = columns.sets_in_outer();
  const double count = static_cast<double>(columns.rows() * width);
  for (int64_t set = 0; set < sets; ++set) space.done[set] = 0;
  if constexpr (!kMayOverflow<T>) {
    if (!precise && plain_moments(columns, outer, space, finish)) return;
  }
  const Operand* const operands[1] = {&plan.x};
  const int64_t ahead = columns.lines_ahead();
  first_means(columns, outer, space.pivots);
  for (const bool again : {false, true}) {
    repeat(columns.lines(), space.pivots);
    columns.template sum<1>(outer, operands, space.sums,
                            [&](const ColumnSums& to, int64_t column, int64_t lines, int64_t n, const Panel<T>& x) {
                              const int64_t distance = ahead * x.stride * static_cast<int64_t>(sizeof(T));
                              const auto add = [&](auto deviations_from) {
                                add_in_trees<T>(to, lines, n, [&](auto place) {
                                  return [=, about = place.template load<double>(space.pivots + column)](auto at,
                                                                                                         int64_t line) {
                                    const T* from = x.data + line * x.stride;
                                    prefetch(from + at.start, distance);
                                    return deviations_from(at.template load<double>(from), about);
                                  };
                                });
                              };
                              add([](const Pack<double>& values, const Pack<double>& about)
                                      FASTNORM_LOOPS { return deviations(values, about); });
                              if (few_terms<T>(columns.rows() * width)) {
                                add([](const Pack<double>& values, const Pack<double>& about)
                                        FASTNORM_LOOPS { return lost_deviations(values, about); });
                              }
                            });
    const ColumnSums sums = columns.sums_at(space.sums, 0);
    int64_t far = 0;
    for (int64_t set = 0; set < sets; ++set) {
      if (space.done[set] != 0) continue;
      Sum first, second;
      for (int64_t c = set * width; c < (set + 1) * width; ++c) {
        first.add(column_sum<T>(sums.first, sums.first_lo, c));
        second.add(column_sum<T>(sums.second, sums.second_lo, c));
      }
      Moments moments = moments_about(space.pivots[set * width], count, first, second);
      if (again || near_mean<T>(moments.m2.value(), second.value())) {
        space.done[set] = 1;
        finish(set, moments);
      } else {
        ++far;
        for (int64_t c = set * width; c < (set + 1) * width; ++c) space.pivots[c] = moments.mean;
      }
    }
    if (far == 0) return;
  }
}

template <class T>
inline Statistic column_statistic(const Columns<T>& columns, int64_t outer, int64_t set, Moments& moments) {
  const double eps = columns.args().eps;
  if (!needs_scale<T>(moments, eps)) return statistic_of<T>(moments, eps, 1);
  Statistic s;
  moments = single_moments(columns.plan(), columns.args(), outer, set, s);
  return s;
}

// The statistic a forward left for its backward; measured again where float64 could not hold it.
template <class T>
inline Statistic kept_column_statistic(const Columns<T>& columns, int64_t outer, int64_t set) {
  const NormArgs<T>& args = columns.args();
  const int64_t stat = columns.stat(outer, set);
  if (args.constant_stats || !lost<T>(args.rstd[stat])) return given_statistic(args, stat);
  Statistic s;
  single_moments(columns.plan(), args, outer, set, s);
  return s;
}

}  // namespace
}  // namespace fastnorm
