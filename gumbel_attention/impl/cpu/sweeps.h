// What is done to a tile of scores row by row: noise, mask, softmax or the choice, and their gradients.
//
// Columns are counted so that groups of 16 positions start at multiples of 16 (column = key + shift), and so are rows
// within a tile: rows r and r + 8 share their Philox calls. y = scale * q.k + mask + noise_scale * G are the logits
// before tau divides them, so that the maximum is subtracted while they are still exact.
#pragma once

#include <limits>

#include "philox.h"

namespace gumbel {

constexpr float kInf = std::numeric_limits<float>::infinity();

// What all rows of one head share.
struct Head {
  float scale, noise_scale, per_tau;  // per_tau = log2(e) / tau
  Key noise, dropout;
  uint64_t drop_below;  // dropout keeps the words that are not below
  float kept;           // and multiplies them by this
};

// One row of a tile: its scores, what the mask adds to them, the gradient of its weights, and its statistics.
struct Row {
  float* y;
  const float* mask;
  float* d = nullptr;
  float top = -kInf;   // largest y so far; NaN is left out where the choice is soft, the largest where it is hard
  float sum = 0.0f;    // of exp((y - top) / tau), NaN if any y is
  float alpha = 1.0f;  // what earlier sums are multiplied by, after a larger top was found
  int64_t index = -1;  // column of the largest y
  float log_sum = 0.0f, delta = 0.0f, slope = 0.0f;  // backward: log2(sum), rowsum(P dP), scale / tau
  // Backward: sums over a row of P dP (hard) or of dZ (soft), and with t = log2(P) + const and the noise for the
  // gradients of tau and noise_scale. P is exp((y - top) / tau) where the choice is hard.
  float p_d = 0.0f, p_t = 0.0f, p_d_t = 0.0f, p_g = 0.0f, p_d_g = 0.0f;
};

// Where a tile's columns lie: positions of its first query pair and first column.
struct Place {
  uint32_t q, k;
  int64_t columns;  // a multiple of kStep
};

// In what follows, N vectors are those of two rows: row_of and shift_of tell where the n-th of them lies.
constexpr int N = kWide;
constexpr int row_of(int n) { return n / kParts; }
constexpr int shift_of(int n) { return n % kParts * W; }

// The factors of dropout.
GUMBEL_INLINE void dropout(const Head& head, uint32_t q, uint32_t k, vf (&out)[N]) {
  vu words[N];
  philox(q, k, head.dropout, words);
  EACH out[n] = words[n] >= vu{} + (uint32_t)head.drop_below ? splat(head.kept) : vf{};
}

// The logits of columns c ... of two rows, and the noise in them (in units of -log(2), less a constant).
template <bool kNoise, bool kMask>
GUMBEL_INLINE void logits(const Head& head, const Place& at, Row* const (&rows)[2], int64_t c, vf (&y)[N],
                          vf (&bits)[N]) {
  if constexpr (kNoise) {
    vu words[N];
    philox(at.q, at.k + (uint32_t)c, head.noise, words);
    gumbel_bits(words, bits);
    EACH y[n] = bits[n] * (head.noise_scale * -kLn2) + head.noise_scale * kGumbelShift;
    EACH y[n] = load(rows[row_of(n)]->y + c + shift_of(n)) * head.scale + y[n];
  } else {
    EACH bits[n] = vf{};
    EACH y[n] = load(rows[row_of(n)]->y + c + shift_of(n)) * head.scale;
  }
  if constexpr (kMask) {
    EACH {
      const vf m = load(rows[row_of(n)]->mask + c + shift_of(n));
      y[n] = m == -kInf ? m : y[n] + m;  // not y + m alone: y may be NaN where nothing takes part
    }
  }
}

// Sums, or maxima, of what belongs to one of the two rows.
inline float sum_of(const vf (&x)[N], int row) {
  float total = 0.0f;
  EACH if (row_of(n) == row) total += sum(x[n]);
  return total;
}
inline float max_of(const vf (&x)[N], int row) {
  float top = -kInf;
  EACH if (row_of(n) == row) top = std::max(top, max(x[n]));
  return top;
}

// y of two rows, in place; updates their tops.
template <bool kNoise, bool kMask>
void score(const Head& head, const Place& at, Row* const (&rows)[2]) {
  vf top[N];
  EACH top[n] = splat(-kInf);
  for (int64_t c = 0; c < at.columns; c += kStep) {
    vf y[N], bits[N];
    logits<kNoise, kMask>(head, at, rows, c, y, bits);
    EACH store(rows[row_of(n)]->y + c + shift_of(n), y[n]);
    EACH top[n] = max(y[n], top[n]);
  }
  for (int r = 0; r < 2; ++r) {
    const float before = rows[r]->top;
    rows[r]->top = std::max(before, max_of(top, r));
    rows[r]->alpha = before == rows[r]->top ? 1.0f : exp2((before - rows[r]->top) * head.per_tau);
  }
}

// The largest y of two rows and its column, counted from `first` on; of equal ones the lowest. NaN is larger than any
// number, as it is to torch's argmax. Stores no y.
template <bool kNoise, bool kMask>
void choose(const Head& head, const Place& at, Row* const (&rows)[2], int64_t first) {
  vf top[N];
  vi where[N];
  EACH top[n] = splat(-kInf), where[n] = vi{} - 1;
  for (int64_t c = 0; c < at.columns; c += kStep) {
    vf y[N], bits[N];
    logits<kNoise, kMask>(head, at, rows, c, y, bits);
    EACH {
      const vi better = ~(y[n] <= top[n]) & (top[n] == top[n]);
      where[n] = better ? vi{} + (int32_t)c : where[n];
      top[n] = better ? y[n] : top[n];
    }
  }
  EACH {
    Row& row = *rows[row_of(n)];
    for (int i = 0; i < W; ++i) {
      if (where[n][i] < 0) continue;
      const float y = top[n][i];
      const int64_t column = first + where[n][i] + shift_of(n) + i;
      const bool same = y == row.top || (y != y && row.top != row.top);
      const bool better = !(y <= row.top) && row.top == row.top;
      if (same ? column < row.index : better) row.top = y, row.index = column;
    }
  }
}

// The tops of two rows, or where a row is empty something finite: inf - inf is NaN.
struct Tops {
  float of[2];
  explicit Tops(Row* const (&rows)[2]) {
    for (int r = 0; r < 2; ++r) of[r] = std::max(rows[r]->top, std::numeric_limits<float>::lowest());
  }
};

// exp((y - top) / tau) of two rows, in place and with dropout; updates their sums, which are without.
template <bool kDrop>
void exponentiate(const Head& head, const Place& at, Row* const (&rows)[2]) {
  const Tops top(rows);
  vf total[N] = {};
  for (int64_t c = 0; c < at.columns; c += kStep) {
    vf p[N], factor[N];
    if constexpr (kDrop) dropout(head, at.q, at.k + (uint32_t)c, factor);
    EACH p[n] = (load(rows[row_of(n)]->y + c + shift_of(n)) - top.of[row_of(n)]) * head.per_tau;
    exp2(p);
    EACH total[n] += p[n];
    if constexpr (kDrop) EACH p[n] *= factor[n];
    EACH store(rows[row_of(n)]->y + c + shift_of(n), p[n]);
  }
  for (int r = 0; r < 2; ++r) rows[r]->sum = rows[r]->sum * rows[r]->alpha + sum_of(total, r);
}

// The backward pass of two rows. Takes their scores in y and dO.V in d.
// Soft: y becomes the weights with dropout and d the gradient of the scores, log_sum and delta being known.
// Hard: y becomes exp((y - top) / tau), negative where dropout drops it, and d stays; updates sum and p_d, from which
// the weights and delta follow.
template <bool kNoise, bool kMask, bool kHard>
void weigh(const Head& head, const Place& at, Row* const (&rows)[2], bool drop, bool parameters) {
  const Tops top(rows);
  vf total[N] = {}, p_d[N] = {}, p_t[N] = {}, p_d_t[N] = {}, p_g[N] = {}, p_d_g[N] = {};
  for (int64_t c = 0; c < at.columns; c += kStep) {
    vf t[N], bits[N], p[N], d[N], g[N], factor[N];
    logits<kNoise, kMask>(head, at, rows, c, t, bits);
    if (drop) dropout(head, at.q, at.k + (uint32_t)c, factor);
    EACH t[n] = (t[n] - top.of[row_of(n)]) * head.per_tau - rows[row_of(n)]->log_sum;
    EACH p[n] = t[n];
    exp2(p);
    EACH d[n] = load(rows[row_of(n)]->d + c + shift_of(n));
    if (drop) EACH d[n] *= factor[n];
    if constexpr (kHard) {
      EACH g[n] = p[n] * d[n];
      EACH total[n] += p[n];
    } else {
      EACH g[n] = p[n] * (d[n] - rows[row_of(n)]->delta);
    }
    if (kHard || parameters) EACH p_d[n] += g[n];
    if (parameters) {
      EACH t[n] = max(t[n], splat(-125.0f));  // p is 0 there, and 0 times t must be 0
      EACH p_t[n] += p[n] * t[n], p_d_t[n] += g[n] * t[n], p_g[n] += p[n] * bits[n], p_d_g[n] += g[n] * bits[n];
    }
    if (drop) EACH p[n] = kHard ? (factor[n] > 0.0f ? p[n] : -p[n]) : p[n] * factor[n];
    EACH store(rows[row_of(n)]->y + c + shift_of(n), p[n]);
    if constexpr (!kHard) EACH store(rows[row_of(n)]->d + c + shift_of(n), g[n] * rows[row_of(n)]->slope);
  }
  for (int r = 0; r < 2; ++r) {
    Row& row = *rows[r];
    row.sum += sum_of(total, r), row.p_d += sum_of(p_d, r);
    if (!parameters) continue;
    row.p_t += sum_of(p_t, r), row.p_d_t += sum_of(p_d_t, r), row.p_g += sum_of(p_g, r), row.p_d_g += sum_of(p_d_g, r);
  }
}

// Hard: the gradient of a row's scores into d, from what `weigh` made of y, and dO.V in d.
inline void differentiate(const Head& head, const Row& row, int64_t columns, bool drop) {
  const float slope = row.sum == 0.0f ? 0.0f : row.slope / row.sum;
  for (int64_t c = 0; c < columns; c += W) {
    vf p = load(row.y + c), d = load(row.d + c);
    if (drop) d = p > 0.0f ? d * head.kept : vf{}, p = max(p, -p);
    store(row.d + c, p * (d - row.delta) * slope);
  }
}

}  // namespace gumbel
