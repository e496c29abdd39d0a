// What the sources of one backend define in its namespace, and its row of the table.
#pragma once

#include "kernels.hpp"

namespace unswag::UNSWAG_ISA_NS {

#define KERNEL(entry, ...) void entry(__VA_ARGS__, Stream stream);
UNSWAG_KERNELS(KERNEL)
#undef KERNEL

constexpr Kernels row(const char* name, bool (*runs_here)()) {
  Kernels k;
  k.name = name;
  k.runs_here = runs_here;
#define KERNEL(entry, ...) k.entry = entry;
  UNSWAG_KERNELS(KERNEL)
#undef KERNEL
  return k;
}

}  // namespace unswag::UNSWAG_ISA_NS
