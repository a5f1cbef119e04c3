# The only place where instruction-set and optimisation flags of the kernels appear.
#
# fastnorm_add_isa(<level> <flags>...) compiles csrc/isa/kernels.cpp for one level. The rules, each of which has bitten
# a well-known library: no contraction of a*b+c (every level must give the same bits), no -ffast-math (it sets
# flush-to-zero for the whole process), optimised even in Debug builds, no link-time optimisation, no exceptions (their
# tables bring a weak symbol).

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  set(FASTNORM_X86_64 TRUE)
else()
  set(FASTNORM_X86_64 FALSE)
endif()

set(FASTNORM_KERNEL_FLAGS -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-exceptions -fno-lto)
if(FASTNORM_SANITIZE)
  list(TRANSFORM FASTNORM_KERNEL_FLAGS REPLACE "^-O3$" "-O1")  # every access is checked: a level takes minutes as it is
endif()

# OpenMP's SIMD loops; its threads are not used (csrc/parallel.hpp says why), so no runtime library is needed.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-fopenmp-simd FASTNORM_HAS_OPENMP_SIMD)
if(FASTNORM_HAS_OPENMP_SIMD)
  list(APPEND FASTNORM_KERNEL_FLAGS -fopenmp-simd)
else()
  message(WARNING "This compiler has no OpenMP SIMD (-fopenmp-simd): fastnorm works, but its kernels are slower.")
endif()

# The jump of a short loop that lies across two lines of the instruction cache made it three times as slow (Zen 5): what
# is changed in one kernel then slows down another, by 10 % in all (batch norm of 8 x 64 x 8 x 8).
check_cxx_compiler_flag(-falign-loops=64 FASTNORM_HAS_ALIGNED_LOOPS)
if(FASTNORM_HAS_ALIGNED_LOOPS)
  list(APPEND FASTNORM_KERNEL_FLAGS -falign-loops=64)
endif()

function(fastnorm_add_isa level)
  add_library(fastnorm_isa_${level} OBJECT csrc/isa/kernels.cpp)
  target_include_directories(fastnorm_isa_${level} PRIVATE csrc)
  target_compile_definitions(fastnorm_isa_${level} PRIVATE FASTNORM_ISA=${level})
  target_compile_options(fastnorm_isa_${level} PRIVATE ${FASTNORM_KERNEL_FLAGS} ${ARGN})
  target_sources(fastnorm_kernels PRIVATE $<TARGET_OBJECTS:fastnorm_isa_${level}>)
  target_compile_definitions(fastnorm_kernels PRIVATE FASTNORM_HAS_ISA_${level})
endfunction()
