// CRC-32C (Castagnoli), the checksum of the store's blocks: it finds every change of up to 32 neighbouring bits and misses
// another one in 2^32.
#pragma once

#include <cstdint>

namespace unswag {

// Of what `crc` is the checksum of, followed by `bytes` bytes; 0 is the checksum of nothing.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::int64_t bytes);
// The same without the processor's instruction, for tests.
std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::int64_t bytes);

}  // namespace unswag
