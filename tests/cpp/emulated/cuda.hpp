// src/cuda as plain C++, forced in front of its sources for the row cuda-emulated: a team of host threads plays the block, so
// that strides, waits and races show without a GPU (under the thread sanitizer too).  What a block shares begins as garbage.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/launch.hpp"
#include "team.hpp"

namespace unswag::UNSWAG_ISA_NS {

class Team {
 public:
  Team(const test::Member& member, std::int64_t block, std::int64_t blocks, void* memory)
      : member_(member), block_(block), blocks_(blocks), memory_(memory) {}
  int rank() const { return member_.rank; }
  int size() const { return member_.size; }
  std::int64_t block() const { return block_; }
  std::int64_t blocks() const { return blocks_; }
  void sync() const { member_.wait(); }
  void* memory() const { return memory_; }

 private:
  const test::Member& member_;
  std::int64_t block_, blocks_;
  void* memory_;
};

// What a member of the team does: its part of every block.
template <class Kernel, class Context>
void run_blocks(const test::Member& member, void* p) {
  Context& c = *static_cast<Context*>(p);
  for (std::int64_t b = 0; b < c.blocks; ++b) {
    if constexpr (!std::is_same_v<typename Kernel::Shared, Nothing>) {
      member.wait();
      if (member.rank == 0) {
        std::memset(static_cast<void*>(&c.shared), 0xA5, sizeof c.shared);
        std::memset(c.memory, 0xA5, std::size_t(c.bytes));
      }
      member.wait();
    }
    c.kernel(Team(member, b, c.blocks, c.memory), c.shared);
  }
}

// A grid of three blocks at most, and teams that fit into no power of two: a kernel must walk through what is left.  Behind the
// `bytes` that a block asks for there is a guard page.
template <class Kernel>
void launch(const Kernel& kernel, std::int64_t blocks, Stream stream, int = Kernel::threads, std::int64_t bytes = 0) {
  using Shared = typename Kernel::Shared;
  constexpr bool waits = !std::is_same_v<Shared, Nothing>;
  struct Context {
    const Kernel& kernel;
    std::int64_t blocks;
    int team;
    std::int64_t bytes;
    void* memory;
    Shared shared;
  } context{
      kernel, blocks < 3 ? blocks : 3, waits ? (stream.threads ? stream.threads + 1 : 3) : blocks > 100 ? 2 : 1, bytes, nullptr,
      {}};
  test::with_memory(
      bytes,
      [](void* memory, void* p) {
        Context& c = *static_cast<Context*>(p);
        c.memory = memory;
        test::run_team(c.team, run_blocks<Kernel, Context>, p);
      },
      &context);
}

}  // namespace unswag::UNSWAG_ISA_NS
