// The raw op ring_conv2d_native for CPU and CUDA tensors; the conventions of shared_relu.cpp.
#include <torch/csrc/stable/library.h>

#include "device.h"

namespace deepshare {
namespace {

using cuda::RingAxis;
using cuda::RingConvArgs;

struct OnCpu {
  static void run(const RingConvArgs& args, const Tensor&) {
    cpu::best_kernels().ring_conv2d(args, cpu_parallel_for);
  }
};

#if defined(DEEPSHARE_CUDA)
struct OnCuda {
  static void run(const RingConvArgs& args, const Tensor& x) { launch_on(x, cuda::ring_conv2d, args); }
};
#endif

inline RingAxis axis(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  return {size, kernel, stride, padding, dilation, outputs};
}

inline Tensor row_major(const Tensor& tensor) {
  Dims order(tensor.dim());
  for (size_t d = 0; d < order.size(); ++d) order[d] = static_cast<int64_t>(d);
  return as_dense(tensor, order);
}

template <class Device>
Tensor ring_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& packed,
                   const OptionalTensor& pairs, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                   int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups) {
  const Tensor filters = packed.has_value() ? weight : row_major(weight);
  RingConvArgs args{};
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.out_channels = weight.size(0);
  args.groups = groups;
  args.height = axis(x.size(2), weight.size(2), stride_h, padding_h, dilation_h);
  args.width = axis(x.size(3), weight.size(3), stride_w, padding_w, dilation_w);
  args.x = data<int64_t>(x);
  for (int d = 0; d < 4; ++d) args.x_strides[d] = x.stride(d);
  args.weight = data<int64_t>(filters);
  args.packed = data(packed);
  args.pairs = data<int64_t>(pairs);
  args.narrow = packed.has_value() && packed->scalar_type() == ScalarType::Int;
  const int64_t pixels = args.height.outputs * args.width.outputs;
  const Dims sizes{args.batch, args.out_channels, args.height.outputs, args.width.outputs};
  const Dims strides{args.out_channels * pixels, pixels, args.width.outputs, 1};
  Tensor y = empty_strided(sizes, strides, dtype_code(x), x);
  args.y = static_cast<int64_t*>(y.data_ptr());
  Device::run(args, x);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(deepshare, CPU, library) {
  library.impl("ring_conv2d_native", TORCH_BOX(&ring_conv2d<OnCpu>));
}

#if defined(DEEPSHARE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(deepshare, CUDA, library) {
  library.impl("ring_conv2d_native", TORCH_BOX(&ring_conv2d<OnCuda>));
}
#endif

}  // namespace
}  // namespace deepshare
