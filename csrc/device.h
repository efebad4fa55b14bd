// What the bindings share: dtypes, pointers, geometry, and how a call reaches the CPU or the current CUDA
// stream.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "layout.h"

namespace deepshare {
namespace {

using cuda::Dtype;
using cuda::Geometry;
using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
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
      throw std::runtime_error("deepshare: x must be float32, float16, bfloat16 or float64");
  }
}

template <class T = void>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T = void>
const T* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

// Stored in `order`, which is the tensor itself or a copy; absent stays absent.
inline OptionalTensor dense_if_given(const OptionalTensor& tensor, const Dims& order) {
  return tensor.has_value() ? OptionalTensor(as_dense(*tensor, order)) : std::nullopt;
}

// With the upper bound for the number of prototypes.
inline Geometry geometry_of(const Tensor& x, const Dims& order, int64_t source_channels) {
  const int64_t channels = x.size(kChannelDim);
  Geometry geometry{1, channels, 1, source_channels, std::min(channels, source_channels)};
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

// P of packed gates; where they lie in whole bytes of 8 prototypes, P rounded up to those.
inline int64_t packed_prototypes(const Tensor& gates, const Geometry& geometry) {
  return geometry.inner == 1 ? 8 * gates.size(1) : gates.size(1);
}

inline void cpu_parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::RangeBody body, void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { body(first, last, context); });
}

inline Tensor empty_bytes(int64_t bytes, const Tensor& device_of) {
  return empty_strided({bytes}, {1}, aoti_torch_dtype_uint8(), device_of);
}

#if defined(DEEPSHARE_CUDA)
// torch's current stream. Looked up at run time, because a CPU torch has no libtorch_cuda.so and must still
// load this library.
inline void* current_stream(const Tensor& x) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = []() -> Getter {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (getter == nullptr)
    throw std::runtime_error(
        "deepshare: this torch has no aoti_torch_get_current_cuda_stream (libtorch_cuda.so)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(x.get_device_index(), &stream));
  return stream;
}

// launch(args, stream) on x's device and torch's current stream there.
template <class Args>
void launch_on(const Tensor& x, const char* (*launch)(const Args&, void*), const Args& args) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const char* error = launch(args, current_stream(x));
  if (error != nullptr) throw std::runtime_error(std::string("deepshare: CUDA: ") + error);
}
#endif

}  // namespace
}  // namespace deepshare
