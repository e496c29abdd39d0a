// Codes of 1 to 4 bits beside an activation: many comparisons to a packed row, a packed row to factors, and the frames of the
// ops that use them.  32 elements are `bits` words.
#pragma once

#include "cpu/activation.hpp"
#include "cpu/elementwise.hpp"
#include "cpu/lanes.hpp"
#include "math/codes.hpp"
#include "math/fields.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// f(constant) with the number of bits, 1 to most_code_bits, as a constant.
template <int bits = 1, class F>
UNSWAG_INLINE void visit_bits(int wanted, const F& f) {
  if (wanted == bits) return f(std::integral_constant<int, bits>());
  if constexpr (bits < most_code_bits) visit_bits<bits + 1>(wanted, f);
}

// The bits of a byte, `bits` apart.
struct Spread {
  std::uint32_t of[256];
};
template <int bits>
constexpr Spread make_spread() {
  Spread s{};
  for (unsigned byte = 0; byte < 256; ++byte)
    for (int i = 0; i < 8; ++i) s.of[byte] |= (byte >> i & 1) << (i * bits);
  return s;
}
template <int bits>
constexpr Spread spread = make_spread<bits>();

// The codes of 32 elements; those whose bit in `valid` is 0 are 0.
template <int bits, class V, class S>
UNSWAG_INLINE void write_word_of_codes(V low, V high, const math::Bounds<S>& bounds, std::uint32_t valid,
                                       std::uint8_t* packed) {
  std::uint32_t plane[bits];
  math::code_planes<bits>(
      [&](int i) __attribute__((always_inline)) {
        const V bound(bounds.at[i]);
        return ((low > bound).bits() | (high > bound).bits() << 16) & valid;
      },
      plane);
  if constexpr (bits == 1) {
    memcpy(packed, plane, 4);
  } else {
    for (std::int64_t byte = 0; byte < 4; ++byte) {
      std::uint32_t fields = 0;
      for (int k = 0; k < bits; ++k) fields |= spread<bits>.of[plane[k] >> (8 * byte) & 255] << k;
      memcpy(packed + byte * bits, &fields, bits);
    }
  }
}

// The codes of n elements, from where a word begins to where the row is padded to one.
template <int bits, class T, class S>
UNSWAG_INLINE void write_codes(const T* x, std::int64_t n, const math::Bounds<S>& bounds, std::uint8_t* packed) {
  using V = lanes_t<T>;
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    write_word_of_codes<bits>(V::load(x + i), V::load(x + i + 16), bounds, ~0u, packed + i / 8 * bits);
  if (i < n) {
    T rest[32] = {};
    memcpy(rest, x + i, std::size_t(n - i) * sizeof(T));
    std::uint8_t word[4 * bits];
    write_word_of_codes<bits>(V::load(rest), V::load(rest + 16), bounds, (1u << (n - i)) - 1, word);
    memcpy(packed + i / 8 * bits, word, std::size_t(packed_row_bytes(n - i, bits)));
  }
}

// What several codes side by side stand for, by their fields.
template <int bits, class S>
struct Factors {
  static constexpr int together = bits <= 2 ? 4 : 2;
  S of[1 << (together * bits)][together];

  explicit Factors(const math::Levels<S>& levels) {
    for (int fields = 0; fields < 1 << (together * bits); ++fields)
      for (int i = 0; i < together; ++i) of[fields][i] = levels.at[math::field(fields, i, bits)];
  }

  // factor[0] ... factor[n - 1], and up to 7 more.  Reads no byte past the row's last.
  UNSWAG_INLINE void read(const std::uint8_t* packed, std::int64_t n, S* factor) const {
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) read_eight(packed + i / 8 * bits, bits, factor + i);
    if (i < n) read_eight(packed + i / 8 * bits, std::size_t(packed_row_bytes(n, bits) - i / 8 * bits), factor + i);
  }

 private:
  UNSWAG_INLINE void read_eight(const std::uint8_t* packed, std::size_t bytes, S* factor) const {
    std::uint32_t fields = 0;
    memcpy(&fields, packed, bytes < bits ? bytes : bits);
    for (int k = 0; k < 8; k += together)
      memcpy(factor + k, of[fields >> (k * bits) & ((1u << (together * bits)) - 1)], sizeof of[0]);
  }
};

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
// whose codes begin at `packed`.  A stretch is read for its values and again, from the first cache, for its codes.
template <class T, int bits, std::int64_t stretch, class Args, class Encode>
void encode_codes(const Args& args, Stream stream, const Encode& encode) {
  const bool value = args.y.data != nullptr;
  const bool large = args.x.rows * args.x.cols * std::int64_t(sizeof(T)) > stream_above;
  const auto span =
      packed_spans(args.x.rows, args.x.cols, args.x.stride, value ? args.y.stride : args.x.stride, args.packed, bits);
  span.each(stream.threads, [&](std::int64_t r, std::int64_t begin, std::int64_t end) {
    const T* x = row<T>(args.x, r);
    std::uint8_t* packed = args.packed.data + r * args.packed.stride;
    for (std::int64_t i = begin; i < end; i += stretch) {
      const std::int64_t n = end - i < stretch ? end - i : stretch;
      if (value) activation_values(args.act, args.x.dtype, x + i, row<T>(args.y, r) + i, n, large);
      encode(r, i, x + i, n, packed + i / 8 * bits);
    }
  });
}

// dx = dy factor, with the factors that decode(r, i, n, packed, factor) makes of the codes of a stretch; it may write 7 more.
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
      S factor[stretch + 8];
      decode(r, i, n, packed + i / 8 * bits, factor);
      multiply(dy + i, factor, dx + i, n, streaming);
    }
    if (streaming) stream_fence();
  });
}

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
