// What a backend provides: one row of function pointers.  The arguments have been checked by src/api before a kernel sees
// them, so a kernel returns nothing: it cannot fail; where there are no elements it is not called.  A kernel that a backend
// lacks is null, and the next slower row serves.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "unswag/unswag.hpp"

namespace unswag {

// The kernels: KERNEL(name, arguments...); a Stream comes after the arguments.
#define UNSWAG_KERNELS(KERNEL)                                                                      \
  KERNEL(mask_forward, const MaskForward&)                                                          \
  KERNEL(mask_backward, const MaskBackward&)                                                        \
  KERNEL(activation_forward, const ActivationForward&)                                              \
  KERNEL(activation_backward, const ActivationBackward&)                                            \
  KERNEL(gated_forward, const GatedForward&)                                                        \
  KERNEL(gated_backward, const GatedBackward&)                                                      \
  KERNEL(rms_norm_forward, const RmsNormForward&)                                                   \
  KERNEL(rms_norm_backward, const RmsNormBackward&)                                                 \
  KERNEL(layer_norm_forward, const LayerNormForward&)                                               \
  KERNEL(layer_norm_backward, const LayerNormBackward&)                                             \
  KERNEL(cross_entropy, const CrossEntropy&)                                                        \
  KERNEL(block_encode, const BlockEncode&)                                                          \
  KERNEL(block_decode, const BlockDecode&)                                                          \
  KERNEL(philox_fill, std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset) \
  KERNEL(dropout, const Dropout&)                                                                   \
  KERNEL(code_forward, const CodeForward&)                                                          \
  KERNEL(code_backward, const CodeBackward&)                                                        \
  KERNEL(dither_forward, const DitherForward&)                                                      \
  KERNEL(dither_backward, const DitherBackward&)                                                    \
  KERNEL(nonzero_count, const NonzeroCount&)                                                        \
  KERNEL(nonzero_encode, const NonzeroEncode&)                                                      \
  KERNEL(nonzero_decode, const NonzeroDecode&)

struct Kernels {
  const char* name = nullptr;
  bool (*runs_here)() = nullptr;
#define KERNEL(entry, ...) void (*entry)(__VA_ARGS__, Stream) = nullptr;
  UNSWAG_KERNELS(KERNEL)
#undef KERNEL
};

// The row of a kind of device, and what only a device has.  Its kernels queue work and return; `launched` says what went wrong.
struct DeviceKernels {
  Kernels kernels;
  Status (*ready)(int device) = nullptr;  // driver, device and architecture are there
  Status (*launched)() = nullptr;         // the end of what the calling thread queued since it last asked
  void (*fill)(const Vector& v, double value, Stream) = nullptr;
  std::vector<std::string_view> (*architectures)() = nullptr;
  void* (*pinned_allocate)(std::int64_t bytes) = nullptr;  // page-locked host memory for every device; null: refused
  void (*pinned_release)(void* data) = nullptr;
};

// CUDA's, or null where unswag::cuda is not linked in.
const DeviceKernels* device_kernels();

// The row that serves calls now.
const Kernels& kernels();

}  // namespace unswag
