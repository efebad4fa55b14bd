// What the kernels know about a dtype, 16-byte accesses, and the arithmetic of the gate.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "shared_relu.h"

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

// V neighbours in memory, moved in accesses of at most 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < kBytesPerAccess ? sizeof(T) * V : kBytesPerAccess) Pack {
  T lane[V];
};
static_assert(sizeof(Pack<float, 4>) == 16 && alignof(Pack<__half, 8>) == 16 &&
              alignof(Pack<float, 8>) == 16);

template <int V, class T>
__device__ inline Pack<T, V> load(const T* __restrict__ from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
// To global memory. __stwb (the ordinary store) because nvcc cuts assignments of a struct into elements in
// some loops.
template <int V, class T>
__device__ inline void store(T* __restrict__ to, const Pack<T, V>& values) {
  if constexpr (sizeof(values) == kBytesPerAccess) {
    uint4 word;
    memcpy(&word, &values, sizeof(word));
    __stwb(reinterpret_cast<uint4*>(to), word);
  } else {
    static_assert(V == 1, "a vector is one 16-byte access");
    *to = values.lane[0];
  }
}
template <int V, class T>
__device__ inline void store_shared(T* __restrict__ to, const Pack<T, V>& values) {
  *reinterpret_cast<Pack<T, V>*>(to) = values;
}

// Rounded once each and never contracted: every backend gives the same bits for hard gates.
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }

// v * (alpha * gate + beta): y of x, dx of grad.
template <class W>
__device__ inline W gated(W v, W alpha, W gate, W beta) {
  return multiply(v, add(multiply(alpha, gate), beta));
}

// 1[s >= 0], or Phi(gamma * s) where is_soft; NaN gives 0 and NaN.
template <bool kSoft, class W>
__device__ inline W gate_of(W s, bool is_soft, W gamma) {
  if constexpr (kSoft) {
    constexpr W kInvSqrt2 = W(0.70710678118654752440);
    if (is_soft) return W(0.5) * (W(1) + erf(gamma * s * kInvSqrt2));
  }
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
