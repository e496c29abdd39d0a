// What the norms share: vectors beside the rows, and sums over rows.
#pragma once

#include "cpu/elementwise.hpp"
#include "cpu/lanes.hpp"
#include "cpu/threads.hpp"
#include "math/row_tree.hpp"
#include "unswag/tensor.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// Where element i of `count` is in a row of float lanes for the steps O.
template <class O>
constexpr std::int64_t place(std::int64_t i, std::int64_t count) {
  return i < whole(count) ? i - i % O::step + O::lane(int(i % O::step)) : i;
}

// Per-row values are f32, or f64 when x is.
template <class X>
using row_scalar = typename lanes_t<X>::scalar;

template <std::size_t Bytes>
struct words {
  typedef std::uint32_t type __attribute__((vector_size(Bytes)));
};

// x rounded to T; for bf16, x as plain_nan leaves it.
template <class T, class V>
UNSWAG_INLINE V rounded(V x) {
  if constexpr (std::is_same_v<T, typename V::scalar>) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16> && requires { x.low; }) {
    return V(rounded<T>(x.low), rounded<T>(x.high));
  } else if constexpr (std::is_same_v<T, bf16> && requires { x.v; }) {
    using Floats = decltype(x.v);
    using Bits = typename words<sizeof(Floats)>::type;
    const Bits bits = __builtin_bit_cast(Bits, x.v);
    return V(__builtin_bit_cast(Floats, (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000));
  } else {
    T all[16];
    x.store(all);
    return V::load(all);
  }
}

// offset + vector as a row of S for the steps O: the caller's own memory where that is what it holds, else a converted copy,
// whose NaN are as plain_nan leaves them where O is Shuffled.
template <class V, class O>
class VectorAsRow {
  using S = typename V::scalar;
  static constexpr bool in_order = std::is_same_v<O, InOrder<V>>;

 public:
  VectorAsRow(const ConstVector& vector, double offset) : copy_(needs_copy(vector, offset) ? vector.size : 0) {
    if (!needs_copy(vector, offset)) {
      row_ = static_cast<const S*>(vector.data);
      return;
    }
    visit(vector.dtype, [&](auto tag) {
      using W = typename decltype(tag)::of;
      const W* w = static_cast<const W*>(vector.data);
      S* to = copy_.data();
      each_step<O, V>(vector.size, [&](auto how, std::int64_t i, std::int64_t n) {
        using How = decltype(how);
        if constexpr (std::is_same_v<How, InOrder<V>>) {
          V v = V(S(offset)) + load_lanes<V>(w + i, n);
          if constexpr (!in_order) v = select(v == v, v, V(S(NAN)));
          store_lanes(to + i, v, n);
        } else if constexpr (std::is_same_v<W, bf16>) {
          (typename How::Lanes(S(offset)) + how.load(w + i, n)).store(to + i);
        } else {
          for (int j = 0; j < How::step; j += 16) {
            S all[16];
            (V(S(offset)) + V::load(w + i + j)).store(all);
            for (int k = 0; k < 16; ++k) to[i + How::lane(j + k)] = plain_nan(all[k]);
          }
        }
      });
    });
    row_ = copy_.data();
  }
  // Whether there is a vector.
  explicit operator bool() const { return row_; }
  template <class How>
  UNSWAG_INLINE typename How::Lanes load(How, std::int64_t i, std::int64_t n) const {
    if constexpr (std::is_same_v<How, InOrder<V>>) {
      return load_lanes<V>(row_ + i, n);
    } else {
      return How::Lanes::load(row_ + i);
    }
  }

 private:
  static bool needs_copy(const ConstVector& vector, double offset) {
    return vector.data && (!in_order || offset != 0 || vector.dtype != (sizeof(S) == 8 ? DType::f64 : DType::f32));
  }
  Scratch<S> copy_;
  const S* row_;
};

// Whether rows are written past the cache, which takes whole lines.
template <class T>
bool streams(const Rows& y) {
  constexpr std::int64_t item = sizeof(T);
  return has_fast_loops && y.data && y.rows * y.cols * item > stream_above && y.stride * item % 64 == 0 &&
         aligned(static_cast<const T*>(y.data), 64 / item);
}

// One step of a row that is written past the cache or through it.
template <bool Streaming, class How, class T, class L>
UNSWAG_INLINE void write(How how, T* y, L x, std::int64_t n) {
  if (Streaming && has_fast_loops && n == How::step) {
    how.stream(y, x);
  } else {
    how.store(y, x, n);
  }
}

// Asks for a step of the row that comes next, while this one is written.
template <class T>
UNSWAG_INLINE void prefetch_step(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// kernel.row<Streaming>(r) for every row of y, whose elements are Y.
template <class Y, class Kernel>
void each_row(const Kernel& kernel, const Rows& y, int threads) {
  const bool streaming = streams<Y>(y);
  parallel_for(y.rows, 1 + 16384 / (y.cols + 1), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) streaming ? kernel.template row<true>(r) : kernel.template row<false>(r);
    if (streaming) stream_fence();
  });
}

// As many numbers as make whole lanes.
constexpr std::int64_t padded(std::int64_t cols) { return (cols + 15) / 16 * 16; }

// kernel.row(r, part, streaming) for rows [begin, end).  It adds to part[width], which is null without sums; four parts, one
// for four rows, make a block, and the blocks come together in sums[width].
template <class Kernel, class S>
void rows_of_tree(const Kernel& kernel, std::int64_t begin, std::int64_t end, bool streaming, std::int64_t width, S* part,
                  double* block, double* sums) {
  using math::RowTree;
  for (std::int64_t r = begin; r < end;) {
    const std::int64_t first = r, last = end - r < RowTree::block ? end : r + RowTree::block;
    while (r < last) {
      const std::int64_t start = r, stop = last - r < RowTree::together ? r + 1 : r + RowTree::together;
      if (sums) memset(part, 0, std::size_t(width) * sizeof(S));
      for (; r < stop; ++r) kernel.row(r, sums ? part : nullptr, streaming);
      if (!sums) continue;
      if (start == first) {
        for (std::int64_t i = 0; i < width; ++i) block[i] = 0. + double(part[i]);
      } else {
        for (std::int64_t i = 0; i < width; ++i) block[i] += double(part[i]);
      }
    }
    if (!sums) continue;
    if (first == begin) {
      for (std::int64_t i = 0; i < width; ++i) sums[i] = 0. + block[i];
    } else {
      for (std::int64_t i = 0; i < width; ++i) sums[i] += block[i];
    }
  }
  if (streaming) stream_fence();
}

// The same for all rows, which adds up `vectors` vectors of `cols` sums in math::RowTree; put(vector, column, sum) takes each.
// Vector v begins at part + v * padded(cols).
template <class Kernel, class Put>
void over_rows(const Kernel& kernel, std::int64_t rows, std::int64_t cols, bool streaming, int vectors, int threads,
               const Put& put) {
  using S = typename Kernel::V::scalar;
  if (vectors == 0) {
    parallel_for(rows, 4 * (1 + 4096 / (cols + 1)), threads, [&](std::int64_t begin, std::int64_t end) {
      rows_of_tree<Kernel, S>(kernel, begin, end, streaming, 0, nullptr, nullptr, nullptr);
    });
    return;
  }
  const std::int64_t width = vectors * padded(cols);
  const math::RowTree tree{rows};
  const std::int64_t group = tree.group() * math::RowTree::block;  // rows
  const Scratch<double> sums(tree.groups() * width);
  parallel_for(rows, group, threads, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<S> part(width);
    const Scratch<double> block(width);
    rows_of_tree(kernel, begin, end, streaming, width, part.data(), block.data(), sums.data() + begin / group * width);
  });
  for (int v = 0; v < vectors; ++v) {
    for (std::int64_t i = 0; i < cols; ++i) {
      const std::int64_t at = v * padded(cols) + place<typename Kernel::O>(i, cols);
      double sum = 0;
      for (std::int64_t g = 0; g < tree.groups(); ++g) sum += sums.data()[g * width + at];
      put(v, i, sum);
    }
  }
}

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
