// Block codecs: sixteen blocks at a time, one in each lane.
#include "backend.hpp"
#include "cpu/draws.hpp"
#include "cpu/lanes.hpp"
#include "cpu/threads.hpp"
#include "math/blocks.hpp"
#include "math/fields.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

constexpr int lanes = math::block_lanes;

template <class B>
struct Group {
  static constexpr int n = B::n, size = n * lanes;
  alignas(64) float t[size];

  template <class T>
  void load(const T* x, int elements, int blocks) {
    if (elements == size) {
      for (int i = 0; i < size; i += lanes) f32x16::load(x + i).store(t + i);
      return;
    }
    memset(t, 0, sizeof t);
    alignas(64) float all[size] = {};
    each_lanes(elements, [&](std::int64_t i, std::int64_t count) { load_lanes<f32x16>(x + i, count).store(all + i); });
    for (int e = 0; e < elements; ++e) t[math::block_place(e, blocks)] = all[e];
  }
  template <class T>
  void store(T* x, int elements, int blocks) const {
    if (elements == size) {
      for (int i = 0; i < size; i += lanes) f32x16::load(t + i).store(x + i);
      return;
    }
    alignas(64) float all[size];
    for (int e = 0; e < elements; ++e) all[e] = t[math::block_place(e, blocks)];
    each_lanes(elements, [&](std::int64_t i, std::int64_t count) { store_lanes(x + i, f32x16::load(all + i), count); });
  }
  void rotate() {
    for (int half = 1; half < n; half *= 2) {
      for (int i = 0; i < n; i += 2 * half) {
        for (int k = i; k < i + half; ++k) {
          f32x16 a = f32x16::load(t + k * lanes), b = f32x16::load(t + (k + half) * lanes);
          math::butterfly(a, b);
          a.store(t + k * lanes), b.store(t + (k + half) * lanes);
        }
      }
    }
  }

  // The scale of each block, and what its numbers are multiplied by.
  void scales(bool stochastic, std::uint16_t (&bits)[lanes], float (&inverse)[lanes]) const {
    f32x16 extreme(0.f), squares(0.f), check(0.f);
    for (int i = 0; i < size; i += lanes) {
      const f32x16 v = f32x16::load(t + i);
      extreme = select(abs(v) > abs(extreme), v, extreme);
      if constexpr (!B::rotated) check = check + v * f32x16(0.f);
      if constexpr (math::scale_of_squares<B>) squares = squares + v * v;
    }
    float of[lanes], first[lanes];
    (math::scale_of_squares<B> && !stochastic ? squares : extreme).store(of);
    (B::rotated ? f32x16::load(t) : check).store(first);
    for (int l = 0; l < lanes; ++l) {
      const math::BlockScale scale = math::block_scale<B>(of[l], first[l], stochastic);
      bits[l] = scale.bits, inverse[l] = scale.inverse;
    }
  }
};

template <class B, class T>
void encode(const BlockEncode& args, Stream stream) {
  const math::BlockRow<B> row_of{args.x.cols};
  const std::int64_t groups = row_of.groups();
  const Draws draws{args.seed, args.offset};
  parallel_for(args.x.rows * groups, 32768 / row_of.group, stream.threads, [&](std::int64_t begin, std::int64_t end) {
    Group<B> group;
    Window window;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t r = i / groups, g = i % groups;
      const int blocks = row_of.lanes(g), count = blocks * B::n;
      std::uint8_t* packed = args.packed.data + r * args.packed.stride;
      group.load(row<T>(args.x, r) + g * row_of.group, row_of.elements(g), blocks);
      if constexpr (B::rotated) group.rotate();
      std::uint16_t bits[lanes];
      float inverse[lanes];
      group.scales(args.stochastic, bits, inverse);
      const f32x16 factor = f32x16::load(inverse);
      std::uint8_t code[Group<B>::size];
      if constexpr (!B::rotated) {
        for (int k = 0; k < B::n * lanes; ++k) code[k] = math::fp8_code<B>(group.t[k] * inverse[k % lanes]);
      } else if (args.stochastic) {
        float all[Group<B>::size], u[Group<B>::size] = {};
        window.units(draws, r * row_of.blocks() * B::n + g * row_of.group, count, all);
        for (int e = 0; e < count; ++e) u[math::block_place(e, blocks)] = all[e];
        for (int k = 0; k < B::n * lanes; k += lanes)
          math::block_code<B>(f32x16::load(group.t + k), factor, f32x16::load(u + k)).store(group.t + k);
      } else {
        for (int k = 0; k < B::n * lanes; k += lanes) math::block_code<B>(f32x16::load(group.t + k), factor).store(group.t + k);
      }
      if constexpr (B::rotated) {
        for (int k = 0; k < B::n * lanes; ++k) code[k] = std::uint8_t(std::int32_t(group.t[k]));
      }
      if (blocks < lanes) {
        for (int e = 0; e < count; ++e) code[e] = code[math::block_place(e, blocks)];
      }
      math::pack_fields<B::bits>(code, packed + row_of.code_byte(g), count);
      memcpy(packed + row_of.scale_byte(g), bits, std::size_t(blocks) * sizeof *bits);
      if (g == groups - 1) {
        const std::int64_t used = row_of.scale_byte(g) + std::int64_t{2} * blocks;
        memset(packed + used, 0, std::size_t(row_of.bytes() - used));
      }
    }
  });
}

template <class B, class T>
void decode(const BlockDecode& args, Stream stream) {
  const math::BlockRow<B> row_of{args.x.cols};
  const std::int64_t groups = row_of.groups();
  parallel_for(args.x.rows * groups, 32768 / row_of.group, stream.threads, [&](std::int64_t begin, std::int64_t end) {
    Group<B> group;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t r = i / groups, g = i % groups;
      const int blocks = row_of.lanes(g), count = blocks * B::n;
      const std::uint8_t* packed = args.packed.data + r * args.packed.stride;
      std::uint16_t bits[lanes] = {};
      memcpy(bits, packed + row_of.scale_byte(g), std::size_t(blocks) * sizeof *bits);
      float factors[lanes];
      for (int l = 0; l < lanes; ++l) factors[l] = math::block_factor<B>(bits[l]);
      std::uint8_t code[Group<B>::size];
      math::unpack_fields<B::bits>(packed + row_of.code_byte(g), code, count);
      if (blocks < lanes) {
        for (int e = count - 1; e >= 0; --e) code[math::block_place(e, blocks)] = code[e];  // from the end: places lie behind
        for (int k = 0; k < B::n * lanes; ++k)
          if (k % lanes >= blocks) code[k] = 0;
      }
      if constexpr (B::rotated) {
        for (int k = 0; k < B::n * lanes; ++k) group.t[k] = float(std::int32_t(code[k]));
        for (int k = 0; k < B::n * lanes; k += lanes) math::block_whole<B>(f32x16::load(group.t + k)).store(group.t + k);
        group.rotate();
      } else {
        for (int k = 0; k < B::n * lanes; ++k) group.t[k] = math::fp8_value<B>(code[k]);
      }
      const f32x16 factor = f32x16::load(factors);
      for (int k = 0; k < B::n * lanes; k += lanes) (f32x16::load(group.t + k) * factor).store(group.t + k);
      group.store(row<T>(args.x, r) + g * row_of.group, row_of.elements(g), blocks);
    }
  });
}

}  // namespace

void block_encode(const BlockEncode& args, Stream stream) {
  visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::visit_blocks(args.codec, [&](auto codec) { encode<decltype(codec), T>(args, stream); });
  });
}

void block_decode(const BlockDecode& args, Stream stream) {
  visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    math::visit_blocks(args.codec, [&](auto codec) { decode<decltype(codec), T>(args, stream); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
