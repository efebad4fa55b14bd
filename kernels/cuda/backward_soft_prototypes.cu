// Backward with soft gates, channels side by side in memory (NHWC), more of them than
// backward_soft_columns.cu holds in shared memory: what flows through the gates, after backward_columns.cu
// has written dx and the sums. A thread adds the terms of one prototype of one row, which it reads again;
// neighbouring threads have neighbouring prototypes, whose members lie side by side in a balanced map.
// Equations: backward_soft_rows.cu.
#include "backward.h"
#include "fast_div.h"
#include "operands.cuh"

namespace deepshare::cuda {
namespace {

template <class T>
struct SoftPrototypes {
  Operands<T> of;
  const T* grad;
  T* dx;
  T* dsource;  // nullptr: own gates
  const int32_t* members;
  const int32_t* offsets;
  FastDiv prototypes;
};

// The sum of g * z * alpha over the soft members of p, in a row that begins at element `row_at`.
template <class T>
__device__ Wide<T> member_sum(const SoftPrototypes<T>& a, int64_t row_at, int64_t p, int soft,
                              Wide<T> slope) {
  const Operands<T>& o = a.of;
  Wide<T> ds = 0;
  const int32_t last = __ldg(a.offsets + p + 1);
#pragma unroll 4
  for (int32_t m = __ldg(a.offsets + p); m < last; ++m) {
    const int64_t c = __ldg(a.members + m);
    const bool is_soft = c < soft;
    const Wide<T> grad = widen(load_if<1>(is_soft, a.grad + row_at + c).lane[0]);
    const Pack<T, 1> z = sum_of(load_terms<1>(o.x, o.residual, row_at + c, is_soft), o.residual != nullptr);
    if (is_soft) ds += grad * widen(z.lane[0]) * (__ldg(o.alpha + c) * slope);
  }
  return ds;
}

template <class T>
__global__ __launch_bounds__(kThreads, kMinBlocks) void soft_prototypes(const SoftPrototypes<T> a) {
  using W = Wide<T>;
  const Operands<T>& o = a.of;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = a.prototypes.quotient(at);
  if (row >= o.geometry.outer) return;
  const int64_t p = at - row * a.prototypes.divisor;
  const int64_t row_at = row * o.geometry.channels;
  const int64_t source_at = row * o.geometry.source_channels;
  const int soft = *o.soft_channels;
  const W gamma = *o.gamma;
  const W s = widen(load_sum<1>(o.source, o.source_residual, source_at + p).lane[0]);
  const W ds = member_sum(a, row_at, p, soft, gate_slope(s, gamma));
  if (a.dsource != nullptr) {
    a.dsource[source_at + p] = narrow<T>(ds);
    return;
  }
  const W v = widen(load_sum<1>(o.source, o.source_residual, row_at + __ldg(o.pi + p)).lane[0]);
  const W gate = p < soft ? soft_gate(v, gamma) : hard_gate(v);
  const W grad = widen(load<1>(a.grad + row_at + p).lane[0]);
  a.dx[row_at + p] =
      narrow<T>(add(multiply(grad, slope_of(__ldg(o.alpha + p), gate, __ldg(o.beta + p))), ds));
}

template <class T>
const char* launch(const BackwardArgs& a, cudaStream_t stream) {
  const Geometry& g = a.geometry;
  const SoftPrototypes<T> walk{operands_of<T>(a),
                               static_cast<const T*>(a.grad),
                               static_cast<T*>(a.dx),
                               a.source != nullptr ? static_cast<T*>(a.dsource) : nullptr,
                               a.members,
                               a.offsets,
                               FastDiv(g.prototypes)};
  return run(soft_prototypes<T>, {ceil_div(g.outer * g.prototypes, kThreads), kThreads}, stream, walk);
}

}  // namespace

const char* launch_backward_soft_prototypes(const BackwardArgs& args, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto tag) { return launch<typename decltype(tag)::type>(args, stream); });
}

}  // namespace deepshare::cuda
