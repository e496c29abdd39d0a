// The 1-bit masks: which elements pass the gradient, and the forward that goes with them.
//
// Frameworks differ on NaN, so each predicate has a name that says what it does.  They compare the bits of x as integers:
// the answer is the same with subnormals flushed or not, and 16-bit floats need no widening.  I is an integer type of the
// width of x (signed), or lanes of it (src/cpu/simd/), with the bits of a float or 16-bit float in it; Format says where
// its infinity is.
#pragma once

#include <cstdint>
#include <utility>

#include "math/dtype.hpp"
#include "math/hd.hpp"
#include "math/scalar.hpp"
#include "unswag/unswag.hpp"

namespace unswag::math {

// A floating type seen as an integer: positive numbers are in order, negative ones (sign bit set) in reverse order.  flushed
// is the largest that is a zero where subnormals are; half has none: its subnormals are normal floats.
template <class T>
struct Format;
template <>
struct Format<float> {
  using bits = std::int32_t;
  static constexpr bits minus_zero = bits(0x80000000), negative_infinity = bits(0xff800000), six = 0x40c00000,
                        flushed = 0x007fffff;
};
template <>
struct Format<f16> {
  using bits = std::int16_t;
  static constexpr bits minus_zero = bits(0x8000), negative_infinity = bits(0xfc00), six = 0x4600, flushed = 0;
};
template <>
struct Format<bf16> {
  using bits = std::int16_t;
  static constexpr bits minus_zero = bits(0x8000), negative_infinity = bits(0xff80), six = 0x40c0, flushed = 0x007f;
};
template <>
struct Format<double> {
  using bits = std::int64_t;
  static constexpr bits minus_zero = bits(0x8000000000000000), negative_infinity = bits(0xfff0000000000000),
                        six = 0x4018000000000000, flushed = 0x000fffffffffffff;
};

template <class T>
inline constexpr typename Format<T>::bits infinity_bits = Format<T>::negative_infinity ^ Format<T>::minus_zero;

// not (x <= 0): positive or NaN.  PyTorch's relu passes the gradient of NaN.
template <class T, class I>
UNSWAG_HD inline auto not_le_zero(I x) {
  return (x > I(Format<T>::negative_infinity)) & (x != I(0));
}
// x > 0: NaN is not.  Here and below, `zero` is the largest number that counts as 0: 0 or Format<T>::flushed.
template <class T, class I>
UNSWAG_HD inline auto gt_zero(I x, typename Format<T>::bits zero = 0) {
  return (x > I(zero)) & (x <= I(infinity_bits<T>));
}
// x >= 0: -0 is, NaN is not.
template <class T, class I>
UNSWAG_HD inline auto ge_zero(I x, typename Format<T>::bits zero = 0) {
  const typename Format<T>::bits first_below = Format<T>::minus_zero + zero + 1;
  return ((x >= I(0)) & (x <= I(infinity_bits<T>))) | (x < I(first_below));
}
// x > 0 and x < 6: NaN is not.
template <class T, class I>
UNSWAG_HD inline auto gt_zero_and_lt_six(I x, typename Format<T>::bits zero = 0) {
  return (x > I(zero)) & (x < I(Format<T>::six));
}
// not (x <= 0 or x >= 6): strictly between, or NaN.
template <class T, class I>
UNSWAG_HD inline auto not_le_zero_or_ge_six(I x) {
  return not_le_zero<T>(x) & ((x < I(Format<T>::six)) | (x > I(infinity_bits<T>)));
}

// relu's value: -0 stays -0, as in PyTorch.
template <class T, class I>
UNSWAG_HD inline I relu_bits(I x) {
  const I minus_zero(Format<T>::minus_zero);
  return select(not_le_zero<T>(x) | (x == minus_zero), x, I(0));
}
// relu6's value, of relu's.
template <class T, class I>
UNSWAG_HD inline I relu6_bits(I x) {
  const I y = relu_bits<T>(x);
  return select((y >= I(Format<T>::six)) & (y <= I(infinity_bits<T>)), I(Format<T>::six), y);
}

// JAX's relu and relu6: -0 becomes +0.
template <class T, class I>
UNSWAG_HD inline I jax_relu_bits(I x, typename Format<T>::bits zero = 0) {
  return select((x > I(zero)) | ((x > I(Format<T>::negative_infinity)) & (x < I(0))), x, I(0));
}
template <class T, class I>
UNSWAG_HD inline I jax_relu6_bits(I x, typename Format<T>::bits zero = 0) {
  const I y = jax_relu_bits<T>(x, zero);
  return select((y >= I(Format<T>::six)) & (y <= I(infinity_bits<T>)), I(Format<T>::six), y);
}

// Whether a 0-bit of the mask leaves something of a gradient.
UNSWAG_HOST constexpr bool leaks(Mask act) { return act == Mask::leaky_relu || act == Mask::jax_leaky_relu; }

// What each Mask is, of elements T seen as integers: which pass, and the value.  `zero` as above; stopped(x) is what a 0-bit
// makes of x.
template <class T, Mask act>
struct MaskOf {
  template <class I>
  UNSWAG_HD static auto passes(I x, typename Format<T>::bits zero) {
    if constexpr (act == Mask::relu) {
      return not_le_zero<T>(x);
    } else if constexpr (act == Mask::leaky_relu) {
      return gt_zero<T>(x);
    } else if constexpr (act == Mask::relu6) {
      return not_le_zero_or_ge_six<T>(x);
    } else if constexpr (act == Mask::jax_relu) {
      return gt_zero<T>(x, zero);
    } else if constexpr (act == Mask::jax_leaky_relu) {
      return ge_zero<T>(x, zero);
    } else {
      static_assert(act == Mask::jax_relu6, "which elements does this mask pass?");
      return gt_zero_and_lt_six<T>(x, zero);
    }
  }
  template <class I, class M, class Stopped>
  UNSWAG_HD static I value(I x, M passes, typename Format<T>::bits zero, const Stopped& stopped) {
    if constexpr (act == Mask::relu) {
      return relu_bits<T>(x);
    } else if constexpr (act == Mask::relu6) {
      return relu6_bits<T>(x);
    } else if constexpr (act == Mask::jax_relu) {
      return jax_relu_bits<T>(x, zero);
    } else if constexpr (act == Mask::jax_relu6) {
      return jax_relu6_bits<T>(x, zero);
    } else {
      static_assert(leaks(act), "what is the value of this mask?");
      return select(passes, x, stopped(x));
    }
  }
};

// f(MaskOf<T, act>{}) for the one that is asked for.
template <class T, class F, std::size_t... I>
UNSWAG_HOST inline void visit_mask(Mask act, const F& f, std::index_sequence<I...>) {
  ((act == Mask(I) ? f(MaskOf<T, Mask(I)>{}) : void()), ...);
}
template <class T, class F>
UNSWAG_HOST inline void visit_mask(Mask act, const F& f) {
  visit_mask<T>(act, f, std::make_index_sequence<masks.size()>());
}

}  // namespace unswag::math
