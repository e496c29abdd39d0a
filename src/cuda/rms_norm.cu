// RMSNorm by src/math/rms_norm.hpp: a block takes four rows at a time, once for their sums and once for what is written; the
// second time they are near.
#include "backend.hpp"
#include "cuda/norm.hpp"
#include "math/rms_norm.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class E, bool Cast, class V>
UNSWAG_HD inline V xhat(V x, V rstd, DType dtype) {
  if constexpr (!Cast) {
    return x * rstd;
  } else {
    return with_type<E>(dtype, [&](auto zero) { return value<V>(element<decltype(zero)>(x * rstd)); });
  }
}

// E: the type of x, weight and y, or Any.
template <class E, class V, bool Cast>
struct Forward {
  static constexpr int threads = 256, resident = sizeof(V) == 8 ? 1 : 4;
  struct Shared {
    RowSums<V> sums;
    V rstd[together];
  };

  RmsNormForward a;
  OffsetVector<E, V> weight;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    const std::int64_t rows = a.x.rows, cols = a.x.cols, per_row = divided_up(cols, 8);
    for (std::int64_t first = g.block() * together; first < rows; first += g.blocks() * together) {
      const int count = int(rows - first < together ? rows - first : together);
      if (!a.rstd_given) {
        shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) {
          const V x = load_one<V, E>(address<E>(a.x, first + r, i), a.x.dtype);
          return math::fma(x, x, sum);
        });
      }
      share(g, count, [&](std::int64_t r) {
        if (!a.rstd_given) put(a.rstd, first + r, math::rms_norm_rstd(shared.sums.total[r], cols, a.eps));
        shared.rstd[r] = V(get({a.rstd.data, a.rstd.dtype, a.rstd.size}, first + r));
      });
      g.sync();
      share(g, count * per_row, [&](std::int64_t u) {
        const RowAndRest at = row_and_rest(u, per_row);
        const std::int64_t col = 8 * at.rest;
        const int n = columns_left(at.rest, cols);
        const V rstd = shared.rstd[at.row];
        Eight<V> y = load_values<V, E>(address<E>(a.x, first + at.row, col), a.x.dtype, n, wide);
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) y.e[k] = xhat<E, Cast>(y.e[k], rstd, a.x.dtype);
        if (weight.vector.data) {
          const Eight<V> w = weight.eight(col, n);
          UNSWAG_UNROLL
          for (int k = 0; k < 8; ++k) y.e[k] = y.e[k] * w.e[k];
        }
        store_values<E>(address<E>(a.y, first + at.row, col), a.y.dtype, y, n, wide);
      });
      g.sync();
    }
  }
};

// dx, and the sums of dy xhat over each block of math::RowTree, into scratch[block][cols].  E: the type of x, weight, dy and
// dx.
template <class E, class V, bool Cast>
struct Backward {
  static constexpr int threads = 256, resident = sizeof(V) == 8 ? 1 : std::is_same_v<E, Any> ? 2 : 4;
  struct Shared {
    RowSums<V> sums;
    V rstd[together], slope[together];
  };

  RmsNormBackward a;
  OffsetVector<E, V> weight;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    const math::RowTree tree{a.x.rows};
    for (std::int64_t b = g.block(); b < tree.blocks(); b += g.blocks()) {
      const std::int64_t begin = b * math::RowTree::block;
      const std::int64_t end = a.x.rows - begin < math::RowTree::block ? a.x.rows : begin + math::RowTree::block;
      double* sums = a.dw.data ? static_cast<double*>(a.scratch) + b * a.x.cols : nullptr;
      for (std::int64_t r = begin; r < end;) {
        const int count = end - r < together ? 1 : together;
        rows(g, shared, r, count, sums, r == begin);
        r += count;
      }
    }
  }

 private:
  // Rows first ... first + count - 1, whose part of dw is added up in V before it is added to sums (set, if `sets`).
  template <class Group>
  UNSWAG_HD void rows(const Group& g, Shared& shared, std::int64_t first, int count, double* sums, bool sets) const {
    const std::int64_t cols = a.x.cols;
    if (a.dx.data) {
      shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) {
        V gradient = load_one<V, E>(address<E>(a.dy, first + r, i), a.dy.dtype);
        if (weight.vector.data) gradient = gradient * weight.one(i);
        return math::fma(gradient, load_one<V, E>(address<E>(a.x, first + r, i), a.x.dtype), sum);
      });
    }
    share(g, count, [&](std::int64_t r) {
      const double rstd = get(a.rstd, first + r);
      shared.rstd[r] = V(rstd);
      shared.slope[r] = a.dx.data ? V(math::rms_norm_slope(shared.sums.total[r], cols, rstd)) : V(0);
    });
    g.sync();
    share(g, divided_up(cols, 8), [&](std::int64_t u) {
      const int n = columns_left(u, cols);
      Eight<V> w, dw;
      if (weight.vector.data) w = weight.eight(8 * u, n);
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) dw.e[k] = V(0);
      for (int r = 0; r < count; ++r) {
        const V rstd = shared.rstd[r], slope = shared.slope[r];
        const Eight<V> x = load_values<V, E>(address<E>(a.x, first + r, 8 * u), a.x.dtype, n, wide);
        const Eight<V> dy = load_values<V, E>(address<E>(a.dy, first + r, 8 * u), a.dy.dtype, n, wide);
        if (a.dx.data) {
          Eight<V> dx;
          UNSWAG_UNROLL
          for (int k = 0; k < 8; ++k) {
            dx.e[k] = math::rms_norm_dx(x.e[k], weight.vector.data ? dy.e[k] * w.e[k] : dy.e[k], rstd, slope);
          }
          store_values<E>(address<E>(a.dx, first + r, 8 * u), a.dx.dtype, dx, n, wide);
        }
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) dw.e[k] = math::fma(dy.e[k], xhat<E, Cast>(x.e[k], rstd, a.x.dtype), dw.e[k]);
      }
      if (!sums) return;
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k)
        if (k < n) sums[8 * u + k] = (sets ? 0. : sums[8 * u + k]) + double(dw.e[k]);
    });
    g.sync();
  }
};

template <class E, class V, bool Cast>
void forward(const RmsNormForward& a, Stream stream) {
  const Forward<E, V, Cast> kernel{a, {a.weight, a.weight_offset}, aligned_as_it_is(a.x) && aligned_as_it_is(a.y)};
  if (a.x.rows) launch(kernel, divided_up(a.x.rows, together), stream);
}

template <class E, class V, bool Cast>
void backward(const RmsNormBackward& a, Stream stream) {
  const math::RowTree tree{a.x.rows};
  const Backward<E, V, Cast> kernel{a,
                                    {a.weight, a.weight_offset},
                                    aligned_as_it_is(a.x) && aligned_as_it_is(a.dy) && (!a.dx.data || aligned_as_it_is(a.dx))};
  if (a.x.rows) launch(kernel, tree.blocks(), stream);
  if (a.dw.data) sum_blocks(static_cast<double*>(a.scratch), a.dw, tree, stream);
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a, Stream stream) {
  choose(a.x.dtype, a.y.dtype, {a.weight}, [&](auto e, auto v) {
    using E = decltype(e);
    using V = decltype(v);
    a.cast_before_weight ? forward<E, V, true>(a, stream) : forward<E, V, false>(a, stream);
  });
}

void rms_norm_backward(const RmsNormBackward& a, Stream stream) {
  choose(a.x.dtype, a.dy.dtype, {a.weight}, [&](auto e, auto v) {
    using E = decltype(e);
    using V = decltype(v);
    a.cast_before_weight ? backward<E, V, true>(a, stream) : backward<E, V, false>(a, stream);
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
