// Sums and products with what rounding took from them.
#pragma once

#include <cmath>

namespace fastnorm {
namespace {

struct TwoTerm {  // value + error, unevaluated
  double hi, lo;
};

inline TwoTerm two_sum(double a, double b) {
  const double sum = a + b;
  const double part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}

// The same bits either way: by one fused instruction, or Dekker's many steps where there is none, which take small and
// large numbers times a power of two: none of their parts may underflow or overflow.
inline TwoTerm two_product(double a, double b) {
  const double product = a * b;
#if defined(__FMA__)
  return {product, __builtin_fma(a, b, -product)};
#else
  const double a_size = std::fabs(a), b_size = std::fabs(b);
  const double a_up = a_size < 0x1p-300 ? 0x1p600 : a_size > 0x1p600 ? 0x1p-600 : 1;
  const double b_up = b_size < 0x1p-300 ? 0x1p600 : b_size > 0x1p600 ? 0x1p-600 : 1;
  const double a_near = a * a_up, b_near = b * b_up;
  // A small number times a large one is not scaled, but its factors are.
  const bool scaled = a_up * b_up != 1;
  const double near = scaled ? product * a_up * b_up : a_near * b_near;
  const double a_split = 134217729.0 * a_near, b_split = 134217729.0 * b_near;
  const double a_hi = a_split - (a_split - a_near), b_hi = b_split - (b_split - b_near);
  const double a_lo = a_near - a_hi, b_lo = b_near - b_hi;
  const double lost = ((a_hi * b_hi - near) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo;
  return {product, lost * (scaled ? 1 / a_up : 1) * (scaled ? 1 / b_up : 1)};
#endif
}

}  // namespace
}  // namespace fastnorm
