// What the processor notes of a thread's arithmetic: whether something has overflowed, or lost digits to underflow.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace fastnorm {
namespace {

#if defined(__SSE2__)
constexpr unsigned kOverflow = _MM_EXCEPT_OVERFLOW, kUnderflow = _MM_EXCEPT_UNDERFLOW;
#elif defined(FE_OVERFLOW) && defined(FE_UNDERFLOW)
constexpr unsigned kOverflow = FE_OVERFLOW, kUnderflow = FE_UNDERFLOW;
#else
constexpr unsigned kOverflow = 1, kUnderflow = 2;
#endif

// Has that happened in arithmetic of this thread since `clear`? There is one note for all of a thread: what is asked
// about has to be in memory by then, and nothing else may clear it in between. Conditional arithmetic has no place
// there: compilers may do it on either branch.
template <unsigned kEvents>
struct Noted {
#if defined(__SSE2__)
  static void clear() {
    if (any()) _mm_setcsr(_mm_getcsr() & ~kEvents);
    keep_order();
  }
  static bool any() {
    keep_order();
    const bool noted = (_mm_getcsr() & kEvents) != 0;
    keep_order();
    return noted;
  }
  static void note() { _mm_setcsr(_mm_getcsr() | kEvents); }
#elif defined(FE_OVERFLOW) && defined(FE_UNDERFLOW)
  static void clear() {
    std::feclearexcept(kEvents);
    keep_order();
  }
  static bool any() {
    keep_order();
    return std::fetestexcept(kEvents) != 0;
  }
  static void note() { std::feraiseexcept(kEvents); }
#else
  static void clear() {}
  static bool any() { return true; }  // nobody knows
  static void note() {}
#endif

 private:
  static void keep_order() { asm volatile("" ::: "memory"); }
};
using Overflow = Noted<kOverflow>;
using LostDigits = Noted<kOverflow | kUnderflow>;

}  // namespace
}  // namespace fastnorm
