// The gradients while some channels have the soft gate. Those that flow through gates,
//   ds[p] = sum over soft c with pi[c] = p of g * z * alpha[c] * gamma * phi(gamma * s[p]),
// are added to dx where z is its own source, and rounded once.
#pragma once

#include "gates.h"
#include "lane_sums.h"
#include "soft_tile.h"

namespace deepshare::cpu {
namespace {

// out[i] = g * (alpha * gate + beta), or with kAdd out[i] += that, and the row's part of the sums.
template <bool kAdd, class A>
void soft_gradient_row(const A* g, const A* z, const A* gate, int64_t count, A alpha, A beta, A* out,
                       LaneSums<A>& sums) {
  const Lanes<A> scale = Lanes<A>::all(alpha), shift = Lanes<A>::all(beta);
  GroupSums<A> running = sums.begin();
  each_group(count, [&](int64_t i, auto extent) {
    const Lanes<A> open = load(gate + i, extent), grad = load(g + i, extent);
    const Lanes<A> through = grad * (scale * open + shift);
    store(kAdd ? load(out + i, extent) + through : through, out + i, extent);
    running.add(grad * load(z + i, extent), open);
  });
  sums.end(running);
}

// One thread's buffers, and its work on one tile: all channels, prototype by prototype. Tiles: StoredRows or
// TransposedRows.
template <class T, class Tiles>
struct SoftBackward {
  using A = Accum<T>;
  using Input = typename Tiles::Input;
  using Output = typename Tiles::Output;

  const Channels<A>& channels;
  const Spans& spans;
  const ByPrototype<A>& sorted;
  const bool own;  // z is its own source
  Buffer<LaneSums<A>> sums;
  Input grad, z, leader;
  Output dx, dsource;
  Buffer<A>
      to_source;  // [P, piece]: the gradient through gates, and where z is its own source the rest of dx
  GateRow<A> gates;

  SoftBackward(const BackwardArgs& args, const Channels<A>& channels_, const Spans& spans_,
               const ByPrototype<A>& sorted_)
      : channels(channels_),
        spans(spans_),
        sorted(sorted_),
        own(args.source == nullptr),
        sums(channels.count),
        grad({static_cast<const T*>(args.grad), nullptr}, channels.count, channels.count, spans),
        z({static_cast<const T*>(args.x), static_cast<const T*>(args.residual)}, channels.count,
          channels.count, spans),
        leader({static_cast<const T*>(args.source), nullptr}, channels.source_count, channels.prototypes,
               spans),
        dx(static_cast<T*>(args.dx), channels.count, spans),
        dsource(static_cast<T*>(args.dsource), channels.source_count, spans),
        to_source(channels.prototypes * spans.piece),
        gates(spans.piece, channels.gamma) {}

  A* source_row(int64_t p) const { return to_source.get() + p * spans.piece; }

  void tile(int64_t span) {
    const int64_t outer = spans.outer_of(span), first = spans.first_of(span), count = spans.length_at(first);
    grad.move_to(outer, first, count);
    z.move_to(outer, first, count);
    dx.move_to(outer, first, count);
    if (!own) {
      leader.move_to(outer, first, count);
      dsource.move_to(outer, first, count);
    }
    gates.forget();
    for (int64_t i = 0; i < channels.prototypes * spans.piece; ++i) to_source[i] = 0;
    for (int64_t k = 0; k < channels.count; ++k) channel(sorted.channel[k], count);
    if (own) {
      keep_source(dx, channels.prototypes, count);
    } else {
      keep_source(dsource, channels.source_count, count);
      dsource.end();
    }
    dx.end();
  }

  void channel(int64_t c, int64_t count) {
    const int64_t p = channels.prototype[c];
    if (!gates.holds(p, c < channels.soft))
      gates.compute(p, c < channels.soft, (own ? z : leader).row(p), count, true);
    const A *g = grad.row(c), *values = z.row(c);
    const A alpha = channels.alpha[c], beta = channels.beta[c];
    if (own && c < channels.prototypes) {
      soft_gradient_row<true>(g, values, gates.gate(), count, alpha, beta, source_row(c), sums[c]);
    } else {
      soft_gradient_row<false>(g, values, gates.gate(), count, alpha, beta, dx.row(c), sums[c]);
      dx.keep(c);
    }
    if (c >= channels.soft) return;
    A* __restrict__ into = source_row(p);
    const A* slope = gates.slope();
    for (int64_t i = 0; i < count; ++i) into[i] += g[i] * values[i] * (alpha * slope[i]);
  }

  // The gradient through gates to rows [0, written) of `out`: 0 from row P on.
  void keep_source(const Output& out, int64_t written, int64_t count) const {
    const auto bytes = sizeof(A) * static_cast<size_t>(count);
    for (int64_t p = 0; p < written; ++p) {
      if (p < channels.prototypes) {
        std::memcpy(out.row(p), source_row(p), bytes);
      } else {
        std::memset(out.row(p), 0, bytes);
      }
      out.keep(p);
    }
  }
};

template <class T, class Tiles>
void soft_backward(const BackwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  using A = Accum<T>;
  const Spans spans = Tiles::spans(args.geometry, channels);
  const ByPrototype<A> sorted(channels);
  const Partials<A> partials(spans.blocks, channels.count);
  for_ranges(parallel_for, spans.blocks, spans.piece * spans.per_block * channels.count,
             [&](int64_t begin, int64_t end) {
               SoftBackward<T, Tiles> work(args, channels, spans, sorted);
               for (int64_t block = begin; block < end; ++block) {
                 for (int64_t c = 0; c < channels.count; ++c) work.sums[c] = LaneSums<A>();
                 for (int64_t span = spans.first_in(block); span < spans.last_in(block); ++span)
                   work.tile(span);
                 partials.keep(block, work.sums.get());
               }
             });
  partials.reduce(channels.repeat, static_cast<A*>(args.dalpha), static_cast<A*>(args.dbeta), parallel_for);
}

}  // namespace
}  // namespace deepshare::cpu
