// The activations from their definitions, in long double: what the tests of kernels compare with.
#pragma once

#include <cmath>

#include "unswag/lists.hpp"

namespace unswag::test {

using Real = long double;

struct Truth {
  Real value, slope;
};

// f(x) = x g(x) with g(x) + g(-x) = 1, of g(-u) and u g'(-u) for u = |x|: no difference of near numbers but in the slope, where
// long double has bits to spare.
inline Truth symmetric(Real x, Real g, Real ug) {
  if (std::isnan(x)) return {x, x};
  if (std::isinf(x)) return {x > 0 ? x : -Real(0), x > 0 ? Real(1) : Real(0)};
  return x < 0 ? Truth{x * g, g - ug} : Truth{x * (1 - g), 1 - (g - ug)};
}
// g(x) = 1 / (1 + e^-q), of q and uq = u q' for u.
inline Truth logistic(Real x, Real q, Real uq) {
  const Real t = std::exp(-q);
  return symmetric(x, t / (1 + t), uq * t / ((1 + t) * (1 + t)));
}

inline Truth truth(Activation act, Real x) {
  const Real u = std::fabs(x), pi = std::acos(Real(-1));
  switch (act) {
    case Activation::silu: return logistic(x, u, u);
    case Activation::gelu:
      return symmetric(x, std::erfc(u * std::sqrt(Real(0.5))) / 2, u * std::exp(-u * u / 2) / std::sqrt(2 * pi));
    case Activation::gelu_tanh: {
      const Real c = std::sqrt(8 / pi), cube = 0.044715L * u * u * u;
      return logistic(x, c * (u + cube), c * (u + 3 * cube));
    }
    case Activation::relu: return {x < 0 ? 0 : x, x <= 0 ? Real(0) : Real(1)};
    case Activation::relu2: return std::isnan(x) ? Truth{x, x} : Truth{x < 0 ? 0 : x * x, x < 0 ? 0 : 2 * x};
    case Activation::quick_gelu: return logistic(x, 1.702L * u, 1.702L * u);
  }
  return {};
}

}  // namespace unswag::test
