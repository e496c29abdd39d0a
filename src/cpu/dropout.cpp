// Loops around src/math/philox.hpp: draws, and dropout by them.
#include "backend.hpp"
#include "cpu/draws.hpp"
#include "cpu/lanes.hpp"
#include "cpu/threads.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class S>
UNSWAG_INLINE void factors(const std::uint32_t* draw, std::int64_t n, std::uint32_t last_dropped, S scale,
                           S* __restrict factor) {
  for (std::int64_t k = 0; k < n; ++k) factor[k] = draw[k] > last_dropped ? scale : 0;
}

template <class T>
void dropout_of(const Dropout& a, int threads) {
  using V = lanes_t<T>;
  using S = typename V::scalar;
  const Draws draws{a.seed, a.offset};
  const S scale = S(1 / (1 - a.p));
  const std::uint32_t last_dropped = std::uint32_t(math::dropout_threshold(a.p) - 1);
  const std::int64_t cols = a.x.cols;
  parallel_for(a.x.rows * cols, 16384, threads, [&](std::int64_t begin, std::int64_t end) {
    Window window;
    for (std::int64_t i = begin; i < end;) {
      const std::int64_t r = i / cols, c = i % cols;
      std::int64_t n = cols - c < end - i ? cols - c : end - i;
      if (n > Window::kSize) n = Window::kSize;
      const std::uint32_t* draw = window.at(draws, i, n);
      S factor[Window::kSize];
      factors(draw, n, last_dropped, scale, factor);
      const T* x = row<T>(a.x, r) + c;
      T* y = row<T>(a.y, r) + c;
      each_lanes(n, [&](std::int64_t k, std::int64_t count) {
        const V f = load_lanes<V>(factor + k, count);
        store_lanes(y + k, select(f != V(0), load_lanes<V>(x + k, count) * f, V(0)), count);
      });
      i += n;
    }
  });
}

}  // namespace

void philox_fill(std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset, Stream stream) {
  const Draws draws{seed, offset};
  parallel_for(n, 16384, stream.threads, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t whole = (end - begin) / 4;
    draws.blocks(out + begin, std::uint64_t(begin / 4), whole);
    if (const std::int64_t rest = (end - begin) % 4) {
      std::uint32_t last[4];
      draws.blocks(last, std::uint64_t(begin / 4 + whole), 1);
      memcpy(out + end - rest, last, std::size_t(rest) * sizeof *last);
    }
  });
}

void dropout(const Dropout& a, Stream stream) {
  visit(a.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    if (a.p > 0) return dropout_of<T>(a, stream.threads);
    parallel_for(a.x.rows, 1 + 16384 / (a.x.cols + 1), stream.threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) memcpy(row<T>(a.y, r), row<T>(a.x, r), std::size_t(a.x.cols) * sizeof(T));
    });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
