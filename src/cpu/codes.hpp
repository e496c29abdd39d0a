// Fields of 1 to 4 bits: many comparisons to a packed row, and a packed row to factors.  32 elements are `bits` words.
#pragma once

#include "cpu/elementwise.hpp"
#include "cpu/lanes.hpp"
#include "math/codes.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// f(constant) with the number of bits as a constant.
template <class F>
UNSWAG_INLINE void visit_bits(int bits, const F& f) {
  switch (bits) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
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
      for (int i = 0; i < together; ++i) of[fields][i] = levels.at[fields >> (i * bits) & ((1 << bits) - 1)];
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

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
