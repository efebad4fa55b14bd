// Backward with soft gates, channels side by side in memory (NHWC): dz, the source's gradient and the chunks'
// sums in one pass. Equations: backward_soft_rows.cu.
//
// A block walks the rows (positions) of its chunk, blockDim.y at a time. Step 1: each thread has vectors of V
// channels of a row, writes their dx and keeps each channel's term of ds in shared memory. Step 2: `lanes`
// threads add a prototype's terms and write dsource[p], or with own gates dx[p] over what step 1 wrote there.
// Sums of a channel stay with the thread that owns it.
#include "backward.h"
#include "operands.cuh"

namespace deepshare::cuda {
namespace {

template <class T>
struct SoftColumns {
  Operands<T> of;
  const T* grad;
  T* dx;
  T* dsource;  // nullptr: own gates
  const int32_t* members;
  const int32_t* offsets;
  Sums<Wide<T>> sums;
  int64_t chunk_rows;
  int lanes;
};

// A row of the block's shared memory: [3][C] values.
template <class W>
struct Row {
  W* terms;
  W* alpha;
  W* beta;

  __device__ Row(unsigned char* shared, int y, int channels)
      : terms(reinterpret_cast<W*>(shared) + y * 3 * channels),
        alpha(terms + channels),
        beta(alpha + channels) {}
};

// Step 1 for channels c + [0, V) of a row.
template <class T, int V>
__device__ void walk_channels(const SoftColumns<T>& a, const Row<Wide<T>>& mine, int64_t row, int c, int soft,
                              Wide<T> gamma) {
  using W = Wide<T>;
  const Operands<T>& o = a.of;
  const int64_t at = row * o.geometry.channels + c;
  const Pack<T, V> grads = load<V>(a.grad + at);
  const Terms<T, V> terms = load_terms<V>(o.x, o.residual, at, true);
  const Pack<int32_t, V> ps = load<V>(o.pi + c);
  const Pack<W, V> alphas = load<V>(o.alpha + c);
  const Pack<W, V> betas = load<V>(o.beta + c);
  Pack<T, V> s;
#pragma unroll
  for (int k = 0; k < V; ++k)
    s.lane[k] =
        load_sum<1>(o.source, o.source_residual, row * o.geometry.source_channels + ps.lane[k]).lane[0];
  const Pack<T, V> z = sum_of(terms, o.residual != nullptr);
  Pack<W, V> sum_alpha = load_shared<V>(mine.alpha + c);
  Pack<W, V> sum_beta = load_shared<V>(mine.beta + c);
  Pack<W, V> term;
  W out[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const W grad = widen(grads.lane[k]);
    const W gz = grad * widen(z.lane[k]);
    const W v = widen(s.lane[k]);
    const bool is_soft = c + k < soft;
    const W gate = is_soft ? soft_gate(v, gamma) : hard_gate(v);
    out[k] = multiply(grad, slope_of(alphas.lane[k], gate, betas.lane[k]));
    term.lane[k] = is_soft ? gz * (alphas.lane[k] * gate_slope(v, gamma)) : W(0);
    sum_alpha.lane[k] += gz * gate;
    sum_beta.lane[k] += gz;
  }
  store<V>(a.dx + at, narrow_all<T>(out));
  store_shared<V>(mine.terms + c, term);
  store_shared<V>(mine.alpha + c, sum_alpha);
  store_shared<V>(mine.beta + c, sum_beta);
}

// What becomes of ds of prototype p in a row.
template <class T>
__device__ void write_source_gradient(const SoftColumns<T>& a, int64_t row, int p, Wide<T> ds, int soft,
                                      Wide<T> gamma) {
  using W = Wide<T>;
  const Operands<T>& o = a.of;
  if (a.dsource != nullptr) {
    a.dsource[row * o.geometry.source_channels + p] = narrow<T>(ds);
    return;
  }
  const int64_t at = row * o.geometry.channels;
  const W v = widen(load_sum<1>(o.source, o.source_residual, at + __ldg(o.pi + p)).lane[0]);
  const W gate = p < soft ? soft_gate(v, gamma) : hard_gate(v);
  const W slope = slope_of(__ldg(o.alpha + p), gate, __ldg(o.beta + p));
  a.dx[at + p] = narrow<T>(add(multiply(widen(load<1>(a.grad + at + p).lane[0]), slope), ds));
}

// Step 2 for all prototypes of a row. Every thread of a warp makes the same number of rounds: the shuffles in
// warp_sum need them all.
template <class T>
__device__ void walk_prototypes(const SoftColumns<T>& a, const Row<Wide<T>>& mine, int64_t row, bool has_row,
                                int soft, Wide<T> gamma) {
  const int prototypes = static_cast<int>(a.of.geometry.prototypes);
  for (int base = 0; base < prototypes; base += blockDim.x / a.lanes) {
    const int p = base + threadIdx.x / a.lanes;
    const bool valid = p < prototypes && has_row;
    Wide<T> ds = 0;
    if (valid) {
      const int last = __ldg(a.offsets + p + 1);
      for (int m = __ldg(a.offsets + p) + threadIdx.x % a.lanes; m < last; m += a.lanes)
        ds += mine.terms[__ldg(a.members + m)];
    }
    ds = warp_sum(ds, a.lanes);
    if (valid && threadIdx.x % a.lanes == 0) write_source_gradient(a, row, p, ds, soft, gamma);
  }
}

// Block: a chunk of rows.
template <class T, int V>
__global__ __launch_bounds__(kThreads, 2) void soft_columns(const SoftColumns<T> a) {
  using W = Wide<T>;
  DEEPSHARE_DYNAMIC_SHARED(shared);  // a Row for each of blockDim.y
  const int channels = static_cast<int>(a.of.geometry.channels);
  const Row<W> mine(shared, threadIdx.y, channels);
  const int64_t chunk = blockIdx.x;
  const int64_t last = min(a.of.geometry.outer, (chunk + 1) * a.chunk_rows);
  const int soft = *a.of.soft_channels;
  const W gamma = *a.of.gamma;
  for (int c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    store_shared<V>(mine.alpha + c, Pack<W, V>{});
    store_shared<V>(mine.beta + c, Pack<W, V>{});
  }
  for (int64_t first = chunk * a.chunk_rows; first < last; first += blockDim.y) {
    const int64_t row = first + threadIdx.y;
    for (int c = threadIdx.x * V; c < channels && row < last; c += blockDim.x * V)
      walk_channels<T, V>(a, mine, row, c, soft, gamma);
    __syncthreads();
    walk_prototypes(a, mine, row, row < last, soft, gamma);
    __syncthreads();
  }
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < channels; c += kThreads) {
    W sum_alpha = 0;
    W sum_beta = 0;
    for (int y = 0; y < blockDim.y; ++y) {
      const Row<W> row(shared, y, channels);
      sum_alpha += row.alpha[c];
      sum_beta += row.beta[c];
    }
    a.sums.alpha[chunk * channels + c] = sum_alpha;
    a.sums.beta[chunk * channels + c] = sum_beta;
  }
}

template <class T, int V>
Launched launch(const BackwardArgs& a, cudaStream_t stream) {
  const Geometry& g = a.geometry;
  const Chunks chunks = soft_column_chunks(g);
  const int columns = power_of_2(ceil_div(g.channels, V), kThreads);
  const int lanes = power_of_2(ceil_div(g.channels, g.prototypes), std::min(columns, 32));
  const SoftColumns<T> walk{operands_of<T>(a),
                            static_cast<const T*>(a.grad),
                            static_cast<T*>(a.dx),
                            a.source != nullptr ? static_cast<T*>(a.dsource) : nullptr,
                            a.members,
                            a.offsets,
                            sums_of<Wide<T>>(a, chunks.count),
                            chunks.size,
                            lanes};
  const dim3 threads(columns, kThreads / columns);
  const size_t shared = sizeof(Wide<T>) * 3 * g.channels * threads.y;
  return {run(soft_columns<T, V>, {chunks.count, threads, shared}, stream, walk), chunks.count};
}

}  // namespace

Launched launch_backward_soft_columns(const BackwardArgs& args, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    const bool wide = args.geometry.channels % V == 0 &&
                      aligned_16(args.grad, args.x, args.residual, args.dx, args.pi, args.alpha, args.beta);
    return wide ? launch<T, V>(args, stream) : launch<T, 1>(args, stream);
  });
}

}  // namespace deepshare::cuda
