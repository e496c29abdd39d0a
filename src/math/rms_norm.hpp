// RMSNorm (Zhang & Sennrich 2019) of one row x of n elements:
//   rstd = 1 / sqrt(mean(x^2) + eps),  xhat = x rstd,  y = xhat w',  w' = weight_offset + weight
// and, with g = w' dy and m = mean(g xhat):
//   dx = rstd (g - xhat m),  dw = sum over rows of dy xhat
#pragma once

#include <cmath>
#include <cstdint>

#include "math/row_tree.hpp"
#include "math/scalar.hpp"

namespace unswag::math {

UNSWAG_HD inline double rms_norm_rstd(double sum_of_squares, std::int64_t n, double eps) {
  return 1 / ::sqrt(sum_of_squares / double(n) + eps);
}

// slope = rstd m: xhat m = x slope.  From sum = sum of g x, so that rows need no second rounding of xhat.
UNSWAG_HD inline double rms_norm_slope(double sum_of_gx, std::int64_t n, double rstd) {
  return rstd * rstd * sum_of_gx / double(n);
}

template <class V>
UNSWAG_HD inline V rms_norm_dx(V x, V g, V rstd, V slope) {
  return rstd * fma(-slope, x, g);
}

}  // namespace unswag::math
