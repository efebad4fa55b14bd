// How a call is cut into work: which loop order, which blocks of positions, and the per-channel constants.
#pragma once

#include <cstring>

#include "arena.h"
#include "kernels.h"
#include "lanes.h"

namespace deepshare::cpu {
namespace {

// Shorter rows than this are walked as pixels: the (channel, inner) plane of one outer index is then the
// vector loop.
constexpr int64_t kShortRow = 16;
// Positions of a row of shares handled at once.
constexpr int64_t kPiece = 1024;
// The same of a row with soft gates, where a buffer per prototype is held too.
constexpr int64_t kSoftPiece = 256;
// Elements a thread should at least get.
constexpr int64_t kGrain = 32768;
// A gradient's partial sums are over blocks of about this many elements, but not of so few positions that the
// partial sums would cost as much as the data, nor more blocks than this.
constexpr int64_t kBlock = 65536;
constexpr int64_t kBlockPositions = 512;
constexpr int64_t kBlocks = 4096;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t whole_groups(int64_t count) { return divide_up(count, kLanes) * kLanes; }

// Positions of one block, of `positions` in all. A function of the shape alone: blocks decide the sums' bits.
inline int64_t block_positions(int64_t positions, int64_t channels) {
  return larger(larger(kBlockPositions, kBlock / channels), divide_up(positions, kBlocks));
}

template <class Body>
void for_ranges(ParallelFor parallel_for, int64_t items, int64_t elements_per_item, const Body& body) {
  const auto call = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const Body*>(context))(first, last);
  };
  const int64_t grain = larger(1, kGrain / larger(1, elements_per_item));
  if (items <= grain) return body(int64_t{0}, items);
  parallel_for(0, items, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

// The per-channel constants of a call. With repeat > 1 (pixels) every channel stands `repeat` times, once per
// inner position, and its prototype is the same position of pi[c]: the kernels then see rows of one element.
template <class A>
struct Channels {
  int64_t count, prototypes, source_count, repeat;
  int64_t soft = 0;  // the first `soft` have the soft gate
  A gamma = 0;
  const int32_t* prototype;
  const A *alpha, *beta;
  Buffer<A> on, off;  // alpha * gate + beta at gate 1 and gate 0, rounded as the reference rounds it; padded
                      // to whole groups

  template <class Args>
  Channels(const Args& args, int64_t repeat_)
      : count(args.geometry.channels * repeat_),
        prototypes(0),
        source_count(args.geometry.source_channels * repeat_),
        repeat(repeat_),
        prototype(args.pi),
        alpha(static_cast<const A*>(args.alpha)),
        beta(static_cast<const A*>(args.beta)),
        on(whole_groups(count)),
        off(whole_groups(count)),
        repeated_(repeat > 1 ? count : 0),
        repeated_affine_(repeat > 1 ? 2 * count : 0) {
    for (int64_t c = 0; c < args.geometry.channels; ++c)
      prototypes = larger(prototypes, args.pi[c] + int64_t{1});
    prototypes *= repeat;
    if (repeat > 1) expand(args.geometry.channels);
    for (int64_t k = 0; k < count; ++k) on[k] = alpha[k] * A(1) + beta[k];
    for (int64_t k = 0; k < count; ++k) off[k] = alpha[k] * A(0) + beta[k];
    for (int64_t k = count; k < whole_groups(count); ++k) on[k] = off[k] = 0;
    if (args.soft_channels != nullptr) {
      soft = smaller(larger(*args.soft_channels, 0), args.geometry.channels) * repeat;
      gamma = *static_cast<const A*>(args.gamma);
    }
  }

 private:
  Buffer<int32_t> repeated_;
  Buffer<A> repeated_affine_;

  void expand(int64_t channels) {
    A *const alphas = repeated_affine_.get(), *const betas = alphas + count;
    for (int64_t c = 0, k = 0; c < channels; ++c) {
      for (int64_t i = 0; i < repeat; ++i, ++k) {
        repeated_[k] = static_cast<int32_t>(prototype[c] * repeat + i);
        alphas[k] = alpha[c];
        betas[k] = beta[c];
      }
    }
    prototype = repeated_.get();
    alpha = alphas;
    beta = betas;
  }
};

// The channels sorted by prototype, stable, so that a prototype's soft members come before its hard ones.
template <class A>
struct ByPrototype {
  Buffer<int64_t> channel;

  explicit ByPrototype(const Channels<A>& channels) : channel(channels.count) {
    Buffer<int64_t> next(channels.prototypes + 1);
    for (int64_t p = 0; p <= channels.prototypes; ++p) next[p] = 0;
    for (int64_t c = 0; c < channels.count; ++c) ++next[channels.prototype[c] + 1];
    for (int64_t p = 0; p < channels.prototypes; ++p) next[p + 1] += next[p];
    for (int64_t c = 0; c < channels.count; ++c) channel[next[channels.prototype[c]]++] = c;
  }
};

// The positions of a channel, cut into spans (one outer index, at most `piece` inner positions), spans
// grouped into blocks.
struct Spans {
  int64_t inner, piece, per_row, count, per_block, blocks;

  Spans(const Geometry& geometry, int64_t longest)
      : inner(geometry.inner),
        piece(smaller(geometry.inner, longest)),
        per_row(divide_up(inner, piece)),
        count(geometry.outer * per_row),
        per_block(larger(1, block_positions(geometry.outer * inner, geometry.channels) / piece)),
        blocks(divide_up(count, per_block)) {}

  int64_t first_in(int64_t block) const { return block * per_block; }
  int64_t last_in(int64_t block) const { return smaller(count, (block + 1) * per_block); }
  int64_t outer_of(int64_t span) const { return span / per_row; }
  int64_t first_of(int64_t span) const { return span % per_row * piece; }
  int64_t length_at(int64_t first) const { return smaller(piece, inner - first); }
};

}  // namespace
}  // namespace deepshare::cpu
