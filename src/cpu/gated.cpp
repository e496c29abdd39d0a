// Gated units: h = f(gate) up, and their gradients in one pass.
#include "math/gated.hpp"

#include "cpu/backend.hpp"
#include "cpu/elementwise.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
void forward(const GatedForward& args, Stream stream) {
  using V = lanes_t<T>;
  map<T>(std::array{args.gate, args.up}, std::array{args.h}, stream,
         [](const std::array<V, 2>& in)
             __attribute__((always_inline)) { return std::array{math::gated_forward<T>(Act{}, in[0], in[1])}; });
}

template <class T, class Act>
void backward(const GatedBackward& args, Stream stream) {
  using V = lanes_t<T>;
  const std::array in{args.gate, args.up, args.dh};
  if (args.h.data) {
    map<T>(in, std::array{args.dgate, args.dup, args.h}, stream, [](const std::array<V, 3>& x) __attribute__((always_inline)) {
      const math::GatedGradient<V> g = math::gated_backward<T>(Act{}, x[0], x[1], x[2]);
      return std::array{g.dgate, g.dup, g.h};
    });
  } else {
    map<T>(in, std::array{args.dgate, args.dup}, stream, [](const std::array<V, 3>& x) __attribute__((always_inline)) {
      const math::GatedGradient<V> g = math::gated_backward<T>(Act{}, x[0], x[1], x[2]);
      return std::array{g.dgate, g.dup};
    });
  }
}

}  // namespace

void gated_forward(const GatedForward& args, Stream stream) {
  visit(args.gate.dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(args.act, [&]<class Act>(Act) { forward<T, Act>(args, stream); });
  });
}

void gated_backward(const GatedBackward& args, Stream stream) {
  visit(args.gate.dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(args.act, [&]<class Act>(Act) { backward<T, Act>(args, stream); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
