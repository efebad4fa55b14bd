// Chooses the DCF's build by what the processor reports at run time.
#include <cstring>

#include "dcf.h"

#if defined(DEEPSHARE_AES_BUILD)
#include <cpuid.h>
#endif

namespace deepshare::cpu {

#if defined(DEEPSHARE_AES_BUILD)
namespace aes_ni {
extern const DcfKernels dcf;
}
#endif
#if defined(DEEPSHARE_VAES_BUILD)
namespace vaes {
extern const DcfKernels dcf;
}
#endif

namespace {

#if defined(DEEPSHARE_AES_BUILD)
// By cpuid itself: __builtin_cpu_supports knows neither name in every compiler that builds this.
bool has_aes() {
  constexpr unsigned kAes = 1u << 25, kSse41 = 1u << 19;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & kAes) != 0 && (c & kSse41) != 0;
}
#endif

#if defined(DEEPSHARE_VAES_BUILD)
// That AVX-512 may be used, and is wanted (DEEPSHARE_CPU_ISA), has been found out before.
bool has_vaes() {
  constexpr unsigned kVaes = 1u << 9;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return std::strcmp(best_kernels().instruction_set, "x86_64_v4") == 0 && has_aes() &&
         __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (c & kVaes) != 0;
}
#endif

const DcfKernels* choose() {
#if defined(DEEPSHARE_VAES_BUILD)
  if (has_vaes()) return &vaes::dcf;
#endif
#if defined(DEEPSHARE_AES_BUILD)
  if (has_aes()) return &aes_ni::dcf;
#endif
  return nullptr;
}

}  // namespace

const DcfKernels* best_dcf_kernels() {
  static const DcfKernels* chosen = choose();
  return chosen;
}

}  // namespace deepshare::cpu
