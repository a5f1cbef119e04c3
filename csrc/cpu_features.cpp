// Asks the compiler's runtime; on other machines than x86-64 there is the baseline alone.
#include "cpu_features.hpp"

#include <unistd.h>

#include <cstring>

namespace fastnorm {

bool cpu_supports(const char* level) {
  if (std::strcmp(level, "baseline") == 0) return true;
#if defined(__x86_64__)
  // The builtin also asks the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(level, "avx2") == 0) return avx2;
  if (std::strcmp(level, "avx512") == 0) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

bool exceeds_cache(int64_t bytes) {
  static const int64_t cache = [] {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (size > 0) return static_cast<int64_t>(size);
#endif
    return int64_t{32} << 20;
  }();
  return bytes > cache / 2;
}

}  // namespace fastnorm
