// Host side shared by the launchers: launches, dispatch on the dtype, the choice of the 16-byte path.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "shared_relu.h"

namespace deepshare::cuda {

constexpr int kThreads = 256;
// Blocks that must fit on a multiprocessor, __launch_bounds__' second argument: 64 registers a thread.
// Without it ptxas picks limits of its own, and spills.
constexpr int kMinBlocks = 4;
// Vectors of each tensor that a thread loads before it uses the first. What must be in flight is bandwidth
// times latency: 4.8 TB/s over 132 multiprocessors at 700 ns are 25 KiB each. 4 blocks with 16 bytes of each
// tensor twice have 32 KiB and more; with one vector a thread waits with half of that.
constexpr int kUnroll = 2;
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

// launch(Tag<T>{}); every dtype is one of these, the binding checked it.
template <class F>
auto dispatch(Dtype dtype, F&& launch) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch(Tag<float>{});
    case Dtype::kFloat16:
      return launch(Tag<__half>{});
    case Dtype::kBFloat16:
      return launch(Tag<__nv_bfloat16>{});
    default:
      return launch(Tag<double>{});
  }
}

inline int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}
inline int64_t wide_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }
inline int64_t vector_elements(Dtype dtype) { return 16 / element_bytes(dtype); }

struct Shape {
  int64_t blocks;
  dim3 threads;
  size_t shared_bytes = 0;
};

// The one place that launches: nullptr or CUDA's message (static storage).
template <class... Parameters, class... Arguments>
const char* run(void (*kernel)(Parameters...), const Shape& shape, cudaStream_t stream,
                const Arguments&... arguments) {
  if (shape.blocks > kMaxGridX) return "deepshare: the tensor is too large for one grid";
  const dim3 grid(static_cast<unsigned>(shape.blocks));
#if defined(__CUDACC__)
  kernel<<<grid, shape.threads, shape.shared_bytes, stream>>>(Parameters(arguments)...);
#else
  emulation::launch(grid, shape.threads, shape.shared_bytes, [&] { kernel(Parameters(arguments)...); });
#endif
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace deepshare::cuda
