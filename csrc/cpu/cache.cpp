// The size of the last-level cache that one core can fill.
#include <unistd.h>

#include <fstream>
#include <string>

#include "kernels.h"

namespace deepshare::cpu {
namespace {

constexpr int64_t kUnknown = int64_t{32} << 20;

// Linux says it in the form "32768K"; 0 where it does not.
int64_t from_the_kernel() {
  int64_t size = 0;
  char unit = 0;
  for (const char* index : {"3", "2"}) {
    std::ifstream file(std::string("/sys/devices/system/cpu/cpu0/cache/index") + index + "/size");
    if (file >> size >> unit) return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : 0;
  }
  return 0;
}

// glibc: on processors of several dies the caches of all of them together (320 MiB of ten times 32 MiB, seen
// on an EPYC), hence only where the kernel says nothing.
int64_t from_libc() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  return sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  return 0;
#endif
}

int64_t measure() {
  const int64_t kernel = from_the_kernel();
  if (kernel > 0) return kernel;
  const int64_t libc = from_libc();
  return libc > 0 ? libc : kUnknown;
}

}  // namespace

int64_t last_level_cache() {
  static const int64_t bytes = measure();
  return bytes;
}

}  // namespace deepshare::cpu
