// LayerNorm (Ba, Kiros, Hinton 2016) of one row x of n elements:
//   mean = mean(x),  rstd = 1 / sqrt(mean((x - mean)^2) + eps),  xhat = (x - mean) rstd,  y = xhat w + b
// and, with g = w dy:
//   dx = rstd (g - mean(g) - xhat mean(g xhat)),  dw = sum over rows of dy xhat,  db = sum over rows of dy
#pragma once

#include <cmath>
#include <cstdint>

#include "math/row_tree.hpp"
#include "math/scalar.hpp"

namespace unswag::math {

// From two passes: m0 is mean(x), summed in float and rounded; then with d = x - m0, which has no large common part,
//   mean = m0 + mean(d),   mean((x - mean)^2) = mean(d^2) - mean(d)^2
struct LayerNormStatistics {
  double mean, rstd;
};
UNSWAG_HD inline LayerNormStatistics layer_norm_statistics(double m0, double sum_of_d, double sum_of_squares, std::int64_t n,
                                                           double eps) {
  const double shift = sum_of_d / double(n);
  const double variance = sum_of_squares / double(n) - shift * shift;  // below 0 by rounding where all x are equal
  return {m0 + shift, 1 / ::sqrt((variance < 0 ? 0 : variance) + eps)};
}

template <class V>
UNSWAG_HD inline V layer_norm_xhat(V x, V mean, V rstd) {
  return (x - mean) * rstd;
}

// weight() and bias() are asked for if there is one.
template <class V, class Weight, class Bias>
UNSWAG_HD inline V layer_norm_y(V xhat, bool has_weight, bool has_bias, const Weight& weight, const Bias& bias) {
  if (!has_weight) return has_bias ? xhat + bias() : xhat;
  return has_bias ? fma(xhat, weight(), bias()) : xhat * weight();
}

// slope = rstd mean(g xhat) from sum_of_gd = sum of g (x - mean): xhat mean(g xhat) = (x - mean) slope, and xhat needs no
// rounding.
UNSWAG_HD inline double layer_norm_slope(double sum_of_gd, std::int64_t n, double rstd) {
  return rstd * rstd * sum_of_gd / double(n);
}

// g - mean(g), in one rounding
template <class V, class Weight>
UNSWAG_HD inline V layer_norm_centred(V dy, bool has_weight, const Weight& weight, V mean_of_g) {
  return has_weight ? fma(dy, weight(), -mean_of_g) : dy - mean_of_g;
}

template <class V>
UNSWAG_HD inline V layer_norm_dx(V x, V mean, V centred_g, V rstd, V slope) {
  return rstd * fma(-slope, x - mean, centred_g);
}

}  // namespace unswag::math
