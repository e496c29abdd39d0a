// What a backend provides: one row of function pointers.  The arguments have been checked by src/api before a kernel sees
// them, so a kernel returns nothing: it cannot fail.  A kernel that a backend lacks is null, and the next slower row serves.
#pragma once

#include <cstdint>
#include <span>

#include "unswag/unswag.hpp"

namespace unswag {

struct Kernels {
  const char* name;
  bool (*runs_here)();
  void (*mask_forward)(const MaskForward&, Stream);
  void (*mask_backward)(const MaskBackward&, Stream);
  void (*activation_forward)(const ActivationForward&, Stream);
  void (*activation_backward)(const ActivationBackward&, Stream);
  void (*gated_forward)(const GatedForward&, Stream);
  void (*gated_backward)(const GatedBackward&, Stream);
  void (*rms_norm_forward)(const RmsNormForward&, Stream);
  void (*rms_norm_backward)(const RmsNormBackward&, Stream);
  void (*cross_entropy)(const CrossEntropy&, Stream);
  void (*philox_fill)(std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset, Stream);
  void (*dropout)(const Dropout&, Stream);
};

// Slowest first; row 0 is the portable one, and the only one that has f64.
std::span<const Kernels* const> all_kernels();

// The row that serves calls now.
const Kernels& kernels();

}  // namespace unswag
