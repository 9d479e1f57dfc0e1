// Gumbel attention on the CPU, float32: forward, backward, and the noise by itself.
//
// One task is a block of queries of one head, all of its keys in blocks that stay in the cache; matrix products are
// BLAS's. Tasks, and the order of sums within them, depend on the shapes alone, never on the number of threads.
#include <torch/library.h>

#include <tuple>

#include "problem.h"

namespace gumbel {
namespace {

constexpr int64_t kKeys = 512;        // keys of a block
constexpr int64_t kTasks = 4;         // tasks that a backward pass is cut into, if there are fewer heads
constexpr int64_t kScores = 1 << 17;  // scores of a block of whole rows, which a hard choice's backward pass holds

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Problem& p) {
  const Field& f = p.field;
  const auto rows = p.query.options();
  Tensor output = at::empty({f.batch, f.heads, f.q_len, f.v_dim}, rows);
  Tensor top = at::empty({f.batch, f.heads, f.q_len}, rows);
  Tensor log_sum = at::empty({f.batch, f.heads, p.hard ? 0 : f.q_len}, rows);
  Tensor index = at::empty({f.batch, f.heads, p.hard ? f.q_len : 0}, rows.dtype(at::kLong));
  const Matrix query(p.query), key(p.key), value(p.value);
  float *out = output.mutable_data_ptr<float>(), *tops = top.mutable_data_ptr<float>();
  float* logs = log_sum.mutable_data_ptr<float>();
  int64_t* indices = index.mutable_data_ptr<int64_t>();
  const int64_t blocks = f.blocks(), group = f.heads / f.kv_heads;

  at::parallel_for(0, f.batch * f.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    Workspace w(f.block, std::min(kKeys, f.k_len + f.k_shift), false);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bh = task / blocks, b = bh / f.heads, h = bh % f.heads;
      const Head head = p.head(b, h);
      const Block block(f, b, h, mixed(task % blocks, blocks));
      float* o = out + (bh * f.q_len + block.q()) * f.v_dim;
      std::fill_n(o, block.rows() * f.v_dim, 0.0f);
      std::fill(w.rows, w.rows + f.block, Row{});
      for (int64_t c = 0; block.keys > 0 && c < block.keys + f.k_shift; c += kKeys) {
        const Columns columns(f, block, c, kKeys);
        const int64_t n = columns.count(), offset = columns.offset(f);
        multiply(false, true, block.rows(), n, f.dim, query.at(b, h, block.q()), query.row,
                 key.at(b, h / group, columns.j0), key.row, 0.0f, w.y + block.first * w.stride + offset, w.stride);
        w.pairs(f, block, columns, 0, [&](const Place& at, Row* const(&pair)[2]) {
          with_flags(p.noise, columns.masked, [&](auto noise, auto masked) {
            if (p.hard) choose<noise(), masked()>(head, at, pair, c);
            else score<noise(), masked()>(head, at, pair);
          });
          if (p.hard) return;
          if (p.drops()) exponentiate<true>(head, at, pair);
          else exponentiate<false>(head, at, pair);
        });
        if (p.hard) continue;
        for (int64_t r = block.first; c > 0 && r < block.last; ++r) {
          if (w.rows[r].alpha == 1.0f) continue;
          float* row = o + (r - block.first) * f.v_dim;
          for (int64_t i = 0; i < f.v_dim; ++i) row[i] *= w.rows[r].alpha;
        }
        multiply(false, false, block.rows(), f.v_dim, n, w.y + block.first * w.stride + offset, w.stride,
                 value.at(b, h / group, columns.j0), value.row, c == 0 ? 0.0f : 1.0f, o, f.v_dim);
      }
      for (int64_t r = block.first; r < block.last; ++r) {
        const Row& row = w.rows[r];
        const int64_t i = bh * f.q_len + block.q0 + r;
        float* to = out + i * f.v_dim;
        tops[i] = row.top;
        if (p.hard) {
          const int64_t j = row.index < 0 ? -1 : row.index - f.k_shift;
          indices[i] = j;
          const float weight = j < 0 ? 0.0f : p.drops() ? dropout_of(head, f, block.q0 + r, j) : 1.0f;
          if (weight == 0.0f) continue;  // the zeros stay: 0 * NaN is NaN
          const float* from = value.at(b, h / group, j);
          for (int64_t x = 0; x < f.v_dim; ++x) to[x] = from[x] * weight;
        } else {
          logs[i] = row.sum > 0.0f ? std::log2(row.sum) : 0.0f;
          const float weight = row.sum > 0.0f ? 1.0f / row.sum : 0.0f;
          for (int64_t x = 0; x < f.v_dim; ++x) to[x] *= weight;
        }
      }
    }
  });
  return {output, top, log_sum, index};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the backward pass takes beside the problem.
struct Saved {
  Tensor grad, output, top, log_sum, index;
  bool parameters;  // whether tau or noise_scale want a gradient
};

// Sets the statistics of a block's rows.
void recall(const Problem& p, const Saved& s, const Head& head, const Block& block, Row* rows) {
  const Field& f = p.field;
  const Matrix grad(s.grad), output(s.output);
  std::fill(rows, rows + f.block, Row{});
  for (int64_t r = block.first; r < block.last; ++r) {
    const int64_t i = (block.b * f.heads + block.h) * f.q_len + block.q0 + r;
    Row& row = rows[r];
    row.top = s.top.const_data_ptr<float>()[i];
    row.slope = head.scale * head.per_tau / kLog2e;
    if (p.hard) continue;
    row.log_sum = s.log_sum.const_data_ptr<float>()[i];
    const float *a = grad.at(block.b, block.h, block.q0 + r), *b = output.at(block.b, block.h, block.q0 + r);
    for (int64_t x = 0; x < f.v_dim; ++x) row.delta += a[x] * b[x];
  }
}

// The sums of dZ * t and dZ * bits over a block, for tau and noise_scale. A constant in t or bits drops out, as dZ
// sums to 0; so that rounding does not bring it back, t and bits are taken relative to their means.
void add_parameters(const Problem& p, const Block& block, const Row* rows, double& d_t, double& d_bits) {
  for (int64_t r = block.first; r < block.last; ++r) {
    const Row& row = rows[r];
    const float sum = p.hard ? row.sum : 1.0f;
    if (sum <= 0.0f) continue;
    d_t += (row.p_d_t - row.p_d / sum * row.p_t) / sum, d_bits += (row.p_d_g - row.p_d / sum * row.p_g) / sum;
  }
}

// One block of queries: dQ of its rows, and what it adds to dK and dV, (Lk, D) and (Lk, Dv).
void backward_block(const Problem& p, const Saved& s, const Head& head, const Block& block, Workspace& w, float* dq,
                    float* dk, float* dv) {
  const Field& f = p.field;
  const Matrix query(p.query), key(p.key), value(p.value), grad(s.grad);
  const int64_t kv = block.h / (f.heads / f.kv_heads), rows = block.rows(), first = block.first * w.stride;
  const float *q = query.at(block.b, block.h, block.q()), *g = grad.at(block.b, block.h, block.q());
  recall(p, s, head, block, w.rows);
  auto products = [&](int64_t j0, int64_t n, int64_t column, bool more) {
    const float* d = w.d + first + column;
    multiply(false, false, rows, f.dim, n, d, w.stride, key.at(block.b, kv, j0), key.row, more ? 1.0f : 0.0f, dq,
             f.dim);
    multiply(true, false, n, f.dim, rows, d, w.stride, q, query.row, 1.0f, dk + j0 * f.dim, f.dim);
  };
  for (int64_t c = 0; c < block.keys + f.k_shift; c += kKeys) {
    const Columns columns(f, block, c, kKeys);
    const int64_t n = columns.count(), at = p.hard ? c : 0, offset = at + columns.offset(f);
    multiply(false, true, rows, n, f.dim, q, query.row, key.at(block.b, kv, columns.j0), key.row, 0.0f,
             w.y + first + offset, w.stride);
    multiply(false, true, rows, n, f.v_dim, g, grad.row, value.at(block.b, kv, columns.j0), value.row, 0.0f,
             w.d + first + offset, w.stride);
    for (int64_t r = block.first; r < block.last; ++r) {  // columns of no key: whatever lies there, 0 * NaN is NaN
      float* d = w.d + r * w.stride + at;
      std::fill(d, w.d + r * w.stride + offset, 0.0f);
      std::fill(w.d + r * w.stride + offset + n, d + columns.end - columns.begin, 0.0f);
    }
    w.pairs(f, block, columns, at, [&](const Place& place, Row* const(&pair)[2]) {
      with_flags(p.noise, columns.masked, [&](auto noise, auto masked) {
        if (p.hard) weigh<noise(), masked(), true>(head, place, pair, p.drops(), s.parameters);
        else weigh<noise(), masked(), false>(head, place, pair, p.drops(), s.parameters);
      });
    });
    if (p.hard) continue;
    multiply(true, false, n, f.v_dim, rows, w.y + first + offset, w.stride, g, grad.row, 1.0f,
             dv + columns.j0 * f.v_dim, f.v_dim);
    products(columns.j0, n, offset, c > 0);
  }
  if (!p.hard) return;
  const int64_t* index = s.index.const_data_ptr<int64_t>() + (block.b * f.heads + block.h) * f.q_len;
  for (int64_t r = block.first; r < block.last; ++r) {
    Row& row = w.rows[r];
    row.y = w.y + r * w.stride, row.d = w.d + r * w.stride;
    row.delta = row.sum > 0.0f ? row.p_d / row.sum : 0.0f;
    differentiate(row, (block.keys + f.k_shift + kStep - 1) / kStep * kStep);
    const int64_t j = index[block.q0 + r];
    const float weight = j < 0 ? 0.0f : p.drops() ? dropout_of(head, f, block.q0 + r, j) : 1.0f;
    if (weight == 0.0f) continue;
    const float* from = grad.at(block.b, block.h, block.q0 + r);
    for (int64_t x = 0; x < f.v_dim; ++x) dv[j * f.v_dim + x] += weight * from[x];
  }
  products(0, block.keys, f.k_shift, false);
}

// Sums over the chunks of each head: (heads * chunks, L, D) -> (B, Hk, L, D), in the order of the chunks.
Tensor total(const Tensor& parts, int64_t chunks, at::IntArrayRef shape) {
  if (chunks == 1) return parts.view(shape);
  Tensor sum = at::empty(shape, parts.options());
  const int64_t heads = parts.size(0) / chunks, size = parts.size(1) * parts.size(2);
  const float* from = parts.const_data_ptr<float>();
  float* to = sum.mutable_data_ptr<float>();
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      std::copy_n(from + h * chunks * size, size, to + h * size);
      for (int64_t n = 1; n < chunks; ++n)
        for (int64_t i = 0; i < size; ++i) to[h * size + i] += from[(h * chunks + n) * size + i];
    }
  });
  return sum;
}

Gradients backward(const Problem& p, const Saved& s) {
  const Field& f = p.field;
  const int64_t blocks = f.blocks(), group = f.heads / f.kv_heads, kv_total = f.batch * f.kv_heads;
  const int64_t wanted = kTasks / std::max<int64_t>(kv_total, 1);
  const int64_t chunks = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(blocks, 1));
  const auto options = p.query.options();
  Tensor d_query = at::zeros({f.batch, f.heads, f.q_len, f.dim}, options);
  Tensor d_key = at::zeros({kv_total * chunks, f.k_len, f.dim}, options);
  Tensor d_value = at::zeros({kv_total * chunks, f.k_len, f.v_dim}, options);
  float *dq = d_query.mutable_data_ptr<float>(), *dk = d_key.mutable_data_ptr<float>();
  float* dv = d_value.mutable_data_ptr<float>();
  std::vector<double> d_t(f.batch * f.heads * blocks), d_bits(d_t.size());

  at::parallel_for(0, kv_total * chunks, 1, [&](int64_t begin, int64_t end) {
    Workspace w(f.block, p.hard ? f.k_len + f.k_shift : std::min(kKeys, f.k_len + f.k_shift), true);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks / f.kv_heads, kv = task / chunks % f.kv_heads;
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        const Head head = p.head(b, h);
        for (int64_t n = task % chunks; n < blocks; n += chunks) {
          const Block block(f, b, h, n);
          if (block.keys == 0) continue;
          const int64_t bh = b * f.heads + h;
          backward_block(p, s, head, block, w, dq + (bh * f.q_len + block.q()) * f.dim, dk + task * f.k_len * f.dim,
                         dv + task * f.k_len * f.v_dim);
          if (s.parameters) add_parameters(p, block, w.rows, d_t[bh * blocks + n], d_bits[bh * blocks + n]);
        }
      }
    }
  });

  Tensor d_tau = at::zeros({p.tau.numel()}, options), d_noise_scale = at::zeros({p.noise_scale.numel()}, options);
  for (int64_t bh = 0; s.parameters && bh < f.batch * f.heads; ++bh) {
    const int64_t h = bh % f.heads;
    const double tau = p.tau.const_data_ptr<float>()[p.tau.numel() == 1 ? 0 : h];
    double t = 0.0, bits = 0.0;
    for (int64_t n = 0; n < blocks; ++n) t += d_t[bh * blocks + n], bits += d_bits[bh * blocks + n];
    d_tau.mutable_data_ptr<float>()[p.tau.numel() == 1 ? 0 : h] -= t * kLn2 / tau;
    d_noise_scale.mutable_data_ptr<float>()[p.noise_scale.numel() == 1 ? 0 : h] -= bits * kLn2 / tau;
  }
  const int64_t kv_shape[4] = {f.batch, f.kv_heads, f.k_len, f.dim};
  const int64_t v_shape[4] = {f.batch, f.kv_heads, f.k_len, f.v_dim};
  return {d_query, total(d_key, chunks, kv_shape), total(d_value, chunks, v_shape), d_tau, d_noise_scale};
}

// The arguments that both passes share, in the schema's order.
#define GUMBEL_PROBLEM                                                                                                \
  const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &tau, const Tensor &noise_scale,          \
      const Tensor &seed, const std::optional<Tensor>&keep, const std::optional<Tensor>&bias, double scale,           \
      bool is_causal, int64_t q_offset, int64_t k_offset, bool hard, bool noise, double dropout_p, int64_t h_offset,  \
      int64_t h_total, int64_t block

// x, or a copy where BLAS cannot read its rows as they lie.
Tensor with_rows(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 4, "expected float32 and four dimensions, got ",
              x.scalar_type(), " and ", x.dim(), ".");
  return x.stride(3) == 1 && x.stride(2) >= std::max<int64_t>(x.size(3), 1) ? x : x.contiguous();
}

Problem problem(GUMBEL_PROBLEM) {
  TORCH_CHECK(block >= 0 && block <= 128 && block % 16 == 0, "block must be 0, 16, 32, ... 128, got ", block, ".");
  const int64_t rows = block > 0 ? block : query.size(2) >= 1024 ? 128 : 64;
  Field field{query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3),
              is_causal, q_offset, k_offset, Mask<bool>(keep), Mask<float>(bias), q_offset & 15, k_offset & 15, rows};
  Problem p{with_rows(query),         with_rows(key),    with_rows(value), tau.contiguous(),
            noise_scale.contiguous(), seed.contiguous(), field,            (float)scale,
            hard,                     noise,             dropout_p,        h_offset,
            h_total};
  hide(p.field, p.key, p.value);
  return p;
}
#define GUMBEL_ARGUMENTS                                                                                              \
  query, key, value, tau, noise_scale, seed, keep, bias, scale, is_causal, q_offset, k_offset, hard, noise,           \
      dropout_p, h_offset, h_total, block

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(GUMBEL_PROBLEM) { return forward(problem(GUMBEL_ARGUMENTS)); }

Gradients backward_op(const Tensor& grad, const Tensor& output, const Tensor& top, const Tensor& log_sum,
                      const Tensor& index, bool parameters, GUMBEL_PROBLEM) {
  Problem p = problem(GUMBEL_ARGUMENTS);
  const int64_t whole_rows = kScores / std::max<int64_t>(p.field.k_len, 1) / kGroup * kGroup;
  if (hard) p.field.block = std::clamp<int64_t>(whole_rows, kGroup, p.field.block);
  return backward(p, Saved{with_rows(grad), output, top, log_sum, index, parameters});
}

// The words of a rectangle of positions, as the kernels draw them: int64 (q_len, k_len).
Tensor words_op(int64_t seed, int64_t bh, int64_t q_offset, int64_t q_len, int64_t k_offset, int64_t k_len,
                int64_t stream) {
  Tensor out = at::empty({q_len, k_len}, at::kLong);
  int64_t* to = out.mutable_data_ptr<int64_t>();
  const Key key(seed, bh, (uint32_t)stream);
  for (int64_t q = q_offset & ~15; q < q_offset + q_len; q += (q & 7) == 7 ? 9 : 1) {
    for (int64_t k = k_offset & ~15; k < k_offset + k_len; k += kStep) {
      vu pair[kWide];
      philox((uint32_t)q, (uint32_t)k, key, pair);
      for (int64_t i = 0; i < 2 * kStep; ++i) {
        const int64_t row = q + i / kStep * 8 - q_offset, column = k + i % kStep - k_offset;
        if (row < 0 || row >= q_len || column < 0 || column >= k_len) continue;
        to[row * k_len + column] = pair[i / W][i % W];
      }
    }
  }
  return out;
}

// The Gumbel values of int64 words, as the kernels compute them: float32 (n,).
Tensor gumbel_op(const Tensor& words) {
  const Tensor from = words.contiguous();
  Tensor out = at::empty({from.numel()}, at::kFloat);
  const int64_t* x = from.const_data_ptr<int64_t>();
  float* to = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < from.numel(); i += W) {
    const int64_t n = std::min<int64_t>(W, from.numel() - i);
    vu word[1] = {};
    vf bits[1];
    for (int64_t j = 0; j < n; ++j) word[0][j] = (uint32_t)x[i + j];
    gumbel_bits(word, bits);
    for (int64_t j = 0; j < n; ++j) to[i + j] = kGumbelShift - kLn2 * bits[0][j];
  }
  return out;
}

#define GUMBEL_SCHEMA                                                                                                 \
  "Tensor query, Tensor key, Tensor value, Tensor tau, Tensor noise_scale, Tensor seed, Tensor? keep, Tensor? bias, " \
  "float scale, bool is_causal, int q_offset, int k_offset, bool hard, bool noise, float dropout_p, int h_offset, "   \
  "int h_total, int block"

TORCH_LIBRARY_FRAGMENT(gumbel_attention, m) {
  m.def("cpu_forward(" GUMBEL_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_backward(Tensor grad, Tensor output, Tensor top, Tensor log_sum, Tensor index, "
      "bool parameters, " GUMBEL_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_words(int seed, int bh, int q_offset, int q_len, int k_offset, int k_len, int stream) -> Tensor",
        words_op);
  m.def("cpu_gumbel(Tensor words) -> Tensor");
}

TORCH_LIBRARY_IMPL(gumbel_attention, CPU, m) {
  m.impl("cpu_forward", forward_op);
  m.impl("cpu_backward", backward_op);
  m.impl("cpu_gumbel", gumbel_op);
}

}  // namespace
}  // namespace gumbel
