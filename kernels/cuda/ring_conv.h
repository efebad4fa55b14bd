// Convolution in Z_2^64 (the conventions of shared_relu.h):
//   y[n, o, i, j] = sum over c, u, v of x[n, g * C/G + c, i * sh + u * dh - ph, j * sw + v * dw - pw] *
//   weight[o, c, u, v]
// mod 2^64, g = o / (O / G), x zero outside.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deepshare::cuda {

// One direction of a convolution, height or width.
struct RingAxis {
  int64_t size;  // of x
  int64_t kernel, stride, padding, dilation;
  int64_t outputs;  // of y
};

struct RingConvArgs {
  int64_t batch, channels, out_channels, groups;
  RingAxis height, width;
  const int64_t* x;       // [N, C, H, W] with these strides
  int64_t x_strides[4];   // in elements
  const int64_t* weight;  // [O, C/G, kh, kw], contiguous
  const void* packed;     // the CPU's: [G, blocks, C/G * kh * kw, 32] of int32 (narrow) or int64, or nullptr
  const int64_t* pairs;   // the CPU's: [G, blocks, 32] sums of w1 w2 over pairs of steps, or nullptr
  bool narrow;
  int64_t* y;  // [N, O, H', W'], contiguous
};

const char* ring_conv2d(const RingConvArgs& args, void* stream);

}  // namespace deepshare::cuda
