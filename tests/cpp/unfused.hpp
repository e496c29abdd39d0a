// A float for the formulas of src/math whose fma rounds twice, as in the rows without such an instruction (portable, x86-64);
// float itself stands for the others.
#pragma once

#include "math/exp.hpp"

namespace unswag::test {

struct Unfused {
  using scalar = float;
  float v;

  Unfused() = default;
  Unfused(float x) : v(x) {}

  friend Unfused operator-(Unfused a) { return -a.v; }
  friend Unfused operator+(Unfused a, Unfused b) { return a.v + b.v; }
  friend Unfused operator-(Unfused a, Unfused b) { return a.v - b.v; }
  friend Unfused operator*(Unfused a, Unfused b) { return a.v * b.v; }
  friend Unfused operator/(Unfused a, Unfused b) { return a.v / b.v; }
  friend bool operator<(Unfused a, Unfused b) { return a.v < b.v; }
  friend Unfused fma(Unfused a, Unfused b, Unfused c) { return a * b + c; }
  friend Unfused min(Unfused a, Unfused b) { return math::min(a.v, b.v); }
  friend Unfused max(Unfused a, Unfused b) { return math::max(a.v, b.v); }
  friend Unfused abs(Unfused a) { return math::abs(a.v); }
  friend Unfused select(bool m, Unfused a, Unfused b) { return m ? a : b; }
  friend Unfused times_pow2(Unfused m, Unfused z) { return math::times_pow2(m.v, z.v); }
};
inline float to_scalar(float x) { return x; }
inline float to_scalar(Unfused x) { return x.v; }

}  // namespace unswag::test
