// Gated units: h = f(gate) up.
#pragma once

#include "math/activations.hpp"

namespace unswag::math {

// `t` is nothing, or Act::ahead(gate) where gate is plain.
template <class T, class Act, class V, class... Ahead>
UNSWAG_HD inline V gated_forward(Act act, V gate, V up, Ahead... t) {
  return forward<T>(act, gate, t...) * up;
}

//   dgate = dh up f'(gate),   dup = dh f(gate),   h = f(gate) up
template <class V>
struct GatedGradient {
  V dgate, dup, h;
};
template <class T, class Act, class V, class... Ahead>
UNSWAG_HD inline GatedGradient<V> gated_backward(Act act, V gate, V up, V dh, Ahead... t) {
  V y, dgate;
  forward_backward<T>(act, gate, t..., dh * up, y, dgate);
  return {dgate, dh * y, y * up};
}

}  // namespace unswag::math
