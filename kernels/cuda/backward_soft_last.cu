// Backward with soft gates, channels side by side in memory (NHWC): dx, the source's gradient and partial
// sums in one pass. Equations: backward_soft_first.cu.
//
// A block walks the rows (positions) of its chunk, blockDim.y at a time. Step 1: each thread has vectors of V
// channels of a row, writes their dx and keeps each channel's term of ds in shared memory. Step 2: `lanes`
// threads add a prototype's terms and write dsource[p], or with own gates dx[p] over what step 1 wrote there.
// Sums of a channel stay with the thread that owns it.
#include "launch.h"
#include "soft_chunks.h"
#include "traits.cuh"

namespace deepshare::cuda {
namespace {

template <class T, int V>
__global__ __launch_bounds__(kThreads, kMinBlocks) void soft_channels_last(
    const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ source,
    const int32_t* __restrict__ pi, const int32_t* __restrict__ members, const int32_t* __restrict__ offsets,
    const Wide<T>* __restrict__ alpha, const Wide<T>* __restrict__ beta,
    const int32_t* __restrict__ soft_channels, const Wide<T>* __restrict__ gamma, T* __restrict__ dx,
    T* __restrict__ dsource, Wide<T>* __restrict__ partial, int64_t rows, int channels,
    int64_t source_channels, int prototypes, int64_t chunk_rows, int64_t chunks, int lanes) {
  using W = Wide<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  W* const terms = reinterpret_cast<W*>(shared) + threadIdx.y * 3 * channels;  // [blockDim.y][3][C]
  W* const sums_alpha = terms + channels;
  W* const sums_beta = sums_alpha + channels;
  const int64_t chunk = blockIdx.x;
  const int64_t last = min(rows, (chunk + 1) * chunk_rows);
  const bool own = dsource == nullptr;
  const int soft = *soft_channels;
  const W sharpness = *gamma;
  for (int c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    store_shared<V>(sums_alpha + c, Pack<W, V>{});
    store_shared<V>(sums_beta + c, Pack<W, V>{});
  }

  for (int64_t first = chunk * chunk_rows; first < last; first += blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const T* const gates = source + row * source_channels;
    for (int c = threadIdx.x * V; c < channels && row < last; c += blockDim.x * V) {
      const Pack<T, V> gs = load<V>(grad + row * channels + c);
      const Pack<T, V> xs = load<V>(x + row * channels + c);
      const Pack<int32_t, V> ps = load<V>(pi + c);
      const Pack<W, V> as = load<V>(alpha + c);
      const Pack<W, V> bs = load<V>(beta + c);
      Pack<W, V> sum_alpha = load<V>(sums_alpha + c);
      Pack<W, V> sum_beta = load<V>(sums_beta + c);
      Pack<W, V> term;
      Pack<T, V> out;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const W g = widen(gs.lane[k]);
        const W gx = g * widen(xs.lane[k]);
        const W s = widen(gates[ps.lane[k]]);
        const bool is_soft = c + k < soft;
        const W gate = gate_of<true>(s, is_soft, sharpness);
        out.lane[k] = narrow<T>(gated(g, as.lane[k], gate, bs.lane[k]));
        term.lane[k] = is_soft ? gx * (as.lane[k] * gate_slope(s, sharpness)) : W(0);
        sum_alpha.lane[k] += gx * gate;
        sum_beta.lane[k] += gx;
      }
      store<V>(dx + row * channels + c, out);
      store_shared<V>(terms + c, term);
      store_shared<V>(sums_alpha + c, sum_alpha);
      store_shared<V>(sums_beta + c, sum_beta);
    }
    __syncthreads();

    // Every thread of a warp makes the same number of rounds: the shuffles in warp_sum need them all.
    const int per_round = blockDim.x / lanes;
    for (int base = 0; base < prototypes; base += per_round) {
      const int p = base + threadIdx.x / lanes;
      const bool valid = p < prototypes && row < last;
      W ds = 0;
      if (valid) {
        for (int m = offsets[p] + threadIdx.x % lanes; m < offsets[p + 1]; m += lanes)
          ds += terms[members[m]];
      }
      ds = warp_sum(ds, lanes);
      if (!valid || threadIdx.x % lanes != 0) continue;
      if (own) {
        const W gate = gate_of<true>(widen(gates[pi[p]]), p < soft, sharpness);
        const W g = widen(grad[row * channels + p]);
        dx[row * channels + p] = narrow<T>(add(gated(g, alpha[p], gate, beta[p]), ds));
      } else {
        dsource[row * source_channels + p] = narrow<T>(ds);
      }
    }
    __syncthreads();
  }

  const W* const all = reinterpret_cast<const W*>(shared);
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < channels; c += kThreads) {
    W sum_alpha = 0;
    W sum_beta = 0;
    for (int y = 0; y < blockDim.y; ++y) {
      sum_alpha += all[(3 * y + 1) * channels + c];
      sum_beta += all[(3 * y + 2) * channels + c];
    }
    partial[chunk * channels + c] = sum_alpha;
    partial[(chunks + chunk) * channels + c] = sum_beta;
  }
}

template <class T, int V>
const char* launch(const BackwardArgs& a, const Chunking& chunks, cudaStream_t stream) {
  using W = Wide<T>;
  const Geometry& g = a.geometry;
  const int columns = power_of_2(ceil_div(g.channels, V), kThreads);
  const int lanes = power_of_2(ceil_div(g.channels, g.prototypes), std::min(columns, 32));
  const dim3 block(columns, kThreads / columns);
  const size_t shared = sizeof(W) * 3 * g.channels * block.y;
  if (chunks.chunks > kMaxGridX) return "shared_relu: the tensor is too large for one grid";
  const auto* x = static_cast<const T*>(a.x);
  soft_channels_last<T, V><<<static_cast<unsigned>(chunks.chunks), block, shared, stream>>>(
      static_cast<const T*>(a.grad), x, a.source ? static_cast<const T*>(a.source) : x, a.pi, a.members,
      a.offsets, static_cast<const W*>(a.alpha), static_cast<const W*>(a.beta), a.soft_channels,
      static_cast<const W*>(a.gamma), static_cast<T*>(a.dx), a.source ? static_cast<T*>(a.dsource) : nullptr,
      static_cast<W*>(a.workspace), g.outer, static_cast<int>(g.channels), g.source_channels,
      static_cast<int>(g.prototypes), chunks.positions, chunks.chunks, lanes);
  return launch_status();
}

}  // namespace

const char* launch_backward_soft_last(const BackwardArgs& args, const Chunking& chunks, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    const bool wide = args.geometry.channels % V == 0 &&
                      aligned_16(args.grad, args.x, args.dx, args.pi, args.alpha, args.beta);
    return wide ? launch<T, V>(args, chunks, stream) : launch<T, 1>(args, chunks, stream);
  });
}

}  // namespace deepshare::cuda
