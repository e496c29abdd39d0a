// What the norms share: rows of any type and vectors beside them, sums along up to four rows, sums over rows.
#pragma once

#include <initializer_list>

#include "cuda/eight.hpp"
#include "cuda/tree.hpp"
#include "math/row_tree.hpp"

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

// offset + vector
template <class E, class V>
struct OffsetVector {
  ConstVector vector;
  V offset;
  bool wide, as_it_is;

  OffsetVector(const ConstVector& v, double by)
      : vector(v),
        offset(V(by)),
        wide(reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0),
        as_it_is(by == 0 && v.dtype == (sizeof(V) == 8 ? DType::f64 : DType::f32)) {}

  UNSWAG_HD const char* at(std::int64_t i) const {
    return static_cast<const char*>(vector.data) + i * (std::is_same_v<E, Any> ? size_of(vector.dtype) : int(sizeof(E)));
  }
  UNSWAG_HD V one(std::int64_t i) const {
    const V v = load_one<V, E>(at(i), vector.dtype);
    return as_it_is ? v : offset + v;
  }
  UNSWAG_HD Eight<V> eight(std::int64_t i, int n) const {
    Eight<V> v = load_values<V, E>(at(i), vector.dtype, n, wide);
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) v.e[k] = as_it_is ? v.e[k] : offset + v.e[k];
    return v;
  }
};

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
      const auto length = [&](int k) { return tile_length(row_and_rest(first + k, per_row).rest, cols); };
      sum_tiles(g, tiles, n, length, [&](int k, int i, V sum) {
        const RowAndRest at = row_and_rest(first + k, per_row);
        return add(int(at.row), at.rest * tile_size + i, sum);
      });
      share(g, count, [&](std::int64_t r) {
        for (int k = 0; k < n; ++k)
          if (row_and_rest(first + k, per_row).row == r) total[r] += tiles.sum[k];
      });
    }
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
      const RowAndRest at = row_and_rest(u, cols);
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

// The sums over rows in math::RowTree from those of its blocks, blocks[tree.blocks()][to.size], behind which there is room for
// those of its groups.
inline void sum_blocks(double* blocks, const Vector& to, const math::RowTree& tree, Stream stream) {
  double* groups = blocks + tree.blocks() * to.size;
  sum_rows<double>({blocks, groups, tree.blocks(), tree.groups(), tree.group(), to.size}, stream);
  math::visit(to.dtype, [&](auto tag) {
    using To = compute_t<typename decltype(tag)::of>;  // float or double
    sum_rows<To>({groups, static_cast<To*>(to.data), tree.groups(), 1, tree.groups(), to.size}, stream);
  });
}

// f(E{}, V{}): what a kernel is made for.  Of one type is nearly every call.
template <class F>
void choose(DType x, DType other, std::initializer_list<ConstVector> vectors, const F& f) {
  bool same = other == x;
  for (const ConstVector& v : vectors) same = same && (!v.data || v.dtype == x);
  if (same) {
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

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
