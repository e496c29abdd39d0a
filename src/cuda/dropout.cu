// Draws by src/math/philox.hpp, and dropout by them.
#include "backend.hpp"
#include "cuda/eight.hpp"
#include "math/philox.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

struct Fill {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;

  std::uint32_t* out;
  std::int64_t n;
  std::uint64_t seed, offset;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_grid(g, divided_up(n, 8), [&](std::int64_t u) {
      Eight<std::uint32_t> draws;
      UNSWAG_UNROLL
      for (int b = 0; b < 2; ++b) {
        const math::PhiloxBlock block = math::philox_block(seed, offset, std::uint64_t(2 * u + b));
        UNSWAG_UNROLL
        for (int w = 0; w < 4; ++w) draws.e[4 * b + w] = block.word[w];
      }
      store_eight(out + 8 * u, draws, columns_left(u, n), wide);
    });
  }
};

template <class T>
struct Drop {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;
  using V = compute_t<T>;

  ConstRows x;
  Rows y;
  std::uint64_t seed, offset;
  V scale;
  std::uint32_t last_dropped;
  bool all;  // p = 0: nothing is drawn, and NaN keep their bits
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_eights(g, x.rows, divided_up(x.cols, 8), x.cols, [&](std::int64_t row, std::int64_t col, int n) {
      const std::int64_t first = row * x.cols + col;
      const int skip = int(first % 4);  // of the draws of the first block
      Eight<T> v = load_eight(row_of<T>(x, row) + col, n, wide);
      UNSWAG_UNROLL
      for (int b = 0; b < 3; ++b) {
        if (all || (b == 2 && skip == 0)) break;
        const math::PhiloxBlock block = math::philox_block(seed, offset, std::uint64_t(first / 4 + b));
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          UNSWAG_UNROLL
          for (int w = 0; w < 4; ++w) {
            if (k + skip == 4 * b + w) v.e[k] = element<T>(block.word[w] > last_dropped ? value<V>(v.e[k]) * scale : V(0));
          }
        }
      }
      store_eight(row_of<T>(y, row) + col, v, n, wide);
    });
  }
};

template <class T>
void drop(const Dropout& a, Stream stream) {
  using V = compute_t<T>;
  const Drop<T> kernel{a.x,
                       a.y,
                       a.seed,
                       a.offset,
                       V(1 / (1 - a.p)),
                       std::uint32_t(math::dropout_threshold(a.p) - 1),
                       a.p == 0,
                       aligned<T>(a.x) && aligned<T>(a.y)};
  launch_for(kernel, a.x.rows * divided_up(a.x.cols, 8), stream);
}

}  // namespace

void philox_fill(std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset, Stream stream) {
  const Fill kernel{out, n, seed, offset, reinterpret_cast<std::uintptr_t>(out) % 16 == 0};
  launch_for(kernel, divided_up(n, 8), stream);
}

void dropout(const Dropout& a, Stream stream) {
  math::visit(a.x.dtype, [&](auto tag) { drop<typename decltype(tag)::of>(a, stream); });
}

}  // namespace unswag::UNSWAG_ISA_NS
