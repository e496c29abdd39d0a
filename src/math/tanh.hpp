// tanh, for soft-capped logits.
#pragma once

#include <cmath>

#include "math/exp.hpp"

namespace unswag::math {

UNSWAG_HD inline double tanh(double x) { return ::tanh(x); }

// Below 0.6 an odd polynomial (relative error 2^-27), above it (1 - t) / (1 + t) with t = e^-2|x|, which there has lost
// nothing to cancellation: 2 ulp.  tanh(+-inf) = +-1; tanh(-0) is +0.
template <class V>
UNSWAG_HD inline V tanh(V x) {
  static_assert(is_float<V>, "the polynomial of tanh is for floats; lanes of double have a tanh of their own");
  const V a = abs(x), square = x * x;
  V p = fma(square, V(-0x1.82585p-8f), V(0x1.54b8ap-6f));
  p = fma(square, p, V(-0x1.b898dep-5f));
  p = fma(square, p, V(0x1.1109aep-3f));
  p = fma(square, p, V(-0x1.55553ep-2f));
  const V near_zero = fma(x * square, p, x);
  const V t = exp(a * V(-2.f));
  const V far = (V(1.f) - t) / (V(1.f) + t);
  return select(a < V(0.6f), near_zero, select(x < V(0.f), -far, far));
}

}  // namespace unswag::math
