// RMSNorm by src/math/rms_norm.hpp: a block reads a few rows into shared memory and takes them from there twice, for their sums
// and for what is written.  Rows that are too long are read twice, four at a time; the second time they are near.
#include "backend.hpp"
#include "cuda/norm.hpp"
#include "math/rms_norm.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class X, bool Cast, class V>
UNSWAG_HD inline V xhat(V x, V rstd, DType dtype) {
  if constexpr (!Cast) {
    return x * rstd;
  } else {
    return with_type<X>(dtype, [&](auto zero) { return value<V>(element<decltype(zero)>(x * rstd)); });
  }
}

// T: Types.
template <class T, class V, bool Cast>
struct Forward {
  static constexpr int threads = 256, resident = sizeof(V) == 8 ? 1 : 4;
  struct Shared {
    RowSums<V> sums;
    V rstd[together];
  };
  using X = typename T::X;
  using Y = typename T::Y;

  RmsNormForward a;
  OffsetVector<typename T::W, V> weight;
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
      if (!a.rstd_given) {
        shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) {
          const V v = x.one(r, i);
          return math::fma(v, v, sum);
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
        Eight<V> y = x.eight(int(at.row), at.rest, n);
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) y.e[k] = xhat<X, Cast>(y.e[k], rstd, a.x.dtype);
        if (weight.vector.data) {
          const Eight<V> w = weight.eight(col, n);
          UNSWAG_UNROLL
          for (int k = 0; k < 8; ++k) y.e[k] = y.e[k] * w.e[k];
        }
        store_values<Y>(address<Y>(a.y, first + at.row, col), a.y.dtype, y, n, y_wide);
      });
      g.sync();
    }
  }
};

// dx, and the sums of dy xhat over each block of math::RowTree, into scratch[block][cols].
template <class T, class V, bool Cast>
struct Backward {
  static constexpr int threads = holds_rows<T, V> ? 512 : 256, resident = sizeof(V) == 8 ? 1 : 2;
  struct Shared {
    RowSums<V> sums;
    V rstd[together], slope[together];
  };
  using X = typename T::X;
  using Y = typename T::Y;

  RmsNormBackward a;
  OffsetVector<typename T::W, V> weight;
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
          rows_in_turn<Eight<V>>(g, count, held, per_row, find, columns, add);
        });
      }
    }
    GlobalRows<X, V> x{a.x, x_wide};
    GlobalRows<Y, V> dy{a.dy, dy_wide};
    walk(g, shared, x, dy, [&](int count, const auto& find, const auto& columns, const auto& add) {
      rows_at_once<Eight<V>>(g, count, per_row, find, columns, add);
    });
  }

 private:
  template <class Group, class In, class InDy, class Each>
  UNSWAG_HD void walk(const Group& g, Shared& shared, In& x, InDy& dy, const Each& each) const {
    const std::int64_t cols = a.x.cols;
    walk_tree(g, a.x.rows, [&](std::int64_t first, int count, std::int64_t block, bool sets) {
      each(
          count, [&](int r, int n) { find(g, shared, x, dy, first + r, n); },
          [&](int r, int n, std::int64_t u, Eight<V>& dw) { columns(shared, x, dy, first + r, n, u, dw); },
          [&](std::int64_t u, const Eight<V>& dw) {
            if (a.dw.data) add_columns(static_cast<double*>(a.scratch) + block * cols, u, cols, dw, sets);
          });
    });
  }

  // rstd and slope of `count` rows.
  template <class Group, class In, class InDy>
  UNSWAG_HD void find(const Group& g, Shared& shared, In& x, InDy& dy, std::int64_t first, int count) const {
    const std::int64_t cols = a.x.cols;
    x.read(g, first, count);
    dy.read(g, first, count);
    if (a.dx.data) {
      shared.sums.of(g, count, cols, [&](int r, std::int64_t i, V sum) {
        V gradient = dy.one(r, i);
        if (weight.vector.data) gradient = gradient * weight.one(i);
        return math::fma(gradient, x.one(r, i), sum);
      });
    }
    share(g, count, [&](std::int64_t r) {
      const double rstd = get(a.rstd, first + r);
      shared.rstd[r] = V(rstd);
      shared.slope[r] = a.dx.data ? V(math::rms_norm_slope(shared.sums.total[r], cols, rstd)) : V(0);
    });
    g.sync();
  }

  // dx of the columns from 8 u on; their part of dw.
  template <class In, class InDy>
  UNSWAG_HD void columns(const Shared& shared, const In& x, const InDy& dy, std::int64_t first, int count, std::int64_t u,
                         Eight<V>& dw) const {
    const int n = columns_left(u, a.x.cols);
    Eight<V> w;
    if (weight.vector.data) w = weight.eight(8 * u, n);
    for (int r = 0; r < count; ++r) {
      const V rstd = shared.rstd[r], slope = shared.slope[r];
      const Eight<V> of_x = x.eight(r, u, n), of_dy = dy.eight(r, u, n);
      if (a.dx.data) {
        Eight<V> dx;
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          const V gradient = weight.vector.data ? of_dy.e[k] * w.e[k] : of_dy.e[k];
          dx.e[k] = math::rms_norm_dx(of_x.e[k], gradient, rstd, slope);
        }
        store_values<X>(address<X>(a.dx, first + r, 8 * u), a.dx.dtype, dx, n, dx_wide);
      }
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) {
        dw.e[k] = math::fma(of_dy.e[k], xhat<X, Cast>(of_x.e[k], rstd, a.x.dtype), dw.e[k]);
      }
    }
  }
};

template <class T, class V, bool Cast>
void forward(const RmsNormForward& a, Stream stream) {
  const Held held = a.rstd_given ? Held{} : rows_held<T, V>({a.x});
  const Forward<T, V, Cast> kernel{a, {a.weight, a.weight_offset}, aligned_as_it_is(a.x), aligned_as_it_is(a.y), held.rows};
  if (a.x.rows) launch(kernel, divided_up(a.x.rows, held.rows ? held.rows : together), stream, held.threads, held.bytes);
}

template <class T, class V, bool Cast>
void backward(const RmsNormBackward& a, Stream stream) {
  const math::RowTree tree{a.x.rows};
  const Held held = a.dx.data ? rows_held<T, V>({a.x, a.dy}, Backward<T, V, Cast>::threads) : Held{};
  const Backward<T, V, Cast> kernel{
      a,        {a.weight, a.weight_offset}, aligned_as_it_is(a.x), aligned_as_it_is(a.dy), a.dx.data && aligned_as_it_is(a.dx),
      held.rows};
  if (a.x.rows) launch(kernel, tree.blocks(), stream, held.threads, held.bytes);
  if (a.dw.data) sum_blocks(static_cast<double*>(a.scratch), a.dw, tree, stream);
}

// Whether a cast of xhat to the type of x changes it.
template <class T>
constexpr bool casts = T::any || sizeof(typename T::X) == 2;

}  // namespace

void rms_norm_forward(const RmsNormForward& a, Stream stream) {
  choose(a.x.dtype, a.y.dtype, {a.weight}, [&](auto t, auto v) {
    using T = decltype(t);
    using V = decltype(v);
    if constexpr (casts<T>) {
      if (a.cast_before_weight) return forward<T, V, true>(a, stream);
    }
    forward<T, V, false>(a, stream);
  });
}

void rms_norm_backward(const RmsNormBackward& a, Stream stream) {
  choose(a.x.dtype, a.dy.dtype, {a.weight}, [&](auto t, auto v) {
    using T = decltype(t);
    using V = decltype(v);
    if constexpr (casts<T>) {
      if (a.cast_before_weight) return backward<T, V, true>(a, stream);
    }
    backward<T, V, false>(a, stream);
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
