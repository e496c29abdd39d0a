// Step codes: encode beside the forward, factors by table in the backward.
#include "backend.hpp"
#include "cpu/activation.hpp"
#include "cpu/codes.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// Elements at a time: x is read for its value and again, from the first cache, for its code.
constexpr std::int64_t stretch = 2048;

template <class T, int bits>
void forward(const CodeForward& args, Stream stream) {
  using S = typename lanes_t<T>::scalar;
  const auto bounds = math::bounds_of<S>(args.bounds, args.count);
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
      if (args.of_derivative) {
        S slope[stretch];
        activation_slopes(args.act, args.x.dtype, x + i, slope, n);
        write_codes<bits>(slope, n, bounds, packed + i / 8 * bits);
      } else {
        write_codes<bits>(x + i, n, bounds, packed + i / 8 * bits);
      }
    }
  });
}

template <class T, int bits>
void backward(const CodeBackward& args, Stream stream) {
  using S = typename lanes_t<T>::scalar;
  const Factors<bits, S> factors(math::levels_of<S>(args.levels, args.count));
  const bool large = args.dy.rows * args.dy.cols * std::int64_t(sizeof(T)) > stream_above;
  const auto span = packed_spans(args.dy.rows, args.dy.cols, args.dy.stride, args.dx.stride, args.packed, bits);
  span.each(stream.threads, [&](std::int64_t r, std::int64_t begin, std::int64_t end) {
    const T* dy = row<T>(args.dy, r);
    T* dx = row<T>(args.dx, r);
    const bool streaming = large && aligned(dx + begin, 32);
    for (std::int64_t i = begin; i < end; i += stretch) {
      const std::int64_t n = end - i < stretch ? end - i : stretch;
      S factor[stretch + 8];
      factors.read(args.packed.data + r * args.packed.stride + i / 8 * bits, n, factor);
      multiply(dy + i, factor, dx + i, n, streaming);
    }
    if (streaming) stream_fence();
  });
}

}  // namespace

void code_forward(const CodeForward& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) {
    visit_bits(args.bits, [&](auto bits) { forward<T, decltype(bits)::value>(args, stream); });
  });
}

void code_backward(const CodeBackward& args, Stream stream) {
  visit(args.dy.dtype, [&]<class T>(math::type<T>) {
    visit_bits(args.bits, [&](auto bits) { backward<T, decltype(bits)::value>(args, stream); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
