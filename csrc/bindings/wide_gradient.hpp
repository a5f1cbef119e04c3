// Float64 gradients that overflow on the way to a finite result, dy or dy * weight being next to the largest number
// there is: made again from the formulas in long double, which reaches further on x86 and wherever it is not a double.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "norm_kernels.hpp"
#include "plan.hpp"

namespace fastnorm {

// A sum and what rounding has taken from it.
class WideSum {
 public:
  void add(long double term) {
    const long double sum = sum_ + term, back = sum - sum_;
    lost_ += (sum_ - (sum - back)) + (term - back);
    sum_ = sum;
  }
  long double value() const { return sum_ + lost_; }

 private:
  long double sum_ = 0, lost_ = 0;
};

// Replaces what is not finite: dx of a set, or of a value where statistics are given, and a parameter's gradient. Set
// by set and parameter by parameter, which takes next to no memory but some tens of nanoseconds for each value.
// `weight`, and dweight and dbias if they are wanted, in C order. dx does not overlap dy.
class WideGradient {
 public:
  static constexpr bool kReachesFurther =
      std::numeric_limits<long double>::max_exponent > std::numeric_limits<double>::max_exponent;

  WideGradient(const PlanInput& in, const NormArgs<double>& args, const double* weight, double* dweight, double* dbias)
      : in_(in), args_(args), weight_(weight), dweight_(dweight), dbias_(dbias) {
    // Parameters as a plan numbers them: PARAM axes, outside of them those of SET axes that own some.
    int64_t params = 1;
    for (const Role role : {Role::param, Role::set}) {
      for (int axis = in.rank - 1; axis >= 0; --axis) {
        if (!owns(axis) || in.role[axis] != role) continue;
        param_stride_[axis] = params;
        params *= in.size[axis];
      }
    }
    for (int axis = 0; axis < in.rank; ++axis) {
      const bool of_sets = in.role[axis] == Role::set;
      (of_sets ? across_sets_ : within_set_).push(axis);
      (owns(axis) ? across_params_ : within_param_).push(axis);
      if (!of_sets) set_size_ *= in.size[axis];
    }
  }

  void mend() {
    each(across_sets_, [&](const Place& set) {
      mend_set(set);
      if (dweight_ && !std::isnormal(args_.rstd[set.set])) beyond_[set.set] = measured(set);
    });
    if (dweight_ || dbias_) each(across_params_, [&](const Place& param) { mend_param(param); });
  }

 private:
  struct Axes {
    int count = 0;
    int axis[kMaxRank];
    void push(int a) { axis[count++] = a; }
  };
  struct Place {
    int64_t set, param;
    int64_t x, dy, dx;  // bytes
  };
  struct Wide {
    long double mean, rest, rstd;  // of a set: mean + rest, for one number does not hold what is far from 0
  };

  bool owns(int axis) const {
    return in_.role[axis] == Role::param || (in_.role[axis] == Role::set && in_.set_owns_param[axis]);
  }

  // visit(place) along some axes, from a place on.
  template <class Visit>
  void each(const Axes& axes, const Visit& visit, Place at = Place{}, int depth = 0) const {
    if (axes.count == 0) return visit(at);
    const int axis = axes.axis[depth];
    for (int64_t i = 0; i < in_.size[axis]; ++i) {
      depth + 1 == axes.count ? visit(at) : each(axes, visit, at, depth + 1);
      if (in_.role[axis] == Role::set) at.set += in_.set_stride[axis];
      at.param += param_stride_[axis];
      at.x += in_.x.stride[axis];
      at.dy += in_.dy.stride[axis];
      at.dx += in_.dx.stride[axis];
    }
  }
  // The sum of term(place) along some axes, from a place on.
  template <class Term>
  long double sum(const Axes& axes, const Place& from, const Term& term) const {
    WideSum total;
    each(axes, [&](const Place& at) { total.add(term(at)); }, from);
    return total.value();
  }

  static double load(const PlanInput::Array& array, int64_t offset) {
    double value;
    std::memcpy(&value, array.data + offset, sizeof value);
    return value;
  }
  long double x(const Place& at) const { return load(in_.x, at.x); }
  long double dy(const Place& at) const { return load(in_.dy, at.dy); }
  long double g(const Place& at) const { return dy(at) * weight_[at.param]; }
  long double centred(const Wide& of, const Place& at) const { return (x(at) - of.mean) - of.rest; }
  long double xhat(const Wide& of, const Place& at) const { return centred(of, at) * of.rstd; }
  bool broken(const Place& at) const { return !std::isfinite(load(in_.dx, at.dx)); }

  void put(const Place& at, long double dx) const {
    const double rounded = static_cast<double>(dx);
    std::memcpy(in_.dx.data + at.dx, &rounded, sizeof rounded);
  }

  Wide kept(int64_t set) const {
    const auto found = beyond_.find(set);
    if (found != beyond_.end()) return found->second;
    const auto part = [set](const double* of) { return of ? static_cast<long double>(of[set]) : 0.0L; };
    return {part(args_.mean), part(args_.mean_lo), part(args_.rstd) + part(args_.rstd_lo)};
  }
  // Those of a set anew: what float64 keeps of them may be next to its limits as well.
  Wide measured(const Place& set) const {
    const long double count = static_cast<long double>(set_size_);
    Wide of = kept(set.set);
    if (args_.centred) of.rest = sum(within_set_, set, [&](const Place& at) { return x(at) - of.mean; }) / count;
    const auto square = [&](const Place& at) { return centred(of, at) * centred(of, at); };
    const long double var = sum(within_set_, set, square) / count + args_.eps;
    of.rstd = var == 0 ? 0 : 1 / std::sqrt(var);  // NaN goes on
    return of;
  }

  void mend_set(const Place& set) const {
    if (args_.constant_stats) {  // dx is a product with dy, whatever x is
      const long double rstd = args_.rstd[set.set];
      const auto mend = [&](const Place& at) {
        if (broken(at) && std::isfinite(rstd * g(at))) put(at, rstd * g(at));
      };
      return each(within_set_, mend, set);
    }
    bool any = false;
    each(within_set_, [&](const Place& at) { any = any || broken(at); }, set);
    if (!any) return;
    const long double count = static_cast<long double>(set_size_);
    const Wide of = measured(set);
    const long double a = args_.centred ? sum(within_set_, set, [&](const Place& at) { return g(at); }) / count : 0;
    const long double b = sum(within_set_, set, [&](const Place& at) { return g(at) * xhat(of, at); }) / count;
    if (!std::isfinite(a) || !std::isfinite(b)) return;  // x or dy is not finite
    each(within_set_, [&](const Place& at) { put(at, of.rstd * ((g(at) - a) - xhat(of, at) * b)); }, set);
  }

  void mend_param(const Place& param) const {
    const auto mend = [&](double* gradients, const auto& term) {
      if (gradients == nullptr || std::isfinite(gradients[param.param])) return;
      const long double total = sum(within_param_, param, term);
      if (std::isfinite(total)) gradients[param.param] = static_cast<double>(total);
    };
    mend(dbias_, [&](const Place& at) { return dy(at); });
    mend(dweight_, [&](const Place& at) { return dy(at) * xhat(kept(at.set), at); });
  }

  const PlanInput& in_;
  const NormArgs<double>& args_;
  const double* weight_;
  double *dweight_, *dbias_;
  Axes across_sets_, within_set_, across_params_, within_param_;
  int64_t set_size_ = 1, param_stride_[kMaxRank] = {};
  std::map<int64_t, Wide> beyond_;  // sets whose rstd float64 does not hold, if dweight is wanted
};

}  // namespace fastnorm
