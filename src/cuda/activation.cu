// Smooth activations: y = f(x), dx = dy f'(x).
#include "backend.hpp"
#include "cuda/map.hpp"
#include "math/activations.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
struct Forward {
  template <class V>
  UNSWAG_HD static Values<V, 1> apply(const Values<V, 1>& x) {
    return {{math::forward<T>(Act{}, x.v[0])}};
  }
};
template <class T, class Act>
struct Backward {
  template <class V>
  UNSWAG_HD static Values<V, 1> apply(const Values<V, 2>& x_dy) {
    return {{math::backward<T>(Act{}, x_dy.v[0], x_dy.v[1])}};
  }
};

}  // namespace

void activation_forward(const ActivationForward& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::AllActivations::visit(args.act, [&](auto act) { map<Forward<T, decltype(act)>, T>({args.x}, {args.y}, stream); });
  });
}

void activation_backward(const ActivationBackward& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::AllActivations::visit(args.act,
                                [&](auto act) { map<Backward<T, decltype(act)>, T>({args.x, args.dy}, {args.dx}, stream); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
