// Host side shared by the launchers: dispatch on the dtype, the choice of the 16-byte path, how sums are cut
// into chunks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "shared_relu.h"

namespace deepshare::cuda {

constexpr int kThreads = 256;
// __launch_bounds__' second argument: without it ptxas holds some kernels to 32, 40 or 128 registers, and
// spills.
constexpr int kMinBlocks = 1;
constexpr int64_t kMaxGridX = 2147483647;  // CUDA's limit for gridDim.x

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that is at least n, but no more than `most` (itself a power of two).
inline int power_of_2(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

template <class... Pointers>
bool aligned_16(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T>
struct Tag {
  using type = T;
};

template <class F>
const char* dispatch(Dtype dtype, F&& launch) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch(Tag<float>{});
    case Dtype::kFloat16:
      return launch(Tag<__half>{});
    case Dtype::kBFloat16:
      return launch(Tag<__nv_bfloat16>{});
    case Dtype::kFloat64:
      return launch(Tag<double>{});
  }
  return "shared_relu: unknown dtype";
}

// After every launch: nullptr or CUDA's message (static storage).
inline const char* launch_status() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// A chunk is the fixed run of positions whose sums over g*x*gate and g*x one program writes to the workspace,
// [2, chunks, C]. It depends on dtype and geometry only: so does the order of every sum.
enum class Walk { kChannelsFirst, kChannelsLast };
struct Chunking {
  Walk walk;
  int64_t positions;  // per chunk
  int64_t chunks;
};
Chunking chunking(Dtype dtype, const Geometry& geometry, bool soft);

const char* launch_backward_hard(const BackwardArgs& args, const Chunking& chunks, cudaStream_t stream);
const char* launch_backward_soft_first(const BackwardArgs& args, const Chunking& chunks, cudaStream_t stream);
const char* launch_backward_soft_last(const BackwardArgs& args, const Chunking& chunks, cudaStream_t stream);
const char* launch_sums(const BackwardArgs& args, const Chunking& chunks, cudaStream_t stream);

}  // namespace deepshare::cuda
