// Loops around src/math/layer_norm.hpp.
#include "math/layer_norm.hpp"

#include "backend.hpp"
#include "cpu/norm.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class X, class Y>
void forward(const LayerNormForward& a, int threads) {
  using V = compute_t<X, Y>;
  using S = typename V::scalar;
  const std::int64_t cols = a.x.cols;
  const VectorAsRow<V> weight(a.weight, 0), bias(a.bias, 0);
  const S *w = weight.data(), *b = bias.data();
  auto* means = static_cast<row_scalar<X>*>(a.mean.data);
  auto* rstds = static_cast<row_scalar<X>*>(a.rstd.data);
  const std::int64_t grain = 1 + 16384 / (cols + 1);
  parallel_for(a.x.rows, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const X* x = row<X>(a.x, r);
      Y* y = row<Y>(a.y, r);
      if (!a.statistics_given) {
        const double sum =
            sum_lanes<V>(cols, [&](V sum, std::int64_t i, std::int64_t n) { return sum + load_lanes<V>(x + i, n); });
        const V m0{S(sum / double(cols))};
        const auto d = [&](std::int64_t i, std::int64_t n) { return first_lanes(load_lanes<V>(x + i, n) - m0, n); };
        const double ds = sum_lanes<V>(cols, [&](V sum, std::int64_t i, std::int64_t n) { return sum + d(i, n); });
        const double squares = sum_lanes<V>(cols, [&](V sum, std::int64_t i, std::int64_t n) {
          const V v = d(i, n);
          return fma(v, v, sum);
        });
        const auto found = math::layer_norm_statistics(double(S(sum / double(cols))), ds, squares, cols, a.eps);
        means[r] = row_scalar<X>(found.mean);
        rstds[r] = row_scalar<X>(found.rstd);
      }
      const V mean{S(means[r])}, rstd{S(rstds[r])};
      each_lanes(cols, [&](std::int64_t i, std::int64_t n) {
        const V h = math::layer_norm_xhat(load_lanes<V>(x + i, n), mean, rstd);
        const V of_row =
            math::layer_norm_y(h, w, b, [&] { return load_lanes<V>(w + i, n); }, [&] { return load_lanes<V>(b + i, n); });
        store_lanes(y + i, of_row, n);
      });
    }
  });
}

template <class X, class DY>
class Backward {
  using V = compute_t<X, DY>;
  using S = typename V::scalar;

 public:
  Backward(const LayerNormBackward& a, const S* w) : a_(a), w_(w), cols_(a.x.cols) {}

  // dx of R rows, and their part of dw and of db, those of the two that are wanted, added to sums.
  template <int R>
  void together(std::int64_t first, double* sums) const {
    const X* x[R];
    const DY* dy[R];
    X* dx[R];
    V mean[R], rstd[R], mean_of_g[R], slope[R];
    for (int k = 0; k < R; ++k) {
      x[k] = row<X>(a_.x, first + k);
      dy[k] = row<DY>(a_.dy, first + k);
      dx[k] = a_.dx.data ? row<X>(a_.dx, first + k) : nullptr;
      const double s = double(static_cast<const row_scalar<X>*>(a_.rstd.data)[first + k]);
      mean[k] = V(S(static_cast<const row_scalar<X>*>(a_.mean.data)[first + k]));
      rstd[k] = V(S(s));
      mean_of_g[k] = V(S(dx[k] ? sum_of_g(dy[k]) / double(cols_) : 0));
      slope[k] = V(S(dx[k] ? math::layer_norm_slope(sum_of_gd(x[k], dy[k], mean[k]), cols_, s) : 0));
    }
    double* db_sums = a_.db.data ? sums + (a_.dw.data ? cols_ : 0) : nullptr;
    each_lanes(cols_, [&](std::int64_t i, std::int64_t n) {
      V dw(0), db(0);
      for (int k = 0; k < R; ++k) {
        const V xv = load_lanes<V>(x[k] + i, n), dyv = load_lanes<V>(dy[k] + i, n);
        if (dx[k]) {
          const V g = math::layer_norm_centred(dyv, w_, [&] { return load_lanes<V>(w_ + i, n); }, mean_of_g[k]);
          store_lanes(dx[k] + i, math::layer_norm_dx(xv, mean[k], g, rstd[k], slope[k]), n);
        }
        if (a_.dw.data) dw = fma(dyv, math::layer_norm_xhat(xv, mean[k], rstd[k]), dw);
        if (a_.db.data) db = db + dyv;
      }
      if (a_.dw.data) add(dw, sums + i, n);
      if (a_.db.data) add(db, db_sums + i, n);
    });
  }

 private:
  UNSWAG_INLINE V times_weight(V dy, std::int64_t i, std::int64_t n) const { return w_ ? dy * load_lanes<V>(w_ + i, n) : dy; }
  double sum_of_g(const DY* dy) const {
    return sum_lanes<V>(
        cols_, [&](V sum, std::int64_t i, std::int64_t n) { return sum + times_weight(load_lanes<V>(dy + i, n), i, n); });
  }
  double sum_of_gd(const X* x, const DY* dy, V mean) const {
    return sum_lanes<V>(cols_, [&](V sum, std::int64_t i, std::int64_t n) {
      return fma(times_weight(load_lanes<V>(dy + i, n), i, n), first_lanes(load_lanes<V>(x + i, n) - mean, n), sum);
    });
  }
  UNSWAG_INLINE static void add(V x, double* sums, std::int64_t n) {
    S part[16];
    x.store(part);
    for (std::int64_t l = 0; l < n; ++l) sums[l] += double(part[l]);
  }

  const LayerNormBackward& a_;
  const S* w_;
  std::int64_t cols_;
};

template <class X, class DY>
void backward(const LayerNormBackward& a, int threads) {
  const std::int64_t cols = a.x.cols;
  const VectorAsRow<compute_t<X, DY>> weight(a.weight, 0);
  const Backward<X, DY> kernel(a, weight.data());
  auto* dw = static_cast<row_scalar<X>*>(a.dw.data);
  auto* db = static_cast<row_scalar<X>*>(a.db.data);
  over_rows(kernel, a.x.rows, cols, (dw ? 1 : 0) + (db ? 1 : 0), threads,
            [&](std::int64_t i, double sum) { (dw && i < cols ? dw[i] : db[dw ? i - cols : i]) = row_scalar<X>(sum); });
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a, Stream stream) {
  visit(a.x.dtype, [&](auto x) {
    visit(a.y.dtype, [&](auto y) { forward<typename decltype(x)::of, typename decltype(y)::of>(a, stream.threads); });
  });
}

void layer_norm_backward(const LayerNormBackward& a, Stream stream) {
  visit(a.x.dtype, [&](auto x) {
    visit(a.dy.dtype, [&](auto dy) { backward<typename decltype(x)::of, typename decltype(dy)::of>(a, stream.threads); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
