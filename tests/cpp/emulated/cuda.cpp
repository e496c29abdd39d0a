// The row of src/cuda as plain C++.
#include "backend.hpp"
#include "team.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

bool runs_here() { return __builtin_cpu_supports("fma"); }

// Tests call the row as they call the others, which need no scratch.
template <class Args, void (*kernel)(const Args&, Stream), std::int64_t (*bytes)(std::int64_t rows, std::int64_t cols)>
void with_scratch(const Args& args, Stream stream) {
  struct Context {
    Args args;
    Stream stream;
  } context{args, stream};
  test::with_memory(
      bytes(args.x.rows, args.x.cols),
      [](void* memory, void* p) {
        Context& c = *static_cast<Context*>(p);
        c.args.scratch = memory;
        kernel(c.args, c.stream);
      },
      &context);
}

constexpr Kernels emulated() {
  Kernels k = row(UNSWAG_ISA_NAME, runs_here);
  k.rms_norm_backward = with_scratch<RmsNormBackward, rms_norm_backward, rms_norm_backward_scratch>;
  k.layer_norm_backward = with_scratch<LayerNormBackward, layer_norm_backward, layer_norm_backward_scratch>;
  return k;
}

}  // namespace

extern const Kernels backend;
constexpr Kernels backend = emulated();

}  // namespace unswag::UNSWAG_ISA_NS
