// Small float32 sets that are read in place, several at a time: their statistics are computed side by side, and one
// batch is normalised while the next is measured.
#pragma once

#include <utility>

#include "isa/set_units.hpp"

namespace fastnorm {
namespace {

// Sets up to this size are measured while the one before is normalised: arithmetic of the one hides memory of the
// other.
constexpr int64_t kPairedBytes = 512 << 10;
// Values of the sets of a batch: as many as leave room in the nearest cache for the next batch and for the results.
constexpr int64_t kBatchElements = 4096;

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

// y = formula(x) along a run, which ends with a whole pack like the others, not with a part of one: it computes some
// values twice, from x as it was, should y be x.
template <class Formula>
FASTNORM_INLINE void write_run(const float* x, float* y, int64_t n, const Formula& formula) {
  const auto each = [&](auto at) { at.store(y, formula(at, x)); };
  if (n < kPack || n % kPack == 0) return for_packs(n, each);
  const Whole end{n - kPack};
  const Pack<float> last = formula(end, x);
#pragma GCC unroll 4
  for (int64_t i = 0; i < end.start; i += kPack) each(Whole{i});
  end.store(y, last);
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
          if (distance > 0) prefetch(coming + at.start, distance);
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

// Adds up a set that is one run, a part of it at a time.
class RunInParts {
 public:
  RunInParts(const float* x, int64_t n, int64_t distance) : x_(x), size_(n), distance_(distance) {}

  // What there is before `end`, four packs at a time.
  FASTNORM_INLINE void add_up_to(int64_t end) {
    PlainSums inner = sums_;
    constexpr int64_t kStep = 4 * kPack;
    for (; done_ + kStep <= end; done_ += kStep) {
      if (distance_ > 0) {
        for (int64_t i = 0; i < kStep; i += kPack) prefetch(x_ + done_ + i, distance_);
      }
      FASTNORM_UNROLL
      for (int64_t i = 0; i < kStep; i += kPack) inner.add(Whole{done_ + i}, x_);
    }
    sums_ = inner;
  }
  FASTNORM_INLINE PlainTotals totals() {
    add_up_to(size_);
    for (; done_ + kPack <= size_; done_ += kPack) sums_.add(Whole{done_}, x_);
    if (done_ < size_) sums_.add(Partial{done_, size_ - done_}, x_);
    PlainTotals totals;
    totals.add(sums_, (size_ + kPack - 1) / kPack);
    return totals;
  }

 private:
  const float* x_;
  int64_t size_, distance_, done_ = 0;
  PlainSums sums_;
};

// Normalises a set of several segments (group norm); before_segment(i) comes before each.
template <class Before>
FASTNORM_LOOPS inline void normalise_segments(const Plan& plan, const NormArgs<float>& args, int64_t run, int64_t set,
                                              const Statistic& s, const Before& before_segment) {
  const Centre<float, float> centre(s);
  const int64_t lines = plan.elements / run, param = plan.set_param.offset(set), units = chunks_per_segment(plan);
  for (int64_t segment = 0; segment < plan.segments; ++segment) {
    before_segment(segment);
    const double factor = args.weight ? s.rstd * static_cast<double>(args.weight[param + segment]) : s.rstd;
    if (!moderate(factor)) {
      for (int64_t unit = 0; unit < units; ++unit) normalise_unit(plan, args, run, set, segment * units + unit, s);
      continue;
    }
    const Pack<float> scale(static_cast<float>(factor)), bias(args.bias ? args.bias[param + segment] : 0.0f);
    const Line<float> from(plan.x, set, segment, run), to(plan.y, set, segment, run);
    const auto normalise = [&](auto at, const float* x) { return centre(at, x) * scale + bias; };
    for (int64_t line = 0; line < lines; ++line) {
      const float* x = from.at(line, 0);
      float* y = to.at(line, 0);
      if (args.past_cache) {
        for_stored_packs(true, y, run, [&](auto at, auto out) { out.store(at, y, normalise(at, x)); });
      } else {
        write_run(x, y, run, normalise);
      }
    }
  }
}

// Normalises the sets of one batch and measures those of the next, which are one run each where x has them so, between
// their segments.
inline void normalise_and_measure_segments(const Plan& plan, const NormArgs<float>& args, int64_t run, const Batch& now,
                                           Batch& next) {
  const bool one_run = plan.x.aligned && plan.whole.rank == 1 && plan.whole.stride[0] == sizeof(float);
  const int64_t distance = reading_ahead<float>(plan, plan.x, plan.whole.inner_size());
  for (int64_t lane = 0; lane < now.count; ++lane) {
    const int64_t set = now.first + lane, other = next.first + lane;
    const Statistic& s = now.statistic[lane];
    const bool measures = lane < next.count;
    if (now.in_float[lane] && measures && one_run) {
      RunInParts coming(Line<float>(plan.x, other, 0, run).at(0, 0), plan.whole.count, distance);
      normalise_segments(plan, args, run, set, s,
                         [&](int64_t segment) { coming.add_up_to((segment + 1) * plan.elements); });
      next.put(lane, coming.totals());
      continue;
    }
    if (measures) next.put(lane, plain_totals(plan, run, other, 0));
    if (now.in_float[lane]) {
      normalise_segments(plan, args, run, set, s, [](int64_t) {});
    } else {
      for (int64_t unit = 0; unit < units_per_set(plan); ++unit) normalise_unit(plan, args, run, set, unit, s);
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
        normalise_and_measure_segments(plan, args, run, *now, *next);
      }
      std::swap(now, next);
    }
  });
}

}  // namespace
}  // namespace fastnorm
