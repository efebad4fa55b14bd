// The gradients with hard gates, in the loop orders of forward_hard.h, each in one pass:
//   dx[c] = g * (gate ? on : off),  dalpha[c] = sum g * z * gate,  dbeta[c] = sum g * z
#pragma once

#include "lane_sums.h"
#include "pixels.h"
#include "rows.h"

namespace deepshare::cpu {
namespace {

template <Gate kGate, bool kStream, class T, bool kResidual>
void gradient_row(const Input<T, kResidual>& z, const T* grad, int64_t at, int64_t count, Accum<T> on,
                  Accum<T> off, uint8_t* bits, T* dx, LaneSums<Accum<T>>& sums) {
  using A = Accum<T>;
  const Lanes<A> at_one = Lanes<A>::all(on), at_zero = Lanes<A>::all(off);
  GroupSums<A> running = sums.begin();
  each_group(count, [&](int64_t i, auto extent) {
    const Lanes<A> values = z.at(at + i, extent), g = load(grad + at + i, extent);
    const uint32_t open = open_bits<kGate>(values, bits + i / 8, extent);
    put<kStream>(g * select(open, at_one, at_zero), dx + at + i, extent);
    running.add(g * values, select(open, Lanes<A>::all(1), Lanes<A>::all(0)));
  });
  sums.end(running);
}

template <class T, bool kResidual, bool kStream>
void backward_rows(const BackwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  using A = Accum<T>;
  const RowWalk<T, kResidual> walk(args, nullptr, channels);
  const T* const grad = static_cast<const T*>(args.grad);
  T* const dx = static_cast<T*>(args.dx);
  const Spans tiles(args.geometry, walk.piece);
  const Partials<A> partials(tiles.blocks, channels.count);
  for_ranges(parallel_for, tiles.blocks, tiles.piece * tiles.per_block * channels.count,
             [&](int64_t begin, int64_t end) {
               RowBits bits = walk.bits();
               Buffer<LaneSums<A>> sums(channels.count);
               for (int64_t block = begin; block < end; ++block) {
                 for (int64_t c = 0; c < channels.count; ++c) sums[c] = LaneSums<A>();
                 for (int64_t tile = tiles.first_in(block); tile < tiles.last_in(block); ++tile) {
                   const int64_t first = tiles.first_of(tile), count = tiles.length_at(first);
                   walk.tile(tiles.outer_of(tile), first, count, bits,
                             [&](int64_t c, auto gate, int64_t at, uint8_t* row) {
                               gradient_row<decltype(gate)::value, kStream>(walk.z, grad, at, count,
                                                                            channels.on[c], channels.off[c],
                                                                            row, dx, sums[c]);
                             });
                 }
                 partials.keep(block, sums.get());
               }
               if constexpr (kStream) end_streams();
             });
  partials.reduce(1, static_cast<A*>(args.dalpha), static_cast<A*>(args.dbeta), parallel_for);
}

// Groups of channels whose sums stay in registers while the pixels of a tile go by: as many as there are
// registers for.
constexpr int kGroupsAtOnce = kVectorBytes == 64 ? 4 : 1;

template <bool kStream, class T, bool kResidual>
struct PixelGradient {
  using A = Accum<T>;

  Input<T, kResidual> z;
  const T* grad;
  T* dx;
  const Channels<A>& channels;

  // Channels [c, c + kGroups * kLanes) of `count` pixels; with one group, perhaps a part of it.
  template <int kGroups, class Extent>
  void groups(const PixelGates<T, kResidual>& gates, int64_t first, int64_t count, int64_t c, Extent extent,
              A* gated, A* total) const {
    Lanes<A> at_one[kGroups], at_zero[kGroups];
    GroupSums<A> running[kGroups];
    for (int k = 0; k < kGroups; ++k) {
      at_one[k] = load(channels.on.get() + c + k * kLanes, Whole{});
      at_zero[k] = load(channels.off.get() + c + k * kLanes, Whole{});
      running[k] = {load(gated + c + k * kLanes, Whole{}), load(total + c + k * kLanes, Whole{})};
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* const bits = gates.of(i) + c / 8;
      for (int k = 0; k < kGroups; ++k) {
        const int64_t at = (first + i) * channels.count + c + k * kLanes;
        const Lanes<A> values = z.at(at, extent), g = load(grad + at, extent);
        const uint32_t open = load_bits(bits + k * kLanes / 8, Whole{});
        put<kStream>(g * select(open, at_one[k], at_zero[k]), dx + at, extent);
        running[k].add(g * values, select(open, Lanes<A>::all(1), Lanes<A>::all(0)));
      }
    }
    for (int k = 0; k < kGroups; ++k) {
      store(running[k].gated, gated + c + k * kLanes, Whole{});
      store(running[k].total, total + c + k * kLanes, Whole{});
    }
  }

  void tile(const PixelGates<T, kResidual>& gates, int64_t first, int64_t count, A* gated, A* total) const {
    constexpr int64_t kStep = kGroupsAtOnce * kLanes;
    const int64_t width = channels.count;
    int64_t c = 0;
    for (; c + kStep <= width; c += kStep)
      groups<kGroupsAtOnce>(gates, first, count, c, Whole{}, gated, total);
    each_group(width - c,
               [&](int64_t i, auto extent) { groups<1>(gates, first, count, c + i, extent, gated, total); });
  }
};

template <class T, bool kResidual, bool kStream>
void backward_pixels(const BackwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  using A = Accum<T>;
  const PixelPlan plan(args, nullptr, channels);
  const PixelGradient<kStream, T, kResidual> gradient{
      {static_cast<const T*>(args.x), static_cast<const T*>(args.residual)},
      static_cast<const T*>(args.grad),
      static_cast<T*>(args.dx),
      channels};
  const int64_t pixels = args.geometry.outer;
  const int64_t per_block = divide_up(block_positions(pixels, channels.count), kPixelTile) * kPixelTile;
  const Partials<A> partials(divide_up(pixels, per_block), channels.count);
  for_ranges(parallel_for, divide_up(pixels, per_block), per_block * channels.count,
             [&](int64_t begin, int64_t end) {
               PixelGates<T, kResidual> gates(plan, gradient.z, static_cast<const T*>(args.source));
               for (int64_t block = begin; block < end; ++block) {
                 partials.reset(block);
                 const int64_t last = smaller(pixels, (block + 1) * per_block);
                 for (int64_t first = block * per_block; first < last; first += kPixelTile) {
                   const int64_t count = smaller(kPixelTile, last - first);
                   gates.compute(first, count);
                   gradient.tile(gates, first, count, partials.gated(block), partials.total(block));
                 }
               }
               if constexpr (kStream) end_streams();
             });
  partials.reduce(channels.repeat, static_cast<A*>(args.dalpha), static_cast<A*>(args.dbeta), parallel_for);
}

template <class T>
void hard_backward(const BackwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  const bool pixels = args.geometry.inner < kShortRow;
  const int64_t row = pixels ? channels.count : args.geometry.inner;
  const int64_t rows = args.geometry.outer * (pixels ? 1 : channels.count);
  const bool stream = streams(static_cast<const T*>(args.dx), rows, row);
  with_flags(args.residual != nullptr, stream, [&](auto residual, auto streamed) {
    const auto run = pixels ? backward_pixels<T, residual.value, streamed.value>
                            : backward_rows<T, residual.value, streamed.value>;
    run(args, channels, parallel_for);
  });
}

}  // namespace
}  // namespace deepshare::cpu
