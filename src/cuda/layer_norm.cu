// LayerNorm by src/math/layer_norm.hpp: rows in shared memory, as in rms_norm.cu.
#include "backend.hpp"
#include "cuda/norm.hpp"
#include "math/layer_norm.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// T: Types.
template <class T, class V>
struct Forward {
  static constexpr int threads = 256, resident = sizeof(V) == 8 ? 1 : 4;
  struct Shared {
    RowSums<V> sums;
    double sum_of_d[together];
    V mean[together], rstd[together];  // mean: m0 at first
  };
  using X = typename T::X;
  using Y = typename T::Y;

  LayerNormForward a;
  OffsetVector<typename T::W, V> weight, bias;
  bool x_wide, y_wide;
  int held;  // rows in shared memory, or 0

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    if constexpr (holds_rows<T, V>) {
      if (held) return walk(g, shared, SharedRows<X, V>{a.x, x_wide, static_cast<X*>(g.memory())}, held);
    }
    walk(g, shared, GlobalRows<X, V>{a.x, x_wide}, together);
  }

 private:
  template <class Group, class In>
  UNSWAG_HD void walk(const Group& g, Shared& shared, In x, int at_a_time) const {
    const std::int64_t rows = a.x.rows, cols = a.x.cols, per_row = divided_up(cols, 8);
    for (std::int64_t first = g.block() * at_a_time; first < rows; first += g.blocks() * at_a_time) {
      const int count = int(rows - first < at_a_time ? rows - first : at_a_time);
      x.read(g, first, count);
      if (!a.statistics_given) find(g, shared, x, first, count);
      share(g, count, [&](std::int64_t r) {
        shared.mean[r] = V(get({a.mean.data, a.mean.dtype, a.mean.size}, first + r));
        shared.rstd[r] = V(get({a.rstd.data, a.rstd.dtype, a.rstd.size}, first + r));
      });
      g.sync();
      share(g, count * per_row, [&](std::int64_t u) {
        const RowAndRest at = row_and_rest(u, per_row);
        const std::int64_t col = 8 * at.rest;
        const int n = columns_left(at.rest, cols);
        const V mean = shared.mean[at.row], rstd = shared.rstd[at.row];
        Eight<V> y = x.eight(int(at.row), at.rest, n), w, b;
        if (weight.vector.data) w = weight.eight(col, n);
        if (bias.vector.data) b = bias.eight(col, n);
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          y.e[k] = math::layer_norm_y(
              math::layer_norm_xhat(y.e[k], mean, rstd), weight.vector.data, bias.vector.data, [&] { return w.e[k]; },
              [&] { return b.e[k]; });
        }
        store_values<Y>(address<Y>(a.y, first + at.row, col), a.y.dtype, y, n, y_wide);
      });
      g.sync();
    }
  }

  // Mean and rstd of `count` rows.
  template <class Group, class In>
  UNSWAG_HD void find(const Group& g, Shared& shared, const In& x, std::int64_t first, int count) const {
    const std::int64_t cols = a.x.cols;
    shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) { return sum + x.one(r, i); });
    share(g, count, [&](std::int64_t r) { shared.mean[r] = V(shared.sums.total[r] / double(cols)); });
    shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) { return sum + (x.one(r, i) - shared.mean[r]); });
    share(g, count, [&](std::int64_t r) { shared.sum_of_d[r] = shared.sums.total[r]; });
    shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) {
      const V d = x.one(r, i) - shared.mean[r];
      return math::fma(d, d, sum);
    });
    share(g, count, [&](std::int64_t r) {
      const auto found =
          math::layer_norm_statistics(double(shared.mean[r]), shared.sum_of_d[r], shared.sums.total[r], cols, a.eps);
      put(a.mean, first + r, found.mean);
      put(a.rstd, first + r, found.rstd);
    });
  }
};

// dx, and the sums of dy xhat and of dy over each block of math::RowTree, into scratch.
template <class T, class V>
struct Backward {
  static constexpr bool same = std::is_same_v<typename T::X, typename T::Y>;  // else more registers are needed
  static constexpr int threads = !holds_rows<T, V> ? 256 : same ? 384 : 320, resident = sizeof(V) == 8 ? 1 : 2;
  struct Shared {
    RowSums<V> sums;
    V mean[together], rstd[together], mean_of_g[together], slope[together];
  };
  struct Part {
    Eight<V> dw, db;
  };
  using X = typename T::X;
  using Y = typename T::Y;

  LayerNormBackward a;
  OffsetVector<typename T::W, V> weight;
  double *dw, *db;  // [tree.blocks()][cols], or null
  bool x_wide, dy_wide, dx_wide;
  int held;  // rows in shared memory, or 0

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    const std::int64_t per_row = divided_up(a.x.cols, 8);
    if constexpr (holds_rows<T, V>) {
      if (held && per_row <= g.size()) {
        X* memory = static_cast<X*>(g.memory());
        const SharedRows<X, V> x{a.x, x_wide, memory};
        const SharedRows<Y, V> dy{a.dy, dy_wide, reinterpret_cast<Y*>(memory + 8 * per_row * held)};
        return walk(g, shared, x, dy, [&](int count, const auto& find, const auto& columns, const auto& add) {
          rows_in_turn<Part>(g, count, held, per_row, find, columns, add);
        });
      }
    }
    GlobalRows<X, V> x{a.x, x_wide};
    GlobalRows<Y, V> dy{a.dy, dy_wide};
    walk(g, shared, x, dy, [&](int count, const auto& find, const auto& columns, const auto& add) {
      rows_at_once<Part>(g, count, per_row, find, columns, add);
    });
  }

 private:
  template <class Group, class In, class InDy, class Each>
  UNSWAG_HD void walk(const Group& g, Shared& shared, In& x, InDy& dy, const Each& each) const {
    const std::int64_t cols = a.x.cols;
    walk_tree(g, a.x.rows, [&](std::int64_t first, int count, std::int64_t block, bool sets) {
      each(
          count, [&](int r, int n) { find(g, shared, x, dy, first + r, n); },
          [&](int r, int n, std::int64_t u, Part& part) { columns(shared, x, dy, first + r, n, u, part); },
          [&](std::int64_t u, const Part& part) {
            if (dw) add_columns(dw + block * cols, u, cols, part.dw, sets);
            if (db) add_columns(db + block * cols, u, cols, part.db, sets);
          });
    });
  }

  // Mean, rstd, mean of g and slope of `count` rows.
  template <class Group, class In, class InDy>
  UNSWAG_HD void find(const Group& g, Shared& shared, In& x, InDy& dy, std::int64_t first, int count) const {
    const std::int64_t cols = a.x.cols;
    x.read(g, first, count);
    dy.read(g, first, count);
    share(g, count, [&](std::int64_t r) {
      shared.mean[r] = V(get(a.mean, first + r));
      shared.rstd[r] = V(get(a.rstd, first + r));
      shared.mean_of_g[r] = shared.slope[r] = V(0);
    });
    if (a.dx.data) {
      const auto gradient = [&](int r, std::int64_t i) {
        return weight.vector.data ? dy.one(r, i) * weight.one(i) : dy.one(r, i);
      };
      shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) { return sum + gradient(r, i); });
      share(g, count, [&](std::int64_t r) { shared.mean_of_g[r] = V(shared.sums.total[r] / double(cols)); });
      shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) {
        return math::fma(gradient(r, i), x.one(r, i) - shared.mean[r], sum);
      });
      share(g, count, [&](std::int64_t r) {
        shared.slope[r] = V(math::layer_norm_slope(shared.sums.total[r], cols, get(a.rstd, first + r)));
      });
    }
    g.sync();
  }

  // dx of the columns from 8 u on; their part of dw and db.
  template <class In, class InDy>
  UNSWAG_HD void columns(const Shared& shared, const In& x, const InDy& dy, std::int64_t first, int count, std::int64_t u,
                         Part& part) const {
    const int n = columns_left(u, a.x.cols);
    Eight<V> w;
    if (weight.vector.data) w = weight.eight(8 * u, n);
    for (int r = 0; r < count; ++r) {
      const V mean = shared.mean[r], rstd = shared.rstd[r], mean_of_g = shared.mean_of_g[r], slope = shared.slope[r];
      const Eight<V> of_x = x.eight(r, u, n), of_dy = dy.eight(r, u, n);
      if (a.dx.data) {
        Eight<V> dx;
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          const V centred = math::layer_norm_centred(of_dy.e[k], weight.vector.data, [&] { return w.e[k]; }, mean_of_g);
          dx.e[k] = math::layer_norm_dx(of_x.e[k], mean, centred, rstd, slope);
        }
        store_values<X>(address<X>(a.dx, first + r, 8 * u), a.dx.dtype, dx, n, dx_wide);
      }
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) {
        part.dw.e[k] = math::fma(of_dy.e[k], math::layer_norm_xhat(of_x.e[k], mean, rstd), part.dw.e[k]);
        part.db.e[k] = part.db.e[k] + of_dy.e[k];
      }
    }
  }
};

template <class T, class V>
void forward(const LayerNormForward& a, Stream stream) {
  const Held held = a.statistics_given ? Held{} : rows_held<T, V>({a.x});
  const Forward<T, V> kernel{a, {a.weight, 0}, {a.bias, 0}, aligned_as_it_is(a.x), aligned_as_it_is(a.y), held.rows};
  if (a.x.rows) launch(kernel, divided_up(a.x.rows, held.rows ? held.rows : together), stream, held.threads, held.bytes);
}

template <class T, class V>
void backward(const LayerNormBackward& a, Stream stream) {
  const math::RowTree tree{a.x.rows};
  auto* dw = a.dw.data ? static_cast<double*>(a.scratch) : nullptr;
  auto* db = a.db.data ? static_cast<double*>(a.scratch) + (dw ? (tree.blocks() + tree.groups()) * a.x.cols : 0) : nullptr;
  const Held held = a.dx.data ? rows_held<T, V>({a.x, a.dy}, Backward<T, V>::threads) : Held{};
  const Backward<T, V> kernel{
      a, {a.weight, 0}, dw, db, aligned_as_it_is(a.x), aligned_as_it_is(a.dy), a.dx.data && aligned_as_it_is(a.dx), held.rows};
  if (a.x.rows) launch(kernel, tree.blocks(), stream, held.threads, held.bytes);
  if (dw) sum_blocks(dw, a.dw, tree, stream);
  if (db) sum_blocks(db, a.db, tree, stream);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a, Stream stream) {
  choose(a.x.dtype, a.y.dtype, {a.weight, a.bias}, [&](auto t, auto v) { forward<decltype(t), decltype(v)>(a, stream); });
}

void layer_norm_backward(const LayerNormBackward& a, Stream stream) {
  choose(a.x.dtype, a.dy.dtype, {a.weight}, [&](auto t, auto v) { backward<decltype(t), decltype(v)>(a, stream); });
}

}  // namespace unswag::UNSWAG_ISA_NS
