// Step codes: a worker makes the codes of eight elements, which are whole bytes.
#include "backend.hpp"
#include "cuda/fields.hpp"
#include "math/activations.hpp"
#include "math/codes.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
struct Forward {
  static constexpr int threads = 256, resident = sizeof(T) == 8 ? 1 : 0;
  using Shared = Nothing;
  using V = compute_t<T>;

  ConstRows x;
  Rows y;
  Packed packed;
  math::Bounds<V> bounds;
  int bits;
  bool of_derivative;
  bool wide;
  std::int64_t row_bytes = 0;  // of packed

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_eights(g, x.rows, divided_up(row_bytes, bits), x.cols, [&](std::int64_t row, std::int64_t col, int n) {
      Eight<T> v = load_eight(row_of<T>(x, row) + col, n, wide);
      std::uint32_t fields = 0;
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) {
        const V element_x = value<V>(v.e[k]);
        V of_x = element_x, slope = element_x;
        if (y.data || of_derivative) math::forward_backward<T>(Act{}, element_x, V(1), of_x, slope);
        if (k < n) fields |= math::code_of(of_derivative ? slope : element_x, bounds, bits) << (k * bits);
        v.e[k] = element<T>(of_x);
      }
      store_fields(packed.data + row * packed.stride, col, row_bytes, bits, fields);
      if (y.data) store_eight(row_of<T>(y, row) + col, v, n, wide);
    });
  }
};

template <class T>
struct Backward {
  static constexpr int threads = 256, resident = 0;
  using V = compute_t<T>;
  struct Shared {
    math::Levels<V> levels;  // sixteen words in sixteen banks
  };

  ConstRows dy;
  ConstPacked packed;
  Rows dx;
  math::Levels<V> levels;
  int bits;
  bool wide;
  std::int64_t row_bytes = 0;  // of packed

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    share(g, 1 << math::most_bits, [&](std::int64_t i) { shared.levels.at[i] = levels.at[i]; });
    g.sync();
    share_eights(g, dy.rows, divided_up(dy.cols, 8), dy.cols, [&](std::int64_t row, std::int64_t col, int n) {
      Eight<T> v = load_eight(row_of<T>(dy, row) + col, n, wide);
      const std::uint32_t fields = load_fields(packed.data + row * packed.stride, col, row_bytes, bits);
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) {
        v.e[k] = element<T>(value<V>(v.e[k]) * shared.levels.at[fields >> (k * bits) & ((1u << bits) - 1)]);
      }
      store_eight(row_of<T>(dx, row) + col, v, n, wide);
    });
  }
};

template <class T, class Act>
void forward(const CodeForward& args, Stream stream) {
  using V = compute_t<T>;
  Forward<T, Act> kernel{
      args.x, args.y, args.packed, math::bounds_of<V>(args.bounds, args.count), args.bits, args.of_derivative, false};
  if (dense_fields(args.x.cols, args.x.stride, args.y.data ? args.y.stride : args.x.stride, args.packed, args.bits)) {
    kernel.x.rows = 1, kernel.x.cols = args.x.rows * args.x.cols;
  }
  kernel.y.rows = kernel.x.rows;
  kernel.wide = aligned<T>(kernel.x) && (!args.y.data || aligned<T>(kernel.y));
  kernel.row_bytes = packed_row_bytes(kernel.x.cols, args.bits);
  launch_for(kernel, kernel.x.rows * divided_up(kernel.row_bytes, args.bits), stream);
}

template <class T>
void backward(const CodeBackward& args, Stream stream) {
  using V = compute_t<T>;
  Backward<T> kernel{args.dy, args.packed, args.dx, math::levels_of<V>(args.levels, args.count), args.bits, false};
  if (dense_fields(args.dy.cols, args.dy.stride, args.dx.stride, args.packed, args.bits)) {
    kernel.dy.rows = 1, kernel.dy.cols = args.dy.rows * args.dy.cols;
  }
  kernel.dx.rows = kernel.dy.rows;
  kernel.wide = aligned<T>(kernel.dy) && aligned<T>(kernel.dx);
  kernel.row_bytes = packed_row_bytes(kernel.dy.cols, args.bits);
  launch_for(kernel, kernel.dy.rows * divided_up(kernel.dy.cols, 8), stream);
}

}  // namespace

void code_forward(const CodeForward& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::AllActivations::visit(args.act, [&](auto act) { forward<T, decltype(act)>(args, stream); });
  });
}

void code_backward(const CodeBackward& args, Stream stream) {
  math::visit(args.dy.dtype, [&](auto tag) { backward<typename decltype(tag)::of>(args, stream); });
}

}  // namespace unswag::UNSWAG_ISA_NS
