// Division by a number known at launch, as one multiplication: 64-bit division takes about 70 instructions
// on a GPU, and every thread would wait for two of them before its first load.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deepshare::cuda {

// n / divisor for 0 <= n < 2^63 and divisor >= 1. With l = ceil(log2 divisor) and magic = floor(2^(63+l) /
// divisor) + 1, magic * divisor exceeds 2^(63+l) by at most 2^l, so n * magic / 2^(63+l) is off by less than
// 1 / divisor (Granlund and Montgomery 1994, theorem 4.2).
struct FastDiv {
  uint64_t magic = 0;
  int64_t divisor = 1;
  int shift = 0;

  explicit FastDiv(int64_t by) : divisor(by) {
    int bits = 0;
    while (bits < 63 && (int64_t(1) << bits) < by) ++bits;
    if (bits == 0) return;
    magic = static_cast<uint64_t>((static_cast<unsigned __int128>(1) << (63 + bits)) /
                                  static_cast<unsigned __int128>(by)) +
            1;
    shift = bits - 1;
  }

  __device__ int64_t quotient(int64_t n) const {
    return divisor == 1 ? n : static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n), magic) >> shift);
  }
};

}  // namespace deepshare::cuda
