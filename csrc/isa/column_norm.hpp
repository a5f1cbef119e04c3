// Forward of Family::column: neighbouring values have weights of their own (batch norm on (N, C), batch, instance and
// group norm with channels last). A set is `columns_per_set` neighbouring columns (one, but for group norm). A pack
// mixes sets: lanes that float32 cannot do are mended one by one, so that no set's bits depend on its neighbours.
//
//   x, y: (outer, rows, columns) with any strides;  statistics: per outer and set;  weight, bias: (params)
#pragma once

#include "isa/column_moments.hpp"

namespace fastnorm {
namespace {

// Parameters of the columns, in double; `usual` for those that are not given.
template <class T>
inline void take_parameters(const Columns<T>& columns, int64_t outer, const T* params, double usual, double* to) {
  const int64_t n = columns.columns(), step = columns.plan().column_param;
  if (params == nullptr) {
    for (int64_t c = 0; c < n; ++c) to[c] = usual;
    return;
  }
  const T* const from = params + columns.param(outer, 0);
  if (step == 1) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] = static_cast<double>(from[c]);
  } else {
    for (int64_t c = 0; c < n; ++c) to[c] = static_cast<double>(from[c * step]);
  }
}

template <class T>
inline void take_weights(const Columns<T>& columns, int64_t outer, double* to) {
  take_parameters(columns, outer, columns.args().weight, 1, to);
}

// Statistics that data can be normalised with in its own dtype, without a branch.
template <class T>
FASTNORM_INLINE bool plain_statistic(double mean, double rstd, double scale) {
  if constexpr (kMayOverflow<T>) return scale == 1;
  return moderate(rstd) & (std::fabs(mean) < kMostMean);
}

// What normalises each place, from the statistics of its set.
template <class T>
inline void prepare_normalise(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer(), n = columns.columns();
  const double* const mean = spread_sets(space.mean, sets, width, space.of_column[0]);
  const double* const mean_lo = spread_sets(space.mean_lo, sets, width, space.of_column[1]);
  const double* const rstd = spread_sets(space.rstd, sets, width, space.of_column[2]);
  const double* const scale = spread_sets(space.scale, sets, width, space.of_column[3]);
  const double* const var = kMayOverflow<T> ? spread_sets(space.var, sets, width, space.dy) : nullptr;
  const double* const rstd_lo = kMayOverflow<T> ? spread_sets(space.rstd_lo, sets, width, space.dy_xhat) : nullptr;
  take_weights(columns, outer, space.weight);
  take_parameters(columns, outer, args.bias, kNoBias, space.bias);
  const double *const weights = space.weight, *const biases = space.bias;
  T *const subtract = space.subtract, *const factors = space.factor, *const offsets = space.offset;
  T *const plain_ones = space.plain, *const factors_lo = space.factor_lo;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const double weight = weights[c], bias = biases[c];
    bool plain;
    if constexpr (kMayOverflow<T>) {
      plain = as_one_step(rstd[c], weight, bias);
      const SplitMean split = SplitMean::of({mean[c], mean_lo[c], rstd[c], scale[c], var[c] > 0 ? 1.0 : 0.0});
      const TwoTerm factor = split_factor(rstd[c], rstd_lo[c], weight);
      subtract[c] = split.pivot;
      factors[c] = factor.hi;
      factors_lo[c] = factor.lo;
      offsets[c] = split.offset(factor.hi, factor.lo, bias);
    } else {
      const double factor = rstd[c] * weight;
      plain = zero_or_moderate(factor);
      const FloatFactors of = FloatFactors::of(mean[c], mean_lo[c], factor, bias);
      subtract[c] = of.pivot;
      factors[c] = of.factor;
      offsets[c] = of.offset;
    }
    plain_ones[c] = plain_statistic<T>(mean[c], rstd[c], scale[c]) & plain ? T(1) : T(0);
  }
  for (T* array : {space.subtract, space.factor, space.offset}) repeat(columns.lines(), array);
  if constexpr (kMayOverflow<T>) repeat(columns.lines(), space.factor_lo);
  space.find_careful(columns.lines());
}

// One value in double, whatever its set.
template <class T>
inline T normalised(const Columns<T>& columns, int64_t outer, const Statistic& s, int64_t c, T x) {
  const NormArgs<T>& args = columns.args();
  const int64_t param = columns.param(outer, c);
  const double scaled = static_cast<double>(x) * s.scale;
  const double d = s.mean_lo == 0 ? scaled - s.mean : less_mean(scaled, s.mean, s.mean_lo);
  double xhat = d * s.rstd;
  if (s.rstd_lo != 0) xhat += two_product(d, s.rstd).lo + d * s.rstd_lo;
  return static_cast<T>(xhat * (args.weight ? static_cast<double>(args.weight[param]) : 1) +
                        (args.bias ? static_cast<double>(args.bias[param]) : kNoBias));
}

// body(how to store) for a panel of results.
template <class T, class Body>
FASTNORM_INLINE void with_panel_store(bool past_cache, const Panel<T>& panel, const Body& body) {
  with_store(past_cache, panel.data, panel.stride * static_cast<int64_t>(sizeof(T)), body);
}

// How late lines of results begin for them to be whole lines of the cache: worth it where they are stored past it, and
// where what they are made from lies like them; else it would be read across lines instead.
template <class T>
inline int64_t lateness(bool past_cache, const Tile<T>& results, std::initializer_list<const Tile<T>*> operands) {
  const int64_t late = results.values_before_cache_line();
  bool worth_it = late > 0;
  for (const Tile<T>* operand : operands) {
    const int64_t other = operand->values_before_cache_line();
    worth_it = worth_it && (past_cache ? other >= 0 : other == late);
  }
  return worth_it ? late : 0;
}

// Are all the packs of a group plain?
template <class T>
FASTNORM_INLINE bool all_plain(const ColumnSpace<T>& space, int64_t place, int packs) {
  for (int64_t pack = place / kPack; pack <= (place + packs * kPack - 1) / kPack; ++pack) {
    if (space.careful[pack] != 0) return false;
  }
  return true;
}

// A panel of results: in the type of the array where the sets' numbers allow it, value by value where they do not.
// kTwoParts: with both parts of the factors; not through given statistics, where x may be infinite.
template <bool kAhead, bool kTwoParts, class T, class Out>
FASTNORM_INLINE void normalise_panel(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space,
                                     int64_t column, int64_t lines, int64_t n, const Panel<T>& x, const Panel<T>& y,
                                     Out out) {
  for_pack_groups<T>(0, n, [&](auto at, auto packs) {
    constexpr int kPacks = decltype(packs)::value;
    Pack<T> pivot[kPacks], factor[kPacks], factor_lo[kTwoParts ? kPacks : 1], offset[kPacks];
    FASTNORM_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      const int64_t place = column + k * kPack;
      pivot[k] = in_register(at.template load<T>(space.subtract + place));
      factor[k] = in_register(at.template load<T>(space.factor + place));
      offset[k] = in_register(at.template load<T>(space.offset + place));
      if constexpr (kTwoParts) factor_lo[k] = in_register(at.template load<T>(space.factor_lo + place));
    }
    const auto result = [&](const T* from, int k) FASTNORM_LOOPS {
      const Pack<T> d = at.template load<T>(from + k * kPack) - pivot[k];
      if constexpr (kTwoParts) return one_step(d, factor[k], factor_lo[k], offset[k]);
      if constexpr (kMayOverflow<T>) return multiply_add(d, factor[k], offset[k]);
      return d * factor[k] + offset[k];
    };
    // Copies, for the compiler to keep them in registers.
    const T* from = x.data;
    T* to = y.data;
    const int64_t x_step = x.stride, y_step = y.stride, count = lines;
    [[maybe_unused]] const int64_t distance =
        ahead_of_group<T>(columns.lines_ahead(), n) * x_step * static_cast<int64_t>(sizeof(T));
    if (all_plain(space, column + at.start, kPacks)) {
      for (int64_t line = 0; line < count; ++line, from += x_step, to += y_step) {
        FASTNORM_UNROLL
        for (int k = 0; k < kPacks; ++k) {
          if constexpr (kAhead) prefetch(from + at.start + k * kPack, distance);
          out.store(at, to + k * kPack, result(from, k));
        }
      }
      return;
    }
    for (int64_t line = 0; line < count; ++line, from += x_step, to += y_step) {
      for (int k = 0; k < kPacks; ++k) {
        const int64_t group = k * kPack;
        const T* const plain = space.plain + column + group + at.start;
        const auto wrong = [&](int64_t lane, T) { return plain[lane] == 0; };
        const Pack<T> mended = mend(at, result(from, k), n - group, wrong, [&](int64_t lane) {
          const int64_t c = (column + group + at.start + lane) % columns.columns();
          return normalised(columns, outer, space.statistic(c / columns.plan().columns_per_set), c,
                            from[group + at.start + lane]);
        });
        out.store(at, to + group, mended);
      }
    }
  });
}

template <bool kTwoParts, class T>
inline void normalise_outer(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Plan& plan = columns.plan();
  columns.for_pieces_of(true, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
    Tile<T> x_tile(plan.x, columns.lines(), outer, column), y_tile(plan.y, columns.lines(), outer, column);
    const int64_t late = lateness(columns.args().past_cache, y_tile, {&x_tile});
    columns.for_panels(
        chunk, column, width, late, [&](int64_t first, int64_t count, int64_t shift, int64_t n) FASTNORM_LOOPS {
          const Panel<T> x = x_tile.read(first, count, n), y = y_tile.open(first, count, n), to = y.moved(shift);
          with_panel_store(columns.args().past_cache, to, [&](auto out) {
            with_ahead(columns.lines_ahead() != 0, [&](auto asks) {
              for_bands<T, 2>(count, n, columns.lines_ahead(), [&](int64_t band, int64_t lines) {
                normalise_panel<decltype(asks)::value, kTwoParts>(columns, outer, space, column + shift, lines, n,
                                                                  x.moved(shift).from(band), to.from(band), out);
              });
            });
          });
          y_tile.commit(y, first, count, n);
        });
  });
}

// Moments for their own sake are measured the long way: they are asked for to full precision.
template <class T>
bool column_moments(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  return for_outer_spaces(columns, [&](const ColumnSpace<T>& space, int64_t, int64_t outer) {
    for (int64_t set = 0; set < columns.sets_in_outer(); ++set) space.done[set] = 0;
    exact_moments(columns, outer, space);
    const double count = static_cast<double>(columns.rows() * plan.columns_per_set);
    for (int64_t set = 0; set < columns.sets_in_outer(); ++set) args.var[columns.stat(outer, set)] *= count;
  });
}

template <class T>
bool column_forward(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  return for_outer_spaces(columns, [&](const ColumnSpace<T>& space, int64_t, int64_t outer) {
    measure_outer(columns, outer, space);
    prepare_normalise(columns, outer, space);
    normalise_outer<kMayOverflow<T>>(columns, outer, space);
  });
}

template <class T>
bool column_apply(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  return for_outer_spaces(columns, [&](const ColumnSpace<T>& space, int64_t, int64_t outer) {
    take_statistics(columns, outer, space, false);
    prepare_normalise(columns, outer, space);
    normalise_outer<false>(columns, outer, space);
  });
}

}  // namespace
}  // namespace fastnorm
