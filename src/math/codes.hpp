// Step codes: the code of x is the number of bounds strictly below it, its factor the level of that number (docs/format.md
// section 5).  S is the type that is compared and multiplied in: float, double for double.
#pragma once

#include "math/dtype.hpp"
#include "math/hd.hpp"
#include "math/scalar.hpp"
#include "unswag/unswag.hpp"

namespace unswag::math {

// Bounds that no number exceeds stand past the last.
template <class S>
struct Bounds {
  S at[(1 << most_code_bits) - 1];
};
template <class S>
UNSWAG_HOST inline Bounds<S> bounds_of(const double* bounds, int count) {
  Bounds<S> b;
  for (int i = 0; i < (1 << most_code_bits) - 1; ++i) b.at[i] = i < count ? S(bounds[i]) : S(HUGE_VAL);
  return b;
}

// A code that has no level has NaN.
template <class S>
struct Levels {
  S at[1 << most_code_bits];
};
template <class S>
UNSWAG_HOST inline Levels<S> levels_of(const double* levels, int count) {
  Levels<S> l;
  for (int i = 0; i < 1 << most_code_bits; ++i) l.at[i] = S(i < count ? levels[i] : double(NAN));
  return l;
}

template <class S>
UNSWAG_HD inline unsigned code_of(S x, const Bounds<S>& bounds, int bits) {
  unsigned code = 0;
  for (int i = 0; i < (1 << bits) - 1; ++i) code += x > bounds.at[i];
  return code;
}

}  // namespace unswag::math
