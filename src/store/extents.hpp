// Which stretches of a medium are free.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>

namespace unswag {

// Offsets from 0 to end(), which grows when no hole is large enough.  The same sequence of sizes, taken and given back in the
// same order, lands in the same places, so a medium does not grow from step to step.
class Extents {
 public:
  std::int64_t end() const { return end_; }

  // Where `size` > 0 bytes fit: in a hole of exactly this size, else in the first that is large enough, else at the end, where
  // a hole counts as the beginning.  Nothing is taken yet.
  std::int64_t place(std::int64_t size) const {
    auto fits = holes_.end();
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
      if (hole->second == size) return hole->first;
      if (hole->second > size && fits == holes_.end()) fits = hole;
    }
    if (fits != holes_.end()) return fits->first;
    if (!holes_.empty()) {
      const auto last = std::prev(holes_.end());
      if (last->first + last->second == end_) return last->first;
    }
    return end_;
  }

  // Takes what `place` found.
  void take(std::int64_t at, std::int64_t size) {
    std::int64_t room = 0;
    if (const auto hole = holes_.find(at); hole != holes_.end()) {
      room = hole->second;
      holes_.erase(hole);
    }
    if (room > size) holes_.emplace(at + size, room - size);
    if (at + size > end_) end_ = at + size;
  }

  void give_back(std::int64_t at, std::int64_t size) {
    const auto after = holes_.lower_bound(at);
    if (after != holes_.end() && at + size == after->first) {
      size += after->second;
      holes_.erase(after);
    }
    const auto next = holes_.lower_bound(at);
    if (next != holes_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == at) {
        before->second += size;
        return;
      }
    }
    holes_.emplace(at, size);
  }

  void reset() {
    holes_.clear();
    end_ = 0;
  }

 private:
  std::map<std::int64_t, std::int64_t> holes_;  // start and size; no two touch
  std::int64_t end_ = 0;
};

}  // namespace unswag
