// Loops around src/math/rms_norm.hpp.
#include "math/rms_norm.hpp"

#include "backend.hpp"
#include "cpu/norm.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class X, bool Cast, class V>
UNSWAG_INLINE V xhat(V x, V rstd) {
  if constexpr (Cast) {
    return rounded<X>(x * rstd);
  } else {
    return x * rstd;
  }
}

template <class X, class Y, bool Cast>
class Forward {
  using V = compute_t<X, Y>;
  using S = typename V::scalar;
  using O = steps_t<V, X, Y>;

 public:
  explicit Forward(const RmsNormForward& a) : a_(a), cols_(a.x.cols), weight_(a.weight, a.weight_offset) {}

  template <bool Streaming>
  void row(std::int64_t r) const {
    const X *x = UNSWAG_ISA_NS::row<X>(a_.x, r), *next = UNSWAG_ISA_NS::row<X>(a_.x, r + 1 < a_.x.rows ? r + 1 : r);
    Y* y = UNSWAG_ISA_NS::row<Y>(a_.y, r);
    auto* rstds = static_cast<row_scalar<X>*>(a_.rstd.data);
    if (!a_.rstd_given) {
      const double squares =
          sum_steps<O, V>(cols_, [&](auto how, auto sum, std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
            const auto v = how.load(x + i, n);
            return fma(v, v, sum);
          });
      rstds[r] = row_scalar<X>(math::rms_norm_rstd(squares, cols_, a_.eps));
    }
    const S rstd = plain_nan(S(rstds[r]));
    each_step<O, V>(cols_, [&](auto how, std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
      prefetch_step(next + i);
      auto h = xhat<X, Cast>(how.load(x + i, n), typename decltype(how)::Lanes(rstd));
      if (weight_) h = h * weight_.load(how, i, n);
      write<Streaming>(how, y + i, h, n);
    });
  }

 private:
  const RmsNormForward& a_;
  std::int64_t cols_;
  VectorAsRow<V, O> weight_;
};

template <class X, class Y, bool Cast>
void forward(const RmsNormForward& a, int threads) {
  each_row<Y>(Forward<X, Y, Cast>(a), a.y, threads);
}

template <class X, class DY, bool Cast>
class Backward {
 public:
  using V = compute_t<X, DY>;
  using S = typename V::scalar;
  using O = steps_t<V, X, DY>;

  explicit Backward(const RmsNormBackward& a) : a_(a), weight_(a.weight, a.weight_offset), cols_(a.x.cols) {}

  // dx of row r, and its part of dw added to dw.
  void row(std::int64_t r, S* dw, bool streaming) const {
    const std::int64_t near = r + 1 < a_.x.rows ? r + 1 : r;
    const X *x = UNSWAG_ISA_NS::row<X>(a_.x, r), *next_x = UNSWAG_ISA_NS::row<X>(a_.x, near);
    const DY *dy = UNSWAG_ISA_NS::row<DY>(a_.dy, r), *next_dy = UNSWAG_ISA_NS::row<DY>(a_.dy, near);
    X* dx = a_.dx.data ? UNSWAG_ISA_NS::row<X>(a_.dx, r) : nullptr;
    const auto s = plain_nan(static_cast<const row_scalar<X>*>(a_.rstd.data)[r]);
    const S rstd = S(s), slope = S(dx ? math::rms_norm_slope(sum_of_gx(x, dy), cols_, double(s)) : 0);
    each_step<O, V>(cols_, [&](auto how, std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
      using L = typename decltype(how)::Lanes;
      prefetch_step(next_x + i);
      prefetch_step(next_dy + i);
      const L xv = how.load(x + i, n), dyv = how.load(dy + i, n);
      if (dx) {
        const L of_x = math::rms_norm_dx(xv, times_weight(how, dyv, i, n), L(rstd), L(slope));
        streaming ? write<true>(how, dx + i, of_x, n) : write<false>(how, dx + i, of_x, n);
      }
      if (dw) fma(dyv, xhat<X, Cast>(xv, L(rstd)), L::load(dw + i)).store(dw + i);
    });
  }

 private:
  template <class How, class L>
  UNSWAG_INLINE L times_weight(How how, L dy, std::int64_t i, std::int64_t n) const {
    return weight_ ? dy * weight_.load(how, i, n) : dy;
  }
  double sum_of_gx(const X* x, const DY* dy) const {
    return sum_steps<O, V>(cols_, [&](auto how, auto sum, std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
      return fma(times_weight(how, how.load(dy + i, n), i, n), how.load(x + i, n), sum);
    });
  }

  const RmsNormBackward& a_;
  VectorAsRow<V, O> weight_;
  std::int64_t cols_;
};

template <class X, class DY, bool Cast>
void backward(const RmsNormBackward& a, int threads) {
  auto* dw = static_cast<row_scalar<X>*>(a.dw.data);
  over_rows(Backward<X, DY, Cast>(a), a.x.rows, a.x.cols, streams<X>(a.dx), dw ? 1 : 0, threads,
            [&](int, std::int64_t i, double sum) { dw[i] = row_scalar<X>(sum); });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a, Stream stream) {
  visit(a.x.dtype, [&](auto x) {
    visit(a.y.dtype, [&](auto y) {
      using X = typename decltype(x)::of;
      using Y = typename decltype(y)::of;
      a.cast_before_weight ? forward<X, Y, true>(a, stream.threads) : forward<X, Y, false>(a, stream.threads);
    });
  });
}

void rms_norm_backward(const RmsNormBackward& a, Stream stream) {
  visit(a.x.dtype, [&](auto x) {
    visit(a.dy.dtype, [&](auto dy) {
      using X = typename decltype(x)::of;
      using DY = typename decltype(dy)::of;
      a.cast_before_weight ? backward<X, DY, true>(a, stream.threads) : backward<X, DY, false>(a, stream.threads);
    });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
