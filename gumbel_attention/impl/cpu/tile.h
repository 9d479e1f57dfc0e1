// Blocks of queries and keys: which there are, what masks them, and their products.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>

#include "sweeps.h"

// BLAS as torch links it. Where torch hides it, at::addmm does the same with some overhead.
extern "C" __attribute__((weak)) void sgemm_(
    const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
    const float*, const int*, const float*, float*, const int*);

namespace gumbel {

using at::Tensor;

// C = alpha * op(A) op(B) + beta * C, row-major; op(A) is m x k, op(B) is k x n.
inline void multiply(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                     const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  if (m <= 0 || n <= 0) return;
  if (&sgemm_ != nullptr) {
    const float alpha = 1.0f;
    const int im = m, in = n, ik = k, ia = lda, ib = ldb, ic = ldc;
    sgemm_(transpose_b ? "T" : "N", transpose_a ? "T" : "N", &in, &im, &ik, &alpha, b, &ib, a, &ia, &beta, c, &ic);
    return;
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  auto matrix = [](const float* p, int64_t rows, int64_t columns, int64_t stride, bool transpose) {
    Tensor x = at::from_blob(const_cast<float*>(p), {rows, columns}, {stride, 1}, at::kFloat);
    return transpose ? x.t() : x;
  };
  Tensor out = matrix(c, m, n, ldc, false);
  at::addmm_out(out, out, transpose_a ? matrix(a, k, m, lda, true) : matrix(a, m, k, lda, false),
                transpose_b ? matrix(b, n, k, ldb, true) : matrix(b, k, n, ldb, false), beta, 1.0f);
}

// (B, H, L, D) with contiguous rows.
struct Matrix {
  const float* data;
  int64_t batch, head, row;

  explicit Matrix(const Tensor& x)
      : data(x.const_data_ptr<float>()), batch(x.stride(0)), head(x.stride(1)), row(x.stride(2)) {}
  const float* at(int64_t b, int64_t h, int64_t i = 0) const { return data + b * batch + h * head + i * row; }
};

// A mask that broadcasts to (B, H, Lq, Lk): strides are 0 where it does.
template <typename T>
struct Mask {
  const T* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  explicit Mask(const std::optional<Tensor>& x) {
    if (!x.has_value()) return;
    data = x->const_data_ptr<T>();
    for (int i = 0; i < 4; ++i) stride[i] = x->size(i) == 1 ? 0 : x->stride(i);
  }
  const T* row(int64_t b, int64_t h, int64_t q) const { return data + b * stride[0] + h * stride[1] + q * stride[2]; }
};

// The shape of a call, its masks, and where it lies in the field of noise.
struct Field {
  int64_t batch, heads, kv_heads, q_len, k_len, dim, v_dim;
  bool causal;
  int64_t q_offset, k_offset;
  Mask<bool> keep;
  Mask<float> bias;
  int64_t q_shift, k_shift;  // rows and columns before the first query and key, so that groups of 16 are aligned
  int64_t block;             // queries of a block

  int64_t blocks() const { return q_len == 0 ? 0 : (q_len + q_shift + block - 1) / block; }
  int64_t tiles(int64_t size) const { return (k_len + k_shift + size - 1) / size; }
  bool masked() const { return keep.data != nullptr || bias.data != nullptr; }
  // Keys that query q may see: those before this one.
  int64_t limit(int64_t q) const {
    return causal ? std::clamp<int64_t>(q + q_offset - k_offset + 1, 0, k_len) : k_len;
  }

  // What the mask adds to the scores of query q with columns first ... first + columns: -inf takes no part, NaN does.
  void mask_row(int64_t b, int64_t h, int64_t q, int64_t first, int64_t columns, float* out) const {
    std::fill(out, out + columns, -kInf);
    if (q < 0 || q >= q_len) return;
    const int64_t begin = std::max<int64_t>(first - k_shift, 0), end = std::min(first + columns - k_shift, limit(q));
    if (begin >= end) return;
    float* to = out + begin + k_shift - first;
    const int64_t n = end - begin;
    constexpr float lowest = std::numeric_limits<float>::lowest() / 2;
    if (bias.data == nullptr) {
      std::fill(to, to + n, 0.0f);
    } else {
      const int64_t step = bias.stride[3];
      const float* from = bias.row(b, h, q) + begin * step;
      if (step == 1)
        for (int64_t i = 0; i < n; ++i) to[i] = from[i] <= lowest ? -kInf : from[i];
      else
        for (int64_t i = 0; i < n; ++i) to[i] = from[i * step] <= lowest ? -kInf : from[i * step];
    }
    if (keep.data == nullptr) return;
    const int64_t step = keep.stride[3];
    const bool* from = keep.row(b, h, q) + begin * step;
    if (step == 1)
      for (int64_t i = 0; i < n; ++i) to[i] = from[i] ? to[i] : -kInf;
    else
      for (int64_t i = 0; i < n; ++i) to[i] = from[i * step] ? to[i] : -kInf;
  }
};

// A block of queries of one head: rows first ... last of the tile are queries q0 + row.
struct Block {
  int64_t b, h, q0, first, last, keys;  // no row sees a key from keys on

  Block(const Field& f, int64_t b_, int64_t h_, int64_t n) : b(b_), h(h_), q0(n * f.block - f.q_shift) {
    first = std::max<int64_t>(-q0, 0), last = std::min(f.block, f.q_len - q0);
    keys = f.limit(q0 + last - 1);
  }
  int64_t rows() const { return last - first; }
  int64_t q() const { return q0 + first; }
};

// A block of keys, of columns begin ... end of the whole row; keys j0 ... j1 lie in it.
struct Columns {
  int64_t begin, end, j0, j1;
  bool masked;

  Columns(const Field& f, const Block& block, int64_t begin_, int64_t size) : begin(begin_) {
    j0 = std::max<int64_t>(begin - f.k_shift, 0), j1 = std::min(begin + size - f.k_shift, block.keys);
    end = begin + (j1 + f.k_shift - begin + kStep - 1) / kStep * kStep;
    masked = f.masked() || begin < f.k_shift || end > f.k_shift + f.limit(block.q());
  }
  int64_t count() const { return j1 - j0; }
  int64_t offset(const Field& f) const { return j0 + f.k_shift - begin; }  // of key j0 in the tile
};

// Memory of one thread: one or more tiles of scores and of their gradients, the mask of two rows, and the state of
// the rows.
struct Workspace {
  int64_t stride, tile;  // from row to row of y, and of d and the mask
  Tensor memory;
  float *y, *d, *mask;
  Row rows[128];

  Workspace(int64_t block, int64_t columns, int64_t y_columns, bool backward)
      : stride(padded(y_columns)),
        tile(padded(columns)),
        memory(at::zeros({block * stride + ((backward ? block : 0) + 2) * tile}, at::kFloat)) {
    mask = memory.mutable_data_ptr<float>();
    y = mask + 2 * tile;
    d = backward ? y + block * stride : nullptr;
  }
  static int64_t padded(int64_t columns) { return (columns + kStep - 1) / kStep * kStep + kGroup; }

  // Calls sweep(place, pair of rows) for all pairs of rows of which one is in the block; their scores lie in y from
  // column in_y on, and their gradients in d from in_d on.
  template <typename Sweep>
  void pairs(const Field& f, const Block& block, const Columns& columns, int64_t in_y, int64_t in_d, Sweep&& sweep) {
    const int64_t length = columns.end - columns.begin;
    for (int64_t r = 0; r < f.block; r += (r & 7) == 7 ? 9 : 1) {
      const bool used[2] = {r >= block.first && r < block.last, r + 8 >= block.first && r + 8 < block.last};
      if (!used[0] && !used[1]) continue;
      Row* const pair[2] = {&rows[r], &rows[r + 8]};
      for (int i = 0; i < 2; ++i) {
        const int64_t row = r + 8 * i;
        pair[i]->y = y + row * stride + in_y;
        pair[i]->d = d == nullptr ? nullptr : d + row * tile + in_d;
        pair[i]->mask = mask + i * tile;
        if (columns.masked)
          f.mask_row(block.b, block.h, used[i] ? block.q0 + row : -1, columns.begin, length, mask + i * tile);
      }
      const auto q = (uint32_t)(block.q0 + r + f.q_offset), k = (uint32_t)(columns.begin - f.k_shift + f.k_offset);
      sweep(Place{q, k, length}, pair);
    }
  }
};

}  // namespace gumbel
