// The loops that all elementwise kernels share: rows of any stride, chunks for the threads, heads, tails, streaming.
#pragma once

#include <array>
#include <cstring>
#include <tuple>
#include <utility>

#include "cpu/simd.hpp"
#include "cpu/threads.hpp"
#include "math/activations.hpp"
#include "unswag/tensor.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// Outputs of more bytes than this go past the cache: they would only push out what is still needed there, and what is stored
// through the cache is read first.  Several take turns block by block: stores past the cache that alternate between tensors
// make the processor wait (a third slower, or half, than through the cache on Zen 3, though they move less).
constexpr std::int64_t stream_above = std::int64_t{16} << 20;

template <std::size_t Bytes>
struct ints32;  // thirty-two integers of so many bytes
template <>
struct ints32<2> {
  using type = i16x32;
};
template <>
struct ints32<4> {
  using type = i32x32;
};
#ifdef UNSWAG_ISA_PORTABLE
template <>
struct ints32<8> {
  using type = i64x32;
};
#endif
template <class T>
using ints32_t = typename ints32<sizeof(T)>::type;

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

// The same over packed rows of `bits` bits per element too: rows that follow each other without a gap are one long row.
template <class Byte>
UNSWAG_INLINE Spans packed_spans(std::int64_t rows, std::int64_t cols, std::int64_t stride, std::int64_t other_stride,
                                 const PackedOf<Byte>& packed, int bits) {
  const bool dense = stride == cols && other_stride == cols && cols * bits % 32 == 0 && packed.stride == cols * bits / 8;
  return dense ? Spans{rows > 0, rows * cols} : Spans{rows, cols};
}

// Whether stores past the cache of so many elements together may begin at p.  A line is enough for any of them.
template <class T>
UNSWAG_INLINE bool aligned(const T* p, std::int64_t elements) {
  const std::size_t bytes = std::size_t(elements) * sizeof(T);
  return reinterpret_cast<std::uintptr_t>(p) % (bytes < 64 ? bytes : 64) == 0;
}

// Asks for what comes a kilobyte after p: formulas are too long for the processor to look that far ahead.  Into the second
// cache: the first has few misses under way, and several tensors need them (swiglu in float32 is 1.2 times as fast on Zen 4).
template <class T>
UNSWAG_INLINE void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 1024, 0, 2);
}
// The same of the lines of n elements.
template <std::int64_t n, class T>
UNSWAG_INLINE void prefetch_lines(const T* p) {
  constexpr std::int64_t line = 64 / std::int64_t{sizeof(T)};
  prefetch(p);
  if constexpr (n > line) prefetch_lines<n - line>(p + line);
}

// A kernel F maps lanes, of any number of lanes, to arrays of them by F::apply(x...).  Where F::has_near, and F::plain(x) is in
// every lane of the first x, as it is for nearly all data, F::apply(x..., F::ahead(x)) is the same.
template <class T, class Act>
struct Smooth {
  static constexpr bool has_near = Act::template has_near<lanes_t<T>>;
  template <class V>
  UNSWAG_INLINE static auto plain(V x) {
    return math::plain<Act>(x);
  }
  template <class V>
  UNSWAG_INLINE static V ahead(V x) {
    return Act::template ahead<T>(x);
  }
};

// F::apply(x...), one register at a time where formulas need all the registers there are for one.
template <class F, class V, class... Vs>
UNSWAG_INLINE auto apply_by_register(V x, Vs... further) {
  if constexpr (requires { x.low; } && !has_many_registers) {
    const auto low = apply_by_register<F>(x.low, further.low...), high = apply_by_register<F>(x.high, further.high...);
    return [&]<std::size_t... J>(std::index_sequence<J...>) __attribute__((always_inline)) {
      return std::array<V, sizeof...(J)>{V(low[J], high[J])...};
    }(std::make_index_sequence<low.size()>());
  } else {
    return F::apply(x, further...);
  }
}

template <class F, class V>
UNSWAG_INLINE V ahead_by_register(V x) {
  if constexpr (requires { x.low; } && !has_many_registers) {
    return V(ahead_by_register<F>(x.low), ahead_by_register<F>(x.high));
  } else {
    return F::ahead(x);
  }
}

// Copies n elements, a multiple of sixteen, past the cache.
template <class T>
UNSWAG_INLINE void stream_copy(T* to, const T* from, std::int64_t n) {
  for (std::int64_t k = 0; k < n; k += 32 / std::int64_t(sizeof(T))) stream_32_bytes(to + k, from + k);
}

// out[0][i], out[1][i], ... = f(in[0][i], in[1][i], ...) from `begin` on, until less than a step is left or some are not plain;
// returns where it stopped.
template <bool Streaming, class F, class T, std::size_t In, std::size_t Out>
UNSWAG_INLINE std::int64_t map_plain(const std::array<const T*, In>& in, const std::array<T*, Out>& out, std::int64_t begin,
                                     std::int64_t n) {
  using V = wide_t<T>;
  constexpr std::int64_t size = V::size, block = 256;
  constexpr bool in_turns = Streaming && Out > 1;
  [[maybe_unused]] alignas(64) T staged[Out][in_turns ? block : 1];
  const auto step = [&]<std::size_t... K, std::size_t... J>(std::int64_t i, [[maybe_unused]] std::int64_t from,
                                                            std::index_sequence<K...>, std::index_sequence<J...>, auto... ahead)
                        __attribute__((always_inline)) {
                          (prefetch_lines<size>(in[K] + i), ...);
                          const std::array<V, Out> y = apply_by_register<F>(load_shuffled(in[K] + i)..., ahead...);
                          if constexpr (in_turns) {
                            (store_shuffled(staged[J] + (i - from), y[J]), ...);
                          } else if constexpr (Streaming) {
                            (stream_shuffled(out[J] + i, y[J]), ...);
                          } else {
                            (store_shuffled(out[J] + i, y[J]), ...);
                          }
                        };
  const auto ins = std::make_index_sequence<In>();
  const auto outs = std::make_index_sequence<Out>();
  [[maybe_unused]] alignas(64) float ahead[has_many_registers ? 1 : block];
  const std::int64_t last = n - (n - begin) % size;
  std::int64_t i = begin;
  for (bool plain = true; plain && i < last;) {
    const std::int64_t end = last - i < block ? last : i + block;
    std::int64_t j = end;
    if constexpr (F::has_near && has_many_registers) {
      for (j = i; j < end; j += size) {
        const V x = load_shuffled(in[0] + j);
        plain = all(F::plain(x));
        if (!plain) [[unlikely]]
          break;
        step(j, i, ins, outs, ahead_by_register<F>(x));
      }
    } else if constexpr (F::has_near) {
      for (j = i; j < end; j += size) {
        prefetch_lines<size>(in[0] + j);
        const V x = load_shuffled(in[0] + j);
        plain = all(F::plain(x));
        if (!plain) [[unlikely]]
          break;
        ahead_by_register<F>(x).store(ahead + (j - i));
      }
      for (std::int64_t k = i; k < j; k += size) step(k, i, ins, outs, V::load(ahead + (k - i)));
    } else {
      for (std::int64_t k = i; k < j; k += size) step(k, i, ins, outs);
    }
    if constexpr (in_turns)
      for (std::size_t o = 0; o < Out; ++o) stream_copy(out[o] + i, staged[o], j - i);
    i = j;
  }
  return i;
}

// The same for a step of n elements or less, whatever they are.
template <class F, class T, std::size_t In, std::size_t Out>
[[gnu::noinline]] void map_step(const std::array<const T*, In>& in, const std::array<T*, Out>& out, std::int64_t i,
                                std::int64_t n) {
  using V = wide_t<T>;
  T all[In > Out ? In : Out][V::size] = {};
  std::array<V, In> x;
  for (std::size_t k = 0; k < In; ++k) {
    memcpy(all[k], in[k] + i, std::size_t(n) * sizeof(T));
    x[k] = load_shuffled(all[k]);
  }
  const std::array<V, Out> y =
      std::apply([](auto... v) __attribute__((always_inline)) { return apply_by_register<F>(v...); }, x);
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
    constexpr std::int64_t size = wide_t<T>::size;
    const std::int64_t count = n - i < size ? n - i : size;
    map_step<F>(in, out, i, count);
    i += count;
  }
}

// The same past the cache, from where a line of the output begins.
template <class F, class T, std::size_t In, std::size_t Out>
UNSWAG_INLINE void stream_span(std::array<const T*, In> in, std::array<T*, Out> out, std::int64_t n) {
  constexpr std::int64_t line = 64 / sizeof(T);
  const std::int64_t past = std::int64_t(reinterpret_cast<std::uintptr_t>(out[0]) % 64 / sizeof(T));
  for (std::int64_t head = past == 0 ? 0 : line - past < n ? line - past : n; head > 0;) {
    constexpr std::int64_t size = wide_t<T>::size;
    const std::int64_t count = head < size ? head : size;
    map_step<F>(in, out, 0, count);
    for (const T*& p : in) p += count;
    for (T*& p : out) p += count;
    n -= count;
    head -= count;
  }
  bool lines = true;
  for (T* p : out) lines = lines && aligned(p, line);
  if (lines) {
    map_span<true, F>(in, out, n);
  } else {
    map_span<false, F>(in, out, n);
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
