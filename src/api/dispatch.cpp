// Which kernels serve a call.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <vector>

#include "api/check.hpp"
#include "cpu/threads.hpp"

// In unswag::cuda, whose CMake target makes the linker look for it; null without that library.
extern "C" [[gnu::weak]] const unswag::DeviceKernels* unswag_cuda_kernels();

namespace unswag {

// UNSWAG_ROWS comes from cmake/instruction_sets.cmake: ROW(portable) ROW(x86_64) ...
#define ROW(isa)                \
  namespace isa {               \
  extern const Kernels backend; \
  }
UNSWAG_ROWS
#undef ROW

namespace {

#define ROW(isa) &isa::backend,
constexpr const Kernels* kRows[] = {UNSWAG_ROWS};
#undef ROW

const std::vector<Kernels>& table() {
  static const std::vector<Kernels> rows = usable_rows(kRows);
  return rows;
}

Status unusable(std::string_view what, std::string_view name) {
  std::string usable;
  for (const Kernels& row : table()) usable.append(usable.empty() ? "" : ", ").append(row.name);
  return invalid_argument(what, " is '", name, "', which is not a backend that runs here; use one of: ", usable);
}

const Kernels* find(std::string_view name) {
  const auto row = std::ranges::find(table(), name, &Kernels::name);
  return row == table().end() ? nullptr : &*row;
}

std::string_view backend_from_environment() {
  const char* name = std::getenv("UNSWAG_BACKEND");
  return name ? name : "";
}

// What UNSWAG_BACKEND names, else the fastest.  With a wrong name no kernel is called: environment_status() is an error.
const Kernels* default_row() {
  const Kernels* named = find(backend_from_environment());
  return named ? named : &table().back();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> row{default_row()};
  return row;
}

}  // namespace

std::vector<Kernels> usable_rows(std::span<const Kernels* const> rows) {
  std::vector<Kernels> usable;
  for (const Kernels* row : rows) {
    if (!row->runs_here()) continue;
    Kernels next = *row;
    if (!usable.empty()) {
#define KERNEL(entry, ...) \
  if (!next.entry) next.entry = usable.back().entry;
      UNSWAG_KERNELS(KERNEL)
#undef KERNEL
    }
    usable.push_back(next);
  }
  return usable;
}

std::span<const Kernels* const> all_kernels() { return kRows; }

const DeviceKernels* device_kernels() { return unswag_cuda_kernels ? unswag_cuda_kernels() : nullptr; }

Status device_status(int device) {
  if (device < 0 && device != Stream::current) {
    return invalid_argument("device is ", device, "; pass the number of a CUDA device, or Stream::current");
  }
  if (!device_kernels()) {
    return not_supported("the memory is on a CUDA device, but this build of UnSwag has CPU kernels only; build it with ",
                         "UNSWAG_CUDA=ON (needs nvcc), or move the tensors to the CPU");
  }
  return device_kernels()->ready(device);
}

std::string cuda_problem(int device) { return device_status(device).message(); }

std::vector<std::string_view> cuda_architectures() {
  return device_kernels() ? device_kernels()->architectures() : std::vector<std::string_view>{};
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const Kernels& kernels_for(bool has_f64) { return has_f64 ? table().front() : kernels(); }

Status environment_status() {
  static const Status status = []() -> Status {
    const std::string_view backend = backend_from_environment();
    if (!backend.empty() && !find(backend)) return unusable("UNSWAG_BACKEND", backend);
    if (threads_from_environment() < 0) {
      return invalid_argument("UNSWAG_NUM_THREADS is '", std::getenv("UNSWAG_NUM_THREADS"),
                              "', which is not a positive number; correct it or unset it");
    }
    return {};
  }();
  return status;
}

std::vector<std::string_view> backend_names() {
  std::vector<std::string_view> names;
  for (const Kernels* row : kRows) names.emplace_back(row->name);
  return names;
}

bool backend_runs_here(std::string_view name) { return find(name) != nullptr; }

std::string_view current_backend() { return kernels().name; }

Status use_backend(std::string_view name) {
  const Kernels* row = name.empty() ? default_row() : find(name);
  if (!row) return unusable("use_backend: the name", name);
  current() = row;
  return {};
}

std::string_view version() { return UNSWAG_VERSION; }

}  // namespace unswag
