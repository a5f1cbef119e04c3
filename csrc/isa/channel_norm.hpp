// Backward where one weight serves a whole segment (channels first: batch, instance and group norm).
#pragma once

#include "isa/channel_batches.hpp"

namespace fastnorm {
namespace {

template <class T>
bool channel_backward(const Plan& plan, const NormArgs<T>& args) {
  const int64_t units = units_per_set(plan), chunks = chunks_per_segment(plan), segments = plan.segments;
  const int64_t run = shared_run<T>(plan, {&plan.x, &plan.dy, &plan.dx});
  const bool split = split_sets(plan), want_params = args.dweight || args.dbias;
  SegmentTable<T> sums(plan.sets * segments);
  const Workspace<SegmentSums> partial(split ? plan.sets * units : 0);
  SetTotals<T> dbias(want_params ? plan.params : 0), dweight(want_params ? plan.params : 0);
  if (!sums || !partial || !dbias || !dweight) return false;

  const auto statistic = [&](int64_t set) { return kept_statistic(plan, args, set); };
  const auto measure = [&](int64_t set, int64_t unit, const Statistic& s) {
    return segment_sums<T>(plan, run, set, unit, s);
  };
  const auto centre = [&](int64_t set, const Statistic& s) {
    if (!args.centred || args.constant_stats) return;
    sums.centre(set * segments, segments, static_cast<double>(plan.set_size()), s.rstd);
  };
  const auto gradient = [&](int64_t set, int64_t first_unit, int64_t end_unit, Statistic s) {
    if (args.centred && !args.constant_stats) s.mean_lo += sums.rest_of_mean(set * segments);
    const GradientMeans means = channel_means(plan, args, set, s, sums);
    for (int64_t unit = first_unit; unit < end_unit; ++unit) {
      channel_unit_gradient(plan, args, run, set, unit, s, means);
    }
  };

  if (split) {
    parallel_for(plan.threads, plan.sets * units,
                 [&](int64_t i) { partial[i] = measure(i / units, i % units, statistic(i / units)); });
    for (int64_t i = 0; i < plan.sets * segments; ++i) {
      SegmentSums total;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total.add(partial[i * chunks + chunk]);
      sums.put(i, total);
    }
    for (int64_t set = 0; set < plan.sets; ++set) centre(set, statistic(set));
    for_results(plan, args, plan.sets * units,
                [&](int64_t i) { gradient(i / units, i % units, i % units + 1, statistic(i / units)); });
  } else {
    for_set_groups(plan, args, [&](int64_t begin, int64_t end) {
      if (ChannelBatches<T>::suit(plan, run) && !args.constant_stats) {
        return ChannelBatches<T>(plan, args, run, sums).backward(begin, end);
      }
      for (int64_t set = begin; set < end; ++set) {
        const Statistic s = statistic(set);
        for (int64_t segment = 0; segment < segments; ++segment) {
          SegmentSums total;
          for (int64_t chunk = 0; chunk < chunks; ++chunk) total.add(measure(set, segment * chunks + chunk, s));
          sums.put(set * segments + segment, total);
        }
        centre(set, s);
        gradient(set, 0, units, s);
      }
    });
  }
  // Sets along the innermost axis have neighbouring parameters, or the same: a row of either is added at once.
  const Walk& param = plan.set_param;
  const int64_t row = param.rank > 0 && param.stride[param.rank - 1] == segments ? param.inner_size() : 1;
  if (want_params) {
    reduce_parameter_gradients(
        plan, args, sums, plan.sets / row, row * segments, [&](int64_t i) { return param.offset(i * row); }, dbias,
        dweight);
  }
  return true;
}

}  // namespace
}  // namespace fastnorm
