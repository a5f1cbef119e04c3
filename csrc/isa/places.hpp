// Where packs are loaded from and stored to: whole packs and the part of one at the end of a run, into the cache or
// past it, and the loops along a run.
#pragma once

#include <type_traits>
#include <utility>

#include "isa/vec.hpp"

namespace fastnorm {
namespace {

constexpr int kQuarterLine = 16;  // bytes

inline int64_t whole_packs(int64_t n) { return (n + kPack - 1) / kPack * kPack; }

// The place of a pack in a run: whole packs, and what is left at the end. at(p) is p's values there, converted to C
// where the kernel computes in more than it stores.
struct Whole {
  int64_t start;

  template <class C, class T>
  FASTNORM_INLINE Pack<C> load(const T* p) const {
    using Stored = Vector<T, Pack<C>::kWidth * sizeof(T)>;
    Pack<C> pack;
    FASTNORM_UNROLL
    for (int k = 0; k < Pack<C>::kParts; ++k) {
      Stored v;
      std::memcpy(&v, p + start + k * Pack<C>::kWidth, sizeof v);
      pack.part[k] = convert<typename Pack<C>::Part>(v);
    }
    return pack;
  }
  template <class C, class T>
  FASTNORM_INLINE void store(T* p, const Pack<C>& pack) const {
    using Stored = Vector<T, Pack<C>::kWidth * sizeof(T)>;
    FASTNORM_UNROLL
    for (int k = 0; k < Pack<C>::kParts; ++k) {
      const Stored v = convert<Stored>(pack.part[k]);
      std::memcpy(p + start + k * Pack<C>::kWidth, &v, sizeof v);
    }
  }
  // Past the cache; p + start is a multiple of the vector's size.
  template <class C>
  FASTNORM_INLINE void store_past(C* p, const Pack<C>& pack) const {
    FASTNORM_UNROLL
    for (int k = 0; k < Pack<C>::kParts; ++k) fastnorm::store_past(p + start + k * Pack<C>::kWidth, pack.part[k]);
  }
};

struct Partial {
  int64_t start, count;

  template <class C, class T>
  FASTNORM_INLINE Pack<C> load(const T* p) const {
    using Stored = Vector<T, Pack<C>::kWidth * sizeof(T)>;
    Pack<C> pack;
    FASTNORM_UNROLL
    for (int k = 0; k < Pack<C>::kParts; ++k) {
      const int64_t first = k * Pack<C>::kWidth;
      pack.part[k] = convert<typename Pack<C>::Part>(load_first<Stored>(p + start + first, count - first));
    }
    return pack;
  }
  template <class C, class T>
  FASTNORM_INLINE void store(T* p, const Pack<C>& pack) const {
    using Stored = Vector<T, Pack<C>::kWidth * sizeof(T)>;
    FASTNORM_UNROLL
    for (int k = 0; k < Pack<C>::kParts; ++k) {
      const int64_t first = k * Pack<C>::kWidth;
      store_first<Stored>(p + start + first, convert<Stored>(pack.part[k]), count - first);
    }
  }
};

// body(constant) for 0 .. count - 1: arrays that are indexed with constants stay in registers, in loops they may not.
template <class Body, int... k>
FASTNORM_INLINE void for_constants(std::integer_sequence<int, k...>, const Body& body) {
  (body(std::integral_constant<int, k>{}), ...);
}
template <int kCount, class Body>
FASTNORM_INLINE void for_constants(const Body& body) {
  for_constants(std::make_integer_sequence<int, kCount>{}, body);
}

// body(constant) for that of 0 .. count - 1 which `number` is, if any: loops whose shape is known are shorter.
template <int kCount, class Body>
inline void with_constant(int64_t number, const Body& body) {
  for_constants<kCount>([&](auto constant) {
    if (number == constant) body(constant);
  });
}

// Sets of up to so many columns, or segments, have loops made for their width, vectors over sets: set by set, what
// there is to do per column took half the time of group norm's backward of 7 x 7 with channels last.
constexpr int64_t kNarrowSet = 8;

// call(width), as a constant, of 2 to kNarrowSet. (What calls it is not inlined: one copy of all these loops.)
template <class Call>
FASTNORM_INLINE void with_narrow_set(int64_t width, const Call& call) {
  with_constant<kNarrowSet - 1>(width - 2,
                                [&](auto more) { call(std::integral_constant<int, decltype(more)::value + 2>{}); });
}

// The values of a run: zeros in the places of a pack that lie behind it.
template <class C>
FASTNORM_INLINE Pack<C> within(Whole, const Pack<C>& pack) {
  return pack;
}
template <class C>
FASTNORM_INLINE Pack<C> within(Partial at, const Pack<C>& pack) {
  return first_lanes_of(pack, at.count);
}

// Asks for what a first reading will want soon, `distance` bytes ahead; what it will want later, for the second cache.
enum Wanted { later = 2, soon = 3 };  // as the instruction counts
template <Wanted wanted = soon, class T>
FASTNORM_INLINE void prefetch(const T* p, int64_t distance) {
  const char* ahead = reinterpret_cast<const char*>(p) + distance;
  for (int line = 0; line < kPack * static_cast<int>(sizeof(T)); line += 64)
    __builtin_prefetch(ahead + line, 0, wanted);
}

// The same for n values.
template <class T>
FASTNORM_INLINE void ask_for(const T* p, int64_t n, int64_t distance) {
  for (int64_t i = 0; i < n; i += kPack) prefetch(p + i, distance);
}

// The same for a known number of packs.
template <int kPacks, class T>
FASTNORM_INLINE void ask_for(const T* p, int64_t distance) {
  FASTNORM_UNROLL
  for (int64_t i = 0; i < kPacks; ++i) prefetch(p + i * kPack, distance);
}

// What `distance` is where the one asks for the other.
FASTNORM_INLINE int64_t bytes_between(const void* from, const void* to) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from));
}

// Fills places of the window in which the processor works ahead: of a short loop it then has fewer rounds under way,
// which ask for no more of memory than it can bring; requests beyond that hold up what comes after them. (Backward of
// 16384 x 1024 float32: 7.4 ms to 6.1, with 16 places 6.6, with 32 6.1; docs/design.md has more.)
FASTNORM_INLINE void hold_back() {
#if defined(__GNUC__) && defined(__x86_64__)
  asm volatile(".rept %c0\n\tnop\n\t.endr" ::"i"(24));
#endif
}

// How results are stored: into the cache, or past it: whole packs at multiples of the vector's size, parts of packs
// into the cache (PastCache), or past it as well (PastCacheToTheEnds).
struct IntoCache {
  template <class At, class C, class T>
  FASTNORM_INLINE static void store(At at, T* p, const Pack<C>& pack) {
    at.store(p, pack);
  }
};
struct PastCache : IntoCache {
  using IntoCache::store;
  template <class C>
  FASTNORM_INLINE static void store(Whole at, C* p, const Pack<C>& pack) {
    at.store_past(p, pack);
  }
};

// For runs that are written one after the other.
struct PastCacheToTheEnds : PastCache {
  using PastCache::store;
  template <class C>
  FASTNORM_INLINE static void store(Partial at, C* p, const Pack<C>& pack) {
    store_part(p + at.start, at.count, pack);
  }

 private:
  // The part of a line at an end of a run, which often is next to another one: the processor puts the line together.
  // Half into the cache it would cost a trip to memory (layer norm of 65536 x 100: 3.4 ms instead of 2.1).
  template <class C>
  [[gnu::noinline]] static void store_part(C* p, int64_t n, const Pack<C>& pack) {
    constexpr int64_t kQuarter = kQuarterLine / sizeof(C);
    C values[kPack];
    std::memcpy(values, &pack, sizeof values);
    int64_t i = 0;
    for (; i < n && reinterpret_cast<uintptr_t>(p + i) % kQuarterLine != 0; ++i) store_past(p + i, values[i]);
    for (; i + kQuarter <= n; i += kQuarter) {
      Vector<C, kQuarterLine> quarter;
      std::memcpy(&quarter, values + i, sizeof quarter);
      store_past(p + i, quarter);
    }
    for (; i < n; ++i) store_past(p + i, values[i]);
  }
};

// Past the cache in quarters of a line, which NumPy's arrays are multiples of.
struct PastCacheInQuarters : IntoCache {
  using IntoCache::store;
  template <class C>
  FASTNORM_INLINE static void store(Whole at, C* p, const Pack<C>& pack) {
    using Quarter = Vector<C, kQuarterLine>;
    Quarter quarters[sizeof pack / sizeof(Quarter)];
    std::memcpy(quarters, &pack, sizeof pack);
    char* to = reinterpret_cast<char*>(p + at.start);
    FASTNORM_UNROLL
    for (int k = 0; k < static_cast<int>(sizeof pack) / kQuarterLine; ++k) {
      fastnorm::store_past(to + k * kQuarterLine, quarters[k]);
    }
  }
};

// call(IntoCache, PastCache or PastCacheInQuarters) for results at p and at multiples of `stride` bytes from it.
template <class Call>
FASTNORM_INLINE void with_store(bool past_cache, const void* p, int64_t stride, const Call& call) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(p) | static_cast<uint64_t>(stride);
  if (!past_cache || bits % kQuarterLine != 0) {
    call(IntoCache{});
  } else if (bits % kVectorBytes == 0) {
    call(PastCache{});
  } else {
    call(PastCacheInQuarters{});
  }
}

// Values from p to the first line that is stored past the cache as a whole: one that is written half past the cache and
// half into it costs a trip to memory (layer norm of 64 MB in halves of lines: 8.4 ms instead of 4.9).
template <class T>
FASTNORM_INLINE int64_t unaligned_values(const T* p) {
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % kLineBytes / sizeof(T));
}

// body(place) along a run of n values.
template <class Body>
FASTNORM_INLINE void for_packs(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kPack <= n; i += kPack) body(Whole{i});
  if (i < n) body(Partial{i, n - i});
}

// `all` and the bits of a run of n values.
FASTNORM_INLINE Pack<float> either(Pack<float> all, const float* p, int64_t n) {
  int64_t i = 0;
  for (; i + kPack <= n; i += kPack) all = either(all, Whole{i}.load<float>(p));
  return i < n ? either(all, Partial{i, n - i}.load<float>(p)) : all;
}

// body(place, how) along a run of n results at p, in whole lines of the cache but for the ends.
template <class How, class T, class Body>
FASTNORM_INLINE void for_aligned_packs(How how, const T* p, int64_t n, const Body& body) {
  int64_t i = unaligned_values(p);
  if (i > n) i = n;
  if (i > 0) body(Partial{0, i}, how);
  for (; i + kPack <= n; i += kPack) body(Whole{i}, how);
  if (i < n) body(Partial{i, n - i}, how);
}

// body(place, how) along a run of n results at p, `how` being IntoCache or PastCache.
template <class T, class Body>
FASTNORM_INLINE void for_stored_packs(bool past_cache, const T* p, int64_t n, const Body& body) {
  if (past_cache) return for_aligned_packs(PastCacheToTheEnds{}, p, n, body);
  for_packs(n, [&](auto at) { body(at, IntoCache{}); });
}

}  // namespace
}  // namespace fastnorm
