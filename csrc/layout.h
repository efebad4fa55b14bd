// Tensors of any strides as dense (outer, channels, inner) memory, through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace deepshare {

using torch::stable::Tensor;
using Dims = std::vector<int64_t>;

constexpr int64_t kChannelDim = 1;

// The dimensions by falling stride: the order in which a dense tensor stores them.
inline Dims storage_order(const Tensor& tensor) {
  Dims order(tensor.dim());
  for (size_t d = 0; d < order.size(); ++d) order[d] = static_cast<int64_t>(d);
  const auto strides = tensor.strides();
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

// The strides of a dense tensor of these sizes whose dimensions are stored in this order.
inline Dims dense_strides(const Tensor& sizes_of, const Dims& order) {
  Dims strides(order.size());
  int64_t step = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    strides[*d] = step;
    step *= std::max<int64_t>(sizes_of.size(*d), 1);
  }
  return strides;
}

inline bool is_dense_in(const Tensor& tensor, const Dims& order) {
  const Dims wanted = dense_strides(tensor, order);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < wanted.size(); ++d) {
    if (sizes[d] != 1 && strides[d] != wanted[d]) return false;
  }
  return true;
}

// DEEPSHARE_POISON=1 (the tests set it) fills what the CPU ops allocate with NaN: an element that a kernel
// leaves out is then loud.
inline void poison(Tensor& tensor, int32_t device_type) {
  static const bool wanted = [] {
    const char* value = std::getenv("DEEPSHARE_POISON");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  if (!wanted || device_type != aoti_torch_device_type_cpu() || tensor.numel() == 0) return;
  std::memset(tensor.data_ptr(), 0xFF, static_cast<size_t>(tensor.numel()) * tensor.element_size());
}

// Past the dispatcher: a call of empty_like through it took 0.4 to 0.5 us more of host time.
template <class Sizes = Dims, class Strides = Dims>
Tensor empty_strided(const Sizes& sizes, const Strides& strides, int32_t dtype, const Tensor& device_of) {
  int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device_of.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(device_of.get(), &index));
  AtenTensorHandle handle = nullptr;
  const auto rank = static_cast<int64_t>(sizes.size());
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes.data(), strides.data(), dtype, type, index, &handle));
  Tensor made(handle);
  poison(made, type);
  return made;
}

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// Uninitialised, with the sizes and dtype of `like`, dense in `order`.
inline Tensor empty_in(const Tensor& like, const Dims& order) {
  const auto sizes = like.sizes();
  return empty_strided(Dims(sizes.begin(), sizes.end()), dense_strides(like, order), dtype_code(like), like);
}

// torch.empty_like, which gives a dense tensor's strides to the new one.
inline Tensor uninitialised_like(const Tensor& tensor) {
  if (tensor.numel() == 0 || !is_dense_in(tensor, storage_order(tensor)))
    return torch::stable::empty_like(tensor);
  return empty_strided(tensor.sizes(), tensor.strides(), dtype_code(tensor), tensor);
}

// The tensor itself where it is dense in this order, else a copy that is.
inline Tensor as_dense(const Tensor& tensor, const Dims& order) {
  if (is_dense_in(tensor, order)) return tensor;
  Tensor copy = empty_in(tensor, order);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The order for all tensors of a call: that of x, or, where x is not dense, that of torch.empty_like(x),
// which is what y will have. With one channel the place of the channel dimension in x says nothing, so that a
// source may give it.
inline Dims common_order(const Tensor& x, const Tensor& y, const Tensor* source) {
  if (source != nullptr && x.size(kChannelDim) == 1) {
    const Dims order = storage_order(*source);
    if (is_dense_in(y, order)) return order;
  }
  return storage_order(y);
}

}  // namespace deepshare
