// The backward pass's plan and public functions; the second pass over the partial sums.
#include "launch.h"
#include "shared_relu.h"
#include "soft_chunks.h"
#include "traits.cuh"

namespace deepshare::cuda {
namespace {

// The second pass: columns are channels (32 bytes of float32 a row), rows are chunks.
constexpr int kSumColumns = 8;
constexpr int kSumRows = 128;

constexpr int64_t kChannelsFirstPositions = 2048;  // 256 threads with 8 positions each
constexpr int64_t kWantedBlocks = 4096;            // beyond, chunks grow up to kMaxGrowth times
constexpr int64_t kMaxGrowth = 4;
constexpr int64_t kMaxChunks = 8192;     // beyond, chunks grow without limit: the second pass stays short
constexpr int64_t kMinRows = 32;         // of a channels-last chunk: partial sums stay small beside dx
constexpr int64_t kWantedChunks = 2048;  // channels last

// [2, chunks, C] -> dalpha [C], dbeta [C], chunks added in a fixed order.
template <class W>
__global__ __launch_bounds__(kSumColumns* kSumRows) void sum_partials(const W* __restrict__ partial,
                                                                      W* __restrict__ dalpha,
                                                                      W* __restrict__ dbeta, int64_t chunks,
                                                                      int64_t channels) {
  __shared__ W rows[2][kSumRows][kSumColumns];
  const int64_t c = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  W sum_alpha = 0;
  W sum_beta = 0;
  for (int64_t chunk = threadIdx.y; chunk < chunks && c < channels; chunk += kSumRows) {
    sum_alpha += partial[chunk * channels + c];
    sum_beta += partial[(chunks + chunk) * channels + c];
  }
  rows[0][threadIdx.y][threadIdx.x] = sum_alpha;
  rows[1][threadIdx.y][threadIdx.x] = sum_beta;
  for (int step = kSumRows / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.y < step) {
      rows[0][threadIdx.y][threadIdx.x] += rows[0][threadIdx.y + step][threadIdx.x];
      rows[1][threadIdx.y][threadIdx.x] += rows[1][threadIdx.y + step][threadIdx.x];
    }
  }
  if (threadIdx.y != 0 || c >= channels) return;
  dalpha[c] = rows[0][0][threadIdx.x];
  dbeta[c] = rows[1][0][threadIdx.x];
}

template <class W>
const char* sum_into(const BackwardArgs& a, const Chunking& chunks, cudaStream_t stream) {
  const int64_t channels = a.geometry.channels;
  const auto grid = static_cast<unsigned>(ceil_div(channels, kSumColumns));
  sum_partials<W><<<grid, dim3(kSumColumns, kSumRows), 0, stream>>>(
      static_cast<const W*>(a.workspace), static_cast<W*>(a.dalpha), static_cast<W*>(a.dbeta), chunks.chunks,
      channels);
  return launch_status();
}

const char* zero(void* at, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return nullptr;
  const cudaError_t status = cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
int64_t wide_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

// dsource starts as zeros where channels above P, or an empty batch, would leave it unwritten.
const char* clear_dsource(const BackwardArgs& a, bool empty, cudaStream_t stream) {
  const Geometry& g = a.geometry;
  if (a.source == nullptr || a.soft_channels == nullptr || (g.source_channels == g.prototypes && !empty))
    return nullptr;
  return zero(a.dsource, g.outer * g.source_channels * g.inner * element_bytes(a.dtype), stream);
}

const char* clear_sums(const BackwardArgs& a, cudaStream_t stream) {
  const int64_t bytes = a.geometry.channels * wide_bytes(a.dtype);
  if (const char* error = zero(a.dalpha, bytes, stream)) return error;
  return zero(a.dbeta, bytes, stream);
}

}  // namespace

Chunking chunking(Dtype dtype, const Geometry& g, bool soft) {
  const int64_t positions = g.outer * g.inner;
  const int64_t max_row = dtype == Dtype::kFloat64 ? kMaxSoftRow<double> : kMaxSoftRow<float>;
  if (g.inner == 1 && (!soft || g.channels <= max_row)) {
    const int64_t rows = std::max(kMinRows, ceil_div(positions, kWantedChunks));
    return {Walk::kChannelsLast, rows, ceil_div(positions, rows)};
  }
  if (soft) {
    const int64_t unit = 32 * (dtype == Dtype::kFloat64 ? kSoftUnit<double> : kSoftUnit<float>);
    return {Walk::kChannelsFirst, unit, ceil_div(positions, unit)};
  }
  const int64_t pieces = ceil_div(positions, kChannelsFirstPositions);
  const int64_t wanted = std::clamp<int64_t>(pieces * g.channels / kWantedBlocks, 1, kMaxGrowth);
  const int64_t size = kChannelsFirstPositions * std::max(wanted, ceil_div(pieces, kMaxChunks));
  return {Walk::kChannelsFirst, size, ceil_div(positions, size)};
}

const char* launch_sums(const BackwardArgs& args, const Chunking& chunks, cudaStream_t stream) {
  return args.dtype == Dtype::kFloat64 ? sum_into<double>(args, chunks, stream)
                                       : sum_into<float>(args, chunks, stream);
}

size_t backward_workspace_bytes(Dtype dtype, const Geometry& geometry, bool soft) {
  return static_cast<size_t>(2 * chunking(dtype, geometry, soft).chunks * geometry.channels *
                             wide_bytes(dtype));
}

const char* shared_relu_backward(const BackwardArgs& args, void* stream) {
  const Geometry& g = args.geometry;
  auto* on = static_cast<cudaStream_t>(stream);
  const bool empty = g.outer * g.channels * g.inner == 0;
  if (const char* error = clear_dsource(args, empty, on)) return error;
  if (empty) return clear_sums(args, on);
  const bool soft = args.soft_channels != nullptr;
  const Chunking chunks = chunking(args.dtype, g, soft);
  const char* error = !soft                                 ? launch_backward_hard(args, chunks, on)
                      : chunks.walk == Walk::kChannelsFirst ? launch_backward_soft_first(args, chunks, on)
                                                            : launch_backward_soft_last(args, chunks, on);
  return error != nullptr ? error : launch_sums(args, chunks, on);
}

}  // namespace deepshare::cuda
