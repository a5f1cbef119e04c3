#include "parallel.hpp"

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define FASTNORM_HAS_FORK
#endif

#define FASTNORM_TEXT(x) FASTNORM_TEXT_(x)
#define FASTNORM_TEXT_(x) #x

namespace fastnorm {
namespace {

// Below this a second thread costs more than it brings (waking one takes some microseconds).
constexpr int64_t kElementsPerThread = 16384;

std::atomic<int> limit{0};
std::atomic<bool> pool_used{false};
std::atomic<bool> pool_lost{false};

#ifdef FASTNORM_HAS_FORK
void after_fork_in_child() {
  if (pool_used.load()) pool_lost.store(true);
}
#endif

}  // namespace

int max_threads() {
  int threads = limit.load(std::memory_order_relaxed);
  if (threads == 0) {
#ifdef _OPENMP
    threads = omp_get_max_threads();
#else
    threads = 1;
#endif
    limit.store(threads);
  }
  return threads;
}

void set_max_threads(int threads) { limit.store(threads); }

int threads_for(int64_t elements) {
#ifdef _OPENMP
  const int64_t useful = elements / kElementsPerThread;
  if (useful < 2) return 1;
  const int most = max_threads();
  if (most == 1 || pool_lost.load(std::memory_order_relaxed)) return 1;
#ifdef FASTNORM_HAS_FORK
  if (!pool_used.exchange(true)) pthread_atfork(nullptr, nullptr, after_fork_in_child);
#endif
  return useful < most ? static_cast<int>(useful) : most;
#else
  (void)elements;
  return 1;
#endif
}

const char* openmp_version() {
#ifdef _OPENMP
  return FASTNORM_TEXT(_OPENMP);
#else
  return "none";
#endif
}

}  // namespace fastnorm
