// bf16 matrix products and the backward of causal attention on a CPU without bf16 instructions: operands are widened to fp32 as
// they are packed, sums are fp32 throughout, results are rounded once. Compiled and loaded by bench/bf16_matmul.py.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

using Index = std::int64_t;
using bf16 = std::uint16_t;
typedef float lanes __attribute__((vector_size(32), aligned(4)));  // eight floats at any address
typedef std::int32_t ints __attribute__((vector_size(32), aligned(4)));

float widen(bf16 x) {
  const std::uint32_t bits = std::uint32_t{x} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// To nearest, ties to even; a NaN stays one.
bf16 narrow(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<bf16>(x != x ? 0x7fc0 : rounded);
}

struct Matrix {
  bf16* data;
  Index row, col;  // strides, in elements

  bf16& operator()(Index i, Index j) const { return data[i * row + j * col]; }
};

// What threads work with, allocated once and never given back: a constant part of the process, whoever multiplies.
struct Scratch {
  float* data = nullptr;
  Index size = 0;

  float* of(Index floats) {
    if (size < floats) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
      if (data == nullptr) throw std::bad_alloc();
      size = floats;
    }
    return data;
  }
};
Scratch scratch;

constexpr Index kRows = 6, kCols = 16;  // of a register tile

// c (kRows x kCols) (+)= a (kRows x k) b (k x kCols); a[i, p] at a[i * a_row + p * a_col], rows of b at a distance of b_row.
template <bool accumulate>
void tile(Index k, const float* a, Index a_row, Index a_col, const float* b, Index b_row, float* c, Index c_row) {
  lanes sum[kRows][2] = {};
  for (Index p = 0; p < k; ++p) {
    const lanes left = *reinterpret_cast<const lanes*>(b + p * b_row),
                right = *reinterpret_cast<const lanes*>(b + p * b_row + 8);
#pragma GCC unroll 6
    for (Index i = 0; i < kRows; ++i) {
      const float x = a[i * a_row + p * a_col];
      sum[i][0] += x * left;
      sum[i][1] += x * right;
    }
  }
  for (Index i = 0; i < kRows; ++i) {
    for (Index j = 0; j < 2; ++j) {
      lanes& to = *reinterpret_cast<lanes*>(c + i * c_row + j * 8);
      to = accumulate ? to + sum[i][j] : sum[i][j];
    }
  }
}

// ---- products

constexpr Index kDepth = 384;       // of the inner dimension, packed at once: 384 x 192 of the left operand fit in L2
constexpr Index kBand = 192;        // rows packed at once
constexpr Index kTall = 4 * kBand;  // rows of the result that one thread sums at once
constexpr Index kWide = 512;        // columns of it

Index up(Index n, Index step) { return (n + step - 1) / step * step; }

// The least number of equal pieces of at most `most`, each a multiple of `step`.
Index piece(Index n, Index most, Index step) { return up((n + (n + most - 1) / most - 1) / ((n + most - 1) / most), step); }

constexpr Index kProductScratch = kTall * kWide + kDepth * kWide + kDepth * kBand;  // floats per thread: 2.6 MiB

// Panels of `width` rows (of a) or columns (of b); within a panel, `width` neighbours for each step of the inner dimension.
void pack(float* to, const Matrix& from, Index width, Index first, Index count, Index inner, Index depth, bool rows) {
  const Index across = rows ? from.row : from.col, along = rows ? from.col : from.row;
  const bf16* base = from.data + first * across + inner * along;
  for (Index panel = 0; panel < count; panel += width, to += width * depth) {
    const Index n = std::min(width, count - panel);
    const bf16* source = base + panel * across;
    if (n < width) std::fill(to, to + width * depth, 0.0f);
    if (across == 1) {
      for (Index p = 0; p < depth; ++p) {
        for (Index i = 0; i < n; ++i) to[p * width + i] = widen(source[p * along + i]);
      }
    } else {
      for (Index i = 0; i < n; ++i) {
        for (Index p = 0; p < depth; ++p) to[p * width + i] = widen(source[i * across + p * along]);
      }
    }
  }
}

void block(const Matrix& a, const Matrix& b, const Matrix& c, const Matrix& bias, float alpha, float beta, Index i0, Index rows,
           Index j0, Index cols, Index k, float* space) {
  float *sum = space, *right = sum + kTall * kWide, *left = right + kDepth * kWide;
  const Index wide = up(cols, kCols);
  if (k == 0) std::fill(sum, sum + up(rows, kRows) * wide, 0.0f);
  for (Index p = 0; p < k; p += kDepth) {
    const Index depth = std::min(kDepth, k - p);
    pack(right, b, kCols, j0, cols, p, depth, false);
    for (Index band = 0; band < rows; band += kBand) {
      const Index height = std::min(kBand, rows - band);
      pack(left, a, kRows, i0 + band, height, p, depth, true);
      for (Index j = 0; j < wide; j += kCols) {
        for (Index i = 0; i < height; i += kRows) {
          float* to = sum + (band + i) * wide + j;
          (p == 0 ? tile<false> : tile<true>)(depth, left + i * depth, 1, kRows, right + j * depth, kCols, to, wide);
        }
      }
    }
  }
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) {
      const float x = alpha * sum[i * wide + j];
      c(i0 + i, j0 + j) = narrow(bias.data == nullptr ? x : x + beta * widen(bias(i0 + i, j0 + j)));
    }
  }
}

// ---- attention

constexpr Index kBlock = 96;  // queries, and keys, at once: a multiple of kRows and kCols

// e^x for x <= 0 or so: 2^n times the Taylor series on |r| <= ln 2 / 2, whose first term left out is below 2^-27.
lanes exponential(lanes x) {
  x = x < -87.0f ? lanes{} - 87.0f : x;
  const lanes magic = lanes{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const lanes shifted = x * 1.44269504f + magic, n = shifted - magic;
  const lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  constexpr float factorials[] = {720, 120, 24, 6, 2, 1, 1};
  lanes y = lanes{} + 1.0f / 5040;
#pragma GCC unroll 7
  for (float f : factorials) y = y * r + 1.0f / f;
  ints bits, power;
  std::memcpy(&bits, &shifted, 32);
  power = (bits << 23) + 0x3f800000;
  lanes scale;
  std::memcpy(&scale, &power, 32);
  return y * scale;
}

// c (m x n) (+)= a (m x k) b (k x n); m a multiple of kRows, n of kCols.
template <bool accumulate>
void small(Index m, Index n, Index k, const float* a, Index a_row, Index a_col, const float* b, float* c) {
  for (Index j = 0; j < n; j += kCols) {
    for (Index i = 0; i < m; i += kRows) tile<accumulate>(k, a + i * a_row, a_row, a_col, b + j, n, c + i * n + j, n);
  }
}

// rows x cols of x, widened; zeros up to kBlock rows.
void load(float* to, const Matrix& x, Index first, Index rows, Index cols) {
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) to[i * cols + j] = widen(x(first + i, j));
  }
  std::fill(to + rows * cols, to + kBlock * cols, 0.0f);
}

void transpose(float* to, const float* x, Index cols) {
  for (Index i = 0; i < kBlock; ++i) {
    for (Index j = 0; j < cols; ++j) to[j * kBlock + i] = x[i * cols + j];
  }
}

struct Head {
  Matrix q, k, v, y, dy, dq;
  const float* lse;
  Index lse_step, queries, keys, width;
  float scale;
  bool causal;
};

Index blocks(Index n) { return (n + kBlock - 1) / kBlock; }

// floats of one thread: dq of a head, two tiles of scores, and six blocks of rows
Index attention_scratch(Index queries, Index width) {
  return blocks(queries) * kBlock * width + 2 * kBlock * kBlock + 6 * kBlock * width + 2 * kBlock;
}

// The part of keys [first, first + kBlock) in dq, dk and dv, added.
//   p = exp(scale q k^T - lse)   ds = p (dy v^T - sum(dy y)) scale   dv = p^T dy   dq = ds k   dk = ds^T q
void keys_backward(const Head& h, Index first, float* dq, float* dk, float* dv, float* space) {
  const Index d = h.width, n = std::min(kBlock, h.keys - first);
  float *p = space, *ds = p + kBlock * kBlock, *k = ds + kBlock * kBlock, *kt = k + kBlock * d, *vt = kt + kBlock * d;
  float *q = vt + kBlock * d, *dy = q + kBlock * d, *y = dy + kBlock * d, *delta = y + kBlock * d, *lse = delta + kBlock;
  load(k, h.v, first, n, d);
  transpose(vt, k, d);
  load(k, h.k, first, n, d);
  transpose(kt, k, d);
  for (Index i0 = h.causal ? first : 0; i0 < h.queries; i0 += kBlock) {
    const Index rows = std::min(kBlock, h.queries - i0);
    load(q, h.q, i0, rows, d);
    load(dy, h.dy, i0, rows, d);
    load(y, h.y, i0, rows, d);
    for (Index i = 0; i < kBlock; ++i) {
      delta[i] = 0;
      for (Index j = 0; j < d; ++j) delta[i] += dy[i * d + j] * y[i * d + j];
      lse[i] = i < rows ? h.lse[(i0 + i) * h.lse_step] : 0;
    }
    small<false>(kBlock, kBlock, d, q, d, 1, kt, p);
    small<false>(kBlock, kBlock, d, dy, d, 1, vt, ds);
    for (Index i = 0; i < kBlock; ++i) {
      const Index seen = i >= rows ? 0 : h.causal ? std::min(n, i0 + i - first + 1) : n;  // keys before this query
      for (Index j = 0; j < kBlock; j += 8) {
        lanes& weight = *reinterpret_cast<lanes*>(p + i * kBlock + j);
        lanes& slope = *reinterpret_cast<lanes*>(ds + i * kBlock + j);
        weight = exponential(weight * h.scale - lse[i]);
        if (j + 8 > seen) {
          for (Index l = 0; l < 8; ++l) weight[l] = j + l < seen ? weight[l] : 0;
        }
        slope = weight * (slope - delta[i]) * h.scale;
      }
    }
    small<true>(kBlock, d, kBlock, p, 1, kBlock, dy, dv);
    small<true>(kBlock, d, kBlock, ds, 1, kBlock, q, dk);
    small<true>(kBlock, d, kBlock, ds, kBlock, 1, k, dq + i0 * d);
  }
}

}  // namespace

extern "C" {

// c (m x n) = beta * bias + alpha * a (m x k) b (k x n); strides: a row, a col, b row, b col, c row, c col, bias row, bias col.
void bf16_product(Index m, Index n, Index k, bf16* a, bf16* b, bf16* c, bf16* bias, const Index* strides, float alpha,
                  float beta, int threads) {
  if (m == 0 || n == 0) return;
  const Matrix left{a, strides[0], strides[1]}, right{b, strides[2], strides[3]};
  const Matrix to{c, strides[4], strides[5]}, added{bias, strides[6], strides[7]};
  const Index tall = piece(m, kTall, kRows), wide = piece(n, kWide, kCols);
  const Index across = (n + wide - 1) / wide, count = across * ((m + tall - 1) / tall);
  float* space = scratch.of(kProductScratch * threads);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (Index at = 0; at < count; ++at) {
    const Index i = at / across * tall, j = at % across * wide;
    block(left, right, to, added, alpha, beta, i, std::min(tall, m - i), j, std::min(wide, n - j), k,
          space + kProductScratch * omp_get_thread_num());
  }
}

// Gradients of attention for one head of k and v and the `shared` heads of q that use it. The pointers: q, k, v, y, dy, dq, dk,
// dv; strides: (row, col, head) of each; then those of lse (row, head).
void bf16_attention_backward(Index queries, Index keys, Index width, Index shared, bf16* const* pointers, const float* lse,
                             const Index* strides, float scale, int causal, int threads) {
  const auto matrix = [&](int which, Index head) {
    return Matrix{pointers[which] + head * strides[3 * which + 2], strides[3 * which], strides[3 * which + 1]};
  };
  const Index each = attention_scratch(queries, width), all_keys = blocks(keys) * kBlock * width;
  float* dk = scratch.of(each * threads + 2 * all_keys);
  float *dv = dk + all_keys, *space = dv + all_keys;
  std::fill(dk, dk + 2 * all_keys, 0.0f);
#pragma omp parallel num_threads(threads)
  {
    const Index me = omp_get_thread_num(), of = omp_get_num_threads(), size = queries * width;
    float* mine = space + me * each;
    for (Index head = 0; head < shared; ++head) {
      const Head h{matrix(0, head),
                   matrix(1, 0),
                   matrix(2, 0),
                   matrix(3, head),
                   matrix(4, head),
                   matrix(5, head),
                   lse + head * strides[25],
                   strides[24],
                   queries,
                   keys,
                   width,
                   scale,
                   causal != 0};
      std::fill(mine, mine + blocks(queries) * kBlock * width, 0.0f);
      for (Index b = me; b < blocks(keys); b += of) {
        const Index at = b * kBlock * width;
        keys_backward(h, b * kBlock, mine, dk + at, dv + at, mine + blocks(queries) * kBlock * width);
      }
#pragma omp barrier
      for (Index i = size * me / of; i < size * (me + 1) / of; ++i) {
        float sum = 0;
        for (Index t = 0; t < of; ++t) sum += space[t * each + i];
        h.dq(i / width, i % width) = narrow(sum);
      }
#pragma omp barrier
    }
    const Matrix to_k = matrix(6, 0), to_v = matrix(7, 0);
    for (Index i = keys * width * me / of; i < keys * width * (me + 1) / of; ++i) {
      to_k(i / width, i % width) = narrow(dk[i]);
      to_v(i / width, i % width) = narrow(dv[i]);
    }
  }
}

// Bytes held between calls.
Index bf16_scratch_bytes() { return scratch.size * 4; }
}
