// The forward pass: which walk a tensor takes. Every element of x is read once and y is written once.
#include "columns.h"
#include "forward.h"

namespace deepshare::cuda {

const char* shared_relu_forward(const ForwardArgs& args, void* stream) {
  const Geometry& g = args.geometry;
  if (g.outer * g.channels * g.inner == 0) return nullptr;
  auto* on = static_cast<cudaStream_t>(stream);
  const int64_t vector = vector_elements(args.dtype);
  const bool aligned = aligned_16(args.x, args.residual, args.y);
  if (g.inner == 1) {
    const bool wide = aligned && g.channels % vector == 0;
    return launch_forward_columns(args, wide, on);
  }
  if (g.inner % vector == 0 && aligned && aligned_16(args.source)) return launch_forward_rows(args, true, on);
  if (aligned && has_columns(g, vector)) return launch_forward_columns(args, true, on);
  return launch_forward_rows(args, false, on);
}

}  // namespace deepshare::cuda
