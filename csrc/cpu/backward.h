// shared_relu's gradients, in the four loop orders of forward.h:
//   dx[c] = g * (alpha[c] * gate + beta[c]),  dalpha[c] = sum g * z * gate,  dbeta[c] = sum g * z,
// and, through soft gates, the source's.
#pragma once

#include "backward_hard.h"
#include "backward_soft.h"

namespace deepshare::cpu {
namespace {

template <class T>
struct Backward {
  const BackwardArgs& args;
  ParallelFor parallel_for;

  Backward(const BackwardArgs& args_, ParallelFor parallel) : args(args_), parallel_for(parallel) {}

  void run() const {
    const bool pixels = args.geometry.inner < kShortRow;
    const Channels<Accum<T>> channels(args, pixels ? args.geometry.inner : 1);
    const bool soft =
        channels.soft > 0 || args.dsource != nullptr;  // a dsource is written also at a switch of 0
    if (!soft) return hard_backward<T>(args, channels, parallel_for);
    return pixels ? soft_backward<T, TransposedRows<T>>(args, channels, parallel_for)
                  : soft_backward<T, StoredRows<T>>(args, channels, parallel_for);
  }
};

}  // namespace
}  // namespace deepshare::cpu
