// The raw op shared_relu_share_native for CPU and CUDA tensors; the conventions of shared_relu.cpp.
#include <torch/csrc/stable/library.h>

#include "device.h"

namespace deepshare {
namespace {

using cuda::ShareArgs;

struct OnCpu {
  static void run(const ShareArgs& args, const Tensor&) { cpu::best_kernels().share(args, cpu_parallel_for); }
};

#if defined(DEEPSHARE_CUDA)
struct OnCuda {
  static void run(const ShareArgs& args, const Tensor& x) { launch_on(x, cuda::shared_relu_share, args); }
};
#endif

template <class Device>
Tensor share(const Tensor& opened, const Tensor& gates, const Tensor& pi, const Tensor& alpha,
             const Tensor& beta, const Tensor& flip, const OptionalTensor& scale, const Tensor& offset,
             const Tensor& toggle, int64_t shift, int64_t party) {
  Tensor y = uninitialised_like(opened);
  if (opened.numel() == 0) return y;
  const Dims order = storage_order(y);
  const Tensor dense_opened = as_dense(opened, order), dense_flip = as_dense(flip, order);
  const Tensor dense_offset = as_dense(offset, order), dense_toggle = as_dense(toggle, order);
  ShareArgs args{};
  args.geometry = geometry_of(opened, order, flip.size(kChannelDim));
  args.geometry.prototypes = packed_prototypes(gates, args.geometry);
  args.opened = data<int64_t>(dense_opened);
  args.gates = data<uint8_t>(gates);
  args.pi = data<int32_t>(pi);
  args.alpha = data<int64_t>(alpha);
  args.beta = data<int64_t>(beta);
  args.flip = data<int64_t>(dense_flip);
  args.scale = data<int64_t>(scale);
  args.offset = data<int64_t>(dense_offset);
  args.toggle = data<int64_t>(dense_toggle);
  args.shift = shift;
  args.party = party;
  args.y = static_cast<int64_t*>(y.data_ptr());
  Device::run(args, opened);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(deepshare, CPU, library) {
  library.impl("shared_relu_share_native", TORCH_BOX(&share<OnCpu>));
}

#if defined(DEEPSHARE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(deepshare, CUDA, library) {
  library.impl("shared_relu_share_native", TORCH_BOX(&share<OnCuda>));
}
#endif

}  // namespace
}  // namespace deepshare
