// The loops that all elementwise kernels share: rows of any stride, chunks for the threads, heads, tails, streaming.
#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "cpu/simd.hpp"
#include "cpu/threads.hpp"
#include "math/activations.hpp"
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
    parallel_for(rows * per_row, grain, threads, [&](std::int64_t begin, std::int64_t end) __attribute__((always_inline)) {
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

// Asks for what comes a kilobyte after p: formulas are too long for the processor to look that far ahead.
template <class T>
UNSWAG_INLINE void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 1024);
}

// n elements past the cache.
template <class T>
UNSWAG_INLINE void stream_copy(T* to, const T* from, std::int64_t n) {
  const auto past = std::int64_t(reinterpret_cast<std::uintptr_t>(to) % 64 / sizeof(T)), line = std::int64_t(64 / sizeof(T));
  std::int64_t i = past == 0 ? 0 : line - past < n ? line - past : n;
  if (!aligned(to + i, line)) i = n;
  memcpy(to, from, std::size_t(i) * sizeof(T));
  for (; i + line <= n; i += line) {
    f32x16::load(reinterpret_cast<const float*>(from + i)).stream(reinterpret_cast<float*>(to + i));
  }
  memcpy(to + i, from + i, std::size_t(n - i) * sizeof(T));
}

// A kernel F maps arrays of lanes, of any number of lanes, by F::apply<Plain>(x).  Where F::has_near, Plain may be true if
// F::plain(x[0]) is in every lane, as it is for nearly all data; the result of a lane is the same either way.
template <class T, class Act>
struct Smooth {
  static constexpr bool has_near = math::has_near<Act, lanes_t<T>>;
  template <class V>
  UNSWAG_INLINE static auto plain(V x) {
    return math::plain<Act>(x);
  }
};

// One register at a time: formulas need all the registers there are for one.
template <class F, class V, std::size_t In>
UNSWAG_INLINE auto apply_plain(const std::array<V, In>& x) {
  if constexpr (requires { x[0].low; }) {
    return [&]<std::size_t... K>(std::index_sequence<K...>) __attribute__((always_inline)) {
      const auto low = apply_plain<F>(std::array{x[K].low...});
      const auto high = apply_plain<F>(std::array{x[K].high...});
      return [&]<std::size_t... J>(std::index_sequence<J...>) __attribute__((always_inline)) {
        return std::array<V, sizeof...(J)>{V(low[J], high[J])...};
      }(std::make_index_sequence<low.size()>());
    }(std::make_index_sequence<In>());
  } else {
    return F::template apply<true>(x);
  }
}

// out[0][i], out[1][i], ... = f(in[0][i], in[1][i], ...) from `begin` on, until fewer than sixteen are left or some are not
// plain; returns where it stopped.
template <bool Streaming, class F, class T, std::size_t In, std::size_t Out>
UNSWAG_INLINE std::int64_t map_plain(const std::array<const T*, In>& in, const std::array<T*, Out>& out, std::int64_t begin,
                                     std::int64_t n) {
  const auto loop = [&]<std::size_t... K, std::size_t... J>(std::index_sequence<K...>, std::index_sequence<J...>)
                        __attribute__((always_inline)) {
                          std::int64_t i = begin;
                          for (; i + 16 <= n; i += 16) {
                            (prefetch(in[K] + i), ...);
                            const std::array<lanes_t<T>, In> x{load_shuffled(in[K] + i)...};
                            if constexpr (F::has_near) {
                              if (!all(F::plain(x[0]))) [[unlikely]]
                                break;
                            }
                            const std::array<lanes_t<T>, Out> y = apply_plain<F>(x);
                            if constexpr (Streaming) {
                              (stream_shuffled(out[J] + i, y[J]), ...);
                            } else {
                              (store_shuffled(out[J] + i, y[J]), ...);
                            }
                          }
                          return i;
                        };
  return loop(std::make_index_sequence<In>(), std::make_index_sequence<Out>());
}

// The same for n <= 16 elements, whatever they are.
template <class F, class T, std::size_t In, std::size_t Out>
[[gnu::noinline]] void map_step(const std::array<const T*, In>& in, const std::array<T*, Out>& out, std::int64_t i,
                                std::int64_t n) {
  using V = lanes_t<T>;
  T all[In > Out ? In : Out][16] = {};
  std::array<V, In> x;
  for (std::size_t k = 0; k < In; ++k) {
    memcpy(all[k], in[k] + i, std::size_t(n) * sizeof(T));
    x[k] = load_shuffled(all[k]);
  }
  const std::array<V, Out> y = F::template apply<false>(x);
  for (std::size_t k = 0; k < Out; ++k) {
    store_shuffled(all[k], y[k]);
    memcpy(out[k] + i, all[k], std::size_t(n) * sizeof(T));
  }
}

// n elements, whatever they are.  Not inlined: compiled once for all that call it.
template <bool Streaming, class F, class T, std::size_t In, std::size_t Out>
[[gnu::noinline]] void map_span(const std::array<const T*, In>& in, const std::array<T*, Out>& out, std::int64_t n) {
  for (std::int64_t i = 0;;) {
    if constexpr (has_fast_loops) i = map_plain<Streaming, F>(in, out, i, n);
    if (i == n) break;
    const std::int64_t count = n - i < 16 ? n - i : 16;
    map_step<F>(in, out, i, count);
    i += count;
  }
}

// The same past the cache, from where a line of out[0] begins.  Several outputs go by way of a block in the cache, so that they
// are written one after the other and not in turns: tensors that begin at equal offsets within a page would get in each other's
// way in the memory's banks (half the speed on Zen 3).
template <class F, class T, std::size_t In, std::size_t Out>
UNSWAG_INLINE void stream_span(std::array<const T*, In> in, std::array<T*, Out> out, std::int64_t n) {
  constexpr std::int64_t line = 64 / sizeof(T), size = 32 * line;
  const std::int64_t past = std::int64_t(reinterpret_cast<std::uintptr_t>(out[0]) % 64 / sizeof(T));
  const auto advance = [&](std::int64_t count) __attribute__((always_inline)) {
    for (const T*& p : in) p += count;
    for (T*& p : out) p += count;
    return n - count;
  };
  if constexpr (Out == 1) {
    for (std::int64_t head = past == 0 ? 0 : line - past < n ? line - past : n; head > 0;) {
      const std::int64_t count = head < 16 ? head : 16;
      map_step<F>(in, out, 0, count);
      n = advance(count);
      head -= count;
    }
    if (aligned(out[0], line)) {
      map_span<true, F>(in, out, n);
    } else {
      map_span<false, F>(in, out, n);
    }
  } else {
    alignas(64) T block[Out][size];
    std::array<T*, Out> blocks;
    for (std::size_t k = 0; k < Out; ++k) blocks[k] = block[k];
    for (std::int64_t count = size - past; n > 0; count = size) {
      if (count > n) count = n;
      map_span<false, F>(in, blocks, count);
      for (std::size_t k = 0; k < Out; ++k) stream_copy(out[k], block[k], count);
      n = advance(count);
    }
  }
  stream_fence();
}

// The same over whole tensors of one shape and type.
template <class F, class T, std::size_t In, std::size_t Out>
UNSWAG_INLINE void map(const std::array<ConstRows, In>& in, const std::array<Rows, Out>& out, Stream stream) {
  std::int64_t rows = out[0].rows, cols = out[0].cols;
  bool dense = true;
  for (const ConstRows& x : in) dense = dense && x.stride == cols;
  for (const Rows& y : out) dense = dense && y.stride == cols;
  if (dense) cols *= rows, rows = rows > 0;
  const bool streaming = rows * cols * std::int64_t(sizeof(T)) > stream_above;
  Spans{rows, cols}.each(stream.threads,
                         [&](std::int64_t row, std::int64_t begin, std::int64_t end) __attribute__((always_inline)) {
                           std::array<const T*, In> x;
                           std::array<T*, Out> y;
                           for (std::size_t k = 0; k < In; ++k)
                             x[k] = static_cast<const T*>(in[k].data) + row * in[k].stride + begin;
                           for (std::size_t k = 0; k < Out; ++k)
                             y[k] = static_cast<T*>(out[k].data) + row * out[k].stride + begin;
                           if constexpr (has_fast_loops) {
                             if (streaming) return stream_span<F>(x, y, end - begin);
                           }
                           map_span<false, F>(x, y, end - begin);
                         });
}

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
