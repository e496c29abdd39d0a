// Plain arrays of sixteen; the compiler may vectorise the loops.
#pragma once

#include <cmath>

namespace unswag::UNSWAG_ISA_NS {

// lanes [0, 16): result = expression in i
#define UNSWAG_LANES(Result, expression)                    \
  Result result;                                            \
  for (int i = 0; i < 16; ++i) result.lane[i] = expression; \
  return result

struct array16_mask {
  static constexpr int size = 16;
  bool lane[16];
  UNSWAG_INLINE static array16_mask from_bits(unsigned bits) { UNSWAG_LANES(array16_mask, (bits >> i & 1) != 0); }
  UNSWAG_INLINE unsigned bits() const {
    unsigned bits = 0;
    for (int i = 0; i < 16; ++i) bits |= unsigned(lane[i]) << i;
    return bits;
  }
  UNSWAG_INLINE friend array16_mask operator&(array16_mask a, array16_mask b) {
    UNSWAG_LANES(array16_mask, a.lane[i] && b.lane[i]);
  }
  UNSWAG_INLINE friend array16_mask operator|(array16_mask a, array16_mask b) {
    UNSWAG_LANES(array16_mask, a.lane[i] || b.lane[i]);
  }
  UNSWAG_INLINE friend array16_mask operator~(array16_mask a) { UNSWAG_LANES(array16_mask, !a.lane[i]); }
};

template <class S>
struct array16 {
  using scalar = S;
  using mask = array16_mask;
  static constexpr int size = 16;
  S lane[16];

  array16() = default;
  UNSWAG_INLINE array16(S x) {
    for (S& l : lane) l = x;
  }

  UNSWAG_INLINE static array16 load(const double* p) { UNSWAG_LANES(array16, S(p[i])); }
  template <class T>
  UNSWAG_INLINE static array16 load(const T* p) {
    UNSWAG_LANES(array16, S(math::to_float(p[i])));
  }
  UNSWAG_INLINE void store(double* p) const {
    for (int i = 0; i < 16; ++i) p[i] = double(lane[i]);
  }
  template <class T>
  UNSWAG_INLINE void store(T* p) const {
    for (int i = 0; i < 16; ++i) {
      p[i] = math::from_float<T>(sizeof(S) == 8 && sizeof(T) == 2 ? math::to_odd(lane[i]) : float(lane[i]));
    }
  }
  template <class T>
  UNSWAG_INLINE void stream(T* p) const {
    store(p);
  }

  UNSWAG_INLINE friend array16 operator-(array16 a) { UNSWAG_LANES(array16, -a.lane[i]); }
  UNSWAG_INLINE friend array16 operator+(array16 a, array16 b) { UNSWAG_LANES(array16, a.lane[i] + b.lane[i]); }
  UNSWAG_INLINE friend array16 operator-(array16 a, array16 b) { UNSWAG_LANES(array16, a.lane[i] - b.lane[i]); }
  UNSWAG_INLINE friend array16 operator*(array16 a, array16 b) { UNSWAG_LANES(array16, a.lane[i] * b.lane[i]); }
  UNSWAG_INLINE friend array16 operator/(array16 a, array16 b) { UNSWAG_LANES(array16, a.lane[i] / b.lane[i]); }
  UNSWAG_INLINE friend array16 fma(array16 a, array16 b, array16 c) {
    UNSWAG_LANES(array16, a.lane[i] * b.lane[i] + c.lane[i]);
  }
  UNSWAG_INLINE friend array16 min(array16 a, array16 b) { UNSWAG_LANES(array16, math::min(a.lane[i], b.lane[i])); }
  UNSWAG_INLINE friend array16 max(array16 a, array16 b) { UNSWAG_LANES(array16, math::max(a.lane[i], b.lane[i])); }
  UNSWAG_INLINE friend array16 abs(array16 a) { UNSWAG_LANES(array16, math::abs(a.lane[i])); }
  UNSWAG_INLINE friend array16 sqrt(array16 a) {
    if constexpr (sizeof(S) == 4) {
      UNSWAG_LANES(array16, ::sqrtf(a.lane[i]));
    } else {
      UNSWAG_LANES(array16, ::sqrt(a.lane[i]));
    }
  }
  UNSWAG_INLINE friend mask operator<(array16 a, array16 b) { UNSWAG_LANES(mask, a.lane[i] < b.lane[i]); }
  UNSWAG_INLINE friend mask operator<=(array16 a, array16 b) { UNSWAG_LANES(mask, a.lane[i] <= b.lane[i]); }
  UNSWAG_INLINE friend mask operator>(array16 a, array16 b) { UNSWAG_LANES(mask, a.lane[i] > b.lane[i]); }
  UNSWAG_INLINE friend mask operator>=(array16 a, array16 b) { UNSWAG_LANES(mask, a.lane[i] >= b.lane[i]); }
  UNSWAG_INLINE friend mask operator==(array16 a, array16 b) { UNSWAG_LANES(mask, a.lane[i] == b.lane[i]); }
  UNSWAG_INLINE friend mask operator!=(array16 a, array16 b) { UNSWAG_LANES(mask, a.lane[i] != b.lane[i]); }
  UNSWAG_INLINE friend mask negative(array16 a) { return a < array16(S(0)); }
  UNSWAG_INLINE friend array16 select(mask m, array16 a, array16 b) {
    UNSWAG_LANES(array16, m.lane[i] ? a.lane[i] : b.lane[i]);
  }
  UNSWAG_INLINE friend S reduce_add(array16 a) {
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) a.lane[i] = a.lane[i] + a.lane[i + half];
    }
    return a.lane[0];
  }
  UNSWAG_INLINE friend S reduce_max(array16 a) {
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) a.lane[i] = math::max(a.lane[i], a.lane[i + half]);
    }
    return a.lane[0];
  }
  UNSWAG_INLINE friend array16 product_error(array16 a, array16 b, array16 p) {
    if constexpr (sizeof(S) == 4) {  // the product of two floats is exact in double
      UNSWAG_LANES(array16, S(double(a.lane[i]) * double(b.lane[i]) - double(p.lane[i])));
    } else {
      UNSWAG_LANES(array16, math::product_error(a.lane[i], b.lane[i], p.lane[i]));
    }
  }
  UNSWAG_INLINE friend array16 times_pow2(array16 m, array16 z) {
    UNSWAG_LANES(array16, math::times_pow2(m.lane[i], z.lane[i]));
  }
};

// Integers, for the masks.
template <class I>
struct ints {
  using scalar = I;
  using mask = array16_mask;
  static constexpr int size = 16;
  I lane[16];

  ints() = default;
  UNSWAG_INLINE ints(I x) {
    for (I& l : lane) l = x;
  }

  UNSWAG_INLINE static ints load(const I* p) {
    ints result;
    memcpy(result.lane, p, sizeof result.lane);
    return result;
  }
  UNSWAG_INLINE void store(I* p) const { memcpy(p, lane, sizeof lane); }
  UNSWAG_INLINE void stream(I* p) const { store(p); }

  UNSWAG_INLINE friend mask operator<(ints a, ints b) { UNSWAG_LANES(mask, a.lane[i] < b.lane[i]); }
  UNSWAG_INLINE friend mask operator<=(ints a, ints b) { UNSWAG_LANES(mask, a.lane[i] <= b.lane[i]); }
  UNSWAG_INLINE friend mask operator>(ints a, ints b) { UNSWAG_LANES(mask, a.lane[i] > b.lane[i]); }
  UNSWAG_INLINE friend mask operator>=(ints a, ints b) { UNSWAG_LANES(mask, a.lane[i] >= b.lane[i]); }
  UNSWAG_INLINE friend mask operator==(ints a, ints b) { UNSWAG_LANES(mask, a.lane[i] == b.lane[i]); }
  UNSWAG_INLINE friend mask operator!=(ints a, ints b) { UNSWAG_LANES(mask, a.lane[i] != b.lane[i]); }
  UNSWAG_INLINE friend ints select(mask m, ints a, ints b) { UNSWAG_LANES(ints, m.lane[i] ? a.lane[i] : b.lane[i]); }
};
#undef UNSWAG_LANES

using i32x32 = twice<ints<std::int32_t>>;
using i16x32 = twice<ints<std::int16_t>>;
using i64x32 = twice<ints<std::int64_t>>;

using f32x16 = array16<float>;
using f64x16 = array16<double>;

UNSWAG_INLINE f64x16 exp(f64x16 x) {
  for (double& l : x.lane) l = ::exp(l);
  return x;
}

UNSWAG_INLINE f64x16 erfc(f64x16 x) {
  for (double& l : x.lane) l = ::erfc(l);
  return x;
}

UNSWAG_INLINE f64x16 tanh(f64x16 x) {
  for (double& l : x.lane) l = ::tanh(l);
  return x;
}

UNSWAG_INLINE void stream_32_bytes(void* to, const void* from) { memcpy(to, from, 32); }
UNSWAG_INLINE void stream_fence() {}

}  // namespace unswag::UNSWAG_ISA_NS
