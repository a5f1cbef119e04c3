// Sums in double to the last digit: a fixed number of lanes and a fixed tree, so that a sum has the same bits at
// every instruction-set level. A plain `reduction(+:s)` would leave the order to the compiler (and be one latency
// chain).
//
// The tree goes all the way down: equal terms, as two-valued data have them, round the same way at every step of a
// plain chain, which costs float64 sums of 2048 such terms a dozen units in the last place. Added in pairs they are
// exact; sums of leaves that come one after the other are added with what rounding takes (ExactSum). (Sums of float32
// data in double have digits to spare; moments.hpp adds those in plain lanes.)
#pragma once

#include <cstdint>
#include <type_traits>

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

// The terms of `packs` packs from `first` on, and of a part of `rest` values if has_rest, lane by lane; packs and
// has_rest may be constants, of which nothing is left then. kZeroBeyond: what is missing in a part of a pack is loaded
// as 0, and the terms of that are 0 too.
template <bool kZeroBeyond, class Packs, class HasRest, class Term>
FASTNORM_INLINE auto leaf_sums(int64_t first, Packs packs, HasRest has_rest, int64_t rest, const Term& term) {
  const auto whole = [&](int64_t i) FASTNORM_LOOPS { return term(Whole{first + i * kPack}); };
  if (packs == 8)
    return ((whole(0) + whole(1)) + (whole(2) + whole(3))) + ((whole(4) + whole(5)) + (whole(6) + whole(7)));
  // In the order of memory: pairs, and what is left of them, a pack, a part of one, or both.
  const int64_t pairs = packs / 2, odd = packs % 2;
  const auto add_rest = [&](auto& lanes) FASTNORM_LOOPS {
    const auto terms = term(Partial{first + packs * kPack, rest});
    if constexpr (kZeroBeyond) {
      lanes += terms;
    } else {
      lanes += first_lanes_of(terms, rest);
    }
  };
  if (packs == 0) {
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
      if (has_rest) add_rest(over);
      last += over;
    } else if (has_rest) {
      add_rest(last);
    }
    lanes += last;
  } else if (odd != 0 && pairs > 0) {
    auto over = whole(2 * pairs);
    if (has_rest) add_rest(over);
    lanes += over;
  } else if (has_rest) {
    add_rest(lanes);
  }
  return lanes;
}
// The terms of [first, first + n), n <= kLeaf.
template <bool kZeroBeyond = false, class Term>
FASTNORM_LOOPS inline auto leaf_sums(int64_t first, int64_t n, const Term& term) {
  const int64_t rest = n % kPack;
  return leaf_sums<kZeroBeyond>(first, n / kPack, rest > 0, rest, term);
}

// call(packs, has_rest), constants, for a leaf of n values, 1 <= n <= kLeaf.
template <class Call>
inline void with_leaf_shape(int64_t n, const Call& call) {
  with_constant<kLeaf / kPack + 1>(n / kPack, [&](auto packs) {
    if constexpr (packs < kLeaf / kPack) {
      if (n % kPack != 0) return call(packs, std::true_type{});
    }
    if constexpr (packs > 0) call(packs, std::false_type{});
  });
}

template <class Term>
inline auto tree_sums(int64_t first, int64_t n, const Term& term) -> decltype(term(Whole{0})) {
  if (n <= kLeaf) return leaf_sums(first, n, term);
  const int64_t half = (n / 2 + kLeaf - 1) / kLeaf * kLeaf;
  return tree_sums(first, half, term) + tree_sums(first + half, n - half, term);
}

// A sum in double that keeps what rounding takes between its terms, which are sums of leaves.
struct ExactSum {
  HalfPack sum = Pack<double>(-0.0), lost = Pack<double>(0.0);  // -0 + any number is that number

  FASTNORM_INLINE void add(const Pack<double>& terms) { sum.add(terms, lost); }
  FASTNORM_INLINE TwoTerm total() const { return fold_exactly(sum, lost); }
};

// The sum of term(place) over a run of n >= 1 values; term gives a Pack<double> or a PackPair.
template <class Term>
inline auto sum(int64_t n, const Term& term) {
  return fold(tree_sums(0, n, term));
}

}  // namespace
}  // namespace fastnorm
