// Work on one unit of a set of Family::channel (one weight per segment) or Family::row (a weight per element): writing
// normalised values, and measuring float32 data the short way (moments.hpp), the long way where that will not do.
#pragma once

#include "isa/runs.hpp"
#include "isa/segment.hpp"
#include "isa/set_deviations.hpp"

namespace fastnorm {
namespace {

// Sets up to this size are measured in one go, whatever their segments, and stay in the nearest caches.
constexpr int64_t kSmallSet = kBlock * kChunkBlocks;

// call(normalise) with the formula for elements from `first` on of a segment whose first parameter is `param`.
template <class T, class C, class Call>
inline void with_normalise(const Plan& plan, const NormArgs<T>& args, const Statistic& s, int64_t param, int64_t first,
                           const Call& call) {
  const T* weight = args.weight ? args.weight + param : nullptr;
  const T* bias = args.bias ? args.bias + param : nullptr;
  const auto make = [&](double common, double shift, auto w, auto b) {
    call(Normalise<T, C, decltype(w), decltype(b)>(s, common, shift, w, b));
  };
  if (plan.family == Family::channel) {
    const double w = weight ? static_cast<double>(*weight) : 1, b = bias ? static_cast<double>(*bias) : kNoBias;
    if (kMayOverflow<T> && !as_one_step(s.rstd, w, b)) {
      make(1, kNoBias, Same<C>(w), Same<C>(b));
    } else {
      make(w, b, None{}, None{});
    }
  } else if (weight && bias) {
    make(1, kNoBias, Each<T>{weight + first}, Each<T>{bias + first});
  } else if (weight) {
    make(1, kNoBias, Each<T>{weight + first}, None{});
  } else if (bias) {
    make(1, kNoBias, None{}, Each<T>{bias + first});
  } else {
    make(1, kNoBias, None{}, None{});
  }
}

// May this segment be computed in float32?
template <class T>
inline bool in_float(const Plan& plan, const NormArgs<T>& args, const Statistic& s, int64_t param) {
  if (kMayOverflow<T> || !fits(s)) return false;
  if (plan.family == Family::row || !args.weight) return true;
  const double factor = s.rstd * static_cast<double>(args.weight[param]);
  return zero_or_moderate(factor);
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
  PlainSums<> sums;
  int64_t packs = 0;
  const Operands<1, false> operands{{&plan.x}, nullptr};
  const int64_t distance = reading_ahead<float>(plan, plan.x, run);
  for (int64_t u = unit; u < unit + units; ++u) {
    visit_unit<float>(plan, operands, run, set, u, [&](const float* const* in, float*, int64_t, int64_t n) {
      const float* x = in[0];
      PlainSums<> inner = sums;
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
FASTNORM_LOOPS inline PlainSums<> plain_whole(const Plan& plan, int64_t set) {
  alignas(64) float buffer[kBlock];
  const Port<float> port = whole_port<float>(plan, set);
  const int64_t distance = reading_ahead<float>(plan, plan.x, plan.whole.inner_size());
  PlainSums<> sums;
  for (int64_t start = 0; start < plan.whole.count; start += kBlock) {
    const int64_t left = plan.whole.count - start, n = left < kBlock ? left : kBlock;
    const float* x = port.read(start, n, buffer);
    PlainSums<> inner = sums;
    for_packs(n, [&](auto at) {
      prefetch(x + at.start, distance);
      inner.add(at, x);
    });
    sums = inner;
  }
  return sums;
}

// Totals of one of the measured_units of a set.
inline PlainTotals plain_totals(const Plan& plan, int64_t run, int64_t set, int64_t index) {
  if (measured_units(plan) > 1) return plain_unit(plan, run, set, index, 1);
  if (plan.segments > 1) {
    PlainTotals totals;
    totals.add(plain_whole(plan, set), (plan.whole.count + kPack - 1) / kPack);
    return totals;
  }
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
    Moments moments = measure_chunks(plan, set, args.centred);
    return finish_set(plan, args, set, moments);
  } else {
    PlainTotals totals;
    for (int64_t i = 0; i < measured_units(plan); ++i) totals.add(plain_totals(plan, run, set, i));
    return finish_plain(plan, args, set, totals);
  }
}

}  // namespace
}  // namespace fastnorm
