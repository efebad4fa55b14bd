// The backward pass: which walk a tensor takes, how its sums are cut, and the second pass over them.
#include "backward.h"
#include "soft_chunks.h"
#include "sums.h"

namespace deepshare::cuda {
namespace {

constexpr int64_t kWantedBlocks = 4096;  // rows: beyond, chunks grow up to kMaxGrowth times
constexpr int64_t kMaxGrowth = 16;
constexpr int64_t kMaxChunks = 8192;  // rows: beyond, chunks grow without limit: the second pass stays short
constexpr int64_t kEnoughChannels = 256;  // blocks of one chunk each that keep a big GPU busy
constexpr int64_t kAloneGrowth = 4;       // rows: a chunk this large still beats a second kernel
constexpr int64_t kColumnBlocksWanted = 1024;
constexpr int64_t kColumnWidth = 32;  // 512 bytes of a row side by side; wider blocks would write more sums
constexpr int64_t kMinRows = 32;      // columns: the sums of a chunk stay small beside its dx
constexpr int64_t kSoftColumnChunks = 2048;

const char* zero(void* at, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return nullptr;
  const cudaError_t status = cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

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

bool fits_shared_memory(Dtype dtype, const Geometry& g) {
  return g.channels <= (dtype == Dtype::kFloat64 ? kMaxSoftRow<double> : kMaxSoftRow<float>);
}

Launched launch_hard(const BackwardArgs& a, cudaStream_t stream) {
  const Geometry& g = a.geometry;
  const int64_t vector = vector_elements(a.dtype);
  const bool aligned = aligned_16(a.grad, a.x, a.residual, a.dx);
  if (g.inner == 1) return launch_backward_columns(a, aligned && g.channels % vector == 0, stream);
  if (g.inner % vector == 0 && aligned && aligned_16(a.source))
    return launch_backward_hard_rows(a, true, stream);
  if (aligned && has_columns(g, vector)) return launch_backward_columns(a, true, stream);
  return launch_backward_hard_rows(a, false, stream);
}

Launched launch_soft(const BackwardArgs& a, cudaStream_t stream) {
  const Geometry& g = a.geometry;
  if (g.inner > 1) return launch_backward_soft_rows(a, stream);
  if (fits_shared_memory(a.dtype, g)) return launch_backward_soft_columns(a, stream);
  const Launched launched = launch_hard(a, stream);  // the column walk, whose gates may be soft
  if (launched.error != nullptr) return launched;
  return {launch_backward_soft_prototypes(a, stream), launched.chunks};
}

}  // namespace

Chunks row_chunks(Dtype dtype, const Geometry& g) {
  const int64_t positions = g.outer * g.inner;
  const int64_t round = kUnroll * kThreads * vector_elements(dtype);  // positions of a block's turn
  if (g.channels >= kEnoughChannels && positions <= kAloneGrowth * round) return {positions, 1};
  const int64_t pieces = ceil_div(positions, round);
  const int64_t wanted = std::clamp<int64_t>(pieces * g.channels / kWantedBlocks, 1, kMaxGrowth);
  const int64_t size = round * std::max(wanted, ceil_div(pieces, kMaxChunks));
  return {size, ceil_div(positions, size)};
}

Columns column_chunks(const Geometry& g, int64_t vector) {
  Columns shape =
      columns_of(g.channels * g.inner, vector, column_unit(g.inner, vector), kColumnWidth, kThreads);
  const int64_t most = ceil_div(g.outer, kMinRows);
  const int64_t chunks = std::clamp<int64_t>(kColumnBlocksWanted / shape.blocks, 1, most);
  shape.rows = shape.height * ceil_div(ceil_div(g.outer, chunks), shape.height);
  shape.chunks = ceil_div(g.outer, shape.rows);
  return shape;
}

Chunks soft_row_chunks(Dtype dtype, const Geometry& g) {
  const int64_t unit = 32 * (dtype == Dtype::kFloat64 ? kSoftUnit<double> : kSoftUnit<float>);
  return {unit, ceil_div(g.outer * g.inner, unit)};
}

Chunks soft_column_chunks(const Geometry& g) {
  const int64_t rows = std::max(kMinRows, ceil_div(g.outer, kSoftColumnChunks));
  return {rows, ceil_div(g.outer, rows)};
}

size_t backward_workspace_bytes(Dtype dtype, const Geometry& g, bool soft) {
  if (g.outer * g.channels * g.inner == 0) return 0;
  int64_t chunks = 0;
  if (soft && g.inner > 1) {
    chunks = soft_row_chunks(dtype, g).count;
  } else if (soft && fits_shared_memory(dtype, g)) {
    chunks = soft_column_chunks(g).count;
  } else {  // which of these walks is taken depends on the pointers too
    const int64_t vector = vector_elements(dtype);
    if (g.inner > 1) chunks = row_chunks(dtype, g).count;
    if (g.inner == 1) chunks = column_chunks(g, 1).chunks;
    if (has_columns(g, vector)) chunks = std::max(chunks, column_chunks(g, vector).chunks);
  }
  return static_cast<size_t>(2 * chunks * g.channels * wide_bytes(dtype));
}

const char* shared_relu_backward(const BackwardArgs& args, void* stream) {
  const Geometry& g = args.geometry;
  auto* on = static_cast<cudaStream_t>(stream);
  const bool empty = g.outer * g.channels * g.inner == 0;
  if (const char* error = clear_dsource(args, empty, on)) return error;
  if (empty) return clear_sums(args, on);
  const Launched launched = args.soft_channels == nullptr ? launch_hard(args, on) : launch_soft(args, on);
  if (launched.error != nullptr || launched.chunks == 1) return launched.error;
  return launch_sums(args.dtype, args.workspace, {args.dalpha, args.dbeta}, 2, launched.chunks, g.channels,
                     on);
}

}  // namespace deepshare::cuda
