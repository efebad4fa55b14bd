// What the kernels know about a dtype, 16-byte accesses, and the arithmetic of the gate.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "memory_access.cuh"
#include "shared_relu.h"

// Shared memory whose size the launch gives, as `unsigned char* name`, 16-byte aligned.
#if defined(__CUDACC__)
#define DEEPSHARE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define DEEPSHARE_DYNAMIC_SHARED(name) unsigned char* const name = emulation::dynamic_shared()
#endif

namespace deepshare::cuda {

constexpr int kBytesPerAccess = 16;

// Wide: type of alpha, beta and all arithmetic. kVector: elements of a 16-byte access.
template <class T>
struct Traits {
  using Wide = float;
  static constexpr int kVector = kBytesPerAccess / sizeof(T);
};
template <>
struct Traits<double> {
  using Wide = double;
  static constexpr int kVector = 2;
};
template <class T>
using Wide = typename Traits<T>::Wide;

static_assert(Traits<float>::kVector == 4 && Traits<__half>::kVector == 8 &&
              Traits<__nv_bfloat16>::kVector == 8);

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline double widen(double v) { return v; }

template <class T>
__device__ inline T narrow(Wide<T> v);
template <>
__device__ inline float narrow<float>(float v) {
  return v;
}
template <>
__device__ inline __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline double narrow<double>(double v) {
  return v;
}

template <class T>
__device__ inline auto narrow_pair(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    return __floats2half2_rn(first, second);
  } else {
    return __floats2bfloat162_rn(first, second);
  }
}

// Rounded once each and never contracted: every backend gives the same bits for hard gates.
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }

// Two sums, each rounded to T once. The same bits as rounding to float first: float has more than 2 p + 2
// bits for the p of either type, so the second rounding cannot differ.
__device__ inline __half2 add_pair(__half2 a, __half2 b) { return __hadd2_rn(a, b); }
__device__ inline __nv_bfloat162 add_pair(__nv_bfloat162 a, __nv_bfloat162 b) { return __hadd2_rn(a, b); }

// V neighbours in memory, moved in accesses of at most 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < kBytesPerAccess ? sizeof(T) * V : kBytesPerAccess) Pack {
  T lane[V];
};
static_assert(sizeof(Pack<float, 4>) == 16 && alignof(Pack<__half, 8>) == 16 &&
              alignof(Pack<float, 8>) == 16);

// The word in which n bytes are moved.
template <size_t kBytes>
using WordOf = std::conditional_t<
    kBytes == 2, unsigned short,
    std::conditional_t<kBytes == 4, unsigned, std::conditional_t<kBytes == 8, uint2, uint4>>>;

// Rounded to T. 16-bit types two at a time: one instruction, and no register holds half a word.
template <class T, int V>
__device__ inline Pack<T, V> narrow_all(const Wide<T> (&values)[V]) {
  Pack<T, V> packed;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      const auto pair = narrow_pair<T>(values[k], values[k + 1]);
      memcpy(&packed.lane[k], &pair, sizeof(pair));
    }
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) packed.lane[k] = narrow<T>(values[k]);
  }
  return packed;
}

// Element by element, rounded to T.
template <class T, int V>
__device__ inline Pack<T, V> add_all(const Pack<T, V>& a, const Pack<T, V>& b) {
  Pack<T, V> sum;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      decltype(narrow_pair<T>(0.f, 0.f)) first, second;
      memcpy(&first, &a.lane[k], sizeof(first));
      memcpy(&second, &b.lane[k], sizeof(second));
      first = add_pair(first, second);
      memcpy(&sum.lane[k], &first, sizeof(first));
    }
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) sum.lane[k] = narrow<T>(add(widen(a.lane[k]), widen(b.lane[k])));
  }
  return sum;
}

// V neighbours of global memory that no kernel running now writes, through the read-only path.
template <int V, class T>
__device__ inline Pack<T, V> load(const T* from) {
  Pack<T, V> values;
  using Word = WordOf<(sizeof(values) < kBytesPerAccess ? sizeof(values) : kBytesPerAccess)>;
#pragma unroll
  for (int w = 0; w < int(sizeof(values) / sizeof(Word)); ++w) {
    const Word word = __ldg(reinterpret_cast<const Word*>(from) + w);
    memcpy(reinterpret_cast<unsigned char*>(&values) + w * sizeof(Word), &word, sizeof(Word));
  }
  return values;
}

// The same where `valid`, else zeros; one access of at most 16 bytes (memory_access.cuh).
template <int V, class T>
__device__ inline Pack<T, V> load_if(bool valid, const T* from) {
  Pack<T, V> values;
  using Word = WordOf<sizeof(values)>;
  const Word word = load_word(valid, reinterpret_cast<const Word*>(from));
  memcpy(&values, &word, sizeof(word));
  return values;
}

template <int V, class T>
__device__ inline void store_if(bool valid, T* to, const Pack<T, V>& values) {
  using Word = WordOf<sizeof(values)>;
  Word word;
  memcpy(&word, &values, sizeof(word));
  store_word(valid, reinterpret_cast<Word*>(to), word);
}
template <int V, class T>
__device__ inline void store(T* to, const Pack<T, V>& values) {
  store_if<V>(true, to, values);
}
template <int V, class T>
__device__ inline Pack<T, V> load_shared(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <int V, class T>
__device__ inline void store_shared(T* to, const Pack<T, V>& values) {
  *reinterpret_cast<Pack<T, V>*>(to) = values;
}

// What z and the gradient are multiplied by.
template <class W>
__device__ inline W slope_of(W alpha, W gate, W beta) {
  return add(multiply(alpha, gate), beta);
}

// Phi(gamma * s); NaN gives NaN.
template <class W>
__device__ inline W soft_gate(W s, W gamma) {
  constexpr W kInvSqrt2 = W(0.70710678118654752440);
  return W(0.5) * (W(1) + erf(gamma * s * kInvSqrt2));
}

// 1[s >= 0]; NaN gives 0.
template <class W>
__device__ inline W hard_gate(W s) {
  return s >= W(0) ? W(1) : W(0);
}

// d Phi(gamma * s) / d s = gamma * phi(gamma * s)
template <class W>
__device__ inline W gate_slope(W s, W gamma) {
  constexpr W kInvSqrt2Pi = W(0.39894228040143267794);
  const W z = gamma * s;
  return gamma * (exp(W(-0.5) * z * z) * kInvSqrt2Pi);
}

// Sum over the first `width` lanes (a power of two), in a fixed order; valid in lane 0 of each run of `width`
// lanes.
template <class W>
__device__ inline W warp_sum(W value, int width) {
  for (int step = width / 2; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step, width);
  return value;
}

}  // namespace deepshare::cuda
