// The gradients of shared_relu, in the loop orders of forward.h:
//   dx[c] = g * (alpha[c] * gate + beta[c]),  dalpha[c] = sum g * x * gate,  dbeta[c] = sum g * x,
//   ds[p] = sum over soft c with pi[c] = p of g * x * alpha[c] * gamma * phi(gamma * s[p])   (added to dx
//   where x is the source)
#pragma once

#include "gates.h"

namespace deepshare::cpu {
namespace {

// A row's sums, in this many interleaved parts: element i goes to part i % kLanes on every instruction set,
// so bits agree.
constexpr int64_t kLanes = 16;

template <class A>
struct LaneSums {
  A gated[kLanes] = {};
  A total[kLanes] = {};

  static A fold(const A* lanes) {
    A sums[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) sums[l] = lanes[l];
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    return sums[0];
  }
};

// The widest vector of this build; kLanes elements are a whole number of them.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
// GCC's and clang's vector type: written out, because their auto-vectorisers leave a loop with two running
// sums scalar.
template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t width = kVectorBytes / static_cast<int64_t>(sizeof(A));
};

// Hard gates, from source values; V is A or a vector of A.
template <class A>
struct BySign {
  A on, off;
  template <class V>
  void operator()(V s, V& gate, V& factor) const {
    const auto open = s >= V{};
    gate = open ? V{} + A(1) : V{};
    factor = open ? V{} + on : V{} + off;
  }
};

// Gates that were computed before, soft or hard.
template <class A>
struct ByGate {
  A alpha, beta;
  template <class V>
  void operator()(V s, V& gate, V& factor) const {
    gate = s;
    factor = alpha * s + beta;
  }
};

template <class V, class A>
V read(const A* from) {
  V values;
  std::memcpy(&values, from, sizeof(V));
  return values;
}

template <class V, class A>
void write(V values, A* to) {
  std::memcpy(to, &values, sizeof(V));
}

// out[i] = g * factor, or with kAdd out[i] += g * factor, and the row's part of the sums. `s` is what `gates`
// reads.
template <bool kAdd, class A, class Gates>
void gradient_row(const A* g, const A* x, const A* s, int64_t count, const Gates& gates, A* out,
                  LaneSums<A>& sums) {
  const auto step = [&](auto type, int64_t i, int64_t lane) {
    using V = decltype(type);
    V gate, factor;
    gates(read<V>(s + i), gate, factor);
    const V grad = read<V>(g + i), product = grad * read<V>(x + i);
    write(kAdd ? read<V>(out + i) + grad * factor : grad * factor, out + i);
    write(read<V>(sums.gated + lane) + product * gate, sums.gated + lane);
    write(read<V>(sums.total + lane) + product, sums.total + lane);
  };
  using Vec = typename Vector<A>::type;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma GCC unroll 8
    for (int64_t lane = 0; lane < kLanes; lane += Vector<A>::width) step(Vec{}, i + lane, lane);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) step(A{}, i, lane);
}

// gradient_row for the channels of one pixel, whose source values were gathered to `s`; the sums are per
// channel.
template <class A>
void gradient_pixel(const A* g, const A* x, const A* s, const Channels<A>& channels, A* out, A* gated,
                    A* total) {
  const auto step = [&](auto type, int64_t c) {
    using V = decltype(type);
    const auto open = read<V>(s + c) >= V{};
    const V grad = read<V>(g + c), product = grad * read<V>(x + c);
    const V on = read<V>(channels.on.get() + c), off = read<V>(channels.off.get() + c);
    write(grad * (open ? on : off), out + c);
    write(read<V>(gated + c) + product * (open ? V{} + A(1) : V{}), gated + c);
    write(read<V>(total + c) + product, total + c);
  };
  int64_t c = 0;
  for (; c + Vector<A>::width <= channels.count; c += Vector<A>::width) step(typename Vector<A>::type{}, c);
  for (; c < channels.count; ++c) step(A{}, c);
}

template <class T>
struct Backward {
  using A = Accum<T>;

  const T* grad;
  const T* x;
  const T* source;
  T* dx;
  T* dsource;
  A* dalpha;
  A* dbeta;
  bool own;  // x is its own source
  Geometry geometry;
  Channels<A> channels;
  ParallelFor parallel_for;

  Backward(const BackwardArgs& args, ParallelFor parallel)
      : grad(static_cast<const T*>(args.grad)),
        x(static_cast<const T*>(args.x)),
        source(static_cast<const T*>(args.source != nullptr ? args.source : args.x)),
        dx(static_cast<T*>(args.dx)),
        dsource(static_cast<T*>(args.dsource)),
        dalpha(static_cast<A*>(args.dalpha)),
        dbeta(static_cast<A*>(args.dbeta)),
        own(args.source == nullptr),
        geometry(args.geometry),
        channels(args, args.geometry.inner < kShortRow ? args.geometry.inner : 1),
        parallel_for(parallel) {}

  void run() const {
    const bool rows = geometry.inner >= kShortRow;
    const bool soft = channels.soft > 0 || dsource != nullptr;  // a dsource is written also at a switch of 0
    if (rows) return soft ? soft_rows() : hard_rows();
    return soft ? soft_pixels() : hard_pixels();
  }

  void hard_rows() const {
    const Spans spans(geometry, kPiece);
    const Partials<A> partials(spans.blocks, channels.count);
    for_ranges(parallel_for, spans.blocks * channels.count, spans.piece * spans.per_block,
               [&](int64_t begin, int64_t end) {
                 Buffer<A> wide_g(kPiece), wide_x(kPiece), wide_s(kPiece), wide_out(kPiece);
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t block = item / channels.count, c = item % channels.count,
                                 p = channels.prototype[c];
                   const int64_t last = smaller(spans.count, (block + 1) * spans.per_block);
                   const BySign<A> gates{channels.on[c], channels.off[c]};
                   LaneSums<A> sums;
                   for (int64_t span = block * spans.per_block; span < last; ++span) {
                     const int64_t outer = spans.outer_of(span), first = spans.first_of(span),
                                   count = spans.length_at(first);
                     const int64_t at = (outer * channels.count + c) * spans.inner + first;
                     const T* gate_row = source + (outer * channels.source_count + p) * spans.inner + first;
                     const A* g = load(grad + at, count, wide_g.get());
                     const A* values = load(x + at, count, wide_x.get());
                     const A* s = gate_row == x + at ? values : load(gate_row, count, wide_s.get());
                     A* out = target(dx + at, wide_out.get());
                     gradient_row<false>(g, values, s, count, gates, out, sums);
                     store(out, count, dx + at);
                   }
                   partials.gated(block)[c] = LaneSums<A>::fold(sums.gated);
                   partials.total(block)[c] = LaneSums<A>::fold(sums.total);
                 }
               });
    partials.reduce(1, dalpha, dbeta, parallel_for);
  }

  void soft_rows() const {
    const Spans spans(geometry, kSoftPiece);
    const ByPrototype<A> sorted(channels);
    const Partials<A> partials(spans.blocks, channels.count);
    for_ranges(parallel_for, spans.blocks, spans.piece * spans.per_block * channels.count,
               [&](int64_t begin, int64_t end) {
                 SoftRows work(*this, spans, sorted);
                 for (int64_t block = begin; block < end; ++block) {
                   work.reset();
                   const int64_t last = smaller(spans.count, (block + 1) * spans.per_block);
                   for (int64_t span = block * spans.per_block; span < last; ++span) work.span(span);
                   for (int64_t c = 0; c < channels.count; ++c) {
                     partials.gated(block)[c] = LaneSums<A>::fold(work.sums[c].gated);
                     partials.total(block)[c] = LaneSums<A>::fold(work.sums[c].total);
                   }
                 }
               });
    partials.reduce(1, dalpha, dbeta, parallel_for);
  }

  // One thread's buffers for soft_rows, and its work on one span: all channels, prototype by prototype.
  struct SoftRows {
    const Backward& call;
    const Spans& spans;
    const ByPrototype<A>& sorted;
    Buffer<LaneSums<A>> sums;
    Buffer<A> wide_g, wide_x, wide_s, wide_out;
    Buffer<A> to_source;  // [P, piece]: the soft gradient, and where x is the source the rest of dx too:
                          // rounded once
    GateRow<A> gates;

    SoftRows(const Backward& call_, const Spans& spans_, const ByPrototype<A>& sorted_)
        : call(call_),
          spans(spans_),
          sorted(sorted_),
          sums(call.channels.count),
          wide_g(kSoftPiece),
          wide_x(kSoftPiece),
          wide_s(kSoftPiece),
          wide_out(kSoftPiece),
          to_source(call.channels.prototypes * kSoftPiece),
          gates(kSoftPiece, call.channels.gamma) {}

    void reset() const {
      for (int64_t c = 0; c < call.channels.count; ++c) sums[c] = LaneSums<A>();
    }

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
        const T* gate_row = call.source + (outer * channels.source_count + p) * spans.inner + first;
        gates.compute(p, c < channels.soft, load(gate_row, count, wide_s.get()), count, true);
      }
      const int64_t at = (outer * channels.count + c) * spans.inner + first;
      const A* g = load(call.grad + at, count, wide_g.get());
      const A* x = load(call.x + at, count, wide_x.get());
      const ByGate<A> by_gate{channels.alpha[c], channels.beta[c]};
      if (call.own && c < channels.prototypes) {
        gradient_row<true>(g, x, gates.gate(), count, by_gate, source_row(c), sums[c]);
      } else {
        A* out = target(call.dx + at, wide_out.get());
        gradient_row<false>(g, x, gates.gate(), count, by_gate, out, sums[c]);
        store(out, count, call.dx + at);
      }
      if (c >= channels.soft) return;
      A* __restrict__ into = source_row(p);
      const A* slope = gates.slope();
      const A alpha = channels.alpha[c];
      for (int64_t i = 0; i < count; ++i) into[i] += g[i] * x[i] * (alpha * slope[i]);
    }

    void write_source(int64_t outer, int64_t first, int64_t count) const {
      T* const out = call.own ? call.dx : call.dsource;
      const int64_t width = call.own ? call.channels.count : call.channels.source_count;
      const int64_t written = call.own ? call.channels.prototypes : width;
      for (int64_t p = 0; p < written; ++p) {
        T* row = out + (outer * width + p) * spans.inner + first;
        if (p < call.channels.prototypes) {
          put(source_row(p), count, row);
        } else {
          std::memset(row, 0, sizeof(T) * static_cast<size_t>(count));
        }
      }
    }
  };

  static void put(const A* values, int64_t count, T* row) {
    if constexpr (sizeof(A) == sizeof(T)) {
      std::memcpy(row, values, sizeof(T) * static_cast<size_t>(count));
    } else {
      store(values, count, row);
    }
  }

  void hard_pixels() const {
    const int64_t width = channels.count, per_block = pixels_per_block(),
                  blocks = divide_up(geometry.outer, per_block);
    const Partials<A> partials(blocks, width);
    for_ranges(parallel_for, blocks, per_block * width, [&](int64_t begin, int64_t end) {
      Buffer<A> wide_g(width), wide_x(width), wide_s(channels.prototypes), wide_out(width), gathered(width);
      for (int64_t block = begin; block < end; ++block) {
        A *gated = partials.gated(block), *total = partials.total(block);
        for (int64_t c = 0; c < width; ++c) gated[c] = total[c] = 0;
        const int64_t last = smaller(geometry.outer, (block + 1) * per_block);
        for (int64_t pixel = block * per_block; pixel < last; ++pixel) {
          const T* gate_row = source + pixel * channels.source_count;
          const A* g = load(grad + pixel * width, width, wide_g.get());
          const A* values = load(x + pixel * width, width, wide_x.get());
          const A* s = own ? values : load(gate_row, channels.prototypes, wide_s.get());
          for (int64_t c = 0; c < width; ++c) gathered[c] = s[channels.prototype[c]];
          A* out = target(dx + pixel * width, wide_out.get());
          gradient_pixel(g, values, gathered.get(), channels, out, gated, total);
          store(out, width, dx + pixel * width);
        }
      }
    });
    partials.reduce(channels.repeat, dalpha, dbeta, parallel_for);
  }

  void soft_pixels() const {
    const int64_t per_block = pixels_per_block(), blocks = divide_up(geometry.outer, per_block);
    const Partials<A> partials(blocks, channels.count);
    for_ranges(parallel_for, blocks, per_block * channels.count, [&](int64_t begin, int64_t end) {
      SoftPixels work(*this);
      for (int64_t block = begin; block < end; ++block) {
        A *gated = partials.gated(block), *total = partials.total(block);
        for (int64_t c = 0; c < channels.count; ++c) gated[c] = total[c] = 0;
        const int64_t last = smaller(geometry.outer, (block + 1) * per_block);
        for (int64_t pixel = block * per_block; pixel < last; ++pixel) work.pixel(pixel, gated, total);
      }
    });
    partials.reduce(channels.repeat, dalpha, dbeta, parallel_for);
  }

  // One thread's buffers for soft_pixels, and its work on one pixel.
  struct SoftPixels {
    const Backward& call;
    Buffer<A> wide_g, wide_x, wide_s, out, gate, slope, to_source;

    explicit SoftPixels(const Backward& call_)
        : call(call_),
          wide_g(call.channels.count),
          wide_x(call.channels.count),
          wide_s(call.channels.prototypes),
          out(call.channels.count),
          gate(call.channels.prototypes),
          slope(call.channels.prototypes),
          to_source(call.channels.prototypes) {}

    void pixel(int64_t index, A* gated, A* total) const {
      const Channels<A>& channels = call.channels;
      const int64_t width = channels.count;
      const A* g = load(call.grad + index * width, width, wide_g.get());
      const A* x = load(call.x + index * width, width, wide_x.get());
      const A* s =
          call.own ? x : load(call.source + index * channels.source_count, channels.prototypes, wide_s.get());
      for (int64_t p = 0; p < channels.prototypes; ++p) to_source[p] = 0;
      soft_gates(s, channels.gamma, channels.soft_prototypes, gate.get());
      soft_slopes(s, channels.gamma, channels.soft_prototypes, slope.get());
      for (int64_t c = 0; c < width; ++c) {
        const int64_t p = channels.prototype[c];
        const A product = g[c] * x[c];
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
        put(to_source.get(), channels.prototypes, row);
        const int64_t rest = channels.source_count - channels.prototypes;
        std::memset(row + channels.prototypes, 0, sizeof(T) * static_cast<size_t>(rest));
      }
      put(out.get(), channels.count, call.dx + index * channels.count);
    }
  };

  // Partial sums should cost little beside the data, and a block should not be a handful of elements.
  int64_t pixels_per_block() const { return larger(64, kBlock / channels.count); }
};

}  // namespace
}  // namespace deepshare::cpu
