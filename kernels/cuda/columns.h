// The column walk: a tensor (outer, C, inner) as `outer` rows of C * inner columns. A thread keeps V
// neighbouring columns, whose channels, affine values and gate offsets it reads once, and walks rows. It
// serves channels last (inner is 1) and rows whose length is no multiple of a 16-byte access (7x7 maps, 14x14
// in 16 bits): there a vector of V positions may span two channels, but always the same two.
#pragma once

#include "launch.h"

namespace deepshare::cuda {

// A block has `width` times `height` threads: width * V columns, height rows at a time, `rows` rows in all.
struct Columns {
  int64_t columns;  // C * inner
  int64_t rows;     // of a chunk
  int64_t chunks;
  int64_t blocks;  // side by side
  int width;       // threads
  int height;
};

// Threads that hold whole channels and whole vectors: sums of a channel then stay in one block.
inline int64_t column_unit(int64_t inner, int64_t vector) { return inner / std::gcd(inner, vector); }

// Whether the walk can be taken for a tensor with more than one position a channel.
inline bool has_columns(const Geometry& g, int64_t vector) {
  const int64_t widest = std::max(g.channels, g.source_channels) * ceil_div(g.inner, 8) * 8;
  return (g.channels * g.inner) % vector == 0 && column_unit(g.inner, vector) <= kThreads &&
         widest < (int64_t(1) << 31);  // gate offsets within a row are 32 bits
}

// As wide as `widest` of a block's threads allow in whole units, with equal blocks.
inline Columns columns_of(int64_t columns, int64_t vector, int64_t unit, int64_t widest, int64_t threads) {
  const int64_t units = columns / vector / unit;
  const int64_t fitting = std::max<int64_t>(widest / unit, 1);
  const int64_t blocks = ceil_div(units, fitting);
  const int64_t width = unit * ceil_div(units, blocks);
  return {columns,
          0,
          0,
          ceil_div(units * unit, width),
          static_cast<int>(width),
          static_cast<int>(threads / width)};
}

}  // namespace deepshare::cuda
