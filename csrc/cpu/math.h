// The standard normal distribution function Phi and its density phi for float, branch-free, so that a loop
// over them becomes vector code; libm has no vector erf. Only +, *, /, comparisons and integer operations,
// each rounded on its own (-ffp-contract=off): the same bits on every instruction set. double stays with
// libm.
#pragma once

#include <cmath>
#include <cstddef>

#include "element.h"

namespace deepshare::cpu {
namespace {

// c[0] + c[1] * x + ... by Horner's rule.
template <size_t N>
inline float polynomial(const float (&c)[N], float x) {
  float value = c[N - 1];
  for (size_t k = N - 1; k-- > 0;) value = value * x + c[k];
  return value;
}

// Phi(t) = 1/2 + t * P(t^2) / Q(t^2) for |t| <= 5.45; beyond, Phi is within eps/4 of 0 or 1 (eps = 2^-23).
// P and Q minimise the largest |error| of Phi: linearised least squares, reweighted by the last Q and by the
// last error (Sanathanan and Koerner 1963, Lawson 1961) at 400 Chebyshev points in t, Phi to 40 digits. They
// are off by 0.05 eps, rounded to float by 0.15 eps. All are positive, so that nothing cancels.
// Measured over every float: at most 1.9 eps from Phi; Phi(0) is 1/2, and Phi is 1 from 5.5 on, 0 to -5.5.
inline float normal_cdf(float t) {
  constexpr float kP[] = {0x1.98845p-2f,   0x1.134eeap-5f,  0x1.31a256p-8f,
                          0x1.5d3184p-13f, 0x1.aa7318p-18f, 0x1.8c3e08p-26f};
  constexpr float kQ[] = {1.0f,          0x1.00ed8cp-2f, 0x1.d316d4p-6f, 0x1.ea8eb4p-10f, 0x1.322d4cp-14f,
                          0x1.43f58p-20f};
  constexpr float kLast = 5.45f * 5.45f;
  float square = t * t;
  square = kLast < square ? kLast : square;  // from here on the quotient stays, and the product passes 1/2
  float half = t * (polynomial(kP, square) / polynomial(kQ, square));
  half = 0.5f < half ? 0.5f : half;
  half = -0.5f > half ? -0.5f : half;
  return 0.5f + half;
}

// phi(t) = exp(-t^2 / 2) / sqrt(2 pi), with exp(u) = 2^n * exp(r), n = round(u / ln 2), |r| <= ln(2) / 2.
// exp(r) = 1 + r + r^2 * g(r); g minimises the largest relative error as above: 0.03 eps.
// Measured over every float: at most 0.4 eps from phi; relative to phi, up to |t| = 13, where it becomes
// subnormal, at most (1.2 + t^2 / 4) eps, of which t^2 / 4 is the rounding of t^2.
inline float normal_density(float t) {
  constexpr float kG[] = {0.49999994f, 0.166665211f, 0.041668389f, 0.00836874545f, 0.00138145383f};
  constexpr float kRound = 0x1.8p23f;                                  // floats of this size are integers
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // n * kLn2High is exact
  constexpr float kInvSqrt2Pi = 0.398942280f;
  float u = -0.5f * (t * t);
  u = u < -105.0f ? -105.0f : u;  // exp(-105) is 0 in float
  const float shifted = u * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (u - n * kLn2High) - n * kLn2Low;
  const float e = (r * r) * polynomial(kG, r) + r + 1.0f;
  // 2^n in two factors, of which neither is subnormal.
  const int32_t whole = static_cast<int32_t>(bits_of(shifted) - bits_of(kRound)), part = whole >> 1;
  const float first = float_of(static_cast<uint32_t>(127 + part) << 23);
  const float second = float_of(static_cast<uint32_t>(127 + whole - part) << 23);
  return e * kInvSqrt2Pi * first * second;
}

inline double normal_cdf(double t) { return 0.5 * (1.0 + std::erf(t * 0.70710678118654752440)); }
inline double normal_density(double t) { return std::exp(-0.5 * (t * t)) * 0.39894228040143267794; }

}  // namespace
}  // namespace deepshare::cpu
