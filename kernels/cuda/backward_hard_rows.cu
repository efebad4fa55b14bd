// Backward with hard gates, positions side by side in memory (NCHW): dx in one pass, with the sums of dalpha
// and dbeta over a chunk of a channel's positions.
#include "backward.h"
#include "fast_div.h"
#include "operands.cuh"

namespace deepshare::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

constexpr int kBlocks = 3;  // two vectors of up to five tensors, and sums: up to 80 registers

template <class T>
struct HardRows {
  Operands<T> of;
  const T* grad;
  T* dx;
  Sums<Wide<T>> sums;
  FastDiv inner;
  int64_t chunk_positions;
};

// One vector of V positions of a channel, as loaded.
template <class T, int V, Gate kGate>
struct Piece {
  int64_t at;
  Pack<T, V> grad;
  Terms<T, V> z;
  Leader<T, V, kGate> leader;
};

// Position q of channel c. inner % V == 0: a vector stays in its sample.
template <class T, int V, Gate kGate>
__device__ Piece<T, V, kGate> read(const HardRows<T>& a, int64_t q, int64_t c, int64_t p, bool valid) {
  const Geometry& g = a.of.geometry;
  const int64_t n = a.inner.quotient(q);
  const int64_t i = q - n * g.inner;
  Piece<T, V, kGate> piece;
  piece.at = (n * g.channels + c) * g.inner + i;
  piece.grad = load_if<V>(valid, a.grad + piece.at);
  piece.z = load_terms<V>(a.of.x, a.of.residual, piece.at, valid);
  if constexpr (kGate == Gate::kBits) {
    piece.leader.read_bits(a.of, (n * g.prototypes + p) * a.of.run_bytes, i, valid);
  } else {
    piece.leader.read(a.of, (n * g.source_channels + p) * g.inner + i, valid);
  }
  return piece;
}

// Writes the block's sums over all threads, added in a fixed order.
template <class W>
__device__ void write_sums(const Sums<W>& sums, int64_t at, W alpha, W beta) {
  __shared__ W warp_sums[2][kWarps];
  alpha = warp_sum(alpha, 32);
  beta = warp_sum(beta, 32);
  if (threadIdx.x % 32 == 0) {
    warp_sums[0][threadIdx.x / 32] = alpha;
    warp_sums[1][threadIdx.x / 32] = beta;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    W total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[threadIdx.x][warp];
    (threadIdx.x == 0 ? sums.alpha : sums.beta)[at] = total;
  }
}

// Block (chunk, c).
template <class T, int V, Gate kGate>
__global__ __launch_bounds__(kThreads, kBlocks) void hard_rows(const HardRows<T> a) {
  using W = Wide<T>;
  const Geometry& g = a.of.geometry;
  const int64_t chunk = blockIdx.x / static_cast<unsigned>(g.channels);
  const int64_t c = blockIdx.x - chunk * g.channels;
  const int64_t p = __ldg(a.of.pi + c);
  const W open = slope_of(__ldg(a.of.alpha + c), W(1), __ldg(a.of.beta + c));
  const W closed = slope_of(__ldg(a.of.alpha + c), W(0), __ldg(a.of.beta + c));
  const int64_t last = min(g.outer * g.inner, (chunk + 1) * a.chunk_positions);
  W sum_alpha = 0;
  W sum_beta = 0;
  for (int64_t q = chunk * a.chunk_positions + threadIdx.x * V; q < last; q += kUnroll * kThreads * V) {
    Piece<T, V, kGate> pieces[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = q + u * (kThreads * V);
      pieces[u] = read<T, V, kGate>(a, at, c, p, at < last);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {  // beyond the chunk grad and z are 0, and add nothing
      const Pack<T, V> z = sum_of(pieces[u].z, a.of.residual != nullptr);
      const unsigned gates = open_gates(pieces[u].leader);
      W out[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const bool is_open = gates >> k & 1u;
        const W grad = widen(pieces[u].grad.lane[k]);
        const W gz = grad * widen(z.lane[k]);
        out[k] = multiply(grad, is_open ? open : closed);
        sum_alpha += gz * (is_open ? W(1) : W(0));
        sum_beta += gz;
      }
      store_if(q + u * (kThreads * V) < last, a.dx + pieces[u].at, narrow_all<T>(out));
    }
  }
  write_sums(a.sums, chunk * g.channels + c, sum_alpha, sum_beta);
}

template <class T, int V, Gate kGate>
Launched launch(const BackwardArgs& a, cudaStream_t stream) {
  const Geometry& g = a.geometry;
  const Chunks chunks = row_chunks(a.dtype, g);
  const HardRows<T> rows{operands_of<T>(a),     static_cast<const T*>(a.grad),
                         static_cast<T*>(a.dx), sums_of<Wide<T>>(a, chunks.count),
                         FastDiv(g.inner),      chunks.size};
  return {run(hard_rows<T, V, kGate>, {chunks.count * g.channels, kThreads}, stream, rows), chunks.count};
}

}  // namespace

Launched launch_backward_hard_rows(const BackwardArgs& args, bool wide, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    if (args.gates != nullptr)
      return wide ? launch<T, V, Gate::kBits>(args, stream) : launch<T, 1, Gate::kBits>(args, stream);
    return wide ? launch<T, V, Gate::kHard>(args, stream) : launch<T, 1, Gate::kHard>(args, stream);
  });
}

}  // namespace deepshare::cuda
