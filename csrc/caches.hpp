// The size of the last-level cache: what decides whether results are better written past it. A guess where the system
// does not tell.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace fastnorm {
namespace {

inline int64_t last_level_cache() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const long found = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (found > 0) return static_cast<int64_t>(found);
#endif
    return int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace
}  // namespace fastnorm
