// shared_relu_share, one party's part of the integer twin of shared_relu (kernels/cuda/share.h):
//   y = truncate(e * (beta + f + z * (alpha - 2 * f)) + offset + z * toggle),  f = flip or scale * flip[pi]
// in 64-bit words that wrap around: unsigned, for which C++ defines that.
#pragma once

#include "plan.h"

namespace deepshare::cpu {
namespace {

using Word = uint64_t;

// The same constant for a whole row, read like an array of it.
struct Everywhere {
  Word value;
  Word operator[](int64_t) const { return value; }
};

// v / 2^shift, rounded down at party 0, up at party 1.
struct Truncation {
  Word sign;  // all ones at party 1
  int shift;

  explicit Truncation(const ShareArgs& args)
      : sign(args.party == 0 ? 0 : ~Word{0}), shift(static_cast<int>(args.shift)) {}

  Word operator()(Word v) const {
    const auto shifted = static_cast<Word>(static_cast<int64_t>((v ^ sign) - sign) >> shift);
    return (shifted ^ sign) - sign;
  }
};

// count gates, from the first of a byte on, as masks; writes up to the next multiple of 8. A vector type,
// because the auto-vectoriser goes over the bytes instead of over the bits of one.
inline void expand(const uint8_t* bits, int64_t count, Word* open) {
  typedef Word Words __attribute__((vector_size(8 * sizeof(Word))));
  const Words places = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t k = 0; 8 * k < count; ++k) {
    const Words masks = -((Word{bits[k]} >> places) & 1);
    std::memcpy(open + 8 * k, &masks, sizeof masks);
  }
}

// Where the operands of some elements that follow each other in memory begin.
struct ShareRow {
  const Word *opened, *flip, *offset, *toggle, *open;
  Word* y;
};

template <bool kScaled, class Constants>
void share_row(const ShareRow& row, const Constants& alpha, const Constants& beta, const Constants& scale,
               const Truncation truncate, int64_t count) {
  const Word *e = row.opened, *flip = row.flip, *offset = row.offset, *toggle = row.toggle, *open = row.open;
  Word* __restrict__ y = row.y;
  for (int64_t i = 0; i < count; ++i) {
    const Word f = kScaled ? scale[i] * flip[i] : flip[i];
    const Word slope = beta[i] + f + (open[i] & (alpha[i] - 2 * f));
    y[i] = truncate(e[i] * slope + offset[i] + (open[i] & toggle[i]));
  }
}

struct Share {
  const ShareArgs& args;
  const Geometry& geometry;
  const Word *opened, *flip, *offset, *toggle, *alpha, *beta, *scale;
  Word* y;
  Truncation truncation;
  ParallelFor parallel_for;

  Share(const ShareArgs& args_, ParallelFor parallel)
      : args(args_),
        geometry(args.geometry),
        opened(words(args.opened)),
        flip(words(args.flip)),
        offset(words(args.offset)),
        toggle(words(args.toggle)),
        alpha(words(args.alpha)),
        beta(words(args.beta)),
        scale(words(args.scale)),
        y(reinterpret_cast<Word*>(args.y)),
        truncation(args),
        parallel_for(parallel) {}

  static const Word* words(const int64_t* values) { return reinterpret_cast<const Word*>(values); }

  void run() const {
    if (geometry.inner == 1) return scale == nullptr ? pixels<false>() : pixels<true>();
    return scale == nullptr ? rows<false>() : rows<true>();
  }

  ShareRow row_at(int64_t at, const Word* flips, const Word* open) const {
    return {opened + at, flips, offset + at, toggle + at, open, y + at};
  }

  template <bool kScaled>
  void rows() const {
    const Spans spans(geometry, kPiece);
    const int64_t bytes = divide_up(geometry.inner, 8), channels = geometry.channels;
    for_ranges(parallel_for, spans.count * channels, spans.piece, [&](int64_t begin, int64_t end) {
      Buffer<Word> open(kPiece);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t c = item / spans.per_row % channels, outer = item / spans.per_row / channels;
        const int64_t first = spans.first_of(item), count = spans.length_at(first), p = args.pi[c];
        const int64_t at = (outer * channels + c) * geometry.inner + first;
        const int64_t flip_row = kScaled ? outer * geometry.source_channels + p : outer * channels + c;
        expand(args.gates + (outer * geometry.prototypes + p) * bytes + first / 8, count, open.get());
        share_row<kScaled>(row_at(at, flip + flip_row * geometry.inner + first, open.get()),
                           Everywhere{alpha[c]}, Everywhere{beta[c]}, Everywhere{kScaled ? scale[c] : 1},
                           truncation, count);
      }
    });
  }

  template <bool kScaled>
  void pixels() const {
    const int64_t channels = geometry.channels, bytes = divide_up(geometry.prototypes, 8);
    for_ranges(parallel_for, geometry.outer, channels, [&](int64_t begin, int64_t end) {
      Buffer<Word> by_prototype(8 * bytes), open(channels), flips(channels);
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        expand(args.gates + pixel * bytes, geometry.prototypes, by_prototype.get());
        for (int64_t c = 0; c < channels; ++c) open[c] = by_prototype[args.pi[c]];
        const Word* own = flip + pixel * (kScaled ? geometry.source_channels : channels);
        if (kScaled) {
          for (int64_t c = 0; c < channels; ++c) flips[c] = own[args.pi[c]];
        }
        share_row<kScaled>(row_at(pixel * channels, kScaled ? flips.get() : own, open.get()), alpha, beta,
                           scale, truncation, channels);
      }
    });
  }
};

}  // namespace
}  // namespace deepshare::cpu
