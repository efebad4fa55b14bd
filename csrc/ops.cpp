// The raw ops shared_relu_native and shared_relu_backward_native for CPU and CUDA tensors, on torch's stable
// ABI: one library serves every torch since 2.11, with or without CUDA. Schemas and fakes stand in
// deepshare/ops.py; what the caller guarantees stands in docs/design.md, section 3.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/shared_relu.h"
#include "layout.h"

namespace deepshare {
namespace {

using cuda::BackwardArgs;
using cuda::Dtype;
using cuda::ForwardArgs;
using cuda::Geometry;
using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      throw std::runtime_error("shared_relu: x must be float32, float16, bfloat16 or float64");
  }
}

template <class T = void>
const T* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

template <class T = void>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

// prototypes < 0: unknown, the upper bound is taken.
Geometry geometry_of(const Tensor& x, const OptionalTensor& source, const Dims& order, int64_t prototypes) {
  Geometry geometry{1, x.size(kChannelDim), 1, 0, 0};
  geometry.source_channels = source.has_value() ? source->size(kChannelDim) : geometry.channels;
  geometry.prototypes = prototypes < 0 ? std::min(geometry.channels, geometry.source_channels) : prototypes;
  bool before_channels = true;
  for (const int64_t d : order) {
    if (d == kChannelDim) {
      before_channels = false;
    } else {
      (before_channels ? geometry.outer : geometry.inner) *= x.size(d);
    }
  }
  return geometry;
}

void cpu_parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::RangeBody body, void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { body(first, last, context); });
}

#if defined(DEEPSHARE_CUDA)
// torch's current stream. Looked up at run time, because a CPU torch has no libtorch_cuda.so and must still
// load this library.
void* current_stream(const Tensor& x) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = []() -> Getter {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (getter == nullptr)
    throw std::runtime_error(
        "shared_relu: this torch has no aoti_torch_get_current_cuda_stream (libtorch_cuda.so)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(x.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("shared_relu: CUDA: ") + error);
}
#endif

struct OnCpu {
  static void forward(const ForwardArgs& args, const Tensor&) {
    cpu::best_kernels().forward(args, cpu_parallel_for);
  }
  static void backward(const BackwardArgs& args, const Tensor&) {
    cpu::best_kernels().backward(args, cpu_parallel_for);
  }
};

#if defined(DEEPSHARE_CUDA)
struct OnCuda {
  static void forward(const ForwardArgs& args, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check_launch(cuda::shared_relu_forward(args, current_stream(x)));
  }

  static void backward(BackwardArgs args, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const bool soft = args.soft_channels != nullptr;
    const auto bytes = static_cast<int64_t>(cuda::backward_workspace_bytes(args.dtype, args.geometry, soft));
    const Tensor workspace = empty_strided({bytes}, {1}, aoti_torch_dtype_uint8(), x);
    args.workspace = workspace.data_ptr();
    check_launch(cuda::shared_relu_backward(args, current_stream(x)));
  }
};
#endif

template <class Device>
Tensor forward(const Tensor& x, const OptionalTensor& source, const Tensor& pi, const Tensor& alpha,
               const Tensor& beta, const OptionalTensor& soft_channels, const OptionalTensor& gamma) {
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const Dims order = common_order(x, y, source.has_value() ? &*source : nullptr);
  const Tensor dense_x = as_dense(x, order);
  const Tensor dense_source = source.has_value() ? as_dense(*source, order) : dense_x;

  ForwardArgs args{};
  args.dtype = dtype_of(x);
  args.geometry = geometry_of(x, source, order, -1);
  args.x = data(dense_x);
  args.source = source.has_value() ? data(dense_source) : nullptr;
  args.pi = data<int32_t>(pi);
  args.alpha = data(alpha);
  args.beta = data(beta);
  args.soft_channels = data<int32_t>(soft_channels);
  args.gamma = data(gamma);
  args.y = y.data_ptr();
  Device::forward(args, x);
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients zero_gradients(Tensor dx, Tensor dsource, const Tensor& alpha, const Tensor& beta) {
  Tensor dalpha = torch::stable::empty_like(alpha), dbeta = torch::stable::empty_like(beta);
  torch::stable::zero_(dsource);
  torch::stable::zero_(dalpha);
  torch::stable::zero_(dbeta);
  return {dx, dsource, dalpha, dbeta};
}

template <class Device>
Gradients backward(const Tensor& grad, const Tensor& x, const OptionalTensor& source, const Tensor& pi,
                   const Tensor& members, const Tensor& offsets, const Tensor& alpha, const Tensor& beta,
                   const OptionalTensor& soft_channels, const OptionalTensor& gamma) {
  const bool with_dsource = source.has_value() && soft_channels.has_value();
  Tensor dx = torch::stable::empty_like(x);
  Tensor dsource =
      with_dsource ? torch::stable::empty_like(*source) : empty_strided({0}, {1}, dtype_code(x), x);
  if (x.numel() == 0) return zero_gradients(dx, dsource, alpha, beta);

  const Dims order = common_order(x, dx, source.has_value() ? &*source : nullptr);
  const Tensor dense_grad = as_dense(grad, order), dense_x = as_dense(x, order);
  const Tensor dense_source = source.has_value() ? as_dense(*source, order) : dense_x;
  const bool direct = !with_dsource || is_dense_in(dsource, order);
  const Tensor written = direct ? dsource : empty_in(dsource, order);
  const Tensor dalpha = torch::stable::empty_like(alpha), dbeta = torch::stable::empty_like(beta);

  BackwardArgs args{};
  args.dtype = dtype_of(x);
  args.geometry = geometry_of(x, source, order, offsets.numel() - 1);
  args.grad = data(dense_grad);
  args.x = data(dense_x);
  args.source = source.has_value() ? data(dense_source) : nullptr;
  args.pi = data<int32_t>(pi);
  args.members = data<int32_t>(members);
  args.offsets = data<int32_t>(offsets);
  args.alpha = data(alpha);
  args.beta = data(beta);
  args.soft_channels = data<int32_t>(soft_channels);
  args.gamma = data(gamma);
  args.dx = dx.data_ptr();
  args.dsource = with_dsource ? written.data_ptr() : nullptr;
  args.dalpha = dalpha.data_ptr();
  args.dbeta = dbeta.data_ptr();
  Device::backward(args, x);
  if (!direct) torch::stable::copy_(dsource, written);
  return {dx, dsource, dalpha, dbeta};
}

STABLE_TORCH_LIBRARY_IMPL(deepshare, CPU, library) {
  library.impl("shared_relu_native", TORCH_BOX(&forward<OnCpu>));
  library.impl("shared_relu_backward_native", TORCH_BOX(&backward<OnCpu>));
}

#if defined(DEEPSHARE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(deepshare, CUDA, library) {
  library.impl("shared_relu_native", TORCH_BOX(&forward<OnCuda>));
  library.impl("shared_relu_backward_native", TORCH_BOX(&backward<OnCuda>));
}
#endif

}  // namespace
}  // namespace deepshare
