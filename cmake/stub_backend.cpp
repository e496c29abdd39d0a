// Stands in for src/cpu/backend.cpp until that exists.
#include "kernels.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {
bool runs_here() { return true; }
}  // namespace
extern const Kernels backend;
const Kernels backend{.name = UNSWAG_ISA_NAME, .runs_here = runs_here};
}  // namespace unswag::UNSWAG_ISA_NS
