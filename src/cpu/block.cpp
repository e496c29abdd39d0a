// Block codecs: sixteen blocks at a time, one in each lane.
#include "backend.hpp"
#include "cpu/draws.hpp"
#include "cpu/elementwise.hpp"
#include "cpu/fields.hpp"
#include "cpu/lanes.hpp"
#include "cpu/simd/narrow.hpp"
#include "cpu/threads.hpp"
#include "math/blocks.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

constexpr int lanes = math::block_lanes;

// The registers of which V is made.
template <class V>
constexpr auto register_of(V v) {
  if constexpr (requires { v.low; }) {
    return register_of(v.low);
  } else {
    return v;
  }
}
using Register = decltype(register_of(f32x16()));

// f(0), ..., f(n - 1), each for itself.
template <int n, class F>
UNSWAG_INLINE void each(const F& f) {
  [&]<int... k>(std::integer_sequence<int, k...>)
      __attribute__((always_inline)) { (f(k), ...); }(std::make_integer_sequence<int, n>());
}

// Butterflies of as many halvings as there are registers.
template <int half = 1, int radix, class R>
UNSWAG_INLINE void rotate(R (&v)[radix]) {
  if constexpr (half < radix) {
    each<radix / 2>([&](int pair) __attribute__((always_inline)) {
      const int k = pair / half * 2 * half + pair % half;
      butterfly(v[k], v[k + half]);
    });
    rotate<2 * half>(v);
  }
}

// H of n numbers, that many at a time in registers: adjacent ones, and then those so far apart.  v = load(k) begins, keep(k, v)
// and again(k) hold what lies between, done(k, v) ends.
template <int n, class R, class Load, class Keep, class Again, class Done>
UNSWAG_INLINE void rotate(const Load& load, const Keep& keep, const Again& again, const Done& done) {
  constexpr int near = n < registers_at_once ? n : registers_at_once, far = n / near;
  static_assert(far <= registers_at_once, "a third pass would be needed");
#pragma GCC unroll 1
  for (int first = 0; first < n; first += near) {
    R v[near];
    each<near>([&](int k) __attribute__((always_inline)) { v[k] = load(first + k); });
    rotate(v);
    each<near>([&](int k) __attribute__((always_inline)) {
      if constexpr (far == 1) {
        done(k, v[k]);
      } else {
        keep(first + k, v[k]);
      }
    });
  }
  if constexpr (far > 1) {
#pragma GCC unroll 1
    for (int first = 0; first < near; ++first) {
      R v[far];
      each<far>([&](int k) __attribute__((always_inline)) { v[k] = again(first + near * k); });
      rotate(v);
      each<far>([&](int k) __attribute__((always_inline)) { done(first + near * k, v[k]); });
    }
  }
}

// The last group of a row may have fewer blocks: its numbers on their way to sixteen lanes and back.  Lanes without a block get
// what belongs to others, and nobody reads theirs.
template <int n, class T>
UNSWAG_INLINE void widen(T (&to)[n * lanes], const T* from, int blocks) {
  for (int k = 0; k < n; ++k) memcpy(to + k * lanes, from + k * blocks, lanes * sizeof(T));
}
template <int n, class T>
UNSWAG_INLINE void narrow(T* to, const T (&from)[n * lanes], int blocks) {
  for (int k = 0; k < n; ++k) memcpy(to + k * blocks, from + k * lanes, lanes * sizeof(T));
}

// The t of a group, and what its scales are made of.
template <class B>
struct Group {
  static constexpr int n = B::n, size = n * lanes;
  alignas(64) float t[size];

  // t = H x; greatest and least: of each block.
  template <class T>
  UNSWAG_INLINE void load_rotated(const T* x, f32x16& greatest, f32x16& least) {
    alignas(64) float high[lanes], low[lanes];
#pragma GCC unroll 1
    for (int lane = 0; lane < lanes; lane += Register::size) {
      Register top(0.f), bottom(0.f);
      rotate<n, Register>(
          [&](int k) __attribute__((always_inline)) {
            if (lane == 0) prefetch(x + k * lanes);
            return load_numbers<Register>(x + k * lanes + lane);
          },
          [&](int k, Register v) __attribute__((always_inline)) { v.store(t + k * lanes + lane); },
          [&](int k) __attribute__((always_inline)) { return Register::load(t + k * lanes + lane); },
          [&](int k, Register v) __attribute__((always_inline)) {
            top = max(v, top), bottom = min(v, bottom);
            v.store(t + k * lanes + lane);
          });
      top.store(high + lane), bottom.store(low + lane);
    }
    greatest = f32x16::load(high), least = f32x16::load(low);
  }

  // Of each block the t of largest magnitude, the first of several.
  UNSWAG_INLINE f32x16 extreme(f32x16 greatest, f32x16 least) const {
    if (((greatest == -least) & (greatest != f32x16(0.f))).bits() == 0) return select(greatest > -least, greatest, least);
    f32x16 extreme(0.f);
    for (int i = 0; i < size; i += lanes) {
      const f32x16 v = f32x16::load(t + i);
      extreme = select(abs(v) > abs(extreme), v, extreme);
    }
    return extreme;
  }
  UNSWAG_INLINE f32x16 squares() const {
    f32x16 sum(0.f);
    for (int i = 0; i < size; i += lanes) sum = sum + f32x16::load(t + i) * f32x16::load(t + i);
    return sum;
  }
};

template <class B, class T>
void encode(const BlockEncode& args, Stream stream) {
  using G = Group<B>;
  // Scales are a long chain of dependent steps: those of several groups are made together.
  constexpr int batch = G::size < 2048 ? 2048 / G::size : 1;
  const math::BlockRow<B> row_of{args.x.cols};
  const std::int64_t groups = row_of.groups();
  const Draws draws{args.seed, args.offset};
  const bool stochastic = args.stochastic;
  parallel_for(args.x.rows * groups, 32768 / row_of.group, stream.threads, [&](std::int64_t begin, std::int64_t end) {
    G group[batch];
    alignas(64) float of[batch * lanes], first[batch * lanes], inverse[batch * lanes];
    std::uint16_t bits[batch * lanes];
    Window window;
    for (std::int64_t i = begin; i < end; i += batch) {
      const int many = end - i < batch ? int(end - i) : batch;
      for (int j = 0; j < many; ++j) {
        const std::int64_t r = (i + j) / groups, g = (i + j) % groups;
        const T* x = row<T>(args.x, r) + g * row_of.group;
        T padded[G::size + lanes], wide[G::size];
        if (row_of.elements(g) < G::size) {
          memset(padded, 0, sizeof padded);
          memcpy(padded, x, std::size_t(row_of.elements(g)) * sizeof(T));
          widen<B::n>(wide, padded, row_of.lanes(g));
          x = wide;
        }
        if constexpr (B::rotated) {
          f32x16 greatest, least;
          group[j].load_rotated(x, greatest, least);
          (math::scale_of_squares<B> && !stochastic ? group[j].squares() : group[j].extreme(greatest, least))
              .store(of + j * lanes);
          f32x16::load(group[j].t).store(first + j * lanes);
        } else {
          f32x16 extreme(0.f), check(0.f);
          for (int k = 0; k < G::size; k += lanes) {
            const f32x16 v = f32x16::load(x + k);
            extreme = select(abs(v) > abs(extreme), v, extreme);
            check = check + v * f32x16(0.f);
            v.store(group[j].t + k);
          }
          extreme.store(of + j * lanes), check.store(first + j * lanes);
        }
      }
      for (int l = 0; l < many * lanes; ++l) {
        const math::BlockScale scale = math::block_scale<B>(of[l], first[l], stochastic);
        bits[l] = scale.bits, inverse[l] = scale.inverse;
      }
      for (int j = 0; j < many; ++j) {
        const std::int64_t r = (i + j) / groups, g = (i + j) % groups;
        const int blocks = row_of.lanes(g), count = blocks * B::n;
        std::uint8_t* packed = args.packed.data + r * args.packed.stride;
        std::uint8_t code[G::size], narrowed[G::size + lanes];
        const float* t = group[j].t;
        const f32x16 factor = f32x16::load(inverse + j * lanes);
        if constexpr (!B::rotated) {
          for (int k = 0; k < G::size; ++k) code[k] = math::fp8_code<B>(t[k] * inverse[j * lanes + k % lanes]);
        } else if (stochastic) {
          float u[G::size], wide[G::size + lanes];
          window.units(draws, r * row_of.blocks() * B::n + g * row_of.group, count, blocks < lanes ? wide : u);
          if (blocks < lanes) widen<B::n>(u, wide, blocks);
          for (int k = 0; k < G::size; k += 2 * lanes)
            store_low_bytes(code + k, math::block_code_and_rest<B>(f32x16::load(t + k), factor, f32x16::load(u + k)),
                            math::block_code_and_rest<B>(f32x16::load(t + k + lanes), factor, f32x16::load(u + k + lanes)));
        } else {
          for (int k = 0; k < G::size; k += 2 * lanes)
            store_low_bytes(code + k, math::block_code_and_rest<B>(f32x16::load(t + k), factor),
                            math::block_code_and_rest<B>(f32x16::load(t + k + lanes), factor));
        }
        if (blocks < lanes) narrow<B::n>(narrowed, code, blocks);
        pack_codes<B::bits>(blocks < lanes ? narrowed : code, packed + row_of.code_byte(g), count);
        memcpy(packed + row_of.scale_byte(g), bits + j * lanes, std::size_t(blocks) * sizeof *bits);
        if (g == groups - 1) {
          const std::int64_t used = row_of.scale_byte(g) + std::int64_t{2} * blocks;
          memset(packed + used, 0, std::size_t(row_of.bytes() - used));
        }
      }
    }
  });
}

template <class B, class T>
void decode(const BlockDecode& args, Stream stream) {
  constexpr int size = B::n * lanes;
  const math::BlockRow<B> row_of{args.x.cols};
  const std::int64_t groups = row_of.groups();
  const bool large = args.x.rows * args.x.cols * std::int64_t(sizeof(T)) > stream_above;
  parallel_for(args.x.rows * groups, 32768 / row_of.group, stream.threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t r = i / groups, g = i % groups;
      const int blocks = row_of.lanes(g);
      const std::uint8_t* packed = args.packed.data + r * args.packed.stride;
      std::uint16_t bits[lanes] = {};
      memcpy(bits, packed + row_of.scale_byte(g), std::size_t(blocks) * sizeof *bits);
      float factors[lanes];
      for (int l = 0; l < lanes; ++l) factors[l] = math::block_factor<B>(bits[l]);
      std::uint8_t code[size];
      if (blocks == lanes) {
        unpack_codes<B::bits>(packed + row_of.code_byte(g), code, size);
      } else {
        std::uint8_t narrowed[size + lanes] = {};
        unpack_codes<B::bits>(packed + row_of.code_byte(g), narrowed, blocks * B::n);
        widen<B::n>(code, narrowed, blocks);
      }
      T* const x = row<T>(args.x, r) + g * row_of.group;
      const bool whole = row_of.elements(g) == size, streaming = whole && large && aligned(x, 16);
      T wide[size], *const to = whole && !streaming ? x : wide;
      if constexpr (B::rotated) {
        const Scale<T> scale(factors);
        std::int16_t t[size];
        rotate<B::n, i16x16>(
            [&](int k) __attribute__((always_inline)) { return math::block_whole<B>(i16x16::load(code + k * lanes)); },
            [&](int k, i16x16 v) __attribute__((always_inline)) { v.store(t + k * lanes); },
            [&](int k) __attribute__((always_inline)) { return i16x16::load(t + k * lanes); },
            [&](int k, i16x16 v) __attribute__((always_inline)) { scale.store(to + k * lanes, v); });
      } else {
        const f32x16 factor = f32x16::load(factors);
        float value[size];
        for (int k = 0; k < size; ++k) value[k] = math::fp8_value<B>(code[k]);
        for (int k = 0; k < size; k += lanes) (f32x16::load(value + k) * factor).store(to + k);
      }
      if (streaming) {
        stream_copy(x, wide, size);
      } else if (!whole) {
        T narrowed[size + lanes];
        narrow<B::n>(narrowed, wide, blocks);
        memcpy(x, narrowed, std::size_t(row_of.elements(g)) * sizeof(T));
      }
    }
    if (large) stream_fence();
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
