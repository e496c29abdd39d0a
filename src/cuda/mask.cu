// 1-bit masks: a worker makes one byte of the mask of eight elements, element 8 j + i in bit i of byte j (docs/format.md), so
// that no bit crosses between workers.
#include "backend.hpp"
#include "cuda/fields.hpp"
#include "math/masks.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// slope x, of numbers seen as integers.
template <class T>
struct Times {
  using I = typename math::Format<T>::bits;
  compute_t<T> slope;
  UNSWAG_HD I operator()(I x) const {
    using V = compute_t<T>;
    return math::bit_cast<I>(element<T>(slope * value<V>(math::bit_cast<T>(x))));
  }
};

template <class T, class Act>
struct Forward {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;
  using I = typename math::Format<T>::bits;

  ConstRows x;
  Rows y;
  Packed packed;
  Times<T> times;
  I zero;
  bool wide;
  std::int64_t per_row;  // bytes

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_eights(g, x.rows, per_row, x.cols, [&](std::int64_t row, std::int64_t col, int n) {
      Eight<I> v = load_eight(row_of<I>(x, row) + col, n, wide);
      unsigned bits = 0;
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) {
        const bool passes = Act::passes(v.e[k], zero);
        bits |= unsigned(passes && k < n) << k;
        v.e[k] = Act::value(v.e[k], passes, zero, times);
      }
      packed.data[row * packed.stride + col / 8] = std::uint8_t(bits);
      if (y.data) store_eight(row_of<I>(y, row) + col, v, n, wide);
    });
  }
};

template <class T, bool Leaks>
struct Backward {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;
  using I = typename math::Format<T>::bits;

  ConstRows dy;
  ConstPacked packed;
  Rows dx;
  Times<T> times;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_eights(g, dy.rows, divided_up(dy.cols, 8), dy.cols, [&](std::int64_t row, std::int64_t col, int n) {
      Eight<I> v = load_eight(row_of<I>(dy, row) + col, n, wide);
      const unsigned bits = packed.data[row * packed.stride + col / 8];
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) v.e[k] = math::select((bits >> k & 1) != 0, v.e[k], Leaks ? times(v.e[k]) : I(0));
      store_eight(row_of<I>(dx, row) + col, v, n, wide);
    });
  }
};

template <class T, class Act>
void forward(const MaskForward& args, Stream stream) {
  using V = compute_t<T>;
  using I = typename math::Format<T>::bits;
  Forward<T, Act> kernel{args.x, args.y, args.packed, {V(args.slope)}, I(args.flush ? math::Format<T>::flushed : 0), false, 0};
  if (dense_fields(args.x.cols, args.x.stride, args.y.data ? args.y.stride : args.x.stride, args.packed, 1)) {
    kernel.x.rows = 1, kernel.x.cols = args.x.rows * args.x.cols;
  }
  kernel.y.rows = kernel.x.rows;
  kernel.wide = aligned<T>(kernel.x) && (!args.y.data || aligned<T>(kernel.y));
  kernel.per_row = packed_row_bytes(kernel.x.cols, 1);
  launch_for(kernel, kernel.x.rows * kernel.per_row, stream);
}

template <class T, bool Leaks>
void backward(const MaskBackward& args, Stream stream) {
  using V = compute_t<T>;
  Backward<T, Leaks> kernel{args.dy, args.packed, args.dx, {V(args.slope)}, false};
  if (dense_fields(args.dy.cols, args.dy.stride, args.dx.stride, args.packed, 1)) {
    kernel.dy.rows = 1, kernel.dy.cols = args.dy.rows * args.dy.cols;
  }
  kernel.dx.rows = kernel.dy.rows;
  kernel.wide = aligned<T>(kernel.dy) && aligned<T>(kernel.dx);
  launch_for(kernel, kernel.dy.rows * divided_up(kernel.dy.cols, 8), stream);
}

}  // namespace

void mask_forward(const MaskForward& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::visit_mask<T>(args.act, [&](auto act) { forward<T, decltype(act)>(args, stream); });
  });
}

void mask_backward(const MaskBackward& args, Stream stream) {
  math::visit(args.dy.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::leaks(args.act) ? backward<T, true>(args, stream) : backward<T, false>(args, stream);
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
