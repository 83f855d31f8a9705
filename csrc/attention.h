// softmax(Q K^T / sqrt(D)) V in one pass over the keys (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
// arXiv:2205.14135), and what else is made of the map's rows. Keys and values are packed once per head; then tiles of
// kRows queries walk over blocks of keys whose scores stay in the first-level cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "products.h"
#include "softmax.h"
#include "tile_attention.h"

namespace twinstream {

constexpr int kBlock = 8 * kColumns * kLanes;  // keys of a block
constexpr int64_t kMaxHeadDim = 512;

// B rows of the batch, N queries, S keys, H heads of D channels; elements from one query, key or value to the next.
struct AttentionSizes {
  int64_t B, N, S, H, D, q_row, k_row, v_row;
};

template <typename T>
struct Attention {
  using E = typename Product<T>::Element;
  using Weight = typename Product<T>::Weight;
  static constexpr int kPair = Product<T>::kPair;

  const AttentionSizes n;
  const int64_t width, steps, key_vectors, value_vectors, keys_size, values_size;

  explicit Attention(const AttentionSizes& sizes)
      : n(sizes),
        width(n.H * n.D),
        steps((n.D + kPair - 1) / kPair),
        key_vectors((n.S + kLanes - 1) / kLanes),
        value_vectors((n.D + kLanes - 1) / kLanes),
        keys_size(key_vectors * steps * kLanes),
        values_size(key_vectors * kLanes / kPair * value_vectors * kLanes) {}

  int64_t scratch_bytes() const { return n.B * n.H * (keys_size + values_size) * (int64_t)sizeof(E); }

  // Key vector j of one head: [step][lane]; and the values of its keys: [key pair][channel].
  void pack(const T* k, const T* v, E* keys, E* values, int64_t j) const {
    E* block = keys + j * steps * kLanes;
    E* rows = values + j * kLanes / kPair * value_vectors * kLanes;
    const int64_t count = std::min<int64_t>(kLanes, n.S - j * kLanes);
    if (count < kLanes) {
      std::fill(block, block + steps * kLanes, E{});
      std::fill(rows, rows + kLanes / kPair * value_vectors * kLanes, E{});
    }
    for (int64_t lane = 0; lane < count; lane++) pack_row(k + (j * kLanes + lane) * n.k_row, block + lane, kLanes);
    for (int64_t lane = 0; lane < count; lane += kPair) {
      const T* value = v + (j * kLanes + lane) * n.v_row;
      E* row = rows + lane / kPair * value_vectors * kLanes;
      for (int64_t d = 0; d < n.D; d++) pair(row[d], value[d], kPair == 2 && lane + 1 < count ? value[n.v_row + d] : T{});
      std::fill(row + n.D, row + value_vectors * kLanes, E{});
    }
  }

  // The channels of one query or key, ``stride`` elements apart.
  void pack_row(const T* x, E* packed, int64_t stride) const {
    int64_t step = 0;
    for (; (step + 1) * kPair <= n.D; step++) pair(packed[step * stride], x[step * kPair], x[step * kPair + kPair - 1]);
    if (step < steps) pair(packed[step * stride], x[step * kPair], T{});
  }

  template <int C>
  void score(const E* q, const E* keys, float* scores, Floats* highest, int64_t j) const {
    Floats sums[kRows][C] = {};
    accumulate(sums, q, steps, keys + j * steps * kLanes, kLanes, steps * kLanes, steps);
    for (int r = 0; r < kRows; r++) {
      for (int c = 0; c < C; c++) {
        store(scores + r * kBlock + (j + c) * kLanes, sums[r][c]);
        highest[r] = max(highest[r], sums[r][c]);
      }
    }
  }

  template <int C>
  void gather(const E* weights, const E* values, float* out, int64_t c0, int64_t n_pairs) const {
    Floats sums[kRows][C] = {};  // of this block alone: thousands of keys in one chain would lose digits
    float* at = out + c0 * kLanes;
    const int64_t row = value_vectors * kLanes;
    accumulate(sums, weights, kBlock / kPair, values + c0 * kLanes, row, kLanes, n_pairs);
    for (int r = 0; r < kRows; r++)
      for (int c = 0; c < C; c++) store(at + r * row + c * kLanes, load(at + r * row + c * kLanes) + sums[r][c]);
  }

  // kRows queries of one head from row ``first`` on. If all keys are in one block, ``visit`` sees each row of the map:
  // its scores, the factor that brings them to powers of two, the largest score, and the sum of the powers.
  template <typename Visit>
  void tile(const T* q, const E* keys, const E* values, T* out, int64_t first, float* sums, Visit visit) const {
    const int64_t rows = std::min<int64_t>(kRows, n.N - first), row = value_vectors * kLanes;
    alignas(64) float scores[kRows * kBlock];
    alignas(64) Weight weights[kRows * kBlock];
    alignas(64) E queries[kRows * kMaxHeadDim / kPair];
    std::fill(queries, queries + kRows * steps, E{});
    std::fill(sums, sums + kRows * row, 0.0f);
    float top[kRows];
    Floats total[kRows] = {};
    std::fill(top, top + kRows, -std::numeric_limits<float>::max());
    for (int64_t r = 0; r < rows; r++) pack_row(q + (first + r) * n.q_row, queries + r * steps, 1);
    const float scale = 1.4426950408889634 / std::sqrt((double)n.D);  // of exp2, rounded once
    for (int64_t start = 0; start < key_vectors; start += kBlock / kLanes) {
      const int64_t vectors = std::min<int64_t>(kBlock / kLanes, key_vectors - start);
      const E* block = keys + start * steps * kLanes;
      Floats highest[kRows];
      std::fill(highest, highest + kRows, all(-std::numeric_limits<float>::max()));
      int64_t j = 0;
      for (; j + kColumns <= vectors; j += kColumns) score<kColumns>(queries, block, scores, highest, j);
      for (; j < vectors; j++) score<1>(queries, block, scores, highest, j);
      const int64_t known = std::min<int64_t>(vectors * kLanes, n.S - start * kLanes);
      for (int64_t r = 0; r < kRows; r++) {
        float* own = scores + r * kBlock;
        if (known < vectors * kLanes) highest[r] = highest_of(own, known, vectors);  // without the padding
        renew(highest[r], scale, top[r], total[r], sums + r * row, value_vectors);
        for (int64_t i = 0; i < vectors * kLanes; i += kLanes) {
          const Floats weight = exp2<kExpDegree<T>>((load(own + i) - top[r]) * scale);
          total[r] += weight;
          store(weights + r * kBlock + i, weight);
        }
      }
      const E* below = values + start * kLanes / kPair * row;
      const E* w = (const E*)weights;
      int64_t c = 0;
      const int64_t n_pairs = vectors * kLanes / kPair;
      for (; c + kColumns <= value_vectors; c += kColumns) gather<kColumns>(w, below, sums, c, n_pairs);
      if (value_vectors - c == 2) gather<2>(w, below, sums, c, n_pairs);
      if (value_vectors - c == 1) gather<1>(w, below, sums, c, n_pairs);
    }
    for (int64_t r = 0; r < rows; r++) {
      T* target = out + (first + r) * width;
      const float whole = sum(total[r]), scale_row = 1.0f / whole;
      each(n.D, [&](int64_t d, int lanes) { put(target + d, load(sums + r * row + d) * scale_row, lanes); });
      visit(first + r, scores + r * kBlock, scale, top[r], whole);
    }
  }
};

// Packs keys and values, then walks over all tiles; ``visit(b, h, row of the map...)`` as in ``Attention::tile``.
template <typename T, typename Visit>
void attend(const T* q, const T* k, const T* v, T* out, void* scratch, const AttentionSizes& n, Visit visit) {
  using E = typename Product<T>::Element;
  const Attention<T> op(n);
  E* packed = static_cast<E*>(scratch);
  const int64_t head_size = op.keys_size + op.values_size, tiles = (n.N + kRows - 1) / kRows;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < n.B * n.H * op.key_vectors; task++) {
      const int64_t head = task / op.key_vectors, b = head / n.H, h = head % n.H;
      E* keys = packed + head * head_size;
      op.pack(k + b * n.S * n.k_row + h * n.D, v + b * n.S * n.v_row + h * n.D, keys, keys + op.keys_size,
              task % op.key_vectors);
    }
    alignas(64) float sums[kRows * (kMaxHeadDim + kLanes)];
#pragma omp for schedule(dynamic, 8)
    for (int64_t task = 0; task < n.B * n.H * tiles; task++) {
      const int64_t head = task / tiles, b = head / n.H, h = head % n.H;
      const E* keys = packed + head * head_size;
      op.tile(q + b * n.N * n.q_row + h * n.D, keys, keys + op.keys_size, out + b * n.N * op.width + h * n.D,
              task % tiles * kRows, sums, [&](auto... row) { visit(b, h, row...); });
    }
  }
}

// Bytes of scratch memory that ``attention`` and ``dbim`` need.
template <typename T>
int64_t attention_scratch(const AttentionSizes& n) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, bfloat16>)
    return std::max(Attention<T>(n).scratch_bytes(), TileAttention(n).scratch_bytes());
#endif
  return Attention<T>(n).scratch_bytes();
}

// Heads are packed: (B, N or S, H*D). With T tokens (B, T), all keys must be in one block; columns are (B, N, T*H).
template <typename T>
void attention(const T* q, const T* k, const T* v, const int64_t* tokens, T* out, T* columns, void* scratch,
               const AttentionSizes& n, int64_t n_tokens) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (!n_tokens) return tile_attention(q, k, v, out, scratch, n);
  }
#endif
  attend(q, k, v, out, scratch, n,
         [=](int64_t b, int64_t h, int64_t row, const float* scores, float scale, float top, float total) {
           for (int64_t t = 0; t < n_tokens; t++) {
             const float weight = std::exp2(scale * (scores[tokens[b * n_tokens + t]] - top)) / total;
             store_some(columns + ((b * n.N + row) * n_tokens + t) * n.H + h, all(weight), 1);
           }
         });
}

}  // namespace twinstream
