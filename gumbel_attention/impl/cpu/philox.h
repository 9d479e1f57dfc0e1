// The random words of the noise's specification (noise.py, version 1), for a group of 16 keys and two queries at once.
#pragma once

#include "vector.h"

namespace gumbel {

constexpr int kRounds = 7;
constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;

inline uint32_t fmix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  return h ^ (h >> 16);
}

// The round keys of a seed and a head in one stream.
struct Key {
  uint32_t a[kRounds], b[kRounds], stream;

  Key(int64_t seed, int64_t bh, uint32_t stream_) : stream(stream_) {
    const auto head = static_cast<uint32_t>(bh);
    uint32_t ka = fmix(static_cast<uint32_t>(seed) ^ fmix(head * 0x9E3779B1u + 0x7F4A7C15u));
    uint32_t kb = fmix(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32) + fmix(ka + head));
    for (int r = 0; r < kRounds; ++r, ka += 0x9E3779B9u, kb += 0xBB67AE85u) a[r] = ka, b[r] = kb;
  }
};

// The product of the low halves of 64-bit lanes.
GUMBEL_INLINE vu64 mul32(vu64 a, uint32_t b) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (vu64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (vu64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__)
  return (vu64)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
  return (a & 0xffffffffu) * (uint64_t)b;
#endif
}

// The low halves of the lanes of a, then of b.
GUMBEL_INLINE vu pack(vu64 a, vu64 b) {
  vu out;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  out = (vu)_mm512_permutex2var_epi32((__m512i)a, even, (__m512i)b);
#else
  for (int i = 0; i < W / 2; ++i) out[i] = (uint32_t)a[i], out[W / 2 + i] = (uint32_t)b[i];
#endif
  return out;
}

// The words of queries q and q + 8 (bit 3 of q is 0) with keys k ... k + 31 (k a multiple of 16), one row after the
// other. Lanes hold 64 bits, of which a product reads the lower half: what is left in the upper one does no harm.
GUMBEL_INLINE void philox(uint32_t q, uint32_t k, const Key& key, vu (&out)[kWide]) {
  constexpr int L = W / 2, P = 8 / L, N = kStep / kGroup * P;  // lanes of a vector, vectors of a group and of all
  const uint64_t q_product = (uint64_t)q * kM0;
  vu64 c[4][N], p0[N], p1[N];
  EACH {
    vu64 lane;
    for (int i = 0; i < L; ++i) lane[i] = n / P * kGroup + n % P * L + i;
    p1[n] = mul32(lane + (uint64_t)k, kM1);
    c[0][n] = (p1[n] >> 32) ^ (uint64_t)(key.stream ^ key.a[0]);
    c[1][n] = p1[n];
    c[2][n] = vu64{} + (uint64_t)((uint32_t)(q_product >> 32) ^ key.b[0]);
    c[3][n] = vu64{} + (uint64_t)(uint32_t)q_product;
  }
  for (int r = 1; r < kRounds; ++r) {
    EACH p0[n] = mul32(c[0][n], kM0);
    EACH p1[n] = mul32(c[2][n], kM1);
    EACH c[0][n] = (p1[n] >> 32) ^ c[1][n] ^ (uint64_t)key.a[r];
    EACH c[2][n] = (p0[n] >> 32) ^ c[3][n] ^ (uint64_t)key.b[r];
    EACH c[1][n] = p1[n];
    EACH c[3][n] = p0[n];
  }
  for (int i = 0; i < kWide; ++i) {  // in halves: c[0] and c[2] have keys 0 ... 7 of a group, the others 8 ... 15
    vu64 half[2];
    for (int j = 0; j < 2; ++j) {
      const int column = (i % kParts * 2 + j) * L, group = column / kGroup, within = column % kGroup;
      half[j] = c[i / kParts * 2 + within / 8][group * P + within % 8 / L];
    }
    out[i] = pack(half[0], half[1]);
  }
}

// The word of one query and one key.
inline uint32_t word(uint32_t q, uint32_t k, const Key& key) {
  uint32_t c0 = q & ~8u, c1 = key.stream, c2 = k & ~8u, c3 = 0;
  for (int r = 0; r < kRounds; ++r) {
    const uint64_t p0 = (uint64_t)c0 * kM0, p1 = (uint64_t)c2 * kM1;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key.a[r];
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key.b[r];
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
  }
  const uint32_t four[4] = {c0, c1, c2, c3};
  return four[2 * ((q >> 3) & 1) + ((k >> 3) & 1)];
}

}  // namespace gumbel
