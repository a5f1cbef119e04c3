// Sixteen values at a time, whatever the width of a register: a Pack is as many vectors of the compiler's own kind as
// it takes, so that a lane is the same lane at every instruction-set level and a kernel reads like its formula. The
// only place with intrinsics, and only for what vector types cannot say: a part of a vector, stores past the cache, and
// what the processor notes of lost digits. Where packs lie in memory is places.hpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "isa/two_term.hpp"
#include "noted.hpp"

namespace fastnorm {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kPack = 16;
constexpr int64_t kLineBytes = 64;  // of a cache
constexpr bool kManyRegisters = kVectorBytes == 64;

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

#define FASTNORM_UNROLL _Pragma("GCC unroll 16")
// Compilers give up inlining in a file as large as all kernels together: what works on packs is inlined in any case,
// and so is everything called in the functions that hold the loops. Not so at the baseline of x86-64, where a pack is
// many instructions and all of that half of the time a build takes (200 s, 90 without); its kernels, for processors of
// before 2013, are as fast or up to a third slower for it. Nor under sanitizers, which make each access many
// instructions.
#if defined(FASTNORM_SANITIZED)
#define FASTNORM_INLINE inline
#else
#define FASTNORM_INLINE inline __attribute__((always_inline))
#endif
#if (defined(__SSE2__) && !defined(__AVX__)) || defined(FASTNORM_SANITIZED)
#define FASTNORM_LOOPS
#else
#define FASTNORM_LOOPS __attribute__((flatten))
#endif

template <class C>
struct Pack {
  using Part = Vector<C, kVectorBytes>;
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(C));
  static constexpr int kParts = kPack / kWidth;
  Part part[kParts];

  Pack() = default;
  FASTNORM_INLINE Pack(C value) {  // NOLINT: a number stands for sixteen of it
    FASTNORM_UNROLL
    for (int k = 0; k < kParts; ++k) part[k] = value - Part{};
  }

#define FASTNORM_OPERATOR(op, assign)                                    \
  FASTNORM_INLINE Pack& operator assign(const Pack& other) {             \
    FASTNORM_UNROLL                                                      \
    for (int k = 0; k < kParts; ++k) part[k] = part[k] op other.part[k]; \
    return *this;                                                        \
  }                                                                      \
  FASTNORM_INLINE friend Pack operator op(Pack a, const Pack& b) { return a assign b; }
  FASTNORM_OPERATOR(+, +=)
  FASTNORM_OPERATOR(-, -=)
  FASTNORM_OPERATOR(*, *=)
#undef FASTNORM_OPERATOR
};

// Compilers take the conversions apart; the instructions exist.
template <class To, class From>
FASTNORM_INLINE To convert(const From& v) {
  return __builtin_convertvector(v, To);
}
#if defined(__AVX512F__)
template <>
FASTNORM_INLINE Vector<double, 64> convert(const Vector<float, 32>& v) {
  return _mm512_maskz_cvtps_pd(0xff, v);  // unmasked, GCC 12 warns about its own header
}
template <>
FASTNORM_INLINE Vector<float, 32> convert(const Vector<double, 64>& v) {
  return _mm512_maskz_cvtpd_ps(0xff, v);
}
#elif defined(__AVX__)
template <>
FASTNORM_INLINE Vector<double, 32> convert(const Vector<float, 16>& v) {
  return _mm256_cvtps_pd(v);
}
template <>
FASTNORM_INLINE Vector<float, 16> convert(const Vector<double, 32>& v) {
  return _mm256_cvtpd_ps(v);
}
#endif

// The same sixteen values in double.
FASTNORM_INLINE Pack<double> widen(const Pack<float>& pack) {
  using Half = Vector<float, kVectorBytes / 2>;
  Pack<double> wide;
  FASTNORM_UNROLL
  for (int k = 0; k < Pack<float>::kParts; ++k) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const Half low = _mm512_castps512_ps256(pack.part[k]), high = _mm512_extractf32x8_ps(pack.part[k], 1);
#elif defined(__AVX__)
    const Half low = _mm256_castps256_ps128(pack.part[k]), high = _mm256_extractf128_ps(pack.part[k], 1);
#else
    Half low, high;
    std::memcpy(&low, &pack.part[k], sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&pack.part[k]) + sizeof low, sizeof high);
#endif
    wide.part[2 * k] = convert<typename Pack<double>::Part>(low);
    wide.part[2 * k + 1] = convert<typename Pack<double>::Part>(high);
  }
  return wide;
}

// And back. Stored in halves, as places do it, a whole vector could not be read before both halves are in the cache.
FASTNORM_INLINE Pack<float> narrow(const Pack<double>& pack) {
  using Half = Vector<float, kVectorBytes / 2>;
  Pack<float> narrowed;
  FASTNORM_UNROLL
  for (int k = 0; k < Pack<float>::kParts; ++k) {
    const Half low = convert<Half>(pack.part[2 * k]), high = convert<Half>(pack.part[2 * k + 1]);
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    narrowed.part[k] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#elif defined(__AVX__)
    narrowed.part[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
#else
    std::memcpy(&narrowed.part[k], &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&narrowed.part[k]) + sizeof low, &high, sizeof high);
#endif
  }
  return narrowed;
}

// a * b + c, the product being exact in double, as that of two float32 values is: then one rounding or two give the
// same bits, and a level that has the fused instruction may use it.
FASTNORM_INLINE Pack<double> add_exact_product(const Pack<double>& a, const Pack<double>& b, const Pack<double>& c) {
#if defined(__AVX512F__)
  Pack<double> sum;
  for (int k = 0; k < Pack<double>::kParts; ++k) sum.part[k] = _mm512_fmadd_pd(a.part[k], b.part[k], c.part[k]);
  return sum;
#elif defined(__FMA__)
  Pack<double> sum;
  FASTNORM_UNROLL
  for (int k = 0; k < Pack<double>::kParts; ++k) sum.part[k] = _mm256_fmadd_pd(a.part[k], b.part[k], c.part[k]);
  return sum;
#else
  return a * b + c;
#endif
}

// What rounding took from the product a * b, in Dekker's steps, no part of which may vanish.
FASTNORM_INLINE Pack<double> lost_in_steps(const Pack<double>& a, const Pack<double>& b, const Pack<double>& product) {
  const Pack<double> split(134217729.0);
  const Pack<double> a_scaled = a * split, b_scaled = b * split;
  const Pack<double> a_hi = a_scaled - (a_scaled - a), b_hi = b_scaled - (b_scaled - b);
  const Pack<double> a_lo = a - a_hi, b_lo = b - b_hi;
  return ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo;
}

// What rounding took from the product a * b: exact either way, a fused instruction being one step instead of many.
FASTNORM_INLINE Pack<double> lost_in_product(const Pack<double>& a, const Pack<double>& b,
                                             const Pack<double>& product) {
#if defined(__AVX512F__) || defined(__FMA__)
  return add_exact_product(a, b, Pack<double>(0.0) - product);
#else
  using Bits = Vector<int64_t, kVectorBytes>;
  Pack<double> lost = lost_in_steps(a, b, product);
  for (int k = 0; k < Pack<double>::kParts; ++k) {
    const auto none = Pack<double>(0.0).part[k], x = a.part[k], y = b.part[k], xy = product.part[k];
    // Where parts of the steps vanish, they are left to the C library.
    const Bits vanishing = (xy < none + 0x1p-900) & (xy > none - 0x1p-900) & (x != none) & (y != none);
    for (int i = 0; i < Pack<double>::kWidth; ++i) {
      if (vanishing[i] != 0) lost.part[k][i] = __builtin_fma(x[i], y[i], -xy[i]);
    }
  }
  return lost;
#endif
}

#if !defined(__FP_FAST_FMA)
// a + b rounded to odd: the last bit says whether anything was lost, so that another rounding is as good as the only
// one.
inline Pack<double> add_to_odd(const Pack<double>& a, const Pack<double>& b) {
  using Bits = Vector<int64_t, kVectorBytes>;
  const Pack<double> sum = a + b, part = sum - a, lost = (a - (sum - part)) + (b - part);
  Pack<double> odd;
  for (int k = 0; k < Pack<double>::kParts; ++k) {
    const Bits bits = reinterpret_cast<Bits>(sum.part[k]), even = (bits & 1) - 1;
    const Bits inexact = reinterpret_cast<Bits>(lost.part[k] != Pack<double>(0.0).part[k]);
    // Away from zero if what was lost has the sign of the sum, else towards it.
    const Bits down = (bits ^ reinterpret_cast<Bits>(lost.part[k])) < 0;
    odd.part[k] = reinterpret_cast<Pack<double>::Part>(bits + (inexact & even & (1 + 2 * down)));
  }
  return odd;
}

// a * b + c rounded once, in Boldo and Melquiond's way.
[[gnu::noinline]] inline Pack<double> multiply_add_in_steps(const Pack<double>& a, const Pack<double>& b,
                                                            const Pack<double>& c) {
  using Bits = Vector<int64_t, kVectorBytes>;
  const Pack<double> product = a * b, plain = product + c;
  const Pack<double> lost = lost_in_steps(a, b, product);
  const Pack<double> low = c + lost, part = low - c, low_lost = (c - (low - part)) + (lost - part);
  const Pack<double> sum = product + low, rest = sum - product;
  const Pack<double> sum_lost = (product - (sum - rest)) + (low - rest);
  Pack<double> result = sum + add_to_odd(sum_lost, low_lost);
  for (int k = 0; k < Pack<double>::kParts; ++k) {
    const auto none = Pack<double>(0.0).part[k], x = a.part[k], y = c.part[k], sums = plain.part[k];
    const Bits nothing = reinterpret_cast<Bits>(y == none);
    const Bits bits = (reinterpret_cast<Bits>(sums) & nothing) | (reinterpret_cast<Bits>(result.part[k]) & ~nothing);
    result.part[k] = reinterpret_cast<Pack<double>::Part>(bits);
    // What the steps may overflow or underflow with, where there is something to add, is left to the C library.
    const Bits bounded = (x < none + 0x1p500) & (x > none - 0x1p500) & (sums < none + 0x1p900) &
                         (sums > none - 0x1p900) & ((y >= none + 0x1p-400) | (y <= none - 0x1p-400));
    for (int i = 0; i < Pack<double>::kWidth; ++i) {
      if ((bounded[i] | nothing[i]) == 0) result.part[k][i] = __builtin_fma(x[i], b.part[k][i], y[i]);
    }
  }
  return result;
}
#endif

// a * b + c rounded once, by the fused instruction, or by many where there is none: those want |b| below 2^990.
FASTNORM_INLINE Pack<double> multiply_add(const Pack<double>& a, const Pack<double>& b, const Pack<double>& c) {
#if defined(__AVX512F__) || defined(__FMA__)
  return add_exact_product(a, b, c);
#elif defined(__FP_FAST_FMA)
  Pack<double> sum;
  for (int k = 0; k < Pack<double>::kParts; ++k) {
    for (int i = 0; i < Pack<double>::kWidth; ++i) {
      sum.part[k][i] = __builtin_fma(a.part[k][i], b.part[k][i], c.part[k][i]);
    }
  }
  return sum;
#else
  return multiply_add_in_steps(a, b, c);
#endif
}

// The first `count` values at p (none if count <= 0, all if there is no more room), zeros after them; nothing else is
// read.
template <class V, class T>
FASTNORM_INLINE V load_first(const T* p, int64_t count) {
  V v{};
  for (int64_t i = 0; i < static_cast<int64_t>(sizeof(V) / sizeof(T)) && i < count; ++i) v[i] = p[i];
  return v;
}
template <class V, class T>
FASTNORM_INLINE void store_first(T* p, const V& v, int64_t count) {
  for (int64_t i = 0; i < static_cast<int64_t>(sizeof(V) / sizeof(T)) && i < count; ++i) p[i] = v[i];
}

// A sanitizer sees into no masked instruction: it gets the loops above.
#if defined(FASTNORM_SANITIZED)
#elif defined(__AVX512F__) && defined(__AVX512VL__)
FASTNORM_INLINE __mmask16 first_lanes(int64_t count) {
  const int64_t lanes = count > 16 ? 16 : count < 0 ? 0 : count;
  return static_cast<__mmask16>((1u << lanes) - 1);
}
template <>
FASTNORM_INLINE Vector<float, 64> load_first(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), p);
}
template <>
FASTNORM_INLINE Vector<float, 32> load_first(const float* p, int64_t count) {
  return _mm256_maskz_loadu_ps(static_cast<__mmask8>(first_lanes(count)), p);
}
template <>
FASTNORM_INLINE Vector<double, 64> load_first(const double* p, int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), p);
}
template <>
FASTNORM_INLINE void store_first(float* p, const Vector<float, 64>& v, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), v);
}
template <>
FASTNORM_INLINE void store_first(float* p, const Vector<float, 32>& v, int64_t count) {
  _mm256_mask_storeu_ps(p, static_cast<__mmask8>(first_lanes(count)), v);
}
template <>
FASTNORM_INLINE void store_first(double* p, const Vector<double, 64>& v, int64_t count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(count)), v);
}
#elif defined(__AVX2__)
alignas(32) constexpr int32_t kLaneMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
FASTNORM_INLINE __m256i first_lanes(int64_t count) {
  const int64_t lanes = count >= 8 ? 8 : count <= 0 ? 0 : count;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMask + 8 - lanes));
}
FASTNORM_INLINE __m256i first_wide_lanes(int64_t count) { return first_lanes(2 * count); }
template <>
FASTNORM_INLINE Vector<float, 32> load_first(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
template <>
FASTNORM_INLINE Vector<float, 16> load_first(const float* p, int64_t count) {
  return _mm_maskload_ps(p, _mm256_castsi256_si128(first_lanes(count)));
}
template <>
FASTNORM_INLINE Vector<double, 32> load_first(const double* p, int64_t count) {
  return _mm256_maskload_pd(p, first_wide_lanes(count));
}
template <>
FASTNORM_INLINE void store_first(float* p, const Vector<float, 32>& v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), v);
}
template <>
FASTNORM_INLINE void store_first(float* p, const Vector<float, 16>& v, int64_t count) {
  _mm_maskstore_ps(p, _mm256_castsi256_si128(first_lanes(count)), v);
}
template <>
FASTNORM_INLINE void store_first(double* p, const Vector<double, 32>& v, int64_t count) {
  _mm256_maskstore_pd(p, first_wide_lanes(count), v);
}
#endif

// The pack with zeros from lane `count` on.
template <class C>
FASTNORM_INLINE Pack<C> first_lanes_of(Pack<C> pack, int64_t count) {
  using Integer = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  using Bits = Vector<Integer, kVectorBytes>;
  Bits lane;
  FASTNORM_UNROLL
  for (int i = 0; i < Pack<C>::kWidth; ++i) lane[i] = i;
  FASTNORM_UNROLL
  for (int k = 0; k < Pack<C>::kParts; ++k) {
    const Bits there = lane + k * Pack<C>::kWidth < static_cast<Integer>(count);
    pack.part[k] = reinterpret_cast<typename Pack<C>::Part>(reinterpret_cast<Bits>(pack.part[k]) & there);
  }
  return pack;
}

template <class C>
FASTNORM_INLINE Pack<C> magnitude(Pack<C> pack) {
  using Integer = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  using Bits = Vector<Integer, kVectorBytes>;
  FASTNORM_UNROLL
  for (int k = 0; k < Pack<C>::kParts; ++k) {
    const Bits bits = reinterpret_cast<Bits>(pack.part[k]);
    pack.part[k] = reinterpret_cast<typename Pack<C>::Part>(bits & std::numeric_limits<Integer>::max());
  }
  return pack;
}

// The bits that are set in either: of numbers 0, of whatever sign, if all of them are.
FASTNORM_INLINE Pack<float> either(Pack<float> a, const Pack<float>& b) {
  using Bits = Vector<int32_t, kVectorBytes>;
  FASTNORM_UNROLL
  for (int k = 0; k < Pack<float>::kParts; ++k) {
    const Bits bits = reinterpret_cast<Bits>(a.part[k]) | reinterpret_cast<Bits>(b.part[k]);
    a.part[k] = reinterpret_cast<Pack<float>::Part>(bits);
  }
  return a;
}
FASTNORM_INLINE bool all_zero(const Pack<float>& pack) {
  float lanes[kPack];
  std::memcpy(lanes, &pack, sizeof lanes);
  int other = 0;
  for (float lane : lanes) other |= lane != 0 ? 1 : 0;
  return other == 0;
}

// Is all of a pack finite? What is not is not 0 less itself either.
FASTNORM_INLINE bool all_finite(const Pack<float>& pack) {
  const Pack<float> zero = pack - pack;
  Pack<float>::Part all = zero.part[0];
  FASTNORM_UNROLL
  for (int k = 1; k < Pack<float>::kParts; ++k) all += zero.part[k];
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(all, all, _CMP_UNORD_Q) == 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps(all, all, _CMP_UNORD_Q)) == 0;
#else
  bool finite = true;
  for (int lane = 0; lane < Pack<float>::kWidth; ++lane) finite = finite && all[lane] == 0;
  return finite;
#endif
}

// Loaded once: where registers are many, compilers would rather load a value for each of its uses.
template <class C>
FASTNORM_INLINE Pack<C> in_register(Pack<C> pack) {
#if defined(__AVX512F__)
  for (auto& part : pack.part) asm("" : "+v"(part));
#endif
  return pack;
}

// A store that does not bring the line into the cache; p is a multiple of the size, of a vector or a single number.
template <class V>
FASTNORM_INLINE void store_past(void* p, const V& v) {
#if !defined(FASTNORM_SANITIZED)  // which does not see into these either
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) return _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
  if constexpr (sizeof v == sizeof(int)) {
    int bits;
    std::memcpy(&bits, &v, sizeof bits);
    return _mm_stream_si32(static_cast<int*>(p), bits);
  }
#endif
#if defined(__x86_64__)
  if constexpr (sizeof v == sizeof(long long)) {
    long long bits;
    std::memcpy(&bits, &v, sizeof bits);
    return _mm_stream_si64(static_cast<long long*>(p), bits);
  }
#endif
#endif
  std::memcpy(p, &v, sizeof v);
}
// To be called before results stored past the cache are handed to another thread.
FASTNORM_INLINE void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The sum of the lanes, in a tree: lane + 8, then 4, 2, 1.
template <int kBytes>
FASTNORM_INLINE double fold(const Vector<double, kBytes>& v) {
  if constexpr (kBytes == 2 * sizeof(double)) {
    return v[0] + v[1];
  } else {
    using Half = Vector<double, kBytes / 2>;
#if defined(__has_builtin)
#define FASTNORM_HAS_SHUFFLE __has_builtin(__builtin_shufflevector)
#else
#define FASTNORM_HAS_SHUFFLE 0
#endif
    Half low, high;
#if FASTNORM_HAS_SHUFFLE
    if constexpr (kBytes == 64) {
      low = __builtin_shufflevector(v, v, 0, 1, 2, 3), high = __builtin_shufflevector(v, v, 4, 5, 6, 7);
    } else {
      low = __builtin_shufflevector(v, v, 0, 1), high = __builtin_shufflevector(v, v, 2, 3);
    }
#else
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
#endif
    return fold<kBytes / 2>(low + high);
  }
}

// A pack in half as many registers: lane + 8, with which its fold begins.
struct HalfPack {
  static constexpr int kParts = Pack<double>::kParts / 2;
  Pack<double>::Part part[kParts];

  HalfPack() = default;
  FASTNORM_INLINE HalfPack(const Pack<double>& pack) {  // NOLINT: they stand for the same sum
    FASTNORM_UNROLL
    for (int k = 0; k < kParts; ++k) part[k] = pack.part[k] + pack.part[k + kParts];
  }
  FASTNORM_INLINE HalfPack& operator+=(const HalfPack& other) {
    FASTNORM_UNROLL
    for (int k = 0; k < kParts; ++k) part[k] += other.part[k];
    return *this;
  }
  // The same; what rounding takes is added to `lost`.
  FASTNORM_INLINE void add(const HalfPack& other, HalfPack& lost) {
    FASTNORM_UNROLL
    for (int k = 0; k < kParts; ++k) {
      const Pack<double>::Part before = part[k], sum = before + other.part[k], share = sum - before;
      part[k] = sum;
      lost.part[k] += (before - (sum - share)) + (other.part[k] - share);
    }
  }
  FASTNORM_INLINE void add_products(const Pack<double>& a, const Pack<double>& b) {
    FASTNORM_UNROLL
    for (int k = 0; k < kParts; ++k) part[k] += a.part[k] * b.part[k] + a.part[k + kParts] * b.part[k + kParts];
  }
};

// The parts of a pack from kFirst on, kStep apart, in a tree (in a loop they would go through memory).
template <int kFirst, int kStep, class P>
FASTNORM_INLINE Pack<double>::Part fold_parts(const P& pack) {
  if constexpr (kFirst + kStep >= P::kParts) {
    return pack.part[kFirst];
  } else {
    return fold_parts<kFirst, 2 * kStep>(pack) + fold_parts<kFirst + kStep, 2 * kStep>(pack);
  }
}

FASTNORM_INLINE double fold(const Pack<double>& pack) { return fold<kVectorBytes>(fold_parts<0, 1>(pack)); }
FASTNORM_INLINE double fold(const HalfPack& pack) { return fold<kVectorBytes>(fold_parts<0, 1>(pack)); }

// The folds of eight packs, or halves of them.
template <class P>
FASTNORM_INLINE void fold_eight(const P* packs, double* sums) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  using Part = Pack<double>::Part;
  Part half[8];  // lane + 8
  FASTNORM_UNROLL
  for (int k = 0; k < 8; ++k) half[k] = fold_parts<0, 1>(packs[k]);
  const auto quarters = [](const Part& a, const Part& b) {  // lane + 4
    return _mm512_maskz_shuffle_f64x2(0xff, a, b, 0x44) + _mm512_maskz_shuffle_f64x2(0xff, a, b, 0xee);
  };
  const auto eighths = [](const Part& a, const Part& b) {  // lane + 2
    return _mm512_maskz_shuffle_f64x2(0xff, a, b, 0x88) + _mm512_maskz_shuffle_f64x2(0xff, a, b, 0xdd);
  };
  const Part even = eighths(quarters(half[0], half[2]), quarters(half[4], half[6]));
  const Part odd = eighths(quarters(half[1], half[3]), quarters(half[5], half[7]));
  const Part all = _mm512_maskz_unpacklo_pd(0xff, even, odd) + _mm512_maskz_unpackhi_pd(0xff, even, odd);
  std::memcpy(sums, &all, sizeof all);
#else
  FASTNORM_UNROLL
  for (int k = 0; k < 8; ++k) sums[k] = fold(packs[k]);
#endif
}

// The same with what rounding takes from the additions.
template <int kBytes>
FASTNORM_INLINE TwoTerm fold_exactly(const Vector<double, kBytes>& sum, const Vector<double, kBytes>& lost) {
  if constexpr (kBytes == 2 * sizeof(double)) {
    const TwoTerm both = two_sum(sum[0], sum[1]);
    return {both.hi, both.lo + (lost[0] + lost[1])};
  } else {
    using Half = Vector<double, kBytes / 2>;
    Half a, b, a_lost, b_lost;
    std::memcpy(&a, &sum, sizeof a);
    std::memcpy(&b, reinterpret_cast<const char*>(&sum) + sizeof a, sizeof b);
    std::memcpy(&a_lost, &lost, sizeof a);
    std::memcpy(&b_lost, reinterpret_cast<const char*>(&lost) + sizeof a, sizeof b);
    const Half both = a + b, part = both - a;
    return fold_exactly<kBytes / 2>(both, ((a - (both - part)) + (b - part)) + (a_lost + b_lost));
  }
}
// The parts of half a pack into the first; what they had lost, and lose here, in `lost`.
template <int kParts>
FASTNORM_INLINE void fold_parts_exactly(Pack<double>::Part* sum, Pack<double>::Part* lost) {
  FASTNORM_UNROLL
  for (int half = kParts / 2; half > 0; half /= 2) {
    FASTNORM_UNROLL
    for (int k = 0; k < half; ++k) {
      const Pack<double>::Part a = sum[k], b = sum[k + half], both = a + b, part = both - a;
      sum[k] = both;
      lost[k] = ((a - (both - part)) + (b - part)) + (lost[k] + lost[k + half]);
    }
  }
}
FASTNORM_INLINE TwoTerm fold_exactly(const HalfPack& sums, const HalfPack& lost_before) {
  constexpr int kParts = HalfPack::kParts;
  Pack<double>::Part sum[kParts], lost[kParts];
  FASTNORM_UNROLL
  for (int k = 0; k < kParts; ++k) sum[k] = sums.part[k], lost[k] = lost_before.part[k];
  fold_parts_exactly<kParts>(sum, lost);
  return fold_exactly<kVectorBytes>(sum[0], lost[0]);
}
// The same of eight halves of packs. `lost_before`: what they have lost already, if anything (kLost).
template <bool kLost>
FASTNORM_INLINE void fold_eight_exactly(const HalfPack* halves, const HalfPack* lost_before, double* sums,
                                        double* lost) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  using Part = Pack<double>::Part;
  struct Exact {
    Part sum, lost;
  };
  // Every other addition is made as a product and a sum: processors with units of their own for those have them idle
  // here.
  const Part one = _mm512_set1_pd(1);
  const auto plus = [&](const Part& a, const Part& b) -> Part { return _mm512_fmadd_pd(a, one, b); };
  const auto minus = [&](const Part& a, const Part& b) -> Part { return _mm512_fmsub_pd(a, one, b); };
  const auto add_two = [&](const Part& a, const Part& b) -> Exact {
    const Part sum = a + b, part = minus(sum, a);
    return {sum, plus(minus(a, sum - part), b - part)};
  };
  const auto add = [&](const Part& a, const Part& b, const Part& lost) -> Exact {
    const Exact both = add_two(a, b);
    return {both.sum, both.lost + lost};
  };
  const auto quarters = [&](int first, int second) -> Exact {  // lane + 4
    const auto low = [](const Part& p, const Part& q) -> Part { return _mm512_maskz_shuffle_f64x2(0xff, p, q, 0x44); };
    const auto high = [](const Part& p, const Part& q) -> Part { return _mm512_maskz_shuffle_f64x2(0xff, p, q, 0xee); };
    const Part &a = halves[first].part[0], &b = halves[second].part[0];
    if constexpr (!kLost) return add_two(low(a, b), high(a, b));
    const Part &a_lost = lost_before[first].part[0], &b_lost = lost_before[second].part[0];
    return add(low(a, b), high(a, b), plus(low(a_lost, b_lost), high(a_lost, b_lost)));
  };
  const auto eighths = [&](const Exact& a, const Exact& b) {  // lane + 2
    const auto low = [](const Part& p, const Part& q) -> Part { return _mm512_maskz_shuffle_f64x2(0xff, p, q, 0x88); };
    const auto high = [](const Part& p, const Part& q) -> Part { return _mm512_maskz_shuffle_f64x2(0xff, p, q, 0xdd); };
    return add(low(a.sum, b.sum), high(a.sum, b.sum), plus(low(a.lost, b.lost), high(a.lost, b.lost)));
  };
  const auto last = [&](const Exact& a, const Exact& b) {  // lane + 1
    const auto low = [](const Part& p, const Part& q) -> Part { return _mm512_maskz_unpacklo_pd(0xff, p, q); };
    const auto high = [](const Part& p, const Part& q) -> Part { return _mm512_maskz_unpackhi_pd(0xff, p, q); };
    return add(low(a.sum, b.sum), high(a.sum, b.sum), plus(low(a.lost, b.lost), high(a.lost, b.lost)));
  };
  const Exact all = last(eighths(quarters(0, 2), quarters(4, 6)), eighths(quarters(1, 3), quarters(5, 7)));
  std::memcpy(sums, &all.sum, sizeof all.sum);
  std::memcpy(lost, &all.lost, sizeof all.lost);
#else
  // The parts of each half, and then the lanes of what is left of all eight side by side.
  using Part = Pack<double>::Part;
  constexpr int kParts = HalfPack::kParts, kWidth = Pack<double>::kWidth;
  alignas(64) double lanes[kWidth][8], lanes_lost[kWidth][8];
  for (int k = 0; k < 8; ++k) {
    Part sum[kParts], gone[kParts];
    FASTNORM_UNROLL
    for (int i = 0; i < kParts; ++i) {
      sum[i] = halves[k].part[i];
      gone[i] = kLost ? lost_before[k].part[i] : Part{};
    }
    fold_parts_exactly<kParts>(sum, gone);
    FASTNORM_UNROLL
    for (int i = 0; i < kWidth; ++i) lanes[i][k] = sum[0][i], lanes_lost[i][k] = gone[0][i];
  }
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
#pragma omp simd
      for (int k = 0; k < 8; ++k) {
        const TwoTerm both = two_sum(lanes[i][k], lanes[i + half][k]);
        lanes[i][k] = both.hi;
        lanes_lost[i][k] = both.lo + (lanes_lost[i][k] + lanes_lost[i + half][k]);
      }
    }
  }
  std::memcpy(sums, lanes[0], sizeof lanes[0]);
  std::memcpy(lost, lanes_lost[0], sizeof lanes_lost[0]);
#endif
}

}  // namespace
}  // namespace fastnorm
