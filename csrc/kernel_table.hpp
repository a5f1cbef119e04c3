// One table of function pointers per instruction-set level: all that the rest of the library sees of csrc/isa.
#pragma once

#include "dropout_kernels.hpp"
#include "norm_kernels.hpp"

namespace fastnorm {

struct KernelTable {
  const char* level;
  NormKernels<float> norm_float32;
  NormKernels<double> norm_float64;
  DropoutKernels<float> dropout_float32;
  DropoutKernels<double> dropout_float64;
  // rstd = 1 / sqrt(var + eps) of given variances, 0 where that is 1 / 0, also where the sum is beyond float64; var may
  // be rstd. False where one of them is negative. (Here for its loop over channels: float32 of 64 x 256 3.5 us to 2.9.)
  bool (*given_rstds)(const double* var, int64_t count, double eps, double* rstd);
};

// The table in use, and the choice of it. `select` returns false for a level that this build or this CPU lacks.
const KernelTable& kernels();
bool select(const char* level);

// Levels of this build, best first, up to `compiled_level(i) == nullptr`.
const char* compiled_level(int index);

template <class T>
const NormKernels<T>& norm_kernels();
template <>
inline const NormKernels<float>& norm_kernels<float>() {
  return kernels().norm_float32;
}
template <>
inline const NormKernels<double>& norm_kernels<double>() {
  return kernels().norm_float64;
}

template <class T>
const DropoutKernels<T>& dropout_kernels();
template <>
inline const DropoutKernels<float>& dropout_kernels<float>() {
  return kernels().dropout_float32;
}
template <>
inline const DropoutKernels<double>& dropout_kernels<double>() {
  return kernels().dropout_float64;
}

}  // namespace fastnorm
