// Hard gates where the innermost stored dimension is long (NCHW): a tile is all channels at a piece of the
// positions of one outer index. A prototype's gates are computed once a tile, as a row of bits that its
// replicates read; where the caller gave packed gates, or wants them, these rows are the packed gates
// themselves.
#pragma once

#include "operands.h"

namespace deepshare::cpu {
namespace {

// The bits of a tile's prototypes should stay in the second-level cache, and a piece be long enough to
// stream.
constexpr int64_t kTileBits = 64 * 1024 * 8;
constexpr int64_t kShortestPiece = 1024;
constexpr int64_t kLongestPiece = 16384;
constexpr int64_t kTiles = 8;  // there should be, for as many threads

// Positions of a tile: rows as they are, so that the walk is linear, unless they are too long or too few.
inline int64_t row_piece(const Geometry& geometry, int64_t prototypes) {
  const int64_t fits = smaller(kLongestPiece, larger(kShortestPiece, kTileBits / prototypes / 64 * 64));
  const int64_t even = divide_up(divide_up(geometry.outer * geometry.inner, kTiles), 64) * 64;
  return smaller(fits, larger(even, kShortestPiece));
}

// Where a channel's gates come from.
enum class Gate {
  kOwn,   // its own values
  kKept,  // its own values, and the bits are kept for others
  kBits,  // bits that are there
};

// Which bits a call needs, and when.
class RowPlan {
 public:
  enum class When : uint8_t { kNever, kWithChannel, kBefore };

  // `written`: prototypes whose bits the caller wants, of x's own.
  RowPlan(const int32_t* pi, int64_t channels, int64_t prototypes, bool own, bool packed, int64_t written)
      : own_(own), prototypes_(larger(prototypes, written)), when_(prototypes_) {
    for (int64_t p = 0; p < prototypes_; ++p) {
      when_[p] = p >= written ? When::kNever : pi[p] == p ? When::kWithChannel : When::kBefore;
    }
    if (packed) return;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t p = pi[c];
      if (own && p == c) continue;
      const bool in_time = own && c > p && pi[p] == p && when_[p] != When::kBefore;
      when_[p] = in_time ? When::kWithChannel : When::kBefore;
    }
  }

  int64_t prototypes() const { return prototypes_; }
  bool before(int64_t p) const { return when_[p] == When::kBefore; }
  Gate gate(int64_t c, int64_t p) const {
    if (!own_ || p != c || when_[c] == When::kBefore) return Gate::kBits;
    return when_[c] == When::kWithChannel ? Gate::kKept : Gate::kOwn;
  }

 private:
  bool own_;
  int64_t prototypes_;
  Buffer<When> when_;
};

// One thread's bits: of the tile at hand, or where the caller keeps them.
class RowBits {
 public:
  // `packed` [outer, rows, ceil(inner / 8)], or nullptr for bits that nobody else sees.
  RowBits(uint8_t* packed, int64_t rows, int64_t prototypes, int64_t inner, int64_t piece)
      : packed_(packed),
        rows_(rows),
        stride_(divide_up(packed != nullptr ? inner : piece, 8)),
        own_(packed != nullptr ? 0 : prototypes * stride_),
        tile_(own_.get()) {}

  void move_to(int64_t outer, int64_t first) {
    if (packed_ != nullptr) tile_ = packed_ + outer * rows_ * stride_ + first / 8;
  }
  uint8_t* row(int64_t p) const { return tile_ + p * stride_; }
  int64_t stride() const { return stride_; }

 private:
  uint8_t* packed_;
  int64_t rows_, stride_;
  Buffer<uint8_t> own_;
  uint8_t* tile_;
};

// The gates of a row as bits.
template <bool kResidual, class T>
void sign_row(Input<T, kResidual> z, int64_t at, int64_t count, uint8_t* bits) {
  each_group(count, [&](int64_t i, auto extent) {
    store_bits(non_negative(z.at(at + i, extent)), bits + i / 8, extent);
  });
}

// A group's gates, kept if they are wanted.
template <Gate kGate, class A, class Extent>
uint32_t open_bits(const Lanes<A>& values, uint8_t* bits, Extent extent) {
  if constexpr (kGate == Gate::kBits) return load_bits(bits, extent);
  const uint32_t open = non_negative(values);
  if constexpr (kGate == Gate::kKept) store_bits(open, bits, extent);
  return open;
}

// What the rows of a run are computed from.
template <class T, bool kResidual>
struct RowOperands {
  Input<T, kResidual> z;
  const int32_t* prototype;
  const Accum<T>*on, *off;
  int64_t inner;
  uint8_t* bits;
  int64_t bits_stride;
};

// The hard rows of a call, forward or backward: walks the tiles, and channels within them.
template <class T, bool kResidual>
struct RowWalk {
  Input<T, kResidual> z;
  const T* source;  // nullptr: z itself, or packed gates
  const uint8_t* packed;
  uint8_t* emitted;
  const Geometry& geometry;
  const Channels<Accum<T>>& channels;
  int64_t piece;
  RowPlan plan;

  template <class Args>
  RowWalk(const Args& args, uint8_t* emitted_, const Channels<Accum<T>>& channels_)
      : z{static_cast<const T*>(args.x), static_cast<const T*>(args.residual)},
        source(static_cast<const T*>(args.source)),
        packed(args.gates),
        emitted(emitted_),
        geometry(args.geometry),
        channels(channels_),
        piece(row_piece(args.geometry, channels.prototypes)),
        plan(channels.prototype, channels.count, channels.prototypes, source == nullptr && packed == nullptr,
             packed != nullptr, emitted != nullptr ? args.geometry.prototypes : 0) {}

  RowBits bits() const {
    uint8_t* const rows = packed != nullptr ? const_cast<uint8_t*>(packed) : emitted;  // packed are only read
    return RowBits(rows, geometry.prototypes, plan.prototypes(), geometry.inner, piece);
  }

  RowOperands<T, kResidual> operands(const RowBits& bits) const {
    return {z,           channels.prototype, channels.on.get(), channels.off.get(), geometry.inner,
            bits.row(0), bits.stride()};
  }

  // rows(Gate as a constant, c, end, at, bits) for runs of channels [c, end) of a tile, `at` their first
  // element.
  template <class Rows>
  void tile(int64_t outer, int64_t first, int64_t count, RowBits& bits, const Rows& rows) const {
    bits.move_to(outer, first);
    for (int64_t p = 0; p < plan.prototypes(); ++p) {
      if (plan.before(p)) compute(outer, p, first, count, bits.row(p));
    }
    for (int64_t c = 0, end = 0; c < channels.count; c = end) {
      const Gate gate = plan.gate(c, channels.prototype[c]);
      for (end = c + 1; end < channels.count && plan.gate(end, channels.prototype[end]) == gate; ++end) {
      }
      const int64_t at = (outer * channels.count + c) * geometry.inner + first;
      switch (gate) {
        case Gate::kOwn:
          rows(std::integral_constant<Gate, Gate::kOwn>{}, c, end, at);
          break;
        case Gate::kKept:
          rows(std::integral_constant<Gate, Gate::kKept>{}, c, end, at);
          break;
        case Gate::kBits:
          rows(std::integral_constant<Gate, Gate::kBits>{}, c, end, at);
          break;
      }
    }
  }

 private:
  void compute(int64_t outer, int64_t p, int64_t first, int64_t count, uint8_t* bits) const {
    if (source == nullptr)
      return sign_row(z, (outer * channels.count + p) * geometry.inner + first, count, bits);
    const Input<T, false> leader{source, nullptr};
    sign_row(leader, (outer * channels.source_count + p) * geometry.inner + first, count, bits);
  }
};

}  // namespace
}  // namespace deepshare::cpu
