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
    share_grid(g, (n + 7) / 8, [&](std::int64_t u) {
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
    const std::int64_t per_row = (x.cols + 7) / 8;
    share_grid(g, x.rows * per_row, [&](std::int64_t u) {
      const Place at = place(u, per_row);
      const int n = columns_left(at.rest, x.cols);
      const std::int64_t first = at.row * x.cols + 8 * at.rest;
      const int skip = int(first % 4);  // of the draws of the first block
      Eight<T> v = load_eight(row_of<T>(x, at.row) + 8 * at.rest, n, wide);
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
      store_eight(row_of<T>(y, at.row) + 8 * at.rest, v, n, wide);
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
  const std::int64_t units = a.x.rows * divided_up(a.x.cols, 8);
  if (units) launch(kernel, divided_up(units, kernel.threads), stream);
}

}  // namespace

void philox_fill(std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset, Stream stream) {
  const Fill kernel{out, n, seed, offset, reinterpret_cast<std::uintptr_t>(out) % 16 == 0};
  if (n) launch(kernel, divided_up(divided_up(n, 8), kernel.threads), stream);
}

void dropout(const Dropout& a, Stream stream) {
  math::visit(a.x.dtype, [&](auto tag) { drop<typename decltype(tag)::of>(a, stream); });
}

}  // namespace unswag::UNSWAG_ISA_NS
