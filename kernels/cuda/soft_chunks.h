// Sizes on which the soft backward kernels and the workspace agree.
#pragma once

#include <cstdint>
#include <type_traits>

namespace deepshare::cuda {

// Positions a lane of the row walk owns: gate, slope and ds stay in registers.
template <class T>
constexpr int kSoftUnit = std::is_same_v<T, double> ? 4 : 8;

// Channels up to which a row's terms and sums fit into the 48 KiB of shared memory every GPU gives without
// asking: 3 * C values. Beyond, grad and z are read twice (backward_soft_prototypes.cu).
template <class W>
constexpr int64_t kMaxSoftRow = 48 * 1024 / (3 * sizeof(W));

}  // namespace deepshare::cuda
