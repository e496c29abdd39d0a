// Softmax cross-entropy by src/math/cross_entropy.hpp: a block takes a row, once in tiles, which it reads into shared memory
// for their maximum and their sum of exponentials, and once more when the gradient is written over it.
#include "backend.hpp"
#include "cuda/eight.hpp"
#include "cuda/tree.hpp"
#include "math/cross_entropy.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// Logit: math::LinearLogit or math::SoftcapLogit.  Smooth: whether label_smoothing is not 0.
template <class T, template <class> class Logit, bool Smooth>
struct CrossEntropyRows {
  using V = compute_t<T>;
  static constexpr int threads = 256, resident = sizeof(V) == 8 ? 2 : 4;
  static constexpr int near = sizeof(V) == 8 ? 1 : 4;  // tiles in shared memory

  struct Shared {
    Tiles<V> tiles;
    Sixteen logits[near * tile_size * sizeof(T) / sizeof(Sixteen)];
    V top[near];
    double sum[near];               // of the tiles' exponentials, while tiles.sum is used for z
    double others_max, others_sum;  // of math::LabelSplit
    double weighted_z;
    T of_label;
    V max, of_p, of_w;
  };

  CrossEntropy a;
  Logit<V> logit;
  Logit<double> label_logit;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    const double total_weight = Smooth && a.class_weight.data ? sum_of_weights(g, shared) : double(a.logits.cols);
    for (std::int64_t r = g.block(); r < a.logits.rows; r += g.blocks()) {
      g.sync();
      const std::int64_t label = a.labels[r];
      if (label == a.ignore_index) {
        if (g.rank() == 0) write_loss(r, 0, 0);
        if (a.write_gradient) write_all(g, r, T{});
      } else if (label < 0 || label >= a.logits.cols) {
        if (g.rank() == 0) write_loss(r, nan(), nan());
        if (a.write_gradient) write_all(g, r, element<T>(V(nan())));
      } else {
        row(g, shared, r, label, total_weight);
      }
    }
  }

 private:
  UNSWAG_HD static double nan() { return math::bit_cast<double>(std::uint64_t{0x7ff8000000000000}); }
  UNSWAG_HD static V lowest() { return sizeof(V) == 8 ? V(-1.7976931348623157e308) : V(-3.402823466e38); }
  // What a block shares cannot have a constructor.
  UNSWAG_HD static math::ExpSum others(const Shared& shared) { return {shared.others_max, shared.others_sum}; }
  UNSWAG_HD static void set(Shared& shared, math::ExpSum others) {
    shared.others_max = others.max;
    shared.others_sum = others.sum;
  }
  UNSWAG_HD const V* weights() const { return static_cast<const V*>(a.class_weight.data); }

  UNSWAG_HD void write_loss(std::int64_t r, double loss, double lse) const {
    static_cast<V*>(a.loss.data)[r] = V(loss);
    if (a.lse.data) static_cast<V*>(a.lse.data)[r] = V(lse);
  }

  template <class Group>
  UNSWAG_HD void write_all(const Group& g, std::int64_t r, T what) const {
    Eight<T> all;
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) all.e[k] = what;
    share(g, divided_up(a.logits.cols, 8),
          [&](std::int64_t u) { store_eight(row_of<T>(a.logits, r) + 8 * u, all, columns_left(u, a.logits.cols), wide); });
  }

  template <class Group>
  UNSWAG_HD double sum_of_weights(const Group& g, Shared& shared) const {
    const std::int64_t classes = a.logits.cols, all = divided_up(classes, tile_size);
    double total = 0;
    for (std::int64_t first = 0; first < all; first += items) {
      const int count = int(all - first < items ? all - first : items);
      sum_tiles(
          g, shared.tiles, count, [&](int k) { return tile_length(first + k, classes); },
          [&](int k, int i, V sum) { return sum + weights()[(first + k) * tile_size + i]; });
      for (int k = 0; k < count; ++k) total += shared.tiles.sum[k];
    }
    return total;
  }

  // Copies the eights c, c + chains, ... of a tile of n logits; returns the largest z among them.
  UNSWAG_HD V read_tile(const T* from, T* to, int n, int c) const {
    V top(-V(HUGE_VAL));
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int j = 0; j < tile_size / 8 / chains; ++j) {
      const int at = 8 * (c + j * chains), left = n - at < 8 ? n - at : 8;
      if (left <= 0) break;
      const Eight<T> x = load_eight(from + at, left, wide);
      store_eight(to + at, x, 8, true);
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k)
        if (k < left) top = math::max(top, logit.z(value<V>(x.e[k])));
    }
    return top;
  }

  template <class Group>
  UNSWAG_HD void row(const Group& g, Shared& shared, std::int64_t r, std::int64_t label, double total_weight) const {
    const std::int64_t classes = a.logits.cols, all = divided_up(classes, tile_size);
    T* logits = row_of<T>(a.logits, r);
    if (g.rank() == 0) {
      set(shared, {});
      shared.weighted_z = 0;
    }
    T* tiles = reinterpret_cast<T*>(shared.logits);
    for (std::int64_t first = 0; first < all; first += near) {
      const int count = int(all - first < near ? all - first : near);
      const auto length = [&](int k) { return tile_length(first + k, classes); };
      const auto z = [&](int k, int i) { return logit.z(value<V>(tiles[k * tile_size + i])); };
      share(g, std::int64_t{count} * chains, [&](std::int64_t u) {
        const int k = int(u / chains), c = int(u % chains);
        const V top = read_tile(logits + (first + k) * tile_size, tiles + k * tile_size, length(k), c);
        shared.tiles.part[k][c] = top;
      });
      g.sync();
      share(g, count, [&](std::int64_t k) {
        V top = shared.tiles.part[k][0];
        for (int c = 1; c < chains; ++c) top = math::max(top, shared.tiles.part[k][c]);
        shared.top[k] = top;
      });
      g.sync();
      const std::int64_t own = label - first * tile_size;
      sum_tiles(g, shared.tiles, count, length, [&](int k, int i, V sum) {
        if (k * tile_size + i == own) return sum;
        const V top = shared.top[k];
        return sum + math::exp(logit.z_minus(value<V>(tiles[k * tile_size + i]), top > lowest() ? top : lowest()));
      });
      if constexpr (Smooth) {
        share(g, count, [&](std::int64_t k) { shared.sum[k] = shared.tiles.sum[k]; });
        g.sync();
        sum_tiles(g, shared.tiles, count, length, [&](int k, int i, V sum) {
          return weights() ? math::fma(z(k, i), weights()[(first + k) * tile_size + i], sum) : sum + z(k, i);
        });
      }
      if (g.rank() == 0) {
        for (int k = 0; k < count; ++k) {
          const V top = shared.top[k], reference = top > lowest() ? top : lowest();
          const double sum = Smooth ? shared.sum[k] : shared.tiles.sum[k];
          set(shared, math::merge(others(shared), {top == -V(HUGE_VAL) ? -HUGE_VAL : double(reference), sum}));
          if constexpr (Smooth) shared.weighted_z += shared.tiles.sum[k];
        }
      }
    }
    if (g.rank() == 0) outcome(shared, r, label, total_weight);
    g.sync();
    if (a.write_gradient) write_gradient(g, shared, r, label);
  }

  UNSWAG_HD void outcome(Shared& shared, std::int64_t r, std::int64_t label, double total_weight) const {
    const double own_logit = value<double>(row_of<T>(a.logits, r)[label]);
    const double row_scale = a.row_scale.data ? double(static_cast<const V*>(a.row_scale.data)[r]) : 1;
    const math::RowLoss row(others(shared), label_logit.z(own_logit), weights() ? double(weights()[label]) : 1,
                            a.label_smoothing, double(a.logits.cols), total_weight, shared.weighted_z,
                            row_scale * a.gradient_scale * a.logit_scale);
    write_loss(r, row.loss, row.lse);
    shared.max = V(shared.others_max);
    shared.of_p = V(row.of_p);
    shared.of_w = V(row.of_w);
    shared.of_label = element<T>(label_logit.times_slope(row.of_label, own_logit));
  }

  template <class Group>
  UNSWAG_HD void write_gradient(const Group& g, const Shared& shared, std::int64_t r, std::int64_t label) const {
    const std::int64_t classes = a.logits.cols;
    share(g, divided_up(classes, 8), [&](std::int64_t u) {
      const int n = columns_left(u, classes);
      T* p = row_of<T>(a.logits, r) + 8 * u;
      const auto x = values<V>(load_eight(p, n, wide));
      Eight<T> dx;
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) {
        V gradient = math::exp(logit.z_minus(x.e[k], shared.max)) * shared.of_p;
        if constexpr (Smooth) {
          gradient = weights() ? math::fma(shared.of_w, k < n ? weights()[8 * u + k] : V(0), gradient) : gradient + shared.of_w;
        }
        dx.e[k] = 8 * u + k == label ? shared.of_label : element<T>(logit.times_slope(gradient, x.e[k]));
      }
      store_eight(p, dx, n, wide);
    });
  }
};

template <class T, template <class> class Logit, bool Smooth>
void rows_of(const CrossEntropy& a, Stream stream) {
  using V = compute_t<T>;
  const CrossEntropyRows<T, Logit, Smooth> kernel{a, Logit<V>(a.logit_scale, a.softcap),
                                                  Logit<double>(a.logit_scale, a.softcap), aligned<T>(a.logits)};
  if (a.logits.rows) launch(kernel, a.logits.rows, stream);
}

template <class T, template <class> class Logit>
void rows_of(const CrossEntropy& a, Stream stream) {
  a.label_smoothing > 0 ? rows_of<T, Logit, true>(a, stream) : rows_of<T, Logit, false>(a, stream);
}

}  // namespace

void cross_entropy(const CrossEntropy& a, Stream stream) {
  math::visit(a.logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    a.softcap > 0 ? rows_of<T, math::SoftcapLogit>(a, stream) : rows_of<T, math::LinearLogit>(a, stream);
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
