// The row of src/cuda as plain C++.
#include "backend.hpp"
#include "team.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

bool runs_here() { return __builtin_cpu_supports("fma"); }

// Tests call the row as they call the others, which need no scratch.
void rms_norm_backward_with_scratch(const RmsNormBackward& args, Stream stream) {
  struct Context {
    RmsNormBackward args;
    Stream stream;
  } context{args, stream};
  test::with_memory(
      rms_norm_backward_scratch(args.x.rows, args.x.cols),
      [](void* memory, void* p) {
        Context& c = *static_cast<Context*>(p);
        c.args.scratch = memory;
        UNSWAG_ISA_NS::rms_norm_backward(c.args, c.stream);
      },
      &context);
}

constexpr Kernels emulated() {
  Kernels k = row(UNSWAG_ISA_NAME, runs_here);
  k.rms_norm_backward = rms_norm_backward_with_scratch;
  return k;
}

}  // namespace

extern const Kernels backend;
constexpr Kernels backend = emulated();

}  // namespace unswag::UNSWAG_ISA_NS
