// The operators on the CPU. The argument structs are those of the CUDA launchers, so that one binding fills
// both; here every pointer is host memory, `workspace` is not used, and `prototypes` may be an upper bound.
#pragma once

#include <cstdint>

#include "../../kernels/cuda/masked_relu.h"
#include "../../kernels/cuda/ring_conv.h"
#include "../../kernels/cuda/share.h"
#include "../../kernels/cuda/shared_relu.h"

namespace deepshare::cpu {

using cuda::BackwardArgs;
using cuda::Dtype;
using cuda::ForwardArgs;
using cuda::Geometry;
using cuda::MaskedBackwardArgs;
using cuda::MaskedForwardArgs;
using cuda::RingConvArgs;
using cuda::ShareArgs;

// Calls body(first, last, context) on disjoint ranges that cover [begin, end), each of at least `grain`
// items, possibly at once.
using RangeBody = void (*)(int64_t first, int64_t last, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);

// words [blocks, gates], block 0 the lowest; generate, propagate [blocks, ceil(gates / 8)], packed.
struct CarryLeavesArgs {
  const uint16_t* words;
  const int64_t* opened;  // [gates]
  int64_t blocks, gates;
  uint8_t* generate;
  uint8_t* propagate;
};

// One instruction set's build of the kernels. The bits of a result depend neither on it nor on the number of
// threads.
struct Kernels {
  const char* instruction_set;
  void (*forward)(const ForwardArgs& args, ParallelFor parallel_for);
  void (*backward)(const BackwardArgs& args, ParallelFor parallel_for);
  void (*masked_forward)(const MaskedForwardArgs& args, ParallelFor parallel_for);
  void (*masked_backward)(const MaskedBackwardArgs& args, ParallelFor parallel_for);
  void (*share)(const ShareArgs& args, ParallelFor parallel_for);
  void (*carry_leaves)(const CarryLeavesArgs& args, ParallelFor parallel_for);
  void (*ring_conv2d)(const RingConvArgs& args, ParallelFor parallel_for);
};

// Bytes of the last-level cache that one core can fill.
int64_t last_level_cache();

// The widest build that this processor can run, or the one that DEEPSHARE_CPU_ISA names; throws
// std::invalid_argument if it cannot.
const Kernels& best_kernels();

}  // namespace deepshare::cpu
