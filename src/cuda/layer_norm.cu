// LayerNorm by src/math/layer_norm.hpp: a block takes four rows at a time, as in rms_norm.cu.
#include "backend.hpp"
#include "cuda/norm.hpp"
#include "math/layer_norm.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// E: the type of x, weight, bias and y, or Any.
template <class E, class V>
struct Forward {
  static constexpr int threads = 256, resident = sizeof(V) == 8 ? 1 : 4;
  struct Shared {
    RowSums<V> sums;
    double sum_of_d[together];
    V mean[together], rstd[together];  // mean: m0 at first
  };

  LayerNormForward a;
  OffsetVector<E, V> weight, bias;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    const std::int64_t rows = a.x.rows, cols = a.x.cols, per_row = divided_up(cols, 8);
    for (std::int64_t first = g.block() * together; first < rows; first += g.blocks() * together) {
      const int count = int(rows - first < together ? rows - first : together);
      if (!a.statistics_given) find(g, shared, first, count);
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
        Eight<V> y = load_values<V, E>(address<E>(a.x, first + at.row, col), a.x.dtype, n, wide), w, b;
        if (weight.vector.data) w = weight.eight(col, n);
        if (bias.vector.data) b = bias.eight(col, n);
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          y.e[k] = math::layer_norm_y(
              math::layer_norm_xhat(y.e[k], mean, rstd), weight.vector.data, bias.vector.data, [&] { return w.e[k]; },
              [&] { return b.e[k]; });
        }
        store_values<E>(address<E>(a.y, first + at.row, col), a.y.dtype, y, n, wide);
      });
      g.sync();
    }
  }

 private:
  // Mean and rstd of `count` rows.
  template <class Group>
  UNSWAG_HD void find(const Group& g, Shared& shared, std::int64_t first, int count) const {
    const std::int64_t cols = a.x.cols;
    const auto x = [&](int r, std::int64_t i) { return load_one<V, E>(address<E>(a.x, first + r, i), a.x.dtype); };
    shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) { return sum + x(r, i); });
    share(g, count, [&](std::int64_t r) { shared.mean[r] = V(shared.sums.total[r] / double(cols)); });
    shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) { return sum + (x(r, i) - shared.mean[r]); });
    share(g, count, [&](std::int64_t r) { shared.sum_of_d[r] = shared.sums.total[r]; });
    shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) {
      const V d = x(r, i) - shared.mean[r];
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

// dx, and the sums of dy xhat and of dy over each block of math::RowTree, into scratch.  E: the type of x, weight, dy and dx.
template <class E, class V>
struct Backward {
  static constexpr int threads = 256, resident = sizeof(V) == 8 ? 1 : std::is_same_v<E, Any> ? 2 : 3;
  struct Shared {
    RowSums<V> sums;
    V mean[together], rstd[together], mean_of_g[together], slope[together];
  };

  LayerNormBackward a;
  OffsetVector<E, V> weight;
  double *dw, *db;  // [tree.blocks()][cols], or null
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    const math::RowTree tree{a.x.rows};
    for (std::int64_t b = g.block(); b < tree.blocks(); b += g.blocks()) {
      const std::int64_t begin = b * math::RowTree::block;
      const std::int64_t end = a.x.rows - begin < math::RowTree::block ? a.x.rows : begin + math::RowTree::block;
      for (std::int64_t r = begin; r < end;) {
        const int count = end - r < together ? 1 : together;
        rows(g, shared, r, count, b * a.x.cols, r == begin);
        r += count;
      }
    }
  }

 private:
  // Rows first ... first + count - 1, whose parts of dw and db are added up in V before they are added to dw[at...] and
  // db[at...] (set, if `sets`).
  template <class Group>
  UNSWAG_HD void rows(const Group& g, Shared& shared, std::int64_t first, int count, std::int64_t at, bool sets) const {
    const std::int64_t cols = a.x.cols;
    share(g, count, [&](std::int64_t r) {
      shared.mean[r] = V(get(a.mean, first + r));
      shared.rstd[r] = V(get(a.rstd, first + r));
      shared.mean_of_g[r] = shared.slope[r] = V(0);
    });
    if (a.dx.data) {
      const auto gradient = [&](int r, std::int64_t i) {
        const V dy = load_one<V, E>(address<E>(a.dy, first + r, i), a.dy.dtype);
        return weight.vector.data ? dy * weight.one(i) : dy;
      };
      shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) { return sum + gradient(r, i); });
      share(g, count, [&](std::int64_t r) { shared.mean_of_g[r] = V(shared.sums.total[r] / double(cols)); });
      shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) {
        const V x = load_one<V, E>(address<E>(a.x, first + r, i), a.x.dtype);
        return math::fma(gradient(r, i), x - shared.mean[r], sum);
      });
      share(g, count, [&](std::int64_t r) {
        shared.slope[r] = V(math::layer_norm_slope(shared.sums.total[r], cols, get(a.rstd, first + r)));
      });
    }
    g.sync();
    share(g, divided_up(cols, 8), [&](std::int64_t u) {
      const int n = columns_left(u, cols);
      Eight<V> w, dw_part, db_part;
      if (weight.vector.data) w = weight.eight(8 * u, n);
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) dw_part.e[k] = db_part.e[k] = V(0);
      for (int r = 0; r < count; ++r) {
        const V mean = shared.mean[r], rstd = shared.rstd[r], mean_of_g = shared.mean_of_g[r], slope = shared.slope[r];
        const Eight<V> x = load_values<V, E>(address<E>(a.x, first + r, 8 * u), a.x.dtype, n, wide);
        const Eight<V> dy = load_values<V, E>(address<E>(a.dy, first + r, 8 * u), a.dy.dtype, n, wide);
        if (a.dx.data) {
          Eight<V> dx;
          UNSWAG_UNROLL
          for (int k = 0; k < 8; ++k) {
            const V centred = math::layer_norm_centred(dy.e[k], weight.vector.data, [&] { return w.e[k]; }, mean_of_g);
            dx.e[k] = math::layer_norm_dx(x.e[k], mean, centred, rstd, slope);
          }
          store_values<E>(address<E>(a.dx, first + r, 8 * u), a.dx.dtype, dx, n, wide);
        }
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          dw_part.e[k] = math::fma(dy.e[k], math::layer_norm_xhat(x.e[k], mean, rstd), dw_part.e[k]);
          db_part.e[k] = db_part.e[k] + dy.e[k];
        }
      }
      if (dw) add(dw_part, dw + at + 8 * u, n, sets);
      if (db) add(db_part, db + at + 8 * u, n, sets);
    });
    g.sync();
  }

  UNSWAG_HD static void add(const Eight<V>& part, double* sums, int n, bool sets) {
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k)
      if (k < n) sums[k] = (sets ? 0. : sums[k]) + double(part.e[k]);
  }
};

template <class E, class V>
void forward(const LayerNormForward& a, Stream stream) {
  const Forward<E, V> kernel{a, {a.weight, 0}, {a.bias, 0}, aligned_as_it_is(a.x) && aligned_as_it_is(a.y)};
  if (a.x.rows) launch(kernel, divided_up(a.x.rows, together), stream);
}

template <class E, class V>
void backward(const LayerNormBackward& a, Stream stream) {
  const math::RowTree tree{a.x.rows};
  auto* dw = a.dw.data ? static_cast<double*>(a.scratch) : nullptr;
  auto* db = a.db.data ? static_cast<double*>(a.scratch) + (dw ? (tree.blocks() + tree.groups()) * a.x.cols : 0) : nullptr;
  const bool wide = aligned_as_it_is(a.x) && aligned_as_it_is(a.dy) && (!a.dx.data || aligned_as_it_is(a.dx));
  const Backward<E, V> kernel{a, {a.weight, 0}, dw, db, wide};
  if (a.x.rows) launch(kernel, tree.blocks(), stream);
  if (dw) sum_blocks(dw, a.dw, tree, stream);
  if (db) sum_blocks(db, a.db, tree, stream);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a, Stream stream) {
  choose(a.x.dtype, a.y.dtype, {a.weight, a.bias}, [&](auto e, auto v) { forward<decltype(e), decltype(v)>(a, stream); });
}

void layer_norm_backward(const LayerNormBackward& a, Stream stream) {
  choose(a.x.dtype, a.dy.dtype, {a.weight}, [&](auto e, auto v) { backward<decltype(e), decltype(v)>(a, stream); });
}

}  // namespace unswag::UNSWAG_ISA_NS
