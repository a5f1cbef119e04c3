// Backward where one weight serves a whole segment (channels first: batch, instance and group norm). Per segment the
// two sums of dy and dy * xhat give everything: weighted they are the set's a and b, plain they are dbias and dweight.
#pragma once

#include "isa/set_norm.hpp"

namespace fastnorm {
namespace {

struct SegmentSums {
  Sum dy, dy_xhat;
  void add(const SegmentSums& other) {
    dy.add(other.dy);
    dy_xhat.add(other.dy_xhat);
  }
};

template <class T>
inline SegmentSums channel_unit_sums(const Plan& plan, int64_t set, int64_t unit, const Statistic& s) {
  Buffers<T> buffers;
  const int64_t segment = segment_of(plan, unit);
  const Port<T> x = port<T>(plan.x, set, segment), dy = port<T>(plan.dy, set, segment);
  SegmentSums total;
  for_unit_blocks(plan, unit, [&](int64_t start, int64_t n) {
    const Pair sums = gradient_sums(x.read(start, n, buffers.x), dy.read(start, n, buffers.dy), n, s, Same{1});
    total.dy.add(sums.first);
    total.dy_xhat.add(sums.second);
  });
  return total;
}

template <class T>
inline void channel_unit_gradient(const Plan& plan, const NormArgs<T>& args, int64_t set, int64_t unit,
                                  const Statistic& s, double a, double b) {
  Buffers<T> buffers;
  const int64_t segment = segment_of(plan, unit);
  const Same weight{args.weight ? static_cast<double>(args.weight[plan.set_param.offset(set) + segment]) : 1};
  const Port<T> x = port<T>(plan.x, set, segment), dy = port<T>(plan.dy, set, segment),
                dx = port<T>(plan.dx, set, segment);
  for_unit_blocks(plan, unit, [&](int64_t start, int64_t n) {
    const T* g = dy.read(start, n, buffers.dy);
    T* to = dx.open(start, n, buffers.out);
    if (args.constant_stats) {
      input_gradient_constant(g, to, n, s, weight);
    } else {
      input_gradient(x.read(start, n, buffers.x), g, to, n, s, weight, a, b);
    }
    dx.commit(start, n, buffers.out, to);
  });
}

// Parameter gradients from per-segment sums, merged over the sets that share a parameter, in set order. The i-th of
// `count` sums is sums(i) and belongs to parameter param(i).
template <class T, class Sums, class Param>
inline bool reduce_parameter_gradients(const Plan& plan, const NormArgs<T>& args, int64_t count, const Sums& sums,
                                       const Param& param) {
  if (!args.dweight && !args.dbias) return true;
  const Workspace<SegmentSums> totals(plan.params);
  if (!totals) return false;
  for (int64_t i = 0; i < count; ++i) totals[param(i)].add(sums(i));
  for (int64_t p = 0; p < plan.params; ++p) {
    if (args.dweight) args.dweight[p] = static_cast<T>(totals[p].dy_xhat.value());
    if (args.dbias) args.dbias[p] = static_cast<T>(totals[p].dy.value());
  }
  return true;
}

template <class T>
bool channel_backward(const Plan& plan, const NormArgs<T>& args) {
  const int64_t units = units_per_set(plan), chunks = chunks_per_segment(plan), segments = plan.segments;
  const bool split = split_sets(plan);
  const Workspace<SegmentSums> sums(plan.sets * segments), partial(split ? plan.sets * units : 0);
  if (!sums || !partial) return false;

  const auto statistic = [&](int64_t set) { return kept_statistic(plan, args, set); };
  const auto gradient = [&](int64_t set, int64_t first_unit, int64_t end_unit) {
    const Statistic s = statistic(set);
    const int64_t param = plan.set_param.offset(set);
    Sum a, b;
    for (int64_t segment = 0; segment < segments; ++segment) {
      const double weight = args.weight ? static_cast<double>(args.weight[param + segment]) : 1;
      a.add(weight * sums[set * segments + segment].dy.value());
      b.add(weight * sums[set * segments + segment].dy_xhat.value());
    }
    const double count = static_cast<double>(plan.set_size());
    const double mean_a = args.centred ? a.value() / count : 0, mean_b = b.value() / count;
    for (int64_t unit = first_unit; unit < end_unit; ++unit)
      channel_unit_gradient(plan, args, set, unit, s, mean_a, mean_b);
  };

  if (split) {
    parallel_for(plan.threads, plan.sets * units, [&](int64_t i) {
      partial[i] = channel_unit_sums<T>(plan, i / units, i % units, statistic(i / units));
    });
    for (int64_t i = 0; i < plan.sets * units; ++i) sums[i / chunks].add(partial[i]);
    parallel_for(plan.threads, plan.sets * units, [&](int64_t i) { gradient(i / units, i % units, i % units + 1); });
  } else {
    parallel_for(plan.threads, plan.sets, [&](int64_t set) {
      const Statistic s = statistic(set);
      for (int64_t unit = 0; unit < units; ++unit) {
        sums[set * segments + unit / chunks].add(channel_unit_sums<T>(plan, set, unit, s));
      }
      gradient(set, 0, units);
    });
  }
  return reduce_parameter_gradients(
      plan, args, plan.sets * segments, [&](int64_t i) { return sums[i]; },
      [&](int64_t i) { return plan.set_param.offset(i / segments) + i % segments; });
}

}  // namespace
}  // namespace fastnorm
