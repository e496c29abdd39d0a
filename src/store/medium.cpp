#include "store/medium.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <system_error>

namespace unswag {
namespace {

constexpr std::int64_t kSector = 4096;  // what every disk transfers at least, and a page of memory
constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

// ---- disk

class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  ~File() { close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

// A descriptor of a file that no folder names, or -1 and errno.
int open_unnamed(const std::string& dir, int flags) {
  const int fd = open(dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL | flags, 0600);
  // What file systems without such files answer; folders that are not there, or not ours, answer otherwise.
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR)) return fd;
  std::string name = dir + "/unswag-XXXXXX";
  const int named = mkostemp(name.data(), O_CLOEXEC | flags);
  if (named >= 0) unlink(name.c_str());
  return named;
}

std::int64_t result(std::int64_t returned) { return returned < 0 ? -errno : returned; }

bool in_memory(int fd) {
  constexpr std::int64_t kTmpfs = 0x01021994, kRamfs = 0x858458f6;
  struct statfs about{};
  return fstatfs(fd, &about) == 0 && (about.f_type == kTmpfs || about.f_type == kRamfs);
}

// The page cache keeps nothing of this stretch.  What is not on the disk yet has to be written first.
void forget(int fd, std::int64_t at, std::int64_t bytes, bool written) {
  if (written) sync_file_range(fd, at, bytes, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
  posix_fadvise(fd, at, bytes, POSIX_FADV_DONTNEED);
}

}  // namespace

Status open_disk(const std::string& dir, Medium* medium) {
  medium->place = "the disk store in " + dir;
  bool direct = true;
  int fd = open_unnamed(dir, O_DIRECT);
  if (fd < 0 && errno == EINVAL) {  // not on this file system
    direct = false;
    fd = open_unnamed(dir, 0);
  }
  if (fd < 0) {
    return device_error("Store: a file cannot be made in ", dir, ": ", std::strerror(errno),
                        "; pass a folder (dir) that is there and that this process may write to");
  }
  const auto file = std::make_shared<File>(fd);
  medium->alignment = kSector;
  medium->staged = true;
  medium->ram_disk = in_memory(fd);
  medium->direct = direct;
  const bool cached = !direct && !medium->ram_disk;
  medium->read = [file, cached](void* data, std::int64_t bytes, std::int64_t at) {
    const std::int64_t n = result(pread(file->fd(), data, std::size_t(bytes), at));
    if (cached) forget(file->fd(), at, bytes, false);
    return n;
  };
  medium->write = [file, cached](const void* data, std::int64_t bytes, std::int64_t at) {
    const std::int64_t n = result(pwrite(file->fd(), data, std::size_t(bytes), at));
    if (cached) forget(file->fd(), at, bytes, true);
    return n;
  };
  medium->resize = [file](std::int64_t before, std::int64_t after) -> std::int64_t {
    if (after <= before) return result(ftruncate(file->fd(), after));
    const std::int64_t grown = result(fallocate(file->fd(), 0, before, after - before));
    return grown == -EOPNOTSUPP ? 0 : grown;  // no room shows when it is written, then
  };
  return {};
}

// ---- host memory

namespace {

class Mapping {
 public:
  explicit Mapping(std::int64_t bytes)
      : data_(mmap(nullptr, std::size_t(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)),
        bytes_(bytes) {}
  ~Mapping() {
    if (valid()) munmap(data_, std::size_t(bytes_));
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  bool valid() const { return data_ != MAP_FAILED; }
  std::int64_t bytes() const { return bytes_; }
  std::byte* at(std::int64_t offset) const { return static_cast<std::byte*>(data_) + offset; }

 private:
  void* data_;
  std::int64_t bytes_;
};

std::int64_t whole_pages(std::int64_t bytes) { return (bytes + kSector - 1) / kSector * kSector; }

// -1 if it is none.
std::int64_t number_of(const std::string& word) {
  const char* const end = word.data() + word.size();
  std::int64_t number = -1;
  const auto [stopped, error] = std::from_chars(word.data(), end, number);
  return error == std::errc() && stopped == end ? number : -1;
}

// The number behind `name` in a file of lines "name number"; the first number where `name` is empty; -1 without one.
std::int64_t number_in(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  while (file >> word) {
    if (name.empty()) return number_of(word);
    if (word == name && file >> word) return number_of(word);
  }
  return -1;
}

struct ControlGroup {
  const char *limit, *usage, *reclaimable;
};
constexpr ControlGroup kVersion1{"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};
constexpr ControlGroup kVersion2{"memory.max", "memory.current", "inactive_file"};

// What the group in that folder and those around it allow still.
std::int64_t allowed(const std::string& root, std::string group, const ControlGroup& files) {
  std::int64_t least = kUnlimited;
  while (true) {
    const std::string folder = root + group + "/";
    const std::int64_t limit = number_in(folder + files.limit, "");
    const std::int64_t usage = number_in(folder + files.usage, "");
    if (limit >= 0 && usage >= 0) {
      const std::int64_t reclaimable = std::max<std::int64_t>(number_in(folder + "memory.stat", files.reclaimable), 0);
      least = std::min(least, std::max<std::int64_t>(limit - usage + reclaimable, 0));
    }
    if (group.empty()) return least;
    group.resize(group.rfind('/'));
  }
}

}  // namespace

std::int64_t available_memory() {
  const std::int64_t kilobytes = number_in("/proc/meminfo", "MemAvailable:");
  std::int64_t least = kilobytes < 0 ? kUnlimited : kilobytes * 1024;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // 4:memory:/path, or 0::/path
    const std::size_t path = line.find(":/");
    if (path == std::string::npos) continue;
    const std::string group = line.substr(path + 1) == "/" ? "" : line.substr(path + 1);
    if (line.starts_with("0::")) least = std::min(least, allowed("/sys/fs/cgroup", group, kVersion2));
    if (line.find(":memory:") != std::string::npos) least = std::min(least, allowed("/sys/fs/cgroup/memory", group, kVersion1));
  }
  return least;
}

Status open_host(std::int64_t limit, Medium* medium) {
  if (limit < 0) limit = std::int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  const auto mapping = std::make_shared<Mapping>(std::max(whole_pages(limit), kSector));
  if (!mapping->valid()) {
    return device_error("Store: address space for ", limit, " bytes of host memory was refused: ", std::strerror(errno),
                        "; pass a smaller limit, or raise the process's limit of address space (ulimit -v)");
  }
  medium->place = "the host store (pageable memory)";
  medium->alignment = 64;
  medium->read = [mapping](void* data, std::int64_t bytes, std::int64_t at) {
    std::memcpy(data, mapping->at(at), std::size_t(bytes));
    return bytes;
  };
  medium->write = [mapping](const void* data, std::int64_t bytes, std::int64_t at) {
    std::memcpy(mapping->at(at), data, std::size_t(bytes));
    return bytes;
  };
  medium->resize = [mapping](std::int64_t before, std::int64_t after) -> std::int64_t {
    const std::int64_t old_end = whole_pages(before), new_end = whole_pages(after);
    if (new_end == old_end) return 0;
    if (new_end < old_end) {
      std::byte* rest = mapping->at(new_end);
      const auto bytes = std::size_t(old_end - new_end);
      // Mapped anew: the pages are free, and count as data of the process no more
      return mmap(rest, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED ? -errno
                                                                                                                        : 0;
    }
    if (new_end > mapping->bytes() || new_end - old_end > available_memory()) return -ENOMEM;
    return result(mprotect(mapping->at(old_end), std::size_t(new_end - old_end), PROT_READ | PROT_WRITE));
  };
  return {};
}

}  // namespace unswag
