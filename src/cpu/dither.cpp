// Subtractive dither of a derivative: the forward and the backward draw the same numbers.
#include "math/dither.hpp"

#include "backend.hpp"
#include "cpu/activation.hpp"
#include "cpu/codes.hpp"
#include "cpu/draws.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

constexpr std::int64_t stretch = Window::kSize;

template <class T, int bits>
void forward(const DitherForward& args, Stream stream) {
  using V = lanes_t<T>;
  using S = typename V::scalar;
  const auto dither = math::dither_of<S>(args.act, bits);
  const auto whole = math::whole_bounds<S>();
  const Draws draws{args.seed, args.offset};
  const bool value = args.y.data != nullptr;
  const bool large = args.x.rows * args.x.cols * std::int64_t(sizeof(T)) > stream_above;
  const auto span =
      packed_spans(args.x.rows, args.x.cols, args.x.stride, value ? args.y.stride : args.x.stride, args.packed, bits);
  span.each(stream.threads, [&](std::int64_t r, std::int64_t begin, std::int64_t end) {
    const T* x = row<T>(args.x, r);
    Window window;
    for (std::int64_t i = begin; i < end; i += stretch) {
      const std::int64_t n = end - i < stretch ? end - i : stretch;
      if (value) activation_values(args.act, args.x.dtype, x + i, row<T>(args.y, r) + i, n, large);
      S slope[stretch], v[stretch];
      activation_slopes(args.act, args.x.dtype, x + i, slope, n);
      window.units(draws, r * args.x.cols + i, n, v);
      each_lanes(n, [&](std::int64_t k, std::int64_t count) {
        store_lanes(slope + k, dither.dithered(load_lanes<V>(slope + k, count), load_lanes<V>(v + k, count)), count);
      });
      write_codes<bits>(slope, n, whole, args.packed.data + r * args.packed.stride + i / 8 * bits);
    }
  });
}

template <class T, int bits>
void backward(const DitherBackward& args, Stream stream) {
  using V = lanes_t<T>;
  using S = typename V::scalar;
  const auto dither = math::dither_of<S>(args.act, bits);
  double whole[1 << bits];
  for (int code = 0; code < 1 << bits; ++code) whole[code] = code;
  const Factors<bits, S> codes(math::levels_of<S>(whole, 1 << bits));
  const Draws draws{args.seed, args.offset};
  const bool large = args.dy.rows * args.dy.cols * std::int64_t(sizeof(T)) > stream_above;
  const auto span = packed_spans(args.dy.rows, args.dy.cols, args.dy.stride, args.dx.stride, args.packed, bits);
  span.each(stream.threads, [&](std::int64_t r, std::int64_t begin, std::int64_t end) {
    const T* dy = row<T>(args.dy, r);
    T* dx = row<T>(args.dx, r);
    const bool streaming = large && aligned(dx + begin, 32);
    Window window;
    for (std::int64_t i = begin; i < end; i += stretch) {
      const std::int64_t n = end - i < stretch ? end - i : stretch;
      S factor[stretch + 8], v[stretch];
      codes.read(args.packed.data + r * args.packed.stride + i / 8 * bits, n, factor);
      window.units(draws, r * args.dy.cols + i, n, v);
      each_lanes(n, [&](std::int64_t k, std::int64_t count) {
        store_lanes(factor + k, dither.factor(load_lanes<V>(factor + k, count), load_lanes<V>(v + k, count)), count);
      });
      multiply(dy + i, factor, dx + i, n, streaming);
    }
    if (streaming) stream_fence();
  });
}

}  // namespace

void dither_forward(const DitherForward& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) {
    visit_bits(args.bits, [&](auto bits) { forward<T, decltype(bits)::value>(args, stream); });
  });
}

void dither_backward(const DitherBackward& args, Stream stream) {
  visit(args.dy.dtype, [&]<class T>(math::type<T>) {
    visit_bits(args.bits, [&](auto bits) { backward<T, decltype(bits)::value>(args, stream); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
