// The arena of page-locked memory over a source that counts, checks and refuses.
#include "store/pinned.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace unswag {
namespace {

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
const std::int64_t kPage = sysconf(_SC_PAGESIZE);

// Memory of malloc, of 1 byte where sizes are only played with (real = false); every call is checked against what is out.
class Source {
 public:
  explicit Source(std::int64_t limit, bool real = false) : limit_(limit), real_(real) {}
  ~Source() {
    for (const auto& [data, bytes] : out) std::free(data);
  }
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  PinnedSource functions() {
    return {[this](std::int64_t bytes) { return allocate(bytes); },
            [this](void* data, std::int64_t bytes) { release(data, bytes); }};
  }
  std::vector<std::int64_t> sizes() const {
    std::vector<std::int64_t> all;
    all.reserve(out.size());
    for (const auto& [data, bytes] : out) all.push_back(bytes);
    std::ranges::sort(all);
    return all;
  }

  std::int64_t room = kMax;  // refuses what would exceed it
  int allocations = 0, refusals = 0;
  std::map<void*, std::int64_t> out;  // what is page-locked
  std::int64_t held = 0, most = 0;
  std::vector<std::int64_t> released;  // sizes, in order

 private:
  void* allocate(std::int64_t bytes) {
    const Entered entered(*this);
    if (bytes > room - held) {
      ++refusals;
      return nullptr;
    }
    ++allocations;
    void* data = std::malloc(real_ ? std::size_t(bytes) : 1);
    EXPECT_TRUE(data && out.emplace(data, bytes).second);
    held += bytes;
    most = std::max(most, held);
    EXPECT_LE(held, limit_);
    return data;
  }
  void release(void* data, std::int64_t bytes) {
    const Entered entered(*this);
    const auto found = out.find(data);
    ASSERT_NE(found, out.end()) << "not of this source, or given back twice";
    EXPECT_EQ(found->second, bytes);
    out.erase(found);
    held -= bytes;
    released.push_back(bytes);
    std::free(data);
  }

  // One call at a time.
  struct Entered {
    explicit Entered(Source& source) : inside(source.inside_) { EXPECT_FALSE(inside.exchange(true)); }
    ~Entered() { inside = false; }
    Entered(const Entered&) = delete;
    Entered& operator=(const Entered&) = delete;
    std::atomic<bool>& inside;
  };

  std::int64_t limit_;
  bool real_;
  std::atomic<bool> inside_{false};
};

void* allocated(PinnedArena& arena, std::int64_t bytes) {
  void* data = nullptr;
  const Status status = arena.allocate(bytes, &data);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_TRUE(data);
  return data;
}

void expect_stats(const PinnedArena& arena, std::int64_t in_use, std::int64_t cached, std::int64_t peak) {
  const PinnedStats stats = arena.stats();
  EXPECT_EQ(stats.in_use, in_use);
  EXPECT_EQ(stats.cached, cached);
  EXPECT_EQ(stats.peak, peak);
}

// ---- sizes -------------------------------------------------------------------------------------------------------------

TEST(Pinned, RoundingIsBoundedAndKeepsWholePages) {
  EXPECT_EQ(PinnedArena::rounded(0), 0);
  std::int64_t before = 0;
  for (int k = 0; k <= 62; ++k) {
    const std::int64_t power = std::int64_t{1} << k;
    for (std::int64_t eighth = 8; eighth <= 16 && (k < 62 || eighth == 8); ++eighth) {
      for (std::int64_t off : {-1, 0, 1}) {
        const std::int64_t bytes = power / 8 * eighth + off;
        if (bytes < std::max<std::int64_t>(before, 1) || bytes > std::int64_t{1} << 62) continue;
        const std::int64_t size = PinnedArena::rounded(bytes);
        EXPECT_GE(size, bytes);
        EXPECT_LT(size - bytes, std::max(kPage, (bytes + 7) / 8)) << bytes;
        EXPECT_EQ(size % kPage, 0) << bytes;
        EXPECT_EQ(PinnedArena::rounded(size), size) << bytes;
        EXPECT_GE(size, PinnedArena::rounded(before)) << bytes;
        before = bytes;
      }
    }
  }
  EXPECT_EQ(before, std::int64_t{1} << 62);
}

TEST(Pinned, ThereAreEightSizesForEachDoubling) {
  const std::int64_t power = kPage * 64;
  std::map<std::int64_t, int> sizes;
  for (std::int64_t bytes = power + 1; bytes <= 2 * power; ++bytes) ++sizes[PinnedArena::rounded(bytes)];
  EXPECT_EQ(sizes.size(), 8U);
  for (const auto& [size, requests] : sizes) EXPECT_EQ(requests, power / 8) << size;
}

// ---- the cache ---------------------------------------------------------------------------------------------------------

TEST(Pinned, WhatIsReleasedServesTheNextRequestOfItsSize) {
  Source source(100 * kPage);
  PinnedArena arena(100 * kPage, source.functions());
  void* a = allocated(arena, 3 * kPage);
  expect_stats(arena, 3 * kPage, 0, 3 * kPage);
  EXPECT_TRUE(arena.release(a).ok());
  expect_stats(arena, 0, 3 * kPage, 3 * kPage);
  EXPECT_EQ(allocated(arena, 2 * kPage + 1), a);
  expect_stats(arena, 3 * kPage, 0, 3 * kPage);
  EXPECT_EQ(source.allocations, 1);
  EXPECT_NE(allocated(arena, 3 * kPage), a);
  EXPECT_NE(allocated(arena, 4 * kPage), a);
  expect_stats(arena, 10 * kPage, 0, 10 * kPage);
  EXPECT_EQ(source.allocations, 3);
  EXPECT_TRUE(source.released.empty());
  EXPECT_EQ(arena.stats().limit, 100 * kPage);
}

TEST(Pinned, ANewBlockTakesTheRoomOfThoseThatHaveLainLongest) {
  Source source(10 * kPage);
  PinnedArena arena(10 * kPage, source.functions());
  void* one = allocated(arena, kPage);
  void* four = allocated(arena, 4 * kPage);
  void* two = allocated(arena, 2 * kPage);
  void* three = allocated(arena, 3 * kPage);
  EXPECT_TRUE(arena.release(two).ok());
  EXPECT_TRUE(arena.release(four).ok());
  EXPECT_TRUE(arena.release(one).ok());
  allocated(arena, 5 * kPage);  // 3 in use: 2 and 4 have to go, 1 may stay
  EXPECT_EQ(source.released, (std::vector<std::int64_t>{2 * kPage, 4 * kPage}));
  expect_stats(arena, 8 * kPage, kPage, 10 * kPage);
  EXPECT_TRUE(arena.release(three).ok());
  EXPECT_EQ(allocated(arena, kPage), one);
}

TEST(Pinned, WhatCannotFitIsAnErrorAndCostsNoCachedBlock) {
  Source source(10 * kPage);
  PinnedArena arena(10 * kPage, source.functions());
  allocated(arena, 6 * kPage);
  EXPECT_TRUE(arena.release(allocated(arena, 2 * kPage)).ok());
  void* data = &arena;
  const Status status = arena.allocate(5 * kPage - 7, &data);
  EXPECT_EQ(status.code(), StatusCode::device_error);
  EXPECT_EQ(status.message(), "PinnedArena: " + std::to_string(5 * kPage - 7) + " bytes of page-locked memory (" +
                                  std::to_string(5 * kPage) + " as rounded) do not fit: " + std::to_string(6 * kPage) +
                                  " in use, " + std::to_string(2 * kPage) + " cached, limit " + std::to_string(10 * kPage) +
                                  "; raise the limit, or release blocks first");
  EXPECT_EQ(data, nullptr);
  expect_stats(arena, 6 * kPage, 2 * kPage, 8 * kPage);
  allocated(arena, 4 * kPage);  // exactly what is left
  expect_stats(arena, 10 * kPage, 0, 10 * kPage);
}

TEST(Pinned, ASourceThatRefusesIsAskedAgainWhenTheCacheIsEmpty) {
  Source source(100 * kPage);
  PinnedArena arena(100 * kPage, source.functions());
  source.room = 10 * kPage;
  allocated(arena, 2 * kPage);
  void* five = allocated(arena, 5 * kPage);
  void* three = allocated(arena, 3 * kPage);
  EXPECT_TRUE(arena.release(five).ok());
  EXPECT_TRUE(arena.release(three).ok());
  allocated(arena, 8 * kPage);
  EXPECT_EQ(source.refusals, 1);
  EXPECT_EQ(source.released, (std::vector<std::int64_t>{5 * kPage, 3 * kPage}));
  expect_stats(arena, 10 * kPage, 0, 10 * kPage);

  void* data = &arena;
  const Status status = arena.allocate(1, &data);
  EXPECT_EQ(status.code(), StatusCode::device_error);
  EXPECT_NE(status.message().find("were refused by their source"), std::string::npos) << status.message();
  EXPECT_EQ(data, nullptr);
  EXPECT_EQ(source.refusals, 2);  // nothing was cached: there was no use in asking again
  expect_stats(arena, 10 * kPage, 0, 10 * kPage);
}

// ---- what is refused -----------------------------------------------------------------------------------------------------

TEST(Pinned, SizesThatAreNone) {
  Source source(kMax);
  PinnedArena arena(kMax, source.functions());
  void* data = &arena;
  EXPECT_TRUE(arena.allocate(0, &data).ok());
  EXPECT_EQ(data, nullptr);
  EXPECT_TRUE(arena.release(nullptr).ok());
  data = &arena;
  const Status negative = arena.allocate(-1, &data);
  EXPECT_EQ(negative.code(), StatusCode::invalid_argument);
  EXPECT_EQ(negative.message(), "PinnedArena: bytes is -1; pass 0 or more");
  EXPECT_EQ(data, nullptr);
  for (const std::int64_t bytes : {kMax, kMax - 1, (std::int64_t{1} << 62) + 1}) {
    EXPECT_EQ(arena.allocate(bytes, &data).code(), StatusCode::device_error) << bytes;
  }
  EXPECT_EQ(source.allocations, 0);
  // As large as they come: sums of sizes stay below the limit, so they do not overflow.
  void* largest = allocated(arena, std::int64_t{1} << 62);
  allocated(arena, (std::int64_t{1} << 61) + 1);
  EXPECT_EQ(arena.allocate(std::int64_t{1} << 62, &data).code(), StatusCode::device_error);
  EXPECT_TRUE(arena.release(largest).ok());
  allocated(arena, std::int64_t{1} << 61);
  EXPECT_EQ(source.allocations, 3);
  EXPECT_EQ(source.released, (std::vector<std::int64_t>{std::int64_t{1} << 62}));
}

TEST(Pinned, ALimitThatIsNone) {
  Source source(0);
  PinnedArena arena(-5, source.functions());
  void* data = nullptr;
  const Status status = arena.allocate(1, &data);
  EXPECT_EQ(status.code(), StatusCode::invalid_argument);
  EXPECT_EQ(status.message(), "PinnedArena: limit is -5; pass a number of bytes, 0 or more");
  PinnedArena nothing(0, source.functions());
  EXPECT_EQ(nothing.allocate(1, &data).code(), StatusCode::device_error);
  EXPECT_TRUE(nothing.allocate(0, &data).ok());
}

TEST(Pinned, OnlyABlockInUseIsReleased) {
  Source source(100 * kPage, true);
  PinnedArena arena(100 * kPage, source.functions()), other(100 * kPage, source.functions());
  void* a = allocated(arena, 100);
  void* of_other = allocated(other, 100);
  int foreign = 0;
  for (void* wrong : {of_other, static_cast<void*>(&foreign), static_cast<void*>(static_cast<char*>(a) + 1)}) {
    const Status status = arena.release(wrong);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_NE(status.message().find("released already, or is not of this arena"), std::string::npos) << status.message();
  }
  EXPECT_TRUE(arena.release(a).ok());
  EXPECT_EQ(arena.release(a).code(), StatusCode::invalid_argument);
  expect_stats(arena, 0, kPage, kPage);
  EXPECT_EQ(allocated(arena, 100), a);
  EXPECT_NE(allocated(arena, 100), a);  // the second release did not offer it twice
  expect_stats(other, kPage, 0, kPage);
}

TEST(Pinned, WithoutCudaThereIsNoMemoryUnlessASourceIsGiven) {
  const DeviceKernels lacking;
  for (const DeviceKernels* device : {static_cast<const DeviceKernels*>(nullptr), &lacking}) {
    PinnedArena arena(kMax, pinned_source(device));
    void* data = &arena;
    const Status status = arena.allocate(1, &data);
    EXPECT_EQ(status.code(), StatusCode::not_supported);
    EXPECT_NE(status.message().find("UNSWAG_CUDA=ON"), std::string::npos) << status.message();
    EXPECT_EQ(data, nullptr);
  }
  if (device_kernels() && device_kernels()->pinned_allocate) return;  // this program has it
  PinnedArena arena(kMax);
  void* data = nullptr;
  EXPECT_EQ(arena.allocate(1, &data).code(), StatusCode::not_supported);
}

std::vector<std::pair<char, std::int64_t>> calls_of_the_device;
std::max_align_t memory_of_the_device;

TEST(Pinned, TheDevicesRowIsASource) {
  DeviceKernels device;
  device.pinned_allocate = [](std::int64_t bytes) -> void* {
    calls_of_the_device.emplace_back('a', bytes);
    return &memory_of_the_device;
  };
  device.pinned_release = [](void* data) {
    calls_of_the_device.emplace_back('r', static_cast<std::max_align_t*>(data) - &memory_of_the_device);
  };
  {
    PinnedArena arena(kMax, pinned_source(&device));
    EXPECT_EQ(allocated(arena, 5), &memory_of_the_device);
    EXPECT_TRUE(arena.release(&memory_of_the_device).ok());
  }
  EXPECT_EQ(calls_of_the_device, (std::vector<std::pair<char, std::int64_t>>{{'a', kPage}, {'r', 0}}));
}

// ---- blocks that return by themselves ------------------------------------------------------------------------------------

TEST(Pinned, ABlockReturnsToItsArena) {
  Source source(100 * kPage);
  PinnedArena arena(100 * kPage, source.functions());
  void* first = nullptr;
  {
    PinnedBlock a, b;
    EXPECT_EQ(a.data(), nullptr);
    ASSERT_TRUE(PinnedBlock::allocate(arena, 5, &a).ok());
    first = a.data();
    EXPECT_TRUE(first);
    EXPECT_EQ(a.size(), 5);
    b = std::move(a);
    expect_stats(arena, kPage, 0, kPage);
    EXPECT_EQ(b.data(), first);
    PinnedBlock c(std::move(b));
    EXPECT_EQ(c.data(), first);
    ASSERT_TRUE(PinnedBlock::allocate(arena, 7, &c).ok());  // its own block serves it again
    EXPECT_EQ(c.data(), first);
    EXPECT_EQ(c.size(), 7);
    EXPECT_FALSE(PinnedBlock::allocate(arena, -1, &c).ok());
    EXPECT_EQ(c.data(), nullptr);
    EXPECT_EQ(c.size(), 0);
    expect_stats(arena, 0, kPage, kPage);
    ASSERT_TRUE(PinnedBlock::allocate(arena, 1, &c).ok());
    expect_stats(arena, kPage, 0, kPage);
  }
  expect_stats(arena, 0, kPage, kPage);
  EXPECT_EQ(source.allocations, 1);
  PinnedBlock none;
  EXPECT_TRUE(PinnedBlock::allocate(arena, 0, &none).ok());
  EXPECT_EQ(none.data(), nullptr);
}

TEST(Pinned, ABlockMayOutliveItsArena) {
  Source source(100 * kPage, true);
  PinnedBlock block;
  {
    PinnedArena arena(100 * kPage, source.functions());
    ASSERT_TRUE(PinnedBlock::allocate(arena, 2 * kPage, &block).ok());
    allocated(arena, 3 * kPage);  // never released
    EXPECT_TRUE(arena.release(allocated(arena, kPage)).ok());
  }
  EXPECT_EQ(source.sizes(), (std::vector<std::int64_t>{2 * kPage, 3 * kPage}));
  std::memset(block.data(), 1, std::size_t(block.size()));
  block = {};
  EXPECT_EQ(source.sizes(), (std::vector<std::int64_t>{3 * kPage}));
}

// ---- random sequences against a model --------------------------------------------------------------------------------------

// What the arena should do, with lists and loops: what is cached in the order in which it came.
struct Model {
  std::int64_t limit = 0, room = 0, in_use = 0, cached = 0, peak = 0;
  std::deque<std::pair<void*, std::int64_t>> kept;
  int allocations = 0, refusals = 0;
  std::vector<std::int64_t> released;

  void evict() {
    cached -= kept.front().second;
    released.push_back(kept.front().second);
    kept.pop_front();
  }
  // The cached block that has to be reused, null for a new one; `ok` says whether there is one.
  void* allocate(std::int64_t size, bool& ok) {
    ok = true;
    const auto newest = std::find_if(kept.rbegin(), kept.rend(), [size](const auto& block) { return block.second == size; });
    if (newest != kept.rend()) {
      void* data = newest->first;
      kept.erase(std::next(newest).base());
      cached -= size;
      in_use += size;
      return data;
    }
    ok = in_use + size <= limit;
    if (ok) {
      while (in_use + cached + size > limit) evict();
      if (in_use + cached + size > room) {
        ++refusals;
        const bool again = !kept.empty();
        while (!kept.empty()) evict();
        ok = in_use + size <= room;
        refusals += again && !ok;
        ok = ok && again;
      }
    }
    if (ok) {
      ++allocations;
      in_use += size;
      peak = std::max(peak, in_use + cached);
    }
    return nullptr;
  }
};

TEST(Pinned, RandomSequencesFollowTheModel) {
  std::int64_t reused = 0, evicted = 0, failed = 0, refused = 0;
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937_64 random(seed);
    const auto below = [&random](std::int64_t n) { return std::int64_t(random() % std::uint64_t(n)); };
    Model model;
    model.limit = kPage * (1 + below(200));
    model.room = below(3) == 0 ? model.limit / 2 : kMax;
    Source source(model.limit);
    source.room = model.room;
    PinnedArena arena(model.limit, source.functions());
    std::vector<std::pair<void*, std::int64_t>> blocks;
    for (int step = 0; step < 300; ++step) {
      if (blocks.empty() || below(5) < 3) {
        const std::int64_t bytes = 1 + below(kPage * (below(4) == 0 ? 100 : 6));
        const std::int64_t size = PinnedArena::rounded(bytes);
        bool ok = false;
        void* expected = model.allocate(size, ok);
        void* data = nullptr;
        ASSERT_EQ(arena.allocate(bytes, &data).ok(), ok) << "seed " << seed << ", step " << step << ", size " << size;
        if (expected) {
          ASSERT_EQ(data, expected);
          ++reused;
        }
        if (ok) {
          blocks.emplace_back(data, size);
        } else {
          ++failed;
        }
      } else {
        const std::size_t which = std::size_t(below(std::int64_t(blocks.size())));
        const auto [data, size] = blocks[which];
        blocks.erase(blocks.begin() + std::ptrdiff_t(which));
        ASSERT_TRUE(arena.release(data).ok());
        ASSERT_FALSE(arena.release(data).ok());
        model.kept.emplace_back(data, size);
        model.in_use -= size;
        model.cached += size;
      }
      const PinnedStats stats = arena.stats();
      ASSERT_EQ(stats.in_use, model.in_use) << "seed " << seed << ", step " << step;
      ASSERT_EQ(stats.cached, model.cached);
      ASSERT_EQ(stats.peak, model.peak);
      ASSERT_EQ(source.held, stats.in_use + stats.cached);
      ASSERT_EQ(source.most, stats.peak);
      ASSERT_EQ(source.allocations, model.allocations);
      ASSERT_EQ(source.refusals, model.refusals);
      ASSERT_EQ(source.released, model.released);
    }
    evicted += std::int64_t(model.released.size());
    refused += model.refusals;
  }
  // The sequences reach every road.
  EXPECT_GT(reused, 1000);
  EXPECT_GT(evicted, 1000);
  EXPECT_GT(failed, 1000);
  EXPECT_GT(refused, 1000);
}

// ---- threads -------------------------------------------------------------------------------------------------------------

TEST(Pinned, ThreadsShareIt) {
  constexpr int kThreads = 6, kSteps = 4000;
  const std::int64_t limit = 40 * kPage;
  Source source(limit, true);
  std::atomic<int> wrong{0}, served{0}, full{0};
  {
    PinnedArena arena(limit, source.functions());
    std::vector<std::thread> threads;
    threads.reserve(kThreads);
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        std::mt19937 random{unsigned(thread)};
        std::vector<std::pair<PinnedBlock, int>> blocks;
        for (int step = 0; step < kSteps; ++step) {
          if (blocks.size() < 4 && random() % 2 == 0) {
            PinnedBlock block;
            if (!PinnedBlock::allocate(arena, std::int64_t(1 + random() % unsigned(8 * kPage)), &block).ok()) {
              ++full;
              continue;
            }
            ++served;
            const int pattern = int(random() % 251);
            std::memset(block.data(), pattern, std::size_t(block.size()));
            blocks.emplace_back(std::move(block), pattern);
          } else if (!blocks.empty()) {
            const PinnedBlock& block = blocks.front().first;
            const int pattern = blocks.front().second;
            const auto* bytes = static_cast<const unsigned char*>(block.data());
            wrong += !std::all_of(bytes, bytes + block.size(), [&](unsigned char byte) { return byte == pattern; });
            blocks.erase(blocks.begin());
          }
          const PinnedStats stats = arena.stats();
          wrong += stats.in_use + stats.cached > limit || stats.in_use < 0 || stats.cached < 0;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    const PinnedStats stats = arena.stats();
    EXPECT_EQ(stats.in_use, 0);
    EXPECT_EQ(stats.cached, source.held);
    EXPECT_EQ(stats.peak, source.most);
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(served, 1000);
  EXPECT_GT(full, 0);
  EXPECT_LT(source.allocations, served);
  EXPECT_GT(source.released.size(), 100U);
  EXPECT_TRUE(source.out.empty());
}

TEST(Pinned, BlocksMayReturnWhileTheArenaGoes) {
  Source source(kMax, true);
  for (int round = 0; round < 200; ++round) {
    auto arena = std::make_unique<PinnedArena>(kMax, source.functions());
    std::vector<PinnedBlock> blocks(8);
    for (PinnedBlock& block : blocks) ASSERT_TRUE(PinnedBlock::allocate(*arena, kPage, &block).ok());
    std::thread other([&] { blocks.clear(); });
    arena.reset();
    other.join();
    ASSERT_TRUE(source.out.empty());
  }
}

// The driver may wait for work on the device inside a call, and that work for a block's release.
TEST(Pinned, ABlockReturnsWhileTheSourceIsBusy) {
  std::atomic<bool> asked{false}, returned{false}, in_time{false};
  char first = 0, second = 0;
  const auto allocate = [&](std::int64_t bytes) -> void* {
    if (bytes == kPage) return &first;
    asked = true;
    for (int i = 0; i < 2000 && !returned; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    in_time = returned.load();
    return &second;
  };
  PinnedArena arena(kMax, {allocate, [](void*, std::int64_t) {}});
  void* held = allocated(arena, kPage);
  std::thread other([&] { allocated(arena, 2 * kPage); });
  while (!asked) std::this_thread::yield();
  EXPECT_TRUE(arena.release(held).ok());
  EXPECT_EQ(allocated(arena, kPage), held);
  returned = true;
  other.join();
  EXPECT_TRUE(in_time);
  expect_stats(arena, 3 * kPage, 0, 3 * kPage);
}

}  // namespace
}  // namespace unswag
