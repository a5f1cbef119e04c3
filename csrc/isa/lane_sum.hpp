// Sums in double to the last digit: a fixed number of lanes and a fixed tree, so that a sum has the same bits at
// every instruction-set level. A plain `reduction(+:s)` would leave the order to the compiler (and be one latency
// chain).
//
// The tree goes all the way down: equal terms, as two-valued data have them, round the same way at every step of a
// plain chain, which costs float64 sums of 2048 such terms a dozen units in the last place. Added in pairs they are
// exact. (Sums of float32 data in double have digits to spare; moments.hpp adds those in plain lanes.)
#pragma once

#include <cstdint>

#include "isa/places.hpp"
#include "plan.hpp"

namespace fastnorm {
namespace {

struct Pair {
  double first, second;
};

// Sums side by side.
template <class A, class B>
struct LanePair {
  A first;
  B second;
  FASTNORM_INLINE LanePair& operator+=(const LanePair& other) {
    first += other.first;
    second += other.second;
    return *this;
  }
  FASTNORM_INLINE friend LanePair operator+(const LanePair& a, const LanePair& b) {
    return {a.first + b.first, a.second + b.second};
  }
};
using PackPair = LanePair<Pack<double>, Pack<double>>;

FASTNORM_INLINE Pair fold(const PackPair& pair) { return {fold(pair.first), fold(pair.second)}; }

template <class A, class B>
FASTNORM_INLINE LanePair<A, B> first_lanes_of(const LanePair<A, B>& pair, int64_t count) {
  return {first_lanes_of(pair.first, count), first_lanes_of(pair.second, count)};
}

constexpr int64_t kLeaf = kSumLeaf;  // terms summed without recursion
static_assert(kLeaf == 8 * kPack, "a leaf is eight packs");

// The terms of [first, first + n), n <= kLeaf, lane by lane. kZeroBeyond: what is missing in a part of a pack is loaded
// as 0, and the terms of that are 0 too.
template <bool kZeroBeyond = false, class Term>
FASTNORM_LOOPS inline auto leaf_sums(int64_t first, int64_t n, const Term& term) {
  const auto whole = [&](int64_t i) { return term(Whole{first + i * kPack}); };
  if (n == kLeaf)
    return ((whole(0) + whole(1)) + (whole(2) + whole(3))) + ((whole(4) + whole(5)) + (whole(6) + whole(7)));
  // In the order of memory: pairs, and what is left of them, a pack, a part of one, or both.
  const int64_t pairs = n / (2 * kPack), odd = n / kPack % 2, rest = n % kPack;
  const auto add_rest = [&](auto& lanes) FASTNORM_LOOPS {
    const auto terms = term(Partial{first + n - rest, rest});
    if constexpr (kZeroBeyond) {
      lanes += terms;
    } else {
      lanes += first_lanes_of(terms, rest);
    }
  };
  if (pairs + odd == 0) {
    decltype(whole(0)) lanes{};
    add_rest(lanes);
    return lanes;
  }
  auto lanes = whole(0);
  if (pairs > 0) lanes += whole(1);
  if (pairs > 1) {
    auto pair = whole(2);
    pair += whole(3);
    lanes += pair;
  }
  if (pairs == 3) {
    auto last = whole(4);
    last += whole(5);
    if (odd != 0) {
      auto over = whole(6);
      if (rest > 0) add_rest(over);
      last += over;
    } else if (rest > 0) {
      add_rest(last);
    }
    lanes += last;
  } else if (odd != 0 && pairs > 0) {
    auto over = whole(2 * pairs);
    if (rest > 0) add_rest(over);
    lanes += over;
  } else if (rest > 0) {
    add_rest(lanes);
  }
  return lanes;
}

template <class Term>
inline auto tree_sums(int64_t first, int64_t n, const Term& term) -> decltype(term(Whole{0})) {
  if (n <= kLeaf) return leaf_sums(first, n, term);
  const int64_t half = (n / 2 + kLeaf - 1) / kLeaf * kLeaf;
  return tree_sums(first, half, term) + tree_sums(first + half, n - half, term);
}

// A tree over sums that come one after the other: of leaves, or of runs that memory keeps apart.
template <class Lanes>  // Pack<double> or LanePair
class LaneTree {
 public:
  FASTNORM_INLINE void push(Lanes sums) {
    int level = 0;
    for (uint64_t taken = count_++; taken & 1; taken >>= 1) sums = levels_[level++] + sums;
    levels_[level] = sums;
  }
  FASTNORM_INLINE Lanes total() const {
    if (count_ == 0) return Lanes{};
    int level = 0;
    while (!(count_ >> level & 1)) ++level;
    Lanes sums = levels_[level];
    while (count_ >> ++level) {
      if (count_ >> level & 1) sums = levels_[level] + sums;
    }
    return sums;
  }

 private:
  uint64_t count_ = 0;
  Lanes levels_[40];
};

// The sum of term(place) over a run of n >= 1 values; term gives a Pack<double> or a PackPair.
template <class Term>
inline auto sum(int64_t n, const Term& term) {
  return fold(tree_sums(0, n, term));
}

}  // namespace
}  // namespace fastnorm
