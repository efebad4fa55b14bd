// The two walks of the forward pass, and the choice between them (forward.cu).
#pragma once

#include "launch.h"

namespace deepshare::cuda {

const char* launch_forward_rows(const ForwardArgs& args, bool wide, cudaStream_t stream);
const char* launch_forward_columns(const ForwardArgs& args, bool wide, cudaStream_t stream);

}  // namespace deepshare::cuda
