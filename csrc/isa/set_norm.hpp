// Statistics and forward of the two families whose sets lie along memory: Family::channel (one weight per segment) and
// Family::row (a weight per element). A set is cut into units, segments x chunks of kChunkBlocks blocks; its moments
// are the units' moments merged in order, whoever computed them, so the bits do not depend on threads.
#pragma once

#include <cmath>

#include "isa/segment.hpp"
#include "isa/walk_io.hpp"
#include "parallel.hpp"

namespace fastnorm {
namespace {

template <class T>
struct Buffers {
  alignas(64) T x[kBlock], dy[kBlock], out[kBlock], weight[kBlock], bias[kBlock];
};

inline int64_t chunks_per_segment(const Plan& plan) { return (plan.blocks.count + kChunkBlocks - 1) / kChunkBlocks; }
inline int64_t units_per_set(const Plan& plan) { return plan.segments * chunks_per_segment(plan); }

// Work goes to threads set by set (a set's second reading then comes from cache) unless there are too few sets for
// that.
inline bool split_sets(const Plan& plan) {
  return plan.threads > 1 && plan.sets < 2 * plan.threads && units_per_set(plan) > 1;
}

// visit(block) for the blocks of one unit.
template <class Visit>
inline void for_unit_blocks(const Plan& plan, int64_t unit, const Visit& visit) {
  const int64_t first = unit % chunks_per_segment(plan) * kChunkBlocks;
  const int64_t end = first + kChunkBlocks < plan.blocks.count ? first + kChunkBlocks : plan.blocks.count;
  for (int64_t block = first; block < end; ++block) visit(plan.blocks.start(block), plan.blocks.size(block));
}

inline int64_t segment_of(const Plan& plan, int64_t unit) { return unit / chunks_per_segment(plan); }

template <class T>
inline Port<T> port(const Operand& operand, int64_t set, int64_t segment) {
  return Port<T>(operand.data + operand.set.offset(set) + operand.segment.offset(segment), operand.element,
                 operand.aligned);
}

template <class T>
inline Moments unit_moments(const Plan& plan, int64_t set, int64_t unit, bool centred, double scale) {
  alignas(64) T buffer[kBlock];
  const Port<T> x = port<T>(plan.x, set, segment_of(plan, unit));
  Moments total;
  for_unit_blocks(plan, unit, [&](int64_t start, int64_t n) {
    const T* values = x.read(start, n, buffer);
    total.merge<kMayOverflow<T>>(centred ? block_moments(values, n, scale) : block_squares(values, n, scale));
  });
  return total;
}

template <class T>
inline Moments set_moments(const Plan& plan, int64_t set, bool centred, double scale) {
  Moments total;
  for (int64_t unit = 0; unit < units_per_set(plan); ++unit) {
    total.merge<kMayOverflow<T>>(unit_moments<T>(plan, set, unit, centred, scale));
  }
  return total;
}

// The power of two that brings a set's largest magnitude near 1, within what squares and eps can bear; 0 if not all
// finite.
template <class T>
inline double scale_of_set(const Plan& plan, int64_t set) {
  alignas(64) T buffer[kBlock];
  double largest = 0;
  bool finite = true;
  for (int64_t unit = 0; unit < units_per_set(plan); ++unit) {
    const Port<T> x = port<T>(plan.x, set, segment_of(plan, unit));
    for_unit_blocks(plan, unit, [&](int64_t start, int64_t n) {
      const T* values = x.read(start, n, buffer);
      for (int64_t i = 0; i < n; ++i) {
        const double magnitude = std::fabs(static_cast<double>(values[i]));
        finite = finite && magnitude <= 0x1.fffffffffffffp1023;
        largest = magnitude > largest ? magnitude : largest;
      }
    });
  }
  if (!finite) return 0;
  if (largest == 0) return 1;
  const int exponent = std::ilogb(largest);
  return std::ldexp(1.0, exponent > 960 ? -960 : exponent < -900 ? 900 : -exponent);
}

// A set's statistic from its moments; float64 sets that overflow or underflow are measured again, scaled (rare, so
// free).
template <class T>
inline Statistic set_statistic(const Plan& plan, int64_t set, const NormArgs<T>& args, Moments& moments) {
  double scale = 1;
  if (needs_scale<T>(moments, args.eps)) {
    const double better = scale_of_set<T>(plan, set);
    if (better != 0 && better != 1) {
      scale = better;
      moments = set_moments<T>(plan, set, args.centred, scale);
    }
  }
  return statistic_of(moments, args.eps, scale);
}

// The weights of elements [start, start + n) of a set in Family::row: in place, or repeated into a buffer.
template <class T>
inline const T* element_params(const T* params, int64_t period, int64_t start, int64_t n, T* buffer) {
  if (params == nullptr) return nullptr;
  const int64_t phase = start % period;
  if (phase + n <= period) return params + phase;
  for (int64_t i = 0, j = phase; i < n; ++i, j = j + 1 == period ? 0 : j + 1) buffer[i] = params[j];
  return buffer;
}

// call(weight) with weight as Each or, where there is none, as Same{otherwise}.
template <class T, class Call>
inline void with_each(const T* values, double otherwise, const Call& call) {
  if (values) {
    call(Each<T>{values});
  } else {
    call(Same{otherwise});
  }
}

template <class T>
inline void normalise_unit(const Plan& plan, const NormArgs<T>& args, int64_t set, int64_t unit, const Statistic& s) {
  Buffers<T> buffers;
  const int64_t segment = segment_of(plan, unit);
  const int64_t param = plan.set_param.offset(set) + segment;
  const T* weight = args.weight ? args.weight + param : nullptr;
  const T* bias = args.bias ? args.bias + param : nullptr;
  const Port<T> x = port<T>(plan.x, set, segment), y = port<T>(plan.y, set, segment);
  for_unit_blocks(plan, unit, [&](int64_t start, int64_t n) {
    const T* from = x.read(start, n, buffers.x);
    T* to = y.open(start, n, buffers.out);
    if (plan.family == Family::channel) {
      normalise(from, to, n, s, Same{weight ? static_cast<double>(*weight) : 1},
                Same{bias ? static_cast<double>(*bias) : 0});
    } else {
      const T* w = element_params(weight, plan.params_per_set, start, n, buffers.weight);
      const T* b = element_params(bias, plan.params_per_set, start, n, buffers.bias);
      with_each(w, 1, [&](auto each_weight) {
        with_each(b, 0, [&](auto each_bias) { normalise(from, to, n, s, each_weight, each_bias); });
      });
    }
    y.commit(start, n, buffers.out, to);
  });
}

// Moments of every set: finish(set, moments) runs once per set, in parallel.
template <class T, class Finish>
inline bool for_set_moments(const Plan& plan, bool centred, const Finish& finish) {
  if (!split_sets(plan)) {
    parallel_for(plan.threads, plan.sets, [&](int64_t set) {
      Moments moments = set_moments<T>(plan, set, centred, 1);
      finish(set, moments);
    });
    return true;
  }
  const int64_t units = units_per_set(plan);
  const Workspace<Moments> partial(plan.sets * units);
  if (!partial) return false;
  parallel_for(plan.threads, plan.sets * units,
               [&](int64_t i) { partial[i] = unit_moments<T>(plan, i / units, i % units, centred, 1); });
  parallel_for(plan.threads, plan.sets, [&](int64_t set) {
    Moments moments;
    for (int64_t unit = 0; unit < units; ++unit) moments.merge<kMayOverflow<T>>(partial[set * units + unit]);
    finish(set, moments);
  });
  return true;
}

template <class T>
bool set_only_moments(const Plan& plan, const NormArgs<T>& args) {
  return for_set_moments<T>(plan, true, [&](int64_t set, Moments& moments) {
    const Statistic s = set_statistic(plan, set, args, moments);
    const int64_t stat = plan.set_stat.offset(set);
    store_statistic(args, stat, moments, s);
    args.var[stat] *= moments.count;
  });
}

template <class T>
bool set_forward(const Plan& plan, const NormArgs<T>& args) {
  const int64_t units = units_per_set(plan);
  const bool split = split_sets(plan);
  const Workspace<Statistic> statistics(split ? plan.sets : 0);
  if (!statistics) return false;
  const bool done = for_set_moments<T>(plan, args.centred, [&](int64_t set, Moments& moments) {
    const Statistic s = set_statistic(plan, set, args, moments);
    store_statistic(args, plan.set_stat.offset(set), moments, s);
    if (split) {
      statistics[set] = s;
    } else {
      for (int64_t unit = 0; unit < units; ++unit) normalise_unit(plan, args, set, unit, s);
    }
  });
  if (done && split) {
    parallel_for(plan.threads, plan.sets * units,
                 [&](int64_t i) { normalise_unit(plan, args, i / units, i % units, statistics[i / units]); });
  }
  return done;
}

template <class T>
inline Statistic given_statistic(const NormArgs<T>& args, int64_t stat) {
  return statistic_from<T>(args.mean ? args.mean[stat] : 0, args.mean_lo ? args.mean_lo[stat] : 0, args.rstd[stat]);
}

// The statistic a forward left for its backward; measured again where float64 could not hold it.
template <class T>
inline Statistic kept_statistic(const Plan& plan, const NormArgs<T>& args, int64_t set) {
  const int64_t stat = plan.set_stat.offset(set);
  if (args.constant_stats || !lost<T>(args.rstd[stat])) return given_statistic(args, stat);
  Moments moments = set_moments<T>(plan, set, args.centred, 1);
  return set_statistic(plan, set, args, moments);
}

template <class T>
bool set_apply(const Plan& plan, const NormArgs<T>& args) {
  const int64_t units = units_per_set(plan);
  parallel_for(plan.threads, plan.sets * units, [&](int64_t i) {
    normalise_unit(plan, args, i / units, i % units, given_statistic(args, plan.set_stat.offset(i / units)));
  });
  return true;
}

}  // namespace
}  // namespace fastnorm
