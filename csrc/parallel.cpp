// The thread pool: one job at a time, pieces taken from a counter, made anew in a forked child.
#include "parallel.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define FASTNORM_HAS_FORK
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fastnorm {
namespace {

// Below this a second thread costs more than it brings (waking one takes some microseconds).
constexpr int64_t kElementsPerThread = 16384;
// Pieces per thread: enough to even out a thread that comes late, few enough that taking one costs nothing.
constexpr int64_t kPiecesPerThread = 8;
// How long an idle thread watches for the next call before it sleeps: the time between two calls of a training step.
constexpr std::chrono::microseconds kWatch{50};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  void (*call)(const void* context, int64_t begin, int64_t end) = nullptr;
  const void* context = nullptr;
  int64_t count = 0, piece = 1;
};

// Threads that wait for jobs, one job at a time. Never destroyed: its threads may outlive everything at exit.
class Pool {
 public:
  // False if another thread's job is running: the caller then does its work alone.
  bool run(int helpers, const Job& job) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      job_ = job;
      next_.store(0, std::memory_order_relaxed);
      open_ = helpers;
      generation_.fetch_add(1, std::memory_order_release);
    }
    for (int i = 0; i < helpers && sleepers_.load() > 0; ++i) wake_.notify_one();
    work(job);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      open_ = 0;  // nobody enters any more
      for (int spins = 0; inside_ > 0 && spins < 1000; ++spins) {
        lock.unlock();
        pause();
        lock.lock();
      }
      done_.wait(lock, [this] { return inside_ == 0; });
    }
    return true;
  }

 private:
  void grow(int helpers) {
    if (size_ >= helpers) return;
#ifdef FASTNORM_HAS_FORK
    // Signals are for the application's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (size_ < helpers && start_thread()) ++size_;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#else
    while (size_ < helpers && start_thread()) ++size_;
#endif
  }

  // False if there are no more threads to be had: the pool goes on with those there are.
  bool start_thread() {
#ifdef FASTNORM_HAS_FORK
    // A stack of known size: some systems give a thread 128 KB, which the kernels' blocks would nearly fill.
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_attr_setstacksize(&attributes, 1 << 20);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    const auto serve = [](void* pool) -> void* {
      static_cast<Pool*>(pool)->serve();
      return nullptr;
    };
    const bool started = pthread_create(&thread, &attributes, serve, this) == 0;
    pthread_attr_destroy(&attributes);
    return started;
#else
    try {
      std::thread([this] { serve(); }).detach();
      return true;
    } catch (...) {
      return false;
    }
#endif
  }

  void work(const Job& job) {
    for (;;) {
      const int64_t begin = next_.fetch_add(job.piece, std::memory_order_relaxed);
      if (begin >= job.count) return;
      job.call(job.context, begin, begin + job.piece < job.count ? begin + job.piece : job.count);
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kWatch;
      while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) pause();
      std::unique_lock<std::mutex> lock(mutex_);
      if (generation_.load() == seen) {
        ++sleepers_;
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        --sleepers_;
      }
      seen = generation_.load();
      if (open_ == 0) continue;
      --open_;
      ++inside_;
      const Job job = job_;
      lock.unlock();
      work(job);
      lock.lock();
      if (--inside_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;   // held by the thread whose job this is
  std::mutex mutex_;  // guards what follows, but for the atomics
  std::condition_variable wake_, done_;
  Job job_;
  int size_ = 0, open_ = 0, inside_ = 0;
  std::atomic<int> sleepers_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> generation_{0};
};

std::atomic<Pool*> pool{nullptr};
std::atomic<int> limit{0};

Pool& the_pool() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found) return *found;
#ifdef FASTNORM_HAS_FORK
  // A child has none of the threads; it makes a pool of its own when it needs one, and never looks at this one again.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)registered;
#endif
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
  const int most = max_threads();
  return useful < 2 ? 1 : useful < most ? static_cast<int>(useful) : most;
}

void run_parallel(int threads, int64_t count, void (*call)(const void*, int64_t, int64_t), const void* context) {
  const int64_t pieces = kPiecesPerThread * threads;
  const Job job{call, context, count, (count + pieces - 1) / pieces};
  const int64_t helpers = (count < threads ? count : threads) - 1;
  if (!the_pool().run(static_cast<int>(helpers), job)) call(context, 0, count);
}

}  // namespace fastnorm
