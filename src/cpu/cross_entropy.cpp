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
    write_gradient(logits, V(S(sums.others.max)), V(S(row.of_p)), V(S(row.of_w)));
    logits[label] = from_double(label_logit_.times_slope(row.of_label, logit));
  }

 private:
  struct Sums {
    math::ExpSum others;    // all classes but the label in the sum, all in the maximum
    double weighted_z = 0;  // sum of w z, with Smooth
  };

  Sums walk(const T* logits, std::int64_t label) const {
    constexpr std::int64_t kTile = 2048;
    Sums sums;
    for (std::int64_t begin = 0; begin < classes_; begin += kTile) {
      const T* tile = logits + begin;
      const std::int64_t n = classes_ - begin < kTile ? classes_ - begin : kTile;
      const std::int64_t own = label - begin;
      const S top = max_z(tile, n);
      const S reference = top > kLowest ? top : kLowest;  // finite for masked classes only: their terms are 0, not NaN
      const double sum = sum_lanes<V>(n, [&](V acc, std::int64_t i, std::int64_t count) {
        const V term = exp(logit_.z_minus(load_lanes<V>(tile + i, count), V(reference)));
        return acc + without(term, own - i, count);
      });
      sums.others = math::merge(sums.others, {top == -S(HUGE_VAL) ? -HUGE_VAL : double(reference), sum});
      if constexpr (Smooth) {
        sums.weighted_z += sum_lanes<V>(n, [&](V sum, std::int64_t i, std::int64_t count) {
          const V z = logit_.z(load_lanes<V>(tile + i, count));
          return w_ ? fma(z, load_lanes<V>(w_ + begin + i, count), sum) : sum + z;
        });
      }
    }
    return sums;
  }

  S max_z(const T* logits, std::int64_t n) const {
    V top(-S(HUGE_VAL));
    each_lanes(n, [&](std::int64_t i, std::int64_t count) {
      const V z = logit_.z(load_lanes<V>(logits + i, count));
      top = max(top, count == 16 ? z : select(first(count), z, top));
    });
    return reduce_max(top);
  }

  void write_gradient(T* logits, V max, V of_p, V of_w) const {
    each_lanes(classes_, [&](std::int64_t i, std::int64_t count) {
      const V logit = load_lanes<V>(logits + i, count);
      V gradient = exp(logit_.z_minus(logit, max)) * of_p;
      if constexpr (Smooth) gradient = w_ ? fma(of_w, load_lanes<V>(w_ + i, count), gradient) : gradient + of_w;
      store_lanes(logits + i, logit_.times_slope(gradient, logit), count);
    });
  }

  UNSWAG_INLINE static typename V::mask first(std::int64_t n) { return V::mask::from_bits((1u << n) - 1); }
  // The first n lanes without lane `own`, which may lie outside; the rest is 0.
  UNSWAG_INLINE static V without(V x, std::int64_t own, std::int64_t n) {
    const unsigned label = std::uint64_t(own) < 16 ? 1u << own : 0;
    if (n == 16 && !label) return x;
    return select(V::mask::from_bits(((1u << n) - 1) & ~label), x, V(0));
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
