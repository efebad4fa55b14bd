// The transpose of 64 words of 64 bits: how a tile's gates pass from pixels to channels and back.
#pragma once

#include "lanes.h"

namespace deepshare::cpu {
namespace {

typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kWordsWide = kVectorBytes / 8;

// A step of transpose_bits between words that lie `kDistance` apart in different vectors.
template <int kDistance>
void swap_apart(Words* rows, uint64_t low) {
  constexpr int kApart = kDistance / kWordsWide;
  for (int base = 0; base < 64 / kWordsWide; base += 2 * kApart) {
    for (int r = base; r < base + kApart; ++r) {
      const Words changed = (rows[r] >> kDistance ^ rows[r + kApart]) & low;
      rows[r] ^= changed << kDistance;
      rows[r + kApart] ^= changed;
    }
  }
}

// The same within vectors.
template <int kDistance>
void swap_within(Words* rows, uint64_t low) {
  Words partner, first;  // word r's partner is word r ^ kDistance; `first`: all ones where it comes before
  for (int i = 0; i < kWordsWide; ++i) {
    partner[i] = static_cast<uint64_t>(i ^ kDistance);
    first[i] = (i & kDistance) == 0 ? ~uint64_t{0} : 0;
  }
  const Words kept = (first & low) | (~first & ~low), from_next = first & ~low, from_last = ~first & low;
  for (int r = 0; r < 64 / kWordsWide; ++r) {
    const Words other = __builtin_shuffle(rows[r], partner);
    rows[r] = (rows[r] & kept) | ((other << kDistance) & from_next) | ((other >> kDistance) & from_last);
  }
}

template <int kDistance>
void swap_step(Words* rows, uint64_t low) {
  if constexpr (kDistance >= kWordsWide) {
    swap_apart<kDistance>(rows, low);
  } else {
    swap_within<kDistance>(rows, low);
  }
}

// Bit b of word r and bit r of word b change places (Hacker's Delight, 7-3).
inline void transpose_bits(uint64_t* words) {
  Words rows[64 / kWordsWide];
  std::memcpy(rows, words, sizeof rows);
  swap_step<32>(rows, 0x00000000ffffffff);
  swap_step<16>(rows, 0x0000ffff0000ffff);
  swap_step<8>(rows, 0x00ff00ff00ff00ff);
  swap_step<4>(rows, 0x0f0f0f0f0f0f0f0f);
  swap_step<2>(rows, 0x3333333333333333);
  swap_step<1>(rows, 0x5555555555555555);
  std::memcpy(words, rows, sizeof rows);
}

}  // namespace
}  // namespace deepshare::cpu
