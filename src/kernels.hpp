// What a backend provides: one row of function pointers.  The arguments have been checked by src/api before a kernel sees
// them, so a kernel returns nothing: it cannot fail; where there are no elements it is not called.  A kernel that a backend
// lacks is null, and the next slower row serves.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "unswag/unswag.hpp"

namespace unswag {

struct Kernels {
  const char* name = nullptr;
  bool (*runs_here)() = nullptr;
  void (*mask_forward)(const MaskForward&, Stream) = nullptr;
  void (*mask_backward)(const MaskBackward&, Stream) = nullptr;
  void (*activation_forward)(const ActivationForward&, Stream) = nullptr;
  void (*activation_backward)(const ActivationBackward&, Stream) = nullptr;
  void (*gated_forward)(const GatedForward&, Stream) = nullptr;
  void (*gated_backward)(const GatedBackward&, Stream) = nullptr;
  void (*rms_norm_forward)(const RmsNormForward&, Stream) = nullptr;
  void (*rms_norm_backward)(const RmsNormBackward&, Stream) = nullptr;
  void (*layer_norm_forward)(const LayerNormForward&, Stream) = nullptr;
  void (*layer_norm_backward)(const LayerNormBackward&, Stream) = nullptr;
  void (*cross_entropy)(const CrossEntropy&, Stream) = nullptr;
  void (*block_encode)(const BlockEncode&, Stream) = nullptr;
  void (*block_decode)(const BlockDecode&, Stream) = nullptr;
  void (*philox_fill)(std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset, Stream) = nullptr;
  void (*dropout)(const Dropout&, Stream) = nullptr;
  void (*code_forward)(const CodeForward&, Stream) = nullptr;
  void (*code_backward)(const CodeBackward&, Stream) = nullptr;
  void (*dither_forward)(const DitherForward&, Stream) = nullptr;
  void (*dither_backward)(const DitherBackward&, Stream) = nullptr;
  void (*nonzero_count)(const NonzeroCount&, Stream) = nullptr;
  void (*nonzero_encode)(const NonzeroEncode&, Stream) = nullptr;
  void (*nonzero_decode)(const NonzeroDecode&, Stream) = nullptr;
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
