// Loops around src/math/cross_entropy.hpp.  A row is walked through twice: in tiles that stay in the cache for their maximum
// and their sum of exponentials, and once more when the gradient is written over it.
#include "math/cross_entropy.hpp"

#include "backend.hpp"
#include "cpu/lanes.hpp"
#include "cpu/threads.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// Logit: math::LinearLogit or math::SoftcapLogit.  Smooth: whether label_smoothing is not 0.
template <class T, template <class> class Logit, bool Smooth>
class CrossEntropyRows {
  using V = lanes_t<T>;
  using S = typename V::scalar;
  using O = std::conditional_t<Smooth, InOrder<V>, steps_t<V, T>>;  // class weights come in order

 public:
  explicit CrossEntropyRows(const CrossEntropy& a)
      : a_(a),
        classes_(a.logits.cols),
        w_(static_cast<const S*>(a.class_weight.data)),
        logit_(a.logit_scale, a.softcap),
        label_logit_(a.logit_scale, a.softcap) {
    total_weight_ =
        Smooth && w_
            ? sum_lanes<V>(classes_, [&](V sum, std::int64_t i, std::int64_t n) { return sum + load_lanes<V>(w_ + i, n); })
            : double(classes_);
  }

  void row(std::int64_t r) const {
    T* logits = UNSWAG_ISA_NS::row<T>(a_.logits, r);
    S* loss = static_cast<S*>(a_.loss.data) + r;
    S* lse = a_.lse.data ? static_cast<S*>(a_.lse.data) + r : nullptr;
    const std::int64_t label = a_.labels[r];
    if (label == a_.ignore_index) {
      *loss = 0;
      if (lse) *lse = 0;
      if (a_.write_gradient) memset(logits, 0, std::size_t(classes_) * sizeof(T));
      return;
    }
    const double logit = to_double(logits[label]);
    const double z_label = label_logit_.z(logit);
    const Sums sums = walk(logits, label);
    const math::RowLoss row(sums.others, z_label, weight(label), a_.label_smoothing, double(classes_), total_weight_,
                            sums.weighted_z, scale(r) * a_.gradient_scale * a_.logit_scale);
    *loss = S(row.loss);
    if (lse) *lse = S(row.lse);
    if (!a_.write_gradient) return;
    write_gradient(logits, sums, plain_nan(S(row.of_p)), S(row.of_w));
    logits[label] = from_double(label_logit_.times_slope(row.of_label, logit));
  }

 private:
  static constexpr std::int64_t tile = 2048;

  struct Sums {
    math::ExpSum others;    // all classes but the label in the sum, all in the maximum
    bool normal = true;     // whether exp(z - max) may be exp_normal
    double weighted_z = 0;  // sum of w z, with Smooth
  };

  Sums walk(const T* logits, std::int64_t label) const {
    Sums sums;
    Range all{-S(HUGE_VAL), S(HUGE_VAL), true};
    for (std::int64_t begin = 0; begin < classes_; begin += tile) {
      const T* at = logits + begin;
      const std::int64_t n = classes_ - begin < tile ? classes_ - begin : tile;
      const Range here = range(at, n);
      const S top = max_z(here);
      const S reference = top > kLowest ? top : kLowest;  // finite for masked classes only: their terms are 0, not NaN
      const double sum = exp_is_normal(here, reference) ? sum_of_exp<true>(at, n, label - begin, reference)
                                                        : sum_of_exp<false>(at, n, label - begin, reference);
      sums.others = math::merge(sums.others, {top == -S(HUGE_VAL) ? -HUGE_VAL : double(reference), sum});
      all = {all.top > here.top ? all.top : here.top, all.bottom < here.bottom ? all.bottom : here.bottom,
             all.numbers && here.numbers};
      if constexpr (Smooth) {
        sums.weighted_z += sum_lanes<V>(n, [&](V sum, std::int64_t i, std::int64_t count) {
          const V z = logit_.z(load_lanes<V>(at + i, count));
          return w_ ? fma(z, load_lanes<V>(w_ + begin + i, count), sum) : sum + z;
        });
      }
    }
    sums.normal = exp_is_normal(all, S(sums.others.max));
    return sums;
  }

  // The largest and the smallest of n logits, whose z are the extremes of z, and whether they are all there is: NaN are told
  // where they have more than sixteen bits, in which exp_normal could lose them.
  struct Range {
    S top, bottom;
    bool numbers;
  };
  Range range(const T* logits, std::int64_t n) const {
    const auto look = [](auto x, auto& top, auto& bottom, auto& check) __attribute__((always_inline)) {
      top = max(top, x), bottom = min(bottom, x);
      if constexpr (sizeof(T) > 2) check = fma(x, decltype(x)(S(0)), check);
    };
    typename O::Lanes tops{-S(HUGE_VAL)}, bottoms{S(HUGE_VAL)}, checks{S(0)};
    for (std::int64_t i = 0; i < whole(n); i += O::step) look(O::load(logits + i, O::step), tops, bottoms, checks);
    V top{reduce_max(tops)}, bottom{-reduce_max(-bottoms)}, check{S(0)};
    each_lanes(n - whole(n), [&](std::int64_t i, std::int64_t count) {
      const T* at = logits + whole(n) + i;
      look(select(V::mask::from_bits((1u << count) - 1), load_lanes<V>(at, count), V(S(to_double(*at)))), top, bottom, check);
    });
    return {reduce_max(top), -reduce_max(-bottom), all(check == check) && all(checks == checks)};
  }
  S max_z(const Range& logits) const { return first_lane(logit_.z(V(a_.logit_scale < 0 ? logits.bottom : logits.top))); }
  bool exp_is_normal(const Range& logits, S max) const {
    const S lowest = a_.logit_scale < 0 ? logits.top : logits.bottom;
    return logits.numbers && math::exp_is_normal(first_lane(logit_.z_minus(V(lowest), V(max))));
  }
  static S first_lane(V x) {
    S all[16];
    x.store(all);
    return all[0];
  }

  // The sum of exp(z - max) but for class `own`, which may lie outside.
  template <bool Normal>
  double sum_of_exp(const T* logits, std::int64_t n, std::int64_t own, S max) const {
    return sum_steps<O, V>(n, [&](auto how, auto sum, std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
      __builtin_prefetch(logits + tile + i);
      return sum + without(how, exp_of_z<Normal>(how.load(logits + i, count), max), own - i, count);
    });
  }

  void write_gradient(T* logits, const Sums& sums, S of_p, S of_w) const {
    const auto max = S(sums.others.max);
    for (std::int64_t begin = 0; begin < classes_; begin += tile) {
      const std::int64_t n = classes_ - begin < tile ? classes_ - begin : tile;
      const bool normal = sums.normal || exp_is_normal(range(logits + begin, n), max);
      normal ? write_gradient<true>(logits, begin, n, max, of_p, of_w)
             : write_gradient<false>(logits, begin, n, max, of_p, of_w);
    }
  }
  template <bool Normal>
  void write_gradient(T* logits, std::int64_t begin, std::int64_t n, S max, S of_p, S of_w) const {
    const auto gradient = [&](auto how, auto logit, std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
      using L = decltype(logit);
      L g = exp_of_z<Normal>(logit, max) * L(of_p);
      if constexpr (Smooth) g = w_ ? fma(L(of_w), how.load(w_ + i, count), g) : g + L(of_w);
      return logit_of<L>().times_slope(g, logit);
    };
    std::int64_t i = begin;
    // Several steps at a time, which the processor works on together.
    constexpr int steps = 64 / O::step;
    for (; i < begin + whole(n); i += 64) {
      typename O::Lanes x[steps];
      for (int k = 0; k < steps; ++k) x[k] = O::load(logits + i + k * O::step, O::step);
      for (int k = 0; k < steps; ++k) x[k] = gradient(O{}, x[k], i + k * O::step, O::step);
      for (int k = 0; k < steps; ++k) O::store(logits + i + k * O::step, x[k], O::step);
    }
    each_lanes(begin + n - i, [&](std::int64_t j, std::int64_t count) {
      T* at = logits + i + j;
      store_lanes(at, gradient(InOrder<V>{}, load_lanes<V>(at, count), i + j, count), count);
    });
  }

  template <class L>
  UNSWAG_INLINE Logit<L> logit_of() const {
    return {a_.logit_scale, a_.softcap};
  }
  template <bool Normal, class L>
  UNSWAG_INLINE L exp_of_z(L logit, S max) const {
    const L z = logit_of<L>().z_minus(logit, L(max));
    if constexpr (Normal && math::is_float<L>) {
      return math::exp_normal(z);
    } else {
      return exp(z);
    }
  }

  // The first n elements of a step without element `own`, which may lie outside; the rest is 0.
  template <class How, class L>
  UNSWAG_INLINE static L without(How, L x, std::int64_t own, std::int64_t n) {
    x = first_elements(x, n);
    if (std::uint64_t(own) < How::step) [[unlikely]]
      x = select(L::mask::from_bits(1u << How::lane(int(own))), L(S(0)), x);
    return x;
  }

  static double to_double(T x) {
    if constexpr (sizeof(T) == 8) {
      return x;
    } else {
      return double(math::to_float(x));
    }
  }
  static T from_double(double x) {
    if constexpr (sizeof(T) == 8) {
      return x;
    } else {
      return math::from_float<T>(sizeof(T) == 2 ? math::to_odd(x) : float(x));
    }
  }
  double weight(std::int64_t label) const { return w_ ? double(w_[label]) : 1; }
  double scale(std::int64_t r) const { return a_.row_scale.data ? double(static_cast<const S*>(a_.row_scale.data)[r]) : 1; }

  static constexpr S kLowest = sizeof(S) == 8 ? S(-1.7976931348623157e308) : S(-3.402823466e38);

  const CrossEntropy& a_;
  std::int64_t classes_;
  const S* w_;
  Logit<V> logit_;
  Logit<double> label_logit_;
  double total_weight_;
};

template <class T, template <class> class Logit>
void rows_of(const CrossEntropy& a, int threads) {
  const auto run = [&](const auto& kernel) {
    parallel_for(a.logits.rows, 1 + 32768 / (a.logits.cols + 1), threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) kernel.row(r);
    });
  };
  a.label_smoothing > 0 ? run(CrossEntropyRows<T, Logit, true>(a)) : run(CrossEntropyRows<T, Logit, false>(a));
}

}  // namespace

void cross_entropy(const CrossEntropy& a, Stream stream) {
  visit(a.logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    a.softcap > 0 ? rows_of<T, math::SoftcapLogit>(a, stream.threads) : rows_of<T, math::LinearLogit>(a, stream.threads);
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
