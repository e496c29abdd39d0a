// A store for what is needed later: blocks of bytes go to host memory or to a file, and come back verified.  docs/store.md has
// the format and says what happens when something fails.
//
//   Store store;
//   Status status = Store::open({.tier = Tier::disk, .dir = "/scratch", .limit = 64 * GiB}, &store);
//   status = store.put(x, bytes, "f32 [4096, 576]", &ticket);   // x may be overwritten now
//   status = store.prefetch(ticket);
//   status = store.get(ticket, x);                                // the same bytes, or an error
//   status = store.drop(ticket);
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "unswag/status.hpp"

namespace unswag {

struct Medium;

enum class Tier : std::uint8_t { host, disk };

struct StoreOptions {
  Tier tier = Tier::host;
  std::string dir = {};     // of the file; empty: $TMPDIR, or /tmp
  std::int64_t limit = -1;  // of the bytes that the blocks take, with headers and padding; negative: what there is
  int threads = 2;          // that read and write the file
};

struct StoreStats {
  std::int64_t blocks = 0;   // that can be read now
  std::int64_t bytes = 0;    // of their data
  std::int64_t peak = 0;     // the most that `bytes` has been
  std::int64_t space = 0;    // taken from the medium: the size of the file, or host memory
  std::int64_t buffers = 0;  // bytes of host memory through which a file is read and written
  std::string place;         // the memory and its folder, as in messages
  bool direct = false;       // the file passes the system's page cache by
  bool ram_disk = false;     // the folder is in memory, so that nothing is saved
};

// Any thread may call anything but the destructor and move at any time.  In the child of a fork every call is device_error: the
// threads and the file are the parent's.
class Store {
 public:
  using Ticket = std::uint64_t;  // of a block; never used again

  Store() noexcept;  // every call is invalid_argument until it is opened
  Store(Store&& other) noexcept;
  Store& operator=(Store&& other) noexcept;
  // Blocks end with the store; the file has no name, so it ends with the process at the latest.
  ~Store();

  // invalid_argument: options.  device_error: the file cannot be made, or the memory cannot be reserved.
  static Status open(const StoreOptions& options, Store* store);
  // Over a medium of one's own; `options.tier` and `options.dir` are not read.  For tests.
  static Status open(const StoreOptions& options, Medium medium, Store* store);

  // Takes a copy of `bytes` bytes and returns; threads write it.  `label` (at most kLongestLabel bytes) is whatever says how
  // the block is to be read; it is stored and verified with it.  Waits while all buffers are in use. device_error: no room, or
  // a block that somebody still holds could not be written since the last put; that one is said once, and by each get of the
  // block.
  Status put(const void* data, std::int64_t bytes, std::string_view label, Ticket* ticket);
  // Begins to read the block, as far as there are buffers that nobody needs.
  Status prefetch(Ticket ticket);
  // The block at `data`, any number of times.  device_error, and undefined bytes at `data`: it was not written, or what was
  // read is not what was put.
  Status get(Ticket ticket, void* data);
  // The space may be used again.  invalid_argument: there is no such block.
  Status drop(Ticket ticket);
  // Drops all blocks and gives the space back to the system.
  Status clear();

  StoreStats stats() const;

  static constexpr std::int64_t kLongestLabel = 2048;

 private:
  class State;
  std::unique_ptr<State> state_;
};

}  // namespace unswag
