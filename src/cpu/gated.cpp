// Gated units: h = f(gate) up, and their gradients in one pass.
#include "math/gated.hpp"

#include "backend.hpp"
#include "cpu/elementwise.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
struct Forward : Smooth<T, Act> {
  template <class V, class... Ahead>
  UNSWAG_INLINE static std::array<V, 1> apply(V gate, V up, Ahead... t) {
    return {math::gated_forward<T>(Act{}, gate, up, t...)};
  }
};
template <class T, class Act, bool WithProduct>
struct Backward : Smooth<T, Act> {
  template <class V, class... Ahead>
  UNSWAG_INLINE static auto apply(V gate, V up, V dh, Ahead... t) {
    const math::GatedGradient<V> g = math::gated_backward<T>(Act{}, gate, up, dh, t...);
    if constexpr (WithProduct) {
      return std::array{g.dgate, g.dup, g.h};
    } else {
      return std::array{g.dgate, g.dup};
    }
  }
};

}  // namespace

void gated_forward(const GatedForward& args, Stream stream) {
  visit(args.gate.dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(
        args.act, [&]<class Act>(Act) { map<Forward<T, Act>, T>(std::array{args.gate, args.up}, std::array{args.h}, stream); });
  });
}

void gated_backward(const GatedBackward& args, Stream stream) {
  visit(args.gate.dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(args.act, [&]<class Act>(Act) {
      const std::array in{args.gate, args.up, args.dh};
      if (args.h.data) {
        map<Backward<T, Act, true>, T>(in, std::array{args.dgate, args.dup, args.h}, stream);
      } else {
        map<Backward<T, Act, false>, T>(in, std::array{args.dgate, args.dup}, stream);
      }
    });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
