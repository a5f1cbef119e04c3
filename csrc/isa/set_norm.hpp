// Forward of the two families whose sets lie along memory: Family::channel (one weight per segment) and Family::row (a
// weight per element). A set is cut into units, segments x chunks of kChunkBlocks blocks, which threads may share; what
// they compute is merged in an order of its own (set_moments.hpp), so the bits do not depend on threads.
#pragma once

#include "isa/segment.hpp"
#include "isa/set_moments.hpp"
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
  const int64_t chunks = moment_chunks(plan);
  if (!split_sets(plan) || chunks == 1) {
    parallel_for(plan.threads, plan.sets, [&](int64_t set) {
      Moments moments = set_moments<T>(plan, set, centred, 1);
      finish(set, moments);
    });
    return true;
  }
  const Workspace<Moments> partial(plan.sets * chunks);
  if (!partial) return false;
  parallel_for(plan.threads, plan.sets * chunks,
               [&](int64_t i) { partial[i] = chunk_moments<T>(plan, i / chunks, i % chunks, centred, 1); });
  parallel_for(plan.threads, plan.sets, [&](int64_t set) {
    Moments moments = merge_tree<kMayOverflow<T>>(0, chunks, [&](int64_t i) { return partial[set * chunks + i]; });
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
bool set_apply(const Plan& plan, const NormArgs<T>& args) {
  const int64_t units = units_per_set(plan);
  parallel_for(plan.threads, plan.sets * units, [&](int64_t i) {
    normalise_unit(plan, args, i / units, i % units, given_statistic(args, plan.set_stat.offset(i / units)));
  });
  return true;
}

}  // namespace
}  // namespace fastnorm
