// Sums of float32 terms: trees of four packs in float32, whose results are added in lanes of double. A value then costs
// a quarter of a conversion, which is what double sums of float32 data spend most of their time on. Each level of a
// tree rounds once, so that a sum is off by as many units (and what its terms bring along) of the sum of their
// magnitudes: for gradients, which have eight, not for moments. Terms that cancel have to be taken about a pivot first.
#pragma once

#include "isa/places.hpp"

namespace fastnorm {
namespace {

constexpr int kTreePacks = 4;

// A double sum of packs of float32 terms.
struct ShortTreeSum {
  Pack<double> lanes = Pack<double>(0.0);

  // Four packs of terms, or fewer at the end of a run.
  FASTNORM_INLINE void add(const Pack<float>& a, const Pack<float>& b, const Pack<float>& c, const Pack<float>& d) {
    lanes += widen((a + b) + (c + d));
  }
  FASTNORM_INLINE void add(const Pack<float>& a) { lanes += widen(a); }
};

}  // namespace
}  // namespace fastnorm
