// Sums along rows in the one order that all backends share (src/cpu/lanes.hpp, sum_lanes): tiles of 2048 elements; in a tile 64
// chains, element i in chain i % 64, but what is left after the last whole 64 in chains 0 to 15 by sixteens, and what is left
// then in chains 16 to 31; the chains meet in a fixed order; the tiles are added up in double.
#pragma once

#include "cuda/eight.hpp"

namespace unswag::UNSWAG_ISA_NS {

constexpr std::int64_t tile_size = 2048;
constexpr int chains = 64, items = 8;  // tiles that are summed at a time

// What the workers of a block know of them.
template <class V>
struct Tiles {
  V part[items][chains + 1];  // + 1: one worker walks along a row of it, and so do others along the next ones
  double sum[items];
};

// The sum along chain c in a tile of n elements: sum = add(i, sum).
template <class V, class Add>
UNSWAG_HD inline V walk_chain(int c, int n, const Add& add) {
  const int whole = n / chains * chains, rest = n - whole, sixteens = rest / 16 * 16;
  V sum(0);
#ifdef __CUDACC__
#pragma unroll 8
#endif
  for (int i = c; i < whole; i += chains) sum = add(i, sum);
  if (c < 16) {
    for (int i = c; i < sixteens; i += 16) sum = add(whole + i, sum);
  } else if (c < 32 && sixteens + c - 16 < rest) {
    sum = add(whole + sixteens + c - 16, sum);
  }
  return sum;
}

// (a + b) + (c + d) of the four sixteens, then halves: as lanes are added up on the CPU.
template <class V>
UNSWAG_HD inline V meet(const V (&part)[chains + 1]) {
  V s[16];
  UNSWAG_UNROLL
  for (int j = 0; j < 16; ++j) s[j] = (part[j] + part[16 + j]) + (part[32 + j] + part[48 + j]);
  UNSWAG_UNROLL
  for (int j = 0; j < 8; ++j) s[j] = s[j] + s[j + 8];
  UNSWAG_UNROLL
  for (int j = 0; j < 4; ++j) s[j] = s[j] + s[j + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

UNSWAG_HD inline int tile_length(std::int64_t tile, std::int64_t cols) {
  const std::int64_t left = cols - tile * tile_size;
  return int(left < tile_size ? left : tile_size);
}

// tiles.sum[k] = the sum over the `length(k)` elements of item k < count <= items: sum = add(k, i, sum).  Every worker of the
// block calls it, and may read tiles.sum until it calls it again.
template <class V, class Group, class Length, class Add>
UNSWAG_HD inline void sum_tiles(const Group& g, Tiles<V>& tiles, int count, const Length& length, const Add& add) {
  share(g, std::int64_t{count} * chains, [&](std::int64_t u) {
    const int k = int(u / chains), c = int(u % chains);
    tiles.part[k][c] = walk_chain<V>(c, length(k), [&](int i, V sum) { return add(k, i, sum); });
  });
  g.sync();
  share(g, count, [&](std::int64_t k) { tiles.sum[k] = double(meet(tiles.part[k])); });
  g.sync();
}

}  // namespace unswag::UNSWAG_ISA_NS
