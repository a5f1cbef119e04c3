// Threads: how many a call may use, and the loop that uses them. Work is cut by shape, never by thread count, so that the
// bits of a result do not depend on what is decided here.
#pragma once

#include <cstdint>

namespace fastnorm {

int max_threads();
void set_max_threads(int threads);  // threads >= 1

// Threads for a call that touches `elements` array elements: 1 for small work, and 1 in a child forked after this process
// had used its OpenMP threads (that pool does not exist in the child, and waiting for it would hang).
int threads_for(int64_t elements);

// "201511" and the like, or "none".
const char* openmp_version();

namespace {

// body(i) for i in [0, count), on up to `threads` threads.
template <class Body>
inline void parallel_for(int threads, int64_t count, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
    const int team = count < threads ? static_cast<int>(count) : threads;
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#endif
  (void)threads;
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace
}  // namespace fastnorm
