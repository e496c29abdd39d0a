// Non-zeros: a bit per element, and those elements of a row side by side whose bits are not all 0.  Rows are shared among
// threads; a row's values begin where its offset says.
#include "backend.hpp"
#include "cpu/elementwise.hpp"
#include "cpu/simd/compact.hpp"
#include "math/masks.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// body(row) for every row.
template <class Body>
UNSWAG_INLINE void each_row(std::int64_t rows, std::int64_t cols, int threads, const Body& body) {
  parallel_for(rows, cols >= Spans::length ? 1 : Spans::length / cols, threads,
               [&](std::int64_t begin, std::int64_t end) __attribute__((always_inline)) {
                 for (std::int64_t r = begin; r < end; ++r) body(r);
               });
}

// Which of 32 elements are kept.
template <class I>
UNSWAG_INLINE std::uint32_t set_bits(const typename I::scalar* x) {
  return (I::load(x) != I(0)).bits();
}

// body(i, x + i) for every 32 elements of a row; the last are filled up with zeros.
template <class S, class Body>
UNSWAG_INLINE void each_32(const S* x, std::int64_t cols, const Body& body) {
  std::int64_t i = 0;
  for (; i + 32 <= cols; i += 32) body(i, x + i);
  if (i < cols) {
    S rest[32] = {};
    memcpy(rest, x + i, std::size_t(cols - i) * sizeof(S));
    body(i, rest);
  }
}

template <class T>
void count(const NonzeroCount& args, Stream stream) {
  using I = ints32_t<T>;
  const std::int64_t cols = args.x.cols;
  each_row(args.x.rows, cols, stream.threads, [&](std::int64_t r) __attribute__((always_inline)) {
    const auto* x = static_cast<const typename I::scalar*>(args.x.data) + r * args.x.stride;
    std::int64_t sum = 0;
    each_32(x, cols,
            [&](std::int64_t, const auto* p) __attribute__((always_inline)) { sum += __builtin_popcount(set_bits<I>(p)); });
    args.counts[r] = sum;
  });
}

// A stretch of values with an end past which nothing is read or written: where offsets and bits do not belong together, values
// are lost, and what is read instead is NaN.
template <class S>
struct Values {
  S* next;
  S* end;
};

// The elements of x[0], ..., x[31] that `bits` names.
template <class S>
UNSWAG_INLINE void append(Values<S>& values, const S* x, std::uint32_t bits) {
  const std::int64_t count = __builtin_popcount(bits), room = values.end - values.next;
  if (room >= 32) [[likely]] {
    move_together(values.next, x, bits);
    values.next += count;
  } else {
    S all[32];
    move_together(all, x, bits);
    const std::int64_t kept = count < room ? count : room;
    memcpy(values.next, all, std::size_t(kept) * sizeof(S));
    values.next += kept;
  }
}

// Thirty-two elements: those that `bits` names, in their places.
template <class S>
UNSWAG_INLINE auto take(Values<const S>& values, std::uint32_t bits) {
  const std::int64_t count = __builtin_popcount(bits), there = values.end - values.next;
  const S* from = values.next;
  S all[32];
  if (there < 32) [[unlikely]] {
    memset(all, 0xff, sizeof all);
    memcpy(all, from, std::size_t(there) * sizeof(S));
    from = all;
  }
  values.next += count < there ? count : there;
  return move_apart(from, bits);
}

template <class T>
void encode(const NonzeroEncode& args, Stream stream) {
  using I = ints32_t<T>;
  using S = typename I::scalar;
  const std::int64_t cols = args.x.cols;
  each_row(args.x.rows, cols, stream.threads, [&](std::int64_t r) __attribute__((always_inline)) {
    const S* x = static_cast<const S*>(args.x.data) + r * args.x.stride;
    std::uint8_t* bitmap = args.bitmap.data + r * args.bitmap.stride;
    S* const all = static_cast<S*>(args.values.data);
    Values<S> values{all + args.offsets[r], all + args.offsets[r + 1]};
    each_32(x, cols, [&](std::int64_t i, const S* p) __attribute__((always_inline)) {
      const std::uint32_t bits = set_bits<I>(p);
      memcpy(bitmap + i / 8, &bits, 4);
      append(values, p, bits);
    });
  });
}

template <class T>
void decode(const NonzeroDecode& args, Stream stream) {
  using S = typename ints32_t<T>::scalar;
  const std::int64_t cols = args.x.cols;
  const bool large = args.x.rows * cols * std::int64_t(sizeof(T)) > stream_above;
  each_row(args.x.rows, cols, stream.threads, [&](std::int64_t r) __attribute__((always_inline)) {
    S* x = static_cast<S*>(args.x.data) + r * args.x.stride;
    const std::uint8_t* bitmap = args.bitmap.data + r * args.bitmap.stride;
    const S* const all = static_cast<const S*>(args.values.data);
    Values<const S> values{all + args.offsets[r], all + args.offsets[r + 1]};
    const auto next = [&](std::int64_t i) __attribute__((always_inline)) {
      std::uint32_t bits;
      memcpy(&bits, bitmap + i / 8, 4);
      return take(values, bits);
    };
    std::int64_t i = 0;
    if (large && aligned(x, 32)) {
      for (; i + 32 <= cols; i += 32) next(i).stream(x + i);
      stream_fence();
    }
    for (; i + 32 <= cols; i += 32) next(i).store(x + i);
    if (i < cols) {
      S rest[32];
      next(i).store(rest);
      memcpy(x + i, rest, std::size_t(cols - i) * sizeof(S));
    }
  });
}

}  // namespace

void nonzero_count(const NonzeroCount& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) { count<T>(args, stream); });
}

void nonzero_encode(const NonzeroEncode& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) { encode<T>(args, stream); });
}

void nonzero_decode(const NonzeroDecode& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) { decode<T>(args, stream); });
}

}  // namespace unswag::UNSWAG_ISA_NS
