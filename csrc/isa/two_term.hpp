// Sums and products with what rounding took from them.
#pragma once

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

// Exact either way: by one fused instruction, or Dekker's many steps where there is none.
inline TwoTerm two_product(double a, double b) {
  const double product = a * b;
#if defined(__FMA__)
  return {product, __builtin_fma(a, b, -product)};
#else
  const double a_scaled = 134217729.0 * a, b_scaled = 134217729.0 * b;
  const double a_hi = a_scaled - (a_scaled - a), b_hi = b_scaled - (b_scaled - b);
  const double a_lo = a - a_hi, b_lo = b - b_hi;
  return {product, ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo};
#endif
}

}  // namespace
}  // namespace fastnorm
