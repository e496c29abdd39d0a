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
void forward(const RmsNormForward& a, int threads) {
  using V = compute_t<X, Y>;
  using S = typename V::scalar;
  const std::int64_t cols = a.x.cols;
  const VectorAsRow<V> weight(a.weight, a.weight_offset);
  const S* w = weight.data();
  auto* rstds = static_cast<row_scalar<X>*>(a.rstd.data);
  const std::int64_t grain = 1 + 16384 / (cols + 1);
  parallel_for(a.x.rows, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const X* x = row<X>(a.x, r);
      Y* y = row<Y>(a.y, r);
      if (!a.rstd_given) {
        const double squares = sum_lanes<V>(cols, [&](V sum, std::int64_t i, std::int64_t n) {
          const V v = load_lanes<V>(x + i, n);
          return fma(v, v, sum);
        });
        rstds[r] = row_scalar<X>(math::rms_norm_rstd(squares, cols, a.eps));
      }
      const V rstd{S(rstds[r])};
      each_lanes(cols, [&](std::int64_t i, std::int64_t n) {
        const V h = xhat<X, Cast>(load_lanes<V>(x + i, n), rstd);
        store_lanes(y + i, w ? h * load_lanes<V>(w + i, n) : h, n);
      });
    }
  });
}

template <class X, class DY, bool Cast>
class Backward {
  using V = compute_t<X, DY>;
  using S = typename V::scalar;

 public:
  Backward(const RmsNormBackward& a, const S* w) : a_(a), w_(w), cols_(a.x.cols) {}

  // dx of R rows, and their part of dw added to sums.
  template <int R>
  void together(std::int64_t first, double* sums) const {
    const X* x[R];
    const DY* dy[R];
    X* dx[R];
    V rstd[R], slope[R];
    for (int k = 0; k < R; ++k) {
      x[k] = row<X>(a_.x, first + k);
      dy[k] = row<DY>(a_.dy, first + k);
      dx[k] = a_.dx.data ? row<X>(a_.dx, first + k) : nullptr;
      const double s = double(static_cast<const row_scalar<X>*>(a_.rstd.data)[first + k]);
      rstd[k] = V(S(s));
      slope[k] = V(S(dx[k] ? math::rms_norm_slope(sum_of_gx(x[k], dy[k]), cols_, s) : 0));
    }
    each_lanes(cols_, [&](std::int64_t i, std::int64_t n) {
      V dw(0);
      for (int k = 0; k < R; ++k) {
        const V xv = load_lanes<V>(x[k] + i, n), dyv = load_lanes<V>(dy[k] + i, n);
        if (dx[k]) store_lanes(dx[k] + i, math::rms_norm_dx(xv, times_weight(dyv, i, n), rstd[k], slope[k]), n);
        if (sums) dw = fma(dyv, xhat<X, Cast>(xv, rstd[k]), dw);
      }
      if (!sums) return;
      S part[16];
      dw.store(part);
      for (std::int64_t l = 0; l < n; ++l) sums[i + l] += double(part[l]);
    });
  }

 private:
  UNSWAG_INLINE V times_weight(V dy, std::int64_t i, std::int64_t n) const { return w_ ? dy * load_lanes<V>(w_ + i, n) : dy; }
  double sum_of_gx(const X* x, const DY* dy) const {
    return sum_lanes<V>(cols_, [&](V sum, std::int64_t i, std::int64_t n) {
      return fma(times_weight(load_lanes<V>(dy + i, n), i, n), load_lanes<V>(x + i, n), sum);
    });
  }

  const RmsNormBackward& a_;
  const S* w_;
  std::int64_t cols_;
};

template <class X, class DY, bool Cast>
void backward(const RmsNormBackward& a, int threads) {
  const VectorAsRow<compute_t<X, DY>> weight(a.weight, a.weight_offset);
  const Backward<X, DY, Cast> kernel(a, weight.data());
  auto* dw = static_cast<row_scalar<X>*>(a.dw.data);
  over_rows(kernel, a.x.rows, a.x.cols, dw ? 1 : 0, threads, [&](std::int64_t i, double sum) { dw[i] = row_scalar<X>(sum); });
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
