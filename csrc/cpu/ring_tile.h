// The innermost loops of ring_conv2d: sums of products mod 2^64 for a few panels of 8 output channels (in the
// lanes of vectors) and a few neighbouring pixels.
//
// Whole words are multiplied two at a time (Winograd, "A new algorithm for inner product", 1968):
//   x1 w1 + x2 w2 = (x1 + w2) (x2 + w1) - x1 x2 - w1 w2
// The last two terms belong to a pixel and to a channel alone and are summed once for all channels and all
// pixels. On an EPYC (Zen 4) a vector's product and addition take 4/3 cycles, this form a cycle for each of
// the two products.
#pragma once

#include <type_traits>

#include "ring_planes.h"

namespace deepshare::cpu {
namespace {

using RingVector = Native<Word>::type;
constexpr int kPanel = 8;       // channels that a tile has one or more times
constexpr int kPackWidth = 32;  // channels side by side in a packed weight
constexpr int kVectorsOfPanel = kPanel / Native<Word>::kWidth;

// Panels and pixels of the largest tile: as many sums as the registers hold beside two steps' factors.
#if defined(__AVX512F__)
constexpr int kTilePanels = 4, kTilePixels = 4;
#elif defined(__AVX__)
constexpr int kTilePanels = 1, kTilePixels = 4;
#else
constexpr int kTilePanels = 1, kTilePixels = 2;
#endif

// Steps of a sum done for all pixels before the next ones, even: 4 panels' weights are half of a first-level
// cache.
constexpr int64_t kSteps = 64;

// Where the operands of a tile lie.
struct TileOf {
  const Word* x;           // of the first pixel
  const int64_t* offsets;  // [steps] from x to what a step reads
  int64_t steps;           // even
  const Word* weight;      // [steps][panels][8]
  Word* sums;              // [pixels][panels][8]
};

inline RingVector load_vector(const Word* from) {
  RingVector values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <int kPanels, int kPixels>
struct Sums {
  static constexpr int kVectors = kPanels * kVectorsOfPanel;
  RingVector of[kPixels][kVectors];

  void load(const Word* from) {
    for (auto& pixel : of) {
      for (auto& sum : pixel) sum = load_vector(from), from += Native<Word>::kWidth;
    }
  }
  void store(Word* to) const {
    for (const auto& pixel : of) {
      for (const auto& sum : pixel) std::memcpy(to, &sum, sizeof sum), to += Native<Word>::kWidth;
    }
  }

  static void load_step(const TileOf& tile, int64_t step, RingVector* w) {
    for (int v = 0; v < kVectors; ++v)
      w[v] = load_vector(tile.weight + step * kPanels * kPanel + v * Native<Word>::kWidth);
  }

  void add_pairs(const TileOf& tile) {
    for (int64_t step = 0; step < tile.steps; step += 2) {
      const Word *x1 = tile.x + tile.offsets[step], *x2 = tile.x + tile.offsets[step + 1];
      RingVector w1[kVectors], w2[kVectors];
      load_step(tile, step, w1);
      load_step(tile, step + 1, w2);
      for (int p = 0; p < kPixels; ++p) {
        for (int v = 0; v < kVectors; ++v) of[p][v] += (w2[v] + x1[p]) * (w1[v] + x2[p]);
      }
    }
  }
};

// sums += the tile's products, but for what the pairs leave over.
template <int kPanels, int kPixels>
void add_words(const TileOf& tile) {
  Sums<kPanels, kPixels> sums;
  sums.load(tile.sums);
  sums.add_pairs(tile);
  sums.store(tile.sums);
}

// Weights of 32 bits: a product of 64-bit words takes three of 32 bits without AVX-512, two suffice if x is
// given in signed 32-bit digits (AsDigits).
#if defined(__AVX2__) && !defined(__AVX512DQ__)
constexpr bool kByDigits = true;

template <int kDigit, int kPanels, int kPixels>
void add_digit(const TileOf& tile, Sums<kPanels, kPixels>& sums) {
  constexpr int kVectors = Sums<kPanels, kPixels>::kVectors;
  for (int64_t step = 0; step < tile.steps; ++step) {
    const Word* x = tile.x + tile.offsets[step];
    RingVector w[kVectors];
    sums.load_step(tile, step, w);
    for (int p = 0; p < kPixels; ++p) {
      const __m256i digit = _mm256_set1_epi32(static_cast<int>(x[p] >> (32 * kDigit)));
      for (int v = 0; v < kVectors; ++v)
        sums.of[p][v] +=
            reinterpret_cast<RingVector>(_mm256_mul_epi32(digit, reinterpret_cast<__m256i>(w[v])));
    }
  }
}

template <int kPanels, int kPixels>
void add_digits(const TileOf& tile) {
  Sums<kPanels, kPixels> sums{};
  add_digit<1>(tile, sums);
  for (int p = 0; p < kPixels; ++p) {
    for (int v = 0; v < sums.kVectors; ++v) {
      const Word* before = tile.sums + (p * sums.kVectors + v) * Native<Word>::kWidth;
      sums.of[p][v] = (sums.of[p][v] << 32) + load_vector(before);
    }
  }
  add_digit<0>(tile, sums);
  sums.store(tile.sums);
}
#else
constexpr bool kByDigits = false;

template <int kPanels, int kPixels>
void add_digits(const TileOf& tile) {
  add_words<kPanels, kPixels>(tile);
}
#endif

// The tiles of one row of pixels.
template <int kPanels, bool kDigits>
void add_row(TileOf tile, int64_t pixels) {
  const auto add = [&](auto count) {
    constexpr int kPixels = decltype(count)::value;
    if constexpr (kDigits) {
      add_digits<kPanels, kPixels>(tile);
    } else {
      add_words<kPanels, kPixels>(tile);
    }
    tile.x += kPixels;
    tile.sums += kPixels * kPanels * kPanel;
    pixels -= kPixels;
  };
  while (pixels >= kTilePixels) add(std::integral_constant<int, kTilePixels>{});
  if (pixels >= 2) add(std::integral_constant<int, 2>{});
  if (pixels >= 1) add(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace deepshare::cpu
