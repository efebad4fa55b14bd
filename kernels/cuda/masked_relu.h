// masked_relu on CUDA, as raw-pointer launchers (the conventions of shared_relu.h).
//
//   y[n, r]  = x[n, r] * (1 if x[n, r] >= 0 else 1 - mask[r])            = mask * relu(x) + (1 - mask) * x
//   dx[n, r] = g[n, r] * (1 if x[n, r] >= 0 else 1 - mask[r])
//   dmask[r] = -sum over n with not x[n, r] >= 0 of g[n, r] * x[n, r]
//
// r runs over a sample's elements (C*H*W) in memory order, the same for every tensor. NaN counts as below 0.
#pragma once

#include "shared_relu.h"

namespace deepshare::cuda {

struct MaskedForwardArgs {
  Dtype dtype;
  int64_t batch;     // N
  int64_t elements;  // of a sample
  const void* x;     // [N, elements]
  const void* mask;  // [elements], accumulation type
  void* y;           // [N, elements]
};

struct MaskedBackwardArgs {
  Dtype dtype;
  int64_t batch;
  int64_t elements;
  const void* grad;  // [N, elements]
  const void* x;     // [N, elements]
  const void* mask;  // [elements], accumulation type
  void* dx;          // [N, elements], written whole
  void* dmask;       // [elements], accumulation type, written whole
  void* workspace;   // masked_workspace_bytes(...), 16-byte aligned; need not be initialised
};

// Bytes of device memory that masked_relu_backward needs for its partial sums; may be 0.
size_t masked_workspace_bytes(Dtype dtype, int64_t batch, int64_t elements);

const char* masked_relu_forward(const MaskedForwardArgs& args, void* stream);
const char* masked_relu_backward(const MaskedBackwardArgs& args, void* stream);

}  // namespace deepshare::cuda
