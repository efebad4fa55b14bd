// The gradients with hard gates, in the loop orders of forward_hard.h, each in one pass:
//   dx[c] = g * (gate ? on : off),  dalpha[c] = sum g * z * gate,  dbeta[c] = sum g * z
#pragma once

#include "lane_sums.h"
#include "pixels.h"
#include "rows.h"

namespace deepshare::cpu {
namespace {

// As scale_rows.
template <Gate kGate, bool kStream, class T, bool kResidual>
void gradient_rows(RowOperands<T, kResidual> call, const T* grad, int64_t c, int64_t end, int64_t at,
                   int64_t count, T* dx, LaneSums<Accum<T>>* sums) {
  using Values = Lanes<Accum<T>>;
  for (; c < end; ++c, at += call.inner) {
    const Values at_one = Values::all(call.on[c]), at_zero = Values::all(call.off[c]);
    uint8_t* const bits = call.bits + call.prototype[c] * call.bits_stride;
    GroupSums<Accum<T>> running = sums[c].begin();
    each_group(count, [&](int64_t i, auto extent) {
      const Values values = call.z.at(at + i, extent), g = load(grad + at + i, extent);
      const uint32_t open = open_bits<kGate>(values, bits + i / 8, extent);
      put<kStream>(g * select(open, at_one, at_zero), dx + at + i, extent);
      running.add(g * values, select(open, Values::all(1), Values::all(0)));
    });
    sums[c].end(running);
  }
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
                             [&](auto gate, int64_t c, int64_t end_channel, int64_t at) {
                               gradient_rows<decltype(gate)::value, kStream>(
                                   walk.operands(bits), grad, c, end_channel, at, count, dx, sums.get());
                             });
                 }
                 partials.keep(block, sums.get());
               }
               if constexpr (kStream) end_streams();
             });
  partials.reduce(1, static_cast<A*>(args.dalpha), static_cast<A*>(args.dbeta), parallel_for);
}

// As scale_pixels; a channel's sums are loaded and stored once for all of them.
template <int kPixels, bool kStream, class T, bool kResidual>
void gradient_pixels(Input<T, kResidual> z, const T* grad, PixelGroups groups, const uint8_t* bits,
                     const Accum<T>* on, const Accum<T>* off, int64_t at, T* dx, Accum<T>* gated,
                     Accum<T>* total) {
  using Values = Lanes<Accum<T>>;
  const PixelRows<kPixels, T, kResidual> rows(z, at, groups.width);
  const T* from[kPixels];
  T* to[kPixels];
  for (int k = 0; k < kPixels; ++k) {
    from[k] = grad + at + k * groups.width;
    to[k] = dx + at + k * groups.width;
  }
  each_open_group(groups, rows, bits, [&](int64_t c, auto extent, const OpenBits<kPixels>& open) {
    const Values at_one = load(on + c, Whole{}), at_zero = load(off + c, Whole{});
    GroupSums<Accum<T>> running{load(gated + c, Whole{}), load(total + c, Whole{})};
    for (int k = 0; k < kPixels; ++k) {
      const Values values = rows.of[k].at(c, extent), g = load(from[k] + c, extent);
      put<kStream>(g * select(open.of[k], at_one, at_zero), to[k] + c, extent);
      running.add(g * values, select(open.of[k], Values::all(1), Values::all(0)));
    }
    store(running.gated, gated + c, Whole{});
    store(running.total, total + c, Whole{});
  });
}

template <class T, bool kResidual, bool kStream>
void backward_pixels(const BackwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  using A = Accum<T>;
  const PixelPlan plan(args, nullptr, channels, static_cast<int64_t>(sizeof(T)));
  const PixelGroups groups(plan);
  const Input<T, kResidual> z{static_cast<const T*>(args.x), static_cast<const T*>(args.residual)};
  const int64_t pixels = args.geometry.outer;
  const int64_t per_block = divide_up(block_positions(pixels, channels.count), plan.tile) * plan.tile;
  const Partials<A> partials(divide_up(pixels, per_block), channels.count);
  for_ranges(parallel_for, divide_up(pixels, per_block), per_block * channels.count,
             [&](int64_t begin, int64_t end) {
               PixelGates<T, kResidual> gates(plan, z, static_cast<const T*>(args.source));
               for (int64_t block = begin; block < end; ++block) {
                 partials.reset(block);
                 const int64_t last = smaller(pixels, (block + 1) * per_block);
                 for (int64_t first = block * per_block; first < last; first += plan.tile) {
                   const int64_t tile_end = smaller(first + plan.tile, last);
                   gates.compute(first, tile_end - first);
                   each_pixels(first, tile_end, channels.count * static_cast<int64_t>(sizeof(T)),
                               [&](auto count, int64_t pixel) {
                                 gradient_pixels<decltype(count)::value, kStream>(
                                     z, static_cast<const T*>(args.grad), groups, gates.of(pixel - first),
                                     channels.on.get(), channels.off.get(), pixel * channels.count,
                                     static_cast<T*>(args.dx), partials.gated(block), partials.total(block));
                               });
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
  const bool stream = (!pixels || kWholeLines<T>) && streams(static_cast<const T*>(args.dx), rows, row);
  with_flags(args.residual != nullptr, stream, [&](auto residual, auto streamed) {
    const auto run = pixels ? backward_pixels<T, residual.value, streamed.value>
                            : backward_rows<T, residual.value, streamed.value>;
    run(args, channels, parallel_for);
  });
}

}  // namespace
}  // namespace deepshare::cpu
