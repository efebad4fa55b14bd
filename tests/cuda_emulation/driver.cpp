// The launchers of kernels/cuda under C names, for ctypes. nullptr for ok, else a message that stays valid
// until the next call.
#include <exception>
#include <string>

#include "cuda_runtime.h"
#include "fast_div.h"
#include "masked_relu.h"
#include "ring_conv.h"
#include "share.h"
#include "shared_relu.h"

namespace cuda = deepshare::cuda;

namespace {

template <class Args>
const char* emulate(const char* (*launcher)(const Args&, void*), const Args& args) {
  static std::string message;
  try {
    return launcher(args, nullptr);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

void set_order(int rising) { emulation::set_order(rising != 0); }

const char* forward(const cuda::ForwardArgs* args) { return emulate(cuda::shared_relu_forward, *args); }
const char* backward(const cuda::BackwardArgs* args) { return emulate(cuda::shared_relu_backward, *args); }
size_t backward_bytes(int dtype, const cuda::Geometry* geometry, int soft) {
  return cuda::backward_workspace_bytes(static_cast<cuda::Dtype>(dtype), *geometry, soft != 0);
}

const char* masked_forward(const cuda::MaskedForwardArgs* args) {
  return emulate(cuda::masked_relu_forward, *args);
}
const char* masked_backward(const cuda::MaskedBackwardArgs* args) {
  return emulate(cuda::masked_relu_backward, *args);
}
size_t masked_bytes(int dtype, int64_t batch, int64_t elements) {
  return cuda::masked_workspace_bytes(static_cast<cuda::Dtype>(dtype), batch, elements);
}

int64_t fast_quotient(int64_t n, int64_t divisor) { return cuda::FastDiv(divisor).quotient(n); }

const char* share(const cuda::ShareArgs* args) { return emulate(cuda::shared_relu_share, *args); }

const char* ring_conv2d(const cuda::RingConvArgs* args) { return emulate(cuda::ring_conv2d, *args); }

}  // extern "C"
