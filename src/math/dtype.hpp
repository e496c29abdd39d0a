// The 16-bit floats as storage, their conversions, and the one switch from a run-time DType to a type.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/hd.hpp"
#include "unswag/tensor.hpp"

namespace unswag {

struct f16 {  // IEEE binary16
  std::uint16_t bits;
};
struct bf16 {  // the upper half of a binary32
  std::uint16_t bits;
};
static_assert(sizeof(f16) == 2 && sizeof(bf16) == 2, "storage types have no padding");

namespace math {

template <class To, class From>
UNSWAG_HD inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

UNSWAG_HD inline float to_float(float x) { return x; }
UNSWAG_HD inline float to_float(bf16 x) { return bit_cast<float>(std::uint32_t(x.bits) << 16); }
UNSWAG_HD inline float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fff;
  std::uint32_t bits = (magnitude << 13) + (112u << 23);  // normal: the exponent's bias goes from 15 to 127
  if (magnitude > 0x7c00) bits = 0x7fc00000 | magnitude << 13;
  if (magnitude == 0x7c00) bits = 0x7f800000;
  if (magnitude < 0x0400) bits = bit_cast<std::uint32_t>(float(magnitude) * 0x1p-24f);
  return bit_cast<float>(sign | bits);
#endif
}

// Rounding is to nearest even; a NaN stays one (quiet, upper payload bits kept, where the processor keeps them); what is too
// large becomes inf.
template <class T>
UNSWAG_HD inline T from_float(float x);
template <>
UNSWAG_HD inline float from_float<float>(float x) {
  return x;
}
template <>
UNSWAG_HD inline bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {std::uint16_t(bits >> 16 | 0x40)};
  return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}
template <>
UNSWAG_HD inline f16 from_float<f16>(float x) {
#ifdef __CUDA_ARCH__
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  const std::uint32_t magnitude = bits & 0x7fffffff;
  std::uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // 65520, halfway between the largest finite number and the next
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // 2^-14: subnormal; the unit in the last place of 0.5 + |x| is its 2^-24
    half = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  }
  return {std::uint16_t(sign | half)};
#endif
}

// x on its way to 16 bits: cut to float with a last bit that is odd when something was cut off, so that from_float rounds as
// if it had seen all of x (two roundings to nearest would not).
UNSWAG_HD inline float to_odd(double x) {
  const float near = float(x);
  if (double(near) == x || x != x) return near;
  std::uint32_t bits = bit_cast<std::uint32_t>(near);
  if ((double(near) > x) == (x > 0)) --bits;  // towards zero
  return bit_cast<float>(bits | 1);
}

// visit(dtype, f) calls f(type<T>{}) with the T of dtype.
template <class T>
struct type {
  using of = T;
};
template <class F>
UNSWAG_HOST inline void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(type<float>{});
    case DType::f16: return f(type<f16>{});
    case DType::bf16: return f(type<bf16>{});
    case DType::f64: return f(type<double>{});
  }
}

}  // namespace math
}  // namespace unswag
