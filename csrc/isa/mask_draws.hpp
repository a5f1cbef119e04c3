// The sixteen-bit draws of a mask (docs/dropout.md, section 4) in the order of the elements, by the vector.
// Promises the bits of philox4x32 for every block, at the rate of its multiplications: one block per 64-bit lane, whose
// 32 x 32 -> 64 bit product leaves both words of a round in place, so that no word is ever moved until the last round.
// Refuses chunks that cross a multiple of 2^32 blocks. Compiled once per instruction-set level, inside an anonymous
// namespace; no standard containers.
#pragma once

#include <cstring>

#include "isa/philox.hpp"

namespace fastnorm {
namespace {

#if defined(__AVX512BW__)
constexpr int kDrawLanes = 8;
#elif defined(__AVX2__)
constexpr int kDrawLanes = 4;
#else
constexpr int kDrawLanes = 2;
#endif
typedef uint64_t DrawLanes __attribute__((vector_size(8 * kDrawLanes)));
typedef int16_t DrawHalves __attribute__((vector_size(8 * kDrawLanes)));

// Vectors in flight: a round is a chain of three operations of two or three cycles each, so that one vector alone would
// leave the multipliers idle three quarters of the time.
constexpr int kDrawFlight = 4;
constexpr int kDrawChunk = 8 * kDrawLanes * kDrawFlight;  // elements
constexpr int kDrawParts = 8;                             // pieces of other work that a chunk makes room for
static_assert(kDrawChunk % kDrawParts == 0 && kDrawChunk % 8 == 0,
              "a part is a whole number of elements, a chunk of blocks");

[[gnu::always_inline]] inline DrawLanes in_each_lane(uint64_t value) { return value - DrawLanes{}; }

// The products of the lanes' low halves. GCC does not see that the instruction for it fits, clang does.
[[gnu::always_inline]] inline DrawLanes product(DrawLanes a, uint32_t factor) {
  const DrawLanes b = in_each_lane(factor);
#if defined(__GNUC__) && !defined(__clang__) && defined(__SSE2__)
  typedef int Words __attribute__((vector_size(8 * kDrawLanes)));
#if defined(__AVX512BW__)
  typedef long long Result __attribute__((vector_size(8 * kDrawLanes)));
  return reinterpret_cast<DrawLanes>(
      __builtin_ia32_pmuludq512_mask(reinterpret_cast<Words>(a), reinterpret_cast<Words>(b), Result{}, 255));
#elif defined(__AVX2__)
  return reinterpret_cast<DrawLanes>(__builtin_ia32_pmuludq256(reinterpret_cast<Words>(a), reinterpret_cast<Words>(b)));
#else
  return reinterpret_cast<DrawLanes>(__builtin_ia32_pmuludq128(reinterpret_cast<Words>(a), reinterpret_cast<Words>(b)));
#endif
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// a[0] b[0] a[2] b[2] ... and a[1] b[1] a[3] b[3] ...
#if defined(__clang__)
#define FASTNORM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTNORM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, DrawLanes{__VA_ARGS__})
#endif
[[gnu::always_inline]] inline DrawLanes even_lanes(DrawLanes a, DrawLanes b) {
#if defined(__AVX512BW__)
  return FASTNORM_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
#elif defined(__AVX2__)
  return FASTNORM_SHUFFLE(a, b, 0, 4, 2, 6);
#else
  return FASTNORM_SHUFFLE(a, b, 0, 2);
#endif
}
[[gnu::always_inline]] inline DrawLanes odd_lanes(DrawLanes a, DrawLanes b) {
#if defined(__AVX512BW__)
  return FASTNORM_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#elif defined(__AVX2__)
  return FASTNORM_SHUFFLE(a, b, 1, 5, 3, 7);
#else
  return FASTNORM_SHUFFLE(a, b, 1, 3);
#endif
}
#undef FASTNORM_SHUFFLE

// The two words of each lane change places. GCC needs to be told the one instruction that AVX2 has for it.
[[gnu::always_inline]] inline DrawLanes swapped(DrawLanes a) {
#if !defined(__clang__) && defined(__AVX2__) && !defined(__AVX512BW__)
  typedef uint32_t Words __attribute__((vector_size(8 * kDrawLanes)));
  return reinterpret_cast<DrawLanes>(__builtin_shuffle(reinterpret_cast<Words>(a), Words{1, 0, 3, 2, 5, 4, 7, 6}));
#else
  return a >> 32 | a << 32;
#endif
}

// Sixteen bits less 2^15: signed numbers in the same order, which every instruction set can compare.
constexpr uint16_t kBias = 0x8000;
inline int16_t biased(uint64_t half) { return static_cast<int16_t>(static_cast<uint16_t>(half ^ kBias)); }

// What the sixteen high bits of a draw are compared with. An element whose bits tie is resolved by its other sixteen.
struct HalfThreshold {
  explicit HalfThreshold(uint64_t threshold)
      : tie(biased(threshold >> 16)),
        low(static_cast<uint16_t>(threshold)),
        below(threshold >> 16 > 0 ? tie : biased(1)) {}
  int16_t tie;
  uint16_t low;
  int16_t below;  // keep = half < below once ties are resolved; there is a number below it
};

// Makes the draws of consecutive blocks, a chunk at a time.
class MaskDraws {
 public:
  // Blocks from `block` on, up to a multiple of 2^32; the threshold is neither 0 nor 2^32.
  MaskDraws(const MaskDraw& draw, uint64_t block) : draw_(draw), threshold_(draw.threshold), block_(block) {
    uint32_t k0 = static_cast<uint32_t>(draw.stream.seed), k1 = static_cast<uint32_t>(draw.stream.seed >> 32);
    uint64_t key0[10], key1[10];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      key0[round] = k0;
      key1[round] = k1;
    }
    // Only word 0 of a counter changes from block to block. What does not depend on it in rounds 0 and 1 is done here.
    const uint32_t offset_low = static_cast<uint32_t>(draw.stream.offset);
    const uint64_t first = uint64_t{0xCD9E8D57u} * offset_low;
    const uint64_t second =
        uint64_t{0xD2511F53u} * static_cast<uint32_t>((first >> 32) ^ (block >> 32) ^ kHighBits ^ key0[0]);
    start_c2_ = (draw.stream.offset >> 32) ^ key1[0];
    start_c0_ = static_cast<uint32_t>(first) ^ key0[1];
    next_c2_ = (second >> 32) ^ key1[1];
    next_c3_ = static_cast<uint32_t>(second);
    std::memcpy(key0_, key0 + 2, sizeof key0_);
    std::memcpy(key1_, key1 + 2, sizeof key1_);
    key0_[7] ^= kBias * uint64_t{0x0001000100010001};
    key1_[7] ^= kBias * uint64_t{0x0001000100010001};
    seek(block);
  }

  // From another block on, the upper half of whose number is the same.
  void seek(uint64_t block) {
    block_ = block;
    // In this order of blocks, interleaving the lanes of two vectors puts every block where it belongs.
    for (int lane = 0; lane < kDrawLanes; ++lane) low_[lane] = block + lane % 2 * (kDrawLanes / 2) + lane / 2;
  }

  int16_t below() const { return threshold_.below; }

  // halves[0 .. kDrawChunk) = the next draws, ties resolved. meanwhile(part) is called for part in [0, kDrawParts):
  // work that does not need these draws, which fills the gaps that the chain of rounds leaves.
  template <class Meanwhile>
  [[gnu::always_inline]] inline void next(int16_t* halves, const Meanwhile& meanwhile) {
    DrawLanes c0[kDrawFlight], c1[kDrawFlight], c2[kDrawFlight], c3[kDrawFlight];
#pragma GCC unroll 4
    for (int v = 0; v < kDrawFlight; ++v) {
      c3[v] = product(low_ + static_cast<uint64_t>(v * kDrawLanes), 0xD2511F53u);
      c1[v] = product((c3[v] >> 32) ^ start_c2_, 0xCD9E8D57u);
      c0[v] = (c1[v] >> 32) ^ start_c0_;
      c2[v] = c3[v] ^ next_c2_;
      c3[v] = in_each_lane(next_c3_);
    }
    low_ += static_cast<uint64_t>(kDrawFlight * kDrawLanes);
    meanwhile(0);
    // The upper halves of c0 to c3 are not defined: a product does not look at them.
#pragma GCC unroll 7
    for (int round = 2; round < 9; ++round) {
#pragma GCC unroll 4
      for (int v = 0; v < kDrawFlight; ++v) {
        const DrawLanes p0 = product(c0[v], 0xD2511F53u), p1 = product(c2[v], 0xCD9E8D57u);
        c0[v] = (p1 >> 32) ^ c1[v] ^ key0_[round - 2];
        c2[v] = (p0 >> 32) ^ c3[v] ^ key1_[round - 2];
        c1[v] = p1;
        c3[v] = p0;
      }
      meanwhile(round - 1);
    }
    const DrawHalves to_tie = static_cast<int16_t>(threshold_.tie ^ INT16_MIN) - DrawHalves{};
    DrawHalves nearest = DrawHalves{};  // the distance of a tie is the least of all numbers
#pragma GCC unroll 4
    for (int v = 0; v < kDrawFlight; ++v) {
      const DrawLanes p0 = product(c0[v], 0xD2511F53u), p1 = product(c2[v], 0xCD9E8D57u);
      const DrawLanes words01 = swapped(p1) ^ (c1[v] & 0xFFFFFFFFu) ^ key0_[7];
      const DrawLanes words23 = swapped(p0) ^ (c3[v] & 0xFFFFFFFFu) ^ key1_[7];
      const DrawLanes blocks[2] = {even_lanes(words01, words23), odd_lanes(words01, words23)};
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        std::memcpy(halves + (2 * v + odd) * 4 * kDrawLanes, &blocks[odd], sizeof blocks[odd]);
        const DrawHalves distance = reinterpret_cast<DrawHalves>(blocks[odd]) ^ to_tie;
        nearest = distance < nearest ? distance : nearest;
      }
    }
    const DrawLanes ties = reinterpret_cast<DrawLanes>(nearest == static_cast<int16_t>(INT16_MIN) - DrawHalves{});
    uint64_t any = 0;
    for (int lane = 0; lane < kDrawLanes; ++lane) any |= ties[lane];
    if (__builtin_expect(any != 0, 0)) resolve_ties(halves);
    block_ += kDrawChunk / 8;
  }

 private:
  static constexpr uint64_t kHighBits = uint64_t{kMaskHighDomain} << 30;

  // One element in 65536 needs its other sixteen bits.
  [[gnu::noinline]] void resolve_ties(int16_t* halves) const {
    if (threshold_.low == 0) return;  // dropped, as the comparison says
    for (int i = 0; i < kDrawChunk; ++i) {
      if (halves[i] != threshold_.tie) continue;
      const PhiloxWords rest = philox_block(block_ + i / 8, kMaskLowDomain, draw_.stream);
      const uint32_t word[4] = {rest.w0, rest.w1, rest.w2, rest.w3};
      const bool keep = (word[i % 8 / 2] >> (i % 2 * 16) & 0xFFFF) < threshold_.low;
      halves[i] = keep ? INT16_MIN : threshold_.below;
    }
  }

  MaskDraw draw_;
  HalfThreshold threshold_;
  uint64_t block_;
  DrawLanes low_;
  uint64_t start_c2_, start_c0_, next_c2_, next_c3_;
  uint64_t key0_[8], key1_[8];
};

inline bool is_constant(const MaskDraw& draw) { return draw.threshold == 0 || draw.threshold >> 32 != 0; }

// Whole chunks from `block` on that no multiple of 2^32 cuts.
inline int64_t chunks_in_reach(uint64_t block) {
  return static_cast<int64_t>(((uint64_t{1} << 32) - static_cast<uint32_t>(block)) / (kDrawChunk / 8));
}

// halves[0 .. chunks * kDrawChunk) = the draws from `block` on, wherever that is.
[[gnu::noinline]] inline void fill_halves(int16_t* halves, uint64_t block, int64_t chunks, const MaskDraw& draw) {
  while (chunks > 0) {
    const int64_t reach = chunks_in_reach(block), count = reach < chunks ? reach : chunks;
    if (count > 0) {
      MaskDraws draws(draw, block);
      for (int64_t i = 0; i < count; ++i, halves += kDrawChunk) draws.next(halves, [](int) {});
      block += static_cast<uint64_t>(count) * (kDrawChunk / 8);
      chunks -= count;
      continue;
    }
    const HalfThreshold threshold(draw.threshold);
    for (int i = 0; i < kDrawChunk; ++i) {
      const auto half = [&](uint32_t domain) {
        const PhiloxWords w = philox_block(block + i / 8, domain, draw.stream);
        const uint32_t word[4] = {w.w0, w.w1, w.w2, w.w3};
        return static_cast<uint64_t>(word[i % 8 / 2] >> (i % 2 * 16) & 0xFFFF);
      };
      const uint64_t value = half(kMaskHighDomain) << 16 | half(kMaskLowDomain);
      halves[i] = value < draw.threshold ? INT16_MIN : threshold.below;
    }
    halves += kDrawChunk;
    block += kDrawChunk / 8;
    --chunks;
  }
}

}  // namespace
}  // namespace fastnorm
