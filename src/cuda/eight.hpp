// Eight elements at a time: sixteen-byte accesses where memory is aligned, conversions between what is stored and what is
// computed in.
#pragma once

#include <type_traits>

#include "cuda/launch.hpp"
#include "math/scalar.hpp"

namespace unswag::UNSWAG_ISA_NS {

// What elements of X, and of Y beside them, are computed in: double as soon as one of them is.
template <class... T>
using compute_t = std::conditional_t<(std::is_same_v<T, double> || ...), double, float>;

template <class V, class T>
UNSWAG_HD inline V value(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return V(x);
  } else {
    return V(math::to_float(x));
  }
}
// Rounded once, to nearest even.
template <class T, class V>
UNSWAG_HD inline T element(V x) {
  if constexpr (std::is_same_v<T, double>) {
    return double(x);
  } else if constexpr (std::is_same_v<V, double> && sizeof(T) == 2) {
    return math::from_float<T>(math::to_odd(x));
  } else {
    return math::from_float<T>(float(x));
  }
}

template <class T>
struct Eight {
  T e[8];
};

struct __attribute__((aligned(16), may_alias)) Sixteen {
  std::uint32_t word[4];
};

// n <= 8 elements; the others are 0.  wide: p is a multiple of 16 bytes.
template <class T>
UNSWAG_HD inline Eight<T> load_eight(const T* p, int n, bool wide) {
  Eight<T> x;
  if (wide && n == 8) {
    constexpr int parts = int(sizeof x / sizeof(Sixteen));
    Sixteen part[parts];
    UNSWAG_UNROLL
    for (int k = 0; k < parts; ++k) part[k] = reinterpret_cast<const Sixteen*>(p)[k];
    memcpy(&x, part, sizeof x);
  } else {
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) x.e[k] = k < n ? p[k] : T{};
  }
  return x;
}
template <class T>
UNSWAG_HD inline void store_eight(T* p, const Eight<T>& x, int n, bool wide) {
  if (wide && n == 8) {
    constexpr int parts = int(sizeof x / sizeof(Sixteen));
    Sixteen part[parts];
    memcpy(part, &x, sizeof x);
    UNSWAG_UNROLL
    for (int k = 0; k < parts; ++k) reinterpret_cast<Sixteen*>(p)[k] = part[k];
  } else {
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k)
      if (k < n) p[k] = x.e[k];
  }
}

template <class V, class T>
UNSWAG_HD inline Eight<V> values(const Eight<T>& x) {
  Eight<V> v;
  UNSWAG_UNROLL
  for (int k = 0; k < 8; ++k) v.e[k] = value<V>(x.e[k]);
  return v;
}

UNSWAG_HD constexpr std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Row r of a tensor.
template <class T, class Void>
UNSWAG_HD inline auto row_of(const RowsOf<Void>& a, std::int64_t r) {
  using Pointer = std::conditional_t<std::is_const_v<Void>, const T*, T*>;
  return static_cast<Pointer>(a.data) + r * a.stride;
}

// Whether every row begins at a multiple of 16 bytes.
template <class T, class Void>
bool aligned(const RowsOf<Void>& a) {
  return reinterpret_cast<std::uintptr_t>(a.data) % 16 == 0 && (a.rows == 1 || a.stride * std::int64_t(sizeof(T)) % 16 == 0);
}

// u = row * per_row + rest, 0 <= rest < per_row.
struct RowAndRest {
  std::int64_t row, rest;
};
UNSWAG_HD inline RowAndRest row_and_rest(std::int64_t u, std::int64_t per_row) {
  if (u < per_row) return {0, u};
  if (((u | per_row) >> 32) == 0) {  // a 64-bit division takes a hundred instructions
    const std::uint32_t row = std::uint32_t(u) / std::uint32_t(per_row);
    return {row, std::int64_t(std::uint32_t(u) - row * std::uint32_t(per_row))};
  }
  return {u / per_row, u % per_row};
}

// The columns 8 u ... of a row of `cols`.
UNSWAG_HD inline int columns_left(std::int64_t u, std::int64_t cols) {
  const std::int64_t left = cols - 8 * u;
  return left >= 8 ? 8 : left > 0 ? int(left) : 0;
}

// Calls each(row, col, n) for this worker's share, over all blocks, of `rows` rows cut into `per_row` eights: n <= 8 columns
// from col on, none past `cols`.
template <class Group, class Each>
UNSWAG_HD inline void share_eights(const Group& g, std::int64_t rows, std::int64_t per_row, std::int64_t cols,
                                   const Each& each) {
  share_grid(g, rows * per_row, [&](std::int64_t u) {
    const RowAndRest at = row_and_rest(u, per_row);
    each(at.row, 8 * at.rest, columns_left(at.rest, cols));
  });
}

// Queues the kernel with a worker for each of `units`, or with fewer, which then do the work of several.
template <class Kernel>
void launch_for(const Kernel& kernel, std::int64_t units, Stream stream) {
  if (units) launch(kernel, divided_up(units, Kernel::threads), stream);
}

}  // namespace unswag::UNSWAG_ISA_NS
