// Loops around src/math/layer_norm.hpp.
#include "math/layer_norm.hpp"

#include "backend.hpp"
#include "cpu/norm.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class X, class Y>
class Forward {
  using V = compute_t<X, Y>;
  using S = typename V::scalar;
  using O = steps_t<V, X, Y>;

 public:
  explicit Forward(const LayerNormForward& a) : a_(a), cols_(a.x.cols), weight_(a.weight, 0), bias_(a.bias, 0) {}

  template <bool Streaming>
  void row(std::int64_t r) const {
    const X *x = UNSWAG_ISA_NS::row<X>(a_.x, r), *next = UNSWAG_ISA_NS::row<X>(a_.x, r + 1 < a_.x.rows ? r + 1 : r);
    Y* y = UNSWAG_ISA_NS::row<Y>(a_.y, r);
    auto* means = static_cast<row_scalar<X>*>(a_.mean.data);
    auto* rstds = static_cast<row_scalar<X>*>(a_.rstd.data);
    if (!a_.statistics_given) {
      const auto found = statistics(x);
      means[r] = row_scalar<X>(found.mean);
      rstds[r] = row_scalar<X>(found.rstd);
    }
    const S mean = plain_nan(S(means[r])), rstd = plain_nan(S(rstds[r]));
    each_step<O, V>(cols_, [&](auto how, std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
      using L = typename decltype(how)::Lanes;
      prefetch_step(next + i);
      const L h = math::layer_norm_xhat(how.load(x + i, n), L(mean), L(rstd));
      const L of_row = math::layer_norm_y(
          h, bool(weight_), bool(bias_), [&]() __attribute__((always_inline)) { return weight_.load(how, i, n); },
          [&]() __attribute__((always_inline)) { return bias_.load(how, i, n); });
      write<Streaming>(how, y + i, of_row, n);
    });
  }

 private:
  math::LayerNormStatistics statistics(const X* x) const {
    const double sum = sum_steps<O, V>(cols_, [&](auto how, auto sum, std::int64_t i, std::int64_t n)
                                                  __attribute__((always_inline)) { return sum + how.load(x + i, n); });
    const S m0 = S(sum / double(cols_));
    double sums[2];  // of d and of its squares
    sum_steps<O, V>(sums, cols_, [&](auto how, auto& sum, std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
      const auto d = first_elements(how.load(x + i, n) - typename decltype(how)::Lanes(m0), n);
      sum[0] = sum[0] + d;
      sum[1] = fma(d, d, sum[1]);
    });
    return math::layer_norm_statistics(double(m0), sums[0], sums[1], cols_, a_.eps);
  }

  const LayerNormForward& a_;
  std::int64_t cols_;
  VectorAsRow<V, O> weight_, bias_;
};

template <class X, class Y>
void forward(const LayerNormForward& a, int threads) {
  each_row<Y>(Forward<X, Y>(a), a.y, threads);
}

template <class X, class DY>
class Backward {
 public:
  using V = compute_t<X, DY>;
  using S = typename V::scalar;
  using O = steps_t<V, X, DY>;

  explicit Backward(const LayerNormBackward& a) : a_(a), weight_(a.weight, 0), cols_(a.x.cols) {}

  // dx of row r, and its parts of dw and of db, those of the two that are wanted, added to sums.
  void row(std::int64_t r, S* sums, bool streaming) const {
    const std::int64_t near = r + 1 < a_.x.rows ? r + 1 : r;
    const X *x = UNSWAG_ISA_NS::row<X>(a_.x, r), *next_x = UNSWAG_ISA_NS::row<X>(a_.x, near);
    const DY *dy = UNSWAG_ISA_NS::row<DY>(a_.dy, r), *next_dy = UNSWAG_ISA_NS::row<DY>(a_.dy, near);
    X* dx = a_.dx.data ? UNSWAG_ISA_NS::row<X>(a_.dx, r) : nullptr;
    S* dw = a_.dw.data ? sums : nullptr;
    S* db = a_.db.data ? sums + (dw ? padded(cols_) : 0) : nullptr;
    const auto s = plain_nan(static_cast<const row_scalar<X>*>(a_.rstd.data)[r]);
    const S mean = S(plain_nan(static_cast<const row_scalar<X>*>(a_.mean.data)[r])), rstd = S(s);
    double found[2] = {};  // sums of g and of g (x - mean)
    if (dx) sums_of_g(x, dy, mean, found);
    const S mean_of_g = S(dx ? found[0] / double(cols_) : 0);
    const S slope = S(dx ? math::layer_norm_slope(found[1], cols_, double(s)) : 0);
    each_step<O, V>(cols_, [&](auto how, std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
      using L = typename decltype(how)::Lanes;
      prefetch_step(next_x + i);
      prefetch_step(next_dy + i);
      const L xv = how.load(x + i, n), dyv = how.load(dy + i, n);
      if (dx) {
        const L g = math::layer_norm_centred(
            dyv, bool(weight_), [&]() __attribute__((always_inline)) { return weight_.load(how, i, n); }, L(mean_of_g));
        const L of_x = math::layer_norm_dx(xv, L(mean), g, L(rstd), L(slope));
        streaming ? write<true>(how, dx + i, of_x, n) : write<false>(how, dx + i, of_x, n);
      }
      if (dw) fma(dyv, math::layer_norm_xhat(xv, L(mean), L(rstd)), L::load(dw + i)).store(dw + i);
      if (db) (L::load(db + i) + dyv).store(db + i);
    });
  }

 private:
  void sums_of_g(const X* x, const DY* dy, S mean, double (&sums)[2]) const {
    sum_steps<O, V>(sums, cols_, [&](auto how, auto& sum, std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
      using L = typename decltype(how)::Lanes;
      L g = how.load(dy + i, n);
      if (weight_) g = g * weight_.load(how, i, n);
      sum[0] = sum[0] + g;
      sum[1] = fma(g, first_elements(how.load(x + i, n) - L(mean), n), sum[1]);
    });
  }

  const LayerNormBackward& a_;
  VectorAsRow<V, O> weight_;
  std::int64_t cols_;
};

template <class X, class DY>
void backward(const LayerNormBackward& a, int threads) {
  auto* dw = static_cast<row_scalar<X>*>(a.dw.data);
  auto* db = static_cast<row_scalar<X>*>(a.db.data);
  over_rows(Backward<X, DY>(a), a.x.rows, a.x.cols, streams<X>(a.dx), (dw ? 1 : 0) + (db ? 1 : 0), threads,
            [&](int v, std::int64_t i, double sum) { (dw && v == 0 ? dw : db)[i] = row_scalar<X>(sum); });
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
