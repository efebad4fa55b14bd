// Forward, positions side by side in memory (NCHW): a vector of V positions stays in its row (n, c).
#include "fast_div.h"
#include "forward.h"
#include "operands.cuh"

namespace deepshare::cuda {
namespace {

template <Gate kGate>
constexpr int kBlocks = kGate == Gate::kEmit ? 3 : kMinBlocks;  // packing needs more registers

template <class T>
struct ForwardRows {
  Operands<T> of;
  T* y;
  uint8_t* emitted;
  int64_t vectors;
  FastDiv inner_vectors, channels;
};

// The gates of V positions i.. of prototype p.
template <class T, int V, Gate kGate>
__device__ Leader<T, V, kGate> leader_of_row(const Operands<T>& o, int64_t n, int64_t p, int64_t i,
                                             bool valid) {
  Leader<T, V, kGate> leader;
  if constexpr (kGate == Gate::kBits) {
    leader.read_bits(o, (n * o.geometry.prototypes + p) * o.run_bytes, i, valid);
  } else {
    leader.read(o, (n * o.geometry.source_channels + p) * o.geometry.inner + i, valid);
  }
  return leader;
}

template <class T, int V, Gate kGate>
__device__ Pack<T, V> activate(const Pack<T, V>& z, const Leader<T, V, kGate>& leader, Wide<T> alpha,
                               Wide<T> beta, bool is_soft, Wide<T> gamma) {
  using W = Wide<T>;
  W out[V];
  // A hard gate chooses between two slopes: the same bits as alpha * gate + beta, two operations less.
  const W open = slope_of(alpha, W(1), beta);
  const W closed = slope_of(alpha, W(0), beta);
  if constexpr (kGate == Gate::kSoft) {
    const Pack<T, V> s = leader.values();
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W v = widen(s.lane[k]);
      const W slope = is_soft ? slope_of(alpha, soft_gate(v, gamma), beta) : v >= W(0) ? open : closed;
      out[k] = multiply(widen(z.lane[k]), slope);
    }
  } else {
    const unsigned gates = open_gates(leader);
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = multiply(widen(z.lane[k]), gates >> k & 1u ? open : closed);
  }
  return narrow_all<T>(out);
}

template <class T, int V, Gate kGate>
__global__ __launch_bounds__(kThreads, kBlocks<kGate>) void forward_rows(const ForwardRows<T> a) {
  const Operands<T>& o = a.of;
  const bool soft_phase = kGate == Gate::kSoft;
  const int soft = soft_phase ? *o.soft_channels : 0;
  const Wide<T> gamma = soft_phase ? *o.gamma : Wide<T>(1);
  const int64_t first = int64_t(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  int64_t row[kUnroll], n[kUnroll];
  int32_t p[kUnroll];
  Terms<T, V> terms[kUnroll];
  Leader<T, V, kGate> leaders[kUnroll];
  Wide<T> alpha[kUnroll], beta[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t vector = first + u * kThreads;
    terms[u] = load_terms<V>(o.x, o.residual, vector * V, vector < a.vectors);
    row[u] = a.inner_vectors.quotient(vector);
    n[u] = a.channels.quotient(row[u]);
    const int64_t c = row[u] - n[u] * a.channels.divisor;  // below C beyond the last vector too
    p[u] = __ldg(o.pi + c);
    alpha[u] = __ldg(o.alpha + c);
    beta[u] = __ldg(o.beta + c);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {  // not above, because the first of these waits for p
    const int64_t vector = first + u * kThreads;
    const int64_t i = (vector - row[u] * a.inner_vectors.divisor) * V;
    leaders[u] = leader_of_row<T, V, kGate>(o, n[u], p[u], i, vector < a.vectors);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t vector = first + u * kThreads;
    const int64_t c = row[u] - n[u] * a.channels.divisor;
    const Pack<T, V> z = sum_of(terms[u], o.residual != nullptr);
    store_if(vector < a.vectors, a.y + vector * V,
             activate(z, leaders[u], alpha[u], beta[u], c < soft, gamma));
    if constexpr (kGate == Gate::kEmit) {
      const int64_t i = (vector - row[u] * a.inner_vectors.divisor) * V;
      if (vector < a.vectors && c < o.geometry.prototypes && i % 8 == 0)
        a.emitted[(n[u] * o.geometry.prototypes + c) * o.run_bytes + i / 8] =
            own_byte(o, z, vector * V, o.geometry.inner - i);
    }
  }
}

template <class T, int V, Gate kGate>
const char* launch(const ForwardArgs& a, cudaStream_t stream) {
  const Geometry& g = a.geometry;
  const int64_t vectors = g.outer * g.channels * g.inner / V;
  const ForwardRows<T> rows{operands_of<T>(a), static_cast<T*>(a.y), a.emitted,
                            vectors,           FastDiv(g.inner / V), FastDiv(g.channels)};
  return run(forward_rows<T, V, kGate>, {ceil_div(vectors, kThreads * kUnroll), kThreads}, stream, rows);
}

}  // namespace

const char* launch_forward_rows(const ForwardArgs& args, bool wide, cudaStream_t stream) {
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
