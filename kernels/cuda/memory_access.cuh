// Guarded accesses to global memory in PTX: predicates instead of branches. Behind a branch (a bounds check,
// an absent operand) ptxas moves a thread's loads to their use, and one is in flight where there should be
// several. It does so with loads of the read-only path even without a branch; these ordinary ones it must
// leave before the stores.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deepshare::cuda {

#if defined(__CUDACC__)

// Zero where not valid.
__device__ inline uint4 load_word(bool valid, const uint4* from) {
  uint4 word;
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
      " @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "=&r"(word.x), "=&r"(word.y), "=&r"(word.z), "=&r"(word.w)
      : "l"(from), "r"(unsigned(valid)));
  return word;
}
__device__ inline uint2 load_word(bool valid, const uint2* from) {
  uint2 word;
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;"
      " @p ld.global.v2.u32 {%0, %1}, [%2]; }"
      : "=&r"(word.x), "=&r"(word.y)
      : "l"(from), "r"(unsigned(valid)));
  return word;
}
__device__ inline unsigned load_word(bool valid, const unsigned* from) {
  unsigned word;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.u32 %0, [%1]; }"
               : "=&r"(word)
               : "l"(from), "r"(unsigned(valid)));
  return word;
}
__device__ inline unsigned short load_word(bool valid, const unsigned short* from) {
  unsigned short word;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u16 %0, 0; @p ld.global.u16 %0, [%1]; }"
               : "=&h"(word)
               : "l"(from), "r"(unsigned(valid)));
  return word;
}
__device__ inline unsigned load_byte(bool valid, const uint8_t* from) {
  unsigned byte;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.u8 %0, [%1]; }"
               : "=&r"(byte)
               : "l"(from), "r"(unsigned(valid)));
  return byte;
}

// Ordinary stores, not streaming ones: the next operation reads the result, from L2 where it fits.
__device__ inline void store_word(bool valid, uint4* to, uint4 word) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%4], {%0, %1, %2, %3}; }"
               :
               : "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "l"(to), "r"(unsigned(valid))
               : "memory");
}
__device__ inline void store_word(bool valid, uint2* to, uint2 word) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.u32 [%2], {%0, %1}; }"
               :
               : "r"(word.x), "r"(word.y), "l"(to), "r"(unsigned(valid))
               : "memory");
}
__device__ inline void store_word(bool valid, unsigned* to, unsigned word) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.u32 [%1], %0; }"
               :
               : "r"(word), "l"(to), "r"(unsigned(valid))
               : "memory");
}
__device__ inline void store_word(bool valid, unsigned short* to, unsigned short word) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.u16 [%1], %0; }"
               :
               : "h"(word), "l"(to), "r"(unsigned(valid))
               : "memory");
}

#else  // the emulation of the tests

template <class Word>
Word load_word(bool valid, const Word* from) {
  return valid ? __ldg(from) : Word{};
}
inline unsigned load_byte(bool valid, const uint8_t* from) { return valid ? __ldg(from) : 0; }
template <class Word>
void store_word(bool valid, Word* to, Word word) {
  if (valid) *emulation::aligned(to) = word;
}

#endif

}  // namespace deepshare::cuda
