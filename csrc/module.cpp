// The Python module deepshare._C. Importing it registers the raw ops (the other files here); its one function
// tells how it was built.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/dcf.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// What the processor has, of what kernels may ever be built for.
py::list instruction_sets() {
  py::list names;
#if defined(__x86_64__)
#define DEEPSHARE_REPORT(name) \
  if (__builtin_cpu_supports(name)) names.append(name)
  DEEPSHARE_REPORT("sse4.2");
  DEEPSHARE_REPORT("avx");
  DEEPSHARE_REPORT("avx2");
  DEEPSHARE_REPORT("fma");
  DEEPSHARE_REPORT("bmi2");
  DEEPSHARE_REPORT("avx512f");
  DEEPSHARE_REPORT("avx512bw");
  DEEPSHARE_REPORT("avx512dq");
  DEEPSHARE_REPORT("avx512vl");
#undef DEEPSHARE_REPORT
#endif
  return names;
}

// "a,b" as ["a", "b"].
py::list split(const std::string& joined) {
  py::list parts;
  size_t begin = 0;
  while (begin < joined.size()) {
    size_t end = joined.find(',', begin);
    if (end == std::string::npos) end = joined.size();
    parts.append(joined.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::object text_or_none(const std::string& text) {
  if (text.empty()) return py::none();
  return py::str(text);
}

py::dict build_info() {
  py::dict info;
  info["version"] = DEEPSHARE_VERSION;
  info["compiler"] = compiler();
  info["torch"] = DEEPSHARE_TORCH_VERSION;
  info["cuda_toolkit"] = text_or_none(DEEPSHARE_CUDA_TOOLKIT);
  info["cuda_architectures"] = split(DEEPSHARE_CUDA_ARCHITECTURES);
  info["cuda_ptx"] = text_or_none(DEEPSHARE_CUDA_PTX);
  info["cpu_instruction_sets"] = instruction_sets();
  info["cpu_kernels"] = deepshare::cpu::best_kernels().instruction_set;
  const deepshare::cpu::DcfKernels* dcf = deepshare::cpu::best_dcf_kernels();
  info["aes_kernels"] = text_or_none(dcf == nullptr ? "" : dcf->instruction_set);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled part of deepshare: raw ops for CPU and CUDA tensors.";
  deepshare::cpu::best_kernels();  // a wrong DEEPSHARE_CPU_ISA fails here, not in the middle of a network
  module.def(
      "build_info", &build_info,
      "How this library was built (version, compiler, torch, CUDA) and what it found on this processor.");
}
