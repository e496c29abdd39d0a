// Smooth activations: y = f(x), dx = dy f'(x).
#include "cpu/backend.hpp"
#include "cpu/elementwise.hpp"
#include "math/activations.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
void forward(const ActivationForward& args, Stream stream) {
  using V = lanes_t<T>;
  map<T>(std::array{args.x}, std::array{args.y}, stream,
         [](const std::array<V, 1>& in) __attribute__((always_inline)) { return std::array{math::forward<T>(Act{}, in[0])}; });
}

template <class T, class Act>
void backward(const ActivationBackward& args, Stream stream) {
  using V = lanes_t<T>;
  map<T>(std::array{args.x, args.dy}, std::array{args.dx}, stream,
         [](const std::array<V, 2>& in)
             __attribute__((always_inline)) { return std::array{math::backward<T>(Act{}, in[0], in[1])}; });
}

}  // namespace

void activation_forward(const ActivationForward& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(args.act, [&]<class Act>(Act) { forward<T, Act>(args, stream); });
  });
}

void activation_backward(const ActivationBackward& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(args.act, [&]<class Act>(Act) { backward<T, Act>(args, stream); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
