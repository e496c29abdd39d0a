// What a store writes to and reads from: offsets from 0.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "unswag/status.hpp"

namespace unswag {

// Functions may be called by several threads at once, for stretches that do not overlap, and may not throw.
struct Medium {
  std::string place;           // in messages: "the disk store in /scratch"
  std::int64_t alignment = 1;  // of offsets, sizes and addresses
  bool staged = false;         // written and read by threads, through buffers
  bool direct = false;         // as StoreStats
  bool ram_disk = false;
  // Bytes that were transferred, which may be fewer, or -errno.
  std::function<std::int64_t(void* data, std::int64_t bytes, std::int64_t at)> read;
  std::function<std::int64_t(const void* data, std::int64_t bytes, std::int64_t at)> write;
  // The medium ends at `after` from now on, and ended at `before`; 0 or -errno, and then nothing has changed.
  std::function<std::int64_t(std::int64_t before, std::int64_t after)> resize;
};

// A file without a name in that folder.
Status open_disk(const std::string& dir, Medium* medium);
// Address space for `limit` bytes (negative: as many as the machine has); memory is taken as it grows.
Status open_host(std::int64_t limit, Medium* medium);

// Bytes of host memory that this process may still take: what the system has available, within the limits of its control
// groups.
std::int64_t available_memory();

}  // namespace unswag
