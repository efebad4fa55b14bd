// The raw ops of the two gate backends, CPU tensors only: dcf_evaluate_native, dcf_generate_native and
// carry_leaves_native. Operands are contiguous and were checked by the Python functions.
#include "cpu/dcf.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "device.h"

namespace deepshare {
namespace {

const cpu::DcfKernels& dcf_kernels() {
  const cpu::DcfKernels* kernels = cpu::best_dcf_kernels();
  if (kernels == nullptr) throw std::runtime_error("deepshare: this processor has no AES instructions");
  return *kernels;
}

Tensor dcf_evaluate(const Tensor& keys, const Tensor& roots, const Tensor& points, const Tensor& public_key,
                    int64_t party, int64_t bits) {
  const int64_t gates = points.numel();
  Tensor shares = empty_bytes((gates + 7) / 8, points);
  if (gates == 0) return shares;
  const cpu::DcfEvaluateArgs args{data<uint8_t>(keys),
                                  data<uint8_t>(roots),
                                  data<int64_t>(points),
                                  data<uint8_t>(public_key),
                                  party,
                                  bits,
                                  gates,
                                  static_cast<uint8_t*>(shares.data_ptr())};
  dcf_kernels().evaluate(args, cpu_parallel_for);
  return shares;
}

Tensor dcf_generate(const Tensor& alphas, const Tensor& roots0, const Tensor& roots1,
                    const Tensor& public_key, int64_t bits) {
  const int64_t gates = alphas.numel(), size = cpu::dcf_key_bytes(bits);
  Tensor keys = empty_strided(Dims{gates, size}, Dims{size, 1}, aoti_torch_dtype_uint8(), alphas);
  if (gates == 0) return keys;
  const cpu::DcfGenerateArgs args{data<int64_t>(alphas),
                                  {data<uint8_t>(roots0), data<uint8_t>(roots1)},
                                  data<uint8_t>(public_key),
                                  bits,
                                  gates,
                                  static_cast<uint8_t*>(keys.data_ptr())};
  dcf_kernels().generate(args, cpu_parallel_for);
  return keys;
}

std::tuple<Tensor, Tensor> carry_leaves(const Tensor& words, const Tensor& opened) {
  const int64_t blocks = words.size(0), gates = opened.numel(), bytes = (gates + 7) / 8;
  const Dims sizes{blocks, bytes}, strides{bytes, 1};
  Tensor generate = empty_strided(sizes, strides, aoti_torch_dtype_uint8(), opened);
  Tensor propagate = empty_strided(sizes, strides, aoti_torch_dtype_uint8(), opened);
  if (gates == 0) return {generate, propagate};
  const cpu::CarryLeavesArgs args{data<uint16_t>(words),
                                  data<int64_t>(opened),
                                  blocks,
                                  gates,
                                  static_cast<uint8_t*>(generate.data_ptr()),
                                  static_cast<uint8_t*>(propagate.data_ptr())};
  cpu::best_kernels().carry_leaves(args, cpu_parallel_for);
  return {generate, propagate};
}

STABLE_TORCH_LIBRARY_IMPL(deepshare, CPU, library) {
  library.impl("dcf_evaluate_native", TORCH_BOX(&dcf_evaluate));
  library.impl("dcf_generate_native", TORCH_BOX(&dcf_generate));
  library.impl("carry_leaves_native", TORCH_BOX(&carry_leaves));
}

}  // namespace
}  // namespace deepshare
