// The row of one instruction set.
#include "backend.hpp"

#if defined(__AVX2__)
#include <cpuid.h>
#endif

namespace unswag::UNSWAG_ISA_NS {
namespace {

bool runs_here() {
#if defined(UNSWAG_ISA_PORTABLE)
  return true;
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl")
#ifdef __AVX512BF16__
         && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2")
#endif
      ;
#elif defined(__AVX2__)
  unsigned eax, ebx, ecx, edx;  // __builtin_cpu_supports does not know f16c in Clang before 15
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
         (ecx & bit_F16C);
#else
  return true;
#endif
}

}  // namespace

extern const Kernels backend;
constexpr Kernels backend = row(UNSWAG_ISA_NAME, runs_here);

}  // namespace unswag::UNSWAG_ISA_NS
