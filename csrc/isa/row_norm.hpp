// Backward where the weights run along the set, one per value (layer norm, RMS norm). The gradients of the parameters
// are sums over sets: each group of kSetsPerGroup sets adds into rows of its own, and those are added in order, so that
// the cut depends on the shape alone.
//
// The first reading of a set takes its two sums and adds to the parameters' gradients; the second, from cache, writes
// dx.
#pragma once

#include "isa/channel_norm.hpp"

namespace fastnorm {
namespace {

// Sets in a chain of additions: float64 has no digits to spare, float32 data are summed in double.
template <class T>
constexpr int64_t kSetsPerGroup = kMayOverflow<T> ? 16 : 64;

// Rows read side by side: a parameter's gradient is loaded and stored once for all of them.
constexpr int kRowsTogether = kVectorBytes == 64 ? 2 : 1;
constexpr int64_t kTogetherElements = 4096;

// call(weight) with the weights from parameter `first` on.
template <class T, class Call>
inline void with_weight(const T* weight, int64_t first, const Call& call) {
  if (weight) {
    call(Each<T>{weight + first});
  } else {
    call(None{});
  }
}

// dweight += dy * xhat, dbias += dy, in double, for one set after the other.
struct ParameterSums {
  double *dweight, *dbias;

  ParameterSums from(int64_t first) const { return {dweight + first, dbias + first}; }
};

template <class T>
FASTNORM_LOOPS inline void add_parameter_gradients(const T* x, const T* dy, int64_t n, const Statistic& s,
                                                   ParameterSums sums) {
  const Centre<T, double> centre(s);
  const Pack<double> rstd(s.rstd);
  for_packs(n, [&](auto at) {
    const PackPair terms = gradient_terms(at, x, dy, centre, rstd, None{});
    at.store(sums.dweight, at.template load<double>(sums.dweight) + terms.second);
    at.store(sums.dbias, at.template load<double>(sums.dbias) + terms.first);
  });
}

// sum + v * weight, v a float32 value in double.
template <class At>
FASTNORM_INLINE Pack<double> add_times(At, const Pack<double>& v, None, const Pack<double>& sum) {
  return sum + v;
}
template <class At>
FASTNORM_INLINE Pack<double> add_times(At at, const Pack<double>& v, Each<float> weight, const Pack<double>& sum) {
  return add_exact_product(v, at.template load<double>(weight.values), sum);
}

// The sums of kRows sets of float32 data and their part of the parameters' gradients, in one reading.
template <int kRows, class Weight>
FASTNORM_LOOPS inline void sum_rows(const float* const* x, const float* const* dy, int64_t n, const Statistic* s,
                                    Weight weight, const ParameterSums* params, SegmentSums* totals, int64_t distance) {
  PackPair lanes[kRows];
  Size size[kRows];
  Pack<double> mean[kRows], rstd[kRows];
  for (int r = 0; r < kRows; ++r) {
    lanes[r] = PackPair{0.0, 0.0};
    mean[r] = Pack<double>(s[r].mean);
    rstd[r] = Pack<double>(s[r].rstd);
  }
  const auto add = [&](auto at, int r, PackPair& gradient) {
    prefetch(x[r] + at.start, distance);
    prefetch(dy[r] + at.start, distance);
    const Pack<double> g = at.template load<double>(dy[r]);
    const Pack<double> g_xhat = g * ((at.template load<double>(x[r]) - mean[r]) * rstd[r]);
    lanes[r].first = add_times(at, g, weight, lanes[r].first);
    lanes[r].second += times(at, g_xhat, weight);
    size[r].add(at, dy[r]);
    gradient.first = add_exact_product(g, Pack<double>(1.0), gradient.first);  // an addition, where units are free
    gradient.second += g_xhat;
  };
  if (params) {
    const ParameterSums to = *params;
    for_packs(n, [&](auto at) {
      PackPair gradient{at.template load<double>(to.dbias), at.template load<double>(to.dweight)};
      FASTNORM_UNROLL
      for (int r = 0; r < kRows; ++r) add(at, r, gradient);
      at.store(to.dbias, gradient.first);
      at.store(to.dweight, gradient.second);
    });
  } else {
    for_packs(n, [&](auto at) {
      PackPair unwanted{0.0, 0.0};
      FASTNORM_UNROLL
      for (int r = 0; r < kRows; ++r) add(at, r, unwanted);
    });
  }
  for (int r = 0; r < kRows; ++r) {
    const Pair sums = fold(lanes[r]);
    totals[r].dy.add(sums.first);
    totals[r].dy_xhat.add(sums.second);
    totals[r].size += size[r].total();
  }
}

template <class T>
class RowBackward {
 public:
  RowBackward(const Plan& plan, const NormArgs<T>& args)
      : plan_(plan),
        args_(args),
        run_(shared_run<T>(plan, {&plan.x, &plan.dy, &plan.dx})),
        units_(units_per_set(plan)),
        together_(!kMayOverflow<T> && run_ == plan.elements && plan.elements <= kTogetherElements &&
                  plan.params == plan.params_per_set) {
    if (plan.params == plan.params_per_set) plain_weights_ = plain_weights(0);
  }

  Statistic statistic(int64_t set) const { return kept_statistic(plan_, args_, set); }

  // Sets [begin, end), which are of one group; `params` nullptr: no gradients of parameters wanted.
  void sets(int64_t begin, int64_t end, const ParameterSums* params) const {
    int64_t set = begin;
    if constexpr (!kMayOverflow<T>) {
      for (; together_ && set + kRowsTogether <= end; set += kRowsTogether) rows<kRowsTogether>(set, params);
      for (; together_ && set < end; ++set) rows<1>(set, params);
    }
    for (; set < end; ++set) {
      const Statistic s = statistic(set);
      SegmentSums total;
      for (int64_t unit = 0; unit < units_; ++unit) total.add(sums(set, unit, s));
      for (int64_t unit = 0; unit < units_; ++unit) {
        if (params) parameters(set, unit, s, *params);
        gradient(set, unit, s, total);
      }
    }
  }

  SegmentSums sums(int64_t set, int64_t unit, const Statistic& s) const {
    SegmentSums total;
    const T* weight = args_.weight ? args_.weight + plan_.set_param.offset(set) : nullptr;
    with_weight(weight, 0, [&](auto) {
      if (weight) {
        total = unit_sums<T>(plan_, run_, set, unit, s, [=](int64_t first) { return Each<T>{weight + first}; });
      } else {
        total = unit_sums<T>(plan_, run_, set, unit, s, [](int64_t) { return None{}; });
      }
    });
    return total;
  }

  // One unit's part of the parameters' gradients. A unit is a range of parameters: units of a set share none.
  void parameters(int64_t set, int64_t unit, const Statistic& s, ParameterSums params) const {
    const int64_t param = plan_.set_param.offset(set);
    const Operands<2, false> operands{{&plan_.x, &plan_.dy}, nullptr};
    visit_unit<T>(plan_, operands, run_, set, unit, [&](const T* const* in, T*, int64_t first, int64_t n) {
      add_parameter_gradients(in[0], in[1], n, s, params.from(param + first));
    });
  }

  void gradient(int64_t set, int64_t unit, const Statistic& s, const SegmentSums& total) const {
    const GradientMeans means = means_of(set, s, total);
    const T* weight = args_.weight ? args_.weight + plan_.set_param.offset(set) : nullptr;
    const Operands<2, true> operands{{&plan_.x, &plan_.dy}, &plan_.dx};
    visit_unit<T>(plan_, operands, run_, set, unit, [&](const T* const* in, T* dx, int64_t first, int64_t n) {
      with_weight(weight, first, [&](auto w) { write(in[0], in[1], dx, n, s, means, w, args_.past_cache); });
    });
  }

 private:
  // Are the weights from `param` on such that float32 does? (Those of a set alone: others must not change its bits.)
  bool plain_weights(int64_t param) const {
    bool plain = true;
    for (int64_t p = 0; args_.weight && p < plan_.params_per_set; ++p) {
      plain = plain && moderate(static_cast<double>(args_.weight[param + p]));
    }
    return plain;
  }

  GradientMeans means_of(int64_t set, const Statistic& s, const SegmentSums& total) const {
    const bool plain_weights_here =
        plan_.params == plan_.params_per_set ? plain_weights_ : plain_weights(plan_.set_param.offset(set));
    return GradientMeans::of<T>(total.dy, total.dy_xhat, total.size, static_cast<double>(plan_.elements), args_.centred,
                                plain_weights_here, s);
  }

  template <class Weight>
  FASTNORM_LOOPS static void write(const T* x, const T* dy, T* dx, int64_t n, const Statistic& s,
                                   const GradientMeans& means, Weight weight, bool past_cache) {
    const auto along = [&](const auto& gradient) {
      for_stored_packs(past_cache, dx, n, [&](auto at, auto out) { out.store(at, dx, gradient(at, x, dy)); });
    };
    if constexpr (!kMayOverflow<T>) {
      if (means.in_float) return along(InputGradient<T, T, Weight>(s, means.a, means.b, weight));
    }
    along(InputGradient<T, double, Weight>(s, means.a, means.b, weight));
  }

  template <int kRows>
  void rows(int64_t set, const ParameterSums* params) const {
    const float *x[kRows], *dy[kRows];
    Statistic s[kRows];
    SegmentSums totals[kRows];
    for (int r = 0; r < kRows; ++r) {
      x[r] = Line<float>(plan_.x, set + r, 0, run_).at(0, 0);
      dy[r] = Line<float>(plan_.dy, set + r, 0, run_).at(0, 0);
      s[r] = statistic(set + r);
    }
    const int64_t param = plan_.set_param.offset(set);
    const T* weight = args_.weight ? args_.weight + param : nullptr;
    ParameterSums to{};
    if (params) to = params->from(param);
    with_weight(weight, 0, [&](auto w) {
      sum_rows<kRows>(x, dy, plan_.elements, s, w, params ? &to : nullptr, totals, distance_);
      for (int r = 0; r < kRows; ++r) {
        T* dx = Line<float>(plan_.dx, set + r, 0, run_).at(0, 0);
        write(x[r], dy[r], dx, plan_.elements, s[r], means_of(set + r, s[r], totals[r]), w, args_.past_cache);
      }
    });
  }

  const Plan& plan_;
  const NormArgs<T>& args_;
  const int64_t run_, units_;
  const int64_t distance_ = reading_ahead<T>(plan_, plan_.x, run_);
  const bool together_;
  bool plain_weights_ = true;
};

template <class T>
bool row_backward(const Plan& plan, const NormArgs<T>& args) {
  const int64_t units = units_per_set(plan), params = plan.params;
  const bool want_params = args.dweight || args.dbias;
  const int64_t per_group = kSetsPerGroup<T> * (params / plan.params_per_set);
  const int64_t groups = (plan.sets + per_group - 1) / per_group;
  const bool split = plan.threads > 1 && groups < 2 * plan.threads && units > 1;
  const Workspace<double> partial(want_params ? groups * 2 * params : 0);
  const Workspace<SegmentSums> sums(split ? plan.sets * units : 0);
  if (!partial || !sums) return false;

  const RowBackward<T> backward(plan, args);
  const auto group_params = [&](int64_t group) {
    double* rows = partial.data() + group * 2 * params;
    return ParameterSums{rows, rows + params};
  };

  if (split) {
    // Few sets, long ones: first all sums, then every unit (a range of parameters) walks over the sets.
    parallel_for(plan.threads, plan.sets * units, [&](int64_t i) {
      const int64_t set = i / units;
      sums[i] = backward.sums(set, i % units, backward.statistic(set));
    });
    for (int64_t set = 0; set < plan.sets; ++set) {
      SegmentSums total;
      for (int64_t unit = 0; unit < units; ++unit) total.add(sums[set * units + unit]);
      sums[set * units] = total;
    }
    for_results(plan, args, units, [&](int64_t unit) {
      for (int64_t set = 0; set < plan.sets; ++set) {
        const Statistic s = backward.statistic(set);
        if (want_params) backward.parameters(set, unit, s, group_params(set / per_group));
        backward.gradient(set, unit, s, sums[set * units]);
      }
    });
    if (args.finished) args.finished(args.context, 0, plan.sets);
  } else {
    for_results(plan, args, groups, [&](int64_t group) {
      const ParameterSums to = want_params ? group_params(group) : ParameterSums{};
      const int64_t end = (group + 1) * per_group, last = end < plan.sets ? end : plan.sets;
      const int64_t step = args.finished ? args.sets_at_once : per_group;
      for (int64_t set = group * per_group; set < last; set += step) {
        const int64_t stop = set + step < last ? set + step : last;
        backward.sets(set, stop, want_params ? &to : nullptr);
        if (args.finished) args.finished(args.context, set, stop);
      }
    });
  }

  if (want_params) {
    constexpr int64_t kStrip = 1024;
    parallel_for(plan.threads, (params + kStrip - 1) / kStrip, [&](int64_t strip) {
      for (int64_t p = strip * kStrip; p < params && p < (strip + 1) * kStrip; ++p) {
        Sum dweight, dbias;
        for (int64_t group = 0; group < groups; ++group) {
          dweight.add(partial[group * 2 * params + p]);
          dbias.add(partial[(group * 2 + 1) * params + p]);
        }
        if (args.dweight) args.dweight[p] = static_cast<T>(dweight.value());
        if (args.dbias) args.dbias[p] = static_cast<T>(dbias.value());
      }
    });
  }
  return true;
}

}  // namespace
}  // namespace fastnorm
