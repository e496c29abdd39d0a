#include "team.hpp"

#include <barrier>
#include <thread>
#include <vector>

#include "memory.hpp"

namespace unswag::test {

void Member::wait() const { static_cast<std::barrier<>*>(barrier)->arrive_and_wait(); }

void run_team(int size, void (*body)(const Member&, void* context), void* context) {
  std::barrier<> barrier(size);
  std::vector<std::thread> others;
  for (int rank = 1; rank < size; ++rank) {
    others.emplace_back([&, rank] { body({rank, size, &barrier}, context); });
  }
  body({0, size, &barrier}, context);
  for (std::thread& other : others) other.join();
}

void with_memory(std::int64_t bytes, void (*body)(void* memory, void* context), void* context) {
  const Memory memory{std::size_t(bytes)};
  body(memory.data(), context);
}

}  // namespace unswag::test
