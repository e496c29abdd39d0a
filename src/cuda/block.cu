// Block codecs: a block of workers makes a group of sixteen blocks, in shared memory.
#include "backend.hpp"
#include "cuda/eight.hpp"
#include "math/blocks.hpp"
#include "math/fields.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

constexpr int lanes = math::block_lanes;

template <class B>
struct SharedGroup {
  float t[B::n * lanes];
  float factor[lanes];
};

template <class B, class Group>
UNSWAG_HD inline void rotate(const Group& g, SharedGroup<B>& s) {
  for (int half = 1; half < B::n; half *= 2) {
    share(g, B::n / 2 * lanes, [&](std::int64_t i) {
      const int pair = int(i) / lanes, lane = int(i) % lanes;
      const int k = pair / half * 2 * half + pair % half;
      math::butterfly(s.t[k * lanes + lane], s.t[(k + half) * lanes + lane]);
    });
    g.sync();
  }
}

// Sixteen-byte accesses, eight elements at a time, whatever the place of the last group's elements is.
template <class B, class T>
struct Encode {
  static constexpr int threads = B::n * lanes / 8, resident = 0;
  using Shared = SharedGroup<B>;
  using Row = math::BlockRow<B>;

  BlockEncode args;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& worker, Shared& s) const {
    const Row row{args.x.cols};
    const std::int64_t groups = row.groups();
    for (std::int64_t unit = worker.block(); unit < args.x.rows * groups; unit += worker.blocks()) {
      const RowAndRest at = row_and_rest(unit, groups);
      const int blocks = row.lanes(at.rest), elements = row.elements(at.rest), count = blocks * B::n;
      const T* x = row_of<T>(args.x, at.row) + at.rest * Row::group;
      std::uint8_t* packed = args.packed.data + at.row * args.packed.stride;
      share(worker, count / 8, [&](std::int64_t u) {
        const int left = elements - 8 * int(u), n = left >= 8 ? 8 : left > 0 ? left : 0;
        const Eight<T> v = load_eight(x + 8 * u, n, wide);
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k)
          s.t[math::block_place(8 * int(u) + k, blocks)] = k < n ? float(value<compute_t<T>>(v.e[k])) : 0.f;
      });
      worker.sync();
      // Lanes without a block would read what nobody wrote.
      share(worker, std::int64_t{lanes - blocks} * B::n, [&](std::int64_t i) {
        const int spare = lanes - blocks;
        s.t[i / spare * lanes + blocks + i % spare] = 0.f;
      });
      worker.sync();
      if constexpr (B::rotated) rotate(worker, s);
      share(worker, blocks, [&](std::int64_t l) {
        float extreme = 0, squares = 0, check = 0;
        for (std::int64_t i = 0; i < B::n; ++i) {
          const float v = s.t[i * lanes + l];
          extreme = ::fabsf(v) > ::fabsf(extreme) ? v : extreme;
          if constexpr (!B::rotated) check = check + v * 0.f;
          if constexpr (math::scale_of_squares<B>) squares = squares + v * v;
        }
        const float of = math::scale_of_squares<B> && !args.stochastic ? squares : extreme;
        const math::BlockScale scale = math::block_scale<B>(of, B::rotated ? s.t[l] : check, args.stochastic);
        s.factor[l] = scale.inverse;
        std::uint8_t* out = packed + row.scale_byte(at.rest) + 2 * l;
        out[0] = std::uint8_t(scale.bits), out[1] = std::uint8_t(scale.bits >> 8);
      });
      worker.sync();
      const std::int64_t first = at.row * row.blocks() * B::n + at.rest * Row::group;
      share(worker, count / 8, [&](std::int64_t u) {
        math::PhiloxBlock draws{};
        if (args.stochastic) draws = math::philox_block(args.seed, args.offset, std::uint64_t(first / 8 + u));
        std::uint8_t code[8];
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          const int at_k = math::block_place(8 * int(u) + k, blocks);
          const float t = s.t[at_k], inverse = s.factor[at_k % lanes];
          if constexpr (!B::rotated) {
            code[k] = math::fp8_code<B>(t * inverse);
          } else if (args.stochastic) {
            const std::uint32_t half = draws.word[k / 2] >> (k % 2 * 16) & 0xffff;
            code[k] = std::uint8_t(std::int32_t(math::block_code<B>(t, inverse, math::unit_of_half<float>(half))));
          } else {
            code[k] = std::uint8_t(std::int32_t(math::block_code<B>(t, inverse)));
          }
        }
        math::pack_fields<B::bits>(code, packed + row.code_byte(at.rest) + u * B::bits, 8);
      });
      if (at.rest == groups - 1) {
        const std::int64_t used = row.scale_byte(at.rest) + std::int64_t{2} * blocks;
        share(worker, row.bytes() - used, [&](std::int64_t i) { packed[used + i] = 0; });
      }
      worker.sync();
    }
  }
};

template <class B, class T>
struct Decode {
  static constexpr int threads = B::n * lanes / 8, resident = 0;
  using Shared = SharedGroup<B>;
  using Row = math::BlockRow<B>;

  BlockDecode args;
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& worker, Shared& s) const {
    const Row row{args.x.cols};
    const std::int64_t groups = row.groups();
    for (std::int64_t unit = worker.block(); unit < args.x.rows * groups; unit += worker.blocks()) {
      const RowAndRest at = row_and_rest(unit, groups);
      const int blocks = row.lanes(at.rest), elements = row.elements(at.rest), count = blocks * B::n;
      const std::uint8_t* packed = args.packed.data + at.row * args.packed.stride;
      T* x = row_of<T>(args.x, at.row) + at.rest * Row::group;
      share(worker, lanes, [&](std::int64_t l) {
        const std::uint8_t* in = packed + row.scale_byte(at.rest) + 2 * l;
        s.factor[l] = l < blocks ? math::block_factor<B>(std::uint16_t(in[0] | in[1] << 8)) : 0.f;
      });
      share(worker, std::int64_t{lanes - blocks} * B::n, [&](std::int64_t i) {
        const int spare = lanes - blocks;
        s.t[i / spare * lanes + blocks + i % spare] = 0.f;
      });
      share(worker, count / 8, [&](std::int64_t u) {
        std::uint8_t code[8];
        math::unpack_fields<B::bits>(packed + row.code_byte(at.rest) + u * B::bits, code, 8);
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          const int to = math::block_place(8 * int(u) + k, blocks);
          if constexpr (B::rotated) {
            s.t[to] = math::block_whole<B>(float(int(code[k])));
          } else {
            s.t[to] = math::fp8_value<B>(code[k]);
          }
        }
      });
      worker.sync();
      if constexpr (B::rotated) rotate(worker, s);
      share(worker, count / 8, [&](std::int64_t u) {
        const int left = elements - 8 * int(u), n = left >= 8 ? 8 : left > 0 ? left : 0;
        Eight<T> v;
        UNSWAG_UNROLL
        for (int k = 0; k < 8; ++k) {
          const int from = math::block_place(8 * int(u) + k, blocks);
          v.e[k] = element<T>(s.t[from] * s.factor[from % lanes]);
        }
        store_eight(x + 8 * u, v, n, wide);
      });
      worker.sync();
    }
  }
};

}  // namespace

void block_encode(const BlockEncode& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::visit_blocks(args.codec, [&](auto codec) {
      using B = decltype(codec);
      const Encode<B, T> kernel{args, aligned<T>(args.x)};
      launch(kernel, args.x.rows * math::BlockRow<B>{args.x.cols}.groups(), stream);
    });
  });
}

void block_decode(const BlockDecode& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::visit_blocks(args.codec, [&](auto codec) {
      using B = decltype(codec);
      const Decode<B, T> kernel{args, aligned<T>(args.x)};
      launch(kernel, args.x.rows * math::BlockRow<B>{args.x.cols}.groups(), stream);
    });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
