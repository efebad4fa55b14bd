// The leaves of the carry tree (deepshare/secure/engine/carry.py): of each 4-bit block of e' = (e << 1) | 1,
// two bits of a 16-bit word, which two is public.
#pragma once

#include "plan.h"

namespace deepshare::cpu {
namespace {

constexpr int64_t kLeafPiece = 1024;  // gates whose bits fit into the first-level cache

// 8 bytes of 0 or 1 as the bits of one: byte k, times 2^(56 - 7 k), stands at bit 56 + k.
inline uint8_t gather_bits(const uint8_t* bytes) {
  uint64_t eight;
  std::memcpy(&eight, bytes, sizeof eight);
  return static_cast<uint8_t>(eight * 0x0102040810204080u >> 56);
}

struct CarryLeaves {
  const CarryLeavesArgs& args;
  ParallelFor parallel_for;

  CarryLeaves(const CarryLeavesArgs& args_, ParallelFor parallel) : args(args_), parallel_for(parallel) {}

  void run() const {
    const int64_t pieces = divide_up(args.gates, kLeafPiece);
    for_ranges(parallel_for, pieces, kLeafPiece * args.blocks, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece * kLeafPiece, count = smaller(kLeafPiece, args.gates - first);
        for (int64_t block = 0; block < args.blocks; ++block) leaves(block, first, count);
      }
    });
  }

  void leaves(int64_t block, int64_t first, int64_t count) const {
    const uint16_t* words = args.words + block * args.gates + first;
    const int64_t* opened = args.opened + first;
    uint8_t generate[kLeafPiece], propagate[kLeafPiece];
    for (int64_t i = 0; i < count; ++i) {
      const auto digit =
          static_cast<uint32_t>((static_cast<uint64_t>(opened[i]) << 1 | 1) >> (4 * block)) & 15;
      const uint32_t read = uint32_t{words[i]} >> (15 - digit), above = read >> 1 & 1;
      generate[i] = static_cast<uint8_t>(above);
      propagate[i] = static_cast<uint8_t>((read & 1) ^ above);
    }
    for (int64_t i = count; i % 8 != 0; ++i) generate[i] = propagate[i] = 0;
    const int64_t at = block * divide_up(args.gates, 8) + first / 8;
    for (int64_t i = 0; i < count; i += 8) {
      args.generate[at + i / 8] = gather_bits(generate + i);
      args.propagate[at + i / 8] = gather_bits(propagate + i);
    }
  }
};

}  // namespace
}  // namespace deepshare::cpu
