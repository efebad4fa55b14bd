// Backward with soft gates, positions side by side in memory (NCHW): dx, the source's gradient and partial
// sums in one pass.
//
//   ds[p] = sum over {c < soft_channels: pi[c] = p} of g * x * alpha[c] * gamma * phi(gamma * s[p])
//
// A warp owns prototype p and kUnit positions per lane, and walks p's members; ds stays in registers: no
// atomics. Where a prototype has many members, `split` warps share them (every split-th each) and their ds
// are added in order. A foreign source gets ds as dsource. Own gates add it to dx[p]: the walk leaves members
// below P out of its stores, and the end writes dx[p] from p's own gate, that of s[pi[p]] (pi need not map a
// prototype to itself), plus ds[p].
#include "launch.h"
#include "soft_chunks.h"
#include "traits.cuh"

namespace deepshare::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

// Offset of position q in channel 0 of a tensor [outer, channels, inner]; -1 out of range.
__device__ inline int64_t offset_of(int64_t q, int64_t positions, int64_t channels, int64_t inner) {
  const int64_t n = q / inner;
  return q < positions ? n * channels * inner + (q - n * inner) : -1;
}

template <class T, int V>
__global__ __launch_bounds__(kThreads, kMinBlocks) void soft_channels_first(
    const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ source,
    const int32_t* __restrict__ pi, const int32_t* __restrict__ members, const int32_t* __restrict__ offsets,
    const Wide<T>* __restrict__ alpha, const Wide<T>* __restrict__ beta,
    const int32_t* __restrict__ soft_channels, const Wide<T>* __restrict__ gamma, T* __restrict__ dx,
    T* __restrict__ dsource, Wide<T>* __restrict__ partial, int64_t positions, int64_t channels,
    int64_t inner, int64_t source_channels, int64_t prototypes, int64_t chunks, int split) {
  using W = Wide<T>;
  constexpr int kUnit = kSoftUnit<T>;
  constexpr int kVectors = kUnit / V;
  const int64_t tile = blockIdx.x / prototypes;
  const int64_t p = blockIdx.x - tile * prototypes;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int share = warp % split;
  const int64_t chunk = tile * (kWarps / split) + warp / split;
  const int64_t first = chunk * 32 * kUnit + lane * V;  // a lane has kVectors vectors, 32 * V positions apart
  const bool own = dsource == nullptr;
  const int soft = *soft_channels;
  const W sharpness = *gamma;

  int64_t at[kVectors];  // in channel 0 of x
  W s[kUnit], slope[kUnit], ds[kUnit];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int64_t q = first + j * 32 * V;
    at[j] = offset_of(q, positions, channels, inner);
    Pack<T, V> ss = {};
    if (at[j] >= 0) ss = load<V>(source + offset_of(q, positions, source_channels, inner) + p * inner);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      s[j * V + k] = widen(ss.lane[k]);
      slope[j * V + k] = gate_slope(s[j * V + k], sharpness);
      ds[j * V + k] = 0;
    }
  }

  for (int m = offsets[p] + share; m < offsets[p + 1]; m += split) {
    const int64_t c = members[m];
    const W a = alpha[c];
    const W b = beta[c];
    const bool is_soft = c < soft;
    W sum_alpha = 0;
    W sum_beta = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (at[j] < 0) continue;
      const Pack<T, V> gs = load<V>(grad + at[j] + c * inner);
      const Pack<T, V> xs = load<V>(x + at[j] + c * inner);
      Pack<T, V> out;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const W g = widen(gs.lane[k]);
        const W gx = g * widen(xs.lane[k]);
        const W gate = gate_of<true>(s[j * V + k], is_soft, sharpness);
        out.lane[k] = narrow<T>(gated(g, a, gate, b));
        if (is_soft) ds[j * V + k] += gx * (a * slope[j * V + k]);
        sum_alpha += gx * gate;
        sum_beta += gx;
      }
      if (!own || c >= prototypes) store<V>(dx + at[j] + c * inner, out);
    }
    sum_alpha = warp_sum(sum_alpha, 32);
    sum_beta = warp_sum(sum_beta, 32);
    if (lane == 0 && chunk < chunks) {
      partial[chunk * channels + c] = sum_alpha;
      partial[(chunks + chunk) * channels + c] = sum_beta;
    }
  }

  __shared__ W shares[kWarps][kUnit][32];
#pragma unroll
  for (int u = 0; u < kUnit; ++u) shares[warp][u][lane] = ds[u];
  __syncthreads();
  if (share != 0) return;
  for (int other = 1; other < split; ++other) {
#pragma unroll
    for (int u = 0; u < kUnit; ++u) ds[u] += shares[warp + other][u][lane];
  }
  const W a = alpha[p];
  const W b = beta[p];
  const int64_t leader = pi[p];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (at[j] < 0) continue;
    const int64_t source_at = offset_of(first + j * 32 * V, positions, source_channels, inner);
    Pack<T, V> out;
    if (own) {
      const Pack<T, V> gs = load<V>(grad + at[j] + p * inner);
      const Pack<T, V> ss = load<V>(source + source_at + leader * inner);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const W gate = gate_of<true>(widen(ss.lane[k]), p < soft, sharpness);
        out.lane[k] = narrow<T>(add(gated(widen(gs.lane[k]), a, gate, b), ds[j * V + k]));
      }
      store<V>(dx + at[j] + p * inner, out);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) out.lane[k] = narrow<T>(ds[j * V + k]);
      store<V>(dsource + source_at + p * inner, out);
    }
  }
}

template <class T, int V>
const char* launch(const BackwardArgs& a, const Chunking& chunks, cudaStream_t stream) {
  using W = Wide<T>;
  const Geometry& g = a.geometry;
  const int split = power_of_2(ceil_div(g.channels, g.prototypes), kWarps);
  const int64_t blocks = ceil_div(chunks.chunks, kWarps / split) * g.prototypes;
  if (blocks > kMaxGridX) return "shared_relu: the tensor is too large for one grid";
  const auto* x = static_cast<const T*>(a.x);
  soft_channels_first<T, V><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<const T*>(a.grad), x, a.source ? static_cast<const T*>(a.source) : x, a.pi, a.members,
      a.offsets, static_cast<const W*>(a.alpha), static_cast<const W*>(a.beta), a.soft_channels,
      static_cast<const W*>(a.gamma), static_cast<T*>(a.dx), a.source ? static_cast<T*>(a.dsource) : nullptr,
      static_cast<W*>(a.workspace), g.outer * g.inner, g.channels, g.inner, g.source_channels, g.prototypes,
      chunks.chunks, split);
  return launch_status();
}

}  // namespace

const char* launch_backward_soft_first(const BackwardArgs& args, const Chunking& chunks,
                                       cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    const bool wide = args.geometry.inner % V == 0 && aligned_16(args.grad, args.x, args.dx, args.source,
                                                                 args.source ? args.dsource : nullptr);
    return wide ? launch<T, V>(args, chunks, stream) : launch<T, 1>(args, chunks, stream);
  });
}

}  // namespace deepshare::cuda
