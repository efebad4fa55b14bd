// The tensors of a call as the kernels see them, and how z and the gates of V neighbours are read: first all
// loads of a thread, later the values, so that the loads of several vectors are in flight together.
#pragma once

#include "traits.cuh"

namespace deepshare::cuda {

// Where gates come from. kHard and kSoft: values of a source, or of z; kBits: packed gates; kEmit: as kHard
// of z, whose gates are also written, packed.
enum class Gate { kHard, kSoft, kBits, kEmit };

template <class T>
struct Operands {
  const T* x;
  const T* residual;         // nullptr: z is x
  const T* source;           // x where z gives its own gates
  const T* source_residual;  // residual where z gives its own gates, else nullptr
  const uint8_t* gates;
  const int32_t* pi;
  const Wide<T>* alpha;
  const Wide<T>* beta;
  const int32_t* soft_channels;
  const Wide<T>* gamma;
  Geometry geometry;
  int64_t run_bytes;  // of packed gates: a run of `inner`, or of P where inner is 1
};

template <class T, class Args>
Operands<T> operands_of(const Args& a) {
  const Geometry& g = a.geometry;
  const auto* x = static_cast<const T*>(a.x);
  const auto* residual = static_cast<const T*>(a.residual);
  const bool own = a.source == nullptr;
  return {x,
          residual,
          own ? x : static_cast<const T*>(a.source),
          own ? residual : nullptr,
          a.gates,
          a.pi,
          static_cast<const Wide<T>*>(a.alpha),
          static_cast<const Wide<T>*>(a.beta),
          a.soft_channels,
          static_cast<const Wide<T>*>(a.gamma),
          g,
          ((g.inner == 1 ? g.prototypes : g.inner) + 7) / 8};
}

// V elements of a sum, as loaded.
template <class T, int V>
struct Terms {
  Pack<T, V> value, residual;
};

template <int V, class T>
__device__ inline Terms<T, V> load_terms(const T* x, const T* residual, int64_t at, bool valid) {
  Terms<T, V> terms;
  terms.value = load_if<V>(valid, x + at);
  terms.residual = load_if<V>(valid && residual != nullptr, residual + at);
  return terms;
}

// z: rounded to T, as if the sum had been stored.
template <class T, int V>
__device__ inline Pack<T, V> sum_of(const Terms<T, V>& terms, bool has_residual) {
  return has_residual ? add_all(terms.value, terms.residual) : terms.value;
}

template <int V, class T>
__device__ inline Pack<T, V> load_sum(const T* x, const T* residual, int64_t at) {
  return sum_of(load_terms<V>(x, residual, at, true), residual != nullptr);
}

// What decides V gates, as loaded.
template <class T, int V, Gate kGate>
struct Leader {
  Terms<T, V> terms;
  bool is_sum;

  // Elements at + [0, V) of the source's memory, 16-byte aligned if V > 1.
  __device__ void read(const Operands<T>& o, int64_t at, bool valid) {
    terms = load_terms<V>(o.source, o.source_residual, at, valid);
    is_sum = o.source_residual != nullptr;
  }
  // Elements at + offset[k], anywhere. Added at once where z is a sum: V more registers would cost occupancy.
  __device__ void gather(const Operands<T>& o, int64_t at, const uint32_t (&offset)[V], bool valid) {
#pragma unroll
    for (int k = 0; k < V; ++k) terms.value.lane[k] = load_if<1>(valid, o.source + at + offset[k]).lane[0];
    is_sum = false;
    if (o.source_residual == nullptr) return;
    Pack<T, V> residual;
#pragma unroll
    for (int k = 0; k < V; ++k)
      residual.lane[k] = load_if<1>(valid, o.source_residual + at + offset[k]).lane[0];
    terms.value = add_all(terms.value, residual);
  }
  __device__ Pack<T, V> values() const { return sum_of(terms, is_sum); }
};

template <class T, int V>
struct Leader<T, V, Gate::kBits> {
  unsigned bits = 0;

  // Bits bit + [0, V) of the packed gates from byte `at` on; all in one byte.
  __device__ void read_bits(const Operands<T>& o, int64_t at, int64_t bit, bool valid) {
    bits = load_byte(valid, o.gates + at + (bit >> 3)) >> (bit & 7);
  }
  __device__ void gather(const Operands<T>& o, int64_t at, const uint32_t (&offset)[V], bool valid) {
    unsigned bytes[V];
#pragma unroll
    for (int k = 0; k < V; ++k) bytes[k] = load_byte(valid, o.gates + at + (offset[k] >> 3));
    bits = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) bits |= (bytes[k] >> (offset[k] & 7) & 1u) << k;
  }
};

// Whether each of V hard gates is open, bit by bit.
template <class T, int V>
__device__ inline unsigned open_gates(const Leader<T, V, Gate::kBits>& leader) {
  return leader.bits;
}
template <class T, int V, Gate kGate>
__device__ inline unsigned open_gates(const Leader<T, V, kGate>& leader) {
  const Pack<T, V> values = leader.values();
  unsigned open = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) open |= (widen(values.lane[k]) >= Wide<T>(0) ? 1u : 0u) << k;
  return open;
}

// The packed byte of z's own gates for the run's elements at + [0, min(8, left)); z holds the first V.
template <int V, class T>
__device__ inline uint8_t own_byte(const Operands<T>& o, Pack<T, V> z, int64_t at, int64_t left) {
  unsigned byte = 0;
#pragma unroll
  for (int first = 0; first < 8; first += V) {
    if (first >= left) break;
    if (first > 0) z = load_sum<V>(o.x, o.residual, at + first);
#pragma unroll
    for (int k = 0; k < V; ++k)
      byte |= (first + k < left && widen(z.lane[k]) >= Wide<T>(0) ? 1u : 0u) << (first + k);
  }
  return static_cast<uint8_t>(byte);
}

}  // namespace deepshare::cuda
