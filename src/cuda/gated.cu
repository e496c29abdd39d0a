// Gated units: h = f(gate) up, and their gradients in one pass.
#include "backend.hpp"
#include "cuda/map.hpp"
#include "math/gated.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
struct Forward {
  template <class V>
  UNSWAG_HD static Values<V, 1> apply(const Values<V, 2>& gate_up) {
    return {{math::gated_forward<T>(Act{}, gate_up.v[0], gate_up.v[1])}};
  }
};
template <class T, class Act, int Out>
struct Backward {
  template <class V>
  UNSWAG_HD static Values<V, Out> apply(const Values<V, 3>& gate_up_dh) {
    const math::GatedGradient<V> g = math::gated_backward<T>(Act{}, gate_up_dh.v[0], gate_up_dh.v[1], gate_up_dh.v[2]);
    if constexpr (Out == 3) {
      return {{g.dgate, g.dup, g.h}};
    } else {
      return {{g.dgate, g.dup}};
    }
  }
};

}  // namespace

void gated_forward(const GatedForward& args, Stream stream) {
  math::visit(args.gate.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::AllActivations::visit(args.act,
                                [&](auto act) { map<Forward<T, decltype(act)>, T>({args.gate, args.up}, {args.h}, stream); });
  });
}

void gated_backward(const GatedBackward& args, Stream stream) {
  math::visit(args.gate.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::AllActivations::visit(args.act, [&](auto act) {
      if (args.h.data) {
        map<Backward<T, decltype(act), 3>, T>({args.gate, args.up, args.dh}, {args.dgate, args.dup, args.h}, stream);
      } else {
        map<Backward<T, decltype(act), 2>, T>({args.gate, args.up, args.dh}, {args.dgate, args.dup}, stream);
      }
    });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
