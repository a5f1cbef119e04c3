// Backward where the weights run along the set (layer norm, RMS norm, group norm with channels last). The gradients of
// the parameters are sums over sets: each group of kSetsPerGroup sets adds into rows of its own, and those are added in
// order, so that the cut depends on the shape alone.
#pragma once

#include "isa/channel_norm.hpp"

namespace fastnorm {
namespace {

// Sets in a chain of additions: float64 has no digits to spare, float32 data are summed in double.
template <class T>
constexpr int64_t kSetsPerGroup = kMayOverflow<T> ? 16 : 64;

template <class T>
inline SegmentSums row_unit_sums(const Plan& plan, const NormArgs<T>& args, int64_t set, int64_t unit,
                                 const Statistic& s) {
  Buffers<T> buffers;
  const T* weight = args.weight ? args.weight + plan.set_param.offset(set) : nullptr;
  const Port<T> x = port<T>(plan.x, set, 0), dy = port<T>(plan.dy, set, 0);
  SegmentSums total;
  for_unit_blocks(plan, unit, [&](int64_t start, int64_t n) {
    const T* values = x.read(start, n, buffers.x);
    const T* g = dy.read(start, n, buffers.dy);
    with_each(element_params(weight, plan.params_per_set, start, n, buffers.weight), 1, [&](auto each_weight) {
      const Pair sums = gradient_sums(values, g, n, s, each_weight);
      total.dy.add(sums.first);
      total.dy_xhat.add(sums.second);
    });
  });
  return total;
}

// dx of one unit, and its part of the parameters' gradients: `totals` (nullptr: not wanted) points at the set's first
// parameter in rows as add_repeated_gradients has them.
template <class T>
inline void row_unit_gradient(const Plan& plan, const NormArgs<T>& args, int64_t set, int64_t unit, const Statistic& s,
                              double a, double b, double* totals) {
  Buffers<T> buffers;
  const int64_t period = plan.params_per_set;
  const T* weight = args.weight ? args.weight + plan.set_param.offset(set) : nullptr;
  const Port<T> x = port<T>(plan.x, set, 0), dy = port<T>(plan.dy, set, 0), dx = port<T>(plan.dx, set, 0);
  for_unit_blocks(plan, unit, [&](int64_t start, int64_t n) {
    const T* values = x.read(start, n, buffers.x);
    const T* g = dy.read(start, n, buffers.dy);
    if (totals) {
      const int64_t phase = start % period;
      if (plan.elements == period) {
        add_parameter_gradients(values, g, n, s, totals + phase, totals + plan.params + phase);
      } else {
        add_repeated_gradients(values, g, n, period, phase, s, totals, plan.params);
      }
    }
    T* to = dx.open(start, n, buffers.out);
    with_each(element_params(weight, period, start, n, buffers.weight), 1,
              [&](auto each_weight) { input_gradient(values, g, to, n, s, each_weight, a, b); });
    dx.commit(start, n, buffers.out, to);
  });
}

template <class T>
bool row_backward(const Plan& plan, const NormArgs<T>& args) {
  const int64_t units = units_per_set(plan), params = plan.params;
  const bool want_params = args.dweight || args.dbias;
  // Where the parameters repeat along a set, a group is one sample: it has additions enough.
  const bool repeats = plan.elements > plan.params_per_set;
  const int64_t per_group = (repeats ? 1 : kSetsPerGroup<T>)*(params / plan.params_per_set);
  const int64_t rows = repeats ? 4 : 2;  // of numbers per group: sums, and what they have lost to rounding
  const int64_t groups = (plan.sets + per_group - 1) / per_group;
  // Units of a set may go to different threads only if they share no parameters: a sum's order is fixed.
  const bool split = plan.threads > 1 && groups < 2 * plan.threads && units > 1 && !(repeats && want_params);
  const Workspace<double> partial(want_params ? groups * rows * params : 0);
  const Workspace<SegmentSums> sums(split ? plan.sets * units : 0);
  if (!partial || !sums) return false;

  const auto statistic = [&](int64_t set) { return kept_statistic(plan, args, set); };
  const double count = static_cast<double>(plan.set_size());
  const auto gradient = [&](int64_t set, int64_t first_unit, int64_t end_unit, const SegmentSums& total,
                            const Statistic& s) {
    const double a = args.centred ? total.dy.value() / count : 0, b = total.dy_xhat.value() / count;
    double* totals = want_params ? &partial[set / per_group * rows * params + plan.set_param.offset(set)] : nullptr;
    for (int64_t unit = first_unit; unit < end_unit; ++unit) row_unit_gradient(plan, args, set, unit, s, a, b, totals);
  };

  if (split) {
    // Few sets, long ones: first all sums, then every unit (a range of parameters) walks over the sets.
    parallel_for(plan.threads, plan.sets * units,
                 [&](int64_t i) { sums[i] = row_unit_sums(plan, args, i / units, i % units, statistic(i / units)); });
    for (int64_t set = 0; set < plan.sets; ++set) {
      for (int64_t unit = 1; unit < units; ++unit) sums[set * units].add(sums[set * units + unit]);
    }
    parallel_for(plan.threads, units, [&](int64_t unit) {
      for (int64_t set = 0; set < plan.sets; ++set) gradient(set, unit, unit + 1, sums[set * units], statistic(set));
    });
    if (args.finished) args.finished(args.context, 0, plan.sets);
  } else {
    parallel_for(plan.threads, groups, [&](int64_t group) {
      const int64_t end = (group + 1) * per_group < plan.sets ? (group + 1) * per_group : plan.sets;
      int64_t unfinished = group * per_group;
      for (int64_t set = group * per_group; set < end; ++set) {
        const Statistic s = statistic(set);
        SegmentSums total;
        for (int64_t unit = 0; unit < units; ++unit) total.add(row_unit_sums(plan, args, set, unit, s));
        gradient(set, 0, units, total, s);
        if (args.finished && (set + 1 == end || set + 1 - unfinished >= args.sets_at_once)) {
          args.finished(args.context, unfinished, set + 1);
          unfinished = set + 1;
        }
      }
    });
  }

  if (want_params) {
    constexpr int64_t kStrip = 1024;
    parallel_for(plan.threads, (params + kStrip - 1) / kStrip, [&](int64_t strip) {
      for (int64_t p = strip * kStrip; p < params && p < (strip + 1) * kStrip; ++p) {
        Sum dweight, dbias;
        for (int64_t group = 0; group < groups; ++group) {
          const double* totals = &partial[group * rows * params + p];
          dweight.add({totals[0], repeats ? totals[2 * params] : 0});
          dbias.add({totals[params], repeats ? totals[3 * params] : 0});
        }
        if (args.dweight) args.dweight[p] = static_cast<T>(dweight.value());
        if (args.dbias) args.dbias[p] = static_cast<T>(dbias.value());
      }
    });
  }
  return true;
}

}  // namespace
}  // namespace fastnorm
