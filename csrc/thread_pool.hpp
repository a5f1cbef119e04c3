// The thread pool: one job at a time, every thread with a share of its own, helpers woken only when that pays. No
// thread ever waits for a lock that another holds while it works. Included by parallel.cpp alone.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define FASTNORM_HAS_FORK
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>
#endif

#include "noted.hpp"

namespace fastnorm {
namespace {

using Clock = std::chrono::steady_clock;
using Duration = Clock::duration;

// Pieces of a thread's share: enough to even out a thread that comes late, few enough that taking one costs nothing.
constexpr int64_t kPiecesPerShare = 8;
// How long an idle thread watches for the next call before it sleeps: the time between two calls of a training step.
constexpr Duration kWatch = std::chrono::microseconds(50);
// To wake a thread costs the caller 5 to 10 us, and in a virtual machine up to 50: this much work makes it worth it. If
// calls came in a series when it was last awake, so many after the one that had woken it, the next ones will pay for
// it.
constexpr Duration kWorthWaking = std::chrono::microseconds(60), kWorthWakingForSeries = std::chrono::microseconds(8);
constexpr uint64_t kSeries = 4;
// A caller that waits this long, and twice as long as it worked, for a thread that took a piece has met one that
// another process keeps from running.
constexpr Duration kStalled = std::chrono::microseconds(200);
// After that it works alone for so many times as long as it waited.
constexpr int kAloneAfterStall = 16;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The CPU this thread is on; -1 where it cannot be told.
int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// The system's number of this thread.
int current_thread() {
#if defined(__linux__)
  return static_cast<int>(syscall(SYS_gettid));
#else
  return 0;
#endif
}

// Lets a thread, a helper, run on any CPU of the process but `cpu`; false if there is no other, or the system refuses.
// Where all CPUs are busy, the system may wake a helper on its caller's own, in whose place it would then work.
bool keep_off(int thread, int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  if (cpu >= CPU_SETSIZE || sched_getaffinity(getpid(), sizeof set, &set) != 0) return false;
  CPU_CLR(cpu, &set);
  return CPU_COUNT(&set) > 0 && sched_setaffinity(thread, sizeof set, &set) == 0;
#else
  (void)thread;
  (void)cpu;
  return false;
#endif
}

struct Job {
  void (*call)(const void* context, int64_t begin, int64_t end) = nullptr;
  const void* context = nullptr;
  bool backwards = false;  // every thread begins at the end of its share
  int64_t piece = 1;
  int shares = 1;
};

// What one thread is to do. The same part of the same arrays goes to the same thread in every call, and is then in its
// cache; who has finished takes pieces of the others' shares.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t begin = 0, end = 0;
};

// Threads that wait for jobs, one job at a time. Never destroyed: its threads may outlive everything at exit.
class Pool {
 public:
  // False if the caller had better do its work alone: another thread's job is running, or there is no helper to be had.
  // Jobs of one call have the same number, if no other thread calls at the same time.
  bool run(int helpers, int64_t count, Job job, uint64_t call) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    const bool done = run_with(helpers, count, job, call);
    busy_.store(false, std::memory_order_release);
    return done;
  }

 private:
  // A helper's own: where it sleeps.
  struct Helper {
    Pool* pool = nullptr;
    int index = 0;  // its share; 0 is the caller's
    std::atomic<int> thread{0};
    std::atomic<int> kept_off{-1};  // the CPU that it may not run on: its caller's, when they last met
    std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable wake;
  };

  bool run_with(int helpers, int64_t count, Job& job, uint64_t call) {
    const Clock::time_point start = Clock::now();
    if (start < alone_until_) return false;
    if (size_ == 0) woken_in_ = call;  // a new helper is awake
    grow(helpers);
    if (helpers > size_) helpers = size_;
    if (helpers < 1) return false;
    job.shares = helpers + 1;
    int64_t done = 0;
    if (helpers_[0]->asleep.load()) {
      done = begin_alone(start, count, job);
      if (done == count) return true;
      woken_in_ = call;
    }
    last_joined_ = call;
    open(job.backwards ? 0 : done, job.backwards ? count - done : count, job);
    wake(0);
    work(job, 0);
    last_end_ = close(start);
    if (overflowed_.load(std::memory_order_relaxed)) Overflow::note();
    alone_ = Duration::zero();
    return true;
  }

  // While the helper sleeps: the first pieces, each as long as all before it, show how long the whole will take.
  // Returns how much is done when a helper is to join, which may be all.
  int64_t begin_alone(Clock::time_point start, int64_t count, const Job& job) {
    const Duration before = start - last_end_ > kWatch ? Duration::zero() : alone_;
    const Duration worth = last_joined_ - woken_in_ < kSeries ? kWorthWaking : kWorthWakingForSeries;
    const int64_t pieces = kPiecesPerShare * job.shares;
    int64_t done = 0, length = count > pieces ? count / pieces : 1;
    for (;;) {
      const int64_t end = length < count - done ? done + length : count;
      job.call(job.context, job.backwards ? count - end : done, job.backwards ? count - done : end);
      done = end;
      const Clock::time_point now = Clock::now();
      if (done == count) {
        last_end_ = now;
        alone_ = before + (now - start);
        return count;
      }
      const double share = static_cast<double>(count) / static_cast<double>(done);
      const Duration whole = before + std::chrono::duration_cast<Duration>((now - start) * share);
      if (whole >= worth) return done;
      length = 4 * whole < worth ? count : done;
    }
  }

  // Cuts [begin, end) into shares and lets helpers in.
  void open(int64_t begin, int64_t end, Job& job) {
    const int64_t share = (end - begin) / job.shares, longer = (end - begin) % job.shares;
    job.piece = share > kPiecesPerShare ? share / kPiecesPerShare : 1;
    for (int i = 0; i < job.shares; ++i) {
      shares_[i].next.store(begin, std::memory_order_relaxed);
      shares_[i].begin = begin;
      shares_[i].end = begin += share + (i < longer);
    }
    job_ = job;
    caller_cpu_.store(current_cpu(), std::memory_order_relaxed);
    overflowed_.store(false, std::memory_order_relaxed);
    state_.store(0, std::memory_order_release);
    generation_.fetch_add(1);
  }

  // Nobody enters any more; waits for those who are inside.
  Clock::time_point close(Clock::time_point start) {
    state_.fetch_or(kClosed);
    const Clock::time_point idle = Clock::now();
    Clock::time_point now = idle;
    while (state_.load(std::memory_order_acquire) & kInside) {
      if (now - idle < kWatch) {
        for (int i = 0; i < 32 && state_.load(std::memory_order_relaxed) & kInside; ++i) pause();
      } else {
        std::unique_lock<std::mutex> lock(done_mutex_);
        state_.fetch_or(kWaiting);
        done_.wait(lock, [this] { return (state_.load() & kInside) == 0; });
      }
      now = Clock::now();
    }
    if (now - idle > kStalled && now - idle > 2 * (idle - start)) alone_until_ = now + kAloneAfterStall * (now - idle);
    return now;
  }

  // Is the job still open? Then this helper is inside until it leaves.
  bool enter() {
    uint32_t state = state_.load(std::memory_order_acquire);
    while (!(state & kClosed)) {
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }
  void leave() {
    const uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kInside) != 1 || !(before & kWaiting)) return;
    {
      std::lock_guard<std::mutex> lock(done_mutex_);
    }  // the caller is waiting now, or has seen that nobody is inside
    done_.notify_one();
  }

  bool take(const Job& job, Share& share) {
    if (share.next.load(std::memory_order_relaxed) >= share.end) return false;
    const int64_t begin = share.next.fetch_add(job.piece, std::memory_order_relaxed);
    if (begin >= share.end) return false;
    const int64_t end = begin + job.piece < share.end ? begin + job.piece : share.end;
    const int64_t both = share.begin + share.end;
    job.call(job.context, job.backwards ? both - end : begin, job.backwards ? both - begin : end);
    return true;
  }

  void work(const Job& job, int own) {
    for (int i = 0; i < job.shares; ++i) {
      Share& share = shares_[(own + i) % job.shares];
      while (take(job, share)) {
      }
    }
  }

  void wake(int helper) {
    Helper& sleeper = *helpers_[static_cast<size_t>(helper)];
    if (!sleeper.asleep.load()) return;
    // The caller may have moved to where the helper was put: both would want that CPU, and the caller has it.
    const int cpu = caller_cpu_.load(std::memory_order_relaxed), old = sleeper.kept_off.load(std::memory_order_relaxed);
    if (old >= 0 && cpu >= 0 && cpu != old) keep_off(sleeper, cpu);
    {
      std::lock_guard<std::mutex> lock(sleeper.mutex);
    }  // it sleeps now, or has seen the new job
    sleeper.wake.notify_one();
  }

  static void keep_off(Helper& helper, int cpu) {
    if (!fastnorm::keep_off(helper.thread.load(std::memory_order_relaxed), cpu)) return;
    helper.kept_off.store(cpu, std::memory_order_relaxed);
  }

  void serve(Helper& self) {
    self.thread.store(current_thread(), std::memory_order_relaxed);
    uint64_t seen = 0;
    for (;;) {
      const Clock::time_point until = Clock::now() + kWatch;
      while (generation_.load(std::memory_order_acquire) == seen && Clock::now() < until) {
        for (int i = 0; i < 32 && generation_.load(std::memory_order_relaxed) == seen; ++i) pause();
        // The caller may be waiting for this very core.
        if (generation_.load(std::memory_order_relaxed) == seen) std::this_thread::yield();
      }
      if (generation_.load() == seen) {
        std::unique_lock<std::mutex> lock(self.mutex);
        self.asleep.store(true);
        self.wake.wait(lock, [&] { return generation_.load() != seen; });
        self.asleep.store(false);
      }
      seen = generation_.load();
      const int cpu = current_cpu();
      if (cpu >= 0 && cpu == caller_cpu_.load(std::memory_order_relaxed)) keep_off(self, cpu);
      if (!enter()) continue;
      const Job job = job_;
      if (self.index < job.shares) {
        // Helpers wake each other: a caller that woke all of them itself would do nothing else.
        for (int other = 2 * self.index - 1; other <= 2 * self.index && other < job.shares - 1; ++other) wake(other);
        Overflow::clear();
        work(job, self.index);
        if (Overflow::any()) overflowed_.store(true, std::memory_order_relaxed);
      }
      leave();
    }
  }

  // Only while the job is closed and nobody is inside.
  void grow(int helpers) {
    if (size_ >= helpers) return;
    std::unique_ptr<Share[]> shares(new (std::nothrow) Share[static_cast<size_t>(helpers) + 1]);
    if (!shares) return;
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
    shares_ = std::move(shares);
  }

  // False if there are no more threads to be had: the pool goes on with those there are.
  bool start_thread() {
    try {
      std::unique_ptr<Helper> helper(new Helper);
      helper->pool = this;
      helper->index = size_ + 1;
      helpers_.push_back(std::move(helper));
      if (started(*helpers_.back())) return true;
      helpers_.pop_back();
    } catch (...) {
    }
    return false;
  }

  bool started(Helper& helper) {
#ifdef FASTNORM_HAS_FORK
    // A stack of known size: some systems give a thread 128 KB, which the kernels' blocks would nearly fill.
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_attr_setstacksize(&attributes, 1 << 20);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    const auto serve = [](void* helper) -> void* {
      Helper& self = *static_cast<Helper*>(helper);
      self.pool->serve(self);
      return nullptr;
    };
    const bool started = pthread_create(&thread, &attributes, serve, &helper) == 0;
    pthread_attr_destroy(&attributes);
    return started;
#else
    std::thread([&helper] { helper.pool->serve(helper); }).detach();
    return true;
#endif
  }

  static constexpr uint32_t kClosed = 1u << 31, kWaiting = 1u << 30, kInside = kWaiting - 1;

  std::atomic<bool> busy_{false};  // held by the thread whose job this is, for what is not atomic here
  std::atomic<uint32_t> state_{kClosed};
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> caller_cpu_{-1};
  std::atomic<bool> overflowed_{false};  // what the processor noted of a helper's arithmetic is the caller's as well
  Job job_;
  std::unique_ptr<Share[]> shares_;
  std::vector<std::unique_ptr<Helper>> helpers_;
  int size_ = 0;
  Clock::time_point last_end_, alone_until_;
  uint64_t woken_in_ = 0, last_joined_ = 0;  // the calls that woke helpers and that had them at work, last
  Duration alone_ = Duration::zero();        // spent in jobs close to each other while the helper slept
  std::mutex done_mutex_;
  std::condition_variable done_;
};

}  // namespace
}  // namespace fastnorm
