// The kernels behind the table: each hands the plan to the family that reads this layout well.
#pragma once

#include "isa/column_backward.hpp"
#include "isa/row_norm.hpp"

namespace fastnorm {
namespace {

template <class T>
bool moments(const Plan& plan, const NormArgs<T>& args) {
  return plan.family == Family::column ? column_moments(plan, args) : set_only_moments(plan, args);
}

template <class T>
bool forward(const Plan& plan, const NormArgs<T>& args) {
  return plan.family == Family::column ? column_forward(plan, args) : set_forward(plan, args);
}

template <class T>
bool apply(const Plan& plan, const NormArgs<T>& args) {
  return plan.family == Family::column ? column_apply(plan, args) : set_apply(plan, args);
}

template <class T>
bool backward(const Plan& plan, const NormArgs<T>& args) {
  switch (plan.family) {
    case Family::column:
      return column_backward(plan, args);
    case Family::channel:
      return channel_backward(plan, args);
    default:
      return row_backward(plan, args);
  }
}

}  // namespace
}  // namespace fastnorm
