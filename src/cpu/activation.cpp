// Smooth activations: y = f(x), dx = dy f'(x).
#include "backend.hpp"
#include "cpu/elementwise.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
struct Forward : Smooth<T, Act> {
  template <class V, class... Ahead>
  UNSWAG_INLINE static std::array<V, 1> apply(V x, Ahead... t) {
    return {math::forward<T>(Act{}, x, t...)};
  }
};
template <class T, class Act>
struct Backward : Smooth<T, Act> {
  template <class V, class... Ahead>
  UNSWAG_INLINE static std::array<V, 1> apply(V x, V dy, Ahead... t) {
    return {math::backward<T>(Act{}, x, dy, t...)};
  }
};

}  // namespace

void activation_forward(const ActivationForward& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(
        args.act, [&]<class Act>(Act) { map<Forward<T, Act>, T>(std::array{args.x}, std::array{args.y}, stream); });
  });
}

void activation_backward(const ActivationBackward& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(
        args.act, [&]<class Act>(Act) { map<Backward<T, Act>, T>(std::array{args.x, args.dy}, std::array{args.dx}, stream); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
