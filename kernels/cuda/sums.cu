// The second pass over partial sums.
#include "sums.h"

namespace deepshare::cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostSumRows = 128;
constexpr int kLoadsEach = 4;  // chunks a thread adds before more threads are better

template <class W>
struct Partials {
  const W* partial;
  W* out[2];
  int64_t chunks;
  int64_t columns;
  int64_t blocks;  // of a plane
};

// Block (plane, blockDim.x columns): blockDim.y threads share a column's chunks, then add up as a tree.
template <class W>
__global__ __launch_bounds__(kMostThreads) void sum_partials(const Partials<W> a) {
  __shared__ W shared[kMostThreads];
  const int64_t plane = blockIdx.x / static_cast<unsigned>(a.blocks);
  const int64_t column = (blockIdx.x - plane * a.blocks) * blockDim.x + threadIdx.x;
  W sum = 0;
  if (column < a.columns) {
    const W* const from = a.partial + plane * a.chunks * a.columns + column;
#pragma unroll 4
    for (int64_t chunk = threadIdx.y; chunk < a.chunks; chunk += blockDim.y)
      sum += __ldg(from + chunk * a.columns);
  }
  W* const mine = shared + threadIdx.y * blockDim.x + threadIdx.x;
  *mine = sum;
  for (int step = blockDim.y / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.y < step) *mine += mine[step * blockDim.x];
  }
  if (threadIdx.y == 0 && column < a.columns) (plane == 0 ? a.out[0] : a.out[1])[column] = *mine;
}

template <class W>
const char* launch(const void* partial, void* const (&out)[2], int planes, int64_t chunks, int64_t columns,
                   cudaStream_t stream) {
  const int rows = power_of_2(ceil_div(chunks, kLoadsEach), kMostSumRows);
  const int width = std::max(8, kThreads / rows);  // 8 columns: 32 bytes of float32
  const int64_t blocks = ceil_div(columns, width);
  const Partials<W> partials{static_cast<const W*>(partial),
                             {static_cast<W*>(out[0]), static_cast<W*>(out[1])},
                             chunks,
                             columns,
                             blocks};
  return run(sum_partials<W>, {planes * blocks, dim3(width, rows)}, stream, partials);
}

}  // namespace

const char* launch_sums(Dtype dtype, const void* partial, void* const (&out)[2], int planes, int64_t chunks,
                        int64_t columns, cudaStream_t stream) {
  return dtype == Dtype::kFloat64 ? launch<double>(partial, out, planes, chunks, columns, stream)
                                  : launch<float>(partial, out, planes, chunks, columns, stream);
}

}  // namespace deepshare::cuda
