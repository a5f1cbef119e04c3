// What this CPU and its operating system can run, by the names of the instruction-set levels, and what its cache holds.
#pragma once

#include <cstdint>

namespace fastnorm {

bool cpu_supports(const char* level);

// Do the arrays of a call, `bytes` together, take half of the last-level cache or more? Then a result is better
// written past it: it would push out its own beginning and what the call has still to read.
bool exceeds_cache(int64_t bytes);
// Are they more than a core has in caches of its own?
bool exceeds_core(int64_t bytes);

// The sizes that these go by: this CPU's, or what was set.
int64_t cache_bytes();
void set_cache_bytes(int64_t bytes);
int64_t core_bytes();
void set_core_bytes(int64_t bytes);

}  // namespace fastnorm
