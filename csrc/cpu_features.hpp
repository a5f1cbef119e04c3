// What this CPU and its operating system can run, by the names of the instruction-set levels.
#pragma once

namespace fastnorm {

bool cpu_supports(const char* level);

}  // namespace fastnorm
