// Gumbel attention on the CPU, float32: forward, backward, and the noise by itself.
//
// One task is a block of queries of one head, all of its keys in blocks that stay in the cache; matrix products are
// BLAS's. Tasks, and the order of sums within and between them, depend on the shapes alone, never on the number of
// threads; and but for a workspace of fixed size for each thread, no pass takes memory beside its results.
#include <torch/library.h>

#include <tuple>

#include "problem.h"
#include "turns.h"

namespace gumbel {
namespace {

constexpr int64_t kKeys = 512;        // keys of a block
constexpr int64_t kScores = 1 << 18;  // that one thread keeps of a block in a hard choice's backward pass
constexpr int64_t kFewRows = 32;      // with fewer in a block, products are slower than to draw scores again

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
    const int64_t tile = std::min(kKeys, f.k_len + f.k_shift);
    Workspace w(f.block, tile, tile, false);
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
        w.pairs(f, block, columns, 0, 0, [&](const Place& at, Row* const(&pair)[2]) {
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
          logs[i] = row.sum == 0.0f ? 0.0f : std::log2(row.sum);
          const float weight = row.sum == 0.0f ? 0.0f : 1.0f / row.sum;
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
    if (sum == 0.0f) continue;
    d_t += (row.p_d_t - row.p_d / sum * row.p_t) / sum, d_bits += (row.p_d_g - row.p_d / sum * row.p_g) / sum;
  }
}

// Where a block of queries puts its gradients: dQ of its rows, (rows, D); dK (Lk, D) and dV (Lk, Dv) of its head, to
// which it adds when its turn has come, a tile of keys at a time.
struct Sums {
  float *dq, *dk, *dv;
  Turns& turns;
  int64_t first, n;  // the head's first turn, and the block's place in each of them

  template <typename F>
  void in_turn(int64_t tile, F&& add) const {
    turns.take(first + tile, n, add);
  }
};

// Hard: what a block adds to dV, rows of dO. All its rows at once, so it has a turn of its own.
void scatter(const Problem& p, const Saved& s, const Head& head, const Block& block, float* dv) {
  const Field& f = p.field;
  const Matrix grad(s.grad);
  const int64_t* index = s.index.const_data_ptr<int64_t>() + (block.b * f.heads + block.h) * f.q_len;
  for (int64_t q = block.q(); q < block.q() + block.rows(); ++q) {
    const float weight = index[q] < 0 ? 0.0f : p.drops() ? dropout_of(head, f, q, index[q]) : 1.0f;
    if (weight == 0.0f) continue;
    const float* from = grad.at(block.b, block.h, q);
    float* to = dv + index[q] * f.v_dim;
    for (int64_t x = 0; x < f.v_dim; ++x) to[x] += weight * from[x];
  }
}

// The tiles of scores that the workspace of a backward pass holds.
int64_t kept_tiles(const Problem& p) {
  return p.hard ? std::max<int64_t>(kScores / p.field.block / kKeys, 1) : 1;
}
// The tiles of dO.V: all if there is room for as many again, as then no product is computed twice.
int64_t kept_gradients(const Problem& p) {
  const int64_t tiles = p.field.tiles(kKeys);
  return p.hard && 2 * tiles <= kept_tiles(p) ? std::max<int64_t>(tiles, 1) : 1;
}

// The gradients of one block of queries. A hard choice's delta is known when all keys were seen: a second sweep, from
// the last tile back, takes what the first has kept of the scores, and draws again what it has not.
void backward_block(const Problem& p, const Saved& s, const Head& head, const Block& block, Workspace& w,
                    const Sums& sums) {
  const Field& f = p.field;
  const Matrix query(p.query), key(p.key), value(p.value), grad(s.grad);
  const int64_t kv = block.h / (f.heads / f.kv_heads), rows = block.rows();
  const int64_t kept = kept_tiles(p), kept_d = kept_gradients(p);
  const float *q = query.at(block.b, block.h, block.q()), *g = grad.at(block.b, block.h, block.q());
  recall(p, s, head, block, w.rows);
  auto in_y = [&](const Columns& columns) { return columns.begin / kKeys % kept * kKeys; };
  auto in_d = [&](const Columns& columns) { return columns.begin / kKeys % kept_d * kKeys; };
  auto y_of = [&](const Columns& columns) {
    return w.y + block.first * w.stride + in_y(columns) + columns.offset(f);
  };
  auto d_of = [&](const Columns& columns) { return w.d + block.first * w.tile + in_d(columns) + columns.offset(f); };
  auto multiply_values = [&](const Columns& columns) {
    multiply(false, true, rows, columns.count(), f.v_dim, g, grad.row, value.at(block.b, kv, columns.j0), value.row,
             0.0f, d_of(columns), w.tile);
  };
  auto sweep = [&](const Columns& columns, bool hard, bool parameters) {
    const int64_t n = columns.count(), offset = columns.offset(f);
    multiply(false, true, rows, n, f.dim, q, query.row, key.at(block.b, kv, columns.j0), key.row, 0.0f,
             y_of(columns), w.stride);
    multiply_values(columns);
    for (int64_t r = block.first; r < block.last; ++r) {  // columns of no key: whatever lies there, 0 * NaN is NaN
      float* d = w.d + r * w.tile + in_d(columns);
      std::fill(d, d + offset, 0.0f);
      std::fill(d + offset + n, d + columns.end - columns.begin, 0.0f);
    }
    w.pairs(f, block, columns, in_y(columns), in_d(columns), [&](const Place& place, Row* const(&pair)[2]) {
      with_flags(p.noise, columns.masked, [&](auto noise, auto masked) {
        if (hard) weigh<noise(), masked(), true>(head, place, pair, p.drops(), parameters);
        else weigh<noise(), masked(), false>(head, place, pair, p.drops(), parameters);
      });
    });
  };
  auto add = [&](const Columns& columns, bool more) {
    const int64_t n = columns.count();
    multiply(false, false, rows, f.dim, n, d_of(columns), w.tile, key.at(block.b, kv, columns.j0), key.row,
             more ? 1.0f : 0.0f, sums.dq, f.dim);
    sums.in_turn(columns.begin / kKeys, [&] {
      float *dk = sums.dk + columns.j0 * f.dim, *dv = sums.dv + columns.j0 * f.v_dim;
      multiply(true, false, n, f.dim, rows, d_of(columns), w.tile, q, query.row, 1.0f, dk, f.dim);
      if (!p.hard) multiply(true, false, n, f.v_dim, rows, y_of(columns), w.stride, g, grad.row, 1.0f, dv, f.v_dim);
    });
  };

  for (int64_t c = 0; c < block.keys + f.k_shift; c += kKeys) {
    const Columns columns(f, block, c, kKeys);
    sweep(columns, p.hard, s.parameters);
    if (!p.hard) add(columns, c > 0);
  }
  if (!p.hard) return;
  sums.in_turn(f.tiles(kKeys), [&] { scatter(p, s, head, block, sums.dv); });
  for (int64_t r = block.first; r < block.last; ++r) {
    Row& row = w.rows[r];
    if (row.sum != 0.0f) row.log_sum = std::log2(row.sum), row.delta = row.p_d / row.sum;
  }
  const int64_t last = (block.keys + f.k_shift - 1) / kKeys * kKeys;
  for (int64_t c = last; c >= 0; c -= kKeys) {
    const Columns columns(f, block, c, kKeys);
    if (c <= last - kept * kKeys) {
      sweep(columns, false, false);
    } else {
      if (c < last && kept_d == 1) multiply_values(columns);  // those of the last tile are still there
      for (int64_t r = block.first; r < block.last; ++r) {
        w.rows[r].y = w.y + r * w.stride + in_y(columns), w.rows[r].d = w.d + r * w.tile + in_d(columns);
        differentiate(head, w.rows[r], columns.end - columns.begin, p.drops());
      }
    }
    add(columns, c < last);
  }
}

Gradients backward(const Problem& p, const Saved& s) {
  const Field& f = p.field;
  const int64_t blocks = f.blocks(), group = f.heads / f.kv_heads, kv_total = f.batch * f.kv_heads;
  const int64_t turns_of_head = f.tiles(kKeys) + 1;
  const auto options = p.query.options();
  Tensor d_query = at::zeros({f.batch, f.heads, f.q_len, f.dim}, options);
  Tensor d_key = at::zeros({f.batch, f.kv_heads, f.k_len, f.dim}, options);
  Tensor d_value = at::zeros({f.batch, f.kv_heads, f.k_len, f.v_dim}, options);
  float *dq = d_query.mutable_data_ptr<float>(), *dk = d_key.mutable_data_ptr<float>();
  float* dv = d_value.mutable_data_ptr<float>();
  std::vector<double> d_t(f.batch * f.heads * blocks), d_bits(d_t.size());
  Claims claims(kv_total, blocks * group);
  Turns turns(kv_total * turns_of_head);

  const int64_t threads = std::min<int64_t>(at::get_num_threads(), kv_total * blocks * group);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    turns.share([&] {
      const int64_t columns = f.k_len + f.k_shift;
      Workspace w(f.block, std::min(kKeys * kept_gradients(p), columns), std::min(kKeys * kept_tiles(p), columns),
                  true);
      for (Claim claim; claims.take(claim);) {
        // Blocks that see fewer keys come later: those that take a turn are the first ones of the head, without gaps.
        const int64_t b = claim.head / f.kv_heads, n = blocks - 1 - claim.n / group;
        const int64_t h = claim.head % f.kv_heads * group + claim.n % group, bh = b * f.heads + h;
        const Block block(f, b, h, n);
        if (block.keys == 0) continue;
        backward_block(p, s, p.head(b, h), block, w,
                       {dq + (bh * f.q_len + block.q()) * f.dim, dk + claim.head * f.k_len * f.dim,
                        dv + claim.head * f.k_len * f.v_dim, turns, claim.head * turns_of_head, claim.n});
        if (s.parameters) add_parameters(p, block, w.rows, d_t[bh * blocks + n], d_bits[bh * blocks + n]);
      }
    });
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
  return {d_query, d_key, d_value, d_tau, d_noise_scale};
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
  const int64_t with_gradients = whole_rows / 2 / kGroup * kGroup;
  const int64_t fitting = with_gradients >= 2 * kFewRows ? with_gradients : whole_rows;
  if (hard && whole_rows >= kFewRows) p.field.block = std::min(p.field.block, fitting);
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
