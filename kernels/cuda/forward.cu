// Forward: every element of x read once, y written once; one thread per vector of V elements, grid-stride.
#include "launch.h"
#include "traits.cuh"

namespace deepshare::cuda {
namespace {

// x, y: [outer * C, inner]; source: [outer * source_channels, inner]. inner % V == 0, so a vector stays in
// its row.
template <class T, int V, bool kSoft>
__global__ __launch_bounds__(kThreads, kMinBlocks) void forward_channels_first(
    const T* __restrict__ x, const T* __restrict__ source, const int32_t* __restrict__ pi,
    const Wide<T>* __restrict__ alpha, const Wide<T>* __restrict__ beta,
    const int32_t* __restrict__ soft_channels, const Wide<T>* __restrict__ gamma, T* __restrict__ y,
    int64_t vectors, int64_t channels, int64_t inner_vectors, int64_t source_channels) {
  using W = Wide<T>;
  const int soft = kSoft ? *soft_channels : 0;
  const W sharpness = kSoft ? *gamma : W(1);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += step) {
    const int64_t row = i / inner_vectors;
    const int64_t n = row / channels;
    const int64_t c = row - n * channels;
    const int64_t from = (n * source_channels + pi[c] - row) * inner_vectors + i;
    const Pack<T, V> xs = load<V>(x + i * V);
    const Pack<T, V> ss = load<V>(source + from * V);
    const W a = alpha[c];
    const W b = beta[c];
    Pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W gate = gate_of<kSoft>(widen(ss.lane[k]), c < soft, sharpness);
      out.lane[k] = narrow<T>(gated(widen(xs.lane[k]), a, gate, b));
    }
    store<V>(y + i * V, out);
  }
}

// x, y: [rows, C]; source: [rows, source_channels]. C % V == 0: a vector is V channels of one row; gates are
// gathered in it.
template <class T, int V, bool kSoft>
__global__ __launch_bounds__(kThreads, kMinBlocks) void forward_channels_last(
    const T* __restrict__ x, const T* __restrict__ source, const int32_t* __restrict__ pi,
    const Wide<T>* __restrict__ alpha, const Wide<T>* __restrict__ beta,
    const int32_t* __restrict__ soft_channels, const Wide<T>* __restrict__ gamma, T* __restrict__ y,
    int64_t vectors, int64_t channel_vectors, int64_t source_channels) {
  using W = Wide<T>;
  const int soft = kSoft ? *soft_channels : 0;
  const W sharpness = kSoft ? *gamma : W(1);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += step) {
    const int64_t row = i / channel_vectors;
    const int64_t c = (i - row * channel_vectors) * V;
    const T* __restrict__ gates = source + row * source_channels;
    const Pack<T, V> xs = load<V>(x + i * V);
    const Pack<int32_t, V> ps = load<V>(pi + c);
    const Pack<W, V> as = load<V>(alpha + c);
    const Pack<W, V> bs = load<V>(beta + c);
    Pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W gate = gate_of<kSoft>(widen(gates[ps.lane[k]]), c + k < soft, sharpness);
      out.lane[k] = narrow<T>(gated(widen(xs.lane[k]), as.lane[k], gate, bs.lane[k]));
    }
    store<V>(y + i * V, out);
  }
}

template <class T, int V, bool kSoft>
const char* launch(const ForwardArgs& a, bool channels_last, cudaStream_t stream) {
  using W = Wide<T>;
  const Geometry& g = a.geometry;
  const int64_t vectors = g.outer * g.channels * g.inner / V;
  const auto grid = static_cast<unsigned>(std::min(ceil_div(vectors, kThreads), kMaxGridX));
  const auto* x = static_cast<const T*>(a.x);
  const auto* source = a.source ? static_cast<const T*>(a.source) : x;
  const auto* alpha = static_cast<const W*>(a.alpha);
  const auto* beta = static_cast<const W*>(a.beta);
  const auto* gamma = static_cast<const W*>(a.gamma);
  auto* y = static_cast<T*>(a.y);
  if (channels_last) {
    forward_channels_last<T, V, kSoft><<<grid, kThreads, 0, stream>>>(
        x, source, a.pi, alpha, beta, a.soft_channels, gamma, y, vectors, g.channels / V, g.source_channels);
  } else {
    forward_channels_first<T, V, kSoft>
        <<<grid, kThreads, 0, stream>>>(x, source, a.pi, alpha, beta, a.soft_channels, gamma, y, vectors,
                                        g.channels, g.inner / V, g.source_channels);
  }
  return launch_status();
}

}  // namespace

const char* shared_relu_forward(const ForwardArgs& args, void* stream) {
  const Geometry& g = args.geometry;
  if (g.outer * g.channels * g.inner == 0) return nullptr;
  const bool last = g.inner == 1;
  const bool soft = args.soft_channels != nullptr;
  auto* on = static_cast<cudaStream_t>(stream);
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    const bool wide = last ? g.channels % V == 0 && aligned_16(args.x, args.y, args.pi, args.alpha, args.beta)
                           : g.inner % V == 0 && aligned_16(args.x, args.y, args.source);
    if (wide) return soft ? launch<T, V, true>(args, last, on) : launch<T, V, false>(args, last, on);
    return soft ? launch<T, 1, true>(args, last, on) : launch<T, 1, false>(args, last, on);
  });
}

}  // namespace deepshare::cuda
