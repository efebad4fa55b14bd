// ring_conv2d (kernels/cuda/ring_conv.h): an implicit matrix product. Of the output, panels of 8 channels lie
// in the lanes; x is read from padded planes (ring_planes.h), a word for all lanes at once. Groups of few
// output channels, a depthwise convolution above all, go along the pixels instead.
#pragma once

#include "ring_tile.h"

namespace deepshare::cpu {
namespace {

// Words of padded planes that exist at once: samples beyond them come later.
constexpr int64_t kPlaneWords = int64_t{1} << 17;
// Pixels of a block, whose sums stay in the second-level cache while all steps pass.
constexpr int64_t kBlockPixels = 128;
// Vectors of pixels side by side, where the lanes are pixels.
constexpr int kStrip = 4;
constexpr int64_t kStripWords = kStrip * Native<Word>::kWidth;

struct RingConv {
  const RingConvArgs& args;
  ParallelFor parallel_for;
  Planes planes;
  int64_t depth, taps, steps;  // of a group: channels, taps, and products of a sum
  int64_t even;                // steps, or one more
  int64_t filters, panels;     // output channels of a group, and panels of them
  int64_t pixels;
  Buffer<int64_t> offsets;  // [even], the last one twice where there is one more

  RingConv(const RingConvArgs& of, ParallelFor parallel)
      : args(of),
        parallel_for(parallel),
        planes(of),
        depth(of.channels / of.groups),
        taps(of.height.kernel * of.width.kernel),
        steps(depth * taps),
        even(steps + steps % 2),
        filters(of.out_channels / of.groups),
        panels(divide_up(filters, kPanel)),
        pixels(of.height.outputs * of.width.outputs),
        offsets(even) {
    for (int64_t c = 0, step = 0; c < depth; ++c) {
      for (int64_t u = 0; u < args.height.kernel; ++u) {
        for (int64_t v = 0; v < args.width.kernel; ++v) offsets[step++] = c * planes.plane + planes.tap(u, v);
      }
    }
    offsets[even - 1] = offsets[steps - 1];
  }

  void run() const {
    const int64_t sample = args.channels * planes.plane;
    const int64_t at_once = smaller(args.batch, larger(1, kPlaneWords / sample));
    Buffer<Word> copies(at_once * sample + kStripWords);
    std::memset(copies.get() + at_once * sample, 0, sizeof(Word) * kStripWords);
    for (int64_t first = 0; first < args.batch; first += at_once) {
      const Samples some{first, smaller(at_once, args.batch - first), copies.get()};
      const bool digits = args.packed != nullptr && args.narrow && kByDigits;
      digits ? fill(some, AsDigits{}) : fill(some, AsWords{});
      if (args.packed == nullptr) {
        along_pixels(some);
      } else if (digits) {
        along_channels<true>(some, nullptr);
      } else {
        const Buffer<Word> pairs(some.count * args.groups * positions());
        add_up_pairs(some, pairs.get());
        along_channels<false>(some, pairs.get());
      }
    }
  }

  // Samples whose planes exist at once.
  struct Samples {
    int64_t first, count;
    Word* planes;
  };

  // From a plane's first output to its last, those between the rows included.
  int64_t positions() const { return (args.height.outputs - 1) * planes.pitch() + args.width.outputs; }

  const Word* planes_of(const Samples& some, int64_t sample, int64_t group) const {
    return some.planes + (sample * args.channels + group * depth) * planes.plane;
  }

  Word* output(int64_t n, int64_t channel) const {
    return reinterpret_cast<Word*>(args.y) + (n * args.out_channels + channel) * pixels;
  }

  template <class Form>
  void fill(const Samples& some, const Form& form) const {
    for_ranges(parallel_for, some.count * args.channels, planes.plane, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = some.first + item / args.channels, c = item % args.channels;
        planes.fill(args.x + n * args.x_strides[0] + c * args.x_strides[1], some.planes + item * planes.plane,
                    form);
      }
    });
  }

  // --- Channels in the lanes.

  // Of each sample, group and position: the sum of x1 x2 over the pairs of steps.
  void add_up_pairs(const Samples& some, Word* pairs) const {
    const int64_t strips = divide_up(positions(), kStripWords);
    for_ranges(parallel_for, some.count * args.groups * strips, kStripWords * steps / kPanel,
               [&](int64_t begin, int64_t end) {
                 Word sums[kStripWords];
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t of = item / strips, at = item % strips * kStripWords;
                   strip_of_pairs(planes_of(some, of / args.groups, of % args.groups) + at, sums);
                   std::memcpy(pairs + of * positions() + at, sums,
                               sizeof(Word) * smaller(kStripWords, positions() - at));
                 }
               });
  }

  void strip_of_pairs(const Word* x, Word* to) const {
    RingVector sums[kStrip] = {};
    for (int64_t step = 0; step < even; step += 2) {
      const Word *x1 = x + offsets[step], *x2 = x + offsets[step + 1];
      for (int v = 0; v < kStrip; ++v)
        sums[v] += load_vector(x1 + v * Native<Word>::kWidth) * load_vector(x2 + v * Native<Word>::kWidth);
    }
    std::memcpy(to, sums, sizeof sums);
  }

  struct Block {
    int64_t group, panel, sample;
    int64_t row, column, rows, columns;
    const Word* x;      // the group's planes, from the first output on
    const Word* pairs;  // the group's sums of x1 x2, by position, from there too
    Word* staged;       // [kSteps][panels][8]
    Word* sums;         // [rows][columns][panels][8]
  };

  // An item is (group, block of panels, sample, block of rows, or a piece of one), the sample and the rows
  // last: a thread keeps a weight in its cache for all of them.
  template <bool kDigits>
  void along_channels(const Samples& some, const Word* pairs) const {
    const int64_t columns = smaller(args.width.outputs, kBlockPixels),
                  pieces = divide_up(args.width.outputs, columns);
    const int64_t rows = smaller(args.height.outputs, kBlockPixels / columns);
    const int64_t blocks = divide_up(args.height.outputs, rows) * pieces, per_weight = some.count * blocks;
    const int64_t panel_blocks = divide_up(panels, kTilePanels);
    const int64_t width = kTilePanels * kPanel, products = rows * columns * kTilePanels * steps;
    for_ranges(parallel_for, args.groups * panel_blocks * per_weight, products,
               [&](int64_t begin, int64_t end) {
                 Buffer<Word> staged(kSteps * width), sums(rows * columns * width);
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t weight = item / per_weight, sample = item % per_weight / blocks;
                   Block block{weight / panel_blocks,
                               weight % panel_blocks * kTilePanels,
                               some.first + sample,
                               item % blocks / pieces * rows,
                               item % pieces * columns,
                               0,
                               0,
                               nullptr,
                               nullptr,
                               staged.get(),
                               sums.get()};
                   block.rows = smaller(rows, args.height.outputs - block.row);
                   block.columns = smaller(columns, args.width.outputs - block.column);
                   const int64_t first = block.row * planes.pitch() + block.column;
                   block.x = planes_of(some, sample, block.group) + first;
                   if (!kDigits)
                     block.pairs = pairs + (sample * args.groups + block.group) * positions() + first;
                   some_panels<kDigits>(block);
                 }
               });
  }

  template <bool kDigits>
  void some_panels(const Block& block) const {
    const int64_t left = panels - block.panel;
    if constexpr (kTilePanels == 4) {
      if (left >= 4) return rows_of<4, kDigits>(block);
      if (left == 3) return rows_of<3, kDigits>(block);
      if (left == 2) return rows_of<2, kDigits>(block);
    }
    rows_of<1, kDigits>(block);
  }

  template <int kPanels, bool kDigits>
  void rows_of(const Block& block) const {
    constexpr int64_t kWidth = kPanels * kPanel;
    start<kPanels, kDigits>(block);
    for (int64_t step = 0; step < steps; step += kSteps) {
      const int64_t count = smaller(kSteps, even - step);
      args.narrow ? stage<kPanels>(static_cast<const int32_t*>(args.packed), block, step, count)
                  : stage<kPanels>(static_cast<const int64_t*>(args.packed), block, step, count);
      for (int64_t row = 0; row < block.rows; ++row) {
        fetch_ahead(block, step + kSteps, row);
        const TileOf tile{block.x + row * planes.pitch(), offsets.get() + step, count, block.staged,
                          block.sums + row * block.columns * kWidth};
        add_row<kPanels, kDigits>(tile, block.columns);
      }
    }
    write<kPanels>(block);
  }

  // The sums begin with what the pairs of steps have too much.
  template <int kPanels, bool kDigits>
  void start(const Block& block) const {
    constexpr int kWidth = kPanels * kPanel;
    Word* sums = block.sums;
    if constexpr (kDigits) {
      std::memset(sums, 0, sizeof(Word) * block.rows * block.columns * kWidth);
    } else {
      const auto* of_channels = reinterpret_cast<const Word*>(args.pairs) + packed_at(block, 1);
      for (int64_t row = 0; row < block.rows; ++row) {
        const Word* of_pixels = block.pairs + row * planes.pitch();
        for (int64_t i = 0; i < block.columns; ++i, sums += kWidth) {
          for (int c = 0; c < kWidth; ++c) sums[c] = -of_channels[c] - of_pixels[i];
        }
      }
    }
  }

  // From the beginning of the packed weights, or of the channels' sums for `of_steps` = 1, to a panel's first
  // step.
  int64_t packed_at(const Block& block, int64_t of_steps) const {
    const int64_t first = block.panel * kPanel, blocks = divide_up(filters, kPackWidth);
    return (block.group * blocks + first / kPackWidth) * of_steps * kPackWidth + first % kPackWidth;
  }

  // The weights of some steps as words, 0 for the one too many.
  template <int kPanels, class W>
  void stage(const W* packed, const Block& block, int64_t step, int64_t count) const {
    const W* from = packed + packed_at(block, steps) + step * kPackWidth;
    Word* to = block.staged;
    for (int64_t i = 0; i < smaller(count, steps - step); ++i, from += kPackWidth, to += kPanels * kPanel) {
      for (int c = 0; c < kPanels * kPanel; ++c) to[c] = static_cast<Word>(static_cast<int64_t>(from[c]));
    }
    if (count > steps - step) std::memset(to, 0, sizeof(Word) * kPanels * kPanel);
  }

  // Asks for the part of the next steps' weights that falls to this row. On 4x4 images a weight is used so
  // seldom that the caches' own prefetching comes late.
  void fetch_ahead(const Block& block, int64_t step, int64_t row) const {
    constexpr int64_t kLine = 64;
    const int64_t size = args.narrow ? sizeof(int32_t) : sizeof(int64_t);
    const int64_t bytes = smaller(kSteps, steps - step) * kPackWidth * size;
    if (bytes <= 0) return;
    const char* from =
        static_cast<const char*>(args.packed) + (packed_at(block, steps) + step * kPackWidth) * size;
    const int64_t end = bytes * (row + 1) / block.rows;
    for (int64_t line = bytes * row / block.rows / kLine * kLine; line < end; line += kLine)
      __builtin_prefetch(from + line);
  }

  // Of whole rows, or of a piece of one: its outputs follow each other in y. 8 pixels at a time: a cache line
  // of y, and few enough of the sums to stay in the first-level cache.
  template <int kPanels>
  void write(const Block& block) const {
    constexpr int64_t kWidth = kPanels * kPanel, kPixels = 8;
    const int64_t count = block.rows * block.columns, first = block.panel * kPanel;
    const int64_t channels = smaller(kWidth, filters - first);
    Word* y =
        output(block.sample, block.group * filters + first) + block.row * args.width.outputs + block.column;
    for (int64_t i = 0; i < count; i += kPixels) {
      const int64_t some = smaller(kPixels, count - i);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t k = 0; k < some; ++k) y[c * pixels + i + k] = block.sums[(i + k) * kWidth + c];
      }
    }
  }

  // --- Pixels in the lanes: all positions, those between the rows computed for nothing.

  void along_pixels(const Samples& some) const {
    const int64_t items = some.count * args.out_channels;
    for_ranges(parallel_for, items, pixels * steps / kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t sample = item / args.out_channels, channel = item % args.out_channels;
        one_channel(planes_of(some, sample, channel / filters),
                    reinterpret_cast<const Word*>(args.weight) + channel * steps,
                    output(some.first + sample, channel));
      }
    });
  }

  void one_channel(const Word* x, const Word* weight, Word* y) const {
    Word sums[kStripWords];
    int64_t row = 0, column = 0;
    for (int64_t at = 0; at < positions(); at += kStripWords) {
      strip(x + at, weight, sums);
      const int64_t count = smaller(kStripWords, positions() - at);
      for (int64_t i = 0; i < count;) {  // the runs of the strip that are outputs
        const int64_t run = smaller(planes.pitch() - column, count - i);
        const int64_t kept = smaller(run, larger(0, args.width.outputs - column));
        std::memcpy(y + row * args.width.outputs + column, sums + i, sizeof(Word) * kept);
        i += run;
        column += run;
        if (column == planes.pitch()) {
          column = 0;
          ++row;
        }
      }
    }
  }

  void strip(const Word* x, const Word* weight, Word* to) const {
    RingVector sums[kStrip] = {};
    for (int64_t step = 0; step < steps; ++step) {
      const Word* from = x + offsets[step];
      for (int v = 0; v < kStrip; ++v) sums[v] += load_vector(from + v * Native<Word>::kWidth) * weight[step];
    }
    std::memcpy(to, sums, sizeof sums);
  }
};

}  // namespace
}  // namespace deepshare::cpu
