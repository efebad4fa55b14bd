// How the backward kernels cut the sums over g*z*gate and g*z into chunks, and where each chunk's sums go.
// Cuts depend on dtype, geometry and alignment only: so does the order of every sum.
#pragma once

#include "columns.h"
#include "launch.h"

namespace deepshare::cuda {

// [chunks, C] each: the workspace's halves, or with one chunk dalpha and dbeta themselves.
template <class W>
struct Sums {
  W* alpha;
  W* beta;
};

template <class W>
Sums<W> sums_of(const BackwardArgs& a, int64_t chunks) {
  if (chunks == 1) return {static_cast<W*>(a.dalpha), static_cast<W*>(a.dbeta)};
  auto* workspace = static_cast<W*>(a.workspace);
  return {workspace, workspace + chunks * a.geometry.channels};
}

// What a launcher did: an error, or the chunks whose sums are still to be added.
struct Launched {
  const char* error;
  int64_t chunks;
};

// Chunks of each walk. Rows: positions a chunk of a channel (`outer` times `inner` in all); columns: rows.
struct Chunks {
  int64_t size;
  int64_t count;
};
Chunks row_chunks(Dtype dtype, const Geometry& geometry);
Columns column_chunks(const Geometry& geometry, int64_t vector);
Chunks soft_row_chunks(Dtype dtype, const Geometry& geometry);
Chunks soft_column_chunks(const Geometry& geometry);

Launched launch_backward_hard_rows(const BackwardArgs& args, bool wide, cudaStream_t stream);
Launched launch_backward_columns(const BackwardArgs& args, bool wide, cudaStream_t stream);
Launched launch_backward_soft_rows(const BackwardArgs& args, cudaStream_t stream);
Launched launch_backward_soft_columns(const BackwardArgs& args, cudaStream_t stream);
// What flows through soft gates, after launch_backward_columns (inner is 1).
const char* launch_backward_soft_prototypes(const BackwardArgs& args, cudaStream_t stream);

}  // namespace deepshare::cuda
