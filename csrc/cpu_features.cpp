// Asks the compiler's runtime; on other machines than x86-64 there is the baseline alone.
#include "cpu_features.hpp"

#include <atomic>
#include <cstdio>
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

namespace {

// What this CPU shares of a cache level, in bytes; 0 if the system does not say. (sysconf adds up a whole socket.)
int64_t bytes_of_level(int level) {
  char path[64];
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", level);
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return 0;
  long long size = 0;
  char unit = 0;
  const int read = std::fscanf(file, "%lld%c", &size, &unit);
  std::fclose(file);
  if (read < 1) return 0;
  return size * (unit == 'K' ? 1 << 10 : unit == 'M' ? 1 << 20 : 1);
}

std::atomic<int64_t>& last_cache() {
  constexpr int64_t kUnknown = 32 << 20;
  static std::atomic<int64_t> bytes{[] {
    const int64_t last = bytes_of_level(3) > 0 ? bytes_of_level(3) : bytes_of_level(2);
    return last > 0 ? last : kUnknown;
  }()};
  return bytes;
}

std::atomic<int64_t>& core_cache() {
  constexpr int64_t kUnknown = 1 << 20;
  static std::atomic<int64_t> bytes{bytes_of_level(2) > 0 ? bytes_of_level(2) : kUnknown};
  return bytes;
}

}  // namespace

int64_t cache_bytes() { return last_cache().load(std::memory_order_relaxed); }
void set_cache_bytes(int64_t bytes) { last_cache().store(bytes); }
int64_t core_bytes() { return core_cache().load(std::memory_order_relaxed); }
void set_core_bytes(int64_t bytes) { core_cache().store(bytes); }

bool exceeds_cache(int64_t bytes) { return bytes >= cache_bytes() / 2; }
bool exceeds_core(int64_t bytes) { return bytes > core_bytes(); }

}  // namespace fastnorm
