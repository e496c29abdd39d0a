// e^x, from which the formulas make the rest.
#pragma once

#include <type_traits>

#include "math/scalar.hpp"

namespace unswag::math {

// e^x = e^r 2^n with n = round(x / ln 2):  r = x - n ln 2 in two steps (n ln2_high is exact).  n is returned as
// z = 1.5 2^23 + n, for times_pow2.
template <class V>
UNSWAG_HD inline V exp_reduce(V x, V& z) {
  const V magic(0x1.8p23f);
  z = fma(x, V(1.44269504f), magic);
  const V n = z - magic;
  return fma(n, V(-1.42860677e-6f), fma(n, V(-0.693145751953125f), x));
}

// e^r for |r| <= ln(2) / 2, by a polynomial that is off by 2^-28.3 at most.
template <class V>
UNSWAG_HD inline V exp_reduced(V r) {
  V p = fma(r, V(0x1.6a2430p-10f), V(0x1.1239e4p-7f));
  p = fma(r, p, V(0x1.5558f2p-5f));
  p = fma(r, p, V(0x1.555492p-3f));
  p = fma(r, p, V(0x1.fffffcp-2f));
  return V(1.f) + fma(r * r, p, r);
}

// e^x, and e^(x + tail) for a small tail, where they are normal numbers.
template <class V>
UNSWAG_HD inline V exp_normal(V x) {
  V z;
  const V m = exp_reduced(exp_reduce(x, z));
  return times_pow2(m, z);
}
template <class V>
UNSWAG_HD inline V exp_normal(V x, V tail) {
  V z;
  const V m = exp_reduced(exp_reduce(x, z) + tail);
  return times_pow2(m, z);
}

// e^x over the whole range: right to 1 ulp, subnormal results too; 0 and inf beyond, NaN stays NaN.
template <class V>
UNSWAG_HD inline V exp_full(V x) {
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

UNSWAG_HD inline float exp(float x) { return exp_full(x); }
UNSWAG_HD inline double exp(double x) { return ::exp(x); }
UNSWAG_HD inline double erfc(double x) { return ::erfc(x); }

}  // namespace unswag::math
