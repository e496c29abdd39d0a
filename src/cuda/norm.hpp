// What the norms share: rows of any type and vectors beside them, rows in shared memory, sums along up to four rows, sums over
// rows.
#pragma once

#include <initializer_list>

#include "cuda/eight.hpp"
#include "cuda/tree.hpp"
#include "math/row_tree.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

constexpr int together = int(math::RowTree::together);
constexpr std::int64_t row_memory = 44 << 10;  // for rows in shared memory: of 48 KiB, beside what else a block shares

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

// The types of x and dx, of weight and bias, of y and dy.
template <class X_, class W_, class Y_>
struct Types {
  using X = X_;
  using W = W_;
  using Y = Y_;
  static constexpr bool any = std::is_same_v<X, Any>;
};

// Where a kernel finds a tensor's rows: after read(g, first, count) and a g.sync(), element i and eight u of row first + r.
// They are read again each time,
template <class E, class V>
struct GlobalRows {
  ConstRows rows;
  bool wide;
  std::int64_t first = 0;

  template <class Group>
  UNSWAG_HD void read(const Group&, std::int64_t from, int) {
    first = from;
  }
  UNSWAG_HD V one(int r, std::int64_t i) const { return load_one<V, E>(address<E>(rows, first + r, i), rows.dtype); }
  UNSWAG_HD Eight<V> eight(int r, std::int64_t u, int n) const {
    return load_values<V, E>(address<E>(rows, first + r, 8 * u), rows.dtype, n, wide);
  }
};
// or once, into `memory` that the block shares: as they are stored, each row from a multiple of sixteen bytes on.
template <class E, class V>
struct SharedRows {
  ConstRows rows;
  bool wide;
  E* memory;

  UNSWAG_HD std::int64_t eights() const { return divided_up(rows.cols, 8); }
  template <class Group>
  UNSWAG_HD void read(const Group& g, std::int64_t first, int count) const {
    const std::int64_t per_row = eights();
    share(g, count * per_row, [&](std::int64_t u) {
      const RowAndRest at = row_and_rest(u, per_row);
      const E* from = row_of<E>(rows, first + at.row) + 8 * at.rest;
      store_eight(memory + 8 * u, load_eight(from, columns_left(at.rest, rows.cols), wide), 8, true);
    });
  }
  UNSWAG_HD V one(int r, std::int64_t i) const { return value<V>(memory[8 * eights() * r + i]); }
  UNSWAG_HD Eight<V> eight(int r, std::int64_t u, int) const {
    return values<V>(load_eight(memory + 8 * (eights() * r + u), 8, true));
  }
};

// Where rows may lie in shared memory.
template <class T, class V>
constexpr bool holds_rows = !T::any && sizeof(V) == 4;

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

// A backward over the rows of a block of math::RowTree, four or one at a time: rows(first, count, block, whether they are the
// block's first).
template <class Group, class Rows>
UNSWAG_HD inline void walk_tree(const Group& g, std::int64_t count, const Rows& rows) {
  const math::RowTree tree{count};
  for (std::int64_t b = g.block(); b < tree.blocks(); b += g.blocks()) {
    const std::int64_t begin = b * math::RowTree::block;
    const std::int64_t end = count - begin < math::RowTree::block ? count : begin + math::RowTree::block;
    for (std::int64_t r = begin; r < end;) {
      const int now = end - r < together ? 1 : together;
      rows(r, now, b, r == begin);
      r += now;
    }
  }
}
// `count` rows of `per_row` eights: find(r, n) makes what rows r ... r + n - 1 have in common, columns(r, n, u, part) takes
// their eight u and adds to what add(u, part) then adds to the sums over rows.  All rows at once,
template <class Part, class Group, class Find, class Columns, class Add>
UNSWAG_HD inline void rows_at_once(const Group& g, int count, std::int64_t per_row, const Find& find, const Columns& columns,
                                   const Add& add) {
  find(0, count);
  share(g, per_row, [&](std::int64_t u) {
    Part part{};
    columns(0, count, u, part);
    add(u, part);
  });
  g.sync();
}
// or `held` of them at a time, by no fewer workers than a row has eights: each holds the part of its own meanwhile.
template <class Part, class Group, class Find, class Columns, class Add>
UNSWAG_HD inline void rows_in_turn(const Group& g, int count, int held, std::int64_t per_row, const Find& find,
                                   const Columns& columns, const Add& add) {
  const std::int64_t u = g.rank();
  Part part{};
  for (int r = 0; r < count; r += held) {
    const int now = count - r < held ? count - r : held;
    find(r, now);
    if (u < per_row) columns(r, now, u, part);
    g.sync();
  }
  if (u < per_row) add(u, part);
}

// Where a block of math::RowTree has the sum of column 8 u + k among `cols` of them: the workers of a warp, who each have an
// eight, write side by side.
UNSWAG_HD inline std::int64_t place(std::int64_t u, int k, std::int64_t cols) {
  const std::int64_t longer = cols % 8;  // the first k have a column more
  return k * (cols / 8) + (k < longer ? k : longer) + u;
}
// sums += part, of the columns from 8 u on; or sums = part.
template <class V>
UNSWAG_HD inline void add_columns(double* sums, std::int64_t u, std::int64_t cols, const Eight<V>& part, bool sets) {
  const int n = columns_left(u, cols);
  UNSWAG_UNROLL
  for (int k = 0; k < 8; ++k) {
    if (k >= n) continue;
    double& sum = sums[place(u, k, cols)];
    sum = (sets ? 0. : sum) + double(part.e[k]);
  }
}

// to[part][col] = from[part * per_part][col] + from[part * per_part + 1][col] + ..., for `parts` parts of `count` rows in all;
// of `placed` columns, which to has in their order.
template <class To>
struct SumOfRows {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;

  const double* from;
  To* to;
  std::int64_t count, parts, per_part, cols;
  bool placed;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_grid(g, parts * cols, [&](std::int64_t u) {
      const RowAndRest at = row_and_rest(u, cols);
      const std::int64_t col = placed ? place(at.rest / 8, int(at.rest % 8), cols) : at.rest;
      const std::int64_t begin = at.row * per_part, end = begin + per_part < count ? begin + per_part : count;
      double sum = 0;
#ifdef __CUDACC__
#pragma unroll 8
#endif
      for (std::int64_t r = begin; r < end; ++r) sum += from[r * cols + col];
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
  sum_rows<double>({blocks, groups, tree.blocks(), tree.groups(), tree.group(), to.size, false}, stream);
  math::visit(to.dtype, [&](auto tag) {
    using To = compute_t<typename decltype(tag)::of>;  // float or double
    sum_rows<To>({groups, static_cast<To*>(to.data), tree.groups(), 1, tree.groups(), to.size, true}, stream);
  });
}

// f(Types{}, V{}): what a kernel is made for.  Nearly every call has one type, or 16-bit rows beside float32 weights; y is then
// of either.
template <class F>
void choose(DType x, DType y, std::initializer_list<ConstVector> vectors, const F& f) {
  const auto are = [&](DType dtype) {
    for (const ConstVector& v : vectors)
      if (v.data && v.dtype != dtype) return false;
    return true;
  };
  math::visit(x, [&](auto tag) {
    using T = typename decltype(tag)::of;
    using V = compute_t<T>;
    if (y == x && are(x)) return f(Types<T, T, T>{}, V{});
    if constexpr (sizeof(T) == 2) {
      if (y == x && are(DType::f32)) return f(Types<T, float, T>{}, V{});
      if (y == DType::f32 && are(DType::f32)) return f(Types<T, float, float>{}, V{});
    }
    x == DType::f64 || y == DType::f64 ? f(Types<Any, Any, Any>{}, double{}) : f(Types<Any, Any, Any>{}, float{});
  });
}

// How a norm is launched: `threads` workers in a block, which holds `rows` rows of each of the tensors in shared memory at a
// time, in `bytes`; 0: none, they are too long.  Two or four rows wait together where they leave room for three blocks.
struct Held {
  int rows = 0, threads = 256;
  std::int64_t bytes = 0;
};
template <class T, class V>
Held rows_held(std::initializer_list<ConstRows> tensors) {
  std::int64_t bytes = 0;
  for (const ConstRows& rows : tensors) bytes += 8 * divided_up(rows.cols, 8) * size_of(rows.dtype);
  if (!holds_rows<T, V> || bytes > row_memory) return {};
  int rows = together;
  while (rows > 1 && rows * bytes > row_memory / 3) rows /= 2;
  return {rows, 256, rows * bytes};
}
// The same for a backward with at most `threads` workers, one for each eight of a row.
template <class T, class V>
Held rows_held(std::initializer_list<ConstRows> tensors, int threads) {
  const std::int64_t workers = 32 * divided_up(tensors.begin()->cols, 256);
  Held held = workers > threads ? Held{} : rows_held<T, V>(tensors);
  if (held.rows && workers > held.threads) held.threads = int(workers);
  return held;
}

template <class Void>
bool aligned_as_it_is(const RowsOf<Void>& a) {
  bool is = false;
  math::visit(a.dtype, [&](auto tag) { is = aligned<typename decltype(tag)::of>(a); });
  return is;
}

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
