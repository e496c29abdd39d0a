// CUDA's row, and what only a device has.
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <string>

#include "backend.hpp"
#include "cuda/eight.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// UNSWAG_CUDA_NAMES comes from cmake/cuda.cmake: "sm_75+sm_80+...+compute_90".
std::vector<std::string_view> architectures() {
  std::vector<std::string_view> names;
  for (std::string_view rest = UNSWAG_CUDA_NAMES; !rest.empty();) {
    const std::size_t end = rest.find('+');
    names.push_back(rest.substr(0, end));
    rest = end == rest.npos ? "" : rest.substr(end + 1);
  }
  return names;
}

template <class T>
struct FillWith {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;
  T* out;
  std::int64_t n;
  T value;
  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    share_grid(g, n, [&](std::int64_t i) { out[i] = value; });
  }
};

void fill(const Vector& v, double value, Stream stream) {
  math::visit(v.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    const FillWith<T> kernel{static_cast<T*>(v.data), v.size, element<T>(value)};
    launch_for(kernel, v.size, stream);
  });
}

int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

std::string architectures_text() {
  std::string text;
  for (std::string_view name : architectures()) text.append(text.empty() ? "" : ", ").append(name);
  return text;
}

Status examine(int device) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    cudaGetLastError();
    return device_error("no CUDA device can be used (", error == cudaSuccess ? "there is none" : cudaGetErrorString(error),
                        "); look at the driver with nvidia-smi, or move the tensors to the CPU");
  }
  if (device >= count) {
    return invalid_argument("device is ", device, ", but there are ", count, " CUDA devices, numbered from 0");
  }
  const OnDevice here({nullptr, 0, device});
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, run<FillWith<float>>);
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  cudaDeviceProp device_is{};
  cudaGetDeviceProperties(&device_is, device);
  const int number = 10 * device_is.major + device_is.minor;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    return not_supported("device ", device, " (", device_is.name, ") has the architecture sm_", number,
                         ", but UnSwag was built for ", architectures_text(),
                         "; build it with -DUNSWAG_CUDA_ARCHITECTURES=", number, ", or move the tensors to the CPU");
  }
  return device_error("device ", device, " (", device_is.name, ") cannot be used: ", cudaGetErrorString(error));
}

Status ready(int device) {
  static std::array<std::atomic<bool>, 64> usable{};  // devices that passed examine()
  if (device == Stream::current) {
    int count = 0;
    device = cudaGetDeviceCount(&count) == cudaSuccess ? current_device() : 0;
  }
  const bool kept = device >= 0 && std::size_t(device) < usable.size();
  if (kept && usable[std::size_t(device)]) return {};
  Status status = examine(device);
  if (kept && status.ok()) usable[std::size_t(device)] = true;
  return status;
}

Status launched() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return device_error("CUDA says '", cudaGetErrorString(error), "' (", cudaGetErrorName(error),
                      "); an earlier kernel of any library may be the cause: run with CUDA_LAUNCH_BLOCKING=1 to see which");
}

void* pinned_allocate(std::int64_t bytes) {
  void* memory = nullptr;
  if (cudaHostAlloc(&memory, std::size_t(bytes), cudaHostAllocPortable) == cudaSuccess) return memory;
  cudaGetLastError();
  return nullptr;
}

void pinned_release(void* memory) {
  if (cudaFreeHost(memory) != cudaSuccess) cudaGetLastError();
}

bool runs_here() { return ready(Stream::current).ok(); }

}  // namespace

OnDevice::OnDevice(Stream stream) {
  if (stream.device < 0) return;
  const int now = current_device();
  if (now == stream.device) return;
  before_ = now;
  cudaSetDevice(stream.device);
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

std::int64_t most_blocks(int threads) {
  int processors = 1, places = 1;
  const int device = current_device();
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&places, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  return std::int64_t{4} * processors * (places / threads);
}

}  // namespace unswag::UNSWAG_ISA_NS

extern "C" const unswag::DeviceKernels* unswag_cuda_kernels() {
  using namespace unswag::UNSWAG_ISA_NS;
  static const unswag::DeviceKernels row_of_cuda = [] {
    unswag::DeviceKernels d;
    d.kernels = row("cuda", runs_here);
    d.ready = ready;
    d.launched = launched;
    d.fill = fill;
    d.architectures = architectures;
    d.pinned_allocate = pinned_allocate;
    d.pinned_release = pinned_release;
    return d;
  }();
  return &row_of_cuda;
}
