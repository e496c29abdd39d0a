// Gated units: h = f(gate) up.
#pragma once

#include "math/activations.hpp"

namespace unswag::math {

template <class T, bool Plain = false, class Act, class V>
UNSWAG_HD inline V gated_forward(Act act, V gate, V up) {
  return forward<T, Plain>(act, gate) * up;
}

//   dgate = dh up f'(gate),   dup = dh f(gate),   h = f(gate) up
template <class V>
struct GatedGradient {
  V dgate, dup, h;
};
template <class T, bool Plain = false, class Act, class V>
UNSWAG_HD inline GatedGradient<V> gated_backward(Act act, V gate, V up, V dh) {
  V y, dgate;
  forward_backward<T, Plain>(act, gate, dh * up, y, dgate);
  return {dgate, dh * y, y * up};
}

}  // namespace unswag::math
