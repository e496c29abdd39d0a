// Page-locked host memory, for copies between device and host.  Page-locking is a call into the driver for every block, so
// released blocks are cached for the next request of their size.  Blocks in use and cached blocks together never exceed a
// limit, counted in the bytes that are page-locked, after rounding.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "unswag/status.hpp"

namespace unswag {

// Where an arena gets its memory.  Called by one thread at a time; may not throw and may not call the arena.
struct PinnedSource {
  std::function<void*(std::int64_t bytes)> allocate;            // null: refused
  std::function<void(void* data, std::int64_t bytes)> release;  // the bytes that were requested
};

// In bytes; in_use + cached <= limit at all times, and peak is the most that in_use + cached has been.
struct PinnedStats {
  std::int64_t in_use = 0;
  std::int64_t cached = 0;
  std::int64_t peak = 0;
  std::int64_t limit = 0;
};

// Any thread may call anything but the destructor at any time.
class PinnedArena {
 public:
  // The memory is CUDA's (cudaHostAlloc, usable by every device); without unswag::cuda every request is not_supported.
  explicit PinnedArena(std::int64_t limit);
  PinnedArena(std::int64_t limit, PinnedSource source);
  // Returns cached blocks to the source.  A block that a PinnedBlock holds stays valid, and is returned when it is released.
  // Blocks from allocate() that were not passed to release() stay page-locked until the process ends, because a copy into them
  // may still be running.
  ~PinnedArena();
  PinnedArena(const PinnedArena&) = delete;
  PinnedArena& operator=(const PinnedArena&) = delete;

  // `bytes` bytes at `*data`, their content undefined; null for 0 bytes.  If a new block would exceed the limit, cached ones
  // are returned to the source, the oldest first; if the source refuses, all of them are, and it is asked once more.
  // invalid_argument: bytes or the limit is negative; device_error: it does not fit, or the source refused.
  Status allocate(std::int64_t bytes, void** data);
  // invalid_argument: `data` is not a block of this arena, or was released already; nothing changes then.  The source is not
  // called.
  Status release(void* data);

  PinnedStats stats() const;

  // The bytes that a request of 0 <= bytes <= 2^62 takes: whole pages, as the driver locks no less, in 8 sizes per doubling.
  // So less than a page or an eighth of the request is lost, whichever is more, and requests of similar sizes share blocks.
  static std::int64_t rounded(std::int64_t bytes);

 private:
  friend class PinnedBlock;
  class State;
  std::shared_ptr<State> state_;
};

// A block that its destructor releases to the arena.  It may outlive the arena.
class PinnedBlock {
 public:
  PinnedBlock() = default;
  PinnedBlock(PinnedBlock&& other) noexcept { swap(other); }
  PinnedBlock& operator=(PinnedBlock&& other) noexcept;
  ~PinnedBlock();

  // As PinnedArena::allocate; what `*block` held before is released first.
  static Status allocate(PinnedArena& arena, std::int64_t bytes, PinnedBlock* block);

  void* data() const { return data_; }
  std::int64_t size() const { return bytes_; }

 private:
  void swap(PinnedBlock& other) noexcept;

  std::shared_ptr<PinnedArena::State> state_;
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace unswag
