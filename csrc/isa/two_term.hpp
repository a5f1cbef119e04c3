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

// The same bits either way: by one fused instruction, or Dekker's many steps where there is none, which take small
// numbers times a power of two: none of their parts may underflow.
inline TwoTerm two_product(double a, double b) {
  const double product = a * b;
#if defined(__FMA__)
  return {product, __builtin_fma(a, b, -product)};
#else
  const double a_up = std::fabs(a) < 0x1p-300 ? 0x1p600 : 1, b_up = std::fabs(b) < 0x1p-300 ? 0x1p600 : 1;
  const double a_down = std::fabs(a) < 0x1p-300 ? 0x1p-600 : 1, b_down = std::fabs(b) < 0x1p-300 ? 0x1p-600 : 1;
  const double large_a = a * a_up, large_b = b * b_up, large = product * a_up * b_up;
  const double a_scaled = 134217729.0 * large_a, b_scaled = 134217729.0 * large_b;
  const double a_hi = a_scaled - (a_scaled - large_a), b_hi = b_scaled - (b_scaled - large_b);
  const double a_lo = large_a - a_hi, b_lo = large_b - b_hi;
  return {product, (((a_hi * b_hi - large) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo) * a_down * b_down};
#endif
}

}  // namespace
}  // namespace fastnorm
