// What the formulas of src/math ask of a value type V.  Formulas are templates over V and are written once; V is float or
// double (here), or 16 lanes of them (src/cpu/simd.hpp, found by argument-dependent lookup).
#pragma once

#include <cmath>
#include <cstdint>

#include "math/dtype.hpp"
#include "math/hd.hpp"

namespace unswag::math {

template <class V>
struct value_traits {
  using scalar = typename V::scalar;
};
template <>
struct value_traits<float> {
  using scalar = float;
};
template <>
struct value_traits<double> {
  using scalar = double;
};
// The type of one lane.
template <class V>
using scalar_t = typename value_traits<V>::scalar;

UNSWAG_HD inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
UNSWAG_HD inline double fma(double a, double b, double c) { return ::fma(a, b, c); }
UNSWAG_HD inline float abs(float x) { return ::fabsf(x); }
UNSWAG_HD inline double abs(double x) { return ::fabs(x); }
template <class S>
UNSWAG_HD inline S select(bool condition, S a, S b) {
  return condition ? a : b;
}
UNSWAG_HD inline bool negative(float x) { return x < 0; }
UNSWAG_HD inline bool negative(double x) { return x < 0; }
UNSWAG_HD inline bool all(bool condition) { return condition; }
// As on x86: the second operand when either is NaN or both are zero.
UNSWAG_HD inline float min(float a, float b) { return a < b ? a : b; }
UNSWAG_HD inline double min(double a, double b) { return a < b ? a : b; }
UNSWAG_HD inline float max(float a, float b) { return a > b ? a : b; }
UNSWAG_HD inline double max(double a, double b) { return a > b ? a : b; }

// a b - p, exact when p is a b rounded.
UNSWAG_HD inline float product_error(float a, float b, float p) { return ::fmaf(a, b, -p); }
UNSWAG_HD inline double product_error(double a, double b, double p) { return ::fma(a, b, -p); }

// m 2^n for z = 1.5 2^23 + n (double: 1.5 2^52 + n), whose low bits hold n: one shift and one addition to m's exponent.
// The result must be normal.
UNSWAG_HD inline float times_pow2(float m, float z) {
  return bit_cast<float>(bit_cast<std::uint32_t>(m) + (bit_cast<std::uint32_t>(z) << 23));
}
UNSWAG_HD inline double times_pow2(double m, double z) {
  return bit_cast<double>(bit_cast<std::uint64_t>(m) + (bit_cast<std::uint64_t>(z) << 52));
}

}  // namespace unswag::math
