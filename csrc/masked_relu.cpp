// The raw ops masked_relu_native and masked_relu_backward_native (per-pixel masks) for CPU and CUDA tensors;
// the conventions of shared_relu.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "device.h"

namespace deepshare {
namespace {

using cuda::MaskedBackwardArgs;
using cuda::MaskedForwardArgs;

struct OnCpu {
  static void forward(const MaskedForwardArgs& args, const Tensor&) {
    cpu::best_kernels().masked_forward(args, cpu_parallel_for);
  }
  static void backward(const MaskedBackwardArgs& args, const Tensor&) {
    cpu::best_kernels().masked_backward(args, cpu_parallel_for);
  }
};

#if defined(DEEPSHARE_CUDA)
struct OnCuda {
  static void forward(const MaskedForwardArgs& args, const Tensor& x) {
    launch_on(x, cuda::masked_relu_forward, args);
  }
  static void backward(MaskedBackwardArgs args, const Tensor& x) {
    const auto bytes =
        static_cast<int64_t>(cuda::masked_workspace_bytes(args.dtype, args.batch, args.elements));
    const Tensor workspace = empty_bytes(bytes, x);
    args.workspace = workspace.data_ptr();
    launch_on(x, cuda::masked_relu_backward, args);
  }
};
#endif

constexpr int64_t kBatchDim = 0;

// y's storage order where samples lie one after the other in it, else the contiguous one.
Dims samples_first(const Tensor& y) {
  Dims order = storage_order(y);
  for (const int64_t d : order) {
    if (d == kBatchDim) return order;
    if (y.size(d) != 1) break;
  }
  for (size_t d = 0; d < order.size(); ++d) order[d] = static_cast<int64_t>(d);
  return order;
}

// The order of a sample's dimensions [C, *S] within an order of [N, C, *S].
Dims within_sample(const Dims& order) {
  Dims inside;
  for (const int64_t d : order) {
    if (d != kBatchDim) inside.push_back(d - 1);
  }
  return inside;
}

template <class Args>
void fill(Args& args, const Tensor& x, const Tensor& mask) {
  args.dtype = dtype_of(x);
  args.batch = x.size(kBatchDim);
  args.elements = mask.numel();
  args.x = data(x);
  args.mask = data(mask);
}

// `result` itself where it is stored in this order, else a tensor that is, to be copied to it.
Tensor written_in(const Tensor& result, const Dims& order) {
  return is_dense_in(result, order) ? result : empty_in(result, order);
}

void deliver(Tensor result, const Tensor& written) {
  if (written.data_ptr() != result.data_ptr()) torch::stable::copy_(result, written);
}

template <class Device>
Tensor forward(const Tensor& x, const Tensor& mask) {
  Tensor y = uninitialised_like(x);
  if (x.numel() == 0) return y;
  const Dims order = samples_first(y);
  const Tensor dense_x = as_dense(x, order), dense_mask = as_dense(mask, within_sample(order));
  const Tensor written = written_in(y, order);
  MaskedForwardArgs args{};
  fill(args, dense_x, dense_mask);
  args.y = written.data_ptr();
  Device::forward(args, x);
  deliver(y, written);
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& mask) {
  Tensor dx = uninitialised_like(x), dmask = uninitialised_like(mask);
  if (x.numel() == 0) return {dx, torch::stable::zero_(dmask)};
  const Dims order = samples_first(dx), inside = within_sample(order);
  const Tensor dense_grad = as_dense(grad, order), dense_x = as_dense(x, order);
  const Tensor dense_mask = as_dense(mask, inside);
  const Tensor written_dx = written_in(dx, order), written_dmask = written_in(dmask, inside);
  MaskedBackwardArgs args{};
  fill(args, dense_x, dense_mask);
  args.grad = data(dense_grad);
  args.dx = written_dx.data_ptr();
  args.dmask = written_dmask.data_ptr();
  Device::backward(args, x);
  deliver(dx, written_dx);
  deliver(dmask, written_dmask);
  return {dx, dmask};
}

STABLE_TORCH_LIBRARY_IMPL(deepshare, CPU, library) {
  library.impl("masked_relu_native", TORCH_BOX(&forward<OnCpu>));
  library.impl("masked_relu_backward_native", TORCH_BOX(&backward<OnCpu>));
}

#if defined(DEEPSHARE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(deepshare, CUDA, library) {
  library.impl("masked_relu_native", TORCH_BOX(&forward<OnCuda>));
  library.impl("masked_relu_backward_native", TORCH_BOX(&backward<OnCuda>));
}
#endif

}  // namespace
}  // namespace deepshare
