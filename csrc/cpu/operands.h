// What a hard call reads: z, and gates as bits.
#pragma once

#include <type_traits>

#include "plan.h"

namespace deepshare::cpu {
namespace {

// z: x, or x + residual rounded to x's type.
template <class T, bool kResidual>
struct Input {
  const T* x;
  const T* residual;

  template <class Extent>
  Lanes<Accum<T>> at(int64_t i, Extent extent) const {
    const Lanes<Accum<T>> values = load(x + i, extent);
    if constexpr (!kResidual) return values;
    return rounded<T>(values + load(residual + i, extent));
  }

  Input from(int64_t i) const { return {x + i, kResidual ? residual + i : nullptr}; }
};

// z for soft calls: a row of it in the accumulation type.
template <class T>
struct WideInput {
  const T* x;
  const T* residual;  // nullptr: z is x

  // x's row itself where it is z, else z in `buffer`.
  const Accum<T>* row(int64_t at, int64_t count, Accum<T>* buffer) const {
    if (residual == nullptr) return load(x + at, count, buffer);
    const Input<T, true> z{x, residual};
    each_group(count, [&](int64_t i, auto extent) { store(z.at(at + i, extent), buffer + i, extent); });
    return buffer;
  }
};

// A group's bits in a row of packed bits that begins at a whole byte; bytes beyond the row are not touched.
inline uint32_t load_bits(const uint8_t* from, Whole) {
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}
inline uint32_t load_bits(const uint8_t* from, Part part) {
  return part.count > 8 ? load_bits(from, Whole{}) : *from;
}
inline void store_bits(uint32_t bits, uint8_t* to, Whole) {
  const auto narrow = static_cast<uint16_t>(bits);
  std::memcpy(to, &narrow, sizeof narrow);
}
inline void store_bits(uint32_t bits, uint8_t* to, Part part) {
  const uint32_t inside = bits & ((1u << part.count) - 1);
  if (part.count > 8) return store_bits(inside, to, Whole{});
  *to = static_cast<uint8_t>(inside);
}

// Whether to write an output of rows of this many elements past the caches: it does not fit them, so that it
// would be gone before anyone reads it, and a store through the cache reads the line first; and every row is
// whole cache lines.
template <class T>
bool streams(const T* output, int64_t rows, int64_t row) {
  const int64_t bytes = row * static_cast<int64_t>(sizeof(T)), line = static_cast<int64_t>(kAlignment);
  return rows * bytes > last_level_cache() && bytes % line == 0 &&
         reinterpret_cast<uintptr_t>(output) % kAlignment == 0;
}

// Whether a group of elements is whole cache lines. With half lines streamed to several pixels in turn the
// backward pass over 64 MiB of bfloat16 took 4.4 times relu's time, without streaming 2.7 (forward 2.1, 2.5).
template <class T>
constexpr bool kWholeLines = kLanes * sizeof(T) % kAlignment == 0;

template <bool kStream, class T, class Extent>
void put(const Lanes<Accum<T>>& values, T* to, Extent extent) {
  if constexpr (kStream) {
    stream(values, to, extent);
  } else {
    store(values, to, extent);
  }
}

// run(std::bool_constant...) for what a call knows only when it runs.
template <class Run>
void with_flags(bool first, bool second, const Run& run) {
  if (first)
    return second ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
  return second ? run(std::false_type{}, std::true_type{}) : run(std::false_type{}, std::false_type{});
}

}  // namespace
}  // namespace deepshare::cpu
