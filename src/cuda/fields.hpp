// Codes of 1 to 4 bits beside an activation: the fields of eight elements are `bits` bytes, which belong to one worker; and the
// kernels of the ops that use them.
#pragma once

#include "cuda/eight.hpp"
#include "math/fields.hpp"
#include "unswag/unswag.hpp"

namespace unswag::UNSWAG_ISA_NS {

static_assert(8 * most_code_bits <= 32, "the fields of eight elements are one word");

// The fields of the eight elements from `col`, of a row of `bytes` bytes; nothing past its last byte is touched.
UNSWAG_HD inline std::uint32_t load_fields(const std::uint8_t* row, std::int64_t col, std::int64_t bytes, int bits) {
  const std::int64_t at = col / 8 * bits;
  std::uint32_t fields = 0;
  UNSWAG_UNROLL
  for (int b = 0; b < most_code_bits; ++b)
    if (b < bits && at + b < bytes) fields |= std::uint32_t(row[at + b]) << (8 * b);
  return fields;
}
UNSWAG_HD inline void store_fields(std::uint8_t* row, std::int64_t col, std::int64_t bytes, int bits, std::uint32_t fields) {
  const std::int64_t at = col / 8 * bits;
  UNSWAG_UNROLL
  for (int b = 0; b < most_code_bits; ++b)
    if (b < bits && at + b < bytes) row[at + b] = std::uint8_t(fields >> (8 * b));
}

// Rows that follow each other without a gap, packed too, are one long row.
template <class Byte>
bool dense_fields(std::int64_t cols, std::int64_t stride, std::int64_t other_stride, const PackedOf<Byte>& packed, int bits) {
  return stride == cols && other_stride == cols && cols * bits % 32 == 0 && packed.stride == cols * bits / 8;
}

// y = act(x), where it is asked for, and packed codes: Codes has
//   static constexpr int resident
//   fields(Eight<T>& x, int n, std::int64_t first, bool value, int bits)
// the fields of n elements, of which the first is element `first` of the tensor; x becomes act(x) where `value` says so.
template <class T, class Codes>
struct EncodeFields {
  static constexpr int threads = 256, resident = Codes::resident;
  using Shared = Nothing;

  ConstRows x;
  Rows y;
  Packed packed;
  Codes codes;
  int bits;
  bool wide;
  std::int64_t row_bytes;  // of packed

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_eights(g, x.rows, divided_up(row_bytes, bits), x.cols, [&](std::int64_t row, std::int64_t col, int n) {
      Eight<T> v = load_eight(row_of<T>(x, row) + col, n, wide);
      const std::uint32_t fields = codes.fields(v, n, row * x.cols + col, y.data != nullptr, bits);
      store_fields(packed.data + row * packed.stride, col, row_bytes, bits, fields);
      if (y.data) store_eight(row_of<T>(y, row) + col, v, n, wide);
    });
  }
};
template <class T, class Codes, class Args>
void encode_fields(const Args& args, const Codes& codes, Stream stream) {
  EncodeFields<T, Codes> kernel{args.x, args.y, args.packed, codes, args.bits, false, 0};
  if (dense_fields(args.x.cols, args.x.stride, args.y.data ? args.y.stride : args.x.stride, args.packed, args.bits)) {
    kernel.x.rows = 1, kernel.x.cols = args.x.rows * args.x.cols;
  }
  kernel.y.rows = kernel.x.rows;
  kernel.wide = aligned<T>(kernel.x) && (!args.y.data || aligned<T>(kernel.y));
  kernel.row_bytes = packed_row_bytes(kernel.x.cols, args.bits);
  launch_for(kernel, kernel.x.rows * divided_up(kernel.row_bytes, args.bits), stream);
}

// dx = dy factor: Factors has
//   Shared, and begin(g, shared), which makes it
//   factor(shared, fields, first, bits)         Eight<compute_t<T>>
template <class T, class Factors>
struct DecodeFields {
  static constexpr int threads = 256, resident = 0;
  using Shared = typename Factors::Shared;
  using V = compute_t<T>;

  ConstRows dy;
  ConstPacked packed;
  Rows dx;
  Factors factors;
  int bits;
  bool wide;
  std::int64_t row_bytes;  // of packed

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    factors.begin(g, shared);
    share_eights(g, dy.rows, divided_up(dy.cols, 8), dy.cols, [&](std::int64_t row, std::int64_t col, int n) {
      Eight<T> v = load_eight(row_of<T>(dy, row) + col, n, wide);
      const std::uint32_t fields = load_fields(packed.data + row * packed.stride, col, row_bytes, bits);
      const Eight<V> factor = factors.factor(shared, fields, row * dy.cols + col, bits);
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) v.e[k] = element<T>(value<V>(v.e[k]) * factor.e[k]);
      store_eight(row_of<T>(dx, row) + col, v, n, wide);
    });
  }
};
template <class T, class Factors, class Args>
void decode_fields(const Args& args, const Factors& factors, Stream stream) {
  DecodeFields<T, Factors> kernel{args.dy, args.packed, args.dx, factors, args.bits, false, 0};
  if (dense_fields(args.dy.cols, args.dy.stride, args.dx.stride, args.packed, args.bits)) {
    kernel.dy.rows = 1, kernel.dy.cols = args.dy.rows * args.dy.cols;
  }
  kernel.dx.rows = kernel.dy.rows;
  kernel.wide = aligned<T>(kernel.dy) && aligned<T>(kernel.dx);
  kernel.row_bytes = packed_row_bytes(kernel.dy.cols, args.bits);
  launch_for(kernel, kernel.dy.rows * divided_up(kernel.dy.cols, 8), stream);
}

}  // namespace unswag::UNSWAG_ISA_NS
