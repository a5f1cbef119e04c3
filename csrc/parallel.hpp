// Threads: how many a call may use, and the loop that uses them. Work is cut by shape, never by thread count, so that
// the bits of a result do not depend on what is decided here.
//
// The pool is the project's own, because OpenMP's has a barrier at the end of every loop: a call whose second thread is
// not scheduled, for another process has the core, waits for it (0.2 ms become 8 ms), and a child process that inherits
// the pool's state waits for ever. Here the caller works too, and waits for nothing but pieces that another thread has
// begun.
#pragma once

#include <cstdint>

namespace fastnorm {

int max_threads();
void set_max_threads(int threads);  // threads >= 1

// Threads for a call that touches `elements` array elements: 1 for small work. Asked once a call: so calls are told
// apart, which may use several threads one after the other.
int threads_for(int64_t elements);

// call(context, begin, end) over pieces of [0, count), on the caller and up to `threads` - 1 others, each of which
// takes its own from the first to the last, or `backwards`. An overflow that the processor has noted of any of them is
// noted of the caller (noted.hpp).
void run_parallel(int threads, int64_t count, void (*call)(const void* context, int64_t begin, int64_t end),
                  const void* context, bool backwards);

namespace {

// body(begin, end) for pieces of [0, count).
template <class Body>
inline void parallel_pieces(int threads, int64_t count, const Body& body, bool backwards = false) {
  if (threads <= 1 || count <= 1) return body(0, count);
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  run_parallel(threads, count, call, &body, backwards);
}

// body(i) for i in [0, count). Backwards, a thread that has just read its part finds the end of it in its caches.
template <class Body>
inline void parallel_for(int threads, int64_t count, const Body& body, bool backwards = false) {
  const auto piece = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(backwards ? begin + end - 1 - i : i);
  };
  parallel_pieces(threads, count, piece, backwards);
}

}  // namespace
}  // namespace fastnorm
