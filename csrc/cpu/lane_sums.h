// Sums of g * z * gate and of g * z, the gradients of alpha and beta: in registers, in lanes, and over
// blocks.
#pragma once

#include "plan.h"

namespace deepshare::cpu {
namespace {

// A group's running sums in registers.
template <class A>
struct GroupSums {
  Lanes<A> gated, total;

  // The gate multiplies, also a hard one: an infinite g * z at a closed gate makes the sum NaN, as it does in
  // the equation.
  void add(const Lanes<A>& product, const Lanes<A>& gate) {
    gated = gated + product * gate;
    total = total + product;
  }
};

// A channel's sums: element i of a row goes to lane i % kLanes on every instruction set, so bits agree.
template <class A>
struct LaneSums {
  A gated[kLanes] = {};
  A total[kLanes] = {};

  GroupSums<A> begin() const { return {load(gated, Whole{}), load(total, Whole{})}; }
  void end(const GroupSums<A>& running) {
    store(running.gated, gated, Whole{});
    store(running.total, total, Whole{});
  }

  static A fold(const A* lanes) {
    A sums[kLanes];
    for (int l = 0; l < kLanes; ++l) sums[l] = lanes[l];
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    return sums[0];
  }
};

// Sums of g * z*gate and g * z per block and channel, then over the blocks in their order.
template <class A>
class Partials {
 public:
  Partials(int64_t blocks, int64_t channels)
      : blocks_(blocks), channels_(channels), stride_(whole_groups(channels)), sums_(2 * blocks * stride_) {}
  A* gated(int64_t block) const { return sums_.get() + 2 * block * stride_; }
  A* total(int64_t block) const { return gated(block) + stride_; }
  void reset(int64_t block) const {
    std::memset(gated(block), 0, 2 * sizeof(A) * static_cast<size_t>(stride_));
  }

  void keep(int64_t block, const LaneSums<A>* sums) const {
    for (int64_t c = 0; c < channels_; ++c) {
      gated(block)[c] = LaneSums<A>::fold(sums[c].gated);
      total(block)[c] = LaneSums<A>::fold(sums[c].total);
    }
  }

  void reduce(int64_t repeat, A* dalpha, A* dbeta, ParallelFor parallel_for) const {
    for_ranges(parallel_for, channels_ / repeat, 2 * blocks_ * repeat, [&](int64_t first, int64_t last) {
      const int64_t begin = first * repeat, count = (last - first) * repeat;
      Buffer<double> wide(2 * count);  // double also for float: blocks are many, and it costs nothing here
      for (int64_t k = 0; k < 2 * count; ++k) wide[k] = 0;
      for (int64_t block = 0; block < blocks_; ++block) {
        const A *a = gated(block) + begin, *b = total(block) + begin;
        for (int64_t k = 0; k < count; ++k) wide[k] += a[k];
        for (int64_t k = 0; k < count; ++k) wide[count + k] += b[k];
      }
      for (int64_t c = first; c < last; ++c) {
        const double* a = wide.get() + (c - first) * repeat;
        double sum_a = 0, sum_b = 0;
        for (int64_t i = 0; i < repeat; ++i) sum_a += a[i], sum_b += a[count + i];
        dalpha[c] = static_cast<A>(sum_a);
        dbeta[c] = static_cast<A>(sum_b);
      }
    });
  }

 private:
  int64_t blocks_, channels_, stride_;
  Buffer<A> sums_;
};

}  // namespace
}  // namespace deepshare::cpu
