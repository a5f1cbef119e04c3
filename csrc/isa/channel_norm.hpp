// Backward where one weight serves a whole segment (channels first: batch, instance and group norm). Per segment the
// two sums of dy and dy * xhat give everything: weighted they are the set's a and b, plain they are dbias and dweight.
#pragma once

#include "isa/set_norm.hpp"

namespace fastnorm {
namespace {

struct SegmentSums {
  Sum dy, dy_xhat;
  double size = 0;  // about the sum of |dy|: float32 only
  void add(const SegmentSums& other) {
    dy.add(other.dy);
    dy_xhat.add(other.dy_xhat);
    size += other.size;
  }
};

// Float32 data not too far from zero: sum(dy * xhat) is (sum(dy * x) - mean * sum(dy)) * rstd, with exact products and
// digits to spare for the difference: what `additions` in a chain may lose of it stays a small part of a float32 unit
// even of a sum that one value far from the others makes up. Not where the variance is nothing beside eps: the
// dy * xhat of a constant set are exactly 0, and so has to be their sum.
inline bool sums_plainly(const Statistic& s, double eps, double additions) {
  return std::fabs(s.mean) * s.rstd * (additions + kPack) < 0x1p22 && eps * s.rstd * s.rstd < 0.999;
}

// Packs in the longest chain of a unit's sums, at most.
inline double additions_of(const Plan& plan, int64_t run) {
  const int64_t longest = kBlock * kChunkBlocks, elements = plan.elements < longest ? plan.elements : longest;
  return static_cast<double>(elements / kPack + (run > 0 ? elements / run : plan.blocks.count));
}

// Sums of dy and of dy * x of float32 data, in plain lanes of double.
struct PlainGradientSums {
  Pack<double> dy_sum = Pack<double>(0.0), product_sum = Pack<double>(0.0);
  Size size;

  template <class At>
  FASTNORM_INLINE void add(At at, const float* x, const float* dy) {
    const Pack<double> g = at.template load<double>(dy);
    dy_sum += g;
    product_sum = add_exact_product(g, at.template load<double>(x), product_sum);
    size.add(at, dy);
  }
  // Not inlined: what has its address taken would not stay in registers in the loops around.
  [[gnu::noinline]] static SegmentSums total(PlainGradientSums sums, const Statistic& s) {
    SegmentSums total;
    total.dy.hi = fold(sums.dy_sum);
    total.dy_xhat.hi = (fold(sums.product_sum) - s.mean * total.dy.hi) * s.rstd;
    total.size = sums.size.total();
    return total;
  }
};

// The sums of every segment of a set that is read in place.
FASTNORM_LOOPS inline void plain_set_sums(const Plan& plan, int64_t run, int64_t set, const Statistic& s,
                                          SegmentSums* sums) {
  const int64_t lines = plan.elements / run;
  const int64_t x_ahead = reading_ahead<float>(plan, plan.x, run), dy_ahead = reading_ahead<float>(plan, plan.dy, run);
  for (int64_t segment = 0; segment < plan.segments; ++segment) {
    const Line<float> x_line(plan.x, set, segment, run), dy_line(plan.dy, set, segment, run);
    PlainGradientSums total;
    for (int64_t line = 0; line < lines; ++line) {
      const float *x = x_line.at(line, 0), *dy = dy_line.at(line, 0);
      PlainGradientSums inner = total;
      for_packs(run, [&](auto at) {
        prefetch(x + at.start, x_ahead);
        prefetch(dy + at.start, dy_ahead);
        inner.add(at, x, dy);
      });
      total = inner;
    }
    sums[segment] = PlainGradientSums::total(total, s);
  }
}

// dx of every segment of a set, computed in float32.
FASTNORM_LOOPS inline void plain_set_gradient(const Plan& plan, const NormArgs<float>& args, int64_t run, int64_t set,
                                              const Statistic& s, double a, double b) {
  const int64_t lines = plan.elements / run, param = plan.set_param.offset(set);
  InputGradient<float, float, Same<float>> gradient(s, a, b, Same<float>(1));
  for (int64_t segment = 0; segment < plan.segments; ++segment) {
    if (args.weight) gradient.weight.value = Pack<float>(args.weight[param + segment]);
    const Line<float> x_line(plan.x, set, segment, run), dy_line(plan.dy, set, segment, run),
        dx_line(plan.dx, set, segment, run);
    for (int64_t line = 0; line < lines; ++line) {
      const float *x = x_line.at(line, 0), *dy = dy_line.at(line, 0);
      float* dx = dx_line.at(line, 0);
      for_stored_packs(args.past_cache, dx, run, [&](auto at, auto out) { out.store(at, dx, gradient(at, x, dy)); });
    }
  }
}

FASTNORM_LOOPS inline SegmentSums plain_unit_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit,
                                                  const Statistic& s) {
  const Operands<2, false> operands{{&plan.x, &plan.dy}, nullptr};
  const int64_t x_ahead = reading_ahead<float>(plan, plan.x, run), dy_ahead = reading_ahead<float>(plan, plan.dy, run);
  PlainGradientSums sums;
  visit_unit<float>(plan, operands, run, set, unit, [&](const float* const* in, float*, int64_t, int64_t n) {
    const float *x = in[0], *dy = in[1];
    PlainGradientSums inner = sums;
    for_packs(n, [&](auto at) {
      prefetch(x + at.start, x_ahead);
      prefetch(dy + at.start, dy_ahead);
      inner.add(at, x, dy);
    });
    sums = inner;
  });
  return PlainGradientSums::total(sums, s);
}

// The sums of one unit, weighted or not. Float32 data is added in plain lanes of double; float64 data has no digits to
// spare and is added in trees.
template <class T, class WeightAt>
FASTNORM_LOOPS inline SegmentSums unit_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit,
                                            const Statistic& s, const WeightAt& weight_at) {
  const Operands<2, false> operands{{&plan.x, &plan.dy}, nullptr};
  const Centre<T, double> centre(s);
  const Pack<double> rstd(s.rstd);
  const int64_t x_ahead = reading_ahead<T>(plan, plan.x, run), dy_ahead = reading_ahead<T>(plan, plan.dy, run);
  SegmentSums total;
  PackPair lanes{0.0, 0.0};
  PairTree tree;
  Size size;
  visit_unit<T>(plan, operands, run, set, unit, [&](const T* const* in, T*, int64_t first, int64_t n) {
    const T *x = in[0], *dy = in[1];
    const auto weight = weight_at(first);
    const auto terms = [&](auto at) { return gradient_terms(at, x, dy, centre, rstd, weight); };
    if constexpr (kMayOverflow<T>) {
      tree.push(tree_sums(0, n, terms));
    } else {
      PackPair inner = lanes;
      Size inner_size = size;
      for_packs(n, [&](auto at) {
        prefetch(x + at.start, x_ahead);
        prefetch(dy + at.start, dy_ahead);
        inner += terms(at);
        inner_size.add(at, dy);
      });
      lanes = inner;
      size = inner_size;
    }
  });
  const Pair sums = fold(kMayOverflow<T> ? tree.total() : lanes);
  total.dy.add(sums.first);
  total.dy_xhat.add(sums.second);
  total.size = kMayOverflow<T> ? 0 : size.total();
  return total;
}

// The means that the input gradient subtracts, and whether float32 can hold what is made of them.
struct GradientMeans {
  double a = 0, b = 0;
  bool in_float = false;

  template <class T>
  static GradientMeans of(const Sum& a, const Sum& b, double size, double count, bool centred, bool plain_weights,
                          const Statistic& s) {
    GradientMeans means;
    means.a = centred ? a.value() / count : 0;
    means.b = b.value() / count;
    means.in_float = !kMayOverflow<T> && plain_weights && fits(s) && (moderate(size / count) || size == 0) &&
                     std::fabs(means.a) < 0x1p100 && std::fabs(means.b * s.rstd) < 0x1p100;
    return means;
  }
};

template <class T>
FASTNORM_LOOPS inline void channel_unit_gradient(const Plan& plan, const NormArgs<T>& args, int64_t run, int64_t set,
                                                 int64_t unit, const Statistic& s, const GradientMeans& means) {
  const int64_t param = plan.set_param.offset(set) + segment_of(plan, unit);
  const double weight = args.weight ? static_cast<double>(args.weight[param]) : 1;
  const Operands<2, true> operands{{&plan.x, &plan.dy}, &plan.dx};
  visit_unit<T>(plan, operands, run, set, unit, [&](const T* const* in, T* dx, int64_t, int64_t n) {
    const T *x = in[0], *dy = in[1];
    if (args.constant_stats) return input_gradient_constant(dy, dx, n, s, Same<double>(weight));
    const auto along = [&](const auto& gradient) {
      for_stored_packs(args.past_cache, dx, n, [&](auto at, auto out) { out.store(at, dx, gradient(at, x, dy)); });
    };
    if constexpr (!kMayOverflow<T>) {
      if (means.in_float) return along(InputGradient<T, T, Same<T>>(s, means.a, means.b, Same<T>(weight)));
    }
    along(InputGradient<T, double, Same<double>>(s, means.a, means.b, Same<double>(weight)));
  });
}

// A sum where every digit counts in float64, and any order will do for float32 data.
template <class T>
inline void accumulate(Sum& sum, const Sum& term) {
  if constexpr (kMayOverflow<T>) {
    sum.add(term);
  } else {
    sum.hi += term.hi;
  }
}

// Parameter gradients from sums per parameter, merged over those that share one, in order: `count` rows of `width`
// sums, the first parameter of row i being param(i), the others `step` apart; `totals` are plan.params zeros.
template <class T, class Param>
inline void reduce_parameter_gradients(const Plan& plan, const NormArgs<T>& args, const SegmentSums* sums,
                                       int64_t count, int64_t width, int64_t step, const Param& param,
                                       SegmentSums* totals) {
  if (!args.dweight && !args.dbias) return;
  for (int64_t i = 0; i < count; ++i) {
    SegmentSums* to = &totals[param(i)];
    for (int64_t j = 0; j < width; ++j) {
      accumulate<T>(to[j * step].dy, sums[i * width + j].dy);
      accumulate<T>(to[j * step].dy_xhat, sums[i * width + j].dy_xhat);
    }
  }
  for (int64_t p = 0; p < plan.params; ++p) {
    if (args.dweight) args.dweight[p] = static_cast<T>(totals[p].dy_xhat.value());
    if (args.dbias) args.dbias[p] = static_cast<T>(totals[p].dy.value());
  }
}

template <class T>
inline GradientMeans channel_means(const Plan& plan, const NormArgs<T>& args, int64_t set, const Statistic& s,
                                   const SegmentSums* sums) {
  const int64_t param = plan.set_param.offset(set);
  Sum a, b;
  double size = 0;
  bool plain_weights = true;
  for (int64_t segment = 0; segment < plan.segments; ++segment) {
    const double weight = args.weight ? static_cast<double>(args.weight[param + segment]) : 1;
    accumulate<T>(a, {weight * sums[segment].dy.value(), 0});
    accumulate<T>(b, {weight * sums[segment].dy_xhat.value(), 0});
    size += sums[segment].size;
    plain_weights = plain_weights && moderate(weight);
  }
  return GradientMeans::of<T>(a, b, size, static_cast<double>(plan.set_size()), args.centred, plain_weights, s);
}

template <class T>
bool channel_backward(const Plan& plan, const NormArgs<T>& args) {
  const int64_t units = units_per_set(plan), chunks = chunks_per_segment(plan), segments = plan.segments;
  const int64_t run = shared_run<T>(plan, {&plan.x, &plan.dy, &plan.dx});
  const double additions = additions_of(plan, run);
  const bool split = split_sets(plan), want_params = args.dweight || args.dbias;
  const Workspace<SegmentSums> sums(plan.sets * segments), partial(split ? plan.sets * units : 0),
      totals(want_params ? plan.params : 0);
  if (!sums || !partial || !totals) return false;

  const auto statistic = [&](int64_t set) { return kept_statistic(plan, args, set); };
  const auto measure = [&](int64_t set, int64_t unit, const Statistic& s) {
    if constexpr (!kMayOverflow<T>) {
      if (sums_plainly(s, args.eps, additions)) return plain_unit_sums(plan, run, set, unit, s);
    }
    return unit_sums<T>(plan, run, set, unit, s, [](int64_t) { return None{}; });
  };
  const auto gradient = [&](int64_t set, int64_t first_unit, int64_t end_unit, const Statistic& s) {
    const GradientMeans means = channel_means(plan, args, set, s, &sums[set * segments]);
    for (int64_t unit = first_unit; unit < end_unit; ++unit) {
      channel_unit_gradient(plan, args, run, set, unit, s, means);
    }
  };

  if (split) {
    parallel_for(plan.threads, plan.sets * units,
                 [&](int64_t i) { partial[i] = measure(i / units, i % units, statistic(i / units)); });
    for (int64_t i = 0; i < plan.sets * units; ++i) sums[i / chunks].add(partial[i]);
    for_results(plan, args, plan.sets * units,
                [&](int64_t i) { gradient(i / units, i % units, i % units + 1, statistic(i / units)); });
  } else {
    for_set_groups(plan, args, [&](int64_t begin, int64_t end) {
      for (int64_t set = begin; set < end; ++set) {
        const Statistic s = statistic(set);
        if constexpr (!kMayOverflow<T>) {
          if (run > 0 && chunks == 1 && !args.constant_stats && sums_plainly(s, args.eps, additions)) {
            plain_set_sums(plan, run, set, s, &sums[set * segments]);
            const GradientMeans means = channel_means(plan, args, set, s, &sums[set * segments]);
            if (means.in_float) {
              plain_set_gradient(plan, args, run, set, s, means.a, means.b);
            } else {
              gradient(set, 0, units, s);
            }
            continue;
          }
        }
        for (int64_t unit = 0; unit < units; ++unit) sums[set * segments + unit / chunks].add(measure(set, unit, s));
        gradient(set, 0, units, s);
      }
    });
  }
  reduce_parameter_gradients(
      plan, args, sums.data(), plan.sets, segments, 1, [&](int64_t set) { return plan.set_param.offset(set); },
      totals.data());
  return true;
}

}  // namespace
}  // namespace fastnorm
