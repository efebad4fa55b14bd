// Hard gates where the channels are stored last (NHWC), or the rows are very short: a tile is up to 64 pixels
// with all channels. The prototypes' gates become a string of bits for each pixel, and these one of its
// channels.
#pragma once

#include "operands.h"
#include "transpose.h"

namespace deepshare::cpu {
namespace {

constexpr int64_t kPixelTile = 64;
// Bytes of x in a tile, where it may be shorter: what its first pass reads should still be in the first-level
// cache for the second.
constexpr int64_t kPixelTileBytes = 1024;

// Pixels handled at once, so that what belongs to a channel is loaded once for all of them.
constexpr int kPixelsAtOnce = 4;
// Groups of prototypes whose gates, where they come from x itself, are kept beside the loop over channels.
constexpr int kOwnGroups = 32;

// Only narrow ones: pixels apart are as many streams to prefetch, and at 4 KiB they share a cache set.
constexpr int64_t kNarrowPixel = 512;

// body(1 or kPixelsAtOnce as a constant, pixel) for pixels [first, last) of this many bytes.
template <class Body>
void each_pixels(int64_t first, int64_t last, int64_t bytes, const Body& body) {
  for (; bytes <= kNarrowPixel && first + kPixelsAtOnce <= last; first += kPixelsAtOnce) {
    body(std::integral_constant<int, kPixelsAtOnce>{}, first);
  }
  for (; first < last; ++first) body(std::integral_constant<int, 1>{}, first);
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
  int64_t tile;  // pixels
  // 0, or: gates come from x itself, and a group's are those of the group this many channels before it. Then
  // they need no strings.
  int64_t own_period = 0;
  int64_t whole_periods = 64;  // where P < 64: bits of the longest multiple of P in a word, and a word with
  uint64_t every_period = 1;   // bits 0, P, 2 P, ...

  template <class Args, class A>
  PixelPlan(const Args& args, uint8_t* emitted_, const Channels<A>& channels, int64_t element_bytes)
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
    const bool own = args.source == nullptr && packed == nullptr && emitted == nullptr;
    if (own && spread == Spread::kSame) own_period = whole_groups(width);
    if (own && spread == Spread::kPeriodic) own_period = in_groups();
    const int64_t fits = larger(4, smaller(kPixelTile, kPixelTileBytes / (width * element_bytes)));
    tile = spread == Spread::kAny || own_period > 0 ? kPixelTile : fits;
    if (prototypes >= 64) return;
    whole_periods = 64 / prototypes * prototypes;
    for (int64_t bit = prototypes; bit < 64; bit += prototypes) every_period |= uint64_t{1} << bit;
  }

 private:
  int64_t in_groups() const {
    if (prototypes % kLanes == 0) return prototypes <= kOwnGroups * kLanes ? prototypes : 0;
    return kLanes % prototypes == 0 ? kLanes : 0;
  }

  bool is_periodic() const {
    for (int64_t c = 0, p = 0; c < width; ++c, ++p) {
      if (p == prototypes) p = 0;
      if (prototype[c] != p) return false;
    }
    return prototypes <= width;
  }
};

// What the loop over a pixel's groups needs of a plan, by value.
struct PixelGroups {
  int64_t width, stride;  // of a pixel's values, and of its string
  int64_t own_period;
  uint32_t inside, spread;  // bits of a group's prototypes, and a factor that repeats them in it

  explicit PixelGroups(const PixelPlan& plan)
      : width(plan.width), stride(plan.mask_bytes), own_period(plan.own_period), inside(0xffff), spread(1) {
    if (plan.prototypes >= kLanes || plan.spread == Spread::kSame) return;
    inside = (1u << plan.prototypes) - 1;
    for (int64_t bit = plan.prototypes; bit < kLanes; bit += plan.prototypes) spread |= 1u << bit;
  }
};

// A group's gates in consecutive pixels.
template <int kPixels>
struct OpenBits {
  uint32_t of[kPixels];
};

// Where consecutive pixels begin: pointers, because indices from one pointer cost more instructions than the
// arithmetic.
template <int kPixels, class T, bool kResidual>
struct PixelRows {
  Input<T, kResidual> of[kPixels];

  PixelRows(const Input<T, kResidual>& z, int64_t at, int64_t width) {
    for (int k = 0; k < kPixels; ++k) of[k] = z.from(at + k * width);
  }
};

// body(c, extent, OpenBits) for each group of `kPixels` pixels, the first pixel's string at `bits`. Where
// gates come from x itself with a period in whole groups, no string is needed.
template <int kPixels, class T, bool kResidual, class Body>
inline void each_open_group(const PixelGroups& groups, const PixelRows<kPixels, T, kResidual>& rows,
                            const uint8_t* bits, const Body& body) {
  const int64_t width = groups.width;
  OpenBits<kPixels> open;
  if (groups.own_period == 0) {
    return each_group(width, [&](int64_t c, auto extent) {
      for (int k = 0; k < kPixels; ++k) open.of[k] = load_bits(bits + k * groups.stride + c / 8, Whole{});
      body(c, extent, open);
    });
  }
  const auto own = [&](int64_t c, auto extent) {
    for (int k = 0; k < kPixels; ++k) open.of[k] = non_negative(rows.of[k].at(c, extent));
  };
  if (groups.own_period == kLanes) {
    if (width >= kLanes) {
      own(0, Whole{});
    } else {
      own(0, Part{static_cast<int>(width)});
    }
    for (int k = 0; k < kPixels; ++k) open.of[k] = (open.of[k] & groups.inside) * groups.spread;
    return each_group(width, [&](int64_t c, auto extent) { body(c, extent, open); });
  }
  // In the order of memory, which the processor's prefetchers follow: a walk by prototypes took up to twice
  // as long.
  OpenBits<kPixels> kept[kOwnGroups];
  each_group(smaller(groups.own_period, width), [&](int64_t c, auto extent) {
    own(c, extent);
    if (groups.own_period < width) kept[c / kLanes] = open;
    body(c, extent, open);
  });
  int64_t group = 0, c = groups.own_period;
  for (; c + kLanes <= width; c += kLanes) {
    body(c, Whole{}, kept[group]);
    group = (group + 1) * kLanes == groups.own_period ? 0 : group + 1;
  }
  if (c < width) body(c, Part{static_cast<int>(width - c)}, kept[group]);
}

// One thread's bits of the tile at hand.
template <class T, bool kResidual>
class PixelGates {
 public:
  PixelGates(const PixelPlan& plan, const Input<T, kResidual>& z, const T* source)
      : plan_(plan),
        z_(z),
        source_(source),
        signs_(plan.tile * plan.sign_bytes + 8),
        masks_(plan.spread == Spread::kAny ? kPixelTile * plan.mask_bytes : 0),
        words_(plan.spread == Spread::kAny ? plan.sign_bytes * 8 : 0) {}

  // For pixels [first, first + count).
  void compute(int64_t first, int64_t count) {
    if (plan_.own_period > 0) return;
    if (plan_.packed != nullptr) {
      for (int64_t i = 0; i < count; ++i) unpack(first + i, string(i));
    } else if (source_ != nullptr) {
      signs(Input<T, false>{source_, nullptr}, plan_.source_width, first, count);
    } else {
      signs(z_, plan_.width, first, count);
    }
    if (plan_.emitted != nullptr) {
      for (int64_t i = 0; i < count; ++i) pack(first + i, string(i));
    }
    if (plan_.spread == Spread::kAny) return gather();
    if (plan_.spread == Spread::kSame) return;
    for (int64_t i = 0; i < count; ++i) repeat(reinterpret_cast<uint64_t*>(string(i)));
  }

  // The string of a pixel of the tile: bit c is channel c's gate.
  const uint8_t* of(int64_t i) const {
    return (plan_.spread == Spread::kAny ? masks_.get() : signs_.get()) + i * stride();
  }
  int64_t stride() const { return plan_.mask_bytes; }  // from pixel to pixel

 private:
  const PixelPlan& plan_;
  const Input<T, kResidual>& z_;
  const T* source_;
  Buffer<uint8_t> signs_, masks_;
  Buffer<uint64_t> words_;  // of each prototype, bit i is its gate at pixel i

  uint8_t* string(int64_t i) const { return signs_.get() + i * plan_.sign_bytes; }

  // In whole words, that later loads may be served from the store buffer: a load of a word from several
  // narrower stores waits until all stores before it have left for the cache.
  template <class Leader>
  void signs(Leader leader, int64_t width, int64_t first, int64_t count) const {
    const int64_t prototypes = plan_.prototypes, stride = plan_.sign_bytes;
    uint8_t* bits = signs_.get();
    for (int64_t at = first * width; at < (first + count) * width; at += width, bits += stride) {
      for (int64_t p = 0; p < prototypes; p += 64) {
        uint64_t word = 0;
        each_group(smaller(64, prototypes - p), [&](int64_t i, auto extent) {
          const uint32_t inside = (1u << extent.count) - 1;
          word |= uint64_t{non_negative(leader.at(at + p + i, extent)) & inside} << i;
        });
        std::memcpy(bits + p / 8, &word, sizeof word);
      }
    }
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
  void repeat(uint64_t* words) const {
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
    const int64_t period = plan_.prototypes, whole = plan_.whole_periods, step = 64 - whole;
    const uint64_t pattern = (words[0] & ((uint64_t{1} << period) - 1)) * plan_.every_period;
    for (int64_t w = 0, shift = 0; w < count; ++w) {
      words[w] = shift == 0 ? pattern : pattern >> shift | pattern << (whole - shift);
      shift += step;
      if (shift >= period) shift -= period;
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
