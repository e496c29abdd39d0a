// The loops that all elementwise kernels share: rows of any stride, chunks for the threads, heads, tails, streaming.
#pragma once

#include <array>

#include "cpu/simd.hpp"
#include "cpu/threads.hpp"
#include "unswag/tensor.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// Outputs of more bytes than this go past the cache: they would only push out what is still needed there.
constexpr std::int64_t stream_above = std::int64_t{16} << 20;

// How rows x cols elements are cut into spans of one row each.  The borders depend on the shape only.
struct Spans {
  std::int64_t rows, cols;
  static constexpr std::int64_t length = 1 << 15;  // a multiple of 32: a span begins at a word of the mask

  // body(row, begin, end) for every span of the tensor
  template <class Body>
  UNSWAG_INLINE void each(int threads, const Body& body) const {
    const std::int64_t per_row = (cols + length - 1) / length;
    const std::int64_t grain = cols == 0 || cols >= length ? 1 : length / cols;
    parallel_for(rows * per_row, grain, threads, [&](std::int64_t begin, std::int64_t end) [[gnu::always_inline]] {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t row = i / per_row, col = i % per_row * length;
        body(row, col, col + length < cols ? col + length : cols);
      }
    });
  }
};

template <class T>
UNSWAG_INLINE bool aligned(const T* p, std::int64_t elements) {
  return reinterpret_cast<std::uintptr_t>(p) % (std::size_t(elements) * sizeof(T)) == 0;
}

// out[0], out[1], ... = f(in[0], in[1], ...) for n elements; f maps an array of lanes to an array of lanes.  Streaming starts
// after a head that brings the outputs to their alignment; outputs that do not share one are stored.
template <class T, std::size_t In, std::size_t Out, class F>
UNSWAG_INLINE void map_span(const std::array<const T*, In>& in, const std::array<T*, Out>& out, std::int64_t n, bool streaming,
                            const F& f) {
  using V = lanes_t<T>;
  const auto past = std::int64_t(reinterpret_cast<std::uintptr_t>(out[0]) / sizeof(T) % 16);
  const std::int64_t head = streaming ? (16 - past) % 16 : 0;
  for (const T* p : out) streaming = streaming && aligned(p + head, 16);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; i += count) {
    count = i < head ? head : 16;
    if (n - i < count) count = n - i;
    std::array<V, In> x;
    if (count == 16) [[likely]] {
      for (std::size_t k = 0; k < In; ++k) x[k] = load(in[k] + i);
    } else {
      for (std::size_t k = 0; k < In; ++k) x[k] = load_partial(in[k] + i, count);
    }
    const std::array<V, Out> y = f(x);
    if (count != 16) [[unlikely]] {
      for (std::size_t k = 0; k < Out; ++k) store_partial(out[k] + i, y[k], count);
    } else if (streaming) {
      for (std::size_t k = 0; k < Out; ++k) stream(out[k] + i, y[k]);
    } else {
      for (std::size_t k = 0; k < Out; ++k) store(out[k] + i, y[k]);
    }
  }
  if (streaming) stream_fence();
}

// The same over whole tensors of one shape and type.
template <class T, std::size_t In, std::size_t Out, class F>
UNSWAG_INLINE void map(const std::array<ConstRows, In>& in, const std::array<Rows, Out>& out, Stream stream, const F& f) {
  std::int64_t rows = out[0].rows, cols = out[0].cols;
  bool dense = true;
  for (const ConstRows& x : in) dense = dense && x.stride == cols;
  for (const Rows& y : out) dense = dense && y.stride == cols;
  if (dense) cols *= rows, rows = rows > 0;
  const bool streaming = rows * cols * std::int64_t(sizeof(T)) > stream_above;
  Spans{rows, cols}.each(stream.threads, [&](std::int64_t row, std::int64_t begin, std::int64_t end) [[gnu::always_inline]] {
    std::array<const T*, In> x;
    std::array<T*, Out> y;
    for (std::size_t k = 0; k < In; ++k) x[k] = static_cast<const T*>(in[k].data) + row * in[k].stride + begin;
    for (std::size_t k = 0; k < Out; ++k) y[k] = static_cast<T*>(out[k].data) + row * out[k].stride + begin;
    map_span<T>(x, y, end - begin, streaming, f);
  });
}

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
