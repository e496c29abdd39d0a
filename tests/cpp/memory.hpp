// Memory for kernel tests: it ends at a guard page, can be made read-only, starts at any misalignment, and may be larger
// than the machine (untouched pages cost nothing).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace unswag::test {

class Memory {
 public:
  // `bytes` bytes whose last one is the last before an unreadable page; filled with `fill`, or zero when the memory is large.
  explicit Memory(std::size_t bytes, unsigned char fill = 0xA5) : bytes_(bytes) {
    const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
    length_ = (bytes + page - 1) / page * page;
    base_ =
        static_cast<char*>(mmap(nullptr, length_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    mapped_ = length_ + 2 * page;
    pages_ = base_ + page;
    if (length_ && mprotect(pages_, length_, PROT_READ | PROT_WRITE) != 0) std::abort();
    if (bytes <= (std::size_t{1} << 28)) {
      std::memset(pages_, fill, length_);
    } else {
      madvise(pages_, length_, MADV_HUGEPAGE);  // fewer faults
    }
  }
  ~Memory() { munmap(base_, mapped_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void read_only() {
    if (length_ && mprotect(pages_, length_, PROT_READ) != 0) std::abort();
  }
  char* data() const { return pages_ + (length_ - bytes_); }
  std::size_t size() const { return bytes_; }

 private:
  std::size_t bytes_, length_ = 0, mapped_ = 0;
  char *base_ = nullptr, *pages_ = nullptr;
};

}  // namespace unswag::test
