#pragma once

#include "kernels.hpp"
#include "unswag/pinned.hpp"

namespace unswag {

// What the device's row provides; no functions without one.
PinnedSource pinned_source(const DeviceKernels* device);

}  // namespace unswag
