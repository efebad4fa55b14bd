// Hard gates where the channels are stored last (NHWC), or the rows are very short: a tile is up to 64 pixels
// with all channels. The prototypes' gates become a string of bits for each pixel, and these one of its
// channels.
#pragma once

#include "operands.h"

namespace deepshare::cpu {
namespace {

constexpr int64_t kPixelTile = 64;

// Bit b of word r and bit r of word b change places (Hacker's Delight, 7-3).
inline void transpose_bits(uint64_t* words) {
  uint64_t low = 0x00000000ffffffffu;
  for (int distance = 32; distance > 0; distance /= 2, low ^= low << distance) {
    for (int base = 0; base < 64; base += 2 * distance) {
      for (int r = base; r < base + distance; ++r) {
        const uint64_t changed = (words[r] >> distance ^ words[r + distance]) & low;
        words[r] ^= changed << distance;
        words[r + distance] ^= changed;
      }
    }
  }
}

// How prototypes' bits become channels' bits.
enum class Spread {
  kSame,      // pi[c] = c
  kPeriodic,  // pi[c] = c mod P
  kAny,
};

struct PixelPlan {
  const int32_t* prototype;  // of each of `width` values of a pixel
  int64_t width, prototypes, source_width;
  int64_t inner, rows;  // channel c's values are c * inner + i; rows of packed gates
  const uint8_t* packed;
  uint8_t* emitted;
  int64_t sign_bytes, mask_bytes;  // of a pixel's strings, in whole words
  Spread spread;

  template <class Args, class A>
  PixelPlan(const Args& args, uint8_t* emitted_, const Channels<A>& channels)
      : prototype(channels.prototype),
        width(channels.count),
        prototypes(channels.prototypes),
        source_width(channels.source_count),
        inner(channels.repeat),
        rows(args.geometry.prototypes),
        packed(args.gates),
        emitted(emitted_),
        mask_bytes(divide_up(width, 64) * 8) {
    if (emitted != nullptr) prototypes = larger(prototypes, rows * inner);
    const bool periodic = is_periodic();
    spread = !periodic ? Spread::kAny : prototypes == width ? Spread::kSame : Spread::kPeriodic;
    sign_bytes = spread == Spread::kAny ? divide_up(prototypes, 64) * 8 : mask_bytes;
  }

 private:
  bool is_periodic() const {
    for (int64_t c = 0, p = 0; c < width; ++c, ++p) {
      if (p == prototypes) p = 0;
      if (prototype[c] != p) return false;
    }
    return prototypes <= width;
  }
};

// One thread's bits of the tile at hand.
template <class T, bool kResidual>
class PixelGates {
 public:
  PixelGates(const PixelPlan& plan, const Input<T, kResidual>& z, const T* source)
      : plan_(plan),
        z_(z),
        source_(source),
        signs_(kPixelTile * plan.sign_bytes + 8),
        masks_(plan.spread == Spread::kAny ? kPixelTile * plan.mask_bytes : 0),
        words_(plan.spread == Spread::kAny ? plan.sign_bytes * 8 : 0) {}

  // For pixels [first, first + count).
  void compute(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* const bits = signs_.get() + i * plan_.sign_bytes;
      if (plan_.packed != nullptr) {
        unpack(first + i, bits);
      } else if (source_ != nullptr) {
        signs(Input<T, false>{source_, nullptr}, (first + i) * plan_.source_width, bits);
      } else {
        signs(z_, (first + i) * plan_.width, bits);
      }
      if (plan_.emitted != nullptr) pack(first + i, bits);
    }
    if (plan_.spread == Spread::kPeriodic) {
      for (int64_t i = 0; i < count; ++i) repeat(signs_.get() + i * plan_.sign_bytes);
    }
    if (plan_.spread == Spread::kAny) gather();
  }

  // The string of a pixel of the tile: bit c is channel c's gate.
  const uint8_t* of(int64_t i) const {
    return plan_.spread == Spread::kAny ? masks_.get() + i * plan_.mask_bytes
                                        : signs_.get() + i * plan_.sign_bytes;
  }

 private:
  const PixelPlan& plan_;
  const Input<T, kResidual>& z_;
  const T* source_;
  Buffer<uint8_t> signs_, masks_;
  Buffer<uint64_t> words_;  // of each prototype, bit i is its gate at pixel i

  template <class Leader>
  void signs(const Leader& leader, int64_t at, uint8_t* bits) const {
    each_group(plan_.prototypes, [&](int64_t p, auto extent) {
      const uint32_t inside = (1u << extent.count) - 1;
      store_bits(non_negative(leader.at(at + p, extent)) & inside, bits + p / 8, Whole{});
    });
  }

  // From a pixel's packed gates: the string itself, or with short rows, a row of whole bytes per prototype.
  void unpack(int64_t pixel, uint8_t* bits) const {
    const int64_t row = divide_up(plan_.inner, 8);
    if (plan_.inner == 1) {
      const int64_t bytes = divide_up(plan_.rows, 8), used = divide_up(plan_.prototypes, 8);
      std::memcpy(bits, plan_.packed + pixel * bytes, static_cast<size_t>(used));
      return;
    }
    std::memset(bits, 0, static_cast<size_t>(plan_.sign_bytes));
    const uint8_t* from = plan_.packed + pixel * plan_.rows * row;
    for (int64_t k = 0; k < plan_.prototypes; k += plan_.inner, from += row) {
      const uint32_t gates = load_bits(from, Part{static_cast<int>(plan_.inner)});
      uint32_t word;
      std::memcpy(&word, bits + k / 8, sizeof word);
      word |= gates << (k % 8);
      std::memcpy(bits + k / 8, &word, sizeof word);
    }
  }

  void pack(int64_t pixel, const uint8_t* bits) const {
    const int64_t row = divide_up(plan_.inner, 8);
    if (plan_.inner == 1) {
      const int64_t bytes = divide_up(plan_.rows, 8);
      std::memcpy(plan_.emitted + pixel * bytes, bits, static_cast<size_t>(bytes));
      return;
    }
    uint8_t* to = plan_.emitted + pixel * plan_.rows * row;
    for (int64_t p = 0; p < plan_.rows; ++p, to += row) {
      uint32_t word;
      std::memcpy(&word, bits + p * plan_.inner / 8, sizeof word);
      store_bits(word >> (p * plan_.inner % 8), to, Part{static_cast<int>(plan_.inner)});
    }
  }

  // Continues a string of P bits with period P.
  void repeat(uint8_t* string) const {
    uint64_t* const words = reinterpret_cast<uint64_t*>(string);
    const int64_t period = plan_.prototypes, count = plan_.mask_bytes / 8;
    if (period < 64) return repeat_short(words, count);
    const int64_t whole = period / 64, bits = period % 64;
    if (bits > 0) words[whole] = (words[whole] & ((uint64_t{1} << bits) - 1)) | words[0] << bits;
    for (int64_t w = whole + (bits > 0); w < count; ++w) {
      const int64_t from = 64 * w - period;  // both words of it are known: P >= 64
      const int64_t shift = from % 64;
      words[w] = words[from / 64] >> shift;
      if (shift > 0) words[w] |= words[from / 64 + 1] << (64 - shift);
    }
  }

  void repeat_short(uint64_t* words, int64_t count) const {
    const int64_t period = plan_.prototypes;
    uint64_t pattern = words[0] & ((uint64_t{1} << period) - 1);
    int64_t filled = period;
    for (; filled < 64; filled *= 2) pattern |= pattern << filled;
    const int64_t whole = 64 / period * period;  // the longest multiple of the period in a word
    for (int64_t w = 0, shift = 0; w < count; ++w) {
      words[w] = shift == 0 ? pattern : pattern >> shift | pattern << (whole - shift);
      shift = (shift + 64) % period;
    }
  }

  // Through the transposed bits: a channel takes its prototype's word whole, for 64 pixels at once.
  void gather() const {
    const int64_t sign_words = plan_.sign_bytes / 8, mask_words = plan_.mask_bytes / 8;
    for (int64_t w = 0; w < sign_words; ++w) {
      for (int64_t i = 0; i < kPixelTile; ++i) {
        std::memcpy(words_.get() + 64 * w + i, signs_.get() + (i * sign_words + w) * 8, 8);
      }
      transpose_bits(words_.get() + 64 * w);
    }
    uint64_t block[64];
    for (int64_t w = 0; w < mask_words; ++w) {
      for (int64_t b = 0; b < 64; ++b) {
        const int64_t c = 64 * w + b;
        block[b] = c < plan_.width ? words_[plan_.prototype[c]] : 0;
      }
      transpose_bits(block);
      for (int64_t i = 0; i < kPixelTile; ++i)
        std::memcpy(masks_.get() + (i * mask_words + w) * 8, block + i, 8);
    }
  }
};

}  // namespace
}  // namespace deepshare::cpu
