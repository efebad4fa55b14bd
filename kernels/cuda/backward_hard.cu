// Backward with hard gates: dx in one pass, with the partial sums of dalpha and dbeta of a chunk of
// positions.
#include "launch.h"
#include "traits.cuh"

namespace deepshare::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

// Block (chunk, c): the positions of a chunk of channel c, V at a time. inner % V == 0: a vector stays in its
// sample.
template <class T, int V>
__global__ __launch_bounds__(kThreads, kMinBlocks) void hard_channels_first(
    const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ source,
    const int32_t* __restrict__ pi, const Wide<T>* __restrict__ alpha, const Wide<T>* __restrict__ beta,
    T* __restrict__ dx, Wide<T>* __restrict__ partial, int64_t outer, int64_t channels, int64_t inner,
    int64_t source_channels, int64_t chunk_positions, int64_t plane) {
  using W = Wide<T>;
  const int64_t chunk = blockIdx.x / channels;
  const int64_t c = blockIdx.x - chunk * channels;
  const int64_t p = pi[c];
  const W a = alpha[c];
  const W b = beta[c];
  const int64_t last = min(outer * inner, (chunk + 1) * chunk_positions);
  W sum_alpha = 0;
  W sum_beta = 0;
  for (int64_t q = chunk * chunk_positions + threadIdx.x * V; q < last; q += kThreads * V) {
    const int64_t n = q / inner;
    const int64_t i = q - n * inner;
    const int64_t at = (n * channels + c) * inner + i;
    const Pack<T, V> gs = load<V>(grad + at);
    const Pack<T, V> xs = load<V>(x + at);
    const Pack<T, V> ss = load<V>(source + (n * source_channels + p) * inner + i);
    Pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W g = widen(gs.lane[k]);
      const W gate = gate_of<false>(widen(ss.lane[k]), false, W(1));
      const W gx = g * widen(xs.lane[k]);
      out.lane[k] = narrow<T>(gated(g, a, gate, b));
      sum_alpha += gx * gate;
      sum_beta += gx;
    }
    store<V>(dx + at, out);
  }

  __shared__ W warp_sums[2][kWarps];
  sum_alpha = warp_sum(sum_alpha, 32);
  sum_beta = warp_sum(sum_beta, 32);
  if (threadIdx.x % 32 == 0) {
    warp_sums[0][threadIdx.x / 32] = sum_alpha;
    warp_sums[1][threadIdx.x / 32] = sum_beta;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    W total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[threadIdx.x][warp];
    partial[threadIdx.x * plane + chunk * channels + c] = total;
  }
}

// Block (chunk, blockDim.x vectors of V channels): blockDim.y rows of the chunk at a time. C % V == 0.
template <class T, int V>
__global__ __launch_bounds__(kThreads, kMinBlocks) void hard_channels_last(
    const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ source,
    const int32_t* __restrict__ pi, const Wide<T>* __restrict__ alpha, const Wide<T>* __restrict__ beta,
    T* __restrict__ dx, Wide<T>* __restrict__ partial, int64_t rows, int64_t channels,
    int64_t source_channels, int64_t chunk_rows, int64_t column_blocks, int64_t plane) {
  using W = Wide<T>;
  const int64_t chunk = blockIdx.x / column_blocks;
  const int64_t c = ((blockIdx.x - chunk * column_blocks) * blockDim.x + threadIdx.x) * V;
  const int64_t last = min(rows, (chunk + 1) * chunk_rows);
  Pack<W, V> sum_alpha = {};
  Pack<W, V> sum_beta = {};
  if (c < channels) {
    const Pack<int32_t, V> ps = load<V>(pi + c);
    const Pack<W, V> as = load<V>(alpha + c);
    const Pack<W, V> bs = load<V>(beta + c);
    for (int64_t row = chunk * chunk_rows + threadIdx.y; row < last; row += blockDim.y) {
      const int64_t at = row * channels + c;
      const Pack<T, V> gs = load<V>(grad + at);
      const Pack<T, V> xs = load<V>(x + at);
      const T* __restrict__ gates = source + row * source_channels;
      Pack<T, V> out;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const W g = widen(gs.lane[k]);
        const W gate = gate_of<false>(widen(gates[ps.lane[k]]), false, W(1));
        const W gx = g * widen(xs.lane[k]);
        out.lane[k] = narrow<T>(gated(g, as.lane[k], gate, bs.lane[k]));
        sum_alpha.lane[k] += gx * gate;
        sum_beta.lane[k] += gx;
      }
      store<V>(dx + at, out);
    }
  }

  __shared__ Pack<W, V> row_sums[2][kThreads];
  const int slot = threadIdx.y * blockDim.x + threadIdx.x;
  row_sums[0][slot] = sum_alpha;
  row_sums[1][slot] = sum_beta;
  __syncthreads();
  if (threadIdx.y != 0 || c >= channels) return;
  for (int y = 1; y < blockDim.y; ++y) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sum_alpha.lane[k] += row_sums[0][y * blockDim.x + threadIdx.x].lane[k];
      sum_beta.lane[k] += row_sums[1][y * blockDim.x + threadIdx.x].lane[k];
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    partial[chunk * channels + c + k] = sum_alpha.lane[k];
    partial[plane + chunk * channels + c + k] = sum_beta.lane[k];
  }
}

template <class T, int V>
const char* launch(const BackwardArgs& a, const Chunking& chunks, cudaStream_t stream) {
  using W = Wide<T>;
  const Geometry& g = a.geometry;
  const auto* grad = static_cast<const T*>(a.grad);
  const auto* x = static_cast<const T*>(a.x);
  const auto* source = a.source ? static_cast<const T*>(a.source) : x;
  const auto* alpha = static_cast<const W*>(a.alpha);
  const auto* beta = static_cast<const W*>(a.beta);
  auto* dx = static_cast<T*>(a.dx);
  auto* partial = static_cast<W*>(a.workspace);
  const int64_t plane = chunks.chunks * g.channels;
  const bool last = chunks.walk == Walk::kChannelsLast;
  const int columns = power_of_2(ceil_div(g.channels, V), kThreads);
  const int64_t blocks_per_chunk = last ? ceil_div(g.channels, int64_t(columns) * V) : g.channels;
  if (chunks.chunks * blocks_per_chunk > kMaxGridX)
    return "shared_relu: the tensor is too large for one grid";
  const auto grid = static_cast<unsigned>(chunks.chunks * blocks_per_chunk);
  if (last) {
    const dim3 block(columns, kThreads / columns);
    hard_channels_last<T, V><<<grid, block, 0, stream>>>(grad, x, source, a.pi, alpha, beta, dx, partial,
                                                         g.outer, g.channels, g.source_channels,
                                                         chunks.positions, blocks_per_chunk, plane);
  } else {
    hard_channels_first<T, V><<<grid, kThreads, 0, stream>>>(grad, x, source, a.pi, alpha, beta, dx, partial,
                                                             g.outer, g.channels, g.inner, g.source_channels,
                                                             chunks.positions, plane);
  }
  return launch_status();
}

}  // namespace

const char* launch_backward_hard(const BackwardArgs& args, const Chunking& chunks, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    const bool wide =
        chunks.walk == Walk::kChannelsLast
            ? g.channels % V == 0 && aligned_16(args.grad, args.x, args.dx, args.pi, args.alpha, args.beta)
            : g.inner % V == 0 && aligned_16(args.grad, args.x, args.dx, args.source);
    return wide ? launch<T, V>(args, chunks, stream) : launch<T, 1>(args, chunks, stream);
  });
}

}  // namespace deepshare::cuda
