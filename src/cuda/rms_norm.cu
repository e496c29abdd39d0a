// RMSNorm by src/math/rms_norm.hpp: a block takes four rows at a time, once for their sums and once for what is written; the
// second time they are near.
#include "backend.hpp"
#include "cuda/eight.hpp"
#include "cuda/tree.hpp"
#include "math/rms_norm.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

constexpr int together = int(math::RowTree::together);

// Elements of type T, or of any type that is known at run time only.
struct Any {};

UNSWAG_HD inline int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// f(T{}) with the T of E.
template <class E, class F>
UNSWAG_HD inline auto with_type(DType dtype, const F& f) {
  if constexpr (std::is_same_v<E, Any>) {
    switch (dtype) {
      case DType::f16: return f(f16{});
      case DType::bf16: return f(bf16{});
      case DType::f64: return f(double{});
      default: return f(float{});
    }
  } else {
    return f(E{});
  }
}

template <class E, class Void>
UNSWAG_HD inline auto address(const RowsOf<Void>& a, std::int64_t row, std::int64_t col) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return static_cast<Byte*>(a.data) + (row * a.stride + col) * (std::is_same_v<E, Any> ? size_of(a.dtype) : int(sizeof(E)));
}
template <class V, class E>
UNSWAG_HD inline V load_one(const char* p, DType dtype) {
  return with_type<E>(dtype, [&](auto zero) { return value<V>(*reinterpret_cast<const decltype(zero)*>(p)); });
}
template <class V, class E>
UNSWAG_HD inline Eight<V> load_values(const char* p, DType dtype, int n, bool wide) {
  return with_type<E>(dtype,
                      [&](auto zero) { return values<V>(load_eight(reinterpret_cast<const decltype(zero)*>(p), n, wide)); });
}
template <class E, class V>
UNSWAG_HD inline void store_values(char* p, DType dtype, const Eight<V>& x, int n, bool wide) {
  with_type<E>(dtype, [&](auto zero) {
    Eight<decltype(zero)> y;
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) y.e[k] = element<decltype(zero)>(x.e[k]);
    store_eight(reinterpret_cast<decltype(zero)*>(p), y, n, wide);
  });
}

// rstd: float, or double beside double x.
UNSWAG_HD inline double get(const ConstVector& v, std::int64_t i) {
  return v.dtype == DType::f64 ? static_cast<const double*>(v.data)[i] : double(static_cast<const float*>(v.data)[i]);
}
UNSWAG_HD inline void put(const Vector& v, std::int64_t i, double x) {
  if (v.dtype == DType::f64) {
    static_cast<double*>(v.data)[i] = x;
  } else {
    static_cast<float*>(v.data)[i] = float(x);
  }
}

// w'
template <class E, class V>
struct Weight {
  ConstVector w;
  V offset;
  bool wide, as_it_is;

  Weight(const ConstVector& weight, double weight_offset)
      : w(weight),
        offset(V(weight_offset)),
        wide(reinterpret_cast<std::uintptr_t>(weight.data) % 16 == 0),
        as_it_is(weight_offset == 0 && weight.dtype == (sizeof(V) == 8 ? DType::f64 : DType::f32)) {}

  UNSWAG_HD const char* at(std::int64_t i) const {
    return static_cast<const char*>(w.data) + i * (std::is_same_v<E, Any> ? size_of(w.dtype) : int(sizeof(E)));
  }
  UNSWAG_HD V one(std::int64_t i) const {
    const V v = load_one<V, E>(at(i), w.dtype);
    return as_it_is ? v : offset + v;
  }
  UNSWAG_HD Eight<V> eight(std::int64_t i, int n) const {
    Eight<V> v = load_values<V, E>(at(i), w.dtype, n, wide);
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) v.e[k] = as_it_is ? v.e[k] : offset + v.e[k];
    return v;
  }
};

template <class E, bool Cast, class V>
UNSWAG_HD inline V xhat(V x, V rstd, DType dtype) {
  if constexpr (!Cast) {
    return x * rstd;
  } else {
    return with_type<E>(dtype, [&](auto zero) { return value<V>(element<decltype(zero)>(x * rstd)); });
  }
}

// Sums along up to four rows at once.
template <class V>
struct RowSums {
  Tiles<V> tiles;
  double total[together];

  // total[r] = the sum over row r < count: sum = add(r, column, sum).  Every worker calls it, and may read total until it calls
  // it again.
  template <class Group, class Add>
  UNSWAG_HD void of(const Group& g, int count, std::int64_t cols, const Add& add) {
    const std::int64_t per_row = divided_up(cols, tile_size), all = count * per_row;
    g.sync();
    share(g, count, [&](std::int64_t r) { total[r] = 0; });
    for (std::int64_t first = 0; first < all; first += items) {
      const int n = int(all - first < items ? all - first : items);
      const auto length = [&](int k) { return tile_length(place(first + k, per_row).rest, cols); };
      sum_tiles(g, tiles, n, length, [&](int k, int i, V sum) {
        const Place at = place(first + k, per_row);
        return add(int(at.row), at.rest * tile_size + i, sum);
      });
      share(g, count, [&](std::int64_t r) {
        for (int k = 0; k < n; ++k)
          if (place(first + k, per_row).row == r) total[r] += tiles.sum[k];
      });
    }
    g.sync();
  }
};

// E: the type of x, weight and y, or Any.
template <class E, class V, bool Cast>
struct Forward {
  static constexpr int threads = 256, resident = sizeof(V) == 8 ? 1 : 4;
  struct Shared {
    RowSums<V> sums;
    V rstd[together];
  };

  RmsNormForward a;
  Weight<E, V> weight;
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
        const Place at = place(u, per_row);
        const std::int64_t col = 8 * at.rest;
        const int n = columns_left(at.rest, cols);
        const V rstd = shared.rstd[at.row];
        Eight<V> y = load_values<V, E>(address<E>(a.x, first + at.row, col), a.x.dtype, n, wide);
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) y.e[k] = xhat<E, Cast>(y.e[k], rstd, a.x.dtype);
        if (weight.w.data) {
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
  Weight<E, V> weight;
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
        if (weight.w.data) gradient = gradient * weight.one(i);
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
      if (weight.w.data) w = weight.eight(8 * u, n);
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
            dx.e[k] = math::rms_norm_dx(x.e[k], weight.w.data ? dy.e[k] * w.e[k] : dy.e[k], rstd, slope);
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

// to[part][col] = from[part * per_part][col] + from[part * per_part + 1][col] + ..., for `parts` parts of `count` rows in all.
template <class To>
struct SumOfRows {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;

  const double* from;
  To* to;
  std::int64_t count, parts, per_part, cols;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_grid(g, parts * cols, [&](std::int64_t u) {
      const Place at = place(u, cols);
      const std::int64_t begin = at.row * per_part, end = begin + per_part < count ? begin + per_part : count;
      double sum = 0;
#ifdef __CUDACC__
#pragma unroll 8
#endif
      for (std::int64_t r = begin; r < end; ++r) sum += from[r * cols + at.rest];
      to[u] = To(sum);
    });
  }
};

template <class To>
void sum_rows(const SumOfRows<To>& kernel, Stream stream) {
  launch_for(kernel, kernel.parts * kernel.cols, stream);
}

// f(E{}, V{}): what a kernel is made for.  Of one type is nearly every call.
template <class F>
void choose(DType x, DType other, const ConstVector& weight, const F& f) {
  if (other == x && (!weight.data || weight.dtype == x)) {
    math::visit(x, [&](auto tag) {
      using T = typename decltype(tag)::of;
      f(T{}, compute_t<T>{});
    });
  } else if (x == DType::f64 || other == DType::f64) {
    f(Any{}, double{});
  } else {
    f(Any{}, float{});
  }
}

template <class Void>
bool aligned_as_it_is(const RowsOf<Void>& a) {
  bool is = false;
  math::visit(a.dtype, [&](auto tag) { is = aligned<typename decltype(tag)::of>(a); });
  return is;
}

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
  if (!a.dw.data) return;
  auto* blocks = static_cast<double*>(a.scratch);
  double* groups = blocks + tree.blocks() * a.x.cols;
  sum_rows<double>({blocks, groups, tree.blocks(), tree.groups(), tree.group(), a.x.cols}, stream);
  math::visit(a.dw.dtype, [&](auto tag) {
    using To = compute_t<typename decltype(tag)::of>;  // float or double
    sum_rows<To>({groups, static_cast<To*>(a.dw.data), tree.groups(), 1, tree.groups(), a.x.cols}, stream);
  });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a, Stream stream) {
  choose(a.x.dtype, a.y.dtype, a.weight, [&](auto e, auto v) {
    using E = decltype(e);
    using V = decltype(v);
    a.cast_before_weight ? forward<E, V, true>(a, stream) : forward<E, V, false>(a, stream);
  });
}

void rms_norm_backward(const RmsNormBackward& a, Stream stream) {
  choose(a.x.dtype, a.dy.dtype, a.weight, [&](auto e, auto v) {
    using E = decltype(e);
    using V = decltype(v);
    a.cast_before_weight ? backward<E, V, true>(a, stream) : backward<E, V, false>(a, stream);
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
