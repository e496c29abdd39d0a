// Non-zeros: a block takes a row at a time, in tiles of eight elements for each worker; where a worker's values go is the sum
// of the counts of those before it.
#include "backend.hpp"
#include "cuda/eight.hpp"
#include "math/masks.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

constexpr int workers = 256;

UNSWAG_HD inline int popcount(unsigned x) {
#ifdef __CUDA_ARCH__
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

constexpr int width = 16;
struct Sums {
  std::int64_t of[workers];
  std::int64_t of_sixteen[workers / width];
};

// The sum of the counts of the workers before this one, and that of all of them.
struct Before {
  std::int64_t mine, all;
};
template <class Group>
UNSWAG_HD inline Before sum_before(const Group& g, Sums& sums, std::int64_t count) {
  const int sixteen = g.rank() / width;
  g.sync();  // those of the last time have been read
  sums.of[g.rank()] = count;
  g.sync();
  Before before{0, 0};
  for (int i = sixteen * width; i < g.rank(); ++i) before.mine += sums.of[i];
  if (g.rank() % width == width - 1 || g.rank() == g.size() - 1) sums.of_sixteen[sixteen] = before.mine + count;
  g.sync();
  for (int i = 0; i * width < g.size(); ++i) {
    if (i < sixteen) before.mine += sums.of_sixteen[i];
    before.all += sums.of_sixteen[i];
  }
  return before;
}

template <class I>
UNSWAG_HD inline unsigned set_bits(const Eight<I>& x, int n) {
  unsigned bits = 0;
  UNSWAG_UNROLL
  for (int k = 0; k < 8; ++k) bits |= unsigned(x.e[k] != 0 && k < n) << k;
  return bits;
}

template <class T>
struct Count {
  static constexpr int threads = workers, resident = 0;
  using Shared = Sums;
  using I = typename math::Format<T>::bits;

  ConstRows x;
  std::int64_t* counts;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    for (std::int64_t row = g.block(); row < x.rows; row += g.blocks()) {
      std::int64_t sum = 0;
      share(g, divided_up(x.cols, 8), [&](std::int64_t u) {
        const int n = columns_left(u, x.cols);
        sum += popcount(set_bits(load_eight(row_of<I>(x, row) + 8 * u, n, wide), n));
      });
      sum = sum_before(g, shared, sum).all;
      if (g.rank() == 0) counts[row] = sum;
    }
  }
};

template <class T>
struct Encode {
  static constexpr int threads = workers, resident = 0;
  using Shared = Sums;
  using I = typename math::Format<T>::bits;

  ConstRows x;
  const std::int64_t* offsets;
  Packed bitmap;
  I* values;
  std::int64_t bytes;  // of a row of the bitmap
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    for (std::int64_t row = g.block(); row < x.rows; row += g.blocks()) {
      std::int64_t next = offsets[row];
      const std::int64_t end = offsets[row + 1];
      for (std::int64_t tile = 0; tile < bytes; tile += g.size()) {  // as many turns for each worker: they meet in sum_before
        const std::int64_t u = tile + g.rank();
        const int n = columns_left(u, x.cols);
        const Eight<I> v = load_eight(row_of<I>(x, row) + 8 * u, n, wide);
        const unsigned bits = set_bits(v, n);
        if (u < bytes) bitmap.data[row * bitmap.stride + u] = std::uint8_t(bits);
        const Before before = sum_before(g, shared, popcount(bits));
        std::int64_t at = next + before.mine;
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          if ((bits >> k & 1) && at < end) values[at++] = v.e[k];
        }
        next += before.all;
      }
    }
  }
};

template <class T>
struct Decode {
  static constexpr int threads = workers, resident = 0;
  using Shared = Sums;
  using I = typename math::Format<T>::bits;

  ConstPacked bitmap;
  const std::int64_t* offsets;
  const I* values;
  Rows x;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Shared& shared) const {
    const std::int64_t bytes = divided_up(x.cols, 8);
    for (std::int64_t row = g.block(); row < x.rows; row += g.blocks()) {
      std::int64_t next = offsets[row];
      const std::int64_t end = offsets[row + 1];
      for (std::int64_t tile = 0; tile < bytes; tile += g.size()) {
        const std::int64_t u = tile + g.rank();
        const int n = columns_left(u, x.cols);
        const unsigned bits = u < bytes ? bitmap.data[row * bitmap.stride + u] : 0;
        const Before before = sum_before(g, shared, popcount(bits));
        std::int64_t at = next + before.mine;
        Eight<I> v;
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          v.e[k] = 0;
          if (bits >> k & 1) {
            v.e[k] = at < end ? values[at] : I(-1);
            ++at;
          }
        }
        store_eight(row_of<I>(x, row) + 8 * u, v, n, wide);
        next += before.all;
      }
    }
  }
};

}  // namespace

void nonzero_count(const NonzeroCount& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    launch(Count<T>{args.x, args.counts, aligned<T>(args.x)}, args.x.rows, stream);
  });
}

void nonzero_encode(const NonzeroEncode& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    using I = typename math::Format<T>::bits;
    launch(Encode<T>{args.x, args.offsets, args.bitmap, static_cast<I*>(args.values.data), packed_row_bytes(args.x.cols, 1),
                     aligned<T>(args.x)},
           args.x.rows, stream);
  });
}

void nonzero_decode(const NonzeroDecode& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    using I = typename math::Format<T>::bits;
    launch(Decode<T>{args.bitmap, args.offsets, static_cast<const I*>(args.values.data), args.x, aligned<T>(args.x)},
           args.x.rows, stream);
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
