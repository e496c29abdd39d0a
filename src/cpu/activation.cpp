// Smooth activations: y = f(x), dx = dy f'(x).
#include "cpu/backend.hpp"
#include "cpu/elementwise.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
struct Forward : Smooth<T, Act> {
  template <bool Plain, class V>
  UNSWAG_INLINE static std::array<V, 1> apply(const std::array<V, 1>& in) {
    return {math::forward<T, Plain>(Act{}, in[0])};
  }
};
template <class T, class Act>
struct Backward : Smooth<T, Act> {
  template <bool Plain, class V>
  UNSWAG_INLINE static std::array<V, 1> apply(const std::array<V, 2>& in) {
    return {math::backward<T, Plain>(Act{}, in[0], in[1])};
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
