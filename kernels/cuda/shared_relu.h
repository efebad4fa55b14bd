// shared_relu on CUDA, as raw-pointer launchers: no torch header, so one object serves every torch.
//
//   z         = x, or x + residual rounded to x's type
//   y[c]      = z[c] * (alpha[c] * gate[c] + beta[c])
//   gate[c]   = Phi(gamma * s[pi[c]])   where c < soft_channels, else 1[s[pi[c]] >= 0]      (0 at NaN)
//   s         = source, or z; hard gates may come as bits instead
//   dz[c]     = g[c] * (alpha[c] * gate[c] + beta[c])              (the gradient of x and of residual)
//   dalpha[c] = sum g * z * gate,  dbeta[c] = sum g * z            (over outer and inner)
//   ds[p]     = sum over soft c with pi[c] = p of g * z * alpha * gamma * phi(gamma * s[p])
//
// Memory order: x, residual, grad, y and dx are dense (outer, channels, inner); source and dsource are dense
// (outer, source_channels, inner). NCHW is (N, C, H*W), NHWC is (N*H*W, C, 1). The caller densifies.
// Packed gates: a run is the innermost stored dimension of the prototypes. inner > 1: [outer, P,
// ceil(inner / 8)] bytes, the gate at position i is bit i % 8 of byte i / 8 of its run; inner == 1: [outer,
// ceil(P / 8)] bytes, the gate of prototype p is bit p % 8 of byte p / 8. Bits beyond a run are 0.
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
  const void* residual;          // nullptr: z is x
  const void* source;            // nullptr: z gives its own gates
  const uint8_t* gates;          // packed gates in place of a source, hard only; else nullptr
  const int32_t* pi;             // [C]
  const void* alpha;             // [C]
  const void* beta;              // [C]
  const int32_t* soft_channels;  // [1], read on the device; nullptr: hard gates only
  const void* gamma;             // [1], read on the device; nullptr with soft_channels
  void* y;
  uint8_t* emitted;  // z's own gates, packed: written whole; nullptr: not wanted. Only with hard own gates.
};

struct BackwardArgs {
  Dtype dtype;
  Geometry geometry;
  const void* grad;
  const void* x;
  const void* residual;  // as in the forward pass
  const void* source;
  const uint8_t* gates;
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
