// How many threads a call gets, and the process's pool of them, made anew in a forked child.
#include "parallel.hpp"

#include <cstdlib>

#include "thread_pool.hpp"

namespace fastnorm {
namespace {

// Below this a second thread costs more than it brings, even one that is awake.
constexpr int64_t kElementsPerThread = 16384;

std::atomic<Pool*> pool{nullptr};
std::atomic<int> limit{0};
std::atomic<uint64_t> calls{0};  // that may use several threads

#ifdef FASTNORM_HAS_FORK
// A child has none of the threads; it makes a pool of its own when it needs one, and never looks at this one again.
// Registered as the module is loaded: a static variable of the_pool would be made under a lock of C++'s, which a child
// forked by another thread at that moment would find held for ever.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
#endif

Pool& the_pool() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found) return *found;
  Pool* made = new Pool;
  if (!pool.compare_exchange_strong(found, made)) {
    delete made;  // another thread was first; this one has no threads yet
    return *found;
  }
  return *made;
}

// OMP_NUM_THREADS (its first number), or else the CPUs this process may use.
int default_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    const long threads = std::strtol(text, nullptr, 10);
    if (threads > 0) return threads < 4096 ? static_cast<int>(threads) : 4096;
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  const unsigned cores = std::thread::hardware_concurrency();
  return cores > 0 ? static_cast<int>(cores) : 1;
}

}  // namespace

int max_threads() {
  int threads = limit.load(std::memory_order_relaxed);
  if (threads == 0) {
    threads = default_threads();
    limit.store(threads);
  }
  return threads;
}

void set_max_threads(int threads) { limit.store(threads); }

int threads_for(int64_t elements) {
  const int64_t useful = elements / kElementsPerThread;
  if (useful < 2) return 1;
  const int most = max_threads();
  if (most > 1) calls.fetch_add(1, std::memory_order_relaxed);
  return useful < most ? static_cast<int>(useful) : most;
}

void run_parallel(int threads, int64_t count, void (*call)(const void*, int64_t, int64_t), const void* context,
                  bool backwards) {
  const int64_t helpers = (count < threads ? count : threads) - 1;
  const uint64_t number = calls.load(std::memory_order_relaxed);
  if (!the_pool().run(static_cast<int>(helpers), count, {call, context, backwards}, number)) call(context, 0, count);
}

}  // namespace fastnorm
