// The dropout kernels' entry points.
#pragma once

namespace fastnorm {

template <class T>
struct DropoutKernels {};

}  // namespace fastnorm
