// Element types, and rows of them as rows of their accumulation type.
//
// Everything the kernels include stands in an unnamed namespace: kernels.cpp is compiled once per instruction
// set, and a function with external linkage would be merged across those objects into one that an older
// processor cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace deepshare::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using Accum = typename Accumulate<T>::type;

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Half> = true;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline void narrow(float value, BFloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value == value ? nearest_even : 0x7fc0u);
}

inline float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t rebias = magnitude >= 0x7c00u ? (255u - 31u) << 23
                                               : (127u - 15u) << 23;  // inf and NaN keep an all-ones exponent
  const float normal = float_of((magnitude << 13) + rebias);
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t bits = bits_of(magnitude < 0x0400u ? subnormal : normal);
  return float_of(bits | (uint32_t{value.bits} & 0x8000u) << 16);
}

inline void narrow(float value, Half& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - ((127u - 15u) << 10);
  // Below 2^-14 a half counts in steps of 2^-24, which is the spacing of floats at 0.5: the addition does the
  // rounding.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out.bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
}

template <class T>
void widen_row(const T* in, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (kIsHalf<T>) {
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    }
  }
#endif
  for (; i < count; ++i) out[i] = widen(in[i]);
}

template <class T>
void narrow_row(const float* in, int64_t count, T* out) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (kIsHalf<T>) {
    for (; i + 8 <= count; i += 8) {
      const __m128i halves =
          _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
    }
  }
#endif
  for (; i < count; ++i) narrow(in[i], out[i]);
}

// A row of T as a row of Accum<T>: the row itself where the types agree, else converted into `buffer`.
inline const float* load(const float* row, int64_t, float*) { return row; }
inline const double* load(const double* row, int64_t, double*) { return row; }
template <class T>
const float* load(const T* row, int64_t count, float* buffer) {
  widen_row(row, count, buffer);
  return buffer;
}

// Where to write a row of T in Accum<T>; store() then rounds it to its place.
inline float* target(float* row, float*) { return row; }
inline double* target(double* row, double*) { return row; }
template <class T>
float* target(T*, float* buffer) {
  return buffer;
}

inline void store(const float*, int64_t, float*) {}
inline void store(const double*, int64_t, double*) {}
template <class T>
void store(const float* values, int64_t count, T* row) {
  narrow_row(values, count, row);
}

}  // namespace
}  // namespace deepshare::cpu
