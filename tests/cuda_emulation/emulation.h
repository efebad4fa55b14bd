// CUDA blocks on one CPU thread: every CUDA thread is a fibre, which runs until it has to wait for others at
// __syncthreads or a shuffle. It shows values and barriers right, not speed: no memory model, no caches.
//
// Fibres run in rising or falling order of threadIdx (set_order): what reads a value before the barrier that
// makes it valid differs between the two.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr int kWarpSize = 32;

void set_order(bool rising);

// Runs every block of the grid, one after the other. Throws std::runtime_error where threads wait for each
// other for ever, or a shuffle's lanes are not all there.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// The block's dynamic shared memory, filled with NaN when the block starts.
unsigned char* dynamic_shared();

void wait_for_block();
// Gives `bits` to the warp and returns those of its lane `from`, once all 32 lanes are here.
uint64_t exchange(uint64_t bits, int from);
int lane();

}  // namespace emulation

inline void __syncthreads() { emulation::wait_for_block(); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = emulation::kWarpSize) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) std::abort();  // not emulated
  const int lane = emulation::lane();
  const bool inside = lane % width + delta < width;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = emulation::exchange(bits, inside ? lane + delta : lane);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
