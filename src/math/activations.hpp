// The activations: value and derivative, written once for host and device and for every value type V.
//
// silu, gelu and its tanh form are x g(x) with g(x) + g(-x) = 1, so that
//     f(x) - f(-x) = x     and     f'(x) + f'(-x) = 1
// and only the left half is computed, from u = |x|, as a Tail:
//     value = -f(-u) >= 0,     slope = f'(-u),     both times 2^64
// The factor keeps them normal where f itself is subnormal, and the slope accurate where dy is large.  Each slope has a zero
// u0 near 1, where the textbook formula loses its digits; it is written as a difference from that zero, which loses none.
#pragma once

#include "math/exp.hpp"
#include "math/scalar.hpp"
#include "unswag/unswag.hpp"

namespace unswag::math {

template <class V>
struct Tail {
  V value;
  V slope;
};

// Beyond this u the value and the slope round to 0, and u^2 and e^-u are still harmless.
template <class V>
UNSWAG_HD inline V clamp_tail(V x, float limit32, double limit64) {
  return min(V(sizeof(scalar_t<V>) == 8 ? scalar_t<V>(limit64) : scalar_t<V>(limit32)), abs(x));
}

// f(x) = x s(x),  s(x) = 1 / (1 + e^-x).   With t = e^-u:  value = u t / (1 + t),  slope = t (1 + t - u) / (1 + t)^2.
struct Silu {
  static constexpr Activation id = Activation::silu;
  static constexpr const char* name = "silu";

  template <class V>
  UNSWAG_HD static Tail<V> tail(V x) {
    const V u = clamp_tail(x, 110.f, 800.);
    const V t = exp_scaled(-u, V(0.f));
    const V s = V(1.f) / fma(t, V(0x1p-64f), V(1.f));
    const V ts = t * s;
    // 1 + t - u = (u0 - u) + (t - (u0 - 1)), both differences exact near u0
    const V zero = (V(1.27846456f) - u) + fma(t, V(0x1p-64f), V(-0.27846456f));
    return {u * ts, ts * s * zero};
  }
};

// f(x) = x Phi(x), Phi the normal distribution.   With R(u) = Phi(-u) e^(u^2/2):
//     value = u e^(-u^2/2) R(u),   slope = e^(-u^2/2) (R(u) - u / sqrt(2 pi))
struct Gelu {
  static constexpr Activation id = Activation::gelu;
  static constexpr const char* name = "gelu";

  template <class V>
  UNSWAG_HD static Tail<V> tail(V x) {
    const V u = clamp_tail(x, 14.7f, 40.);
    const V square = u * u;
    const V e = exp_scaled(V(-0.5f) * square, V(-0.5f) * product_error(u, u, square));
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
};

// f(x) = x s(q(x)),  q(x) = sqrt(8/pi) (x + 0.044715 x^3), which is x (1 + tanh(q/2)) / 2.   With t = e^-q(u):
//     value = u t / (1 + t),   slope = t (1 + t - u q'(u)) / (1 + t)^2
struct GeluTanh {
  static constexpr Activation id = Activation::gelu_tanh;
  static constexpr const char* name = "gelu_tanh";
  static constexpr double c1 = 1.5957691216057307, c3 = 0.07135481627260025;  // q(u) = c1 u + c3 u^3
  static constexpr double
      u0 = 0x1.81427p-1,
      t0 = 0.29195243122188331;  // t0 = u0 q'(u0) - 1; of the u0 near the zero, the one whose t0 is nearest to a float

  template <class V>
  UNSWAG_HD static Tail<V> tail(V x) {
    const V u = clamp_tail(x, 11.f, 40.);
    const V square = u * u;
    const V factor = fma(square, V(c3), V(c1));
    const V q = u * factor;
    const V t = exp_scaled(-q, -product_error(u, factor, q));
    const V s = V(1.f) / fma(t, V(0x1p-64f), V(1.f));
    const V ts = t * s;
    // 1 + t - u q'(u) = (u0 q'(u0) - u q'(u)) + (t - t0)
    const V zero = fma(V(u0) - u, fma(V(3 * c3), fma(u, u + V(u0), V(u0 * u0)), V(c1)), fma(t, V(0x1p-64f), V(-t0)));
    return {u * ts, ts * s * zero};
  }
};

// f(x) = max(x, 0); relu(-0) = -0, relu(NaN) = NaN, and the gradient passes where not (x <= 0), as in PyTorch.
struct Relu {
  static constexpr Activation id = Activation::relu;
  static constexpr const char* name = "relu";
};

// y = f(x)
template <class Act, class V>
UNSWAG_HD inline V forward(Act, V x) {
  const V v = Act::tail(x).value * V(0x1p-64f);
  return select(x < V(0.f), -v, x - v);
}
template <class V>
UNSWAG_HD inline V forward(Relu, V x) {
  return max(V(0.f), x);
}

// dx = dy f'(x).  A slope below 2^-64 is multiplied in its scaled form: dy may be as large as 2^128.
template <class V>
UNSWAG_HD inline V times_slope(V x, V dy, V scaled) {
  const V left = select(abs(scaled) < V(1.f), dy * scaled * V(0x1p-64f), dy * (scaled * V(0x1p-64f)));
  return select(x < V(0.f), left, dy * (V(1.f) - scaled * V(0x1p-64f)));
}
template <class Act, class V>
UNSWAG_HD inline V backward(Act, V x, V dy) {
  return times_slope(x, dy, Act::tail(x).slope);
}
template <class V>
UNSWAG_HD inline V backward(Relu, V x, V dy) {
  return select(x <= V(0.f), V(0.f), dy);
}

// Both at once, for the price of one e^x: y = f(x), dx = dy f'(x).
template <class Act, class V>
UNSWAG_HD inline void forward_backward(Act, V x, V dy, V& y, V& dx) {
  const Tail<V> tail = Act::tail(x);
  const V v = tail.value * V(0x1p-64f);
  y = select(x < V(0.f), -v, x - v);
  dx = times_slope(x, dy, tail.slope);
}
template <class V>
UNSWAG_HD inline void forward_backward(Relu act, V x, V dy, V& y, V& dx) {
  y = forward(act, x);
  dx = backward(act, x, dy);
}

// The list: kernels and tests iterate over it.  f(act) is called for the one that `id` names.
template <class... Acts>
struct Activations {
  template <class F>
  UNSWAG_HD static void each(const F& f) {
    (f(Acts{}), ...);
  }
  template <class F>
  UNSWAG_HD static void visit(Activation id, const F& f) {
    each([&](auto act) [[gnu::always_inline]] {
      if (decltype(act)::id == id) f(act);
    });
  }
};
using AllActivations = Activations<Silu, Gelu, GeluTanh, Relu>;

}  // namespace unswag::math
