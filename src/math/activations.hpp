// The activations: value and derivative, written once for host and device and for every value type V.  Each is a struct, whose
// base says what kind it is: Symmetric or Piecewise.  A kind has
//     forward_backward<T, Act>(x, dy, y, dx)      y = f(x), dx = dy f'(x), for any x
//     has_near<V>                                 whether Act::near is to be tried first, as below
//     lowest_slope                                the minimum of f' where subtractive dither serves Act, else 0
//
// Symmetric: f(x) = x g(x) with g(x) + g(-x) = 1, so that
//     f(x) - f(-x) = x     and     f'(x) + f'(-x) = 1
// Up to |x| = Act::plain every step stays a normal number (Act::near); hardly any data lies outside.  near takes the result of
// its first steps, Act::ahead(x): where registers are few, a loop computes these for a block of x beforehand, because two
// short chains of dependent steps fill a processor's waits where one long chain does not (1.5 times the speed).  Outside only
// the left half is computed, from u = |x| (Act::tail):
//     value = -f(-u) >= 0,     slope = f'(-u),     both times 2^64, or times 2^192 from `far` on, where f is 0
// The factor keeps them normal where f itself is subnormal, and the slope accurate where dy is large (dy f' is above 0 for
// slopes down to 2^-262).
//
// T is the type of the elements.  Float results are right to 2 units in the last place, or to 2^-23 where the derivative is
// below 0.1 (tests/cpp/activations_test.cpp): near 0 and the slope's zero near -1 the textbook formulas lose digits there, and
// polynomials (core_) serve.  bf16 has none to lose and leaves them out.
#pragma once

#include "math/exp.hpp"
#include "math/scalar.hpp"
#include "unswag/unswag.hpp"

namespace unswag::math {

template <class V>
struct Both {
  V value;
  V slope;
};
template <class T>
inline constexpr bool coarse = std::is_same_v<T, bf16>;

// c0 + c1 z + c2 z^2 + ...
template <class V>
UNSWAG_HD inline V polynomial(V, float c) {
  return V(c);
}
template <class V, class... Floats>
UNSWAG_HD inline V polynomial(V z, float c, Floats... further) {
  return fma(z, polynomial(z, further...), V(c));
}

// Beyond this u the slope rounds to 0 whatever dy is, and u^2 and e^-u are still harmless.
template <class V>
UNSWAG_HD inline V clamp_tail(V x, float limit32, double limit64) {
  return min(V(sizeof(scalar_t<V>) == 8 ? scalar_t<V>(limit64) : scalar_t<V>(limit32)), abs(x));
}

// 1/2 + c0 x + x^3 P(x^2);  p = P(square), square = x^2.  c0 and c0 x are in two parts unless they are exact.
template <class Act, class V>
UNSWAG_HD inline V core_slope_of(V x, V square, V p) {
  if constexpr (Act::c0 == 0.5) {
    return fma(x * square, p, fma(x, V(0.5f), V(0.5f)));
  } else {
    const V linear = x * V(Act::c0);
    const V low(float(Act::c0 - double(float(Act::c0))));
    return (V(0.5f) + linear) + fma(x, fma(square, p, low), product_error(x, V(Act::c0), linear));
  }
}

// Of f(x) = x / (1 + t), t = e^-q(x), with w = x q'(x).   s = 1 / (1 + t) and g = 1 - s = s t:
//     f' = s (1 + w g) = 1 + g (w s - 1)
// where the first is near enough on the left of `border`, and in the second, on its right, the roundings of what is added to 1
// do not show; beyond 1 so it is with x - f t, the value, for which Silu takes x / (1 + t), as PyTorch does (Act::refined).
template <class T, class Act, class V>
UNSWAG_HD inline Both<V> logistic_unit(V x, V t, V w) {
  const V d = V(1.f) + t, s = V(1.f) / d, g = s * t;
  const V left = s * fma(w, g, V(1.f));
  const V y = x / d;
  if constexpr (coarse<T>) {
    return {y, left};
  } else {
    const V square = x * x;
    const V outer = select(negative(x), left, fma(g, fma(w, s, V(-1.f)), V(1.f)));
    const V core = core_slope_of<Act>(x, square, Act::core_slope(square));
    const V value = Act::refined ? select(x > V(1.f), fma(-y, t, x), y) : y;
    return {value, select(square < V(Act::border * Act::border), core, outer)};
  }
}

// The tail of f(x) = x / (1 + e^-q) where q is a multiple of x; q + error belongs to u = |x|.  With t = e^-(q + error):
//     value = u t / (1 + t),   slope = t (1 + t - q) / (1 + t)^2
template <class V, class M>
UNSWAG_HD inline Both<V> logistic_tail(V u, V q, V error, M far) {
  const V t = exp_scaled(-q, -error, far);
  const V s = V(1.f) / fma(t, V(0x1p-64f), V(1.f));
  const V ts = t * s;
  // 1 + t - q = (q0 - q) + (t - (q0 - 1)), both differences exact near q0
  const V zero = ((V(1.27846456f) - q) - error) + fma(t, V(0x1p-64f), V(-0.27846456f));
  return {u * ts, ts * s * zero};
}

// What a scaled value is multiplied by; those from `far` on are 0.
template <class Act, class V>
UNSWAG_HD inline V unscale(V x) {
  if constexpr (std::is_same_v<scalar_t<V>, double>) {
    return V(0x1p-64);
  } else {
    return select(abs(x) > V(Act::far), V(0.f), V(0x1p-64f));
  }
}

template <class Act, class V>
UNSWAG_HD inline V value_of(V x, V tail) {
  const V v = tail * unscale<Act>(x);
  return select(x < V(0.f), -v, x - v);
}

// dy f'(x).  A slope below 2^-64 is multiplied in its scaled form: dy may be as large as 2^128.
template <class Act, class V>
UNSWAG_HD inline V times_slope(V x, V dy, V tail) {
  const V left = tail * unscale<Act>(x);
  const V slope = select(x < V(0.f), left, V(1.f) - left);
  V tiny = dy * tail * V(0x1p-64f);
  if constexpr (!std::is_same_v<scalar_t<V>, double>) {
    tiny = select(abs(x) > V(Act::far), dy * V(0x1p-96f) * tail * V(0x1p-96f), tiny);
  }
  return select(abs(slope) < V(0x1p-64f), tiny, dy * slope);
}

template <class Act, class V>
UNSWAG_HD inline auto plain(V x) {
  return abs(x) <= V(Act::plain);
}

struct Symmetric {
  // Doubles are exact enough by their tail everywhere.
  template <class V>
  static constexpr bool has_near = !std::is_same_v<scalar_t<V>, double>;
  static constexpr double lowest_slope = 0;

  template <class T, class Act, class V>
  UNSWAG_HD static void forward_backward(V x, V dy, V& y, V& dx) {
    if constexpr (!has_near<V>) {
      const Both<V> tail = Act::tail(x);
      y = value_of<Act>(x, tail.value);
      dx = times_slope<Act>(x, dy, tail.slope);
    } else {
      const Both<V> near = Act::template near<T>(x, Act::template ahead<T>(x));
      y = near.value;
      dx = dy * near.slope;
      const auto near_enough = plain<Act>(x);
      if (!all(near_enough)) [[unlikely]] {
        const Both<V> tail = Act::tail(x);
        y = select(near_enough, y, value_of<Act>(x, tail.value));
        dx = select(near_enough, dx, times_slope<Act>(x, dy, tail.slope));
      }
    }
  }
};

// Right everywhere as they stand: y = f(x), and dx = Act::right(x, dy, y) where not (x <= 0), as in PyTorch; NaN passes there.
struct Piecewise {
  template <class V>
  static constexpr bool has_near = false;
  static constexpr double lowest_slope = 0;

  template <class T, class Act, class V>
  UNSWAG_HD static void forward_backward(V x, V dy, V& y, V& dx) {
    dx = select(x <= V(0.f), V(0.f), Act::right(x, dy, y));
  }
};

// f(x) = x s(x),  s(x) = 1 / (1 + e^-x).
struct Silu : Symmetric {
  static constexpr Activation id = Activation::silu;
  static constexpr double lowest_slope = -0.09983932012886692;  // at x = -2.3993573

  static constexpr float border = 1.f, plain = 40.f, far = 110.f;
  static constexpr bool refined = false;
  static constexpr double c0 = 0.5;
  template <class V>
  UNSWAG_HD static V core_slope(V z) {
    return polynomial(z, -0x1.55553p-4f, 0x1.998d98p-7f, -0x1.b8b532p-10f, 0x1.ac371ap-13f, -0x1.2c0f7ap-16f);
  }
  template <class T, class V>
  UNSWAG_HD static V ahead(V x) {
    if constexpr (coarse<T>) {
      return exp_short<-1>(x);
    } else {
      return exp_normal<-1>(x);
    }
  }
  template <class T, class V>
  UNSWAG_HD static Both<V> near(V x, V t) {
    return logistic_unit<T, Silu>(x, t, x);
  }
  template <class V>
  UNSWAG_HD static Both<V> tail(V x) {
    const V u = clamp_tail(x, 190.f, 800.);
    return logistic_tail(u, u, V(0.f), u > V(far));
  }
};

// f(x) = x Phi(x), Phi the normal distribution.   With R(u) = Phi(-u) e^(u^2/2):
//     value = u e^(-u^2/2) R(u),   slope = e^(-u^2/2) (R(u) - u / sqrt(2 pi))
struct Gelu : Symmetric {
  static constexpr Activation id = Activation::gelu;
  static constexpr double lowest_slope = -0.12890414518515479;  // at x = -sqrt 2

  static constexpr float border = 0.6875f, plain = 9.f, far = 14.5f;
  static constexpr double c0 = 0.7978845608028654;  // 2 / sqrt(2 pi)
  template <class V>
  UNSWAG_HD static V core_value(V z) {
    return polynomial(z, 0x1.988454p-2f, -0x1.105874p-4f, 0x1.46d93ap-7f, -0x1.3754d8p-10f, 0x1.c8c696p-14f);
  }
  template <class V>
  UNSWAG_HD static V core_slope(V z) {
    return polynomial(z, -0x1.105836p-2f, 0x1.ea378p-5f, -0x1.372782p-7f, 0x1.2c177cp-10f, -0x1.9cc614p-14f);
  }

  template <class T, class V>
  UNSWAG_HD static V ahead(V x) {
    return mills_short<T>(abs(x));
  }
  template <class T, class V>
  UNSWAG_HD static Both<V> near(V x, V r) {
    const V u = abs(x), square = x * x;
    const V e = exp_short<-1, 2>(square);
    const V left = e * fma(u, V(-0.3989422804014327), r);
    const Both<V> outer{fma(u * e, -r, max(V(0.f), x)), select(negative(x), left, V(1.f) - left)};
    if constexpr (coarse<T>) {
      return outer;
    } else {
      const auto core = square < V(border * border);
      return {select(core, x * fma(x, core_value(square), V(0.5f)), outer.value),
              select(core, core_slope_of<Gelu>(x, square, core_slope(square)), outer.slope)};
    }
  }
  template <class V>
  UNSWAG_HD static Both<V> tail(V x) {
    const V u = clamp_tail(x, 19.3f, 40.);
    const V square = u * u;
    const V e = exp_scaled(V(-0.5f) * square, V(-0.5f) * product_error(u, u, square), u > V(far));
    if constexpr (sizeof(scalar_t<V>) == 8) {
      const V phi = V(0x1p63) * erfc(u * V(0.7071067811865476));
      return {u * phi, fma(u, e * V(-0.3989422804014327), phi)};
    } else {
      const V r = mills(u);
      return {u * r * e, e * fma(u, V(-0.3989422804014327), r)};
    }
  }

  // R(u), Mills' ratio / sqrt(2 pi): R(u) (u + k) is a polynomial in w = (u - k) / (u + k), off by 2^-28 at most.  k is the
  // number near 4 whose R(k) 2 k, the constant term, is nearest to a float.
  template <class V>
  UNSWAG_HD static V mills(V u) {
    const V q = V(1.f) / (u + V(4.162109375f));
    const V w = (u - V(4.162109375f)) * q;
    V p = fma(w, V(-0x1.b3035ep-13f), V(-0x1.3c2ecap-13f));
    p = fma(w, p, V(0x1.0d07a2p-9f));
    p = fma(w, p, V(-0x1.032516p-9f));
    p = fma(w, p, V(-0x1.e76cacp-7f));
    p = fma(w, p, V(0x1.38bf88p-4f));
    p = fma(w, p, V(-0x1.ab6df4p-3f));
    p = fma(w, p, V(0x1.a16b7ep-2f));
    p = fma(w, p, V(-0x1.3d18aap-1f));
    return fma(w, p, V(0x1.842936p-1f)) * q;
  }
  // The same for u <= plain, shorter: outside the core right to 2^-24; for bf16, in powers of q, to 2^-20, and R(0) = 1/2
  // exactly.
  template <class T, class V>
  UNSWAG_HD static V mills_short(V u) {
    const V k(coarse<T> ? 4.f : 5.5f);
    const V q = V(1.f) / (u + k);
    if constexpr (coarse<T>) {
      return q * polynomial(q, 0x1.9520ep-2f, 0x1.c58cfcp+0f, 0x1.0c68cp+1f, 0x1.0b07ecp+6f, -0x1.eb50bp+7f, 0x1.4b4b6ep+10f,
                            -0x1.638e4cp+10f);
    } else {
      return q * polynomial((u - k) * q, 0x1.8c2b8ap-1f, -0x1.5ed05ep-1f, 0x1.1238d4p-1f, -0x1.77dc58p-2f, 0x1.be8802p-3f,
                            -0x1.c042ccp-4f, 0x1.6a45acp-5f, -0x1.120d8ep-6f);
    }
  }
};

// f(x) = x s(q(x)),  q(x) = sqrt(8/pi) (x + 0.044715 x^3), which is x (1 + tanh(q/2)) / 2.   With t = e^-q(u):
//     value = u t / (1 + t),   slope = t (1 + t - u q'(u)) / (1 + t)^2
struct GeluTanh : Symmetric {
  static constexpr Activation id = Activation::gelu_tanh;
  static constexpr double lowest_slope = -0.12899306865877177;  // at x = -1.4185040

  static constexpr float border = 0.875f, plain = 7.25f, far = 11.f;
  static constexpr bool refined = true;
  static constexpr double c0 = 0.7978845608028654;  // c1 / 2
  template <class V>
  UNSWAG_HD static V core_slope(V z) {
    return polynomial(z, -0x1.11b14cp-2f, 0x1.f56c8ep-5f, -0x1.45b9aap-7f, 0x1.2ef4p-10f, -0x1.6aee2ep-17f, -0x1.388872p-13f,
                      0x1.6cf2b8p-13f, -0x1.d1eb2ep-14f, 0x1.f90e3p-16f);
  }
  template <class T, class V>
  UNSWAG_HD static V ahead(V x) {
    const V c1(1.5957691216057307), c3(0.07135481627260025);
    const V factor = fma(x * x, c3, c1), q = x * factor;
    if constexpr (coarse<T>) {
      return exp_short<-1>(q);
    } else {
      return exp_normal<-1>(q, product_error(x, factor, q));
    }
  }
  template <class T, class V>
  UNSWAG_HD static Both<V> near(V x, V t) {
    const V c1(1.5957691216057307), c3(0.07135481627260025);
    return logistic_unit<T, GeluTanh>(x, t, x * fma(x * x, V(3.f) * c3, c1));
  }
  template <class V>
  UNSWAG_HD static Both<V> tail(V x) {
    const V c1(1.5957691216057307), c3(0.07135481627260025);  // q(u) = c1 u + c3 u^3
    const V u = clamp_tail(x, 13.2f, 40.);
    const V square = u * u;
    const V factor = fma(square, c3, c1);
    const V q = u * factor;
    const V t = exp_scaled(-q, -product_error(u, factor, q), u > V(far));
    const V s = V(1.f) / fma(t, V(0x1p-64f), V(1.f));
    const V ts = t * s;
    const V uq = u * fma(square, V(3.f) * c3, c1);
    return {u * ts, ts * fma(-uq, s, V(1.f))};
  }
};

// f(x) = x s(a x),  a = 1.702:  f = silu(a x) / a,  f' = silu'(a x).
struct QuickGelu : Symmetric {
  static constexpr Activation id = Activation::quick_gelu;

  static constexpr float border = 0.59375f, plain = 23.5f, far = 64.5f;
  static constexpr bool refined = true;
  static constexpr double a = 1.702, c0 = 0.851;  // c0 = a / 2
  template <class V>
  UNSWAG_HD static V core_slope(V z) {
    return polynomial(z, -0x1.a4b92ap-2f, 0x1.6d94ap-3f, -0x1.1cd50ep-4f, 0x1.901e7ap-6f, -0x1.932cfep-8f);
  }
  template <class T, class V>
  UNSWAG_HD static V ahead(V x) {
    const V q = x * V(a);
    if constexpr (coarse<T>) {
      return exp_short<-1>(q);
    } else {
      return exp_normal<-1>(q, product_error(x, V(a), q));
    }
  }
  template <class T, class V>
  UNSWAG_HD static Both<V> near(V x, V t) {
    return logistic_unit<T, QuickGelu>(x, t, x * V(a));
  }
  template <class V>
  UNSWAG_HD static Both<V> tail(V x) {
    const V u = clamp_tail(x, 117.5f, 470.);
    const V q = u * V(a);
    return logistic_tail(u, q, product_error(u, V(a), q), u > V(far));
  }
};

// f(x) = max(x, 0); relu(-0) = -0, relu(NaN) = NaN.
struct Relu : Piecewise {
  static constexpr Activation id = Activation::relu;

  template <class V>
  UNSWAG_HD static V right(V x, V dy, V& y) {
    y = max(V(0.f), x);
    return dy;
  }
};

// f(x) = max(x, 0)^2, of relu(x) as of x; relu2(NaN) = NaN.  2 max(x, 0) is exact, and the product is PyTorch's.
struct Relu2 : Piecewise {
  static constexpr Activation id = Activation::relu2;

  template <class V>
  UNSWAG_HD static V right(V x, V dy, V& y) {
    const V r = max(V(0.f), x);
    y = r * r;
    return dy * (r + r);
  }
};
// y = f(x) and dx = dy f'(x), from t = Act::ahead(x), where Act has_near and every lane is plain(x).
template <class T, class Act, class V>
UNSWAG_HD inline void forward_backward(Act, V x, V t, V dy, V& y, V& dx) {
  const Both<V> near = Act::template near<T>(x, t);
  y = near.value;
  dx = dy * near.slope;
}

// The same for any x.  Which branch is taken does not show in the bits of a lane.
template <class T, class Act, class V>
UNSWAG_HD inline void forward_backward(Act, V x, V dy, V& y, V& dx) {
  Act::template forward_backward<T, Act>(x, dy, y, dx);
}

// y = f(x);  `t`, here and below, is nothing, or Act::ahead(x) where x is plain(x)
template <class T, class Act, class V, class... Ahead>
UNSWAG_HD inline V forward(Act act, V x, Ahead... t) {
  V y, dx;
  forward_backward<T>(act, x, t..., x, y, dx);
  return y;
}

// dx = dy f'(x)
template <class T, class Act, class V, class... Ahead>
UNSWAG_HD inline V backward(Act act, V x, V dy, Ahead... t) {
  V y, dx;
  forward_backward<T>(act, x, t..., dy, y, dx);
  return dx;
}

// The structs, in the order of the list.
template <class... Acts>
struct Activations {
  static constexpr bool are_those_of_the_list() {
    constexpr Activation ids[] = {Acts::id...};
    for (std::size_t i = 0; i < sizeof...(Acts); ++i)
      if (ids[i] != activations[i].value) return false;
    return sizeof...(Acts) == activations.size();
  }
  template <class F>
  UNSWAG_HOST static void each(const F& f) {
    (f(Acts{}), ...);
  }
  // f(act) for the one that `id` names.
  template <class F>
  UNSWAG_HOST static void visit(Activation id, const F& f) {
    each([&](auto act) {
      if (decltype(act)::id == id) f(act);
    });
  }
};
using AllActivations = Activations<Silu, Gelu, GeluTanh, Relu, Relu2, QuickGelu>;
static_assert(AllActivations::are_those_of_the_list(), "AllActivations differs from the list in include/unswag/lists.hpp");

}  // namespace unswag::math
