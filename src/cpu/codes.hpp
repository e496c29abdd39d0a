// Codes of 1 to 4 bits beside an activation: searches among bounds to a packed row, a packed row to factors, and the frames of
// the ops that use them.  32 elements are `bits` words.
#pragma once

#include "cpu/activation.hpp"
#include "cpu/elementwise.hpp"
#include "cpu/fields.hpp"
#include "cpu/lanes.hpp"
#include "cpu/simd/tables.hpp"
#include "math/codes.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// f(constant) with the number of bits, 1 to most_code_bits, as a constant.
template <int bits = 1, class F>
UNSWAG_INLINE void visit_bits(int wanted, const F& f) {
  if (wanted == bits) return f(std::integral_constant<int, bits>());
  if constexpr (bits < most_code_bits) visit_bits<bits + 1>(wanted, f);
}

// Ascending bounds, in the order in which a search by halves asks for them: the middle one, then that of the half, and so on.
template <int bits, class S>
class Search {
 public:
  explicit Search(const math::Bounds<S>& bounds) : middle_(bounds.at[(1 << (bits - 1)) - 1]) {
    for (int asked = 1; asked < bits; ++asked) {
      S bound[8] = {};
      for (int code = 0; code < 1 << asked; ++code) bound[code] = bounds.at[((2 * code + 1) << (bits - 1 - asked)) - 1];
      bound_[asked - 1] = table<3, S>(bound);
    }
  }

  // Whether the middle one is below x, in every lane.
  template <class V>
  UNSWAG_INLINE auto above(V x) const {
    return x > V(middle_);
  }
  // How many are.
  template <class V>
  UNSWAG_INLINE whole16 code(V x) const {
    whole16 code = twice_and(0, above(x));
    UNSWAG_UNROLL
    for (int asked = 1; asked < bits; ++asked) code = twice_and(code, x > bound_[asked - 1][code]);
    return code;
  }

 private:
  S middle_;
  table<3, S> bound_[bits];  // by what has been found
  static_assert(most_code_bits <= 4);
};

// The fields of n elements, a multiple of 32 up to 512.
template <int bits, class T, class S>
UNSWAG_INLINE void write_fields(const T* x, std::int64_t n, const Search<bits, S>& search, std::uint8_t* packed) {
  using V = lanes_t<T>;
  if constexpr (bits == 1) {
    for (std::int64_t i = 0; i < n; i += 32) {
      const std::uint32_t above = search.above(V::load(x + i)).bits() | search.above(V::load(x + i + 16)).bits() << 16;
      memcpy(packed + i / 8, &above, sizeof above);
    }
  } else {
    std::uint8_t code[512];
    for (std::int64_t i = 0; i < n; i += 32)
      store_bytes(code + i, search.code(V::load(x + i)), search.code(V::load(x + i + 16)));
    pack_codes<bits>(code, packed, n);
  }
}

// The codes of n elements, from where a word begins to where the row is padded to one.
template <int bits, class T, class S>
UNSWAG_INLINE void write_codes(const T* x, std::int64_t n, const Search<bits, S> search, std::uint8_t* packed) {
  std::int64_t i = 0;
  while (n - i >= 32) {
    const std::int64_t whole = (n - i < 512 ? n - i : 512) / 32 * 32;
    write_fields(x + i, whole, search, packed + i / 8 * bits);
    i += whole;
  }
  if (i < n) {
    const std::int64_t bytes = packed_row_bytes(n - i, bits), used = (n - i) * bits;
    T rest[32] = {};
    memcpy(rest, x + i, std::size_t(n - i) * sizeof(T));
    std::uint8_t fields[4 * bits];
    write_fields(rest, 32, search, fields);
    if (used % 8 != 0) fields[used / 8] &= std::uint8_t((1 << used % 8) - 1);
    memset(fields + (used + 7) / 8, 0, std::size_t(bytes - (used + 7) / 8));
    memcpy(packed + i / 8 * bits, fields, std::size_t(bytes));
  }
}

// What codes stand for: factor[0] ... factor[n - 1], and up to 15 more.  Reads no byte past the row's last.
template <int bits, class S>
UNSWAG_INLINE void read_factors(const table<bits, S>& levels, const std::uint8_t* packed, std::int64_t n, S* factor) {
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) levels[load_fields<bits>(packed + i / 8 * bits)].store(factor + i);
  if (i < n) {
    std::uint8_t fields[2 * bits] = {};
    const std::int64_t left = packed_row_bytes(n, bits) - i / 8 * bits;
    memcpy(fields, packed + i / 8 * bits, left < std::int64_t{sizeof fields} ? std::size_t(left) : sizeof fields);
    levels[load_fields<bits>(fields)].store(factor + i);
  }
}

// dx = dy factor, rounded once.  streaming: past the cache, where dx is aligned to 32 elements.
template <class T, class S>
UNSWAG_INLINE void multiply(const T* dy, const S* factor, T* dx, std::int64_t n, bool streaming) {
  using V = lanes_t<T>;
  each_lanes(n, [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
    prefetch(dy + i);
    const V product = load_lanes<V>(dy + i, count) * load_lanes<V>(factor + i, count);
    if (streaming && count == 16) {
      product.stream(dx + i);
    } else {
      store_lanes(dx + i, product, count);
    }
  });
}

// y = act(x), where it is asked for, and encode(r, i, x, n, packed) for stretches of n elements of row r, from column i on,
// whose codes begin at `packed`.  A stretch is read for its values and again, from the first cache, for its codes.  Values on
// their way past the cache wait in it until the stretch is complete: a fence for each would stop the processor.
template <class T, int bits, std::int64_t stretch, class Args, class Encode>
void encode_codes(const Args& args, Stream stream, const Encode& encode) {
  const bool value = args.y.data != nullptr;
  const bool large = args.x.rows * args.x.cols * std::int64_t(sizeof(T)) > stream_above;
  const auto span =
      packed_spans(args.x.rows, args.x.cols, args.x.stride, value ? args.y.stride : args.x.stride, args.packed, bits);
  span.each(stream.threads, [&](std::int64_t r, std::int64_t begin, std::int64_t end) {
    const T* x = row<T>(args.x, r);
    std::uint8_t* packed = args.packed.data + r * args.packed.stride;
    T* y = value ? row<T>(args.y, r) : nullptr;
    const bool streaming = large && value && aligned(y + begin, 16);
    for (std::int64_t i = begin; i < end; i += stretch) {
      const std::int64_t n = end - i < stretch ? end - i : stretch;
      if (streaming && n == stretch) {
        alignas(64) T values[stretch];
        activation_values(args.act, args.x.dtype, x + i, values, n, false);
        stream_copy(y + i, values, n);
      } else if (value) {
        activation_values(args.act, args.x.dtype, x + i, y + i, n, false);
      }
      encode(r, i, x + i, n, packed + i / 8 * bits);
    }
    if (streaming) stream_fence();
  });
}

// dx = dy factor, with the factors that decode(r, i, n, packed, factor) makes of the codes of a stretch; it may write 15 more.
template <class T, int bits, std::int64_t stretch, class Args, class Decode>
void decode_codes(const Args& args, Stream stream, const Decode& decode) {
  using S = typename lanes_t<T>::scalar;
  const bool large = args.dy.rows * args.dy.cols * std::int64_t(sizeof(T)) > stream_above;
  const auto span = packed_spans(args.dy.rows, args.dy.cols, args.dy.stride, args.dx.stride, args.packed, bits);
  span.each(stream.threads, [&](std::int64_t r, std::int64_t begin, std::int64_t end) {
    const T* dy = row<T>(args.dy, r);
    T* dx = row<T>(args.dx, r);
    const std::uint8_t* packed = args.packed.data + r * args.packed.stride;
    const bool streaming = large && aligned(dx + begin, 32);
    for (std::int64_t i = begin; i < end; i += stretch) {
      const std::int64_t n = end - i < stretch ? end - i : stretch;
      S factor[stretch + 16];
      decode(r, i, n, packed + i / 8 * bits, factor);
      multiply(dy + i, factor, dx + i, n, streaming);
    }
    if (streaming) stream_fence();
  });
}

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
