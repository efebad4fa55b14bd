// shared_relu on CUDA, as raw-pointer launchers: no torch header, so one object serves every torch.
//
//   y[c]      = x[c] * (alpha[c] * gate[c] + beta[c])
//   gate[c]   = Phi(gamma * s[pi[c]])   where c < soft_channels, else 1[s[pi[c]] >= 0]      (0 at NaN)
//   dx[c]     = g[c] * (alpha[c] * gate[c] + beta[c])
//   dalpha[c] = sum g * x * gate,  dbeta[c] = sum g * x                                     (over outer and
//   inner) ds[p]     = sum over soft c with pi[c] = p of g * x * alpha * gamma * phi(gamma * s[p])
//
// Memory order: x, grad, y and dx are dense (outer, channels, inner); source and dsource are dense
// (outer, source_channels, inner). NCHW is (N, C, H*W), NHWC is (N*H*W, C, 1). The caller densifies.
// Every pointer is device memory; alpha, beta, gamma, dalpha, dbeta have the accumulation type
// (double for kFloat64, else float). Nothing here synchronises; all work goes to `stream`.
// Every function returns nullptr for ok, else a message with static storage.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deepshare::cuda {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

struct Geometry {
  int64_t outer;            // product of the dimensions stored before the channels
  int64_t channels;         // C of x
  int64_t inner;            // product of the dimensions stored after the channels
  int64_t source_channels;  // channels of the source, >= prototypes; equal to `channels` without one
  int64_t prototypes;       // P, pi[c] < P
};

struct ForwardArgs {
  Dtype dtype;
  Geometry geometry;
  const void* x;
  const void* source;            // nullptr: x gives its own gates
  const int32_t* pi;             // [C]
  const void* alpha;             // [C]
  const void* beta;              // [C]
  const int32_t* soft_channels;  // [1], read on the device; nullptr: hard gates only
  const void* gamma;             // [1], read on the device; nullptr with soft_channels
  void* y;
};

struct BackwardArgs {
  Dtype dtype;
  Geometry geometry;
  const void* grad;
  const void* x;
  const void* source;
  const int32_t* pi;
  const int32_t* members;  // [C], the channels sorted by prototype
  const int32_t* offsets;  // [P + 1]
  const void* alpha;
  const void* beta;
  const int32_t* soft_channels;
  const void* gamma;
  void* dx;       // written whole
  void* dsource;  // written whole (zero from channel P on) when source and soft_channels are given; else not
                  // touched
  void* dalpha;   // [C], written whole
  void* dbeta;    // [C], written whole
  void* workspace;  // backward_workspace_bytes(...), 16-byte aligned; need not be initialised
};

// Bytes of device memory that shared_relu_backward needs for its partial sums.
size_t backward_workspace_bytes(Dtype dtype, const Geometry& geometry, bool soft);

const char* shared_relu_forward(const ForwardArgs& args, void* stream);
const char* shared_relu_backward(const BackwardArgs& args, void* stream);

}  // namespace deepshare::cuda
