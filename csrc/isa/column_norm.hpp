// Forward of Family::column: neighbouring values have weights of their own (batch norm on (N, C), batch, instance and
// group norm with channels last). A set is `columns_per_set` neighbouring columns (one, but for group norm). A pack
// mixes sets: lanes that float32 cannot do are mended one by one, so that no set's bits depend on its neighbours.
//
//   x, y: (outer, rows, columns) with any strides;  statistics: per outer and set;  weight, bias: (params)
#pragma once

#include "isa/column_moments.hpp"

namespace fastnorm {
namespace {

// What normalises each place, from the statistics of its set.
template <class T>
inline void prepare_normalise(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const Lines& lines = columns.lines();
  const int64_t width = columns.plan().columns_per_set, param = columns.param(outer, 0),
                step = columns.plan().column_param;
  for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
    const Statistic& s = space.statistics[set];
    const bool set_is_plain = kMayOverflow<T> ? s.scale == 1 : fits(s);
    const T mean = static_cast<T>(s.mean);
    const T mean_lo = static_cast<T>((s.mean - static_cast<double>(mean)) + s.mean_lo);
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      const double factor = s.rstd * (args.weight ? static_cast<double>(args.weight[param + c * step]) : 1);
      const bool plain =
          kMayOverflow<T> ? std::fabs(factor) < 0x1p1000 && std::fabs(factor) > 0x1p-1000 : moderate(factor);
      space.mean[c] = mean;
      space.mean_lo[c] = mean_lo;
      space.factor[c] = static_cast<T>(factor);
      space.bias[c] = args.bias ? args.bias[param + c * step] : T(0);
      space.plain[c] = set_is_plain && plain ? T(1) : T(0);
    }
  }
  for (T* array : {space.mean, space.mean_lo, space.factor, space.bias}) repeat(lines, array);
  space.find_careful(lines);
}

// One value in double, whatever its set.
template <class T>
inline T normalised(const Columns<T>& columns, int64_t outer, const Statistic& s, int64_t c, T x) {
  const NormArgs<T>& args = columns.args();
  const int64_t param = columns.param(outer, c);
  const double scaled = static_cast<double>(x) * s.scale;
  const double xhat = (s.mean_lo == 0 ? scaled - s.mean : less_mean(scaled, s.mean, s.mean_lo)) * s.rstd;
  return static_cast<T>(xhat * (args.weight ? static_cast<double>(args.weight[param]) : 1) +
                        (args.bias ? static_cast<double>(args.bias[param]) : 0));
}

// Lanes of a pack, one value at a time: result[lane] = value(lane) for those that are not plain.
template <class T, class At, class Value>
inline Pack<T> mend(At at, Pack<T> pack, const T* plain, int64_t width, const Value& value) {
  T lanes[kPack];
  std::memcpy(lanes, &pack, sizeof lanes);
  for (int64_t lane = 0; lane < kPack && at.start + lane < width; ++lane) {
    if (plain[at.start + lane] == 0) lanes[lane] = value(lane);
  }
  std::memcpy(&pack, lanes, sizeof lanes);
  return pack;
}

// body(how to store) for a panel of results.
template <class T, class Body>
FASTNORM_INLINE void with_panel_store(bool past_cache, const Panel<T>& panel, const Body& body) {
  with_store(past_cache, panel.data, panel.stride * static_cast<int64_t>(sizeof(T)), body);
}

// Are all the packs of a group plain?
template <class T>
FASTNORM_INLINE bool all_plain(const ColumnSpace<T>& space, int64_t place, int packs) {
  const double* careful = space.careful + place / kPack;
  for (int k = 0; k < packs; ++k) {
    if (careful[k] != 0) return false;
  }
  return true;
}

template <class T>
inline void normalise_outer(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const Plan& plan = columns.plan();
  const int64_t per_set = plan.columns_per_set;
  bool two_means = false;  // for float64: is there a column whose mean_lo counts?
  for (int64_t c = 0; kMayOverflow<T> && c < columns.columns(); ++c) two_means = two_means || space.mean_lo[c] != 0;
  columns.for_pieces_of(true, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
    Tile<T> x_tile(plan.x, columns.lines(), outer, column), y_tile(plan.y, columns.lines(), outer, column);
    columns.for_panels(chunk, column, width, [&](int64_t first, int64_t count, int64_t n) {
      const Panel<T> x = x_tile.read(first, count, n), y = y_tile.open(first, count, n);
      const int64_t distance = columns.lines_ahead() * x.stride * static_cast<int64_t>(sizeof(T));
      with_panel_store(args.past_cache, y, [&](auto out) {
        for_bands<T, kMayOverflow<T> ? 2 : kMaxPanelRows>(
            count, n, columns.lines_ahead(), [&](int64_t band, int64_t lines) {
              for_pack_groups<T>(n, [&](auto at, auto packs) {
                constexpr int kPacks = decltype(packs)::value;
                Pack<T> mean[kPacks], mean_lo[kPacks], factor[kPacks], bias[kPacks];
                FASTNORM_UNROLL
                for (int k = 0; k < kPacks; ++k) {
                  const int64_t place = column + k * kPack;
                  mean[k] = at.template load<T>(space.mean + place);
                  mean_lo[k] = at.template load<T>(space.mean_lo + place);
                  factor[k] = at.template load<T>(space.factor + place);
                  bias[k] = at.template load<T>(space.bias + place);
                }
                const auto result = [&](const T* from, int k) {
                  const Pack<T> v = at.template load<T>(from + k * kPack);
                  if constexpr (kMayOverflow<T>) {
                    return (two_means ? less_mean(v, mean[k], mean_lo[k]) : v - mean[k]) * factor[k] + bias[k];
                  }
                  return ((v - mean[k]) - mean_lo[k]) * factor[k] + bias[k];
                };
                const T* from = x.from(band).data;
                T* to = y.from(band).data;
                if (all_plain(space, column + at.start, kPacks)) {
                  for (int64_t line = 0; line < lines; ++line, from += x.stride, to += y.stride) {
                    FASTNORM_UNROLL
                    for (int k = 0; k < kPacks; ++k) {
                      prefetch(from + at.start + k * kPack, distance);
                      out.store(at, to + k * kPack, result(from, k));
                    }
                  }
                  return;
                }
                for (int64_t line = 0; line < lines; ++line, from += x.stride, to += y.stride) {
                  for (int k = 0; k < kPacks; ++k) {
                    const int64_t group = k * kPack;
                    const Pack<T> mended =
                        mend(at, result(from, k), space.plain + column + group, n - group, [&](int64_t lane) {
                          const int64_t c = (column + group + at.start + lane) % columns.columns();
                          return normalised(columns, outer, space.statistics[c / per_set], c,
                                            from[group + at.start + lane]);
                        });
                    out.store(at, to + group, mended);
                  }
                }
              });
            });
      });
      y_tile.commit(y, first, count, n);
    });
  });
}

template <class T>
bool column_moments(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size_of(columns);
  const Workspace<double> workspace(columns.groups() * size);
  if (!workspace) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    outer_moments(columns, outer, space, true, [&](int64_t set, Moments& moments) {
      const Statistic s = column_statistic(columns, outer, set, moments);
      store_statistic(args, columns.stat(outer, set), moments, s);
      args.var[columns.stat(outer, set)] *= moments.count;
    });
  });
  return true;
}

template <class T>
bool column_forward(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size_of(columns);
  const Workspace<double> workspace(columns.groups() * size);
  if (!workspace) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    outer_moments(columns, outer, space, false, [&](int64_t set, Moments& moments) {
      space.statistics[set] = column_statistic(columns, outer, set, moments);
      store_statistic(args, columns.stat(outer, set), moments, space.statistics[set]);
    });
    prepare_normalise(columns, outer, space);
    normalise_outer(columns, outer, space);
  });
  return true;
}

template <class T>
bool column_apply(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size_of(columns);
  const Workspace<double> workspace(columns.groups() * size);
  if (!workspace) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
      space.statistics[set] = given_statistic(args, columns.stat(outer, set));
    }
    prepare_normalise(columns, outer, space);
    normalise_outer(columns, outer, space);
  });
  return true;
}

}  // namespace
}  // namespace fastnorm
