// The second pass of every backward kernel: the sums of chunks, added in a fixed order.
#pragma once

#include "launch.h"

namespace deepshare::cuda {

// partial [planes, chunks, columns] -> out[plane] [columns], planes 1 or 2; values of the accumulation type.
//
// A kernel of its own, not the last block of the first pass: to know that it is the last, a block needs a
// counter that starts at 0, and either another launch zeroes it, which saves nothing, or it outlives the
// call, which two streams or two replays of a captured graph would share.
const char* launch_sums(Dtype dtype, const void* partial, void* const (&out)[2], int planes, int64_t chunks,
                        int64_t columns, cudaStream_t stream);

}  // namespace deepshare::cuda
