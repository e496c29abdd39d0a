#include "cpu/threads.hpp"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <charconv>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

#include "unswag/unswag.hpp"

namespace unswag {
namespace {

// One call of run_chunks.  Whoever helps takes the next chunk until none is left, so it does not matter who comes, or when.
struct Job {
  std::int64_t n;
  std::int64_t grain;
  void (*run)(void*, std::int64_t, std::int64_t);
  void* context;
  std::int64_t chunks = (n - 1) / grain + 1;
  std::atomic<std::int64_t> next{0};
  std::fenv_t environment{};  // the caller's, when others help

  // Guarded by the pool's mutex.
  int wanted = 0;  // helpers that may still join
  int active = 0;  // helpers at work
  Job* below = nullptr;

  void work() {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      run(context, i * grain, i == chunks - 1 ? n : (i + 1) * grain);
  }

  // The same in the caller's floating-point environment: who flushes subnormals wants them flushed everywhere.
  void help() {
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&environment);
    work();
    std::fesetenv(&own);
  }
};

// Our own threads, for processes without OpenMP.  Jobs stand in a stack of callers; each caller works on its own job and
// waits only for helpers that have begun it, so that concurrent and nested calls cannot block each other.
class Pool {
 public:
  const pid_t pid = getpid();

  void run(Job& job, int helpers) {
    std::unique_lock lock(mutex_);
    while (size_ < helpers && start_worker()) {
    }
    job.wanted = std::min(helpers, size_);
    job.below = top_;
    top_ = &job;
    lock.unlock();
    arrived_.notify_all();

    job.work();

    lock.lock();
    Job** link = &top_;
    while (*link != &job) link = &(*link)->below;
    *link = job.below;
    left_.wait(lock, [&] { return job.active == 0; });
  }

 private:
  // False when the system gives no more threads: those that exist have to do.
  bool start_worker() {
    try {
      std::thread([this] { serve(); }).detach();
    } catch (...) {
      return false;
    }
    ++size_;
    return true;
  }

  [[noreturn]] void serve() {
    std::unique_lock lock(mutex_);
    while (true) {
      Job* job = top_;
      while (job && job->wanted == 0) job = job->below;
      if (!job) {
        arrived_.wait(lock);
        continue;
      }
      --job->wanted;
      ++job->active;
      lock.unlock();
      job->help();
      lock.lock();
      if (--job->active == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable arrived_, left_;
  Job* top_ = nullptr;
  int size_ = 0;
};

// The pool of this process, or null when there is no memory for one.  Never deleted: its threads wait until the process
// ends.  A forked child inherits the object but none of its threads (and perhaps a locked mutex), so it makes a new one.
Pool* own_pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* pool = current.load();
  while (!pool || pool->pid != getpid()) {
    Pool* made = new (std::nothrow) Pool;
    if (!made) return nullptr;
    if (current.compare_exchange_strong(pool, made)) return made;
    delete made;
  }
  return pool;
}

using GompParallel = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

// libgomp's threads die in a fork, and its next parallel region then waits for them for ever; dlopen in a forked child can
// crash when another thread of the parent was in it.  So a child neither uses libgomp nor looks for it.
const pid_t loaded_by = getpid();
bool forked() { return getpid() != loaded_by; }

// How many libraries this process has ever loaded.
unsigned long long libraries_loaded() {
  unsigned long long loaded = 0;
  const auto read = [](dl_phdr_info* first, std::size_t, void* out) {
    *static_cast<unsigned long long*>(out) = first->dlpi_adds;
    return 1;
  };
  dl_iterate_phdr(read, &loaded);
  return loaded;
}

// libgomp's entry when this process has loaded libgomp, else null.  torch may be imported late, so we look again (27 us)
// whenever libraries were added (30 ns to see).
GompParallel gomp_parallel() {
  static std::atomic<GompParallel> found{nullptr};
  static std::atomic<unsigned long long> searched{0};
  if (GompParallel entry = found.load()) return entry;
  if (forked()) return nullptr;
  const unsigned long long loaded = libraries_loaded();
  if (searched.exchange(loaded) == loaded) return nullptr;
  void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return nullptr;
  found = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
  return found;
}

}  // namespace

void run_chunks(std::int64_t n, std::int64_t grain, int threads, void (*run)(void*, std::int64_t, std::int64_t),
                void* context) noexcept {
  if (n <= 0) return;
  Job job{n, std::max<std::int64_t>(grain, 1), run, context};
  if (threads <= 0) threads = default_threads();
  threads = static_cast<int>(std::min<std::int64_t>(threads, job.chunks));
  if (threads == 1) return job.work();
  std::fegetenv(&job.environment);
  if (GompParallel parallel = gomp_parallel()) {
    if (forked()) return job.work();
    parallel([](void* data) { static_cast<Job*>(data)->help(); }, &job, static_cast<unsigned>(threads), 0);
  } else if (Pool* pool = own_pool()) {
    pool->run(job, threads - 1);
  } else {
    job.work();
  }
}

int threads_from_environment() {
  const char* text = std::getenv("UNSWAG_NUM_THREADS");
  if (!text || !*text) return 0;
  const char* end = text + std::strlen(text);
  int threads = 0;
  const auto [stop, error] = std::from_chars(text, end, threads);
  return error == std::errc{} && stop == end && threads > 0 ? threads : -1;
}

int default_threads() {
  static const int threads = [] {
    const int asked = threads_from_environment();
    return asked > 0 ? asked : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }();
  return threads;
}

}  // namespace unswag
