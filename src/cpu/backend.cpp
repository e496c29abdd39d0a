// The row of one instruction set.
#include "cpu/backend.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

bool runs_here() {
#if defined(UNSWAG_ISA_PORTABLE)
  return true;
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return true;
#endif
}

}  // namespace

const Kernels backend = {
    .name = UNSWAG_ISA_NAME,
    .runs_here = runs_here,
    .mask_forward = mask_forward,
    .mask_backward = mask_backward,
    .activation_forward = activation_forward,
    .activation_backward = activation_backward,
    .gated_forward = gated_forward,
    .gated_backward = gated_backward,
    .rms_norm_forward = rms_norm_forward,
    .rms_norm_backward = rms_norm_backward,
    .cross_entropy = cross_entropy,
    .philox_fill = philox_fill,
    .dropout = dropout,
};

}  // namespace unswag::UNSWAG_ISA_NS
