// Backward of Family::column: per column the sums of dy and dy * xhat, which are also the gradients of its parameters;
// weighted and added up they are the two means of a set.
//
//   dy, x, dx: (outer, rows, columns) with any strides;  dweight, dbias: (params)
#pragma once

#include "isa/column_norm.hpp"

namespace fastnorm {
namespace {

// Sums of dy and of dy * xhat per column, and of |dy| for float32.
template <class T>
inline void gradient_outer_sums(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Plan& plan = columns.plan();
  const int64_t per_set = plan.columns_per_set, sets = columns.sets_in_outer(), ahead = columns.lines_ahead();
  const Operand* const operands[2] = {&plan.x, &plan.dy};
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  bool all = !kMayOverflow<T>;
  for (int64_t set = 0; set < sets; ++set) space.done[set] = 0;
  if constexpr (!kMayOverflow<T>) {
    columns.template sum<2>(
        outer, operands, space.sums,
        [ahead](const ColumnSums& to, int64_t, int64_t lines, int64_t n, const Panel<T>& x, const Panel<T>& dy) {
          for_bands<T, 2>(lines, n, ahead, [&](int64_t first, int64_t band) {
            add_plainly(to, band, n, x.from(first), dy.from(first), ahead);
          });
        });
    for (int64_t set = 0; set < sets; ++set) {
      const Statistic& s = space.statistics[set];
      const bool plain = sums_plainly(s, columns.args().eps, columns.additions());
      for (int64_t c = set * per_set; c < (set + 1) * per_set; ++c) {
        const double difference = sums.second[c] - s.mean * sums.first[c];
        space.dy[c] = sums.first[c];
        space.dy_xhat[c] = difference * s.rstd;
        space.size[c] = static_cast<double>(sums.size[c]);
      }
      space.done[set] = plain;
      all = all && plain;
    }
  }
  if (all) return;
  double *mean = space.centre[0], *rstd = space.centre[1], *mean_lo = space.centre[2], *scale = space.centre[3];
  for (int64_t c = 0; c < columns.columns(); ++c) {
    const Statistic& s = space.statistics[c / per_set];
    mean[c] = s.mean;
    rstd[c] = s.rstd;
    mean_lo[c] = s.mean_lo;
    scale[c] = s.scale;
  }
  for (double* array : space.centre) repeat(columns.lines(), array);
  columns.template sum<2>(
      outer, operands, space.sums,
      [=](const ColumnSums& to, int64_t column, int64_t lines, int64_t n, const Panel<T>& x, const Panel<T>& dy) {
        const int64_t x_distance = ahead * x.stride * static_cast<int64_t>(sizeof(T));
        const int64_t dy_distance = ahead * dy.stride * static_cast<int64_t>(sizeof(T));
        add_in_trees<T>(to, lines, n, [&](auto place) {
          const auto of = [&](const double* array) { return place.template load<double>(array + column); };
          return [=, m = of(mean), lo = of(mean_lo), k = of(scale), r = of(rstd)](auto at, int64_t line) {
            const T *values = x.data + line * x.stride, *gradients = dy.data + line * dy.stride;
            prefetch(values + at.start, x_distance);
            prefetch(gradients + at.start, dy_distance);
            Pack<double> v = at.template load<double>(values);
            if constexpr (kMayOverflow<T>) v = v * k;
            v = v - m;
            if constexpr (kMayOverflow<T>) v = v - lo;
            const Pack<double> g = at.template load<double>(gradients);
            return PackPair{g, g * (v * r)};
          };
        });
      });
  for (int64_t c = 0; c < columns.columns(); ++c) {
    if (space.done[c / per_set] != 0) continue;
    space.dy[c] = sums.first[c];
    space.dy_xhat[c] = sums.second[c];
  }
}

inline Sum kept_sum(double hi, double lo) {
  Sum sum;
  sum.hi = hi;
  sum.lo = lo;
  return sum;
}

// The sums of one column. What float64 sums have lost is where they were added up.
template <class T>
inline Sum sum_of_dy(const Columns<T>& columns, const ColumnSpace<T>& space, int64_t c) {
  return kept_sum(space.dy[c], kMayOverflow<T> ? columns.sums_at(space.sums, 0).first_lo[c] : 0);
}
template <class T>
inline Sum sum_of_dy_xhat(const Columns<T>& columns, const ColumnSpace<T>& space, int64_t c) {
  return kept_sum(space.dy_xhat[c], kMayOverflow<T> ? columns.sums_at(space.sums, 0).second_lo[c] : 0);
}

// The means of each set, and what makes dx of them in each place.
template <class T>
inline void prepare_gradient(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const Lines& lines = columns.lines();
  const int64_t width = columns.plan().columns_per_set, param = columns.param(outer, 0),
                step = columns.plan().column_param;
  const double count = static_cast<double>(columns.rows() * width);
  const auto weight_of = [&](int64_t c) {
    return args.weight ? static_cast<double>(args.weight[param + c * step]) : 1;
  };
  for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
    const Statistic& s = space.statistics[set];
    Sum a, b;
    double size = 0;
    bool plain_weights = true;
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      const double weight = weight_of(c);
      if constexpr (kMayOverflow<T>) {
        a.add(weight * sum_of_dy(columns, space, c).value());
        b.add(weight * sum_of_dy_xhat(columns, space, c).value());
      } else {
        a.hi += weight * space.dy[c];
        b.hi += weight * space.dy_xhat[c];
        size += space.size[c];
      }
      plain_weights = plain_weights && moderate(weight);
    }
    const GradientMeans means = GradientMeans::of<T>(a, b, size, count, true, plain_weights, s);
    const bool plain = !args.constant_stats && (kMayOverflow<T> ? s.scale == 1 : means.in_float);
    space.mean_g[set] = means.a;
    space.mean_g_xhat[set] = means.b;
    const T mean = static_cast<T>(s.mean);
    const T mean_lo = static_cast<T>((s.mean - static_cast<double>(mean)) + s.mean_lo);
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      space.mean[c] = mean;
      space.mean_lo[c] = mean_lo;
      space.factor[c] = static_cast<T>(weight_of(c));
      space.a[c] = static_cast<T>(means.a);
      space.b[c] = static_cast<T>(kMayOverflow<T> ? means.b : means.b * s.rstd);
      space.rstd[c] = static_cast<T>(s.rstd);
      space.plain[c] = plain ? T(1) : T(0);
    }
  }
  for (T* array : {space.mean, space.mean_lo, space.factor, space.a, space.b, space.rstd}) repeat(lines, array);
  space.find_careful(lines);
}

// One value in double, whatever its set.
template <class T>
inline T input_gradient(const NormArgs<T>& args, const Statistic& s, double g, double a, double b, T x) {
  double scaled = s.rstd * g;  // through given statistics nothing else comes back
  if (!args.constant_stats) {
    const double xhat = ((static_cast<double>(x) * s.scale - s.mean) - s.mean_lo) * s.rstd;
    scaled = s.rstd * ((g - a) - xhat * b);
  }
  return static_cast<T>(scaled * s.scale);
}

template <class T>
inline void gradient_outer(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Plan& plan = columns.plan();
  const NormArgs<T>& args = columns.args();
  const int64_t per_set = plan.columns_per_set;
  columns.for_pieces_of(true, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
    const Lines& lines = columns.lines();
    Tile<T> x_tile(plan.x, lines, outer, column), dy_tile(plan.dy, lines, outer, column),
        dx_tile(plan.dx, lines, outer, column);
    columns.for_panels(chunk, column, width, [&](int64_t first, int64_t count, int64_t n) {
      const Panel<T> x = x_tile.read(first, count, n), dy = dy_tile.read(first, count, n),
                     dx = dx_tile.open(first, count, n);
      const int64_t x_distance = columns.lines_ahead() * x.stride * static_cast<int64_t>(sizeof(T));
      const int64_t dy_distance = columns.lines_ahead() * dy.stride * static_cast<int64_t>(sizeof(T));
      with_panel_store(args.past_cache, dx, [&](auto out) {
        for_bands<T, 2>(count, n, columns.lines_ahead(), [&](int64_t band, int64_t band_lines) {
          for_pack_groups<T>(n, [&](auto at, auto packs) {
            constexpr int kPacks = decltype(packs)::value;
            Pack<T> mean[kPacks], mean_lo[kPacks], weight[kPacks], a[kPacks], b[kPacks], rstd[kPacks];
            FASTNORM_UNROLL
            for (int k = 0; k < kPacks; ++k) {
              const int64_t place = column + k * kPack;
              mean[k] = at.template load<T>(space.mean + place);
              mean_lo[k] = at.template load<T>(space.mean_lo + place);
              weight[k] = at.template load<T>(space.factor + place);
              a[k] = at.template load<T>(space.a + place);
              b[k] = at.template load<T>(space.b + place);
              rstd[k] = at.template load<T>(space.rstd + place);
            }
            const auto result = [&](const T* values, const T* gradients, int k) {
              Pack<T> centred = (at.template load<T>(values + k * kPack) - mean[k]) - mean_lo[k];
              if constexpr (kMayOverflow<T>) centred = centred * rstd[k];  // folded with b it could overflow
              return rstd[k] * ((at.template load<T>(gradients + k * kPack) * weight[k] - a[k]) - centred * b[k]);
            };
            const T *values = x.from(band).data, *gradients = dy.from(band).data;
            T* to = dx.from(band).data;
            if (all_plain(space, column + at.start, kPacks)) {
              for (int64_t line = 0; line < band_lines; ++line) {
                FASTNORM_UNROLL
                for (int k = 0; k < kPacks; ++k) {
                  prefetch(values + at.start + k * kPack, x_distance);
                  prefetch(gradients + at.start + k * kPack, dy_distance);
                  out.store(at, to + k * kPack, result(values, gradients, k));
                }
                values += x.stride, gradients += dy.stride, to += dx.stride;
              }
              return;
            }
            for (int64_t line = 0; line < band_lines; ++line) {
              for (int k = 0; k < kPacks; ++k) {
                const int64_t group = k * kPack;
                const Pack<T> mended =
                    mend(at, result(values, gradients, k), space.plain + column + group, n - group, [&](int64_t lane) {
                      const int64_t i = group + at.start + lane, c = (column + i) % columns.columns(),
                                    set = c / per_set;
                      const double w = args.weight ? static_cast<double>(args.weight[columns.param(outer, c)]) : 1;
                      return input_gradient(args, space.statistics[set], static_cast<double>(gradients[i]) * w,
                                            space.mean_g[set], space.mean_g_xhat[set], values[i]);
                    });
                out.store(at, to + group, mended);
              }
              values += x.stride, gradients += dy.stride, to += dx.stride;
            }
          });
        });
      });
      dx_tile.commit(dx, first, count, n);
    });
  });
}

template <class T>
bool column_backward(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size_of(columns), width = columns.columns();
  const bool want_params = args.dweight || args.dbias;
  const Workspace<double> workspace(columns.groups() * size);
  // Sums of the outer indices of a group that share parameters; those with parameters of their own share none.
  bool owns = false;
  for (int axis = 0; axis < plan.set_param.rank; ++axis) owns = owns || plan.set_param.stride[axis] != 0;
  const int64_t own = owns ? plan.sets : columns.groups();
  const Workspace<SegmentSums> partial(want_params ? own * width : 0), totals(want_params ? plan.params : 0);
  if (!workspace || !partial || !totals) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
      space.statistics[set] = kept_column_statistic(columns, outer, set);
    }
    gradient_outer_sums(columns, outer, space);
    prepare_gradient(columns, outer, space);
    if (want_params) {
      SegmentSums* to = &partial[(owns ? outer : group) * width];
      for (int64_t c = 0; c < width; ++c) {
        to[c].dy.add(sum_of_dy(columns, space, c));
        to[c].dy_xhat.add(sum_of_dy_xhat(columns, space, c));
      }
    }
    gradient_outer(columns, outer, space);
  });
  reduce_parameter_gradients(
      plan, args, partial.data(), want_params ? own : 0, width, plan.column_param,
      [&](int64_t i) { return columns.param(owns ? i : 0, 0); }, totals.data());
  return true;
}

}  // namespace
}  // namespace fastnorm
