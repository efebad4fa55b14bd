// The integer twin of shared_relu: one party's additive share of x * (alpha * gate + beta) in Z_2^64 (the
// conventions of shared_relu.h).
//
// e = x - a and z = gate xor r are public, a and r are the dealer's masks; with additive shares of alpha,
// beta,
//   flip = alpha * r,  offset = a * beta + a * alpha * r,  toggle = a * alpha - 2 * a * alpha * r
// everything else is local, and wraps around:
//   f[c] = flip[c], or with a scale: scale[c] * flip[pi[c]]
//   y[c] = truncate(e[c] * (beta[c] + f[c] + z[pi[c]] * (alpha[c] - 2 * f[c])) + offset[c] + z[pi[c]] *
//   toggle[c])
// truncate divides by 2^shift: v >> shift (arithmetic) at party 0, -(-v >> shift) at party 1.
#pragma once

#include "shared_relu.h"

namespace deepshare::cuda {

struct ShareArgs {
  Geometry geometry;      // source_channels: channels of `flip` where a scale is given
  const int64_t* opened;  // e, (outer, C, inner)
  const uint8_t* gates;   // z, packed as shared_relu.h says
  const int32_t* pi;      // [C]
  const int64_t* alpha;   // [C]
  const int64_t* beta;    // [C]
  const int64_t* flip;    // (outer, C, inner), or with a scale (outer, source_channels, inner)
  const int64_t* scale;   // [C], or nullptr
  const int64_t* offset;  // (outer, C, inner)
  const int64_t* toggle;  // (outer, C, inner)
  int64_t shift;          // 0 to 63
  int64_t party;          // 0 or 1
  int64_t* y;             // (outer, C, inner)
};

const char* shared_relu_share(const ShareArgs& args, void* stream);

}  // namespace deepshare::cuda
