// The store over both tiers, and over a medium of its own that fails, lies and forgets.
#include "unswag/store.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "store/crc32c.hpp"
#include "store/extents.hpp"
#include "store/medium.hpp"

namespace unswag {
namespace {

using Bytes = std::vector<std::byte>;
using Ticket = Store::Ticket;

constexpr std::int64_t kMiB = std::int64_t{1} << 20;
constexpr std::int64_t kHeader = 64;

Bytes random_bytes(std::int64_t n, std::uint64_t seed) {
  Bytes bytes(static_cast<std::size_t>(n));
  std::mt19937_64 draw(seed);
  for (std::size_t i = 0; i < bytes.size(); i += 8) {
    const std::uint64_t word = draw();
    std::memcpy(bytes.data() + i, &word, std::min<std::size_t>(8, bytes.size() - i));
  }
  return bytes;
}

// A medium in memory, whose calls a test may watch and change.  It has room for `room` bytes.
struct Fake {
  explicit Fake(bool staged, std::int64_t bytes = 64 * kMiB)
      : memory(static_cast<std::size_t>(bytes)), staged(staged), room(bytes) {}

  enum class Call { read, write, resize };
  // What happens instead of the call: bytes transferred or -errno; nothing where it is to go on.
  using Instead = std::function<bool(Call, std::int64_t bytes, std::int64_t at, std::int64_t* result)>;

  Medium functions() {
    Medium medium;
    medium.place = "the test's memory";
    medium.alignment = staged ? 4096 : 64;
    medium.staged = staged;
    medium.read = [this](void* data, std::int64_t n, std::int64_t at) {
      std::int64_t result = 0;
      check(data, n, at);
      if (instead && instead(Call::read, n, at, &result)) return result;
      std::memcpy(data, &memory[at], n);
      return n;
    };
    medium.write = [this](const void* data, std::int64_t n, std::int64_t at) {
      std::int64_t result = 0;
      check(data, n, at);
      if (instead && instead(Call::write, n, at, &result)) return result;
      std::memcpy(&memory[at], data, n);
      return n;
    };
    medium.resize = [this](std::int64_t before, std::int64_t after) {
      std::int64_t result = 0;
      EXPECT_EQ(before, end);
      if (instead && instead(Call::resize, after - before, before, &result)) return result;
      if (after > room) return std::int64_t{-ENOSPC};
      end = after;
      return std::int64_t{0};
    };
    return medium;
  }

  void check(const void* data, std::int64_t n, std::int64_t at) const {
    EXPECT_LE(at + n, end);
    if (staged && !shortened) {
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 4096, 0U);
      EXPECT_EQ(n % 4096, 0);
      EXPECT_EQ(at % 4096, 0);
    }
  }

  Bytes memory;
  bool staged;
  std::int64_t room;
  std::atomic<std::int64_t> end = 0;
  bool shortened = false;
  Instead instead;
};

Store over(Fake& fake, std::int64_t limit = -1, int threads = 2) {
  Store store;
  const Status status = Store::open({.limit = limit, .threads = threads}, fake.functions(), &store);
  EXPECT_TRUE(status.ok()) << status.message();
  return store;
}

Ticket put(Store& store, const Bytes& data, std::string_view label = "u8") {
  Ticket ticket = 0;
  const Status status = store.put(data.data(), static_cast<std::int64_t>(data.size()), label, &ticket);
  EXPECT_TRUE(status.ok()) << status.message();
  return ticket;
}

void expect_ok(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }
void expect_error(const Status& status, StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << status.message();
  EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
}

void expect_block(Store& store, Ticket ticket, const Bytes& data) {
  Bytes found(data.size(), std::byte{0xa5});
  expect_ok(store.get(ticket, found.data()));
  EXPECT_TRUE(found == data) << "block " << ticket;
}

std::int64_t entries(const char* folder) {
  const std::filesystem::directory_iterator all(folder);
  return std::distance(begin(all), end(all));
}

// ---- checksum --------------------------------------------------------------------------------------------------------------

TEST(Crc32c, KnownValues) {
  const std::string digits = "123456789";  // Castagnoli et al. 1993; RFC 3720, B.4
  const Bytes zeros(32), ones(32, std::byte{0xff});
  for (auto* crc : {crc32c, crc32c_portable}) {
    EXPECT_EQ(crc(0, digits.data(), 9), 0xe3069283U);
    EXPECT_EQ(crc(0, zeros.data(), 32), 0x8a9136aaU);
    EXPECT_EQ(crc(0, ones.data(), 32), 0x62a8ab43U);
    EXPECT_EQ(crc(0, nullptr, 0), 0U);
  }
}

TEST(Crc32c, AllWaysAgreeForEveryLengthAndAlignment) {
  const Bytes data = random_bytes(13000, 1);
  for (std::int64_t n = 0; n < 12300; n = n < 700 || (n > 3050 && n < 3100) ? n + 1 : n + 61) {
    for (const std::int64_t start : {0, 1, 7}) {
      const std::byte* p = data.data() + start;
      const std::uint32_t whole = crc32c_portable(0, p, n);
      ASSERT_EQ(crc32c(0, p, n), whole) << n << " at " << start;
      const std::int64_t cut = n * 2 / 3;
      ASSERT_EQ(crc32c(crc32c(0, p, cut), p + cut, n - cut), whole) << n;
    }
  }
}

// ---- space -----------------------------------------------------------------------------------------------------------------

TEST(Extents, AnyOrderOverlapsNothingAndEndsInOneHole) {
  std::mt19937 draw(3);
  Extents extents;
  std::map<std::int64_t, std::int64_t> taken;
  for (int i = 0; i < 20000; ++i) {
    if (taken.empty() || draw() % 5 < (i / 2000 % 2 == 0 ? 3U : 1U)) {
      const std::int64_t size = 1 + static_cast<std::int64_t>(draw() % 9), at = extents.place(size);
      const auto next = taken.lower_bound(at);
      ASSERT_TRUE(next == taken.end() || at + size <= next->first);
      ASSERT_TRUE(next == taken.begin() || std::prev(next)->first + std::prev(next)->second <= at);
      extents.take(at, size);
      taken.emplace(at, size);
      ASSERT_GE(extents.end(), at + size);
    } else {
      auto gone = taken.begin();
      std::advance(gone, draw() % taken.size());
      extents.give_back(gone->first, gone->second);
      taken.erase(gone);
    }
  }
  const std::int64_t end = extents.end();
  for (const auto& [at, size] : taken) extents.give_back(at, size);
  EXPECT_EQ(extents.place(end), 0) << "one hole is left";
  EXPECT_EQ(extents.place(end + 5), 0) << "the last hole grows";
}

TEST(Extents, AHoleOfTheSameSizeComesFirst) {
  Extents extents;
  for (const std::int64_t size : {8, 1, 4, 1}) extents.take(extents.place(size), size);
  extents.give_back(0, 8);
  extents.give_back(9, 4);
  EXPECT_EQ(extents.place(4), 9);
  EXPECT_EQ(extents.place(3), 0);
  EXPECT_EQ(extents.place(9), 14);
}

// ---- round trips -----------------------------------------------------------------------------------------------------------

class Everywhere : public testing::TestWithParam<std::string> {
 protected:
  Store open(std::int64_t limit = -1) {
    Store store;
    const std::string& where = GetParam();
    if (where == "staged" || where == "direct") {
      fake_ = std::make_unique<Fake>(where == "staged");
      return over(*fake_, limit);
    }
    expect_ok(Store::open({.tier = where == "disk" ? Tier::disk : Tier::host, .dir = ".", .limit = limit}, &store));
    return store;
  }
  std::unique_ptr<Fake> fake_;
};
INSTANTIATE_TEST_SUITE_P(, Everywhere, testing::Values("disk", "host", "staged", "direct"),
                         [](const auto& info) { return info.param; });

constexpr std::int64_t kSizes[] = {
    0,     1,      63,        64,        65,   4031,     4032,          4033,          12288,
    12289, 100000, kMiB - 64, kMiB - 63, kMiB, kMiB + 1, 3 * kMiB - 64, 3 * kMiB - 63, 5 * kMiB + 7};

TEST_P(Everywhere, WhatIsPutComesBackAnyNumberOfTimes) {
  Store store = open();
  std::vector<std::pair<Ticket, Bytes>> blocks;
  std::int64_t total = 0;
  for (const std::int64_t n : kSizes) {
    Bytes data = random_bytes(n, static_cast<std::uint64_t>(n));
    const Ticket ticket = put(store, data, std::string(static_cast<std::size_t>(n % 200), 'x'));
    Bytes kept = data;
    std::ranges::fill(data, std::byte{0});  // the caller's memory may be overwritten at once
    blocks.emplace_back(ticket, std::move(kept));
    total += n;
  }
  EXPECT_EQ(store.stats().bytes, total);
  EXPECT_EQ(store.stats().blocks, std::ssize(kSizes));
  for (int round = 0; round < 3; ++round) {
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      if (round > 0) expect_ok(store.prefetch(block->first));
      if (round == 2 && std::next(block) != blocks.rend()) expect_ok(store.prefetch(std::next(block)->first));
      expect_block(store, block->first, block->second);
    }
  }
  for (const auto& [ticket, data] : blocks) expect_ok(store.drop(ticket));
  EXPECT_EQ(store.stats().bytes, 0);
  EXPECT_EQ(store.stats().peak, total);
  expect_error(store.get(blocks[3].first, nullptr), StatusCode::invalid_argument, "was dropped");
  expect_error(store.drop(blocks[3].first), StatusCode::invalid_argument, "dropped already");
  expect_error(store.prefetch(blocks[3].first), StatusCode::invalid_argument, "no block");
}

TEST_P(Everywhere, StepsOfOnePatternTakeNothingMore) {
  Store store = open();
  std::mt19937 draw(5);
  const Bytes data = random_bytes(200000, 6);
  std::int64_t space = 0, files = 0, threads = 0;
  const int steps = GetParam() == "disk" ? 300 : 1000;
  for (int step = 0; step < steps && !HasFailure(); ++step) {
    std::vector<Ticket> tickets;
    std::vector<std::int64_t> sizes;
    std::mt19937 same(7);
    for (int i = 0; i < 12; ++i) {
      sizes.push_back(static_cast<std::int64_t>(same() % 200000));
      Ticket ticket = 0;
      expect_ok(store.put(data.data(), sizes.back(), "", &ticket));
      tickets.push_back(ticket);
    }
    for (int i = 11; i >= 0; --i) {
      Bytes found(static_cast<std::size_t>(sizes[i]));
      if (i > 0) expect_ok(store.prefetch(tickets[i - 1]));
      expect_ok(store.get(tickets[i], found.data()));
      ASSERT_TRUE(std::equal(found.begin(), found.end(), data.begin()));
      expect_ok(store.drop(tickets[i]));
    }
    if (step == 1) {
      space = store.stats().space;
      files = entries("/proc/self/fd");
      threads = entries("/proc/self/task");
    }
  }
  EXPECT_EQ(store.stats().space, space);
  EXPECT_EQ(entries("/proc/self/fd"), files);
  EXPECT_EQ(entries("/proc/self/task"), threads);
  EXPECT_EQ(store.stats().blocks, 0);
}

TEST_P(Everywhere, ClearGivesTheSpaceBackAndTheStoreGoesOn) {
  Store store = open();
  const Bytes data = random_bytes(2 * kMiB, 8);
  for (int round = 0; round < 3; ++round) {
    std::vector<Ticket> tickets(5);
    for (Ticket& ticket : tickets) ticket = put(store, data);
    expect_ok(store.prefetch(tickets[1]));
    EXPECT_GT(store.stats().space, 10 * kMiB);
    expect_ok(store.clear());
    EXPECT_EQ(store.stats().space, 0);
    EXPECT_EQ(store.stats().bytes, 0);
    expect_error(store.get(tickets[0], nullptr), StatusCode::invalid_argument, "no block");
  }
}

TEST_P(Everywhere, TheLimitIsKeptAndSaid) {
  Store store = open(4 * kMiB);
  const Bytes data = random_bytes(kMiB, 9);
  std::vector<Ticket> tickets;
  Status status;
  for (Ticket ticket = 0; status.ok(); tickets.push_back(ticket)) status = store.put(data.data(), kMiB, "u8", &ticket);
  tickets.pop_back();
  expect_error(status, StatusCode::device_error, "the limit is 4194304");
  EXPECT_EQ(tickets.size(), 3U);  // a header each
  EXPECT_EQ(store.stats().blocks, 3);
  for (const Ticket ticket : tickets) expect_block(store, ticket, data);
  expect_ok(store.drop(tickets[1]));
  expect_block(store, put(store, data), data);
}

TEST_P(Everywhere, WrongArgumentsAreErrors) {
  Store store = open();
  Ticket ticket = 0;
  const Bytes data(64);
  expect_error(store.put(data.data(), -1, "", &ticket), StatusCode::invalid_argument, "bytes is -1");
  expect_error(store.put(nullptr, 8, "", &ticket), StatusCode::invalid_argument, "data is null");
  expect_error(store.put(data.data(), (std::int64_t{1} << 62) + 1, "", &ticket), StatusCode::invalid_argument, "bytes is");
  expect_error(store.put(data.data(), 64, std::string(2049, 'x'), &ticket), StatusCode::invalid_argument, "at most 2048");
  EXPECT_EQ(ticket, 0U);
  expect_error(store.get(1, nullptr), StatusCode::invalid_argument, "no block 1");
  ticket = put(store, data, std::string(2048, 'x'));
  expect_error(store.get(ticket, nullptr), StatusCode::invalid_argument, "data is null");
  expect_block(store, ticket, data);
}

// ---- one thread and another ------------------------------------------------------------------------------------------------

TEST_P(Everywhere, ManyThreadsAtOnce) {
  Store store = open();
  std::atomic<int> wrong{0};
  const auto work = [&](int seed) {
    std::mt19937 draw(static_cast<unsigned>(seed));
    std::vector<std::pair<Ticket, Bytes>> mine;
    for (int i = 0; i < 60; ++i) {
      if (mine.size() < 4) {
        Bytes data = random_bytes(static_cast<std::int64_t>(draw() % (1U << (10 + draw() % 12))), draw());
        Ticket ticket = 0;
        wrong += !store.put(data.data(), static_cast<std::int64_t>(data.size()), "thread", &ticket).ok();
        mine.emplace_back(ticket, std::move(data));
      } else {
        auto& [ticket, data] = mine[draw() % mine.size()];
        if (draw() % 2 == 0) wrong += !store.prefetch(ticket).ok();
        Bytes found(data.size());
        if (draw() % 4 != 0) wrong += !store.get(ticket, found.data()).ok() || found != data;
        if (draw() % 3 == 0) {
          wrong += !store.drop(ticket).ok();
          std::swap(mine.back().first, ticket);
          std::swap(mine.back().second, data);
          mine.pop_back();
        }
      }
    }
    for (const auto& [ticket, data] : mine) wrong += !store.drop(ticket).ok();
  };
  std::vector<std::thread> threads;
  threads.reserve(6);
  for (int i = 0; i < 6; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(store.stats().blocks, 0);
}

TEST_P(Everywhere, SeveralThreadsReadOneBlock) {
  Store store = open();
  const Bytes data = random_bytes(5 * kMiB, 10);
  const Ticket ticket = put(store, data);
  std::vector<std::thread> threads;
  threads.reserve(8);
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&] {
      for (int k = 0; k < 4; ++k) expect_block(store, ticket, data);
    });
  for (std::thread& thread : threads) thread.join();
}

TEST(StoreThreads, SpaceOfADroppedBlockIsNotUsedWhileItIsWrittenOrRead) {
  for (const bool reading : {false, true}) {
    Fake fake(true);
    std::atomic<bool> open{false};
    std::atomic<int> waiting{0};
    std::atomic<bool> armed{!reading};
    fake.instead = [&](Fake::Call call, std::int64_t, std::int64_t, std::int64_t*) {
      if (call == (reading ? Fake::Call::read : Fake::Call::write) && armed) {
        ++waiting;
        while (!open) std::this_thread::yield();
      }
      return false;
    };
    Store store = over(fake, -1, 1);
    const Bytes one = random_bytes(100000, 11), other = random_bytes(100000, 12);
    const Ticket first = put(store, one);
    if (reading) {
      expect_block(store, put(store, other), other);
      armed = true;
      expect_ok(store.prefetch(first));
    }
    while (waiting == 0) std::this_thread::yield();
    expect_ok(store.drop(first));
    const std::int64_t space = store.stats().space;
    const Ticket second = put(store, other);
    EXPECT_GT(store.stats().space, space) << "another place";
    armed = false;
    open = true;
    expect_block(store, second, other);
    expect_block(store, put(store, one), one);
  }
}

TEST(StoreThreads, AFullStoreWaitsForTheSpaceOfDroppedBlocks) {
  Fake fake(true);
  fake.instead = [](Fake::Call, std::int64_t, std::int64_t, std::int64_t*) {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    return false;
  };
  const Bytes data = random_bytes(20000, 27);
  Store store = over(fake, std::int64_t{4} * 20480, 1);
  for (int step = 0; step < 50 && !HasFailure(); ++step) {
    std::vector<Ticket> tickets(4);
    for (Ticket& ticket : tickets) ticket = put(store, data);
    for (const Ticket ticket : tickets) expect_ok(store.drop(ticket));
  }
  for (int i = 0; i < 4; ++i) put(store, data);
  Ticket ticket = 0;
  expect_error(store.put(data.data(), 20000, "", &ticket), StatusCode::device_error, "the limit is 81920");
}

TEST(StoreThreads, DestroyedWhileBlocksAreAliveAndBeingWritten) {
  for (int i = 0; i < 20; ++i) {
    Fake fake(true);
    fake.instead = [](Fake::Call, std::int64_t, std::int64_t, std::int64_t*) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      return false;
    };
    Store store = over(fake);
    const Bytes data = random_bytes(2 * kMiB, 13);
    const Ticket ticket = put(store, data);
    put(store, data);
    expect_ok(store.prefetch(ticket));
  }
}

TEST(StoreThreads, NoThreadAndNoBufferBeforeTheFirstBlock) {
  const std::int64_t threads = entries("/proc/self/task");
  Store store;
  expect_ok(Store::open({.tier = Tier::disk, .dir = "."}, &store));
  EXPECT_EQ(entries("/proc/self/task"), threads);
  EXPECT_EQ(store.stats().buffers, 0);
  const Bytes data = random_bytes(100, 14);
  expect_block(store, put(store, data), data);
  EXPECT_EQ(entries("/proc/self/task"), threads + 2);
  store = Store();
  EXPECT_EQ(entries("/proc/self/task"), threads);
}

TEST_P(Everywhere, InAForkEveryCallIsAnErrorAndTheParentGoesOn) {
  Store store = open();
  const Bytes data = random_bytes(2 * kMiB, 15);
  const Ticket ticket = put(store, data);
  const pid_t child = fork();
  if (child == 0) {
    Ticket other = 0;
    Bytes found(data.size());
    const auto foreign = [](const Status& status) {
      return status.code() == StatusCode::device_error && status.message().find("is a fork") != std::string::npos;
    };
    const bool all = foreign(store.put(data.data(), 64, "", &other)) && foreign(store.get(ticket, found.data())) &&
                     foreign(store.prefetch(ticket)) && foreign(store.drop(ticket)) && foreign(store.clear()) &&
                     store.stats().blocks == 0;
    store = Store();  // does not wait for threads that are not there
    Store own;
    const bool opened = Store::open({.tier = Tier::host}, &own).ok() && own.put(data.data(), 64, "", &other).ok() &&
                        own.get(other, found.data()).ok();
    _exit(all && opened ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  expect_block(store, ticket, data);
}

// ---- faults ----------------------------------------------------------------------------------------------------------------

class Faults : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(, Faults, testing::Bool(), [](const auto& info) { return info.param ? "staged" : "direct"; });

// A step: blocks are put, then read backwards and dropped.  Returns the first error; what was read without one was right.
Status step(Store& store, const std::vector<Bytes>& blocks) {
  std::vector<Ticket> tickets;
  Status status;
  for (const Bytes& data : blocks) {
    Ticket ticket = 0;
    status = store.put(data.data(), static_cast<std::int64_t>(data.size()), "step", &ticket);
    if (!status.ok()) break;
    tickets.push_back(ticket);
  }
  for (std::size_t i = tickets.size(); i-- > 0;) {
    if (status.ok()) {
      if (i > 0) expect_ok(store.prefetch(tickets[i - 1]));
      Bytes found(blocks[i].size());
      status = store.get(tickets[i], found.data());
      EXPECT_TRUE(!status.ok() || found == blocks[i]) << "wrong bytes without an error";
    }
    expect_ok(store.drop(tickets[i]));
  }
  EXPECT_EQ(store.stats().blocks, 0);
  return status;
}

std::vector<Bytes> step_blocks() {
  std::vector<Bytes> blocks;
  for (const std::int64_t n : {1000, 30000, 0, 1100000, 2500000})
    blocks.push_back(random_bytes(n, static_cast<std::uint64_t>(n) + 1));
  return blocks;
}

TEST_P(Faults, AnErrorAtEachCallInTurn) {
  const std::vector<Bytes> blocks = step_blocks();
  for (const int error : {EIO, ENOSPC}) {
    std::atomic<int> calls{0};
    int fails_at = -1;
    Fake fake(GetParam());
    std::atomic<bool> failed{false};
    fake.instead = [&](Fake::Call, std::int64_t, std::int64_t, std::int64_t* result) {
      if (calls++ != fails_at) return false;
      failed = true;
      *result = -error;
      return true;
    };
    Store store = over(fake);
    expect_ok(step(store, blocks));
    const int all = calls;
    EXPECT_GT(all, 12);
    int seen = 0;
    for (int n = 0; n < all + 5; ++n) {
      expect_ok(store.clear());  // so that the medium grows again
      calls = 0;
      failed = false;
      fails_at = n;
      const Status status = step(store, blocks);
      if (!status.ok()) {
        ++seen;
        expect_error(status, StatusCode::device_error, "the test's memory");
        expect_error(status, StatusCode::device_error, std::strerror(error));
      } else {
        EXPECT_FALSE(failed && fails_at < all - 12) << "call " << n << " failed and nobody said so";
      }
      fails_at = -1;
      expect_ok(step(store, blocks));  // and the store is of use again
    }
    EXPECT_GT(seen, all / 2);
  }
}

TEST_P(Faults, NoRoomAtEachBlock) {
  const std::vector<Bytes> blocks = step_blocks();
  for (int n = 0; n < 5; ++n) {
    Fake fake(GetParam());
    int grown = 0;
    fake.instead = [&](Fake::Call call, std::int64_t, std::int64_t, std::int64_t* result) {
      if (call != Fake::Call::resize || grown++ != n) return false;
      *result = -ENOSPC;
      return true;
    };
    Store store = over(fake);
    expect_error(step(store, blocks), StatusCode::device_error, "no room");
    expect_ok(step(store, blocks));
  }
}

TEST_P(Faults, ShortAndInterruptedCallsAreContinued) {
  std::mt19937 draw(16);
  std::mutex mutex;
  Fake fake(GetParam());
  fake.shortened = true;
  fake.instead = [&](Fake::Call call, std::int64_t n, std::int64_t at, std::int64_t* result) {
    const std::lock_guard lock(mutex);
    if (call == Fake::Call::resize) {
      *result = -EINTR;
      return draw() % 2 == 0;
    }
    *result = -EINTR;
    return draw() % 4 == 0 && n > 0 && at >= 0;
  };
  Medium medium = fake.functions();
  for (auto* function : {&medium.read}) {
    *function = [inner = *function](void* data, std::int64_t n, std::int64_t at) {
      return inner(data, n > 100 ? n * 2 / 3 : n, at);
    };
  }
  medium.write = [inner = medium.write](const void* data, std::int64_t n, std::int64_t at) {
    return inner(data, n > 100 ? n / 3 : n, at);
  };
  Store store;
  expect_ok(Store::open({}, std::move(medium), &store));
  for (int i = 0; i < 5; ++i) expect_ok(step(store, step_blocks()));
}

TEST_P(Faults, AMediumThatEndsIsAnError) {
  for (const Fake::Call which : {Fake::Call::read, Fake::Call::write}) {
    Fake fake(GetParam());
    fake.instead = [&](Fake::Call call, std::int64_t, std::int64_t, std::int64_t* result) {
      *result = 0;
      return call == which;
    };
    Store store = over(fake);
    expect_error(step(store, step_blocks()), StatusCode::device_error, "it ends after 0");
  }
}

TEST_P(Faults, AFlippedBitIsAnErrorAndTheRestIsReadable) {
  Fake fake(GetParam());
  Store store = over(fake);
  const Bytes before = random_bytes(5000, 17), data = random_bytes(1300000, 18);
  const std::string label = "bfloat16 [1, 1128, 576]";
  const Ticket first = put(store, before);
  const std::int64_t at = GetParam() ? 8192 : (2 * kHeader + 5000 + 63) / 64 * 64;
  const Ticket ticket = put(store, data, label);
  expect_block(store, ticket, data);
  const std::int64_t header = (kHeader + static_cast<std::int64_t>(label.size()) + 63) / 64 * 64;
  std::mt19937 draw(19);
  std::vector<std::int64_t> places;
  places.reserve(static_cast<std::size_t>(header) + 1001);
  for (std::int64_t i = 0; i < header; ++i) places.push_back(i);
  for (int i = 0; i < 1000; ++i) places.push_back(header + static_cast<std::int64_t>(draw() % data.size()));
  places.push_back(header + static_cast<std::int64_t>(data.size()) - 1);
  Bytes found(data.size());
  for (const std::int64_t place : places) {
    const std::byte bit{static_cast<unsigned char>(1U << draw() % 8)};
    fake.memory[at + place] ^= bit;
    if (draw() % 2 == 0) expect_ok(store.prefetch(ticket));
    expect_error(store.get(ticket, found.data()), StatusCode::device_error, "is damaged");
    fake.memory[at + place] ^= bit;
  }
  expect_block(store, ticket, data);
  expect_block(store, first, before);
}

TEST_P(Faults, ABlockThatWasNeverWrittenIsToldFromTheOneBefore) {
  Fake fake(GetParam());
  bool lies = false;
  fake.instead = [&](Fake::Call call, std::int64_t n, std::int64_t, std::int64_t* result) {
    *result = n;
    return lies && call == Fake::Call::write;
  };
  Store store = over(fake);
  const Bytes data = random_bytes(70000, 20);
  Bytes found(data.size());
  const Ticket old = put(store, data);
  expect_block(store, old, data);
  expect_ok(store.drop(old));
  lies = true;
  const Ticket ticket = put(store, data);  // the same bytes in the same place: the data would be right by chance
  expect_error(store.get(ticket, found.data()), StatusCode::device_error, "another step");
  lies = false;
  Store other = over(fake);
  fake.end = 0;
  expect_block(other, put(other, data), data);
  lies = true;
  expect_ok(other.drop(1));
  fake.memory.assign(fake.memory.size(), std::byte{0});
  expect_error(other.get(put(other, data), found.data()), StatusCode::device_error, "is damaged");
}

TEST(StoreFaults, AFailedWriteIsToldByTheNextPutOnceAndByEachGet) {
  Fake fake(true);
  std::atomic<bool> fails{true}, begins{false};  // not before put has returned
  std::atomic<int> failed_writes{0};
  fake.instead = [&](Fake::Call call, std::int64_t, std::int64_t, std::int64_t* result) {
    *result = -EIO;
    if (!fails || call != Fake::Call::write) return false;
    while (!begins) std::this_thread::yield();
    ++failed_writes;
    return true;
  };
  Store store = over(fake);
  const Bytes data = random_bytes(5000, 21);
  Bytes found(data.size());
  const Ticket failed = put(store, data);
  begins = true;
  expect_error(store.get(failed, found.data()), StatusCode::device_error, "could not be written");
  fails = false;
  const Ticket next = put(store, data);  // it has been told
  expect_block(store, next, data);
  expect_error(store.get(failed, found.data()), StatusCode::device_error, "could not be written");
  begins = false;
  fails = true;
  put(store, data);
  begins = true;
  while (failed_writes < 2) std::this_thread::yield();
  fails = false;
  Ticket ticket = 0;
  for (int i = 0; i < 1000; ++i) {  // until the thread has said so
    const Status status = store.put(data.data(), 5000, "", &ticket);
    if (status.ok()) continue;
    expect_error(status, StatusCode::device_error, "could not be written");
    expect_ok(store.put(data.data(), 5000, "", &ticket));
    return;
  }
  FAIL() << "a failed write was lost";
}

TEST(StoreFaults, AFailedWriteOfABlockThatNobodyHoldsIsNotHeld) {
  Fake fake(true);
  std::atomic<bool> begins{false};
  fake.instead = [&](Fake::Call call, std::int64_t, std::int64_t at, std::int64_t* result) {
    if (call == Fake::Call::resize) return false;
    while (!begins) std::this_thread::yield();
    *result = -EIO;
    return call == Fake::Call::write && at == 0;
  };
  Store store = over(fake);
  const Bytes data = random_bytes(5000, 22);
  const Ticket failed = put(store, data);
  const Ticket good = put(store, data);
  begins = true;
  Bytes found(data.size());
  expect_error(store.get(failed, found.data()), StatusCode::device_error, "could not be written");
  expect_ok(store.drop(failed));
  expect_block(store, good, data);
  expect_ok(store.drop(good));
  fake.instead = nullptr;
  for (int i = 0; i < 10; ++i) expect_block(store, put(store, data), data);
}

// ---- the real tiers --------------------------------------------------------------------------------------------------------

TEST(StoreOptions, AreChecked) {
  Store store;
  expect_error(Store::open({.tier = Tier::disk, .dir = "/nowhere/at/all"}, &store), StatusCode::device_error,
               "/nowhere/at/all");
  expect_error(Store::open({.tier = Tier::disk, .dir = ".", .threads = 0}, &store), StatusCode::invalid_argument,
               "threads is 0");
  expect_error(Store::open({.tier = static_cast<Tier>(9)}, &store), StatusCode::invalid_argument, "tier is 9");
  Ticket ticket = 0;
  expect_error(store.put(nullptr, 0, "", &ticket), StatusCode::invalid_argument, "not open");
  expect_error(store.get(1, nullptr), StatusCode::invalid_argument, "not open");
}

TEST(StoreDisk, HasNoNameAndSaysWhereItIs) {
  const std::filesystem::path folder = std::filesystem::path(".") / "store_test_folder";
  std::filesystem::create_directory(folder);
  {
    Store store;
    expect_ok(Store::open({.tier = Tier::disk, .dir = folder}, &store));
    const Bytes data = random_bytes(kMiB, 23);
    const Ticket ticket = put(store, data);
    EXPECT_TRUE(std::filesystem::is_empty(folder));
    expect_block(store, ticket, data);
    EXPECT_NE(store.stats().place.find("store_test_folder"), std::string::npos);
    EXPECT_FALSE(store.stats().ram_disk);
  }
  std::filesystem::remove(folder);
}

TEST(StoreDisk, AFolderInMemoryIsTold) {
  Store store;
  if (!Store::open({.tier = Tier::disk, .dir = "/dev/shm"}, &store).ok()) GTEST_SKIP() << "no /dev/shm here";
  EXPECT_TRUE(store.stats().ram_disk);
  const Bytes data = random_bytes(3 * kMiB, 24);
  expect_block(store, put(store, data), data);
}

TEST(StoreDisk, AFileThatMayNotGrowIsAnError) {
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  signal(SIGXFSZ, SIG_IGN);
  Store store;
  expect_ok(Store::open({.tier = Tier::disk, .dir = "."}, &store));
  const Bytes data = random_bytes(kMiB, 25);
  const Ticket first = put(store, data);
  const rlimit little{2 * kMiB, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &little), 0);
  Ticket ticket = 0;
  expect_error(store.put(data.data(), kMiB, "", &ticket), StatusCode::device_error, "choose another folder");
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  expect_block(store, first, data);
  expect_block(store, put(store, data), data);
}

TEST(StoreHost, TakesNoMoreThanThereIs) {
  EXPECT_GT(available_memory(), kMiB);
  Store store;
  expect_ok(Store::open({.tier = Tier::host, .limit = std::int64_t{1} << 42}, &store));
  Ticket ticket = 0;
  const Bytes data(1);
  // Never read: it is refused before
  expect_error(store.put(data.data(), std::int64_t{1} << 41, "", &ticket), StatusCode::device_error, "no room");
  expect_block(store, put(store, data), data);
}

TEST(StoreHost, GivesMemoryBackWhenItIsCleared) {
  const auto resident = [] {
    std::int64_t pages = 0, unused = 0;
    std::ifstream file("/proc/self/statm");
    EXPECT_TRUE(file >> unused >> pages);
    return pages * sysconf(_SC_PAGESIZE);
  };
  Store store;
  expect_ok(Store::open({.tier = Tier::host}, &store));
  const Bytes data = random_bytes(8 * kMiB, 26);
  const std::int64_t before = resident();
  for (int i = 0; i < 8; ++i) put(store, data);
  EXPECT_GT(resident() - before, 60 * kMiB);
  expect_ok(store.clear());
  EXPECT_LT(resident() - before, 8 * kMiB);
}

}  // namespace
}  // namespace unswag
