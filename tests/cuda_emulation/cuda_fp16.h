// __half for a C++ compiler (emulation.h).
#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
// The sum of two halves is exact in double: rounded once.
inline __half __hadd_rn(__half a, __half b) {
  return {static_cast<_Float16>(static_cast<double>(a.value) + static_cast<double>(b.value))};
}
inline __half2 __hadd2_rn(__half2 a, __half2 b) { return {__hadd_rn(a.x, b.x), __hadd_rn(a.y, b.y)}; }
