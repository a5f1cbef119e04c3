// The normalisation kernels' entry points. Shapes and strides are in the Plan; what is not an array of x's shape is
// here.
#pragma once

#include "plan.hpp"

namespace fastnorm {

// Statistics are indexed by set (C order over the SET axes), parameters as in x's PARAM axes order (Plan::param_order).
template <class T>
struct NormArgs {
  const T* weight = nullptr;  // (params), nullptr: 1
  const T* bias = nullptr;    // (params), nullptr: 0
  double eps = 0;
  bool centred = true;          // false: RMS norm, mean taken as 0
  bool past_cache = false;      // the result is written past the caches: it would only push out what is still needed
  bool from_memory = false;     // if it is: what it is made of comes from memory, too large for the caches itself
  bool constant_stats = false;  // backward through given statistics (batch norm in evaluation mode)
  // (sets). mean + mean_lo is the mean to twice the precision of float64, and so is rstd + rstd_lo; nullptr: 0
  double* mean = nullptr;
  double* mean_lo = nullptr;
  double* var = nullptr;  // biased; may be nullptr
  double* rstd = nullptr;
  double* rstd_lo = nullptr;
  T* dweight = nullptr;  // (params), nullptr: not wanted
  T* dbias = nullptr;
  // Family::row's backward alone: called as soon as dx of sets [begin, end) is written, from the thread that wrote it;
  // about sets_at_once of them at a time.
  void (*finished)(const void* context, int64_t begin, int64_t end) = nullptr;
  const void* context = nullptr;
  int64_t sets_at_once = 1;
};

// Every kernel returns false when memory for its workspace could not be had, and has then written nothing.
template <class T>
struct NormKernels {
  // mean, mean_lo and var (here: the sum of squared deviations m2) of every set of x
  bool (*moments)(const Plan& plan, const NormArgs<T>& args);
  // y = (x - mean) * rstd * weight + bias; fills mean, mean_lo, var, rstd, rstd_lo
  bool (*forward)(const Plan& plan, const NormArgs<T>& args);
  // the same from given mean, mean_lo and rstd (and no rstd_lo)
  bool (*apply)(const Plan& plan, const NormArgs<T>& args);
  // dx, dweight, dbias from dy, x, mean, mean_lo, rstd, rstd_lo
  bool (*backward)(const Plan& plan, const NormArgs<T>& args);
};

}  // namespace fastnorm
