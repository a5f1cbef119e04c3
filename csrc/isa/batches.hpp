// Batches of small float32 sets: their statistics are computed side by side, and one batch is normalised while the next
// is measured; and what longer sets need that come one by one. What is done with a set is for others to say
// (set_batches.hpp, group_batches.hpp).
#pragma once

#include <utility>

#include "isa/set_units.hpp"

namespace fastnorm {
namespace {

// Values of the sets of a batch: as many as leave room in the nearest cache for the next batch and for the results.
constexpr int64_t kBatchElements = 4096;
constexpr int64_t kMostSets = 32;
// Statistics are computed side by side, a lane for each set, in multiples of this: divisions and roots cost no more for
// eight than for one.
constexpr int64_t kStatisticLanes = 8;

// Float32 rows of RMS norm from this length on go one by one: squares alone cost little once a row.
constexpr int64_t kLongSquares = 200;

inline bool fits_batch(const Plan& plan) { return plan.blocks.count <= kChunkBlocks && measured_units(plan) == 1; }

// Where the sets of a batch begin in an operand. Most often they lie at equal distances; else their offsets are looked
// up once, for that takes divisions.
class SetPlaces {
 public:
  // A copy, for loops that store results: a compiler does not know that these change nothing in here.
  struct View {
    char* first;
    int64_t step;
    const int64_t* offsets;  // nullptr: at equal distances
    FASTNORM_INLINE char* operator[](int64_t lane) const { return first + (offsets ? offsets[lane] : lane * step); }
  };

  void find(const Operand& operand, int64_t first, int64_t count) {
    evenly_ = operand.set.rank <= 1;
    step_ = inner_stride(operand.set);
    first_ = operand.data + (evenly_ ? first * step_ : 0);
    if (!evenly_) for_offsets(operand.set, first, count, [&](int64_t i, int64_t offset) { offsets_[i] = offset; });
  }
  FASTNORM_INLINE View view() const { return {first_, step_, evenly_ ? nullptr : offsets_}; }

 private:
  bool evenly_ = true;
  char* first_ = nullptr;
  int64_t step_ = 0, offsets_[kMostSets];
};

// The sets of a batch.
struct PlacedSets {
  int64_t first = 0, count = 0;
  SetPlaces x, y;

  void place(const Plan& plan, int64_t from, int64_t size) {
    first = from;
    count = size;
    x.find(plan.x, first, count);
    y.find(plan.y, first, count);
  }
};

// A parameter of each set of a batch that has one for all values, for others what changes nothing; with room for whole
// packs from any lane on.
struct SetParameters {
  alignas(64) double of[kMostSets + kPack];
  explicit SetParameters(double usual) {
    for (double& parameter : of) parameter = usual;
  }
};

// Some sets, their sums, and what normalises them.
struct Batch : PlacedSets {
  bool in_float = false;     // are all of them measured the short way, and to be normalised in float32?
  int64_t param[kMostSets];  // of a set's first weight and bias
  HalfPack sum_lanes[kMostSets], squares_lanes[kMostSets];
  alignas(64) double sum[kMostSets], squares[kMostSets];
  SetParameters weight{1}, bias{kNoBias};
  double mean[kMostSets], m2[kMostSets], rstd[kMostSets];
  float pivot[kMostSets], factor[kMostSets], offset[kMostSets];  // FloatFactors

  FASTNORM_INLINE void put(int64_t lane, const FloatFactors& factors) {
    pivot[lane] = factors.pivot;
    factor[lane] = factors.factor;
    offset[lane] = factors.offset;
  }
  FASTNORM_INLINE FloatFactors factors(int64_t lane) const { return {pivot[lane], factor[lane], offset[lane]}; }

  // In lanes, whole registers: single numbers that are read side by side would have to wait until all results before
  // them are in the cache (layer norm 2048 x 1024: 5 % of its time).
  template <bool centred>
  FASTNORM_INLINE void put(int64_t lane, const PlainSums<centred>& sums) {
    if constexpr (centred) sum_lanes[lane] = sums.sum;
    squares_lanes[lane] = sums.squares;
  }
};

// What moments_of and statistic_of make of a set's sums.
struct SetNumbers {
  double mean, m2, rstd;
  bool in_float;  // measured the short way, and to be normalised in float32 (zeros included)

  // No branches: it is computed for several sets side by side.
  template <bool kCentred>
  FASTNORM_INLINE static SetNumbers of(double sum, double squares, double weight, double count, double share,
                                       double eps, double additions) {
    const double mean = kCentred ? sum / count : 0;
    const double m2 = kCentred ? squares - sum * mean : squares;
    const double rstd = 1 / std::sqrt(m2 * share + eps);
    const bool short_way = kCentred ? m2 * kPlainMargin >= squares * additions : true;
    const bool fit = moderate(rstd) & (std::fabs(mean) < kMostMean) & (squares < HUGE_VAL);
    return {mean, m2, rstd, static_cast<bool>(short_way & fit & zero_or_moderate(rstd * weight))};
  }
};

// The same for the first `lanes` sets of a batch, and what normalises them. True if float32 will do for all of them.
template <bool kCentred>
FASTNORM_INLINE bool finish_lanes(Batch& batch, int64_t lanes, double count, double eps, double additions) {
  double *const mean = batch.mean, *const m2 = batch.m2, *const rstd = batch.rstd;
  float *const pivot = batch.pivot, *const factor = batch.factor, *const offset = batch.offset;
  const double *const sum = batch.sum, *const squares = batch.squares;
  const double *const weight = batch.weight.of, *const bias = batch.bias.of;
  const double share = 1 / count;
  int64_t beyond = 0;
#pragma omp simd reduction(| : beyond)
  for (int64_t i = 0; i < lanes; ++i) {
    const SetNumbers set =
        SetNumbers::of<kCentred>(kCentred ? sum[i] : 0, squares[i], weight[i], count, share, eps, additions);
    mean[i] = set.mean;
    m2[i] = set.m2;
    rstd[i] = set.rstd;
    beyond |= set.in_float ? 0 : 1;
  }
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    const FloatFactors factors = FloatFactors::of(mean[i], 0, rstd[i] * weight[i], bias[i]);
    pivot[i] = factors.pivot;
    factor[i] = factors.factor;
    offset[i] = factors.offset;
  }
  return beyond == 0;
}
[[gnu::noinline]] inline bool finish_lanes(Batch& batch, int64_t lanes, double count, double eps, bool centred,
                                           double additions) {
  return centred ? finish_lanes<true>(batch, lanes, count, eps, additions)
                 : finish_lanes<false>(batch, lanes, count, eps, additions);
}

inline void store_numbers(const NormArgs<float>& args, int64_t stat, const SetNumbers& set, double count) {
  if (args.mean) args.mean[stat] = set.mean;
  if (args.var) args.var[stat] = set.m2 / count;
  if (args.rstd) args.rstd[stat] = set.rstd;
}

// Where the parameters of each set are.
template <class Batch>
inline void find_parameters(const Plan& plan, Batch& batch) {
  const int64_t step = inner_stride(plan.set_param);
  for_stretches(plan.set_param, batch.first, batch.count, [&](int64_t lane, int64_t first, int64_t n) {
    int64_t* const param = batch.param + lane;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) param[i] = first + i * step;
  });
}

// The first parameter of each set. In vectors where they lie side by side: numbers that are stored one by one and then
// read together have to wait until all results before them are in the cache (instance norm 7 x 7: 9 % of its time).
template <class T, class Batch>
inline void take_first(const Plan& plan, const Batch& batch, const T* params, double* to) {
  if (!params) return;
  const int64_t step = inner_stride(plan.set_param);
  for_stretches(plan.set_param, batch.first, batch.count, [&](int64_t lane, int64_t first, int64_t n) {
    const T* const from = params + first;
    double* const numbers = to + lane;
    if (step == 1) {
      for_packs(n, [&](auto at) { Whole{at.start}.store(numbers, at.template load<double>(from)); });
    } else {
      for (int64_t i = 0; i < n; ++i) numbers[i] = static_cast<double>(from[i * step]);
    }
  });
}

// The same, and the parameters of sets of one segment of Family::channel, which have one of each.
template <class T, class Batch>
inline void load_parameters(const Plan& plan, const NormArgs<T>& args, Batch& batch) {
  find_parameters(plan, batch);
  if (plan.family != Family::channel || plan.segments > 1) return;
  take_first(plan, batch, args.weight, batch.weight.of);
  take_first(plan, batch, args.bias, batch.bias.of);
}

// A number of each set of a batch, stored where the caller wants it, if anywhere.
template <class Batch>
inline void store_numbers(const Plan& plan, const Batch& batch, const double* numbers, double* to) {
  if (!to) return;
  const Walk& places = plan.set_stat;
  if (contiguous(places)) {
    std::memcpy(to + places.offset(batch.first), numbers, static_cast<size_t>(batch.count) * sizeof(double));
    return;
  }
  Offsets offsets(places, batch.first);
  for (int64_t lane = 0; lane < batch.count; ++lane) to[offsets.next()] = numbers[lane];
}

// The statistics of a batch from its sums of `packs` packs each, stored.
inline void finish_batch(const Plan& plan, const NormArgs<float>& args, int64_t packs, Batch& batch) {
  // Lanes without a set get the sums of the first one.
  int64_t lanes = batch.count;
  for (; lanes % kStatisticLanes != 0; ++lanes) {
    if (args.centred) batch.sum_lanes[lanes] = batch.sum_lanes[0];
    batch.squares_lanes[lanes] = batch.squares_lanes[0];
  }
  for (int64_t lane = 0; lane < lanes; lane += kStatisticLanes) {
    if (args.centred) fold_eight(batch.sum_lanes + lane, batch.sum + lane);
    fold_eight(batch.squares_lanes + lane, batch.squares + lane);
  }
  load_parameters(plan, args, batch);
  batch.in_float = finish_lanes(batch, lanes, static_cast<double>(plan.set_size()), args.eps, args.centred,
                                static_cast<double>(packs + kPack));
  if (!batch.in_float) return;
  store_numbers(plan, batch, batch.mean, args.mean);
  if (args.var) {
    const double count = static_cast<double>(plan.set_size());
    double var[kMostSets];
    for (int64_t lane = 0; lane < batch.count; ++lane) var[lane] = batch.m2[lane] / count;
    store_numbers(plan, batch, var, args.var);
  }
  store_numbers(plan, batch, batch.rstd, args.rstd);
}

// A set of which float32 may not do, from its sums.
[[gnu::noinline]] inline void normalise_alone(const Plan& plan, const NormArgs<float>& args, int64_t run, int64_t set,
                                              const PlainTotals& totals) {
  const Statistic s = finish_plain(plan, args, set, totals);
  for (int64_t unit = 0; unit < units_per_set(plan); ++unit) normalise_unit(plan, args, run, set, unit, s);
}
inline void normalise_each(const Plan& plan, const NormArgs<float>& args, int64_t run, int64_t packs,
                           const Batch& batch) {
  for (int64_t lane = 0; lane < batch.count; ++lane) {
    normalise_alone(plan, args, run, batch.first + lane,
                    PlainTotals{args.centred ? batch.sum[lane] : 0, batch.squares[lane], static_cast<double>(packs)});
  }
}

// Goes through the sets [begin, end) in batches of about `elements` values: measure(first), then finish(batch) and
// normalise(batch, next), which measures `next` too.
template <class Batch, class Measure, class Finish, class Normalise>
inline void for_batches(const Plan& plan, int64_t elements, int64_t begin, int64_t end, const Measure& measure,
                        const Finish& finish, const Normalise& normalise) {
  // A multiple of the lanes, if it takes no more than half as many sets again as fit.
  const int64_t fitting = elements / plan.set_size();
  const int64_t whole = (fitting + kStatisticLanes / 2 - 1) / kStatisticLanes * kStatisticLanes;
  const int64_t size = fitting >= kMostSets ? kMostSets : whole > 0 ? whole : fitting > 0 ? fitting : 1;
  Batch batches[2];
  Batch *now = &batches[0], *next = &batches[1];
  const auto start = [&](Batch& batch, int64_t first) {
    batch.place(plan, first, end - first < size ? end - first : size);
  };
  start(*now, begin);
  measure(*now);
  while (now->count > 0) {
    finish(*now);
    start(*next, now->first + now->count);
    normalise(*now, *next);
    std::swap(now, next);
  }
}

}  // namespace
}  // namespace fastnorm
