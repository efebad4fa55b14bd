// y = x * (alpha * gate + beta), in four loop orders: rows (NCHW) or pixels (NHWC and very short rows), hard
// or soft gates.
#pragma once

#include "gates.h"

namespace deepshare::cpu {
namespace {

template <class A>
void scale_by_sign(const A* x, const A* s, A on, A off, int64_t count, A* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * (s[i] >= A(0) ? on : off);
}

template <class A>
void scale_by_gate(const A* x, const A* gate, A alpha, A beta, int64_t count, A* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * (alpha * gate[i] + beta);
}

template <class A>
void scale_by_signs(const A* x, const A* s, const int32_t* prototype, const A* on, const A* off,
                    int64_t count, A* __restrict__ y) {
  for (int64_t c = 0; c < count; ++c) {
    const A at_one = on[c], at_zero = off[c];  // loaded before the choice: no control flow, so it vectorises
    y[c] = x[c] * (s[prototype[c]] >= A(0) ? at_one : at_zero);
  }
}

template <class T>
struct Forward {
  using A = Accum<T>;

  const T* x;
  const T* source;
  T* y;
  Geometry geometry;
  Channels<A> channels;
  ParallelFor parallel_for;

  Forward(const ForwardArgs& args, ParallelFor parallel)
      : x(static_cast<const T*>(args.x)),
        source(static_cast<const T*>(args.source != nullptr ? args.source : args.x)),
        y(static_cast<T*>(args.y)),
        geometry(args.geometry),
        channels(args, args.geometry.inner < kShortRow ? args.geometry.inner : 1),
        parallel_for(parallel) {}

  void run() const {
    const bool rows = geometry.inner >= kShortRow;
    const bool soft = channels.soft > 0;
    if (rows) return soft ? soft_rows() : hard_rows();
    return soft ? soft_pixels() : hard_pixels();
  }

  void hard_rows() const {
    const Spans spans(geometry, kPiece);
    const int64_t items = geometry.outer * channels.count * spans.per_row;
    for_ranges(parallel_for, items, spans.piece, [&](int64_t begin, int64_t end) {
      Buffer<A> wide_x(kPiece), wide_s(kPiece), wide_y(kPiece);
      int64_t piece = begin % spans.per_row, c = begin / spans.per_row % channels.count;
      int64_t outer = begin / spans.per_row / channels.count;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = piece * spans.piece, count = spans.length_at(first);
        const int64_t at = (outer * channels.count + c) * spans.inner + first;
        const int64_t p = channels.prototype[c];
        const A* values = load(x + at, count, wide_x.get());
        const T* gate_row = source + (outer * channels.source_count + p) * spans.inner + first;
        const A* signs = gate_row == x + at ? values : load(gate_row, count, wide_s.get());
        A* out = target(y + at, wide_y.get());
        scale_by_sign(values, signs, channels.on[c], channels.off[c], count, out);
        store(out, count, y + at);
        if (++piece < spans.per_row) continue;
        piece = 0;
        if (++c < channels.count) continue;
        c = 0;
        ++outer;
      }
    });
  }

  void soft_rows() const {
    const Spans spans(geometry, kSoftPiece);
    const ByPrototype<A> sorted(channels);
    for_ranges(parallel_for, spans.count, spans.piece * channels.count, [&](int64_t begin, int64_t end) {
      Buffer<A> wide_x(kSoftPiece), wide_s(kSoftPiece), wide_y(kSoftPiece);
      GateRow<A> gates(kSoftPiece, channels.gamma);
      for (int64_t span = begin; span < end; ++span) {
        const int64_t outer = spans.outer_of(span), first = spans.first_of(span),
                      count = spans.length_at(first);
        gates.forget();
        for (int64_t k = 0; k < channels.count; ++k) {
          const int64_t c = sorted.channel[k], p = channels.prototype[c];
          if (!gates.holds(p, c < channels.soft)) {
            const T* gate_row = source + (outer * channels.source_count + p) * spans.inner + first;
            gates.compute(p, c < channels.soft, load(gate_row, count, wide_s.get()), count, false);
          }
          const int64_t at = (outer * channels.count + c) * spans.inner + first;
          A* out = target(y + at, wide_y.get());
          scale_by_gate(load(x + at, count, wide_x.get()), gates.gate(), channels.alpha[c], channels.beta[c],
                        count, out);
          store(out, count, y + at);
        }
      }
    });
  }

  void hard_pixels() const {
    const int64_t width = channels.count;
    for_ranges(parallel_for, geometry.outer, width, [&](int64_t begin, int64_t end) {
      Buffer<A> wide_x(width), wide_s(channels.prototypes), wide_y(width);
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const T* row = x + pixel * width;
        const T* gate_row = source + pixel * channels.source_count;
        const A* values = load(row, width, wide_x.get());
        const A* signs = gate_row == row ? values : load(gate_row, channels.prototypes, wide_s.get());
        A* out = target(y + pixel * width, wide_y.get());
        scale_by_signs(values, signs, channels.prototype.get(), channels.on.get(), channels.off.get(), width,
                       out);
        store(out, width, y + pixel * width);
      }
    });
  }

  void soft_pixels() const {
    const int64_t width = channels.count;
    for_ranges(parallel_for, geometry.outer, width, [&](int64_t begin, int64_t end) {
      Buffer<A> wide_x(width), wide_s(channels.prototypes), wide_y(width), gate(channels.prototypes);
      const int32_t* prototype = channels.prototype.get();
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const T* row = x + pixel * width;
        const T* gate_row = source + pixel * channels.source_count;
        const A* values = load(row, width, wide_x.get());
        const A* signs = gate_row == row ? values : load(gate_row, channels.prototypes, wide_s.get());
        A* __restrict__ out = target(y + pixel * width, wide_y.get());
        soft_gates(signs, channels.gamma, channels.soft_prototypes, gate.get());
        for (int64_t c = 0; c < width; ++c) {
          const int64_t p = prototype[c];
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
