// y = z * (alpha * gate + beta) while some channels have the soft gate.
#pragma once

#include "gates.h"
#include "soft_tile.h"

namespace deepshare::cpu {
namespace {

template <class A>
void scale_by_gate(const A* z, const A* gate, A alpha, A beta, int64_t count, A* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) y[i] = z[i] * (alpha * gate[i] + beta);
}

// Tiles: StoredRows or TransposedRows.
template <class T, class Tiles>
void soft_forward(const ForwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  using A = Accum<T>;
  const WideInput<T> x{static_cast<const T*>(args.x), static_cast<const T*>(args.residual)};
  const T* const source = static_cast<const T*>(args.source);  // nullptr: z itself
  const Spans spans = Tiles::spans(args.geometry, channels);
  const ByPrototype<A> sorted(channels);
  for_ranges(parallel_for, spans.count, spans.piece * channels.count, [&](int64_t begin, int64_t end) {
    typename Tiles::Input z(x, channels.count, channels.count, spans);
    typename Tiles::Input leader(source == nullptr ? x : WideInput<T>{source, nullptr}, channels.source_count,
                                 channels.prototypes, spans);
    typename Tiles::Output y(static_cast<T*>(args.y), channels.count, spans);
    GateRow<A> gates(spans.piece, channels.gamma);
    for (int64_t span = begin; span < end; ++span) {
      const int64_t outer = spans.outer_of(span), first = spans.first_of(span),
                    count = spans.length_at(first);
      z.move_to(outer, first, count);
      if (source != nullptr) leader.move_to(outer, first, count);
      y.move_to(outer, first, count);
      gates.forget();
      for (int64_t k = 0; k < channels.count; ++k) {
        const int64_t c = sorted.channel[k], p = channels.prototype[c];
        if (!gates.holds(p, c < channels.soft))
          gates.compute(p, c < channels.soft, (source == nullptr ? z : leader).row(p), count, false);
        scale_by_gate(z.row(c), gates.gate(), channels.alpha[c], channels.beta[c], count, y.row(c));
        y.keep(c);
      }
      y.end();
    }
  });
}

}  // namespace
}  // namespace deepshare::cpu
