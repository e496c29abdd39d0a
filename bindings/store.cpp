// unswag._core.store_*: unswag/store.hpp for Python.  A store is a capsule, which nothing but its owner ends.  A block is an
// object that drops it when it ends: Python may raise KeyboardInterrupt between a call and the assignment of its result, and a
// number would be lost there with the block still in the store.
#include "unswag/store.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "common.hpp"

namespace unswag::python {

namespace {

using Address = std::uintptr_t;

constexpr const char* kCapsule = "unswag.Store";

struct Opened {
  Store store;
  // Bytes of tensors without data, now and at most; changed under the global lock alone.
  std::int64_t counted = 0, most_counted = 0;
};

Opened& opened(const nb::capsule& capsule) {
  void* found = PyCapsule_GetPointer(capsule.ptr(), kCapsule);
  if (found == nullptr) throw nb::python_error();
  return *static_cast<Opened*>(found);
}

// Runs `call` of the store without the global lock.
template <class Call>
Status unlocked(Opened& of, Call call) {
  const nb::gil_scoped_release released;
  return call(of.store);
}

class Block {
 public:
  Block(nb::capsule store, Address data, std::int64_t bytes, const nb::bytes& label)
      : store_(std::move(store)), of_(opened(store_)) {
    const std::string_view text(label.c_str(), label.size());
    Store::Ticket ticket = 0;
    const void* const from = reinterpret_cast<const void*>(data);  // NOLINT(performance-no-int-to-ptr): as in python.cpp
    check(unlocked(of_, [&](Store& s) { return s.put(from, bytes, text, &ticket); }));
    ticket_ = ticket;
  }
  ~Block() { static_cast<void>(end()); }  // in a fork the block is the parent's
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void prefetch() const {
    const Store::Ticket ticket = number();
    check_present(unlocked(of_, [&](Store& s) { return s.prefetch(ticket); }));
  }
  void get(Address data) const {
    const Store::Ticket ticket = number();
    void* const to = reinterpret_cast<void*>(data);  // NOLINT(performance-no-int-to-ptr): as in python.cpp
    check_present(unlocked(of_, [&](Store& s) { return s.get(ticket, to); }));
  }
  void drop() {
    const Status status = end();
    if (status.code() != StatusCode::invalid_argument) check(status);  // a cleared store has none to drop
  }

 private:
  Store::Ticket number() const {
    if (!ticket_) throw std::runtime_error("Store: the block was dropped; put it again");
    return *ticket_;
  }
  // The number is right: what is wrong is that the block is no longer there.
  static void check_present(const Status& status) {
    if (status.code() == StatusCode::invalid_argument) throw std::runtime_error(status.message());
    check(status);
  }
  Status end() {
    const std::optional<Store::Ticket> ticket = std::exchange(ticket_, std::nullopt);
    return ticket ? unlocked(of_, [&](Store& s) { return s.drop(*ticket); }) : Status();
  }

  nb::capsule store_;
  Opened& of_;
  std::optional<Store::Ticket> ticket_;  // none: dropped
};

// Of a tensor without data.
class Count {
 public:
  Count(nb::capsule store, std::int64_t bytes) : store_(std::move(store)), of_(opened(store_)), bytes_(bytes) {
    of_.counted += bytes;
    of_.most_counted = std::max(of_.most_counted, of_.counted);
  }
  ~Count() { drop(); }
  Count(const Count&) = delete;
  Count& operator=(const Count&) = delete;

  void drop() { of_.counted -= std::exchange(bytes_, 0); }

 private:
  nb::capsule store_;
  Opened& of_;
  std::int64_t bytes_;
};

nb::capsule store_open(bool disk, std::string dir, std::int64_t limit) {
  auto store = std::make_unique<Opened>();
  check(Store::open({.tier = disk ? Tier::disk : Tier::host, .dir = std::move(dir), .limit = limit}, &store->store));
  nb::capsule capsule(store.get(), kCapsule, [](void* p) noexcept {
    nb::gil_scoped_release released;  // it waits for its threads
    delete static_cast<Opened*>(p);
  });
  static_cast<void>(store.release());  // NOLINT(bugprone-unused-return-value): the capsule owns it
  return capsule;
}

}  // namespace

void bind_store(nb::module_& m) {
  using namespace nb::literals;
  m.def("store_open", &store_open, "disk"_a, "dir"_a, "limit"_a, "A store in host memory, or in a file in that folder.");
  m.def(
      "store_clear", [](const nb::capsule& store) { check(unlocked(opened(store), [](Store& s) { return s.clear(); })); },
      "store"_a);
  nb::class_<Block>(m, "StoreBlock", "A block of a store, dropped with this object.")
      .def(nb::init<nb::capsule, Address, std::int64_t, const nb::bytes&>(), "store"_a, "data"_a, "bytes"_a, "label"_a,
           "Puts a copy of `bytes` bytes at the address `data`.")
      .def("prefetch", &Block::prefetch)
      .def("get", &Block::get, "data"_a, "Copies the block to the address `data`. RuntimeError where it is no longer there.")
      .def("drop", &Block::drop, "Frees the space now; does nothing for a block that is no longer there.");
  nb::class_<Count>(m, "StoreCount", "Bytes without data, counted by a store as long as this object lives.")
      .def(nb::init<nb::capsule, std::int64_t>(), "store"_a, "bytes"_a)
      .def("drop", &Count::drop, "Counts them no longer.");
  using Values = nb::typed<nb::dict, nb::str, nb::object>;
  m.def(
      "store_stats",
      [](const nb::capsule& store) {
        const Opened& of = opened(store);
        const StoreStats stats = of.store.stats();
        nb::dict out;
        out["blocks"] = stats.blocks;
        out["bytes"] = stats.bytes;
        out["peak"] = stats.peak;
        out["space"] = stats.space;
        out["buffers"] = stats.buffers;
        out["place"] = stats.place;
        out["direct"] = stats.direct;
        out["ram_disk"] = stats.ram_disk;
        out["counted"] = of.counted;
        out["most_counted"] = of.most_counted;
        return Values(out);
      },
      "store"_a);
}

}  // namespace unswag::python
