// Sums of float32 terms: trees of four packs in float32, whose results are widened and added in double. A value then
// costs a quarter of a conversion, which is what double sums of float32 data spend most of their time on. Each level of
// a tree rounds once, so that a sum is off by as many units (and what its terms bring along) of the sum of their
// magnitudes: for gradients, which have eight, not for moments. Terms that cancel have to be taken about a pivot first.
#pragma once

#include "isa/places.hpp"

namespace fastnorm {
namespace {

constexpr int kTreePacks = 4;

}  // namespace
}  // namespace fastnorm
