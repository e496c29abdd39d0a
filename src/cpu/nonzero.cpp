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

// The bits of 32 elements, or of the last n.
template <class I>
UNSWAG_INLINE std::uint32_t set_bits(const typename I::scalar* x) {
  return (I::load(x) != I(0)).bits();
}
template <class I>
UNSWAG_INLINE std::uint32_t set_bits(const typename I::scalar* x, std::int64_t n) {
  typename I::scalar rest[32] = {};
  memcpy(rest, x, std::size_t(n) * sizeof *x);
  return set_bits<I>(rest);
}

template <class T>
void count(const NonzeroCount& args, Stream stream) {
  using I = ints32_t<T>;
  const std::int64_t cols = args.x.cols;
  each_row(args.x.rows, cols, stream.threads, [&](std::int64_t r) __attribute__((always_inline)) {
    const auto* x = static_cast<const typename I::scalar*>(args.x.data) + r * args.x.stride;
    std::int64_t sum = 0, i = 0;
    for (; i + 32 <= cols; i += 32) sum += __builtin_popcount(set_bits<I>(x + i));
    if (i < cols) sum += __builtin_popcount(set_bits<I>(x + i, cols - i));
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

// The elements of x[0] ... that `bits` names.
template <class S>
UNSWAG_INLINE void append(Values<S>& values, const S* x, std::uint32_t bits, std::int64_t n) {
  constexpr int step = moved<S>;
  for (std::int64_t i = 0; i < n; i += step) {
    const std::uint32_t mask = bits >> i & ((1u << step) - 1);
    if (i + step <= n && values.end - values.next >= step) {
      move_together(values.next, x + i, mask);
      values.next += __builtin_popcount(mask);
    } else {
      for (std::int64_t k = i; k < n && k < i + step; ++k)
        if ((bits >> k & 1) && values.next < values.end) *values.next++ = x[k];
    }
  }
}

template <class S>
UNSWAG_INLINE void take(Values<const S>& values, S* x, std::uint32_t bits, std::int64_t n) {
  constexpr int step = moved<S>;
  for (std::int64_t i = 0; i < n; i += step) {
    const std::uint32_t mask = bits >> i & ((1u << step) - 1);
    if (i + step <= n && values.end - values.next >= step) {
      move_apart(x + i, values.next, mask);
      values.next += __builtin_popcount(mask);
    } else {
      for (std::int64_t k = i; k < n && k < i + step; ++k) {
        x[k] = 0;
        if (bits >> k & 1) x[k] = values.next < values.end ? *values.next++ : S(-1);
      }
    }
  }
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
    std::int64_t i = 0;
    for (; i + 32 <= cols; i += 32) {
      const std::uint32_t bits = set_bits<I>(x + i);
      memcpy(bitmap + i / 8, &bits, 4);
      append(values, x + i, bits, 32);
    }
    if (i < cols) {
      const std::uint32_t bits = set_bits<I>(x + i, cols - i);
      memcpy(bitmap + i / 8, &bits, 4);
      append(values, x + i, bits, cols - i);
    }
  });
}

template <class T>
void decode(const NonzeroDecode& args, Stream stream) {
  using S = typename ints32_t<T>::scalar;
  const std::int64_t cols = args.x.cols;
  each_row(args.x.rows, cols, stream.threads, [&](std::int64_t r) __attribute__((always_inline)) {
    S* x = static_cast<S*>(args.x.data) + r * args.x.stride;
    const std::uint8_t* bitmap = args.bitmap.data + r * args.bitmap.stride;
    const S* const all = static_cast<const S*>(args.values.data);
    Values<const S> values{all + args.offsets[r], all + args.offsets[r + 1]};
    for (std::int64_t i = 0; i < cols; i += 32) {
      std::uint32_t bits;
      memcpy(&bits, bitmap + i / 8, 4);
      take(values, x + i, bits, cols - i < 32 ? cols - i : 32);
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
