// Forward of the two families whose sets lie along memory: Family::channel (one weight per segment) and Family::row (a
// weight per element). What units of work compute is merged in an order of its own, so the bits do not depend on
// threads.
#pragma once

#include <utility>

#include "isa/runs.hpp"
#include "isa/segment.hpp"
#include "isa/set_moments.hpp"
#include "parallel.hpp"

namespace fastnorm {
namespace {

// Sets up to this size are measured in one go, whatever their segments, and stay in the nearest caches.
constexpr int64_t kSmallSet = kBlock * kChunkBlocks;
// Sets up to this size are measured while the one before is normalised: arithmetic of the one hides memory of the
// other.
constexpr int64_t kPairedBytes = 512 << 10;
// Values of the sets of a batch: as many as leave room in the nearest cache for the next batch and for the results.
constexpr int64_t kBatchElements = 4096;
// Bytes of sets that a thread takes at a time.
constexpr int64_t kGroupBytes = 64 << 10;

// call(normalise) with the formula for elements from `first` on of a segment whose first parameter is `param`.
template <class T, class C, class Call>
inline void with_normalise(const Plan& plan, const NormArgs<T>& args, const Statistic& s, int64_t param, int64_t first,
                           const Call& call) {
  const T* weight = args.weight ? args.weight + param : nullptr;
  const T* bias = args.bias ? args.bias + param : nullptr;
  const auto make = [&](double factor, auto w, auto b) {
    call(Normalise<T, C, decltype(w), decltype(b)>(s, factor, w, b));
  };
  if (plan.family == Family::channel) {
    // rstd * weight as one factor saves a rounding; where it would overflow, one after the other.
    const double w = weight ? static_cast<double>(*weight) : 1, factor = s.rstd * w;
    const Same<C> b(bias ? static_cast<double>(*bias) : 0);
    if (kMayOverflow<T> && !(factor == 0 || (std::fabs(factor) > 0x1p-1000 && std::fabs(factor) < 0x1p1000))) {
      make(s.rstd, Same<C>(w), b);
    } else {
      make(factor, None{}, b);
    }
  } else if (weight && bias) {
    make(s.rstd, Each<T>{weight + first}, Each<T>{bias + first});
  } else if (weight) {
    make(s.rstd, Each<T>{weight + first}, None{});
  } else if (bias) {
    make(s.rstd, None{}, Each<T>{bias + first});
  } else {
    make(s.rstd, None{}, None{});
  }
}

// May this segment be computed in float32?
template <class T>
inline bool in_float(const Plan& plan, const NormArgs<T>& args, const Statistic& s, int64_t param) {
  if (kMayOverflow<T> || !fits(s)) return false;
  return plan.family == Family::row || !args.weight || moderate(s.rstd * static_cast<double>(args.weight[param]));
}

template <class T>
FASTNORM_LOOPS inline void normalise_unit(const Plan& plan, const NormArgs<T>& args, int64_t run, int64_t set,
                                          int64_t unit, const Statistic& s) {
  const int64_t param = plan.set_param.offset(set) + segment_of(plan, unit);
  const Operands<1, true> operands{{&plan.x}, &plan.y};
  visit_unit<T>(plan, operands, run, set, unit, [&](const T* const* in, T* y, int64_t first, int64_t n) {
    const T* x = in[0];
    const auto along = [&](const auto& normalise) {
      for_stored_packs(args.past_cache, y, n, [&](auto at, auto out) { out.store(at, y, normalise(at, x)); });
    };
    if (!in_float(plan, args, s, param)) {
      with_normalise<T, double>(plan, args, s, param, first, along);
      return;
    }
    if constexpr (!kMayOverflow<T>) with_normalise<T, T>(plan, args, s, param, first, along);
  });
}

// ---- measuring float32 data the short way

inline int64_t measured_units(const Plan& plan) { return plan.set_size() <= kSmallSet ? 1 : units_per_set(plan); }

FASTNORM_LOOPS inline PlainTotals plain_unit(const Plan& plan, int64_t run, int64_t set, int64_t unit, int64_t units) {
  PlainSums sums;
  int64_t packs = 0;
  const Operands<1, false> operands{{&plan.x}, nullptr};
  const int64_t distance = reading_ahead<float>(plan, plan.x, run);
  for (int64_t u = unit; u < unit + units; ++u) {
    visit_unit<float>(plan, operands, run, set, u, [&](const float* const* in, float*, int64_t, int64_t n) {
      const float* x = in[0];
      PlainSums inner = sums;
      for_packs(n, [&](auto at) {
        prefetch(x + at.start, distance);
        inner.add(at, x);
      });
      sums = inner;
      packs += (n + kPack - 1) / kPack;
    });
  }
  PlainTotals totals;
  totals.add(sums, packs);
  return totals;
}

// The same for a set of several segments, read as x has it: the segments of a group often are one run.
FASTNORM_LOOPS inline PlainTotals plain_whole(const Plan& plan, int64_t set) {
  alignas(64) float buffer[kBlock];
  const Port<float> port = whole_port<float>(plan, set);
  const int64_t distance = reading_ahead<float>(plan, plan.x, plan.whole.inner_size());
  PlainSums sums;
  for (int64_t start = 0; start < plan.whole.count; start += kBlock) {
    const int64_t left = plan.whole.count - start, n = left < kBlock ? left : kBlock;
    const float* x = port.read(start, n, buffer);
    PlainSums inner = sums;
    for_packs(n, [&](auto at) {
      prefetch(x + at.start, distance);
      inner.add(at, x);
    });
    sums = inner;
  }
  PlainTotals totals;
  totals.add(sums, (plan.whole.count + kPack - 1) / kPack);
  return totals;
}

// Totals of one of the measured_units of a set.
inline PlainTotals plain_totals(const Plan& plan, int64_t run, int64_t set, int64_t index) {
  if (measured_units(plan) > 1) return plain_unit(plan, run, set, index, 1);
  if (plan.segments > 1) return plain_whole(plan, set);
  return plain_unit(plan, run, set, 0, units_per_set(plan));
}

// The statistic of a set, stored; the long way (set_moments.hpp) where the short one will not do.
template <class T>
inline Statistic finish_set(const Plan& plan, const NormArgs<T>& args, int64_t set, Moments& moments) {
  const Statistic s = set_statistic(plan, set, args, moments);
  store_statistic(args, plan.set_stat.offset(set), moments, s);
  return s;
}

template <class T>
inline Statistic finish_plain(const Plan& plan, const NormArgs<T>& args, int64_t set, const PlainTotals& totals) {
  Moments moments;
  if (!moments_of(totals, static_cast<double>(plan.set_size()), args.centred, moments)) {
    moments = set_moments<T>(plan, set, args.centred, 1);
  }
  return finish_set(plan, args, set, moments);
}

template <class T>
inline Statistic measure_set(const Plan& plan, const NormArgs<T>& args, int64_t run, int64_t set) {
  if constexpr (kMayOverflow<T>) {
    Moments moments = set_moments<T>(plan, set, args.centred, 1);
    return finish_set(plan, args, set, moments);
  } else {
    PlainTotals totals;
    for (int64_t i = 0; i < measured_units(plan); ++i) totals.add(plain_totals(plan, run, set, i));
    return finish_plain(plan, args, set, totals);
  }
}

// ---- forward

// Sets whose statistics are computed together, one per lane: divisions and roots cost no more for eight than for one.
constexpr int64_t kStatisticLanes = 8;

struct Batch {
  int64_t first, count;
  double sum[kPack], squares[kPack], additions[kPack];
  Statistic statistic[kPack];
  bool in_float[kPack];

  void put(int64_t lane, const PlainTotals& totals) {
    sum[lane] = totals.sum;
    squares[lane] = totals.squares;
    additions[lane] = totals.additions;
  }
};

// What statistic_of and store_statistic do, for all lanes.
inline void finish_batch(const Plan& plan, const NormArgs<float>& args, Batch& batch) {
  double mean[kPack], var[kPack], rstd[kPack], excess[kPack];
  const double count = static_cast<double>(plan.set_size()), eps = args.eps;
  const double margin = args.centred ? kPlainMargin : HUGE_VAL, centred = args.centred ? 1 : 0;
  for (int64_t lane = batch.count; lane % kStatisticLanes != 0; ++lane) batch.put(lane, PlainTotals{});
  for (int64_t lanes = 0; lanes < batch.count; lanes += kStatisticLanes) {
#pragma omp simd
    for (int64_t lane = lanes; lane < lanes + kStatisticLanes; ++lane) {
      mean[lane] = centred * (batch.sum[lane] / count);
      const double m2 = batch.squares[lane] - batch.sum[lane] * mean[lane];
      var[lane] = m2 / count;
      rstd[lane] = 1 / std::sqrt(var[lane] + eps);
      excess[lane] = m2 * margin - batch.squares[lane] * (batch.additions[lane] + kPack);
    }
  }
  for (int64_t lane = 0; lane < batch.count; ++lane) {
    const int64_t set = batch.first + lane;
    Statistic& s = batch.statistic[lane];
    if (excess[lane] > 0 && batch.squares[lane] < HUGE_VAL) {  // as moments_of has it, but for sets of zeros
      s = Statistic{mean[lane], 0, rstd[lane], 1};
      const int64_t stat = plan.set_stat.offset(set);
      if (args.mean) args.mean[stat] = s.mean;
      if (args.var) args.var[stat] = var[lane];
      if (args.rstd) args.rstd[stat] = s.rstd;
    } else {
      s = finish_plain(plan, args, set, {batch.sum[lane], batch.squares[lane], batch.additions[lane]});
    }
    batch.in_float[lane] = fits(s) && (plan.segments > 1 || in_float(plan, args, s, plan.set_param.offset(set)));
  }
}

// call(make), make(s, param) giving what normalises a set of one segment whose first parameter is `param`.
template <class Call>
inline void with_maker(const Plan& plan, const NormArgs<float>& args, const Call& call) {
  const float *weight = args.weight, *bias = args.bias;
  const auto by_row = [&](auto weight_from, auto bias_from) {
    call([=](const Statistic& s, int64_t param) {
      const auto w = weight_from(param);
      const auto b = bias_from(param);
      return Normalise<float, float, decltype(w), decltype(b)>(s, s.rstd, w, b);
    });
  };
  const auto none = [](int64_t) { return None{}; };
  const auto weights = [=](int64_t param) { return Each<float>{weight + param}; };
  const auto biases = [=](int64_t param) { return Each<float>{bias + param}; };
  if (plan.family == Family::channel) {
    call([=](const Statistic& s, int64_t param) {
      const double factor = weight ? s.rstd * static_cast<double>(weight[param]) : s.rstd;
      const Same<float> b(bias ? static_cast<double>(bias[param]) : 0);
      return Normalise<float, float, None, Same<float>>(s, factor, None{}, b);
    });
  } else if (weight && bias) {
    by_row(weights, biases);
  } else if (weight) {
    by_row(weights, none);
  } else if (bias) {
    by_row(none, biases);
  } else {
    by_row(none, none);
  }
}

// Normalises the sets of one batch and measures those of the next in the same loops: arithmetic of the one hides
// memory of the other.
template <class Make>
FASTNORM_LOOPS inline void normalise_and_measure(const Plan& plan, const NormArgs<float>& args, int64_t run,
                                                 const Batch& now, Batch& next, const Make& make) {
  const int64_t lines = plan.elements / run, packs = lines * ((run + kPack - 1) / kPack);
  const int64_t distance = reading_ahead<float>(plan, plan.x, run);
  for (int64_t lane = 0; lane < now.count; ++lane) {
    const int64_t set = now.first + lane, other = next.first + lane;
    const Statistic& s = now.statistic[lane];
    if (!now.in_float[lane] || lane >= next.count) {
      for (int64_t unit = 0; unit < units_per_set(plan); ++unit) normalise_unit(plan, args, run, set, unit, s);
      if (lane < next.count) next.put(lane, plain_totals(plan, run, other, 0));
      continue;
    }
    const Line<float> from(plan.x, set, 0, run), to(plan.y, set, 0, run), ahead(plan.x, other, 0, run);
    const auto normalise = make(s, plan.set_param.offset(set));
    PlainSums sums;
    for (int64_t line = 0; line < lines; ++line) {
      const float *x = from.at(line, 0), *coming = ahead.at(line, 0);
      float* y = to.at(line, 0);
      PlainSums inner = sums;
      if (args.past_cache) {
        // Stores past the cache are aligned, the lanes of the sums are not: the one runs a few values ahead of the
        // other.
        const int64_t unaligned = unaligned_values(y), lead = unaligned < run ? unaligned : run;
        if (lead > 0) Partial{0, lead}.store(y, normalise(Partial{0, lead}, x));
        for_packs(run, [&](auto at) {
          prefetch(coming + at.start, distance);
          inner.add(at, coming);
          const int64_t i = at.start + lead;
          if (i + kPack <= run) {
            Whole{i}.store_past(y, normalise(Whole{i}, x));
          } else if (i < run) {
            Partial{i, run - i}.store(y, normalise(Partial{i, run - i}, x));
          }
        });
      } else {
        for_packs(run, [&](auto at) {
          prefetch(coming + at.start, distance);
          inner.add(at, coming);
          at.store(y, normalise(at, x));
        });
      }
      sums = inner;
    }
    PlainTotals totals;
    totals.add(sums, packs);
    next.put(lane, totals);
  }
}

// The same for sets of several segments (group norm), which are measured as one run where x has them so.
FASTNORM_LOOPS inline void normalise_segments(const Plan& plan, const NormArgs<float>& args, int64_t run, int64_t set,
                                              const Statistic& s) {
  const Centre<float, float> centre(s);
  const int64_t lines = plan.elements / run, param = plan.set_param.offset(set), units = chunks_per_segment(plan);
  for (int64_t segment = 0; segment < plan.segments; ++segment) {
    const double factor = args.weight ? s.rstd * static_cast<double>(args.weight[param + segment]) : s.rstd;
    if (!moderate(factor)) {
      for (int64_t unit = 0; unit < units; ++unit) normalise_unit(plan, args, run, set, segment * units + unit, s);
      continue;
    }
    const Pack<float> scale(static_cast<float>(factor)), bias(args.bias ? args.bias[param + segment] : 0.0f);
    const Line<float> from(plan.x, set, segment, run), to(plan.y, set, segment, run);
    for (int64_t line = 0; line < lines; ++line) {
      const float* x = from.at(line, 0);
      float* y = to.at(line, 0);
      for_stored_packs(args.past_cache, y, run,
                       [&](auto at, auto out) { out.store(at, y, centre(at, x) * scale + bias); });
    }
  }
}

// Forward of sets [begin, end), batch by batch, each measured while the one before is normalised.
inline void forward_batches(const Plan& plan, const NormArgs<float>& args, int64_t run, int64_t begin, int64_t end) {
  const int64_t fitting = kBatchElements / plan.set_size();
  const int64_t size = fitting >= kPack             ? kPack
                       : fitting >= kStatisticLanes ? kStatisticLanes
                       : fitting < 1                ? 1
                                                    : fitting;
  Batch batches[2];
  const auto start = [&](Batch& batch, int64_t first) {
    batch.first = first;
    batch.count = end - first < size ? end - first : size;
  };
  Batch *now = &batches[0], *next = &batches[1];
  start(*now, begin);
  for (int64_t lane = 0; lane < now->count; ++lane) now->put(lane, plain_totals(plan, run, begin + lane, 0));
  with_maker(plan, args, [&](const auto& make) {
    for (int64_t first = begin; first < end; first += size) {
      finish_batch(plan, args, *now);
      start(*next, first + size < end ? first + size : end);
      if (plan.segments == 1) {
        normalise_and_measure(plan, args, run, *now, *next, make);
      } else {
        for (int64_t lane = 0; lane < next->count; ++lane)
          next->put(lane, plain_totals(plan, run, next->first + lane, 0));
        for (int64_t lane = 0; lane < now->count; ++lane) {
          if (now->in_float[lane]) {
            normalise_segments(plan, args, run, first + lane, now->statistic[lane]);
            continue;
          }
          for (int64_t unit = 0; unit < units_per_set(plan); ++unit) {
            normalise_unit(plan, args, run, first + lane, unit, now->statistic[lane]);
          }
        }
      }
      std::swap(now, next);
    }
  });
}

// Forward of sets [begin, end).
template <class T>
inline void forward_sets(const Plan& plan, const NormArgs<T>& args, int64_t run, int64_t begin, int64_t end) {
  if constexpr (!kMayOverflow<T>) {
    const bool small = plan.set_size() * static_cast<int64_t>(sizeof(T)) <= kPairedBytes;
    // A weight per value wants all values in one run.
    const bool lines_alike = plan.family == Family::channel || run == plan.elements;
    if (run > 0 && small && lines_alike && plan.blocks.count <= kChunkBlocks && measured_units(plan) == 1) {
      return forward_batches(plan, args, run, begin, end);
    }
  }
  for (int64_t set = begin; set < end; ++set) {
    const Statistic s = measure_set(plan, args, run, set);
    for (int64_t unit = 0; unit < units_per_set(plan); ++unit) normalise_unit(plan, args, run, set, unit, s);
  }
}

// Sets that a thread takes together: a number that depends on the shape alone.
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

// call(begin, end) over groups of the plan's sets, in parallel.
template <class T, class Call>
inline void for_set_groups(const Plan& plan, const NormArgs<T>& args, const Call& call) {
  const int64_t size = plan.threads > 1 ? sets_per_group<T>(plan) : plan.sets;
  for_results(plan, args, (plan.sets + size - 1) / size, [&](int64_t group) {
    const int64_t end = (group + 1) * size;
    call(group * size, end < plan.sets ? end : plan.sets);
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
                 [&](int64_t i) { partial[i] = chunk_moments<T>(plan, i / chunks, i % chunks, args.centred, 1); });
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
bool set_forward(const Plan& plan, const NormArgs<T>& args) {
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
bool set_apply(const Plan& plan, const NormArgs<T>& args) {
  const int64_t run = shared_run<T>(plan, {&plan.x, &plan.y}), units = units_per_set(plan);
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
