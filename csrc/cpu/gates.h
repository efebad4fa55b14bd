// The gate of a row and, where it is soft, its slope.
#pragma once

#include "math.h"
#include "plan.h"

namespace deepshare::cpu {
namespace {

// 1[s >= 0]: 1 at -0.0, 0 at NaN.
template <class A>
void hard_gates(const A* __restrict__ s, int64_t count, A* __restrict__ gate) {
  for (int64_t i = 0; i < count; ++i) gate[i] = s[i] >= A(0) ? A(1) : A(0);
}

// Phi(gamma * s), the standard normal distribution function.
template <class A>
void soft_gates(const A* __restrict__ s, A gamma, int64_t count, A* __restrict__ gate) {
  for (int64_t i = 0; i < count; ++i) gate[i] = normal_cdf(gamma * s[i]);
}

// gamma * phi(gamma * s), the gate's derivative by s.
template <class A>
void soft_slopes(const A* __restrict__ s, A gamma, int64_t count, A* __restrict__ slope) {
  for (int64_t i = 0; i < count; ++i) slope[i] = gamma * normal_density(gamma * s[i]);
}

// One prototype's gates over a span, kept while channels that ask for the same follow each other.
template <class A>
class GateRow {
 public:
  GateRow(int64_t longest, A gamma) : gamma_(gamma), gate_(longest), slope_(longest) {}

  // A new span: nothing is known about it.
  void forget() { prototype_ = -1; }

  bool holds(int64_t prototype, bool soft) const { return prototype == prototype_ && soft == soft_; }

  void compute(int64_t prototype, bool soft, const A* s, int64_t count, bool with_slope) {
    prototype_ = prototype;
    soft_ = soft;
    if (!soft) return hard_gates(s, count, gate_.get());
    soft_gates(s, gamma_, count, gate_.get());
    if (with_slope) soft_slopes(s, gamma_, count, slope_.get());
  }

  const A* gate() const { return gate_.get(); }
  const A* slope() const { return slope_.get(); }

 private:
  int64_t prototype_ = -1;
  bool soft_ = false;
  A gamma_;
  Buffer<A> gate_, slope_;
};

}  // namespace
}  // namespace deepshare::cpu
