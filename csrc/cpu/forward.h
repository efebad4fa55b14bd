// shared_relu's y, in four loop orders: rows (NCHW) or pixels (NHWC and very short rows), hard or soft gates.
#pragma once

#include "forward_hard.h"
#include "forward_soft.h"

namespace deepshare::cpu {
namespace {

template <class T>
struct Forward {
  const ForwardArgs& args;
  ParallelFor parallel_for;

  Forward(const ForwardArgs& args_, ParallelFor parallel) : args(args_), parallel_for(parallel) {}

  void run() const {
    const bool pixels = args.geometry.inner < kShortRow;
    const Channels<Accum<T>> channels(args, pixels ? args.geometry.inner : 1);
    if (channels.soft == 0) return hard_forward<T>(args, channels, parallel_for);
    return pixels ? soft_forward<T, TransposedRows<T>>(args, channels, parallel_for)
                  : soft_forward<T, StoredRows<T>>(args, channels, parallel_for);
  }
};

}  // namespace
}  // namespace deepshare::cpu
