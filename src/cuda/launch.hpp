// How the kernels of src/cuda run: as CUDA, or, for the tests, as plain C++ in which a team of host threads plays the block
// (tests/cpp/emulated/cuda.hpp).
//
// A kernel is a struct: its members are the arguments, `threads` the size of its block at most, `resident` how many blocks a
// processor is to hold at least (0: what the compiler thinks best; it may spill registers for more), Shared what a block
// shares, and
//   template <class Group> UNSWAG_HD void operator()(Group g, Shared& shared) const
// the work of worker g.rank() of g.size() in block g.block() of g.blocks().  Whatever the group and the grid, the result has
// the same bits.  g.sync() waits for all of a block; a kernel without a Shared of its own (Nothing) never waits.  g.memory() is
// what else a block shares: as many bytes as the launch asks for, from a multiple of sixteen on.
#pragma once

#include <cstdint>

#include "math/dtype.hpp"
#include "math/hd.hpp"
#include "unswag/tensor.hpp"

namespace unswag::UNSWAG_ISA_NS {

struct Nothing {};

// Calls each(i) for this worker's share of [0, n).
template <class Group, class Each>
UNSWAG_HD inline void share(const Group& g, std::int64_t n, const Each& each) {
  for (std::int64_t i = g.rank(); i < n; i += g.size()) each(i);
}
// The same over all blocks.
template <class Group, class Each>
UNSWAG_HD inline void share_grid(const Group& g, std::int64_t n, const Each& each) {
  for (std::int64_t i = g.block() * g.size() + g.rank(); i < n; i += g.blocks() * g.size()) each(i);
}

}  // namespace unswag::UNSWAG_ISA_NS

#ifdef __CUDACC__

namespace unswag::UNSWAG_ISA_NS {

struct Block {
  __device__ __forceinline__ int rank() const { return int(threadIdx.x); }
  __device__ __forceinline__ int size() const { return int(blockDim.x); }
  __device__ __forceinline__ std::int64_t block() const { return blockIdx.x; }
  __device__ __forceinline__ std::int64_t blocks() const { return gridDim.x; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void* memory() const {
    extern __shared__ __align__(16) char memory_of_block[];
    return memory_of_block;
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::resident) run(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  kernel(Block{}, shared);
}

// The blocks that a device is given at most: some for every place that a block can have on it.
std::int64_t most_blocks(int threads);

// The device of `stream` is the current one until this dies.
class OnDevice {
 public:
  explicit OnDevice(Stream stream);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

// Queues the kernel with `blocks` blocks, or with fewer, which then do the work of several; each has `threads` workers and
// `bytes` of memory, which with its Shared may be 48 KiB.
template <class Kernel>
void launch(const Kernel& kernel, std::int64_t blocks, Stream stream, int threads = Kernel::threads, std::int64_t bytes = 0) {
  const OnDevice here(stream);
  const std::int64_t most = most_blocks(threads);
  run<Kernel><<<unsigned(blocks < most ? blocks : most), unsigned(threads), std::size_t(bytes),
                static_cast<cudaStream_t>(stream.handle)>>>(kernel);
}

}  // namespace unswag::UNSWAG_ISA_NS

#endif
