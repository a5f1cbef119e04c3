// Normal variates from Philox words by Box and Muller, in double, with only +, -, *, / and sqrt.
// Promises the same bits at every instruction-set level and on every IEEE platform, which the C library's log, sin and
// cos do not; each variate is within 4 * 2^-53 of its pair's radius of the exact one (3.1 the worst of 8 million).
#pragma once

#include <cmath>
#include <cstring>

#include "isa/philox.hpp"

namespace fastnorm {
namespace {

[[gnu::always_inline]] inline double as_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[gnu::always_inline]] inline uint64_t as_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The upper 52 of 64 bits as a multiple of 2^-52 in [0, 1): they become the fraction of a double in [1, 2).
[[gnu::always_inline]] inline double unit_interval(uint32_t high, uint32_t low) {
  const uint64_t fraction = uint64_t{high} << 20 | low >> 12;
  return as_double(0x3FF0000000000000u | fraction) - 1.0;
}

// log(v) for normal v in (0, 1]. v = 2^e * m with m in [1/sqrt(2), sqrt(2)), log(m) = 2 atanh(s), s = (m - 1) / (m +
// 1): |s| < 0.1716, so the atanh series to s^21 leaves less than 2^-59 of its first term.
[[gnu::always_inline]] inline double log_unit(double v) {
  const uint64_t bits = as_bits(v);
  const uint64_t shifted = bits - 0x3FE6A09E667F3BCDu;  // sqrt(1/2): its exponent field now counts e
  const uint64_t exponent_field = shifted & 0xFFF0000000000000u;
  const double m = as_double(bits - exponent_field);
  // -e in [0, 53] becomes a double as the last bits of 2^52 - e: AVX2 cannot convert 64-bit integers.
  const uint64_t minus_e = (0u - exponent_field) >> 52;
  const double e = 4503599627370496.0 - as_double(0x4330000000000000u | minus_e);
  const double f = m - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s;
  double series = 1.0 / 21.0;
  series = series * z + 1.0 / 19.0;
  series = series * z + 1.0 / 17.0;
  series = series * z + 1.0 / 15.0;
  series = series * z + 1.0 / 13.0;
  series = series * z + 1.0 / 11.0;
  series = series * z + 1.0 / 9.0;
  series = series * z + 1.0 / 7.0;
  series = series * z + 1.0 / 5.0;
  series = series * z + 1.0 / 3.0;
  const double tail = 2.0 * s * (z * series);
  // log(2) in two parts, the first with 32 bits, so that e * log2_high is exact.
  constexpr double log2_high = 0x1.62e42fefp-1, log2_low = 0x1.473de6af278edp-34;
  return e * log2_high + (2.0 * s + (tail + e * log2_low));
}

struct NormalPair {
  double even, odd;
};

// sqrt(-2 log(1 - a)) * (cos, sin)(2 pi b), a and b being uniform in [0, 1).
[[gnu::always_inline]] inline NormalPair box_muller(const PhiloxWords& w) {
  const double radius = std::sqrt(-2.0 * log_unit(1.0 - unit_interval(w.w0, w.w1)));
  // Quarter turns: the nearest integer by adding 1.5 * 2^52, whose last bits then hold it; the rest is exact.
  const double turns = 4.0 * unit_interval(w.w2, w.w3);
  const double rounded = turns + 6755399441055744.0;
  const uint64_t quarter = as_bits(rounded);
  const double angle = (turns - (rounded - 6755399441055744.0)) * 0x1.921fb54442d18p+0;
  const double z = angle * angle;
  double s = 1.0 / 355687428096000.0;  // 1 / 17!
  s = s * z - 1.0 / 1307674368000.0;
  s = s * z + 1.0 / 6227020800.0;
  s = s * z - 1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  const double sine = angle + angle * (z * s);
  double c = 1.0 / 20922789888000.0;  // 1 / 16!
  c = c * z - 1.0 / 87178291200.0;
  c = c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  const double cosine = 1.0 + (z * z * c - 0.5 * z);
  // Turn by `quarter` quarters: swap on odd ones, then the signs.
  const bool odd = (quarter & 1) != 0;
  const uint64_t cos_sign = ((quarter + 1) & 2) << 62, sin_sign = (quarter & 2) << 62;
  const double x = as_double(as_bits(odd ? sine : cosine) ^ cos_sign);
  const double y = as_double(as_bits(odd ? cosine : sine) ^ sin_sign);
  return {radius * x, radius * y};
}

// z[i] = variate of element 2 * block + i, for the 2 * kGroupBlocks elements of one group.
inline void normal_group(double* z, uint64_t block, const PhiloxStream& stream) {
  uint32_t words[4][kGroupBlocks];
  philox_group(words, block, kNoiseDomain, stream);
#pragma omp simd
  for (int j = 0; j < kGroupBlocks; ++j) {
    const NormalPair pair = box_muller({words[0][j], words[1][j], words[2][j], words[3][j]});
    z[2 * j] = pair.even;
    z[2 * j + 1] = pair.odd;
  }
}

}  // namespace
}  // namespace fastnorm
