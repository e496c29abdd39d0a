#include "store/pinned.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <deque>
#include <limits>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace unswag {
namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 62;
constexpr std::int64_t kAll = std::numeric_limits<std::int64_t>::max();

Status refusal(std::int64_t bytes, std::int64_t size, const PinnedStats& now, const char* what, const char* remedy) {
  return device_error("PinnedArena: ", bytes, " bytes of page-locked memory (", size, " as rounded) ", what, ": ", now.in_use,
                      " in use, ", now.cached, " cached, limit ", now.limit, "; ", remedy);
}

}  // namespace

PinnedSource pinned_source(const DeviceKernels* device) {
  if (!device) return {};
  return {device->pinned_allocate, [device](void* data, std::int64_t) { device->pinned_release(data); }};
}

// The source is called without mutex_, so that a block can always be released, also by what the driver waits for inside its
// call.  Only the holder of source_mutex_ makes in_use_ + cached_ larger, so what it found to fit still fits when it has it.
class PinnedArena::State {
 public:
  State(std::int64_t limit, PinnedSource source) : source_(std::move(source)), stats_{.limit = limit} {}

  Status allocate(std::int64_t bytes, void** data);
  Status release(void* data);
  void close();
  PinnedStats stats() const {
    const std::lock_guard lock(mutex_);
    return stats_;
  }

 private:
  struct Block {
    void* data;
    std::int64_t bytes;
    std::int64_t turn;  // ascending as blocks were cached
  };

  bool reuse(std::int64_t size, void** data);
  // Cached blocks, the oldest first, of `room` bytes at least or all there are; with mutex_.  They stay counted until they are
  // given back.
  std::vector<Block> evict(std::int64_t room);
  void give_back(const std::vector<Block>& blocks);

  std::mutex source_mutex_;  // taken before mutex_
  PinnedSource source_;
  mutable std::mutex mutex_;  // of all that follows
  PinnedStats stats_;
  std::unordered_map<void*, std::int64_t> in_use_;
  std::map<std::int64_t, std::deque<Block>> cached_;  // by size, the oldest in front
  std::int64_t turn_ = 0;
  bool closed_ = false;
};

bool PinnedArena::State::reuse(std::int64_t size, void** data) {
  const std::lock_guard lock(mutex_);
  const auto found = cached_.find(size);
  if (found == cached_.end()) return false;
  *data = found->second.back().data;
  found->second.pop_back();
  if (found->second.empty()) cached_.erase(found);
  in_use_.emplace(*data, size);
  stats_.in_use += size;
  stats_.cached -= size;
  return true;
}

std::vector<PinnedArena::State::Block> PinnedArena::State::evict(std::int64_t room) {
  std::vector<Block> evicted;
  while (room > 0 && !cached_.empty()) {
    const auto oldest = std::ranges::min_element(cached_, {}, [](const auto& size) { return size.second.front().turn; });
    evicted.push_back(oldest->second.front());
    room -= oldest->first;
    oldest->second.pop_front();
    if (oldest->second.empty()) cached_.erase(oldest);
  }
  return evicted;
}

void PinnedArena::State::give_back(const std::vector<Block>& blocks) {
  for (const Block& block : blocks) {
    source_.release(block.data, block.bytes);
    const std::lock_guard lock(mutex_);
    stats_.cached -= block.bytes;
  }
}

Status PinnedArena::State::allocate(std::int64_t bytes, void** data) {
  *data = nullptr;
  if (bytes < 0) return invalid_argument("PinnedArena: bytes is ", bytes, "; pass 0 or more");
  if (stats_.limit < 0) return invalid_argument("PinnedArena: limit is ", stats_.limit, "; pass a number of bytes, 0 or more");
  if (!source_.allocate || !source_.release) {
    return not_supported("PinnedArena: there is no source of page-locked memory, because this build of UnSwag has CPU kernels ",
                         "only; build it with UNSWAG_CUDA=ON (needs nvcc), or pass a PinnedSource");
  }
  if (bytes == 0) return {};
  const std::int64_t size = bytes > kLargest ? bytes : rounded(bytes);
  if (reuse(size, data)) return {};
  const std::lock_guard source_lock(source_mutex_);
  if (reuse(size, data)) return {};  // released while this thread waited

  std::unique_lock lock(mutex_);
  if (bytes > kLargest || size > stats_.limit - stats_.in_use) {
    return refusal(bytes, size, stats_, "do not fit", "raise the limit, or release blocks first");
  }
  std::vector<Block> evicted = evict(size - (stats_.limit - stats_.in_use - stats_.cached));
  lock.unlock();
  give_back(evicted);
  *data = source_.allocate(size);
  if (!*data) {
    lock.lock();
    evicted = evict(kAll);
    lock.unlock();
    give_back(evicted);
    if (!evicted.empty()) *data = source_.allocate(size);
  }
  lock.lock();
  if (!*data) {
    return refusal(
        bytes, size, stats_, "were refused by their source",
        "free host memory or raise the system's limit of locked memory; cuda_problem says whether a device is there");
  }
  in_use_.emplace(*data, size);
  stats_.in_use += size;
  stats_.peak = std::max(stats_.peak, stats_.in_use + stats_.cached);
  return {};
}

Status PinnedArena::State::release(void* data) {
  if (!data) return {};
  std::unique_lock lock(mutex_);
  const auto found = in_use_.find(data);
  if (found == in_use_.end()) {
    return invalid_argument("PinnedArena: the address ", data,
                            " is no block in use: it was released already, or is not of this ",
                            "arena; release what allocate gave, once");
  }
  const std::int64_t size = found->second;
  in_use_.erase(found);
  stats_.in_use -= size;
  stats_.cached += size;
  if (!closed_) {
    cached_[size].push_back({data, size, turn_++});
    return {};
  }
  lock.unlock();
  const std::lock_guard source_lock(source_mutex_);
  give_back({{data, size, 0}});
  return {};
}

void PinnedArena::State::close() {
  const std::lock_guard source_lock(source_mutex_);
  std::unique_lock lock(mutex_);
  closed_ = true;
  const std::vector<Block> cached = evict(kAll);
  lock.unlock();
  give_back(cached);
}

PinnedArena::PinnedArena(std::int64_t limit) : PinnedArena(limit, pinned_source(device_kernels())) {}
PinnedArena::PinnedArena(std::int64_t limit, PinnedSource source) : state_(std::make_shared<State>(limit, std::move(source))) {}
PinnedArena::~PinnedArena() { state_->close(); }

Status PinnedArena::allocate(std::int64_t bytes, void** data) { return state_->allocate(bytes, data); }
Status PinnedArena::release(void* data) { return state_->release(data); }
PinnedStats PinnedArena::stats() const { return state_->stats(); }

std::int64_t PinnedArena::rounded(std::int64_t bytes) {
  static const std::int64_t page = sysconf(_SC_PAGESIZE);
  if (bytes <= 0) return 0;
  // 2^k < bytes <= 2^(k+1) is cut into steps of 2^k / 8.
  const std::int64_t step = std::max(page, std::int64_t(std::bit_ceil(std::uint64_t(bytes)) / 16));
  return (bytes + step - 1) / step * step;
}

PinnedBlock& PinnedBlock::operator=(PinnedBlock&& other) noexcept {
  PinnedBlock(std::move(other)).swap(*this);
  return *this;
}

PinnedBlock::~PinnedBlock() {
  if (data_) static_cast<void>(state_->release(data_));
}

Status PinnedBlock::allocate(PinnedArena& arena, std::int64_t bytes, PinnedBlock* block) {
  *block = {};
  PinnedBlock made;
  if (Status status = arena.allocate(bytes, &made.data_); !status.ok()) return status;
  made.state_ = arena.state_;
  made.bytes_ = bytes;
  *block = std::move(made);
  return {};
}

void PinnedBlock::swap(PinnedBlock& other) noexcept {
  std::swap(state_, other.state_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
}

}  // namespace unswag
