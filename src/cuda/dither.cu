// Subtractive dither of a derivative: the forward and the backward draw the same numbers.
#include "backend.hpp"
#include "cuda/draws.hpp"
#include "cuda/fields.hpp"
#include "math/dither.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

using Dithered = math::Activations<math::Silu, math::Gelu, math::GeluTanh>;

template <class T, class Act>
struct Forward {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;
  using V = compute_t<T>;

  ConstRows x;
  Rows y;
  Packed packed;
  math::Dither<V> dither;
  math::Bounds<V> whole;
  std::uint64_t seed, offset;
  int bits;
  bool wide;
  std::int64_t row_bytes = 0;  // of packed

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_eights(g, x.rows, divided_up(row_bytes, bits), x.cols, [&](std::int64_t row, std::int64_t col, int n) {
      Eight<T> elements = load_eight(row_of<T>(x, row) + col, n, wide);
      const Eight<V> v = units<V>(seed, offset, row * x.cols + col);
      std::uint32_t fields = 0;
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) {
        const V element_x = value<V>(elements.e[k]);
        const V dithered = dither.dithered(math::backward<T>(Act{}, element_x, V(1)), v.e[k]);
        if (k < n) fields |= math::code_of(dithered, whole, bits) << (k * bits);
        if (y.data) elements.e[k] = element<T>(math::forward<T>(Act{}, element_x));
      }
      store_fields(packed.data + row * packed.stride, col, row_bytes, bits, fields);
      if (y.data) store_eight(row_of<T>(y, row) + col, elements, n, wide);
    });
  }
};

template <class T>
struct Backward {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;
  using V = compute_t<T>;

  ConstRows dy;
  ConstPacked packed;
  Rows dx;
  math::Dither<V> dither;
  std::uint64_t seed, offset;
  int bits;
  bool wide;
  std::int64_t row_bytes = 0;  // of packed

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_eights(g, dy.rows, divided_up(dy.cols, 8), dy.cols, [&](std::int64_t row, std::int64_t col, int n) {
      Eight<T> elements = load_eight(row_of<T>(dy, row) + col, n, wide);
      const std::uint32_t fields = load_fields(packed.data + row * packed.stride, col, row_bytes, bits);
      const Eight<V> v = units<V>(seed, offset, row * dy.cols + col);
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) {
        const V code = V(fields >> (k * bits) & ((1u << bits) - 1));
        elements.e[k] = element<T>(value<V>(elements.e[k]) * dither.factor(code, v.e[k]));
      }
      store_eight(row_of<T>(dx, row) + col, elements, n, wide);
    });
  }
};

template <class T, class Act>
void forward(const DitherForward& args, Stream stream) {
  using V = compute_t<T>;
  Forward<T, Act> kernel{
      args.x,      args.y,    args.packed, math::dither_of<V>(args.act, args.bits), math::whole_bounds<V>(), args.seed,
      args.offset, args.bits, false};
  if (dense_fields(args.x.cols, args.x.stride, args.y.data ? args.y.stride : args.x.stride, args.packed, args.bits)) {
    kernel.x.rows = 1, kernel.x.cols = args.x.rows * args.x.cols;
  }
  kernel.y.rows = kernel.x.rows;
  kernel.wide = aligned<T>(kernel.x) && (!args.y.data || aligned<T>(kernel.y));
  kernel.row_bytes = packed_row_bytes(kernel.x.cols, args.bits);
  launch_for(kernel, kernel.x.rows * divided_up(kernel.row_bytes, args.bits), stream);
}

template <class T>
void backward(const DitherBackward& args, Stream stream) {
  using V = compute_t<T>;
  Backward<T> kernel{args.dy,   args.packed, args.dx,   math::dither_of<V>(args.act, args.bits),
                     args.seed, args.offset, args.bits, false};
  if (dense_fields(args.dy.cols, args.dy.stride, args.dx.stride, args.packed, args.bits)) {
    kernel.dy.rows = 1, kernel.dy.cols = args.dy.rows * args.dy.cols;
  }
  kernel.dx.rows = kernel.dy.rows;
  kernel.wide = aligned<T>(kernel.dy) && aligned<T>(kernel.dx);
  kernel.row_bytes = packed_row_bytes(kernel.dy.cols, args.bits);
  launch_for(kernel, kernel.dy.rows * divided_up(kernel.dy.cols, 8), stream);
}

}  // namespace

void dither_forward(const DitherForward& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    Dithered::visit(args.act, [&](auto act) { forward<T, decltype(act)>(args, stream); });
  });
}

void dither_backward(const DitherBackward& args, Stream stream) {
  math::visit(args.dy.dtype, [&](auto tag) { backward<typename decltype(tag)::of>(args, stream); });
}

}  // namespace unswag::UNSWAG_ISA_NS
