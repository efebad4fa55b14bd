// Forward, channels side by side in memory (NHWC) or rows that are no multiple of 16 bytes: columns.h.
#include "columns.cuh"
#include "forward.h"

namespace deepshare::cuda {
namespace {

// Blocks of 128 threads leave fewer registers unused than blocks of 256, at the 72 to 96 a thread that a
// column's offset, alpha and beta and two rows in flight take.
constexpr int kBlockThreads = 128;
template <int V>
constexpr int kBlocks = V == 8 ? 5 : 6;
// Blocks that fill a big GPU three times; a chunk's rows grow until there are no more than these, up to
// kMostRows a thread: the reads of pi, alpha and beta at its start are spread over them.
constexpr int64_t kWantedBlocks = 4096;
constexpr int64_t kMostRows = 16;

// Rows in flight. One where packing, or 8 error functions, take the registers of the second.
template <int V, Gate kGate>
constexpr int kRows = kGate == Gate::kEmit || (V == 8 && kGate == Gate::kSoft) ? 1 : kUnroll;

template <class T>
struct ForwardColumns {
  Operands<T> of;
  T* y;
  uint8_t* emitted;
  Columns shape;
  bool gates_aligned, affine_aligned;
};

// z's own gates of V columns, packed. inner is 1: channels of a pixel, of which c + [0, 8) with c % 8 == 0
// make a byte. Else any position may begin a byte of its run, which is then read again, from L1.
template <class T, int V>
__device__ void emit(const ForwardColumns<T>& a, const Pack<T, V>& z, int64_t row, int64_t first) {
  const Operands<T>& o = a.of;
  const int64_t inner = o.geometry.inner, prototypes = o.geometry.prototypes;
  const int64_t at = row * a.shape.columns;
  if (inner == 1) {
    if (first % 8 == 0 && first < prototypes)
      a.emitted[row * o.run_bytes + first / 8] = own_byte(o, z, at + first, prototypes - first);
    return;
  }
#pragma unroll 1
  for (int64_t column = first; column < min(first + V, prototypes * inner); ++column) {
    const auto p = static_cast<uint32_t>(column) / static_cast<uint32_t>(inner);
    const int64_t i = column - p * inner;
    if (i % 8 != 0) continue;
    const Pack<T, 1> begin = load_sum<1>(o.x, o.residual, at + column);
    a.emitted[(row * prototypes + p) * o.run_bytes + i / 8] = own_byte(o, begin, at + column, inner - i);
  }
}

template <class T, int V, Gate kGate>
__device__ Pack<T, V> activate(const Pack<T, V>& z, const Leader<T, V, kGate>& leader,
                               const Column<Wide<T>, V>& column, Wide<T> gamma) {
  using W = Wide<T>;
  W out[V];
  if constexpr (kGate == Gate::kSoft) {
    const Pack<T, V> s = leader.values();
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W v = widen(s.lane[k]);
      const W gate = column.soft >> k & 1u ? soft_gate(v, gamma) : hard_gate(v);
      out[k] = multiply(widen(z.lane[k]), slope_of(column.alpha[k], gate, column.beta[k]));
    }
  } else {
    const unsigned gates = open_gates(leader);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W gate = gates >> k & 1u ? W(1) : W(0);
      out[k] = multiply(widen(z.lane[k]), slope_of(column.alpha[k], gate, column.beta[k]));
    }
  }
  return narrow_all<T>(out);
}

template <class T, int V, Gate kGate, bool kSideBySide>
__device__ void walk(const ForwardColumns<T>& a, const Column<Wide<T>, V>& column, int64_t first,
                     int64_t last, Wide<T> gamma) {
  const Operands<T>& o = a.of;
  for (int64_t row = first; row < last; row += blockDim.y * kRows<V, kGate>) {
    Terms<T, V> terms[kRows<V, kGate>];
    Leader<T, V, kGate> leaders[kRows<V, kGate>];
#pragma unroll
    for (int u = 0; u < kRows<V, kGate>; ++u) {
      const int64_t at = row + u * blockDim.y;
      terms[u] = load_terms<V>(o.x, o.residual, at * a.shape.columns + column.first, at < last);
      leaders[u] = leader_of_columns<T, V, kGate, kSideBySide>(o, column, at, at < last);
    }
#pragma unroll
    for (int u = 0; u < kRows<V, kGate>; ++u) {
      const int64_t at = row + u * blockDim.y;
      const Pack<T, V> z = sum_of(terms[u], o.residual != nullptr);
      store_if(at < last, a.y + at * a.shape.columns + column.first, activate(z, leaders[u], column, gamma));
      if constexpr (kGate == Gate::kEmit) {
        if (at < last) emit(a, z, at, column.first);
      }
    }
  }
}

template <class T, int V, Gate kGate>
__global__ __launch_bounds__(kBlockThreads, kBlocks<V>) void forward_columns(const ForwardColumns<T> a) {
  const Operands<T>& o = a.of;
  const int soft = kGate == Gate::kSoft ? *o.soft_channels : 0;
  const Wide<T> gamma = kGate == Gate::kSoft ? *o.gamma : Wide<T>(1);
  const int64_t chunk = blockIdx.x / static_cast<unsigned>(a.shape.blocks);
  const int64_t first = ((blockIdx.x - chunk * a.shape.blocks) * a.shape.width + threadIdx.x) * V;  // column
  if (first >= a.shape.columns) return;
  const auto column = column_of<T, V, kGate>(o, first, soft, a.gates_aligned, a.affine_aligned);
  const int64_t last = min(o.geometry.outer, (chunk + 1) * a.shape.rows);
  const int64_t row = chunk * a.shape.rows + threadIdx.y;
  if (column.side_by_side) {
    walk<T, V, kGate, true>(a, column, row, last, gamma);
  } else {
    walk<T, V, kGate, false>(a, column, row, last, gamma);
  }
}

template <class T, int V, Gate kGate>
const char* launch(const ForwardArgs& a, cudaStream_t stream) {
  const Geometry& g = a.geometry;
  Columns shape = columns_of(g.channels * g.inner, V, 1, kBlockThreads, kBlockThreads);
  const int64_t tiles = ceil_div(g.outer, shape.height) * shape.blocks;
  shape.rows = shape.height * std::clamp<int64_t>(tiles / kWantedBlocks, kUnroll, kMostRows);
  shape.chunks = ceil_div(g.outer, shape.rows);
  const ForwardColumns<T> columns{operands_of<T>(a),   static_cast<T*>(a.y),
                                  a.emitted,           shape,
                                  gates_aligned(a, V), aligned_16(a.pi, a.alpha, a.beta)};
  const dim3 threads(shape.width, shape.height);
  return run(forward_columns<T, V, kGate>, {shape.chunks * shape.blocks, threads}, stream, columns);
}

}  // namespace

const char* launch_forward_columns(const ForwardArgs& args, bool wide, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    if (args.gates != nullptr)
      return wide ? launch<T, V, Gate::kBits>(args, stream) : launch<T, 1, Gate::kBits>(args, stream);
    if (args.soft_channels != nullptr)
      return wide ? launch<T, V, Gate::kSoft>(args, stream) : launch<T, 1, Gate::kSoft>(args, stream);
    if (args.emitted != nullptr)
      return wide ? launch<T, V, Gate::kEmit>(args, stream) : launch<T, 1, Gate::kEmit>(args, stream);
    return wide ? launch<T, V, Gate::kHard>(args, stream) : launch<T, 1, Gate::kHard>(args, stream);
  });
}

}  // namespace deepshare::cuda
