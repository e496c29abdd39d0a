// e^x, from which the formulas make the rest.  exp(x) takes any value type; the others are for floats and for a part of their
// range, and do not compile for doubles.
#pragma once

#include <type_traits>

#include "math/scalar.hpp"

namespace unswag::math {

template <class V>
inline constexpr bool is_float = std::is_same_v<scalar_t<V>, float>;

// Below, Sign is 1 or -1 and stands before x, and Over is a power of two and stands below it: they cost nothing where they go
// into the coefficients, and change no bit.

// e^(Sign x) = e^(Sign r) 2^n with n = round(Sign x / ln 2):  r = x - Sign n ln 2 in two steps (n ln2_high is exact).  n is
// returned as z = 1.5 2^23 + n, for times_pow2.
template <int Sign = 1, class V>
UNSWAG_HD inline V exp_reduce(V x, V& z) {
  const V magic(0x1.8p23f);
  z = fma(x, V(Sign * 1.44269504f), magic);
  const V n = z - magic;
  return fma(n, V(Sign * -1.42860677e-6f), fma(n, V(Sign * -0.693145751953125f), x));
}

// e^(Sign r) for |r| <= ln(2) / 2, by a polynomial that is off by 2^-28.3 at most.
template <int Sign = 1, class V>
UNSWAG_HD inline V exp_reduced(V r) {
  V p = fma(r, V(Sign * 0x1.6a2430p-10f), V(0x1.1239e4p-7f));
  p = fma(r, p, V(Sign * 0x1.5558f2p-5f));
  p = fma(r, p, V(0x1.555492p-3f));
  p = fma(r, p, V(Sign * 0x1.fffffcp-2f));
  p = fma(r * r, p, r);
  if constexpr (Sign == 1) {
    return V(1.f) + p;
  } else {
    return V(1.f) - p;
  }
}

// e^(Sign x), and e^(Sign (x + tail)) for a small tail, where they are normal numbers.
template <int Sign = 1, class V>
UNSWAG_HD inline V exp_normal(V x) {
  static_assert(is_float<V>, "exp_normal is for floats; doubles have exp");
  V z;
  const V m = exp_reduced<Sign>(exp_reduce<Sign>(x, z));
  return times_pow2(m, z);
}
template <int Sign = 1, class V>
UNSWAG_HD inline V exp_normal(V x, V tail) {
  static_assert(is_float<V>, "exp_normal is for floats; doubles have exp");
  V z;
  const V m = exp_reduced<Sign>(exp_reduce<Sign>(x, z) + tail);
  return times_pow2(m, z);
}

// e^(Sign x / Over) where it is a normal number, in three steps less: off by 2^-22 at most down to e^-40.
template <int Sign = 1, int Over = 1, class V>
UNSWAG_HD inline V exp_short(V x) {
  static_assert(is_float<V>, "exp_short is for floats; doubles have exp");
  constexpr float f = Sign * (1.f / Over);
  const V magic(0x1.8p23f);
  const V z = fma(x, V(f * 1.44269504f), magic);
  const V r = fma(z - magic, V(-0.693147182f / f), x);
  V p = fma(r, V(f * f * f * f * f * 0x1.0fa0d8p-7f), V(f * f * f * f * 0x1.573a20p-5f));
  p = fma(r, p, V(f * f * f * 0x1.555a7ep-3f));
  p = fma(r, p, V(f * f * 0x1.fffdc6p-2f));
  p = fma(r, p, V(f * 0x1.fffff6p-1f));
  return times_pow2(fma(r, p, V(1.f)), z);
}

// e^x for any x: right to 1 ulp, subnormal results too; 0 and inf beyond, NaN stays NaN.
UNSWAG_HD inline double exp(double x) { return ::exp(x); }
template <class V>
UNSWAG_HD inline V exp(V x) {
  static_assert(is_float<V>, "the polynomial of exp is for floats; lanes of double have an exp of their own");
  V z;
  const V m = exp_reduced(exp_reduce(min(V(89.f), max(V(-104.5f), x)), z));
  // 2^n in two halves, each of them a normal number; only the last product rounds.
  const V magic(0x1.8p23f);
  const V n = z - magic;
  const V half = fma(n, V(0.5f), magic);
  return m * times_pow2(V(1.f), half) * times_pow2(V(1.f), magic + (n - (half - magic)));
}

// 2^64 e^(x + tail) for x <= 0 and a small tail; where `far` 2^192 e^(x + tail), for -218 < x.  The factor keeps small results
// normal, so that they can be multiplied on before the last rounding.  Double needs no second factor.
template <class V, class M>
UNSWAG_HD inline V exp_scaled(V x, V tail, M far) {
  if constexpr (std::is_same_v<scalar_t<V>, double>) {
    return exp(x) * (V(1.) + tail) * V(0x1p64);
  } else {
    V z;
    const V m = exp_reduced(exp_reduce(x, z) + tail);
    return times_pow2(m, z + select(far, V(192.f), V(64.f)));
  }
}

UNSWAG_HD inline double erfc(double x) { return ::erfc(x); }

}  // namespace unswag::math
