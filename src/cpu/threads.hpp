// Work of n items cut into chunks and shared among threads.
#pragma once

#include <cstdint>

namespace unswag {

// Calls run(context, begin, end) once for every chunk [begin, end) of [0, n): chunk i is [i * grain, min(n, (i + 1) * grain)).
// The borders depend on n and grain only, never on the threads, and all work in the caller's floating-point environment, so
// that results have the same bits for any number of them.
//
// threads: how many may work, the caller included; 0: default_threads().  Served by the OpenMP pool of this process when it
// has one (torch's), because a second pool would fight with its spinning workers; else by a small pool of our own.  A pool
// does not survive fork: the child of a process that used OpenMP works alone, any other starts a pool of its own.
void run_chunks(std::int64_t n, std::int64_t grain, int threads,
                void (*run)(void* context, std::int64_t begin, std::int64_t end), void* context) noexcept;

// body(begin, end) for every chunk, as above.  The body must not throw; it may call parallel_for itself.
template <class Body>
[[gnu::always_inline]] inline void parallel_for(std::int64_t n, std::int64_t grain, int threads, const Body& body) {
  if (n <= 0) return;
  if (n <= grain) return body(std::int64_t{0}, n);
  run_chunks(
      n, grain, threads,
      [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The number of threads that UNSWAG_NUM_THREADS asks for; 0 when it is not set, -1 when it is not a positive number.
int threads_from_environment();

}  // namespace unswag
