// y = z * (alpha * gate + beta) while some channels have the soft gate.
#pragma once

#include "gates.h"
#include "operands.h"

namespace deepshare::cpu {
namespace {

template <class A>
void scale_by_gate(const A* z, const A* gate, A alpha, A beta, int64_t count, A* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) y[i] = z[i] * (alpha * gate[i] + beta);
}

template <class T>
struct SoftForward {
  using A = Accum<T>;

  WideInput<T> z;
  const T* source;  // nullptr: z itself
  T* y;
  const Geometry& geometry;
  const Channels<A>& channels;
  ParallelFor parallel_for;

  SoftForward(const ForwardArgs& args, const Channels<A>& channels_, ParallelFor parallel)
      : z{static_cast<const T*>(args.x), static_cast<const T*>(args.residual)},
        source(static_cast<const T*>(args.source)),
        y(static_cast<T*>(args.y)),
        geometry(args.geometry),
        channels(channels_),
        parallel_for(parallel) {}

  void rows() const {
    const Spans spans(geometry, kSoftPiece);
    const ByPrototype<A> sorted(channels);
    const WideInput<T> leader = source == nullptr ? z : WideInput<T>{source, nullptr};
    for_ranges(parallel_for, spans.count, spans.piece * channels.count, [&](int64_t begin, int64_t end) {
      Buffer<A> wide_z(kSoftPiece), wide_s(kSoftPiece), wide_y(kSoftPiece);
      GateRow<A> gates(kSoftPiece, channels.gamma);
      for (int64_t span = begin; span < end; ++span) {
        const int64_t outer = spans.outer_of(span), first = spans.first_of(span),
                      count = spans.length_at(first);
        gates.forget();
        for (int64_t k = 0; k < channels.count; ++k) {
          const int64_t c = sorted.channel[k], p = channels.prototype[c];
          if (!gates.holds(p, c < channels.soft)) {
            const int64_t gate_row = (outer * channels.source_count + p) * spans.inner + first;
            gates.compute(p, c < channels.soft, leader.row(gate_row, count, wide_s.get()), count, false);
          }
          const int64_t at = (outer * channels.count + c) * spans.inner + first;
          A* out = target(y + at, wide_y.get());
          scale_by_gate(z.row(at, count, wide_z.get()), gates.gate(), channels.alpha[c], channels.beta[c],
                        count, out);
          store(out, count, y + at);
        }
      }
    });
  }

  void pixels() const {
    const int64_t width = channels.count;
    for_ranges(parallel_for, geometry.outer, width, [&](int64_t begin, int64_t end) {
      Buffer<A> wide_z(width), wide_s(channels.prototypes), wide_y(width), gate(channels.prototypes);
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const A* values = z.row(pixel * width, width, wide_z.get());
        const A* signs = source == nullptr ? values
                                           : load(source + pixel * channels.source_count, channels.prototypes,
                                                  wide_s.get());
        A* __restrict__ out = target(y + pixel * width, wide_y.get());
        soft_gates(signs, channels.gamma, channels.soft_prototypes, gate.get());
        for (int64_t c = 0; c < width; ++c) {
          const int64_t p = channels.prototype[c];
          const A open = c < channels.soft ? gate[p] : (signs[p] >= A(0) ? A(1) : A(0));
          out[c] = values[c] * (channels.alpha[c] * open + channels.beta[c]);
        }
        store(out, width, y + pixel * width);
      }
    });
  }
};

}  // namespace
}  // namespace deepshare::cpu
