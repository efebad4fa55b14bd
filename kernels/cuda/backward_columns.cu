// Backward, channels side by side in memory (NHWC) or rows that are no multiple of 16 bytes (columns.h): dx
// in one pass, with the sums of dalpha and dbeta over a chunk of rows. Soft gates: without what flows through
// the gate (backward_soft_prototypes.cu).
#include "backward.h"
#include "columns.cuh"

namespace deepshare::cuda {
namespace {

// Offsets, alpha, beta and two sums are 5 V registers. 2 blocks of 128 registers hold 512 threads, which keep
// 24 to 32 KiB in flight, as many bytes as the walk over rows (launch.h).
constexpr int kBlocks = 2;

template <class T>
struct BackwardColumns {
  Operands<T> of;
  const T* grad;
  T* dx;
  Sums<Wide<T>> sums;
  Columns shape;
  bool gates_aligned, affine_aligned;
};

// Sums of V columns over the rows a thread walked.
template <class W, int V>
struct ColumnSums {
  W alpha[V] = {}, beta[V] = {};
};

template <class T, int V, Gate kGate, bool kSideBySide>
__device__ void walk(const BackwardColumns<T>& a, const Column<Wide<T>, V>& column, int64_t first,
                     int64_t last, Wide<T> gamma, ColumnSums<Wide<T>, V>& sums) {
  using W = Wide<T>;
  const Operands<T>& o = a.of;
  for (int64_t row = first; row < last; row += blockDim.y * kUnroll) {
    Pack<T, V> grads[kUnroll];
    Terms<T, V> terms[kUnroll];
    Leader<T, V, kGate> leaders[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = row + u * blockDim.y;
      grads[u] = load_if<V>(at < last, a.grad + at * a.shape.columns + column.first);
      terms[u] = load_terms<V>(o.x, o.residual, at * a.shape.columns + column.first, at < last);
      leaders[u] = leader_of_columns<T, V, kGate, kSideBySide>(o, column, at, at < last);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {  // beyond the chunk grad and z are 0, and add nothing
      const int64_t at = row + u * blockDim.y;
      const Pack<T, V> z = sum_of(terms[u], o.residual != nullptr);
      W gates[V];
      if constexpr (kGate == Gate::kSoft) {
        const Pack<T, V> values = leaders[u].values();
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const W v = widen(values.lane[k]);
          gates[k] = column.soft >> k & 1u ? soft_gate(v, gamma) : hard_gate(v);
        }
      } else {
        const unsigned open = open_gates(leaders[u]);
#pragma unroll
        for (int k = 0; k < V; ++k) gates[k] = open >> k & 1u ? W(1) : W(0);
      }
      W out[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const W grad = widen(grads[u].lane[k]);
        const W gz = grad * widen(z.lane[k]);
        out[k] = multiply(grad, slope_of(column.alpha[k], gates[k], column.beta[k]));
        sums.alpha[k] += gz * gates[k];
        sums.beta[k] += gz;
      }
      store_if(at < last, a.dx + at * a.shape.columns + column.first, narrow_all<T>(out));
    }
  }
}

// Adds the block's column sums [2][height][width * V] to channels and writes them, in a fixed order. A
// block's columns are whole channels.
template <class W, int V>
__device__ void write_sums(const Sums<W>& sums, const W* shared, const Columns& shape, const Geometry& g,
                           int64_t chunk, int64_t first) {
  const int width = shape.width * V;
  const int inner = static_cast<int>(g.inner);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int channels = static_cast<int>(min(int64_t(width), shape.columns - first)) / inner;
  W* const out[2] = {sums.alpha + chunk * g.channels + first / inner,
                     sums.beta + chunk * g.channels + first / inner};
  if (inner == 1) {
    for (int t = thread; t < 2 * channels; t += blockDim.x * blockDim.y) {
      const int which = t >= channels;
      const int c = t - which * channels;
      W total = 0;
      for (int y = 0; y < shape.height; ++y) total += shared[(which * shape.height + y) * width + c];
      (which ? out[1] : out[0])[c] = total;
    }
    return;
  }
  const int warps = blockDim.x * blockDim.y / 32;  // a last one of fewer lanes has no part: shuffles need all
  for (int t = thread / 32; t < 2 * channels && thread / 32 < warps; t += warps) {
    const int which = t >= channels;
    const int c = t - which * channels;
    W total = 0;
    for (int y = 0; y < shape.height; ++y) {
      const W* const row = shared + (which * shape.height + y) * width + c * inner;
      for (int i = thread % 32; i < inner; i += 32) total += row[i];
    }
    total = warp_sum(total, 32);
    if (thread % 32 == 0) (which ? out[1] : out[0])[c] = total;
  }
}

// Block (chunk, `width` vectors of V columns).
template <class T, int V, Gate kGate>
__global__ __launch_bounds__(kThreads, kBlocks) void backward_columns(const BackwardColumns<T> a) {
  using W = Wide<T>;
  __shared__ __align__(16) W shared[2 * kThreads * V];
  const int64_t chunk = blockIdx.x / static_cast<unsigned>(a.shape.blocks);
  const int64_t first = (blockIdx.x - chunk * a.shape.blocks) * a.shape.width * V;
  const int64_t mine = first + threadIdx.x * V;
  const int soft = kGate == Gate::kSoft ? *a.of.soft_channels : 0;
  const W gamma = kGate == Gate::kSoft ? *a.of.gamma : W(1);
  ColumnSums<W, V> sums;
  if (mine < a.shape.columns) {
    const auto column = column_of<T, V, kGate>(a.of, mine, soft, a.gates_aligned, a.affine_aligned);
    const int64_t last = min(a.of.geometry.outer, (chunk + 1) * a.shape.rows);
    const int64_t row = chunk * a.shape.rows + threadIdx.y;
    if (column.side_by_side) {
      walk<T, V, kGate, true>(a, column, row, last, gamma, sums);
    } else {
      walk<T, V, kGate, false>(a, column, row, last, gamma, sums);
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int slot = (threadIdx.y * a.shape.width + threadIdx.x) * V + k;
    shared[slot] = sums.alpha[k];
    shared[a.shape.height * a.shape.width * V + slot] = sums.beta[k];
  }
  __syncthreads();
  write_sums<W, V>(a.sums, shared, a.shape, a.of.geometry, chunk, first);
}

template <class T, int V, Gate kGate>
Launched launch(const BackwardArgs& a, cudaStream_t stream) {
  const Columns shape = column_chunks(a.geometry, V);
  const BackwardColumns<T> columns{operands_of<T>(a),
                                   static_cast<const T*>(a.grad),
                                   static_cast<T*>(a.dx),
                                   sums_of<Wide<T>>(a, shape.chunks),
                                   shape,
                                   gates_aligned(a, V),
                                   aligned_16(a.pi, a.alpha, a.beta)};
  const dim3 threads(shape.width, shape.height);
  return {run(backward_columns<T, V, kGate>, {shape.chunks * shape.blocks, threads}, stream, columns),
          shape.chunks};
}

}  // namespace

Launched launch_backward_columns(const BackwardArgs& args, bool wide, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    if (args.gates != nullptr)
      return wide ? launch<T, V, Gate::kBits>(args, stream) : launch<T, 1, Gate::kBits>(args, stream);
    if (args.soft_channels != nullptr)
      return wide ? launch<T, V, Gate::kSoft>(args, stream) : launch<T, 1, Gate::kSoft>(args, stream);
    return wide ? launch<T, V, Gate::kHard>(args, stream) : launch<T, 1, Gate::kHard>(args, stream);
  });
}

}  // namespace deepshare::cuda
