// How a call is cut into work: which loop order, which blocks of positions, and the per-channel constants.
#pragma once

#include <new>

#include "element.h"
#include "kernels.h"

namespace deepshare::cpu {
namespace {

// Shorter rows than this are walked as pixels: the (channel, inner) plane of one outer index is then the
// vector loop.
constexpr int64_t kShortRow = 16;
// Positions of a row handled at once; the conversion buffers of the 16-bit types (4 of them) stay in the
// first-level cache.
constexpr int64_t kPiece = 1024;
// The same while gates are soft, where a buffer per prototype is held too.
constexpr int64_t kSoftPiece = 256;
// Elements of one partial sum of a gradient, and elements a thread should at least get.
constexpr int64_t kBlock = 8192;
constexpr int64_t kGrain = 32768;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised memory that frees itself.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(larger(count, 1))))) {}
  ~Buffer() { ::operator delete(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

template <class Body>
void for_ranges(ParallelFor parallel_for, int64_t items, int64_t elements_per_item, const Body& body) {
  const auto call = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const Body*>(context))(first, last);
  };
  const int64_t grain = larger(1, kGrain / larger(1, elements_per_item));
  parallel_for(0, items, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

// The per-channel constants of a call. With repeat > 1 (pixels) every channel stands `repeat` times, once per
// inner position, and its prototype is the same position of pi[c]: the kernels then see rows of one element.
template <class A>
struct Channels {
  int64_t count, prototypes, source_count, repeat;
  int64_t soft = 0;             // the first `soft` have the soft gate
  int64_t soft_prototypes = 0;  // prototypes from here on give no soft gate
  A gamma = 0;
  Buffer<int32_t> prototype;
  Buffer<A> alpha, beta;
  Buffer<A> on, off;  // alpha * gate + beta at gate 1 and gate 0, rounded as the reference rounds it

  template <class Args>
  Channels(const Args& args, int64_t repeat_)
      : count(args.geometry.channels * repeat_),
        prototypes(0),
        source_count(args.geometry.source_channels * repeat_),
        repeat(repeat_),
        prototype(count),
        alpha(count),
        beta(count),
        on(count),
        off(count) {
    const A* alphas = static_cast<const A*>(args.alpha);
    const A* betas = static_cast<const A*>(args.beta);
    for (int64_t c = 0, k = 0; c < args.geometry.channels; ++c) {
      prototypes = larger(prototypes, (args.pi[c] + int64_t{1}) * repeat);
      for (int64_t i = 0; i < repeat; ++i, ++k) {
        prototype[k] = static_cast<int32_t>(args.pi[c] * repeat + i);
        alpha[k] = alphas[c];
        beta[k] = betas[c];
        on[k] = alphas[c] * A(1) + betas[c];
        off[k] = alphas[c] * A(0) + betas[c];
      }
    }
    if (args.soft_channels != nullptr) {
      soft = smaller(larger(*args.soft_channels, 0), args.geometry.channels) * repeat;
      gamma = *static_cast<const A*>(args.gamma);
      for (int64_t c = 0; c < soft; ++c) soft_prototypes = larger(soft_prototypes, prototype[c] + int64_t{1});
    }
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
        per_block(larger(1, kBlock / piece)),
        blocks(divide_up(count, per_block)) {}

  int64_t outer_of(int64_t span) const { return span / per_row; }
  int64_t first_of(int64_t span) const { return span % per_row * piece; }
  int64_t length_at(int64_t first) const { return smaller(piece, inner - first); }
};

// Sums of g*x*gate and g*x per block and channel, then over the blocks in their order.
template <class A>
class Partials {
 public:
  Partials(int64_t blocks, int64_t channels)
      : blocks_(blocks), channels_(channels), sums_(2 * blocks * channels) {}
  A* gated(int64_t block) const { return sums_.get() + 2 * block * channels_; }
  A* total(int64_t block) const { return gated(block) + channels_; }

  void reduce(int64_t repeat, A* dalpha, A* dbeta, ParallelFor parallel_for) const {
    for_ranges(parallel_for, channels_ / repeat, 2 * blocks_ * repeat, [&](int64_t first, int64_t last) {
      const int64_t begin = first * repeat, count = (last - first) * repeat;
      Buffer<double> wide(2 * count);  // double also for float: blocks are many, and it costs nothing here
      for (int64_t k = 0; k < 2 * count; ++k) wide[k] = 0;
      for (int64_t block = 0; block < blocks_; ++block) {
        const A *a = gated(block) + begin, *b = total(block) + begin;
        for (int64_t k = 0; k < count; ++k) wide[k] += a[k];
        for (int64_t k = 0; k < count; ++k) wide[count + k] += b[k];
      }
      for (int64_t c = first; c < last; ++c) {
        const double* a = wide.get() + (c - first) * repeat;
        double sum_a = 0, sum_b = 0;
        for (int64_t i = 0; i < repeat; ++i) sum_a += a[i], sum_b += a[count + i];
        dalpha[c] = static_cast<A>(sum_a);
        dbeta[c] = static_cast<A>(sum_b);
      }
    });
  }

 private:
  int64_t blocks_, channels_;
  Buffer<A> sums_;
};

}  // namespace
}  // namespace deepshare::cpu
