// The gradients while some channels have the soft gate. Those that flow through gates,
//   ds[p] = sum over soft c with pi[c] = p of g * z * alpha[c] * gamma * phi(gamma * s[p]),
// are added to dx where z is its own source, and rounded once.
#pragma once

#include "gates.h"
#include "lane_sums.h"
#include "operands.h"

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

// What rows and pixels read and write.
template <class T>
struct SoftBackward {
  using A = Accum<T>;

  const T* grad;
  WideInput<T> z;
  const T* source;  // nullptr: z itself
  T* dx;
  T* dsource;
  bool own;
  const Geometry& geometry;
  const Channels<A>& channels;

  SoftBackward(const BackwardArgs& args, const Channels<A>& channels_)
      : grad(static_cast<const T*>(args.grad)),
        z{static_cast<const T*>(args.x), static_cast<const T*>(args.residual)},
        source(static_cast<const T*>(args.source)),
        dx(static_cast<T*>(args.dx)),
        dsource(static_cast<T*>(args.dsource)),
        own(args.source == nullptr),
        geometry(args.geometry),
        channels(channels_) {}

  static void put(const A* values, int64_t count, T* row) {
    if constexpr (sizeof(A) == sizeof(T)) {
      std::memcpy(row, values, sizeof(T) * static_cast<size_t>(count));
    } else {
      store(values, count, row);
    }
  }
};

// One thread's buffers for rows, and its work on one span: all channels, prototype by prototype.
template <class T>
struct SoftRows {
  using A = Accum<T>;

  const SoftBackward<T>& call;
  const Spans& spans;
  const ByPrototype<A>& sorted;
  Buffer<LaneSums<A>> sums;
  Buffer<A> wide_g, wide_z, wide_s, wide_out;
  Buffer<A>
      to_source;  // [P, piece]: the gradient through gates, and where z is its own source the rest of dx
  GateRow<A> gates;

  SoftRows(const SoftBackward<T>& call_, const Spans& spans_, const ByPrototype<A>& sorted_)
      : call(call_),
        spans(spans_),
        sorted(sorted_),
        sums(call.channels.count),
        wide_g(kSoftPiece),
        wide_z(kSoftPiece),
        wide_s(kSoftPiece),
        wide_out(kSoftPiece),
        to_source(call.channels.prototypes * kSoftPiece),
        gates(kSoftPiece, call.channels.gamma) {}

  A* source_row(int64_t p) const { return to_source.get() + p * kSoftPiece; }

  void span(int64_t index) {
    const int64_t outer = spans.outer_of(index), first = spans.first_of(index),
                  count = spans.length_at(first);
    gates.forget();
    for (int64_t p = 0; p < call.channels.prototypes; ++p) {
      for (int64_t i = 0; i < count; ++i) source_row(p)[i] = 0;
    }
    for (int64_t k = 0; k < call.channels.count; ++k) channel(sorted.channel[k], outer, first, count);
    write_source(outer, first, count);
  }

  void channel(int64_t c, int64_t outer, int64_t first, int64_t count) {
    const Channels<A>& channels = call.channels;
    const int64_t p = channels.prototype[c];
    if (!gates.holds(p, c < channels.soft)) {
      const WideInput<T> leader = call.own ? call.z : WideInput<T>{call.source, nullptr};
      const int64_t gate_row = (outer * channels.source_count + p) * spans.inner + first;
      gates.compute(p, c < channels.soft, leader.row(gate_row, count, wide_s.get()), count, true);
    }
    const int64_t at = (outer * channels.count + c) * spans.inner + first;
    const A* g = load(call.grad + at, count, wide_g.get());
    const A* z = call.z.row(at, count, wide_z.get());
    const A alpha = channels.alpha[c], beta = channels.beta[c];
    if (call.own && c < channels.prototypes) {
      soft_gradient_row<true>(g, z, gates.gate(), count, alpha, beta, source_row(c), sums[c]);
    } else {
      A* out = target(call.dx + at, wide_out.get());
      soft_gradient_row<false>(g, z, gates.gate(), count, alpha, beta, out, sums[c]);
      store(out, count, call.dx + at);
    }
    if (c >= channels.soft) return;
    A* __restrict__ into = source_row(p);
    const A* slope = gates.slope();
    for (int64_t i = 0; i < count; ++i) into[i] += g[i] * z[i] * (alpha * slope[i]);
  }

  void write_source(int64_t outer, int64_t first, int64_t count) const {
    T* const out = call.own ? call.dx : call.dsource;
    const int64_t width = call.own ? call.channels.count : call.channels.source_count;
    const int64_t written = call.own ? call.channels.prototypes : width;
    for (int64_t p = 0; p < written; ++p) {
      T* row = out + (outer * width + p) * spans.inner + first;
      if (p < call.channels.prototypes) {
        call.put(source_row(p), count, row);
      } else {
        std::memset(row, 0, sizeof(T) * static_cast<size_t>(count));
      }
    }
  }
};

// One thread's buffers for pixels, and its work on one of them.
template <class T>
struct SoftPixels {
  using A = Accum<T>;

  const SoftBackward<T>& call;
  Buffer<A> wide_g, wide_z, wide_s, out, gate, slope, to_source;

  explicit SoftPixels(const SoftBackward<T>& call_)
      : call(call_),
        wide_g(call.channels.count),
        wide_z(call.channels.count),
        wide_s(call.channels.prototypes),
        out(call.channels.count),
        gate(call.channels.prototypes),
        slope(call.channels.prototypes),
        to_source(call.channels.prototypes) {}

  void pixel(int64_t index, A* gated, A* total) const {
    const Channels<A>& channels = call.channels;
    const int64_t width = channels.count;
    const A* g = load(call.grad + index * width, width, wide_g.get());
    const A* z = call.z.row(index * width, width, wide_z.get());
    const A* s =
        call.own ? z : load(call.source + index * channels.source_count, channels.prototypes, wide_s.get());
    for (int64_t p = 0; p < channels.prototypes; ++p) to_source[p] = 0;
    soft_gates(s, channels.gamma, channels.soft_prototypes, gate.get());
    soft_slopes(s, channels.gamma, channels.soft_prototypes, slope.get());
    for (int64_t c = 0; c < width; ++c) {
      const int64_t p = channels.prototype[c];
      const A product = g[c] * z[c];
      const A open = c < channels.soft ? gate[p] : (s[p] >= A(0) ? A(1) : A(0));
      out[c] = g[c] * (channels.alpha[c] * open + channels.beta[c]);
      total[c] += product;
      gated[c] += product * open;
      if (c < channels.soft) to_source[p] += product * (channels.alpha[c] * slope[p]);
    }
    write(index);
  }

  void write(int64_t index) const {
    const Channels<A>& channels = call.channels;
    if (call.own) {
      for (int64_t p = 0; p < channels.prototypes; ++p) out[p] += to_source[p];
    } else {
      T* row = call.dsource + index * channels.source_count;
      call.put(to_source.get(), channels.prototypes, row);
      const int64_t rest = channels.source_count - channels.prototypes;
      std::memset(row + channels.prototypes, 0, sizeof(T) * static_cast<size_t>(rest));
    }
    call.put(out.get(), channels.count, call.dx + index * channels.count);
  }
};

template <class T>
void soft_backward_rows(const BackwardArgs& args, const Channels<Accum<T>>& channels,
                        ParallelFor parallel_for) {
  using A = Accum<T>;
  const SoftBackward<T> call(args, channels);
  const Spans spans(args.geometry, kSoftPiece);
  const ByPrototype<A> sorted(channels);
  const Partials<A> partials(spans.blocks, channels.count);
  for_ranges(parallel_for, spans.blocks, spans.piece * spans.per_block * channels.count,
             [&](int64_t begin, int64_t end) {
               SoftRows<T> work(call, spans, sorted);
               for (int64_t block = begin; block < end; ++block) {
                 for (int64_t c = 0; c < channels.count; ++c) work.sums[c] = LaneSums<A>();
                 for (int64_t span = spans.first_in(block); span < spans.last_in(block); ++span)
                   work.span(span);
                 partials.keep(block, work.sums.get());
               }
             });
  partials.reduce(1, static_cast<A*>(args.dalpha), static_cast<A*>(args.dbeta), parallel_for);
}

template <class T>
void soft_backward_pixels(const BackwardArgs& args, const Channels<Accum<T>>& channels,
                          ParallelFor parallel_for) {
  using A = Accum<T>;
  const SoftBackward<T> call(args, channels);
  const int64_t pixels = args.geometry.outer, per_block = block_positions(pixels, channels.count);
  const Partials<A> partials(divide_up(pixels, per_block), channels.count);
  for_ranges(parallel_for, divide_up(pixels, per_block), per_block * channels.count,
             [&](int64_t begin, int64_t end) {
               SoftPixels<T> work(call);
               for (int64_t block = begin; block < end; ++block) {
                 partials.reset(block);
                 const int64_t last = smaller(pixels, (block + 1) * per_block);
                 for (int64_t pixel = block * per_block; pixel < last; ++pixel) {
                   work.pixel(pixel, partials.gated(block), partials.total(block));
                 }
               }
             });
  partials.reduce(channels.repeat, static_cast<A*>(args.dalpha), static_cast<A*>(args.dbeta), parallel_for);
}

}  // namespace
}  // namespace deepshare::cpu
