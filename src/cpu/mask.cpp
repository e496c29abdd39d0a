// 1-bit masks: encode fused with the forward, decode fused with the backward.  One word of a packed row at a time: element
// 32 w + i is bit i of word w, little-endian (docs/format.md).
#include "backend.hpp"
#include "cpu/elementwise.hpp"
#include "math/masks.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// What a 0-bit does to a gradient.
template <class T>
struct Nothing {
  using I = ints32_t<T>;
  UNSWAG_INLINE I stopped(I) const { return I(0); }
};
template <class T>
struct Times {
  using I = ints32_t<T>;
  lanes_t<T> slope;
  UNSWAG_INLINE I stopped(I x) const {  // slope x
    T all[32];
    x.store(reinterpret_cast<typename I::scalar*>(all));
    store(all, slope * load(all));
    store(all + 16, slope * load(all + 16));
    return I::load(reinterpret_cast<const typename I::scalar*>(all));
  }
};

template <class I>
UNSWAG_INLINE I load_some(const typename I::scalar* p, std::int64_t n) {
  typename I::scalar all[32] = {};
  memcpy(all, p, std::size_t(n) * sizeof all[0]);
  return I::load(all);
}
template <class I>
UNSWAG_INLINE void store_some(typename I::scalar* p, I x, std::int64_t n) {
  typename I::scalar all[32];
  x.store(all);
  memcpy(p, all, std::size_t(n) * sizeof all[0]);
}

template <class T, class Act>
void forward(const MaskForward& args, Stream stream, Act act) {
  using I = ints32_t<T>;
  using S = typename I::scalar;
  const S zero = args.flush ? math::Format<T>::flushed : 0;
  const Times<T> times{typename lanes_t<T>::scalar(args.slope)};
  const auto stopped = [&](I x) __attribute__((always_inline)) { return times.stopped(x); };
  const bool value = args.y.data != nullptr;
  const bool large = args.x.rows * args.x.cols * std::int64_t(sizeof(T)) > stream_above;
  const auto span =
      packed_spans(args.x.rows, args.x.cols, args.x.stride, value ? args.y.stride : args.x.stride, args.packed, 1);
  span.each(stream.threads, [&](std::int64_t row, std::int64_t begin, std::int64_t end) __attribute__((always_inline)) {
    const S* x = static_cast<const S*>(args.x.data) + row * args.x.stride + begin;
    S* y = value ? static_cast<S*>(args.y.data) + row * args.y.stride + begin : nullptr;
    std::uint8_t* packed = args.packed.data + row * args.packed.stride + begin / 8;
    const std::int64_t n = end - begin;
    const bool streaming = large && value && aligned(y, 32);
    std::int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      prefetch_lines<32>(x + i);
      const I v = I::load(x + i);
      const auto passes = act.passes(v, zero);
      const std::uint32_t bits = passes.bits();
      memcpy(packed + i / 8, &bits, 4);
      if (streaming) {
        act.value(v, passes, zero, stopped).stream(y + i);
      } else if (value) {
        act.value(v, passes, zero, stopped).store(y + i);
      }
    }
    if (streaming) stream_fence();
    if (i < n) {
      const I v = load_some<I>(x + i, n - i);
      const auto passes = act.passes(v, zero);
      const std::uint32_t bits = passes.bits() & ((1u << (n - i)) - 1);
      memcpy(packed + i / 8, &bits, 4);
      if (value) store_some(y + i, act.value(v, passes, zero, stopped), n - i);
    }
  });
}

template <class T, class Off>
void backward(const MaskBackward& args, Stream stream, Off off) {
  using I = ints32_t<T>;
  using S = typename I::scalar;
  const bool large = args.dy.rows * args.dy.cols * std::int64_t(sizeof(T)) > stream_above;
  const auto span = packed_spans(args.dy.rows, args.dy.cols, args.dy.stride, args.dx.stride, args.packed, 1);
  span.each(stream.threads, [&](std::int64_t row, std::int64_t begin, std::int64_t end) __attribute__((always_inline)) {
    const S* dy = static_cast<const S*>(args.dy.data) + row * args.dy.stride + begin;
    S* dx = static_cast<S*>(args.dx.data) + row * args.dx.stride + begin;
    const std::uint8_t* packed = args.packed.data + row * args.packed.stride + begin / 8;
    const std::int64_t n = end - begin;
    const bool streaming = large && aligned(dx, 32);
    const auto passes = [&](std::int64_t i) __attribute__((always_inline)) {
      std::uint32_t bits;
      memcpy(&bits, packed + i / 8, 4);
      return I::mask::from_bits(bits);
    };
    std::int64_t i = 0;
    if (streaming) {
      for (; i + 32 <= n; i += 32) {
        prefetch_lines<32>(dy + i);
        const I v = I::load(dy + i);
        select(passes(i), v, off.stopped(v)).stream(dx + i);
      }
      stream_fence();
    }
    for (; i + 32 <= n; i += 32) {
      const I v = I::load(dy + i);
      select(passes(i), v, off.stopped(v)).store(dx + i);
    }
    if (i < n) {
      const I v = load_some<I>(dy + i, n - i);
      store_some(dx + i, select(passes(i), v, off.stopped(v)), n - i);
    }
  });
}

}  // namespace

void mask_forward(const MaskForward& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) {
    math::visit_mask<T>(args.act, [&](auto act) __attribute__((always_inline)) { forward<T>(args, stream, act); });
  });
}

void mask_backward(const MaskBackward& args, Stream stream) {
  visit(args.dy.dtype, [&]<class T>(math::type<T>) {
    if (math::leaks(args.act)) {
      backward<T>(args, stream, Times<T>{typename lanes_t<T>::scalar(args.slope)});
    } else {
      backward<T>(args, stream, Nothing<T>{});
    }
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
