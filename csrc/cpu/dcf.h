// The DCF gate on the CPU (deepshare/secure/engine/dcf.py and dealer/dcf_keys.py say what is computed). All
// pointers are host memory; G gates, keys of 16 * (bits - 6) bytes.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace deepshare::cpu {

constexpr int64_t kBlockBytes = 16;
constexpr int64_t kLeafLevels = 7;

struct DcfEvaluateArgs {
  const uint8_t* keys;        // [G, key_bytes(bits)]
  const uint8_t* roots;       // [G, 16]
  const int64_t* points;      // [G]
  const uint8_t* public_key;  // [16]
  int64_t party, bits, gates;
  uint8_t* shares;  // [ceil(G / 8)]
};

struct DcfGenerateArgs {
  const int64_t* alphas;      // [G]
  const uint8_t* roots[2];    // [G, 16]
  const uint8_t* public_key;  // [16]
  int64_t bits, gates;
  uint8_t* keys;  // [G, key_bytes(bits)]
};

constexpr int64_t dcf_key_bytes(int64_t bits) { return kBlockBytes * (bits - kLeafLevels + 1); }

// One instruction set's build.
struct DcfKernels {
  const char* instruction_set;
  void (*evaluate)(const DcfEvaluateArgs& args, ParallelFor parallel_for);
  void (*generate)(const DcfGenerateArgs& args, ParallelFor parallel_for);
};

// The widest build that this processor can run, or nullptr where it has no AES instructions: there is no
// other form in C++, because one with tables would show its secrets in the cache.
const DcfKernels* best_dcf_kernels();

}  // namespace deepshare::cpu
