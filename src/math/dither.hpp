// Subtractive dither of a derivative (docs/format.md section 7): code = floor(t + v) with t = (f' - lowest) / step, and the
// factor lowest + step (code + 1/2 - v), where v is uniform in (0, 1).
//
// Since f' is within [lowest, 1 - lowest], t is within [0, 2^bits - 1], and t + v < 2^bits: no code is ever cut off, so that
// the mean over v of floor(t + v) is t, of the factor f'.  code + 1/2 - v - t is uniform in an interval of length 1 around 0
// whatever t is: the variance is step^2 / 12.  v takes 2^16 values, by which the mean is off by 2^-17 steps at most.
#pragma once

#include "math/activations.hpp"
#include "math/codes.hpp"
#include "math/philox.hpp"

namespace unswag::math {

// The minimum of f', of an activation that dither serves, else 0.  f'(x) + f'(-x) = 1, so the maximum is 1 less it.
UNSWAG_HOST inline double lowest_slope(Activation act) {
  double lowest = 0;
  AllActivations::visit(act, [&](auto a) { lowest = decltype(a)::lowest_slope; });
  return lowest;
}

template <class S>
struct Dither {
  S lowest, step, per_step;

  // t + v, of which the code is the integral part.
  template <class V>
  UNSWAG_HD V dithered(V slope, V v) const {
    return (slope - V(lowest)) * V(per_step) + v;
  }
  // code + 1/2 - v is exact: 4 bits before the point, 17 behind.
  template <class V>
  UNSWAG_HD V factor(V code, V v) const {
    return V(lowest) + V(step) * ((code + V(0.5f)) - v);
  }
};
template <class S>
UNSWAG_HOST inline Dither<S> dither_of(Activation act, int bits) {
  const double lowest = lowest_slope(act), step = (1 - 2 * lowest) / ((1 << bits) - 1);
  return {S(lowest), S(step), S(1 / step)};
}

// x > just_below[i] when x >= i + 1: floor(x) by the comparisons of a step code, which takes NaN to 0.
template <class S>
UNSWAG_HOST inline Bounds<S> whole_bounds() {
  Bounds<S> b;
  for (int i = 0; i < (1 << most_code_bits) - 1; ++i) b.at[i] = S(i + 1) * (1 - (sizeof(S) == 8 ? S(0x1p-53) : S(0x1p-24f)));
  return b;
}

}  // namespace unswag::math
