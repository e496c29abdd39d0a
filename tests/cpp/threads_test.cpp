#include "cpu/threads.hpp"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <set>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "unswag/unswag.hpp"

namespace unswag {
namespace {

using Chunk = std::pair<std::int64_t, std::int64_t>;

std::vector<Chunk> chunks(std::int64_t n, std::int64_t grain, int threads) {
  std::mutex mutex;
  std::vector<Chunk> seen;
  parallel_for(n, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    const std::lock_guard lock(mutex);
    seen.emplace_back(begin, end);
  });
  std::ranges::sort(seen);
  return seen;
}

// Runs f in a forked child that is killed when it hangs; what the child returned, or -1.
template <class F>
int in_child(F f) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(f());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// The number of threads that took part in a call in which `threads` chunks wait for each other, 1 if nobody came to help.
int helpers(int threads) {
  std::atomic<int> arrived{0};
  std::mutex mutex;
  std::set<std::thread::id> ids;
  parallel_for(threads, 1, threads, [&](std::int64_t, std::int64_t) {
    ++arrived;
    for (int i = 0; i < 2000 && arrived < threads; ++i) usleep(100);
    const std::lock_guard lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  return static_cast<int>(ids.size());
}

std::int64_t sum_of_indices(std::int64_t n, std::int64_t grain, int threads) {
  std::atomic<std::int64_t> sum{0};
  parallel_for(n, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t part = 0;
    for (std::int64_t i = begin; i < end; ++i) part += i;
    sum += part;
  });
  return sum;
}

TEST(Threads, ChunksDependOnSizeAndGrainOnly) {
  const std::vector<Chunk> expected{{0, 4}, {4, 8}, {8, 10}};
  for (int threads : {0, 1, 2, 3, 64}) EXPECT_EQ(chunks(10, 4, threads), expected) << threads << " threads";
}

TEST(Threads, EveryItemIsServedOnce) {
  for (std::int64_t n : {1, 2, 7, 8, 9, 1000}) {
    for (std::int64_t grain : {1, 3, 8, 999, 1000, 1001}) {
      std::int64_t next = 0;
      for (const auto& [begin, end] : chunks(n, grain, 3)) {
        EXPECT_EQ(begin, next);
        EXPECT_GT(end, begin);
        EXPECT_LE(end - begin, grain);
        next = end;
      }
      EXPECT_EQ(next, n);
    }
  }
}

TEST(Threads, NothingToDoCallsNothing) {
  EXPECT_TRUE(chunks(0, 4, 2).empty());
  EXPECT_TRUE(chunks(-1, 4, 2).empty());
}

TEST(Threads, SmallWorkIsDoneByTheCaller) {
  std::thread::id worker;
  parallel_for(4, 4, 8, [&](std::int64_t, std::int64_t) { worker = std::this_thread::get_id(); });
  EXPECT_EQ(worker, std::this_thread::get_id());
}

TEST(Threads, SizesAre64Bit) {
  constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
  const std::vector<Chunk> seen = chunks(largest, std::int64_t{1} << 62, 2);
  ASSERT_EQ(seen.size(), 2U);
  EXPECT_EQ(seen[1], Chunk(std::int64_t{1} << 62, largest));
}

TEST(Threads, AsManyWorkAsAskedFor) {
  EXPECT_EQ(helpers(1), 1);
  EXPECT_EQ(helpers(2), 2);
  EXPECT_EQ(helpers(5), 5);
  EXPECT_EQ(helpers(3), 3);
}

TEST(Threads, HelpersRoundAsTheCaller) {
  const int before = std::fegetround();
  for (const int mode : {FE_UPWARD, FE_TONEAREST}) {
    std::fesetround(mode);
    std::atomic<int> others{0}, arrived{0};
    parallel_for(3, 1, 3, [&](std::int64_t, std::int64_t) {
      ++arrived;
      for (int i = 0; i < 2000 && arrived < 3; ++i) usleep(100);
      others += std::fegetround() != mode;
    });
    std::fesetround(before);
    EXPECT_EQ(arrived, 3);
    EXPECT_EQ(others, 0);
  }
}

TEST(Threads, NestedCallsFinish) {
  std::atomic<std::int64_t> sum{0};
  parallel_for(16, 1, 4, [&](std::int64_t begin, std::int64_t) { sum += begin + sum_of_indices(100, 7, 4); });
  EXPECT_EQ(sum, 120 + 16 * 4950);
}

TEST(Threads, ConcurrentCallersFinish) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  callers.reserve(4);
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 500; ++round) wrong += sum_of_indices(1000, 10, 3) != 499500;
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Threads, AForkedChildMakesItsOwnPool) {
  ASSERT_EQ(helpers(3), 3);
  EXPECT_EQ(in_child([] { return helpers(3); }), 3);
  EXPECT_EQ(in_child([] { return in_child([] { return helpers(2); }); }), 2);
  EXPECT_EQ(helpers(3), 3);
}

TEST(Threads, AForkWhileThePoolWorksIsSurvived) {
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) sum_of_indices(1000, 1, 3);
  });
  for (int round = 0; round < 50; ++round) EXPECT_EQ(in_child([] { return sum_of_indices(100, 1, 3) == 4950 ? 7 : 1; }), 7);
  stop = true;
  busy.join();
}

TEST(Threads, EnvironmentIsRead) {
  const auto asked = [](const char* text) {
    setenv("UNSWAG_NUM_THREADS", text, 1);
    const int threads = threads_from_environment();
    unsetenv("UNSWAG_NUM_THREADS");
    return threads;
  };
  EXPECT_EQ(asked("3"), 3);
  EXPECT_EQ(asked(""), 0);
  EXPECT_EQ(threads_from_environment(), 0);
  for (const char* wrong : {"0", "-2", "two", "2x", " 2", "99999999999"}) EXPECT_EQ(asked(wrong), -1) << wrong;
}

// What loads libgomp changes the pool of its process, so it runs in a fresh one: this program, started again by main below.
int gomp_scenario(std::string_view name) {
  alarm(20);
  if (sum_of_indices(1000, 10, 3) != 499500) return 1;  // our pool, before libgomp appears
  void* library = dlopen("libgomp.so.1", RTLD_NOW);
  if (!library) return 2;
  const auto in_parallel = reinterpret_cast<int (*)()>(dlsym(library, "omp_in_parallel"));
  std::atomic<int> inside{0};
  parallel_for(4, 1, 2, [&](std::int64_t, std::int64_t) { inside += in_parallel(); });
  if (inside != 4) return 3;
  if (helpers(3) != 3 || helpers(2) != 2) return 4;
  if (name == "fork" && in_child([] { return helpers(2) == 1 && sum_of_indices(1000, 10, 2) == 499500 ? 7 : 1; }) != 7)
    return 5;
  return helpers(2) == 2 ? 7 : 6;
}

int run_scenario(const char* name) {
  const pid_t child = fork();
  if (child == 0) {
    setenv("UNSWAG_GOMP_SCENARIO", name, 1);
    execl("/proc/self/exe", "threads_test", nullptr);
    _exit(127);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(Threads, LibgompServesWhenTheProcessHasIt) { EXPECT_EQ(run_scenario("teams"), 7); }
TEST(Threads, AForkedChildOfALibgompUserWorksAlone) { EXPECT_EQ(run_scenario("fork"), 7); }

}  // namespace
}  // namespace unswag

int main(int argc, char** argv) {
  if (const char* name = std::getenv("UNSWAG_GOMP_SCENARIO")) return unswag::gomp_scenario(name);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
