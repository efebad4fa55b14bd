// y = z * (gate ? on : off) with hard gates, in rows (NCHW) or pixels (NHWC and very short rows).
#pragma once

#include "pixels.h"
#include "rows.h"

namespace deepshare::cpu {
namespace {

// Channels [c, end) at `count` positions, the first channel's at `at`. Arguments come by value: behind a
// reference they would be read again after every store of a byte.
template <Gate kGate, bool kStream, class T, bool kResidual>
void scale_rows(RowOperands<T, kResidual> call, int64_t c, int64_t end, int64_t at, int64_t count, T* y) {
  using Values = Lanes<Accum<T>>;
  for (; c < end; ++c, at += call.inner) {
    const Values at_one = Values::all(call.on[c]), at_zero = Values::all(call.off[c]);
    uint8_t* const bits = call.bits + call.prototype[c] * call.bits_stride;
    each_group(count, [&](int64_t i, auto extent) {
      const Values values = call.z.at(at + i, extent);
      const uint32_t open = open_bits<kGate>(values, bits + i / 8, extent);
      put<kStream>(values * select(open, at_one, at_zero), y + at + i, extent);
    });
  }
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
      walk.tile(tiles.outer_of(tile), first, count, bits, [&](auto gate, int64_t c, int64_t end, int64_t at) {
        scale_rows<decltype(gate)::value, kStream>(walk.operands(bits), c, end, at, count, y);
      });
    }
    if constexpr (kStream) end_streams();
  });
}

// Consecutive pixels, so that a channel's constants are loaded once for all of them.
template <int kPixels, bool kStream, class T, bool kResidual>
void scale_pixels(Input<T, kResidual> z, PixelGroups groups, const uint8_t* bits, const Accum<T>* on,
                  const Accum<T>* off, int64_t at, T* y) {
  const PixelRows<kPixels, T, kResidual> rows(z, at, groups.width);
  T* to[kPixels];
  for (int k = 0; k < kPixels; ++k) to[k] = y + at + k * groups.width;
  each_open_group(groups, rows, bits, [&](int64_t c, auto extent, const OpenBits<kPixels>& open) {
    const auto at_one = load(on + c, Whole{}), at_zero = load(off + c, Whole{});
    for (int k = 0; k < kPixels; ++k) {
      put<kStream>(rows.of[k].at(c, extent) * select(open.of[k], at_one, at_zero), to[k] + c, extent);
    }
  });
}

template <class T, bool kResidual, bool kStream>
void forward_pixels(const ForwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  const PixelPlan plan(args, args.emitted, channels, static_cast<int64_t>(sizeof(T)));
  const PixelGroups groups(plan);
  const Input<T, kResidual> z{static_cast<const T*>(args.x), static_cast<const T*>(args.residual)};
  const int64_t width = channels.count, tiles = divide_up(args.geometry.outer, plan.tile);
  for_ranges(parallel_for, tiles, plan.tile * width, [&](int64_t begin, int64_t end) {
    PixelGates<T, kResidual> gates(plan, z, static_cast<const T*>(args.source));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * plan.tile, last = smaller(first + plan.tile, args.geometry.outer);
      gates.compute(first, last - first);
      each_pixels(first, last, width * static_cast<int64_t>(sizeof(T)), [&](auto count, int64_t pixel) {
        scale_pixels<decltype(count)::value, kStream>(z, groups, gates.of(pixel - first), channels.on.get(),
                                                      channels.off.get(), pixel * width,
                                                      static_cast<T*>(args.y));
      });
    }
    if constexpr (kStream) end_streams();
  });
}

template <class T>
void hard_forward(const ForwardArgs& args, const Channels<Accum<T>>& channels, ParallelFor parallel_for) {
  const bool pixels = args.geometry.inner < kShortRow;
  const int64_t row = pixels ? channels.count : args.geometry.inner;
  const int64_t rows = args.geometry.outer * (pixels ? 1 : channels.count);
  const bool stream = (!pixels || kWholeLines<T>) && streams(static_cast<const T*>(args.y), rows, row);
  with_flags(args.residual != nullptr, stream, [&](auto residual, auto streamed) {
    const auto run = pixels ? forward_pixels<T, residual.value, streamed.value>
                            : forward_rows<T, residual.value, streamed.value>;
    run(args, channels, parallel_for);
  });
}

}  // namespace
}  // namespace deepshare::cpu
