// kLanes values of the accumulation type in vector registers, and rows of elements as a sequence of them. The
// number does not depend on the instruction set, so neither do sums kept by lane.
#pragma once

#include "element.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deepshare::cpu {
namespace {

constexpr int kLanes = 16;

// The widest vector of this build; kLanes elements are a whole number of them.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// GCC's and clang's vector type: written out, because their auto-vectorisers leave a loop with two running
// sums scalar.
template <class A>
struct Native {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(A));
};

// How many elements of a group are there: all, or the first `count` at the end of a row.
struct Whole {
  static constexpr int count = kLanes;
};
struct Part {
  int count;
};

#if defined(__AVX512F__)
// The masked form of an intrinsic, with this mask, where gcc 12 warns of the unmasked one's undefined
// operand.
constexpr __mmask16 kAll = 0xffff;
#endif

template <class A>
struct Lanes {
  using V = typename Native<A>::type;
  static constexpr int kWidth = Native<A>::kWidth, kParts = kLanes / kWidth;
  V part[kParts];

  static Lanes all(A value) {
    Lanes result;
    for (int k = 0; k < kParts; ++k) result.part[k] = V{} + value;
    return result;
  }
};

template <class A>
Lanes<A> operator+(Lanes<A> a, const Lanes<A>& b) {
  for (int k = 0; k < Lanes<A>::kParts; ++k) a.part[k] += b.part[k];
  return a;
}

template <class A>
Lanes<A> operator-(Lanes<A> a, const Lanes<A>& b) {
  for (int k = 0; k < Lanes<A>::kParts; ++k) a.part[k] -= b.part[k];
  return a;
}

template <class A>
Lanes<A> operator*(Lanes<A> a, const Lanes<A>& b) {
  for (int k = 0; k < Lanes<A>::kParts; ++k) a.part[k] *= b.part[k];
  return a;
}

// Bit i: a[i] >= 0, which is 1 at -0.0 and 0 at NaN.
template <class A>
uint32_t non_negative(const Lanes<A>& a) {
  uint32_t bits = 0;
  for (int k = 0; k < Lanes<A>::kParts; ++k) {
    const auto v = a.part[k];
    uint32_t some = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) some = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GE_OQ);
    if constexpr (sizeof(A) == 8) some = _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_GE_OQ);
#elif defined(__AVX__)
    if constexpr (sizeof(A) == 4)
      some = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GE_OQ)));
    if constexpr (sizeof(A) == 8)
      some = static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_GE_OQ)));
#elif defined(__x86_64__)
    if constexpr (sizeof(A) == 4)
      some = static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps(v, _mm_setzero_ps())));
    if constexpr (sizeof(A) == 8)
      some = static_cast<uint32_t>(_mm_movemask_pd(_mm_cmpge_pd(v, _mm_setzero_pd())));
#else
    for (int i = 0; i < Lanes<A>::kWidth; ++i) some |= uint32_t{v[i] >= A(0)} << i;
#endif
    bits |= some << (k * Lanes<A>::kWidth);
  }
  return bits;
}

// on where the bit is 1, else off.
template <class A>
Lanes<A> select(uint32_t bits, const Lanes<A>& on, const Lanes<A>& off) {
  Lanes<A> result;
  for (int k = 0; k < Lanes<A>::kParts; ++k) {
    const uint32_t some = bits >> (k * Lanes<A>::kWidth);
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4)
      result.part[k] = _mm512_mask_blend_ps(static_cast<__mmask16>(some), off.part[k], on.part[k]);
    if constexpr (sizeof(A) == 8)
      result.part[k] = _mm512_mask_blend_pd(static_cast<__mmask8>(some), off.part[k], on.part[k]);
#else
    using Int = decltype(on.part[k] < on.part[k]);
    Int weights;
    for (int i = 0; i < Lanes<A>::kWidth; ++i) weights[i] = decltype(weights[0] + 0)(1) << i;
    const Int chosen = ((Int{} + static_cast<decltype(weights[0] + 0)>(some)) & weights) != 0;
    result.part[k] = chosen ? on.part[k] : off.part[k];
#endif
  }
  return result;
}

// --- Rows of elements.

template <class A>
Lanes<A> load_wide(const A* from) {
  Lanes<A> values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Lanes<float> load(const float* from, Whole) { return load_wide(from); }
inline Lanes<double> load(const double* from, Whole) { return load_wide(from); }

inline Lanes<float> load(const BFloat16* from, Whole) {
  constexpr int kWidth = Lanes<float>::kWidth;
  typedef uint16_t Narrow __attribute__((vector_size(2 * kWidth)));
  typedef uint32_t Wide __attribute__((vector_size(4 * kWidth)));
  Lanes<float> values;
  for (int k = 0; k < Lanes<float>::kParts; ++k) {
    Narrow bits;
    std::memcpy(&bits, from + k * kWidth, sizeof bits);
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;
    std::memcpy(&values.part[k], &wide, sizeof wide);
  }
  return values;
}

inline Lanes<float> load(const Half* from, Whole) {
#if defined(__AVX512F__)
  return {_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
#elif defined(__F16C__)
  const __m128i* halves = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
#else
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = widen(from[i]);
  return load_wide(values);
#endif
}

// The lanes beyond the part are 0.
template <class T>
Lanes<Accum<T>> load(const T* from, Part part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    T values[kLanes];
    const auto mask = static_cast<__mmask16>((1u << part.count) - 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm256_maskz_loadu_epi16(mask, from));
    return load(values, Whole{});
  } else if constexpr (sizeof(T) == 4) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << part.count) - 1), from)};
  } else {
    const uint32_t mask = (1u << part.count) - 1;
    return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from),
            _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask >> 8), from + 8)};
  }
#else
  T values[kLanes] = {};
  for (int i = 0; i < part.count; ++i) values[i] = from[i];
  return load(values, Whole{});
#endif
}

inline void store(const Lanes<float>& values, float* to, Whole) { std::memcpy(to, &values, sizeof values); }
inline void store(const Lanes<double>& values, double* to, Whole) { std::memcpy(to, &values, sizeof values); }

inline void store(const Lanes<float>& values, BFloat16* to, Whole) {
  constexpr int kWidth = Lanes<float>::kWidth;
  typedef uint16_t Narrow __attribute__((vector_size(2 * kWidth)));
  typedef uint32_t Wide __attribute__((vector_size(4 * kWidth)));
  for (int k = 0; k < Lanes<float>::kParts; ++k) {
    Wide bits;
    std::memcpy(&bits, &values.part[k], sizeof bits);
    const Wide nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto is_nan = values.part[k] != values.part[k];
    const Wide rounded = is_nan ? Wide{} + 0x7fc0u : nearest_even;
    const Narrow narrow = __builtin_convertvector(rounded, Narrow);
    std::memcpy(to + k * kWidth, &narrow, sizeof narrow);
  }
}

inline void store(const Lanes<float>& values, Half* to, Whole) {
  constexpr int kNearest [[maybe_unused]] = 0x08;  // to nearest even, no exceptions
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(kAll, values.part[0], kNearest));
#elif defined(__F16C__)
  for (int k = 0; k < 2; ++k) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + k, _mm256_cvtps_ph(values.part[k], kNearest));
  }
#else
  float wide[kLanes];
  std::memcpy(wide, &values, sizeof wide);
  for (int i = 0; i < kLanes; ++i) narrow(wide[i], to[i]);
#endif
}

template <class T>
void store(const Lanes<Accum<T>>& values, T* to, Part part) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << part.count) - 1;
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), values.part[0]);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), values.part[0]);
    return _mm512_mask_storeu_pd(to + 8, static_cast<__mmask8>(mask >> 8), values.part[1]);
  }
#endif
  T all[kLanes];
  store(values, all, Whole{});
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(all));
    return _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), halves);
  }
#endif
  for (int i = 0; i < part.count; ++i) to[i] = all[i];
}

// Past the caches; `to` is a multiple of the stored bytes.
template <class T>
void stream(const Lanes<Accum<T>>& values, T* to, Whole whole) {
#if defined(__AVX__)
  T all[kLanes];
  store(values, all, whole);
  constexpr int kStep = sizeof(all) % kVectorBytes == 0 ? kVectorBytes : 32;
  for (size_t k = 0; k < sizeof(all); k += kStep) {
    char* const place = reinterpret_cast<char*>(to) + k;
    const char* const from = reinterpret_cast<const char*>(all) + k;
#if defined(__AVX512F__)
    if constexpr (kStep == 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(place), _mm512_loadu_si512(from));
      continue;
    }
#endif
    const auto vector = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(place), vector);
  }
#else
  store(values, to, whole);
#endif
}
template <class T>
void stream(const Lanes<Accum<T>>& values, T* to, Part part) {
  store(values, to, part);
}

// Makes streamed stores visible before the call returns.
inline void end_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The values as they are once rounded to T.
template <class T>
Lanes<Accum<T>> rounded(const Lanes<Accum<T>>& values) {
  if constexpr (sizeof(T) == sizeof(Accum<T>)) return values;
  T narrow[kLanes];
  store(values, narrow, Whole{});
  return load(narrow, Whole{});
}

// body(i, Whole or Part) for each group of a row of `count` elements, i its first.
template <class Body>
inline void each_group(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, Whole{});
  if (i < count) body(i, Part{static_cast<int>(count - i)});
}

}  // namespace
}  // namespace deepshare::cpu
