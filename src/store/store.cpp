#include "unswag/store.hpp"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <condition_variable>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <random>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "store/crc32c.hpp"
#include "store/extents.hpp"
#include "store/medium.hpp"

namespace unswag {
namespace {

using Ticket = Store::Ticket;

// ---- the format (docs/store.md): a header, its label padded with zeros to whole kStep bytes, then the data.

struct Header {
  char magic[8];
  std::uint32_t version;
  std::uint32_t header_bytes;  // with the label
  std::uint64_t data_bytes;
  std::uint64_t ticket;
  std::uint64_t epoch;  // how often the store was empty before: training steps, as a rule
  std::uint64_t store;  // a random number
  std::uint32_t label_bytes;
  std::uint32_t data_crc;
  std::uint32_t reserved;
  std::uint32_t header_crc;  // of header and label, this field being 0
};
static_assert(sizeof(Header) == 64, "format 1: no padding");
static_assert(std::endian::native == std::endian::little,
              "blocks are read by the process that wrote them, in little-endian order");
constexpr char kMagic[8] = {'U', 'n', 'S', 'w', 'a', 'g', 'B', '\n'};
constexpr std::uint32_t kVersion = 1;
constexpr std::int64_t kStep = 64;

constexpr std::int64_t kTransfer = std::int64_t{1} << 20;  // bytes of a block that are transferred at once,
constexpr std::int64_t kSlack = 16384;                     // or more, where so little more ends the block
constexpr std::int64_t kBuffer = kTransfer + kSlack;
constexpr int kBuffers = 16;
constexpr int kWindow = 4;              // buffers that one get reads ahead of itself
constexpr int kAhead = kBuffers - 6;    // buffers that prefetched blocks hold at most: puts and gets need some to go on
constexpr std::int64_t kPiece = 12288;  // is copied and summed while it is in the first cache: four times three lanes
constexpr std::int64_t kPage = 4096;
constexpr std::int64_t kLargest = std::int64_t{1} << 62;

// Bytes of the next transfer of a block of which `rest` bytes are left.
std::int64_t next_transfer(std::int64_t rest) { return rest <= kBuffer ? rest : kTransfer; }

std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

// Copies and returns the checksum of what came before and this.
std::uint32_t copy(std::uint32_t crc, void* to, const void* from, std::int64_t bytes) {
  for (std::int64_t at = 0; at < bytes; at += kPiece) {
    const std::int64_t n = std::min(kPiece, bytes - at);
    crc = crc32c(crc, static_cast<const std::byte*>(from) + at, n);
    std::memcpy(static_cast<std::byte*>(to) + at, static_cast<const std::byte*>(from) + at, std::size_t(n));
  }
  return crc;
}

const char* remedy(std::int64_t error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG: return "free space there, or choose another folder (dir)";
    case ENOMEM: return "use tier disk, a codec or shorter sequences, or give the process more memory";
    default: return "the device may be failing: choose another folder (dir), or keep the tensors on the device";
  }
}

// 0, or the error.
std::int64_t resize(const Medium& medium, std::int64_t before, std::int64_t after) {
  std::int64_t error = EINTR;
  while (error == EINTR) error = -medium.resize(before, after);
  return error;
}

// Reads or writes all of it, as often as it takes.
Status transfer(const Medium& medium, bool write, std::byte* data, std::int64_t bytes, std::int64_t at) {
  for (std::int64_t done = 0; done < bytes;) {
    const std::int64_t n =
        write ? medium.write(data + done, bytes - done, at + done) : medium.read(data + done, bytes - done, at + done);
    if (n > 0) {
      done += n;
    } else if (n != -EINTR) {
      const char* verb = write ? "written" : "read";
      if (n == 0) {
        return device_error("Store: ", bytes, " bytes at ", at, " of ", medium.place, " could not be ", verb,
                            ": it ends after ", done, "; somebody else changes it, or ", remedy(EIO));
      }
      return device_error("Store: ", bytes, " bytes at ", at, " of ", medium.place, " could not be ", verb, ": ",
                          std::strerror(int(-n)), "; ", remedy(-n));
    }
  }
  return {};
}

struct Reads;

struct Block {
  Ticket ticket = 0;
  std::int64_t at = 0, space = 0, bytes = 0;
  std::vector<std::byte> header;  // with the label
  int writes = 0;                 // buffers on their way to the medium
  int readers = 0;                // reads that are under way: the space is not used again before they end
  bool complete = false;          // all of it was handed to the threads
  bool dropped = false;
  Status failed;  // to be written
  bool told = false;
  std::shared_ptr<Reads> ahead;  // prefetched
};

// One buffer's worth of a block, being read or read.
struct Chunk {
  std::byte* buffer = nullptr;
  std::int64_t at = 0, bytes = 0;  // in the block; whole alignments
  bool done = false;
  bool ahead = false;  // counts as prefetched
  Status status;
};

// The chunks of a block in their order, from the first that was not consumed to the last that was begun.
struct Reads {
  std::deque<std::shared_ptr<Chunk>> chunks;
  std::int64_t begun = 0;  // bytes of the block
  bool abandoned = false;
};

struct Job {
  std::shared_ptr<Block> block;
  std::byte* buffer;
  std::int64_t at, bytes;        // in the block
  std::shared_ptr<Reads> reads;  // none: a write
  std::shared_ptr<Chunk> chunk;
};

}  // namespace

// mutex_ is held for no transfer, but for those that make the medium grow or shrink.  put_mutex_, taken before it, lets one put
// at a time fill buffers, because it keeps the first, with the header, until the checksum of all is known.
class Store::State {
 public:
  State(const StoreOptions& options, Medium medium)
      : medium_(std::move(medium)),
        limit_(options.limit < 0 ? std::numeric_limits<std::int64_t>::max() : options.limit),
        threads_(options.threads),
        number_(std::random_device{}() | std::uint64_t{std::random_device{}()} << 32) {}
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  bool is_foreign() const { return getpid() != process_; }
  Status put(const void* data, std::int64_t bytes, std::string_view label, Ticket* ticket);
  Status prefetch(Ticket ticket);
  Status get(Ticket ticket, void* data);
  Status drop(Ticket ticket);
  Status clear();
  StoreStats stats();

 private:
  using Lock = std::unique_lock<std::mutex>;
  using BlockPtr = std::shared_ptr<Block>;

  Status foreign() const {
    return device_error("Store: ", medium_.place, " belongs to process ", process_, ", of which this one, ", getpid(),
                        ", is a fork; open a store of its own in each process");
  }
  Status start();
  void work();
  void finish_write(const Job& job, Status status);
  void finish_read(const Job& job, Status status);
  Status allot(Block* block);
  Status find(Lock& lock, Ticket ticket, BlockPtr* block);
  void remove(const BlockPtr& block);
  void free_if_unused(const BlockPtr& block);
  void release(std::byte* buffer);
  void release(Chunk& chunk);
  std::byte* wait_for_buffer(Lock& lock);
  bool begin_chunk(const BlockPtr& block, const std::shared_ptr<Reads>& reads, std::byte* buffer, bool ahead);
  void abandon(const BlockPtr& block, const std::shared_ptr<Reads>& reads);
  std::vector<std::byte> header(const Block& block, std::string_view label) const;
  static void seal(std::vector<std::byte>* header, std::uint32_t data_crc);
  Status write_staged(const BlockPtr& block, const void* data);
  Status write_now(const BlockPtr& block, const void* data);
  Status read_staged(const BlockPtr& block, const std::shared_ptr<Reads>& reads, void* data);
  Status read_now(const BlockPtr& block, void* data);
  Status check_header(const Block& block, const std::byte* found) const;
  Status check_data(const Block& block, std::uint32_t crc) const;

  const Medium medium_;
  const std::int64_t limit_;
  const int threads_;
  const std::uint64_t number_;
  const pid_t process_ = getpid();

  std::mutex put_mutex_;
  std::mutex mutex_;  // of all that follows
  std::condition_variable work_, changed_;
  std::vector<std::thread> workers_;
  std::byte* ring_ = nullptr;
  std::vector<std::byte*> free_;  // buffers
  int ahead_ = 0;
  std::deque<Job> reads_, writes_;
  bool closing_ = false;
  Extents extents_;
  std::unordered_map<Ticket, BlockPtr> blocks_;
  int untold_ = 0;          // blocks among them that failed and were not told
  std::int64_t using_ = 0;  // blocks, dropped ones too, whose space is taken
  Ticket last_ = 0;
  std::uint64_t epoch_ = 0;
  StoreStats stats_;
};

// ---- threads

Status Store::State::start() {
  if (ring_ != nullptr) return {};
  void* ring = std::aligned_alloc(std::size_t(kPage), std::size_t(kBuffer * kBuffers));
  if (ring == nullptr) {
    return device_error("Store: ", kBuffer * kBuffers, " bytes of host memory for the buffers of ", medium_.place,
                        " were refused; free memory");
  }
  // Signals are for the threads of the program.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  Status status;
  try {
    while (int(workers_.size()) < threads_) workers_.emplace_back([this] { work(); });
  } catch (const std::system_error& error) {
    if (workers_.empty())
      status = device_error("Store: no thread could be started: ", error.what(), "; raise the limit of threads (ulimit -u)");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!status.ok()) {
    std::free(ring);
    return status;
  }
  ring_ = static_cast<std::byte*>(ring);
  for (int i = 0; i < kBuffers; ++i) free_.push_back(ring_ + i * kBuffer);
  stats_.buffers = kBuffer * kBuffers;
  return {};
}

Store::State::~State() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  work_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  std::free(ring_);
}

void Store::State::work() {
  Lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return closing_ || !reads_.empty() || !writes_.empty(); });
    if (closing_) return;
    std::deque<Job>& jobs = reads_.empty() ? writes_ : reads_;  // somebody waits for what is read
    const Job job = std::move(jobs.front());
    jobs.pop_front();
    Status status;
    if (!(job.reads ? job.reads->abandoned : job.block->dropped)) {
      lock.unlock();
      status = transfer(medium_, !job.reads, job.buffer, job.bytes, job.block->at + job.at);
      lock.lock();
    }
    if (job.reads) {
      finish_read(job, std::move(status));
    } else {
      finish_write(job, std::move(status));
    }
    changed_.notify_all();
  }
}

void Store::State::finish_write(const Job& job, Status status) {
  Block& block = *job.block;
  release(job.buffer);
  --block.writes;
  if (!status.ok() && block.failed.ok()) {
    block.failed = std::move(status);
    if (!block.dropped) ++untold_;
  }
  free_if_unused(job.block);
}

void Store::State::finish_read(const Job& job, Status status) {
  job.chunk->done = true;
  job.chunk->status = std::move(status);
  if (job.reads->abandoned) release(*job.chunk);
  --job.block->readers;
  free_if_unused(job.block);
}

// ---- buffers and space

void Store::State::release(std::byte* buffer) { free_.push_back(buffer); }

void Store::State::release(Chunk& chunk) {
  release(std::exchange(chunk.buffer, nullptr));
  if (std::exchange(chunk.ahead, false)) --ahead_;
}

std::byte* Store::State::wait_for_buffer(Lock& lock) {
  changed_.wait(lock, [&] { return !free_.empty(); });
  std::byte* buffer = free_.back();
  free_.pop_back();
  return buffer;
}

Status Store::State::allot(Block* block) {
  block->at = extents_.place(block->space);
  const std::int64_t end = block->at + block->space;
  if (end > extents_.end()) {
    if (end > limit_) {
      return device_error("Store: a block of ", block->bytes, " bytes does not fit into ", medium_.place, ": ", stats_.bytes,
                          " bytes in ", stats_.blocks, " blocks are kept, the limit is ", limit_,
                          "; raise the limit, or use a codec or shorter sequences");
    }
    if (const std::int64_t error = resize(medium_, extents_.end(), end); error != 0) {
      return device_error("Store: ", medium_.place, " has no room for a block of ", block->bytes,
                          " bytes: ", std::strerror(int(error)), "; ", stats_.bytes, " bytes in ", stats_.blocks,
                          " blocks are kept; ", remedy(error));
    }
  }
  extents_.take(block->at, block->space);
  stats_.space = extents_.end();
  ++using_;
  return {};
}

void Store::State::free_if_unused(const BlockPtr& block) {
  if (!block->dropped || !block->complete || block->writes > 0 || block->readers > 0 || block->space == 0) return;
  extents_.give_back(block->at, block->space);
  block->space = 0;
  --using_;
}

// Takes the block out of the table; its space follows when nobody reads or writes it any more.
void Store::State::remove(const BlockPtr& block) {
  block->dropped = true;
  if (!block->failed.ok() && !block->told) --untold_;
  if (block->ahead) abandon(block, std::exchange(block->ahead, nullptr));
  blocks_.erase(block->ticket);
  --stats_.blocks;
  stats_.bytes -= block->bytes;
  if (blocks_.empty()) ++epoch_;
  free_if_unused(block);
}

Status Store::State::find(Lock& lock, Ticket ticket, BlockPtr* block) {
  const auto found = blocks_.find(ticket);
  if (found != blocks_.end()) {
    *block = found->second;
    changed_.wait(lock, [&] { return (*block)->dropped || ((*block)->complete && (*block)->writes == 0); });
  }
  if (*block == nullptr || (*block)->dropped) {
    return invalid_argument("Store: ", medium_.place, " has no block ", ticket,
                            ": it was dropped, or the store was cleared; put it again");
  }
  if (!(*block)->failed.ok()) {
    if (!std::exchange((*block)->told, true)) --untold_;
    return (*block)->failed;
  }
  return {};
}

// ---- header

std::vector<std::byte> Store::State::header(const Block& block, std::string_view label) const {
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kVersion;
  h.header_bytes = std::uint32_t(round_up(std::int64_t(sizeof h + label.size()), kStep));
  h.data_bytes = std::uint64_t(block.bytes);
  h.ticket = block.ticket;
  h.epoch = epoch_;
  h.store = number_;
  h.label_bytes = std::uint32_t(label.size());
  std::vector<std::byte> all(h.header_bytes);
  std::memcpy(all.data(), &h, sizeof h);
  if (!label.empty()) std::memcpy(all.data() + sizeof h, label.data(), label.size());
  return all;
}

void Store::State::seal(std::vector<std::byte>* header, std::uint32_t data_crc) {
  std::memcpy(header->data() + offsetof(Header, data_crc), &data_crc, sizeof data_crc);
  const std::uint32_t crc = crc32c(0, header->data(), std::int64_t(header->size()));
  std::memcpy(header->data() + offsetof(Header, header_crc), &crc, sizeof crc);
}

// The block's own header, byte by byte, is what has to be there.
Status Store::State::check_header(const Block& block, const std::byte* found) const {
  if (std::memcmp(found, block.header.data(), block.header.size()) == 0) return {};
  Header h;
  std::memcpy(&h, found, sizeof h);
  std::vector<std::byte> all(found, found + block.header.size());
  std::memset(all.data() + offsetof(Header, header_crc), 0, sizeof h.header_crc);
  const bool whole = h.header_crc == crc32c(0, all.data(), std::int64_t(all.size()));
  if (whole && (h.ticket != block.ticket || h.store != number_)) {
    return device_error("Store: at the place of block ", block.ticket, " of ", medium_.place, " lies block ", h.ticket, " of ",
                        h.store == number_ ? "another step" : "another store", ", so the block was never written; ",
                        remedy(EIO));
  }
  return device_error("Store: the header of block ", block.ticket, " (", block.bytes, " bytes) in ", medium_.place,
                      " is damaged; run the step again; if it happens again, ", remedy(EIO));
}

Status Store::State::check_data(const Block& block, std::uint32_t crc) const {
  Header h;
  std::memcpy(&h, block.header.data(), sizeof h);
  if (crc == h.data_crc) return {};
  return device_error("Store: block ", block.ticket, " (", block.bytes, " bytes) in ", medium_.place,
                      " is damaged: its checksum is ", crc, ", that of what was put ", h.data_crc,
                      "; run the step again; if it happens again, ", remedy(EIO));
}

// ---- put

Status Store::State::put(const void* data, std::int64_t bytes, std::string_view label, Ticket* ticket) {
  *ticket = 0;
  if (is_foreign()) return foreign();
  if (bytes < 0) return invalid_argument("Store::put: bytes is ", bytes, "; pass 0 or more");
  if (bytes > kLargest) return invalid_argument("Store::put: bytes is ", bytes, "; pass at most 2^62");
  if (data == nullptr && bytes > 0) return invalid_argument("Store::put: data is null; pass the address of ", bytes, " bytes");
  if (std::int64_t(label.size()) > kLongestLabel) {
    return invalid_argument("Store::put: label has ", label.size(), " bytes; pass at most ", kLongestLabel);
  }
  const auto block = std::make_shared<Block>();
  const std::lock_guard putting(put_mutex_);
  Lock lock(mutex_);
  if (untold_ > 0) {
    for (const auto& [number, other] : blocks_) {
      if (!other->failed.ok() && !std::exchange(other->told, true)) {
        --untold_;
        return other->failed;
      }
    }
  }
  if (medium_.staged) {
    if (Status status = start(); !status.ok()) return status;
  }
  block->ticket = last_ + 1;
  block->bytes = bytes;
  block->header = header(*block, label);
  block->space = round_up(std::int64_t(block->header.size()) + bytes, medium_.alignment);
  Status allotted = allot(block.get());
  while (!allotted.ok() && using_ > std::int64_t(blocks_.size())) {  // a dropped block is being written: its space comes
    changed_.wait(lock, [&, before = using_] { return using_ < before; });
    allotted = allot(block.get());
  }
  if (!allotted.ok()) return allotted;
  ++last_;
  blocks_.emplace(block->ticket, block);
  ++stats_.blocks;
  stats_.bytes += bytes;
  stats_.peak = std::max(stats_.peak, stats_.bytes);
  lock.unlock();

  Status status = medium_.staged ? write_staged(block, data) : write_now(block, data);

  lock.lock();
  block->complete = true;
  if (status.ok() && !block->failed.ok()) {
    if (!std::exchange(block->told, true)) --untold_;
    status = block->failed;
  }
  if (status.ok()) {
    *ticket = block->ticket;
  } else if (!block->dropped) {
    remove(block);
  }
  free_if_unused(block);
  changed_.notify_all();
  return status;
}

Status Store::State::write_now(const BlockPtr& block, const void* data) {
  std::uint32_t crc = 0;
  const auto first = std::int64_t(block->header.size());
  auto* bytes = static_cast<std::byte*>(const_cast<void*>(data));
  for (std::int64_t at = 0; at < block->bytes; at += kPiece) {
    const std::int64_t n = std::min(kPiece, block->bytes - at);
    crc = crc32c(crc, bytes + at, n);
    if (Status status = transfer(medium_, true, bytes + at, n, block->at + first + at); !status.ok()) return status;
  }
  seal(&block->header, crc);
  return transfer(medium_, true, block->header.data(), first, block->at);
}

Status Store::State::write_staged(const BlockPtr& block, const void* data) {
  const auto first = std::int64_t(block->header.size());
  const std::int64_t total = first + block->bytes;
  std::uint32_t crc = 0;
  std::byte* head = nullptr;  // the first buffer; its header comes last
  for (std::int64_t at = 0, n = 0; at < total; at += n) {
    n = next_transfer(total - at);
    Lock lock(mutex_);
    std::byte* buffer = wait_for_buffer(lock);
    lock.unlock();
    const std::int64_t skip = at == 0 ? first : 0;
    if (n > skip) crc = copy(crc, buffer + skip, static_cast<const std::byte*>(data) + at + skip - first, n - skip);
    const std::int64_t whole = round_up(n, medium_.alignment);
    std::memset(buffer + n, 0, std::size_t(whole - n));
    if (at == 0) {
      head = buffer;
      continue;
    }
    lock.lock();
    ++block->writes;
    writes_.push_back({block, buffer, at, whole, nullptr, nullptr});
    work_.notify_one();
  }
  seal(&block->header, crc);
  std::memcpy(head, block->header.data(), std::size_t(first));
  const Lock lock(mutex_);
  ++block->writes;
  writes_.push_back({block, head, 0, round_up(next_transfer(total), medium_.alignment), nullptr, nullptr});
  work_.notify_one();
  return {};
}

// ---- get

// Begins to read the next chunk into `buffer`; false, and nothing done, if all were begun.
bool Store::State::begin_chunk(const BlockPtr& block, const std::shared_ptr<Reads>& reads, std::byte* buffer, bool ahead) {
  const std::int64_t total = round_up(std::int64_t(block->header.size()) + block->bytes, medium_.alignment);
  if (reads->begun >= total) return false;
  const auto chunk = std::make_shared<Chunk>();
  chunk->buffer = buffer;
  chunk->at = reads->begun;
  chunk->bytes = next_transfer(total - reads->begun);
  chunk->ahead = ahead;
  reads->begun += chunk->bytes;
  reads->chunks.push_back(chunk);
  ++block->readers;
  reads_.push_back({block, buffer, chunk->at, chunk->bytes, reads, chunk});
  work_.notify_one();
  return true;
}

void Store::State::abandon(const BlockPtr& block, const std::shared_ptr<Reads>& reads) {
  reads->abandoned = true;
  for (const auto& chunk : reads->chunks)
    if (chunk->done) release(*chunk);
  free_if_unused(block);
}

Status Store::State::prefetch(Ticket ticket) {
  if (is_foreign()) return foreign();
  const Lock lock(mutex_);
  const auto found = blocks_.find(ticket);
  if (found == blocks_.end())
    return invalid_argument("Store::prefetch: ", medium_.place, " has no block ", ticket, "; put it first");
  const BlockPtr& block = found->second;
  if (!medium_.staged || !block->complete || block->writes > 0 || !block->failed.ok() || block->ahead) return {};
  block->ahead = std::make_shared<Reads>();
  while (ahead_ < kAhead && !free_.empty() && begin_chunk(block, block->ahead, free_.back(), true)) {
    free_.pop_back();
    ++ahead_;
  }
  return {};
}

Status Store::State::get(Ticket ticket, void* data) {
  if (is_foreign()) return foreign();
  Lock lock(mutex_);
  BlockPtr block;
  if (Status status = find(lock, ticket, &block); !status.ok()) return status;
  if (data == nullptr && block->bytes > 0)
    return invalid_argument("Store::get: data is null; pass the address of ", block->bytes, " bytes");
  ++block->readers;
  auto reads = std::exchange(block->ahead, nullptr);
  lock.unlock();
  if (!reads) reads = std::make_shared<Reads>();
  Status status = medium_.staged ? read_staged(block, reads, data) : read_now(block, data);
  lock.lock();
  --block->readers;
  abandon(block, reads);  // what a failure left
  changed_.notify_all();
  return status;
}

Status Store::State::read_now(const BlockPtr& block, void* data) {
  const auto first = std::int64_t(block->header.size());
  std::vector<std::byte> header(block->header.size());
  if (Status status = transfer(medium_, false, header.data(), first, block->at); !status.ok()) return status;
  if (Status status = check_header(*block, header.data()); !status.ok()) return status;
  std::uint32_t crc = 0;
  for (std::int64_t at = 0; at < block->bytes; at += kPiece) {
    const std::int64_t n = std::min(kPiece, block->bytes - at);
    std::byte* to = static_cast<std::byte*>(data) + at;
    if (Status status = transfer(medium_, false, to, n, block->at + first + at); !status.ok()) return status;
    crc = crc32c(crc, to, n);
  }
  return check_data(*block, crc);
}

Status Store::State::read_staged(const BlockPtr& block, const std::shared_ptr<Reads>& reads, void* data) {
  const auto first = std::int64_t(block->header.size());
  const std::int64_t total = first + block->bytes;
  std::uint32_t crc = 0;
  for (std::int64_t at = 0, n = 0; at < total; at += n) {
    Lock lock(mutex_);
    if (reads->chunks.empty()) begin_chunk(block, reads, wait_for_buffer(lock), false);
    while (int(reads->chunks.size()) < kWindow && !free_.empty() && begin_chunk(block, reads, free_.back(), false))
      free_.pop_back();
    const std::shared_ptr<Chunk> chunk = reads->chunks.front();
    changed_.wait(lock, [&] { return chunk->done; });
    if (!chunk->status.ok()) return chunk->status;
    lock.unlock();
    if (at == 0) {
      if (Status status = check_header(*block, chunk->buffer); !status.ok()) return status;
    }
    const std::int64_t skip = at == 0 ? first : 0;
    n = std::min(chunk->bytes, total - at);
    if (n > skip) crc = copy(crc, static_cast<std::byte*>(data) + at + skip - first, chunk->buffer + skip, n - skip);
    lock.lock();
    reads->chunks.pop_front();
    release(*chunk);
    changed_.notify_all();
  }
  return check_data(*block, crc);
}

// ---- the rest

Status Store::State::drop(Ticket ticket) {
  if (is_foreign()) return foreign();
  const Lock lock(mutex_);
  const auto found = blocks_.find(ticket);
  if (found == blocks_.end()) {
    return invalid_argument("Store::drop: ", medium_.place, " has no block ", ticket,
                            ": it was dropped already, or the store was cleared");
  }
  remove(BlockPtr(found->second));
  changed_.notify_all();
  return {};
}

Status Store::State::clear() {
  if (is_foreign()) return foreign();
  const std::lock_guard putting(put_mutex_);
  Lock lock(mutex_);
  while (!blocks_.empty()) remove(BlockPtr(blocks_.begin()->second));
  changed_.wait(lock, [&] { return using_ == 0; });
  if (const std::int64_t error = resize(medium_, extents_.end(), 0); error != 0) {
    return device_error("Store: ", medium_.place, " does not give ", extents_.end(), " bytes back: ", std::strerror(int(error)),
                        "; ", remedy(error));
  }
  extents_.reset();
  stats_.space = 0;
  return {};
}

StoreStats Store::State::stats() {
  if (is_foreign()) return {};
  const std::lock_guard lock(mutex_);
  StoreStats now = stats_;
  now.place = medium_.place;
  now.direct = medium_.direct;
  now.ram_disk = medium_.ram_disk;
  return now;
}

// ---- Store

Store::Store() noexcept = default;
Store::Store(Store&& other) noexcept : state_(std::move(other.state_)) {}
Store& Store::operator=(Store&& other) noexcept {
  std::swap(state_, other.state_);
  return *this;
}
Store::~Store() {
  // Not in a fork: the threads are not there to be joined, and may have held the lock.
  if (state_ && state_->is_foreign()) [[maybe_unused]]
    State* left = state_.release();
}

Status Store::open(const StoreOptions& options, Store* store) {
  if (options.tier != Tier::host && options.tier != Tier::disk) {
    return invalid_argument("Store: tier is ", int(options.tier), "; pass Tier::host or Tier::disk");
  }
  Medium medium;
  std::string dir = options.dir;
  if (dir.empty()) {
    const char* named = std::getenv("TMPDIR");
    dir = named != nullptr && *named != '\0' ? named : "/tmp";
  }
  if (Status status = options.tier == Tier::disk ? open_disk(dir, &medium) : open_host(options.limit, &medium); !status.ok())
    return status;
  return open(options, std::move(medium), store);
}

Status Store::open(const StoreOptions& options, Medium medium, Store* store) {
  if (options.threads < 1) return invalid_argument("Store: threads is ", options.threads, "; pass 1 or more");
  store->state_ = std::make_unique<State>(options, std::move(medium));
  return {};
}

namespace {
Status closed() { return invalid_argument("Store: it is not open; call Store::open first"); }
}  // namespace

Status Store::put(const void* data, std::int64_t bytes, std::string_view label, Ticket* ticket) {
  return state_ ? state_->put(data, bytes, label, ticket) : closed();
}
Status Store::prefetch(Ticket ticket) { return state_ ? state_->prefetch(ticket) : closed(); }
Status Store::get(Ticket ticket, void* data) { return state_ ? state_->get(ticket, data) : closed(); }
Status Store::drop(Ticket ticket) { return state_ ? state_->drop(ticket) : closed(); }
Status Store::clear() { return state_ ? state_->clear() : closed(); }
StoreStats Store::stats() const { return state_ ? state_->stats() : StoreStats{}; }

}  // namespace unswag
