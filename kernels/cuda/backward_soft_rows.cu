// Backward with soft gates, positions side by side in memory (NCHW): dz, the source's gradient and the
// chunks' sums in one pass.
//
//   ds[p] = sum over {c < soft_channels: pi[c] = p} of g * z * alpha[c] * gamma * phi(gamma * s[p])
//
// A warp owns prototype p and kUnit positions per lane, and walks p's members; the gate, its slope and ds
// stay in registers: no atomics. Where a prototype has many members, `split` warps share them (every split-th
// each) and their ds are added in order. A foreign source gets ds as dsource. Own gates add it to dx[p]: the
// walk leaves members below P out of its stores, and the end writes dx[p] from p's own gate, that of s[pi[p]]
// (pi need not map a prototype to itself), plus ds[p].
#include "backward.h"
#include "fast_div.h"
#include "operands.cuh"
#include "soft_chunks.h"

namespace deepshare::cuda {
namespace {

constexpr int kFewWarps = 8;
constexpr int kManyWarps = 16;
// Below this many blocks of kFewWarps (small maps, few prototypes) blocks of kManyWarps share the members.
constexpr int64_t kEnoughBlocks = 512;

template <class T>
struct SoftRows {
  Operands<T> of;
  const T* grad;
  T* dx;
  T* dsource;  // nullptr: own gates
  const int32_t* members;
  const int32_t* offsets;
  Sums<Wide<T>> sums;
  int64_t chunks;
  FastDiv inner;
  int split;
};

// The gates of prototype p at a lane's positions.
template <class W, int kUnit>
struct SoftGates {
  W soft[kUnit], slope[kUnit];
  unsigned hard = 0;  // bit u: the hard gate of position u is open

  __device__ W at(int u, bool is_soft) const { return is_soft ? soft[u] : hard >> u & 1u ? W(1) : W(0); }
};

// The positions of a lane: kUnit / V vectors, 32 * V positions apart.
template <class T, int V>
struct Lane {
  static constexpr int kUnit = kSoftUnit<T>;
  static constexpr int kVectors = kUnit / V;
  int64_t first;
  int64_t at[kVectors];  // of vector j in channel 0 of x; -1: out of range

  __device__ Lane(const SoftRows<T>& a, int64_t first_position) : first(first_position) {
    const Geometry& g = a.of.geometry;
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      at[j] = first + j * 32 * V < g.outer * g.inner ? offset(a, j, g.channels) : -1;
  }
  // Of vector j in channel 0 of a tensor with so many channels.
  __device__ int64_t offset(const SoftRows<T>& a, int j, int64_t channels) const {
    const int64_t q = first + j * 32 * V;
    const int64_t n = a.inner.quotient(q);
    return n * channels * a.inner.divisor + (q - n * a.inner.divisor);
  }
};

template <class T, int V>
__device__ SoftGates<Wide<T>, kSoftUnit<T>> gates_of(const SoftRows<T>& a, const Lane<T, V>& lane, int64_t p,
                                                     Wide<T> gamma) {
  const Operands<T>& o = a.of;
  SoftGates<Wide<T>, kSoftUnit<T>> gates;
#pragma unroll
  for (int j = 0; j < Lane<T, V>::kVectors; ++j) {
    Pack<T, V> s = {};
    if (lane.at[j] >= 0)
      s = load_sum<V>(o.source, o.source_residual,
                      lane.offset(a, j, o.geometry.source_channels) + p * o.geometry.inner);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Wide<T> v = widen(s.lane[k]);
      gates.soft[j * V + k] = soft_gate(v, gamma);
      gates.slope[j * V + k] = gate_slope(v, gamma);
      gates.hard |= (v >= Wide<T>(0) ? 1u : 0u) << (j * V + k);
    }
  }
  return gates;
}

// Channel c of the members: stores its dx, adds its term to ds, writes its sums.
template <class T, int V>
__device__ void walk_member(const SoftRows<T>& a, const Lane<T, V>& lane,
                            const SoftGates<Wide<T>, kSoftUnit<T>>& gates, int64_t c, bool is_soft,
                            int64_t chunk, Wide<T> (&ds)[kSoftUnit<T>]) {
  using W = Wide<T>;
  constexpr int kVectors = Lane<T, V>::kVectors;
  constexpr int kGroup = kVectors < 4 ? kVectors : 4;  // in flight together; 8 would spill
  const Operands<T>& o = a.of;
  const W alpha = __ldg(o.alpha + c);
  const W beta = __ldg(o.beta + c);
  W sum_alpha = 0;
  W sum_beta = 0;
#pragma unroll
  for (int first = 0; first < kVectors; first += kGroup) {
    Pack<T, V> grads[kGroup];
    Terms<T, V> terms[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int64_t at = lane.at[first + j] + c * o.geometry.inner;
      grads[j] = load_if<V>(lane.at[first + j] >= 0, a.grad + at);
      terms[j] = load_terms<V>(o.x, o.residual, at, lane.at[first + j] >= 0);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {  // out of range grad and z are 0, and add nothing
      const Pack<T, V> z = sum_of(terms[j], o.residual != nullptr);
      W out[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int u = (first + j) * V + k;
        const W grad = widen(grads[j].lane[k]);
        const W gz = grad * widen(z.lane[k]);
        const W gate = gates.at(u, is_soft);
        out[k] = multiply(grad, slope_of(alpha, gate, beta));
        if (is_soft) ds[u] += gz * (alpha * gates.slope[u]);
        sum_alpha += gz * gate;
        sum_beta += gz;
      }
      const bool stored = lane.at[first + j] >= 0 && (a.dsource != nullptr || c >= o.geometry.prototypes);
      store_if(stored, a.dx + lane.at[first + j] + c * o.geometry.inner, narrow_all<T>(out));
    }
  }
  sum_alpha = warp_sum(sum_alpha, 32);
  sum_beta = warp_sum(sum_beta, 32);
  if (threadIdx.x % 32 == 0 && chunk < a.chunks) {
    a.sums.alpha[chunk * o.geometry.channels + c] = sum_alpha;
    a.sums.beta[chunk * o.geometry.channels + c] = sum_beta;
  }
}

// ds of p into dsource[p], or with own gates into dx[p].
template <class T, int V>
__device__ void write_source_gradient(const SoftRows<T>& a, const Lane<T, V>& lane, int64_t p, bool is_soft,
                                      Wide<T> gamma, const Wide<T> (&ds)[kSoftUnit<T>]) {
  using W = Wide<T>;
  const Operands<T>& o = a.of;
  const int64_t inner = o.geometry.inner;
  const int64_t leader = __ldg(o.pi + p);
#pragma unroll
  for (int j = 0; j < Lane<T, V>::kVectors; ++j) {
    if (lane.at[j] < 0) continue;
    W out[V];
    if (a.dsource != nullptr) {
#pragma unroll
      for (int k = 0; k < V; ++k) out[k] = ds[j * V + k];
      store<V>(a.dsource + lane.offset(a, j, o.geometry.source_channels) + p * inner, narrow_all<T>(out));
      continue;
    }
    const int64_t at = lane.at[j] + p * inner;
    const Pack<T, V> grads = load<V>(a.grad + at);
    const Pack<T, V> s = load_sum<V>(o.source, o.source_residual, lane.at[j] + leader * inner);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W v = widen(s.lane[k]);
      const W gate = is_soft ? soft_gate(v, gamma) : hard_gate(v);
      const W slope = slope_of(__ldg(o.alpha + p), gate, __ldg(o.beta + p));
      out[k] = add(multiply(widen(grads.lane[k]), slope), ds[j * V + k]);
    }
    store<V>(a.dx + at, narrow_all<T>(out));
  }
}

template <class T, int V>
__global__ __launch_bounds__(32 * kManyWarps, 1) void soft_rows(const SoftRows<T> a) {
  using W = Wide<T>;
  constexpr int kUnit = kSoftUnit<T>;
  DEEPSHARE_DYNAMIC_SHARED(shared);
  W* const shares = reinterpret_cast<W*>(shared);  // [warps][kUnit][32], where warps share members
  const int64_t prototypes = a.of.geometry.prototypes;
  const int64_t tile = blockIdx.x / static_cast<unsigned>(prototypes);
  const int64_t p = blockIdx.x - tile * prototypes;
  const int warp = threadIdx.x / 32;
  const int share = warp % a.split;
  const int64_t chunk = tile * (blockDim.x / 32 / a.split) + warp / a.split;
  const Lane<T, V> lane(a, chunk * 32 * kUnit + threadIdx.x % 32 * V);
  const int soft = *a.of.soft_channels;
  const W gamma = *a.of.gamma;
  const auto gates = gates_of(a, lane, p, gamma);

  W ds[kUnit] = {};
  const int32_t last = __ldg(a.offsets + p + 1);
  for (int32_t m = __ldg(a.offsets + p) + share; m < last; m += a.split) {
    const int64_t c = __ldg(a.members + m);
    walk_member(a, lane, gates, c, c < soft, chunk, ds);
  }
  if (a.split > 1) {
#pragma unroll
    for (int u = 0; u < kUnit; ++u) shares[(warp * kUnit + u) * 32 + threadIdx.x % 32] = ds[u];
    __syncthreads();
    if (share != 0) return;
    for (int other = 1; other < a.split; ++other) {
#pragma unroll
      for (int u = 0; u < kUnit; ++u) ds[u] += shares[((warp + other) * kUnit + u) * 32 + threadIdx.x % 32];
    }
  }
  write_source_gradient(a, lane, p, p < soft, gamma, ds);
}

// Warps of a block, and how many of them share a prototype's members.
struct Split {
  int warps, split;
};

Split split_of(const Geometry& g, int64_t chunks) {
  const int64_t members = ceil_div(g.channels, g.prototypes);
  const int few = power_of_2(members, kFewWarps);
  if (ceil_div(chunks, kFewWarps / few) * g.prototypes >= kEnoughBlocks) return {kFewWarps, few};
  const int many = power_of_2(members, kManyWarps);
  return {std::max(kFewWarps, many), many};
}

template <class T, int V>
Launched launch(const BackwardArgs& a, cudaStream_t stream) {
  const Geometry& g = a.geometry;
  const int64_t chunks = soft_row_chunks(a.dtype, g).count;
  const Split by = split_of(g, chunks);
  const SoftRows<T> rows{operands_of<T>(a),
                         static_cast<const T*>(a.grad),
                         static_cast<T*>(a.dx),
                         a.source != nullptr ? static_cast<T*>(a.dsource) : nullptr,
                         a.members,
                         a.offsets,
                         sums_of<Wide<T>>(a, chunks),
                         chunks,
                         FastDiv(g.inner),
                         by.split};
  const int64_t blocks = ceil_div(chunks, by.warps / by.split) * g.prototypes;
  const size_t shared = by.split > 1 ? sizeof(Wide<T>) * by.warps * kSoftUnit<T> * 32 : 0;
  return {run(soft_rows<T, V>, {blocks, dim3(32 * by.warps), shared}, stream, rows), chunks};
}

}  // namespace

Launched launch_backward_soft_rows(const BackwardArgs& args, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    const bool wide =
        args.geometry.inner % V == 0 && aligned_16(args.grad, args.x, args.residual, args.dx, args.source,
                                                   args.source != nullptr ? args.dsource : nullptr);
    return wide ? launch<T, V>(args, stream) : launch<T, 1>(args, stream);
  });
}

}  // namespace deepshare::cuda
