// Smooth activations: y = f(x), dx = dy f'(x).
#include "cpu/activation.hpp"

#include "backend.hpp"
#include "cpu/elementwise.hpp"
#include "cpu/lanes.hpp"

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

void activation_values(Activation act, DType dtype, const void* x, void* y, std::int64_t n, bool streaming) {
  visit(dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(act, [&]<class Act>(Act) {
      const std::array in{static_cast<const T*>(x)};
      const std::array out{static_cast<T*>(y)};
      if constexpr (has_fast_loops) {
        if (streaming) return stream_span<Forward<T, Act>>(in, out, n);
      }
      map_span<false, Forward<T, Act>>(in, out, n);
    });
  });
}

void activation_slopes(Activation act, DType dtype, const void* x, void* slope, std::int64_t n) {
  visit(dtype, [&]<class T>(math::type<T>) {
    math::AllActivations::visit(act, [&]<class Act>(Act) {
      using V = lanes_t<T>;
      const T* from = static_cast<const T*>(x);
      auto* to = static_cast<typename V::scalar*>(slope);
      each_lanes(n, [&](std::int64_t i, std::int64_t count) {
        const std::array<V, 1> s = Backward<T, Act>::apply(load_lanes<V>(from + i, count), V(1));
        store_lanes(to + i, s[0], count);
      });
    });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
