// Host threads that play a block of CUDA threads.
#pragma once

#include <cstdint>

namespace unswag::test {

struct Member {
  int rank, size;
  void* barrier;
  void wait() const;  // for all of the team
};

// body(member, context) for each member of a team of `size`, at the same time; returns when all are done.
void run_team(int size, void (*body)(const Member&, void* context), void* context);

// body(memory, context) with `bytes` bytes before a guard page, filled with garbage.
void with_memory(std::int64_t bytes, void (*body)(void* memory, void* context), void* context);

}  // namespace unswag::test
