// unswag._core.store_*: unswag/store.hpp for Python.  A store is a capsule, which nothing but its owner ends; blocks are
// numbers.
#include "unswag/store.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "common.hpp"

namespace unswag::python {

namespace {

using Address = std::uintptr_t;

constexpr const char* kCapsule = "unswag.Store";

Store& store_in(const nb::capsule& capsule) {
  void* store = PyCapsule_GetPointer(capsule.ptr(), kCapsule);
  if (store == nullptr) throw nb::python_error();
  return *static_cast<Store*>(store);
}

// Runs `call` of the store without the global lock.
template <class Call>
void unlocked(const nb::capsule& capsule, Call call) {
  Store& store = store_in(capsule);
  Status status;
  {
    nb::gil_scoped_release released;
    status = call(store);
  }
  check(status);
}

nb::capsule store_open(bool disk, std::string dir, std::int64_t limit) {
  auto store = std::make_unique<Store>();
  check(Store::open({.tier = disk ? Tier::disk : Tier::host, .dir = std::move(dir), .limit = limit}, store.get()));
  nb::capsule capsule(store.get(), kCapsule, [](void* p) noexcept {
    nb::gil_scoped_release released;  // it waits for its threads
    delete static_cast<Store*>(p);
  });
  static_cast<void>(store.release());
  return capsule;
}

}  // namespace

void bind_store(nb::module_& m) {
  using namespace nb::literals;
  m.def("store_open", &store_open, "disk"_a, "dir"_a, "limit"_a, "A store in host memory, or in a file in that folder.");
  m.def(
      "store_put",
      [](const nb::capsule& store, Address data, std::int64_t bytes, nb::bytes label) {
        Store::Ticket ticket = 0;
        const std::string_view text(label.c_str(), label.size());
        unlocked(store, [&](Store& s) { return s.put(reinterpret_cast<const void*>(data), bytes, text, &ticket); });
        return ticket;
      },
      "store"_a, "data"_a, "bytes"_a, "label"_a);
  m.def(
      "store_prefetch",
      [](const nb::capsule& store, Store::Ticket ticket) { unlocked(store, [&](Store& s) { return s.prefetch(ticket); }); },
      "store"_a, "ticket"_a);
  m.def(
      "store_get",
      [](const nb::capsule& store, Store::Ticket ticket, Address data) {
        unlocked(store, [&](Store& s) { return s.get(ticket, reinterpret_cast<void*>(data)); });
      },
      "store"_a, "ticket"_a, "data"_a);
  m.def(
      "store_drop",
      [](const nb::capsule& store, Store::Ticket ticket) { unlocked(store, [&](Store& s) { return s.drop(ticket); }); },
      "store"_a, "ticket"_a);
  m.def("store_clear", [](const nb::capsule& store) { unlocked(store, [](Store& s) { return s.clear(); }); }, "store"_a);
  using Values = nb::typed<nb::dict, nb::str, nb::object>;
  m.def(
      "store_stats",
      [](const nb::capsule& store) {
        const StoreStats stats = store_in(store).stats();
        nb::dict out;
        out["blocks"] = stats.blocks;
        out["bytes"] = stats.bytes;
        out["peak"] = stats.peak;
        out["space"] = stats.space;
        out["buffers"] = stats.buffers;
        out["place"] = stats.place;
        out["direct"] = stats.direct;
        out["ram_disk"] = stats.ram_disk;
        return Values(out);
      },
      "store"_a);
}

}  // namespace unswag::python
