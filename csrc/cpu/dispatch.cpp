// Chooses the kernels' build by what the processor reports at run time.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace deepshare::cpu {

#define DEEPSHARE_DECLARE(name) \
  namespace name {              \
  extern const Kernels kernels; \
  }
DEEPSHARE_DECLARE(baseline)
#if defined(DEEPSHARE_X86_BUILDS)
DEEPSHARE_DECLARE(x86_64_v3)
DEEPSHARE_DECLARE(x86_64_v4)
#endif

namespace {

struct Build {
  const Kernels* kernels;
  bool runs_here;
};

#if defined(DEEPSHARE_X86_BUILDS)
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd");
}
#endif

const Kernels& choose() {
  const Build builds[] = {
#if defined(DEEPSHARE_X86_BUILDS)
      {&x86_64_v4::kernels, has_v4()},
      {&x86_64_v3::kernels, has_v3()},
#endif
      {&baseline::kernels, true},
  };
  const char* wanted = std::getenv("DEEPSHARE_CPU_ISA");
  std::string names;
  for (const Build& build : builds) {
    if (!build.runs_here) continue;
    const std::string name = build.kernels->instruction_set;
    if (wanted == nullptr || *wanted == '\0' || name == wanted) return *build.kernels;
    names += (names.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument("DEEPSHARE_CPU_ISA must be one of " + names + " on this processor (got '" +
                              wanted + "')");
}

}  // namespace

const Kernels& best_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace deepshare::cpu
