// Forward of the two families whose sets lie along memory: Family::channel (one weight per segment) and Family::row (a
// weight per element). What units of work compute is merged in an order of its own, so the bits do not depend on
// threads.
#pragma once

#include "isa/double_batches.hpp"
#include "isa/group_batches.hpp"
#include "parallel.hpp"

namespace fastnorm {
namespace {

// Bytes of sets that a thread takes at a time, at least.
constexpr int64_t kGroupBytes = 32 << 10;

// A weight and a bias per element, copied to the start of a line of the cache, or to where they lie in their lines as
// results do that are written in whole lines: packs that straddle two lines take twice as long (layer norm of float32
// rows of 100 values: 78 us to 71, rms norm: 70 to 62).
template <class T>
class AlignedParameters {
 public:
  AlignedParameters(const Plan& plan, const NormArgs<T>& args)
      : room_(whole_packs(plan.elements) + 2 * kPack), copies_(2 * room_), args_(args) {
    if (!copies_) return;  // slower, as right
    if (args.weight) args_.weight = copy(args.weight, copies_.data(), plan);
    if (args.bias) args_.bias = copy(args.bias, copies_.data() + room_, plan);
  }
  const NormArgs<T>& args() const { return args_; }

  // Few rows are not worth it, nor are parameters that leave no room in the nearest caches.
  static bool wanted(const Plan& plan, const NormArgs<T>& args) {
    constexpr int64_t kLeastRows = 16, kMostElements = 4096;
    const bool in_registers = kMayOverflow<T> && is_short_run(plan.elements) && !args.past_cache;
    return plan.family == Family::row && (args.weight || args.bias) && plan.sets >= kLeastRows && !in_registers &&
           plan.elements <= kMostElements && plan.params == plan.elements;
  }

 private:
  const T* copy(const T* values, T* room, const Plan& plan) const {
    const bool whole_lines = args_.past_cache || (kMayOverflow<T> && in_whole_lines(plan, true));
    T* const to = whole_lines ? in_lines_of(room, plan.y.data) : aligned(room);
    std::memcpy(to, values, static_cast<size_t>(plan.elements) * sizeof(T));
    return to;
  }

  const int64_t room_;
  const Workspace<T> copies_;
  NormArgs<T> args_;
};

// Forward of sets [begin, end).
template <class T>
inline void forward_sets(const Plan& plan, const NormArgs<T>& args, int64_t run, int64_t begin, int64_t end) {
  if (begin == end) return;  // a first set is what they begin with
  if constexpr (kMayOverflow<T>) {
    if (DoubleBatches::suit(plan, run)) return DoubleBatches(plan, args, run).forward(begin, end);
  } else {
    if (SetBatches::suit(plan, run)) return SetBatches(plan, args, run).forward(begin, end);
    if (GroupBatches::suit(plan, run)) return GroupBatches(plan, args, run).forward(begin, end);
  }
  for (int64_t set = begin; set < end; ++set) {
    const Statistic s = measure_set(plan, args, run, set);
    for (int64_t unit = 0; unit < units_per_set(plan); ++unit) normalise_unit(plan, args, run, set, unit, s);
  }
}

// Sets that a thread takes together.
template <class T>
inline int64_t sets_per_group(const Plan& plan) {
  const int64_t bytes = plan.set_size() * static_cast<int64_t>(sizeof(T));
  return bytes < kGroupBytes ? kGroupBytes / bytes : 1;
}

// body(i) in parallel, for loops that write results.
template <class T, class Body>
inline void for_results(const Plan& plan, const NormArgs<T>& args, int64_t count, const Body& body) {
  parallel_for(plan.threads, count, [&](int64_t i) {
    body(i);
    if (args.past_cache) finish_stores();
  });
}

// call(begin, end) over pieces of the plan's sets, whole groups each, in parallel.
template <class T, class Call>
inline void for_set_groups(const Plan& plan, const NormArgs<T>& args, const Call& call) {
  const int64_t size = sets_per_group<T>(plan);
  parallel_pieces(plan.threads, (plan.sets + size - 1) / size, [&](int64_t begin, int64_t end) {
    call(begin * size, end * size < plan.sets ? end * size : plan.sets);
    if (args.past_cache) finish_stores();
  });
}

// The statistics of all sets, where there are so few that threads share them. False: no memory.
template <class T, class Finish>
inline bool measure_split(const Plan& plan, const NormArgs<T>& args, int64_t run, const Finish& finish) {
  if constexpr (kMayOverflow<T>) {
    const int64_t chunks = moment_chunks(plan);
    const Workspace<Moments> partial(plan.sets * chunks);
    if (!partial) return false;
    parallel_for(plan.threads, plan.sets * chunks,
                 [&](int64_t i) { partial[i] = measure_chunk(plan, i / chunks, i % chunks, args.centred); });
    for (int64_t set = 0; set < plan.sets; ++set) {
      Moments moments = merge_tree<true>(0, chunks, [&](int64_t i) { return partial[set * chunks + i]; });
      finish(set, finish_set(plan, args, set, moments));
    }
  } else {
    const int64_t units = measured_units(plan);
    const Workspace<PlainTotals> partial(plan.sets * units);
    if (!partial) return false;
    parallel_for(plan.threads, plan.sets * units,
                 [&](int64_t i) { partial[i] = plain_totals(plan, run, i / units, i % units); });
    for (int64_t set = 0; set < plan.sets; ++set) {
      PlainTotals totals;
      for (int64_t i = 0; i < units; ++i) totals.add(partial[set * units + i]);
      finish(set, finish_plain(plan, args, set, totals));
    }
  }
  return true;
}

template <class T>
bool forward_all_sets(const Plan& plan, const NormArgs<T>& args) {
  const int64_t run = shared_run<T>(plan, {&plan.x, &plan.y}), units = units_per_set(plan);
  if (!split_sets(plan)) {
    for_set_groups(plan, args, [&](int64_t begin, int64_t end) { forward_sets(plan, args, run, begin, end); });
    return true;
  }
  const Workspace<Statistic> statistics(plan.sets);
  if (!statistics) return false;
  if (!measure_split(plan, args, run, [&](int64_t set, const Statistic& s) { statistics[set] = s; })) return false;
  for_results(plan, args, plan.sets * units,
              [&](int64_t i) { normalise_unit(plan, args, run, i / units, i % units, statistics[i / units]); });
  return true;
}

template <class T>
bool set_forward(const Plan& plan, const NormArgs<T>& args) {
  if (!AlignedParameters<T>::wanted(plan, args)) return forward_all_sets(plan, args);
  const AlignedParameters<T> parameters(plan, args);
  return forward_all_sets(plan, parameters.args());
}

template <class T>
bool set_apply(const Plan& plan, const NormArgs<T>& args) {
  const int64_t run = shared_run<T>(plan, {&plan.x, &plan.y}), units = units_per_set(plan);
  if constexpr (!kMayOverflow<T>) {
    if (SetBatches::in_place(plan, run) && SetBatches(plan, args, run).apply_suits()) {
      SetBatches(plan, args, run).apply();
      return true;
    }
  }
  for_results(plan, args, plan.sets * units, [&](int64_t i) {
    normalise_unit(plan, args, run, i / units, i % units, given_statistic(args, plan.set_stat.offset(i / units)));
  });
  return true;
}

// Moments for their own sake are measured the long way: they are asked for to full precision.
template <class T>
bool set_only_moments(const Plan& plan, const NormArgs<T>& args) {
  const int64_t chunks = moment_chunks(plan);
  const auto finish = [&](int64_t set, Moments& moments) {
    finish_set(plan, args, set, moments);
    args.var[plan.set_stat.offset(set)] *= moments.count;
  };
  if (!split_sets(plan) || chunks == 1) {
    parallel_for(plan.threads, plan.sets, [&](int64_t set) {
      Moments moments = set_moments<T>(plan, set, true, 1);
      finish(set, moments);
    });
    return true;
  }
  const Workspace<Moments> partial(plan.sets * chunks);
  if (!partial) return false;
  parallel_for(plan.threads, plan.sets * chunks,
               [&](int64_t i) { partial[i] = chunk_moments<T>(plan, i / chunks, i % chunks, true, 1); });
  for (int64_t set = 0; set < plan.sets; ++set) {
    Moments moments = merge_tree<kMayOverflow<T>>(0, chunks, [&](int64_t i) { return partial[set * chunks + i]; });
    finish(set, moments);
  }
  return true;
}

}  // namespace
}  // namespace fastnorm
