// Vectors of the widest registers there are, in the compiler's own vector types, and the functions of floats that
// attention needs. Branch-free and without -ffast-math: -inf means "does not take part" and must stay exact, and what
// was computed from NaN must be NaN. Comparisons with NaN are false.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace gumbel {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int kGroup = 16;             // positions that share Philox calls: {p, p ^ 8} for eight p
constexpr int kStep = 2 * kGroup;      // columns of a step
constexpr int kParts = kStep / W;      // vectors of a step in a row
constexpr int kWide = 2 * kParts;      // vectors of a step in two rows: those of one row, then those of the other

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint64_t vu64 __attribute__((vector_size(4 * W)));

#define GUMBEL_INLINE inline __attribute__((always_inline))

GUMBEL_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
GUMBEL_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }
GUMBEL_INLINE vf splat(float x) { return x - vf{}; }
GUMBEL_INLINE vf max(vf a, vf b) { return a > b ? a : b; }  // b if either is NaN

inline float sum(vf x) {
  float total = 0.0f;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}
inline float max(vf x) {
  float top = x[0];
  for (int i = 1; i < W; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// The functions take several vectors at once: a chain of dependent operations leaves most of the CPU idle, several
// side by side do not. The compiler unrolls EACH and keeps the order.
#define EACH for (int n = 0; n < N; ++n)

// y = c[0] + c[1] x + ... by Horner's rule; the coefficients come highest first.
template <int N, typename... Rest>
GUMBEL_INLINE void horner(const vf (&x)[N], vf (&y)[N], float c, Rest... rest) {
  EACH y[n] = y[n] * x[n] + c;
  if constexpr (sizeof...(rest) > 0) horner(x, y, rest...);
}

// t = 2^t for t <= 1 or NaN, relative error 2e-7; exactly 0 from 2^-125 down, where results would be denormal.
template <int N>
GUMBEL_INLINE void exp2(vf (&t)[N]) {
  vf f[N], p[N];
  vi zero[N], power[N];
  EACH zero[n] = t[n] <= -125.0f;
  EACH t[n] = zero[n] ? splat(-125.0f) : t[n];
  EACH p[n] = t[n] + 12583039.0f;  // 1.5 * 2^23 + 127: rounds to an integer, whose exponent then lies in the low bits
  EACH power[n] = (vi)p[n] << 23;
  EACH f[n] = t[n] - (p[n] - 12583039.0f);
  EACH p[n] = splat(0.001327647129073739f);
  horner(f, p, 0.009675541892647743f, 0.05550713092088699f, 0.24022120237350464f, 0.6931469440460205f,
         1.0000001192092896f);
  EACH t[n] = zero[n] ? vf{} : p[n] * (vf)power[n];
}
inline float exp2(float t) {
  vf x[1] = {splat(t)};
  exp2(x);
  return x[0][0];
}

// y = log2(2^e (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)], relative error 1.7e-7 where e = 0.
template <int N>
GUMBEL_INLINE void log2(const vi (&e)[N], const vf (&f)[N], vf (&y)[N]) {
  EACH y[n] = splat(-0.1457785665988922f);
  horner(f, y, 0.23403558135032654f, -0.2488831877708435f, 0.28709959983825684f, -0.36023929715156555f,
         0.48092320561408997f, -0.7213528156280518f, 1.4426950216293335f);
  EACH y[n] = y[n] * f[n] + __builtin_convertvector(e[n], vf);
}

// x = 2^e (1 + f) for a normal x > 0; f lies in log2's range.
template <int N>
GUMBEL_INLINE void split(const vf (&x)[N], vi (&e)[N], vf (&f)[N]) {
  EACH e[n] = (vi)x[n] - 0x3f3504f3;  // the bits of sqrt(1/2)
  EACH f[n] = (vf)((vi)x[n] - (e[n] & (int32_t)0xff800000)) - 1.0f;
  EACH e[n] = e[n] >> 23;
}

// log2(-log2(1 - v)), v = (word + 0.5) / 2^32: minus the Gumbel value in units of log(2), but for a constant.
// 1 - v comes from ~word, so that neither end loses digits; near 1 its logarithm is taken as that of 1 - v exactly.
template <int N>
GUMBEL_INLINE void gumbel_bits(const vu (&word)[N], vf (&bits)[N]) {
  vi e[N];
  vf f[N], v[N], u[N];
  EACH v[n] = __builtin_convertvector(word[n], vf) * -0x1p-32f - 0x1p-33f;
  EACH u[n] = __builtin_convertvector(~word[n], vf) * 0x1p-32f + 0x1p-33f;
  split(u, e, f);
  EACH f[n] = e[n] == 0 ? v[n] : f[n];
  log2(e, f, u);
  EACH u[n] = -u[n];
  split(u, e, f);
  log2(e, f, bits);
}
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kGumbelShift = 0.36651292058166435f;  // -log(log(2)): G = this - log(2) * gumbel_bits

}  // namespace gumbel
