// ring_conv2d for one instruction set, compiled beside kernels.cpp and like it.
#include "ring_conv.h"

namespace deepshare::cpu::DEEPSHARE_ISA {

void ring_conv2d(const RingConvArgs& args, ParallelFor parallel_for);
void ring_conv2d(const RingConvArgs& args, ParallelFor parallel_for) { RingConv(args, parallel_for).run(); }

}  // namespace deepshare::cpu::DEEPSHARE_ISA
