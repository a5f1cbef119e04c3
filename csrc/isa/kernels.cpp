// The only translation unit of this folder: every file here is compiled once per instruction-set level, through this
// one. All but the table lives in anonymous namespaces, so that the linker can never merge code of different levels.
#include "isa/dropout.hpp"
#include "isa/norm.hpp"
#include "kernel_table.hpp"

#define FASTNORM_JOIN(a, b) FASTNORM_JOIN_(a, b)
#define FASTNORM_JOIN_(a, b) a##b
#define FASTNORM_TEXT(x) FASTNORM_TEXT_(x)
#define FASTNORM_TEXT_(x) #x

namespace fastnorm {

extern const KernelTable FASTNORM_JOIN(kernels_, FASTNORM_ISA);

const KernelTable FASTNORM_JOIN(kernels_, FASTNORM_ISA) = {
    FASTNORM_TEXT(FASTNORM_ISA),
    {moments<float>, forward<float>, apply<float>, backward<float>},
    {moments<double>, forward<double>, apply<double>, backward<double>},
    dropout_table<float>(),
    dropout_table<double>(),
    given_rstds,
};

}  // namespace fastnorm
