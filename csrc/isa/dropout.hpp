// Dropout over any strides: the elements are walked as they lie in memory, each with the draw of its logical index.
// Promises the same bits for every cut of the range, layout and level. Stores no mask: a window of draws lives on the
// stack. Compiled once per instruction-set level, inside an anonymous namespace; no standard containers.
#pragma once

#include <cassert>
#include <cstring>

#include "isa/mask_draws.hpp"
#include "isa/mask_tiles.hpp"
#include "isa/noise.hpp"
#include "isa/stream_out.hpp"
#include "isa/walk_runs.hpp"

namespace fastnorm {
namespace {

// What else is done to a row while it is there. `after`: y = other + drop(x); `before`: x += other, y = drop(x).
enum class WithSum { none, after, before };

// y = drop(x) = keep ? x * factor : +0, for n elements in a row. y may be x.
template <WithSum sum, class T>
[[gnu::always_inline]] inline void drop_row(T* y, T* x, const T* other, const int16_t* halves, int64_t n, int16_t below,
                                            T factor) {
  int64_t i = 0;
#if defined(__clang__) || !defined(__AVX2__)
  // Spelled out where the plain loop below does not become what it says: a comparison, its result made as wide as x,
  // and one bitwise and.
  typedef T Values __attribute__((vector_size(8 * kDrawLanes)));
  typedef typename Bits<T>::Signed Wide __attribute__((vector_size(8 * kDrawLanes)));
  constexpr int64_t step = static_cast<int64_t>(8 * kDrawLanes / sizeof(T));
  typedef int16_t Narrow __attribute__((vector_size(2 * step)));
  for (; i + step <= n; i += step) {
    Narrow half;
    Values value, another = {};
    std::memcpy(&half, halves + i, sizeof half);
    std::memcpy(&value, x + i, sizeof value);
    if (sum != WithSum::none) std::memcpy(&another, other + i, sizeof another);
    if (sum == WithSum::before) {
      value += another;
      std::memcpy(x + i, &value, sizeof value);
    }
    value =
        reinterpret_cast<Values>(reinterpret_cast<Wide>(value * factor) & __builtin_convertvector(half < below, Wide));
    if (sum == WithSum::after) value = another + value;
    std::memcpy(y + i, &value, sizeof value);
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) {
    const T from = sum == WithSum::before ? x[j] + other[j] : x[j];
    if (sum == WithSum::before) x[j] = from;
    const T value = kept(halves[j] < below, from * factor);
    y[j] = sum == WithSum::after ? other[j] + value : value;
  }
}

// Where results go: straight to the array, or past the caches.
template <class T>
class Direct {
 public:
  explicit Direct(T* y) : y_(y) {}
  T* chunk() { return y_; }
  void written() { y_ += kDrawChunk; }
  T* finish() { return y_; }

 private:
  T* y_;
};

template <class T>
class Streamed {
 public:
  explicit Streamed(T* y) : out_(reinterpret_cast<char*>(y)) {}
  T* chunk() { return reinterpret_cast<T*>(out_.piece()); }
  void written() { out_.write(); }
  T* finish() { return reinterpret_cast<T*>(out_.finish()); }

 private:
  StreamOut<static_cast<int64_t>(kDrawChunk * sizeof(T))> out_;
};

// Out of memory, the rounds of the generator would have to wait for x: the processor looks ahead less far than this.
template <class T>
[[gnu::always_inline]] inline void ask_ahead(const T* part) {
  constexpr int64_t ahead = 4096;
  for (int64_t at = 0; at < static_cast<int64_t>(kDrawChunk / kDrawParts * sizeof(T)); at += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const char*>(part) + ahead + at);
  }
}

// A long row from logical index `index` on: while a chunk of draws is made, the one before it is used. Never inlined:
// in a larger function GCC keeps less of the rounds in registers (7 instead of 10 G elements a second). `copy`, where
// there is one, follows the sum.
template <WithSum sum, bool ahead, class Out, class T>
[[gnu::noinline]] void drop_long_row(T* y, T* x, const T* other, int64_t length, int64_t index, const MaskDraw& draw,
                                     T factor, CopyOut* copy) {
  alignas(64) int16_t halves[2][kDrawChunk];
  MaskDraws draws(draw, static_cast<uint64_t>(index) / 8);
  const int16_t below = draws.below();
  const int64_t skipped = index % 8;  // draws of the first chunk that are not this row's
  draws.next(halves[0], [](int) {});
  int64_t at = length < kDrawChunk - skipped ? length : kDrawChunk - skipped;
  if (skipped > 0 || at < kDrawChunk) {
    drop_row<sum>(y, x, other, halves[0] + skipped, at, below, factor);
    if (at == length) return;
    draws.next(halves[0], [](int) {});
  } else {
    at = 0;
  }
  Out out(y + at);
  int current = 0;
  for (; length - at > kDrawChunk; at += kDrawChunk, current ^= 1) {
    T* const to = out.chunk();
    T* const from = x + at;
    const T* const beside = sum != WithSum::none ? other + at : nullptr;
    const int16_t* const ready = halves[current];
    draws.next(halves[current ^ 1], [&](int part) __attribute__((always_inline)) {
      constexpr int64_t size = kDrawChunk / kDrawParts;
      const int64_t start = part * size;
      if (ahead) ask_ahead(from + start);
      if (ahead && sum != WithSum::none) ask_ahead(beside + start);
      drop_row<sum>(to + start, from + start, sum != WithSum::none ? beside + start : nullptr, ready + start, size,
                    below, factor);
    });
    out.written();
    if (sum != WithSum::none && copy) copy->up_to((at + kDrawChunk) * static_cast<int64_t>(sizeof(T)));
  }
  drop_row<sum>(out.finish(), x + at, sum != WithSum::none ? other + at : nullptr, halves[current], length - at, below,
                factor);
}

// The draws around the place last asked for. Runs ask in rising order nearly always, so most are made once.
class MaskWindow {
 public:
  static constexpr int64_t size = 1024;

  explicit MaskWindow(const MaskDraw& draw) : draw_(draw), below_(HalfThreshold(draw.threshold).below) {
    // The same for every element, whatever it asks for.
    if (is_constant(draw)) {
      for (int16_t& half : halves_) half = INT16_MIN;
      below_ = draw.threshold == 0 ? INT16_MIN : 0;
    }
  }

  int16_t below() const { return below_; }

  // The draws from element `index` on; `length` is cut to how many there are.
  const int16_t* at(int64_t index, int64_t* length) {
    int64_t start = index - first_;
    if (is_constant(draw_)) {
      start = 0;
      made_ = size;
    } else if (start < 0 || start >= made_) {
      // No more than were asked for, as long as they are asked for in one row.
      start = index % 8;
      first_ = index - start;
      const int64_t wanted = start + *length < size ? start + *length : size;
      const int64_t chunks = (wanted + kDrawChunk - 1) / kDrawChunk;
      fill_halves(halves_, static_cast<uint64_t>(first_) / 8, chunks, draw_);
      made_ = chunks * kDrawChunk;
    }
    if (*length > made_ - start) *length = made_ - start;
    return halves_ + start;
  }

 private:
  MaskDraw draw_;
  int16_t below_;
  int64_t first_ = 0, made_ = 0;
  alignas(64) int16_t halves_[size];
};

// Every element kept, or none.
template <class T>
void drop_constant(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count, bool keep, T factor) {
  const InnerStrides inner(walk);
  for_each_run(walk, first, count, [&](int64_t length, int64_t yo, int64_t xo, int64_t) {
    if (keep) {
      map_run<T>(y + yo, x + xo, inner.result, inner.input, length, [=](T value, int64_t) { return value * factor; });
    } else {
      map_run<T>(y + yo, x + xo, inner.result, inner.input, length, [](T, int64_t) { return T(0); });
    }
  });
}

// Rows at least this long are worth a start of their own.
constexpr int64_t kLongRow = 2 * kDrawChunk;

template <class T>
void drop(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw, T factor,
          Reach reach) {
  if (is_constant(draw)) return drop_constant(y, x, walk, first, count, draw.threshold != 0, factor);
  const InnerStrides inner(walk);
  assert(inner.mask == 0 || inner.mask == 1);
  MaskWindow window(draw);
  const int16_t below = window.below();
  for_each_run(walk, first, count, [&](int64_t length, int64_t yo, int64_t xo, int64_t mask) {
    if (inner.mask == 0) {
      int64_t one = 1;
      const bool keep = *window.at(mask, &one) < below;
      if (keep) {
        map_run<T>(y + yo, x + xo, inner.result, inner.input, length, [=](T value, int64_t) { return value * factor; });
      } else {
        map_run<T>(y + yo, x + xo, inner.result, inner.input, length, [](T, int64_t) { return T(0); });
      }
      return;
    }
    const bool in_rows = packed<T>(y + yo, x + xo, inner.result, inner.input);
    if (in_rows && length >= kLongRow && chunks_in_reach(mask / 8) > (length + 7) / kDrawChunk) {
      T* const to = reinterpret_cast<T*>(y + yo);
      T* const from = reinterpret_cast<T*>(const_cast<char*>(x + xo));  // only read
      const auto along = reach.past_cache  ? drop_long_row<WithSum::none, true, Streamed<T>, T>
                         : reach.ask_ahead ? drop_long_row<WithSum::none, true, Direct<T>, T>
                                           : drop_long_row<WithSum::none, false, Direct<T>, T>;
      return along(to, from, nullptr, length, mask, draw, factor, nullptr);
    }
    while (length > 0) {
      int64_t part = length;
      const int16_t* halves = window.at(mask, &part);
      if (in_rows) {
        drop_row<WithSum::none>(reinterpret_cast<T*>(y + yo), reinterpret_cast<T*>(const_cast<char*>(x + xo)),
                                static_cast<const T*>(nullptr), halves, part, below, factor);
      } else {
        map_run<T>(y + yo, x + xo, inner.result, inner.input, part,
                   [=](T value, int64_t i) { return kept(halves[i] < below, value * factor); });
      }
      length -= part;
      mask += part;
      yo += part * inner.result;
      xo += part * inner.input;
    }
  });
}

template <WithSum sum, class T>
void drop_block(T* y, T* x, const T* other, int64_t index, int64_t count, const MaskDraw& draw, T factor,
                bool past_cache, CopyOut* copy) {
  if (is_constant(draw)) {
    const bool keep = draw.threshold != 0;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T from = sum == WithSum::before ? x[i] + other[i] : x[i];
      if (sum == WithSum::before) x[i] = from;
      const T value = kept(keep, from * factor);
      y[i] = sum == WithSum::after ? other[i] + value : value;
    }
  } else if (chunks_in_reach(index / 8) <= (count + 7) / kDrawChunk) {
    MaskWindow window(draw);
    for (int64_t i = 0, part; i < count; i += part) {
      part = count - i;
      const int16_t* halves = window.at(index + i, &part);
      drop_row<sum>(y + i, x + i, sum != WithSum::none ? other + i : nullptr, halves, part, window.below(), factor);
    }
  } else {
    // Two arrays are read: even the last cache is slow enough to be asked ahead.
    const auto along = past_cache ? drop_long_row<sum, true, Streamed<T>, T> : drop_long_row<sum, true, Direct<T>, T>;
    along(y, x, other, count, index, draw, factor, copy);
  }
  if (copy) copy->finish(count * static_cast<int64_t>(sizeof(T)));
}

template <class T>
void drop_add(T* s, const T* x, const T* residual, int64_t index, int64_t count, const MaskDraw& draw, T factor,
              T* past_cache) {
  T* const from = const_cast<T*>(x);  // only read
  CopyOut copy(past_cache, s);
  CopyOut* const to = past_cache ? &copy : nullptr;
  if (residual) {
    drop_block<WithSum::after>(s, from, residual, index, count, draw, factor, false, to);
  } else {
    drop_block<WithSum::none>(s, from, residual, index, count, draw, factor, false, to);
  }
}

template <class T>
void add_drop(T* dx, T* g, const T* ds, int64_t index, int64_t count, const MaskDraw& draw, T factor, bool past_cache,
              T* g_past_cache) {
  CopyOut copy(g_past_cache, g);
  CopyOut* const to = g_past_cache ? &copy : nullptr;
  if (ds) {
    drop_block<WithSum::before>(dx, g, ds, index, count, draw, factor, past_cache, to);
  } else {
    drop_block<WithSum::none>(dx, g, ds, index, count, draw, factor, past_cache, to);
  }
}

template <class T>
void apply_mask(char* y, const char* x, const char* keep, const ElementWalk& walk, int64_t first, int64_t count,
                T factor) {
  const InnerStrides inner(walk);
  for_each_run(walk, first, count, [&](int64_t length, int64_t yo, int64_t xo, int64_t mask) {
    const char* k = keep + mask;
    if (inner.mask == 1) {
      map_run<T>(y + yo, x + xo, inner.result, inner.input, length,
                 [=](T value, int64_t i) { return kept(k[i] != 0, value * factor); });
      return;
    }
    constexpr int64_t size = 256;
    char near[size];
    for (int64_t start = 0; start < length; start += size) {
      const int64_t n = length - start < size ? length - start : size;
      for (int64_t i = 0; i < n; ++i) near[i] = k[(start + i) * inner.mask];
      const char* const bytes = near;
      map_run<T>(y + yo + start * inner.result, x + xo + start * inner.input, inner.result, inner.input, n,
                 [=](T value, int64_t i) { return kept(bytes[i] != 0, value * factor); });
    }
  });
}

inline void keep_mask(uint8_t* keep, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw) {
  const InnerStrides inner(walk);
  MaskWindow window(draw);
  const int16_t below = window.below();
  for_each_run(walk, first, count, [&](int64_t length, int64_t, int64_t, int64_t mask) {
    while (length > 0) {
      int64_t part = length;
      if (inner.mask == 0) {
        int64_t one = 1;
        std::memset(keep, *window.at(mask, &one) < below, static_cast<size_t>(part));
      } else {
        const int16_t* halves = window.at(mask, &part);
#pragma omp simd
        for (int64_t i = 0; i < part; ++i) keep[i] = halves[i] < below;
      }
      length -= part;
      mask += part;
      keep += part;
    }
  });
}

// bits[0 .. (count + 7) / 8) = the bytes 0 or 1 of keep, eight in one, the first in the highest bit.
inline void pack_bits(uint8_t* bits, const uint8_t* keep, int64_t count) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  for (; count >= 8; count -= 8, keep += 8) {
    uint64_t eight;
    std::memcpy(&eight, keep, sizeof eight);
    *bits++ = static_cast<uint8_t>(eight * 0x8040201008040201u >> 56);  // byte k moves to bit 63 - k, without a carry
  }
#endif
  for (; count > 0; count -= 8, keep += 8, ++bits) {
    *bits = 0;
    for (int i = 0; i < 8 && i < count; ++i) *bits = static_cast<uint8_t>(*bits | keep[i] << (7 - i));
  }
}

template <class T>
constexpr DropoutKernels<T> dropout_table() {
  return {drop<T>,           drop_tiles<T>,  drop_add<T>, add_drop<T>, apply_mask<T>,
          gaussian_noise<T>, noise_tiles<T>, keep_mask,   pack_bits,   philox_blocks};
}

}  // namespace
}  // namespace fastnorm
