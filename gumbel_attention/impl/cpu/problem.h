// A call of attention: its tensors and settings, and what each head makes of them.
#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "tile.h"

namespace gumbel {

struct Problem {
  Tensor query, key, value, tau, noise_scale, seed;
  Field field;
  float scale;
  bool hard, noise;
  double dropout_p;
  int64_t h_offset, h_total;

  Head head(int64_t b, int64_t h) const {
    auto of = [h](const Tensor& x) { return x.const_data_ptr<float>()[x.numel() == 1 ? 0 : h]; };
    const bool per_example = seed.dim() == 1;
    const int64_t drawn = seed.const_data_ptr<int64_t>()[per_example ? b : 0];
    const int64_t bh = (per_example ? 0 : b * h_total) + h_offset + h;
    const double below = std::nearbyint(dropout_p * 0x1p32);
    const bool all = below >= 0x1p32;
    return Head{scale, of(noise_scale), kLog2e / of(tau), Key(drawn, bh, 0), Key(drawn, bh, 1),
                all ? 0u : (uint64_t)below, all ? 0.0f : (float)(1.0 / (1.0 - dropout_p))};
  }
  bool drops() const { return dropout_p > 0.0; }
};

// The factor of dropout for one weight.
inline float dropout_of(const Head& head, const Field& f, int64_t q, int64_t k) {
  const uint32_t drawn = word((uint32_t)(q + f.q_offset), (uint32_t)(k + f.k_offset), head.dropout);
  return drawn >= head.drop_below ? head.kept : 0.0f;
}

// Calls f with true_type or false_type for each of the flags.
template <typename F>
void with_flags(bool a, bool b, F&& f) {
  if (a && b) f(std::true_type{}, std::true_type{});
  else if (a) f(std::true_type{}, std::false_type{});
  else if (b) f(std::false_type{}, std::true_type{});
  else f(std::false_type{}, std::false_type{});
}

// Keys and values with zeros for keys that no query sees: padding may hold NaN or inf, and 0 * NaN is NaN.
inline void hide(const Field& f, Tensor& key, Tensor& value) {
  if (!f.masked()) return;  // without a mask, keys that none sees come last, and no block reads them
  key = key.clone(at::MemoryFormat::Contiguous), value = value.clone(at::MemoryFormat::Contiguous);
  float *k = key.mutable_data_ptr<float>(), *v = value.mutable_data_ptr<float>();
  at::parallel_for(0, f.batch * f.kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> seen(f.k_len);
    const int64_t group = f.heads / f.kv_heads;
    const bool one_row = !f.causal && f.keep.stride[2] == 0 && f.bias.stride[2] == 0;
    const bool one_head = f.keep.stride[1] == 0 && f.bias.stride[1] == 0;
    std::vector<float> row(f.k_len + f.k_shift);
    for (int64_t task = begin; task < end; ++task) {
      std::fill(seen.begin(), seen.end(), 0);
      for (int64_t g = 0; g < (one_head ? 1 : group); ++g) {
        for (int64_t q = 0; q < (one_row ? 1 : f.q_len); ++q) {
          f.mask_row(task / f.kv_heads, task % f.kv_heads * group + g, q, 0, f.k_len + f.k_shift, row.data());
          for (int64_t j = 0; j < f.k_len; ++j) seen[j] |= row[j + f.k_shift] != -kInf;
        }
      }
      for (int64_t j = 0; j < f.k_len; ++j) {
        if (seen[j]) continue;
        std::fill_n(k + (task * f.k_len + j) * f.dim, f.dim, 0.0f);
        std::fill_n(v + (task * f.k_len + j) * f.v_dim, f.v_dim, 0.0f);
      }
    }
  });
}

// n-th of `count` in an order that mixes short and long causal rows: 0, last, 1, last - 1, ...
inline int64_t mixed(int64_t n, int64_t count) { return n % 2 == 0 ? n / 2 : count - 1 - n / 2; }

}  // namespace gumbel
