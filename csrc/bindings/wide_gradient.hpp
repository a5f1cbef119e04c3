// Float64 gradients that overflow on the way to a finite result, dy or dy * weight being next to the largest number
// there is: made again from the formulas in long double, which reaches further on x86 and wherever it is not a double.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

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

// Replaces what is not finite: all of dx of a set (through given statistics a value alone), a parameter's gradient.
// `weight`, and dweight and dbias if they are wanted, in C order. dx does not overlap dy.
class WideGradient {
 public:
  WideGradient(const PlanInput& in, const NormArgs<double>& args, const double* weight, double* dweight, double* dbias)
      : in_(in), args_(args), weight_(weight), dweight_(dweight), dbias_(dbias) {
    // As a plan numbers them: PARAM axes, outside of them those of SET axes with parameters of their own.
    for (const Role role : {Role::param, Role::set}) {
      for (int axis = in.rank - 1; axis >= 0; --axis) {
        if (in.role[axis] != role || (role == Role::set && !in.set_owns_param[axis])) continue;
        param_stride_[axis] = params_;
        params_ *= in.size[axis];
      }
    }
    for (int axis = 0; axis < in.rank; ++axis) (in.role[axis] == Role::set ? sets_ : set_size_) *= in.size[axis];
  }

  void mend() {
    std::vector<Set> sets(static_cast<size_t>(sets_));
    bool any = false;
    each([&](const Place& at) {
      if (std::isfinite(load(in_.dx, at.dx))) return;
      sets[at.set].wanted = any = true;
    });
    std::vector<Param> params(static_cast<size_t>(dweight_ || dbias_ ? params_ : 0));
    for (size_t p = 0; p < params.size(); ++p) {
      params[p].wanted = (dweight_ && !std::isfinite(dweight_[p])) || (dbias_ && !std::isfinite(dbias_[p]));
      any = any || params[p].wanted;
    }
    if (!any) return;
    take_statistics(sets);
    sum(sets, params);
    write(sets);
    for (size_t p = 0; p < params.size(); ++p) {
      if (!params[p].wanted) continue;
      replace(dweight_, p, params[p].dy_xhat.value());
      replace(dbias_, p, params[p].dy.value());
    }
  }

 private:
  struct Set {
    bool wanted = false;
    long double mean = 0, rstd = 0;
    WideSum total, g, g_xhat;  // total: of what a statistic is made from
  };
  struct Param {
    bool wanted = false;
    WideSum dy, dy_xhat;
  };
  struct Place {
    size_t set = 0, param = 0;
    int64_t x = 0, dy = 0, dx = 0;  // bytes
  };

  template <class Visit>
  void each(const Visit& visit, int axis, Place at) const {
    if (axis == in_.rank) return visit(at);
    for (int64_t i = 0; i < in_.size[axis]; ++i) {
      each(visit, axis + 1, at);
      if (in_.role[axis] == Role::set) at.set += static_cast<size_t>(in_.set_stride[axis]);
      at.param += static_cast<size_t>(param_stride_[axis]);
      at.x += in_.x.stride[axis];
      at.dy += in_.dy.stride[axis];
      at.dx += in_.dx.stride[axis];
    }
  }
  template <class Visit>
  void each(const Visit& visit) const {
    each(visit, 0, Place{});
  }

  static double load(const PlanInput::Array& array, int64_t offset) {
    double value;
    std::memcpy(&value, array.data + offset, sizeof value);
    return value;
  }
  long double x(const Place& at) const { return load(in_.x, at.x); }
  long double dy(const Place& at) const { return load(in_.dy, at.dy); }
  long double g(const Place& at) const { return dy(at) * weight_[at.param]; }
  long double xhat(const Set& set, const Place& at) const { return (x(at) - set.mean) * set.rstd; }

  // Those of wanted sets anew, for what float64 keeps of them may be next to its limits as well.
  void take_statistics(std::vector<Set>& sets) const {
    const long double count = static_cast<long double>(set_size_);
    for (size_t i = 0; i < sets.size(); ++i) {
      sets[i].mean = args_.mean ? args_.mean[i] : 0;
      if (args_.mean_lo) sets[i].mean += args_.mean_lo[i];
      sets[i].rstd = args_.rstd[i];
    }
    if (args_.constant_stats) return;
    if (args_.centred) {
      each([&](const Place& at) {
        if (sets[at.set].wanted) sets[at.set].total.add(x(at) - sets[at.set].mean);
      });
      for (Set& set : sets) {
        set.mean += set.total.value() / count;
        set.total = WideSum();
      }
    }
    each([&](const Place& at) {
      const long double d = x(at) - sets[at.set].mean;
      if (sets[at.set].wanted) sets[at.set].total.add(d * d);
    });
    for (Set& set : sets) {
      const long double var = set.total.value() / count + args_.eps;
      if (set.wanted) set.rstd = var > 0 ? 1 / std::sqrt(var) : 0;
    }
  }

  void sum(std::vector<Set>& sets, std::vector<Param>& params) const {
    each([&](const Place& at) {
      Set& set = sets[at.set];
      if (set.wanted && !args_.constant_stats) {
        if (args_.centred) set.g.add(g(at));
        set.g_xhat.add(g(at) * xhat(set, at));
      }
      if (params.empty() || !params[at.param].wanted) return;
      params[at.param].dy.add(dy(at));
      params[at.param].dy_xhat.add(dy(at) * xhat(set, at));
    });
  }

  void write(const std::vector<Set>& sets) const {
    const long double count = static_cast<long double>(set_size_);
    each([&](const Place& at) {
      const Set& set = sets[at.set];
      if (!set.wanted || (args_.constant_stats && std::isfinite(load(in_.dx, at.dx)))) return;
      const long double a = set.g.value() / count, b = set.g_xhat.value() / count;
      const long double dx = set.rstd * ((g(at) - a) - xhat(set, at) * b);
      const double rounded = static_cast<double>(dx);
      if (std::isfinite(a) && std::isfinite(b)) std::memcpy(in_.dx.data + at.dx, &rounded, sizeof rounded);
    });
  }

  static void replace(double* gradients, size_t p, long double value) {
    if (gradients && !std::isfinite(gradients[p]) && std::isfinite(value)) gradients[p] = static_cast<double>(value);
  }

  const PlanInput& in_;
  const NormArgs<double>& args_;
  const double* weight_;
  double *dweight_, *dbias_;
  int64_t sets_ = 1, set_size_ = 1, params_ = 1;
  int64_t param_stride_[kMaxRank] = {};
};

}  // namespace fastnorm
