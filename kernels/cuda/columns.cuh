// What a thread of the column walk (columns.h) keeps for its V columns.
#pragma once

#include "columns.h"
#include "operands.cuh"

namespace deepshare::cuda {

template <class W, int V>
struct Column {
  int64_t first;       // of V columns
  uint32_t offset[V];  // of the gates within a source's row: elements, or bits of packed gates
  W alpha[V], beta[V];
  unsigned soft;      // bit k: column k has a soft gate
  bool side_by_side;  // the V gates are one aligned access
};

// Channels first + [0, V) of a pixel, in vectors.
template <class T, int V>
__device__ Column<Wide<T>, V> channels_of(const Operands<T>& o, int64_t first, int soft) {
  Column<Wide<T>, V> column;
  column.first = first;
  column.soft = 0;
  const Pack<int32_t, V> pi = load<V>(o.pi + first);
  const Pack<Wide<T>, V> alpha = load<V>(o.alpha + first);
  const Pack<Wide<T>, V> beta = load<V>(o.beta + first);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    column.offset[k] = static_cast<uint32_t>(pi.lane[k]);
    column.alpha[k] = alpha.lane[k];
    column.beta[k] = beta.lane[k];
    column.soft |= (first + k < soft ? 1u : 0u) << k;
  }
  return column;
}

// Columns first + [0, V) of a sample; a run of gates has `run` offsets.
template <class T, int V>
__device__ Column<Wide<T>, V> positions_of(const Operands<T>& o, int64_t first, int soft, int64_t run) {
  const auto inner = static_cast<uint32_t>(o.geometry.inner);
  Column<Wide<T>, V> column;
  column.first = first;
  column.soft = 0;
  uint32_t c = static_cast<uint32_t>(first) / inner;
  uint32_t i = static_cast<uint32_t>(first) - c * inner;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    column.offset[k] = static_cast<uint32_t>(__ldg(o.pi + c) * run + i);
    column.alpha[k] = __ldg(o.alpha + c);
    column.beta[k] = __ldg(o.beta + c);
    column.soft |= (int64_t(c) < soft ? 1u : 0u) << k;
    if (++i == inner) {
      i = 0;
      c = min(c + 1, static_cast<uint32_t>(o.geometry.channels - 1));
    }
  }
  return column;
}

// `gates_aligned`, `affine_aligned`: whether the source's rows, and pi, alpha and beta, begin on 16 bytes.
template <class T, int V, Gate kGate>
__device__ Column<Wide<T>, V> column_of(const Operands<T>& o, int64_t first, int soft, bool gates_aligned,
                                        bool affine_aligned) {
  const bool pixels = o.geometry.inner == 1;
  const int64_t run = kGate != Gate::kBits ? o.geometry.inner : pixels ? 1 : o.run_bytes * 8;
  auto column =
      pixels && affine_aligned ? channels_of<T, V>(o, first, soft) : positions_of<T, V>(o, first, soft, run);
  column.side_by_side = gates_aligned && column.offset[0] % V == 0;
#pragma unroll
  for (int k = 1; k < V; ++k) column.side_by_side &= column.offset[k] == column.offset[0] + k;
  return column;
}

// Bytes of packed gates of a row (a sample, or a pixel where inner is 1).
template <class T>
__device__ inline int64_t gate_row_bytes(const Operands<T>& o) {
  return o.geometry.inner == 1 ? o.run_bytes : o.geometry.prototypes * o.run_bytes;
}

template <class T, int V, Gate kGate, bool kSideBySide>
__device__ Leader<T, V, kGate> leader_of_columns(const Operands<T>& o, const Column<Wide<T>, V>& column,
                                                 int64_t row, bool valid) {
  Leader<T, V, kGate> leader;
  if constexpr (kGate == Gate::kBits) {
    const int64_t at = row * gate_row_bytes(o);
    if constexpr (kSideBySide) {
      leader.read_bits(o, at, column.offset[0], valid);
    } else {
      leader.gather(o, at, column.offset, valid);
    }
  } else {
    const int64_t at = row * o.geometry.source_channels * o.geometry.inner;
    if constexpr (kSideBySide) {
      leader.read(o, at + column.offset[0], valid);
    } else {
      leader.gather(o, at, column.offset, valid);
    }
  }
  return leader;
}

// Whether a source's rows begin on 16 bytes, so that gates side by side can be one access. Bits always can.
template <class Args>
bool gates_aligned(const Args& a, int64_t vector) {
  const Geometry& g = a.geometry;
  return a.gates != nullptr ||
         ((a.source == nullptr || aligned_16(a.source)) && (g.source_channels * g.inner) % vector == 0);
}

}  // namespace deepshare::cuda
