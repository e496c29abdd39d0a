#include "store/crc32c.hpp"

#include <array>
#include <bit>
#include <cstddef>
#include <cstring>

#ifdef __x86_64__
#include <nmmintrin.h>
#endif

namespace unswag {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78;  // reflected: bit 31 is x^0

using Table = std::array<std::uint32_t, 256>;

// table[k][b]: the register after byte b and k zero bytes.
constexpr std::array<Table, 8> make_tables() {
  std::array<Table, 8> tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t r = b;
    for (int i = 0; i < 8; ++i) r = (r >> 1) ^ ((r & 1) != 0 ? kPolynomial : 0);
    tables[0][b] = r;
  }
  for (std::size_t k = 1; k < 8; ++k)
    for (std::size_t b = 0; b < 256; ++b) tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 255];
  return tables;
}
constexpr std::array<Table, 8> kTables = make_tables();

constexpr std::uint32_t step(std::uint32_t r, std::uint8_t byte) { return (r >> 8) ^ kTables[0][(r ^ byte) & 255]; }

std::uint64_t load(const std::uint8_t* p) {
  std::uint64_t word = 0;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// Eight bytes at a time by eight tables (Kounavis and Berry 2005, "slicing by 8").
std::uint32_t run_tables(std::uint32_t r, const std::uint8_t* p, std::int64_t n) {
  if constexpr (std::endian::native == std::endian::little) {
    for (; n >= 8; p += 8, n -= 8) {
      const std::uint64_t word = load(p) ^ r;
      r = 0;
      for (std::size_t k = 0; k < 8; ++k) r ^= kTables[7 - k][(word >> (8 * k)) & 255];
    }
  }
  for (; n > 0; ++p, --n) r = step(r, *p);
  return r;
}

#ifdef __x86_64__

// The instruction takes three cycles, and one can begin in each cycle: so three lanes of kLane bytes run side by side.  The
// register is linear in what it holds, so lanes are joined by the register after kLane zero bytes: kAfterLane[i][b] is that of
// byte i of the register being b.
constexpr std::int64_t kLane = 1024;
constexpr std::array<Table, 4> make_lane_tables() {
  std::array<std::uint32_t, 32> after{};  // of each bit
  for (std::size_t bit = 0; bit < 32; ++bit) {
    std::uint32_t r = std::uint32_t{1} << bit;
    for (std::int64_t i = 0; i < kLane; ++i) r = step(r, 0);
    after[bit] = r;
  }
  std::array<Table, 4> tables{};
  for (std::size_t i = 0; i < 4; ++i)
    for (std::size_t b = 0; b < 256; ++b)
      for (std::size_t bit = 0; bit < 8; ++bit)
        if ((b >> bit & 1) != 0) tables[i][b] ^= after[8 * i + bit];
  return tables;
}
constexpr std::array<Table, 4> kAfterLane = make_lane_tables();

std::uint32_t after_lane(std::uint32_t r) {
  return kAfterLane[0][r & 255] ^ kAfterLane[1][r >> 8 & 255] ^ kAfterLane[2][r >> 16 & 255] ^ kAfterLane[3][r >> 24];
}

__attribute__((target("sse4.2"))) std::uint32_t run_instruction(std::uint32_t start, const std::uint8_t* p, std::int64_t n) {
  std::uint64_t r = start;
  for (; n >= 3 * kLane; p += 3 * kLane, n -= 3 * kLane) {
    std::uint64_t s = 0;
    std::uint64_t t = 0;
    for (std::int64_t i = 0; i < kLane; i += 8) {
      r = _mm_crc32_u64(r, load(p + i));
      s = _mm_crc32_u64(s, load(p + kLane + i));
      t = _mm_crc32_u64(t, load(p + 2 * kLane + i));
    }
    r = after_lane(after_lane(std::uint32_t(r)) ^ std::uint32_t(s)) ^ std::uint32_t(t);
  }
  for (; n >= 8; p += 8, n -= 8) r = _mm_crc32_u64(r, load(p));
  auto last = std::uint32_t(r);
  for (; n > 0; ++p, --n) last = _mm_crc32_u8(last, *p);
  return last;
}

#endif

}  // namespace

std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::int64_t bytes) {
  return ~run_tables(~crc, static_cast<const std::uint8_t*>(data), bytes);
}

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::int64_t bytes) {
#ifdef __x86_64__
  static const bool instruction = __builtin_cpu_supports("sse4.2") != 0;
  if (instruction) return ~run_instruction(~crc, static_cast<const std::uint8_t*>(data), bytes);
#endif
  return crc32c_portable(crc, data, bytes);
}

}  // namespace unswag
