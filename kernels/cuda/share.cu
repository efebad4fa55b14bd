// shared_relu_share: 4 tensors read and one written, 8 bytes an element; all arithmetic is unsigned, which
// wraps around. A thread has V elements side by side: positions of a channel, or channels of a pixel where
// inner is 1.
#include "fast_div.h"
#include "launch.h"
#include "share.h"
#include "traits.cuh"

namespace deepshare::cuda {
namespace {

struct Share {
  ShareArgs of;
  int64_t vectors;
  int64_t run_bytes;  // of packed gates
  FastDiv inner, channels;
};

// v / 2^shift as this party rounds it.
__device__ inline int64_t truncate(uint64_t v, int64_t shift, bool negate) {
  const auto signed_v = static_cast<int64_t>(negate ? uint64_t(0) - v : v) >> shift;
  return negate ? static_cast<int64_t>(uint64_t(0) - static_cast<uint64_t>(signed_v)) : signed_v;
}

// What element (n, c, i) multiplies its own values with.
struct Factors {
  uint64_t slope, bit;
};

__device__ inline Factors factors_of(const Share& a, int64_t n, int64_t c, int64_t i, uint64_t flip) {
  const Geometry& g = a.of.geometry;
  const int64_t p = __ldg(a.of.pi + c);
  const int64_t run = g.inner == 1 ? n : n * g.prototypes + p;
  const int64_t at = g.inner == 1 ? p : i;
  const uint64_t bit = __ldg(a.of.gates + run * a.run_bytes + (at >> 3)) >> (at & 7) & 1u;
  if (a.of.scale != nullptr)
    flip = static_cast<uint64_t>(__ldg(a.of.scale + c)) *
           static_cast<uint64_t>(__ldg(a.of.flip + (n * g.source_channels + p) * g.inner + i));
  const auto alpha = static_cast<uint64_t>(__ldg(a.of.alpha + c));
  const auto beta = static_cast<uint64_t>(__ldg(a.of.beta + c));
  return {beta + flip + bit * (alpha - 2 * flip), bit};
}

// T is int64_t.
template <class T, int V>
__global__ __launch_bounds__(kThreads, kMinBlocks) void share(const Share a) {
  const int64_t vector = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= a.vectors) return;
  const Pack<T, V> opened = load<V>(a.of.opened + vector * V);
  const Pack<T, V> offset = load<V>(a.of.offset + vector * V);
  const Pack<T, V> toggle = load<V>(a.of.toggle + vector * V);
  Pack<T, V> flip = {};
  if (a.of.scale == nullptr) flip = load<V>(a.of.flip + vector * V);
  const int64_t row = a.inner.quotient(vector * V);
  int64_t n = a.channels.quotient(row);
  int64_t c = row - n * a.of.geometry.channels;
  int64_t i = vector * V - row * a.of.geometry.inner;
  Pack<T, V> y;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const Factors factors = factors_of(a, n, c, i, static_cast<uint64_t>(flip.lane[k]));
    const uint64_t v = static_cast<uint64_t>(opened.lane[k]) * factors.slope +
                       static_cast<uint64_t>(offset.lane[k]) +
                       factors.bit * static_cast<uint64_t>(toggle.lane[k]);
    y.lane[k] = truncate(v, a.of.shift, a.of.party != 0);
    if (++i < a.of.geometry.inner) continue;  // the next element may be another channel's
    i = 0;
    if (++c < a.of.geometry.channels) continue;
    c = 0;
    ++n;
  }
  store<V>(a.of.y + vector * V, y);
}

template <int V>
const char* launch(const ShareArgs& args, cudaStream_t stream) {
  const Geometry& g = args.geometry;
  const int64_t gates = g.inner == 1 ? g.prototypes : g.inner;  // of a run
  const Share a{args, g.outer * g.channels * g.inner / V, ceil_div(gates, 8), FastDiv(g.inner),
                FastDiv(g.channels)};
  return run(share<int64_t, V>, {ceil_div(a.vectors, kThreads), kThreads}, stream, a);
}

}  // namespace

const char* shared_relu_share(const ShareArgs& args, void* stream) {
  const Geometry& g = args.geometry;
  const int64_t elements = g.outer * g.channels * g.inner;
  if (elements == 0) return nullptr;
  auto* on = static_cast<cudaStream_t>(stream);
  const void* flip = args.scale == nullptr ? args.flip : nullptr;
  const bool wide = elements % 2 == 0 && aligned_16(args.opened, args.offset, args.toggle, flip, args.y);
  return wide ? launch<2>(args, on) : launch<1>(args, on);
}

}  // namespace deepshare::cuda
