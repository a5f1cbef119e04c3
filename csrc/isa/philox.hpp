// Philox4x32, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// Promises the published words for every counter and key, and the draws that docs/dropout.md specifies. Keeps no state.
// Compiled once per instruction-set level, inside an anonymous namespace; no standard containers.
#pragma once

#include <cstdint>

#include "dropout_kernels.hpp"

namespace fastnorm {
namespace {

enum PhiloxDomain : uint32_t { kMaskHighDomain = 0, kMaskLowDomain = 1, kNoiseDomain = 2 };

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

// One counter under one key. Always inlined and unrolled: a loop over counters around it becomes one vector lane each.
template <int rounds>
[[gnu::always_inline]] inline PhiloxWords philox4x32(PhiloxWords c, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < rounds; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.w0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.w2;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

[[gnu::always_inline]] inline PhiloxWords philox_block(uint64_t block, uint32_t domain, const PhiloxStream& stream) {
  return philox4x32<10>({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32) | domain << 30,
                         static_cast<uint32_t>(stream.offset), static_cast<uint32_t>(stream.offset >> 32)},
                        static_cast<uint32_t>(stream.seed), static_cast<uint32_t>(stream.seed >> 32));
}

constexpr int kGroupBlocks = 64;

// words[w][j] = word w of block first + j. Word-major, so that every lane stores without a shuffle.
inline void philox_group(uint32_t words[4][kGroupBlocks], uint64_t first, uint32_t domain, const PhiloxStream& stream) {
  const uint32_t low = static_cast<uint32_t>(first);
  const uint32_t high = static_cast<uint32_t>(first >> 32) | domain << 30;
  const uint32_t offset_low = static_cast<uint32_t>(stream.offset);
  const uint32_t offset_high = static_cast<uint32_t>(stream.offset >> 32);
  const uint32_t k0 = static_cast<uint32_t>(stream.seed);
  const uint32_t k1 = static_cast<uint32_t>(stream.seed >> 32);
#pragma omp simd
  for (int j = 0; j < kGroupBlocks; ++j) {
    const uint32_t block = low + static_cast<uint32_t>(j);
    const PhiloxWords out = philox4x32<10>({block, high + (block < low), offset_low, offset_high}, k0, k1);
    words[0][j] = out.w0;
    words[1][j] = out.w1;
    words[2][j] = out.w2;
    words[3][j] = out.w3;
  }
}

inline void philox_blocks(uint32_t* words, const uint32_t* counters, int64_t n, const uint32_t key[2], int rounds) {
  const uint32_t k0 = key[0], k1 = key[1];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t* c = counters + 4 * i;
    const PhiloxWords counter{c[0], c[1], c[2], c[3]};
    const PhiloxWords out = rounds == 7 ? philox4x32<7>(counter, k0, k1) : philox4x32<10>(counter, k0, k1);
    words[4 * i] = out.w0;
    words[4 * i + 1] = out.w1;
    words[4 * i + 2] = out.w2;
    words[4 * i + 3] = out.w3;
  }
}

}  // namespace
}  // namespace fastnorm
