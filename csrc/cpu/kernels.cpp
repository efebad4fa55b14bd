// The CPU kernels for one instruction set. Compiled once per DEEPSHARE_ISA (CMakeLists.txt), each time with
// other -march flags.
#include "backward.h"
#include "carry.h"
#include "forward.h"
#include "masked.h"
#include "share.h"

#define DEEPSHARE_TEXT_OF(name) #name
#define DEEPSHARE_TEXT(name) DEEPSHARE_TEXT_OF(name)

namespace deepshare::cpu {
namespace {

template <template <class> class Op, class Args>
void by_dtype(const Args& args, ParallelFor parallel_for) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return Op<float>(args, parallel_for).run();
    case Dtype::kFloat64:
      return Op<double>(args, parallel_for).run();
    case Dtype::kFloat16:
      return Op<Half>(args, parallel_for).run();
    case Dtype::kBFloat16:
      return Op<BFloat16>(args, parallel_for).run();
  }
}

void share(const ShareArgs& args, ParallelFor parallel_for) { Share(args, parallel_for).run(); }

void carry_leaves(const CarryLeavesArgs& args, ParallelFor parallel_for) {
  CarryLeaves(args, parallel_for).run();
}

}  // namespace

namespace DEEPSHARE_ISA {
void ring_conv2d(const RingConvArgs& args, ParallelFor parallel_for);  // ring_conv.cpp
extern const Kernels kernels;
const Kernels kernels = {DEEPSHARE_TEXT(DEEPSHARE_ISA),
                         by_dtype<Forward, ForwardArgs>,
                         by_dtype<Backward, BackwardArgs>,
                         by_dtype<MaskedForward, MaskedForwardArgs>,
                         by_dtype<MaskedBackward, MaskedBackwardArgs>,
                         share,
                         carry_leaves,
                         ring_conv2d};
}  // namespace DEEPSHARE_ISA
}  // namespace deepshare::cpu
