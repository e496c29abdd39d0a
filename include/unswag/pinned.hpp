// Page-locked host memory, for copies between device and host.  Page-locking is a call into the driver for every block, so
// blocks that come back are kept for the next request of their size.  What the arena holds, in use and kept, never exceeds a
// limit, and is counted as it is page-locked: with the rounding.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "unswag/status.hpp"

namespace unswag {

// Where an arena has its memory from.  Called by one thread at a time; may not throw and may not call the arena.
struct PinnedSource {
  std::function<void*(std::int64_t bytes)> allocate;            // null: refused
  std::function<void(void* data, std::int64_t bytes)> release;  // the bytes that were asked for
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
  // Gives back what is cached.  Blocks that a PinnedBlock holds stay valid, and go to the source when it lets go of them; those
  // that allocate() handed out and release() did not get back stay page-locked until the process ends, because a copy may
  // still be running into them.
  ~PinnedArena();
  PinnedArena(const PinnedArena&) = delete;
  PinnedArena& operator=(const PinnedArena&) = delete;

  // `bytes` bytes at `*data`, their content undefined; null for 0 bytes.  When a new block would exceed the limit, cached ones
  // are given back, those first that have lain longest; when the source refuses, all of them, and it is asked once more.
  // invalid_argument: bytes or the limit is negative; device_error: it does not fit, or the source refused.
  Status allocate(std::int64_t bytes, void** data);
  // invalid_argument: `data` is not a block of this arena, or was released already; nothing is changed then.  Calls no source.
  Status release(void* data);

  PinnedStats stats() const;

  // What a request of 0 <= bytes <= 2^62 takes: whole pages, as the driver locks no less, and for each doubling 8 sizes,
  // so that less than a page or an eighth of the request is lost, whichever is more, and requests of nearly one size share.
  static std::int64_t rounded(std::int64_t bytes);

 private:
  friend class PinnedBlock;
  class State;
  std::shared_ptr<State> state_;
};

// A block that returns to its arena by itself.  It may outlive the arena.
class PinnedBlock {
 public:
  PinnedBlock() = default;
  PinnedBlock(PinnedBlock&& other) noexcept { swap(other); }
  PinnedBlock& operator=(PinnedBlock&& other) noexcept;
  ~PinnedBlock();

  // As PinnedArena::allocate; what `*block` held before is let go of first.
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
