// The raw ops shared_relu_native, shared_relu_emit_native and shared_relu_backward_native for CPU and CUDA
// tensors, on torch's stable ABI: one library serves every torch since 2.11, with or without CUDA. Schemas
// and fakes stand in deepshare/raw_ops.py; what the caller guarantees stands in docs/design.md, section 3.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "device.h"

namespace deepshare {
namespace {

using cuda::BackwardArgs;
using cuda::ForwardArgs;

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
    launch_on(x, cuda::shared_relu_forward, args);
  }
  static void backward(BackwardArgs args, const Tensor& x) {
    const bool soft = args.soft_channels != nullptr;
    const auto bytes = static_cast<int64_t>(cuda::backward_workspace_bytes(args.dtype, args.geometry, soft));
    const Tensor workspace = empty_bytes(bytes, x);
    args.workspace = workspace.data_ptr();
    launch_on(x, cuda::shared_relu_backward, args);
  }
};
#endif

// The tensors of a call, stored in one order, and the fields that forward and backward share.
struct Operands {
  Tensor x;
  OptionalTensor residual, source;
  Geometry geometry;

  Operands(const Tensor& x_, const OptionalTensor& residual_, const OptionalTensor& source_,
           const Dims& order)
      : x(as_dense(x_, order)),
        residual(dense_if_given(residual_, order)),
        source(dense_if_given(source_, order)) {
    const Tensor& leader = source_.has_value() ? *source_ : x_;
    geometry = geometry_of(x_, order, leader.size(kChannelDim));
  }

  template <class Args>
  void fill(Args& args, const OptionalTensor& gates, const Tensor& pi, const Tensor& alpha,
            const Tensor& beta, const OptionalTensor& soft_channels, const OptionalTensor& gamma) const {
    args.dtype = dtype_of(x);
    args.geometry = geometry;
    args.x = data(x);
    args.residual = data(residual);
    args.source = data(source);
    args.gates = data<uint8_t>(gates);
    args.pi = data<int32_t>(pi);
    args.alpha = data(alpha);
    args.beta = data(beta);
    args.soft_channels = data<int32_t>(soft_channels);
    args.gamma = data(gamma);
  }
};

const Tensor* pointer(const OptionalTensor& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

// [outer, P, ceil(inner / 8)], or [outer, ceil(P / 8)] where inner is 1 (kernels/cuda/shared_relu.h).
Tensor empty_gates(const Geometry& geometry, int64_t prototypes, const Tensor& device_of) {
  const auto bytes = [](int64_t bits) { return (bits + 7) / 8; };
  Dims sizes = geometry.inner == 1 ? Dims{geometry.outer, bytes(prototypes)}
                                   : Dims{geometry.outer, prototypes, bytes(geometry.inner)};
  Dims strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= sizes[d]) strides[d] = step;
  return empty_strided(sizes, strides, aoti_torch_dtype_uint8(), device_of);
}

template <class Device>
Tensor forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& source,
               const OptionalTensor& gates, const Tensor& pi, const Tensor& alpha, const Tensor& beta,
               const OptionalTensor& soft_channels, const OptionalTensor& gamma) {
  Tensor y = uninitialised_like(x);
  if (x.numel() == 0) return y;
  Operands operands(x, residual, source, common_order(x, y, pointer(source)));
  if (gates.has_value()) operands.geometry.prototypes = packed_prototypes(*gates, operands.geometry);
  ForwardArgs args{};
  operands.fill(args, gates, pi, alpha, beta, soft_channels, gamma);
  args.y = y.data_ptr();
  Device::forward(args, x);
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor> forward_and_gates(const Tensor& x, const OptionalTensor& residual,
                                             const Tensor& pi, const Tensor& alpha, const Tensor& beta,
                                             int64_t prototypes) {
  Tensor y = uninitialised_like(x);
  Operands operands(x, residual, std::nullopt, storage_order(y));
  operands.geometry.prototypes = prototypes;
  Tensor gates = empty_gates(operands.geometry, prototypes, x);
  if (x.numel() == 0) return {y, torch::stable::zero_(gates)};
  ForwardArgs args{};
  operands.fill(args, std::nullopt, pi, alpha, beta, std::nullopt, std::nullopt);
  args.y = y.data_ptr();
  args.emitted = static_cast<uint8_t*>(gates.data_ptr());
  Device::forward(args, x);
  return {y, gates};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients zero_gradients(Tensor dx, Tensor dsource, const Tensor& alpha, const Tensor& beta) {
  Tensor dalpha = uninitialised_like(alpha), dbeta = uninitialised_like(beta);
  torch::stable::zero_(dsource);
  torch::stable::zero_(dalpha);
  torch::stable::zero_(dbeta);
  return {dx, dsource, dalpha, dbeta};
}

template <class Device>
Gradients backward(const Tensor& grad, const Tensor& x, const OptionalTensor& residual,
                   const OptionalTensor& source, const OptionalTensor& gates, const Tensor& pi,
                   const Tensor& members, const Tensor& offsets, const Tensor& alpha, const Tensor& beta,
                   const OptionalTensor& soft_channels, const OptionalTensor& gamma) {
  const bool with_dsource = source.has_value() && soft_channels.has_value();
  Tensor dx = uninitialised_like(x);
  Tensor dsource = with_dsource ? uninitialised_like(*source) : empty_strided({0}, {1}, dtype_code(x), x);
  if (x.numel() == 0) return zero_gradients(dx, dsource, alpha, beta);

  const Dims order = common_order(x, dx, pointer(source));
  Operands operands(x, residual, source, order);
  // Of packed gates the count they were packed with, which may exceed pi's: it says how their rows lie.
  operands.geometry.prototypes =
      gates.has_value() ? packed_prototypes(*gates, operands.geometry) : offsets.numel() - 1;
  const Tensor dense_grad = as_dense(grad, order);
  const bool direct = !with_dsource || is_dense_in(dsource, order);
  const Tensor written = direct ? dsource : empty_in(dsource, order);
  const Tensor dalpha = uninitialised_like(alpha), dbeta = uninitialised_like(beta);

  BackwardArgs args{};
  operands.fill(args, gates, pi, alpha, beta, soft_channels, gamma);
  args.grad = data(dense_grad);
  args.members = data<int32_t>(members);
  args.offsets = data<int32_t>(offsets);
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
  library.impl("shared_relu_emit_native", TORCH_BOX(&forward_and_gates<OnCpu>));
  library.impl("shared_relu_backward_native", TORCH_BOX(&backward<OnCpu>));
}

#if defined(DEEPSHARE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(deepshare, CUDA, library) {
  library.impl("shared_relu_native", TORCH_BOX(&forward<OnCuda>));
  library.impl("shared_relu_emit_native", TORCH_BOX(&forward_and_gates<OnCuda>));
  library.impl("shared_relu_backward_native", TORCH_BOX(&backward<OnCuda>));
}
#endif

}  // namespace
}  // namespace deepshare
