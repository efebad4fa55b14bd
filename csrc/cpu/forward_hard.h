// y = z * (gate ? on : off) with hard gates, in rows (NCHW) or pixels (NHWC and very short rows).
#pragma once

#include "pixels.h"
#include "rows.h"

namespace deepshare::cpu {
namespace {

template <Gate kGate, bool kStream, class T, bool kResidual>
void scale_row(const Input<T, kResidual>& z, int64_t at, int64_t count, Accum<T> on, Accum<T> off,
               uint8_t* bits, T* y) {
  using Values = Lanes<Accum<T>>;
  const Values at_one = Values::all(on), at_zero = Values::all(off);
  each_group(count, [&](int64_t i, auto extent) {
    const Values values = z.at(at + i, extent);
    const uint32_t open = open_bits<kGate>(values, bits + i / 8, extent);
    put<kStream>(values * select(open, at_one, at_zero), y + at + i, extent);
  });
}

template <class T, bool kResidual, bool kStream>
void forward_rows(const ForwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  const RowWalk<T, kResidual> walk(args, args.emitted, channels);
  T* const y = static_cast<T*>(args.y);
  const Spans tiles(args.geometry, walk.piece);
  for_ranges(parallel_for, tiles.count, tiles.piece * channels.count, [&](int64_t begin, int64_t end) {
    RowBits bits = walk.bits();
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tiles.first_of(tile), count = tiles.length_at(first);
      walk.tile(tiles.outer_of(tile), first, count, bits,
                [&](int64_t c, auto gate, int64_t at, uint8_t* row) {
                  scale_row<decltype(gate)::value, kStream>(walk.z, at, count, channels.on[c],
                                                            channels.off[c], row, y);
                });
    }
    if constexpr (kStream) end_streams();
  });
}

template <class T, bool kResidual, bool kStream>
void forward_pixels(const ForwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  const PixelPlan plan(args, args.emitted, channels);
  const Input<T, kResidual> z{static_cast<const T*>(args.x), static_cast<const T*>(args.residual)};
  T* const y = static_cast<T*>(args.y);
  const int64_t width = channels.count;
  const int64_t tiles = divide_up(args.geometry.outer, kPixelTile);
  for_ranges(parallel_for, tiles, kPixelTile * width, [&](int64_t begin, int64_t end) {
    PixelGates<T, kResidual> gates(plan, z, static_cast<const T*>(args.source));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kPixelTile, last = smaller(first + kPixelTile, args.geometry.outer);
      gates.compute(first, last - first);
      for (int64_t pixel = first; pixel < last; ++pixel) {
        const uint8_t* const bits = gates.of(pixel - first);
        each_group(width, [&](int64_t c, auto extent) {
          const auto at_one = load(channels.on.get() + c, Whole{}),
                     at_zero = load(channels.off.get() + c, Whole{});
          const auto factor = select(load_bits(bits + c / 8, Whole{}), at_one, at_zero);
          put<kStream>(z.at(pixel * width + c, extent) * factor, y + pixel * width + c, extent);
        });
      }
    }
    if constexpr (kStream) end_streams();
  });
}

template <class T>
void hard_forward(const ForwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  const bool pixels = args.geometry.inner < kShortRow;
  const int64_t row = pixels ? channels.count : args.geometry.inner;
  const int64_t rows = args.geometry.outer * (pixels ? 1 : channels.count);
  const bool stream = streams(static_cast<const T*>(args.y), rows, row);
  with_flags(args.residual != nullptr, stream, [&](auto residual, auto streamed) {
    const auto run = pixels ? forward_pixels<T, residual.value, streamed.value>
                            : forward_rows<T, residual.value, streamed.value>;
    run(args, channels, parallel_for);
  });
}

}  // namespace
}  // namespace deepshare::cpu
