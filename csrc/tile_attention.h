// Attention in bfloat16 on processors with AMX, whose instructions multiply tiles of 16 rows by 32 elements. The walk over blocks of keys is that of attention.h.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "simd.h"
#include "softmax.h"

namespace twinstream {

constexpr int64_t kTileRows = 16;    // queries, keys or channels
constexpr int64_t kTileDepth = 32;   // what is summed over: channels of a query, or keys
constexpr int64_t kTileSize = 256;   // pairs of bfloat16
constexpr int64_t kTileQueries = 32, kTileKeys = 256;  // of a block

// The calling thread's tiles are all of one shape while this lives. What was set before is set again, since libraries
// remember what they have set.
class TileShapes {
 public:
  TileShapes() {
    _tile_storeconfig(before_);
    Config config{};
    config.palette = 1;
    std::fill_n(config.bytes, 8, (uint16_t)64);
    std::fill_n(config.rows, 8, (uint8_t)kTileRows);
    _tile_loadconfig(&config);
  }
  ~TileShapes() { before_[0] ? _tile_loadconfig(before_) : _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start;
    uint8_t reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  alignas(64) uint8_t before_[64];
};

// ``AttentionSizes`` as in attention.h.
template <typename Sizes>
struct TileAttention {
  const Sizes n;
  const int64_t width, depth_tiles, channel_tiles, blocks, keys_size, values_size;  // a block here is of 32 keys
  const bool keeps_queries;

  explicit TileAttention(const Sizes& sizes)
      : n(sizes),
        width(n.H * n.D),
        depth_tiles((n.D + kTileDepth - 1) / kTileDepth),
        channel_tiles((n.D + kTileRows - 1) / kTileRows),
        blocks((n.S + kTileDepth - 1) / kTileDepth),
        keys_size(blocks * 2 * depth_tiles * kTileSize),
        values_size(blocks * channel_tiles * kTileSize),
        keeps_queries(depth_tiles <= 2) {}

  int64_t scratch_bytes() const { return n.B * n.H * (keys_size + values_size) * (int64_t)sizeof(uint32_t); }

  // 32 keys and values of one head: two tiles of keys for each 32 channels, [pair of channels][key], and a tile for each
  // 16 channels of values, [pair of keys][channel].
  void pack(const bfloat16* k, const bfloat16* v, uint32_t* keys, uint32_t* values, int64_t block) const {
    const int64_t known = std::min(kTileDepth, n.S - block * kTileDepth);
    keys += block * 2 * depth_tiles * kTileSize;
    values += block * channel_tiles * kTileSize;
    std::fill_n(keys, 2 * depth_tiles * kTileSize, 0);
    std::fill_n(values, channel_tiles * kTileSize, 0);
    for (int64_t i = 0; i < known; i++) {
      const bfloat16* row = k + (block * kTileDepth + i) * n.k_row;
      uint32_t* at = keys + i / kTileRows * depth_tiles * kTileSize + i % kTileRows;
      for (int64_t d = 0; d < n.D; d += 2)
        std::memcpy(at + d / 2 * kTileRows, row + d, std::min<int64_t>(2, n.D - d) * sizeof(bfloat16));
    }
    for (int64_t i = 0; i < known; i += 2) {
      const bfloat16 *row = v + (block * kTileDepth + i) * n.v_row, *next = i + 1 < known ? row + n.v_row : nullptr;
      uint32_t* at = values + i / 2 * kTileRows;
      each(n.D, [&](int64_t d, int lanes) {
        const Words low = (Words)take(row + d, lanes) >> 16;
        const Words high = next ? (Words)take(next + d, lanes) : Words{};
        const Words both = low | high;
        std::memcpy(at + d / kTileRows * kTileSize, &both, sizeof both);
      });
    }
  }

  // Scores of 32 queries and 32 keys: a tile for 16 keys and the first 16 queries, one for the others, and the next keys'.
  void score(const bfloat16* queries, const uint32_t* keys, float* scores) const {
    const uint32_t* next = keys + depth_tiles * kTileSize;
    if (keeps_queries) {
      meet_kept(keys, scores);
      meet_kept(next, scores + 2 * kTileSize);
      return;
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < depth_tiles; s++) {
      _tile_loadd(4, queries + s * 2 * kTileSize, 64);
      _tile_loadd(5, queries + (depth_tiles + s) * 2 * kTileSize, 64);
      _tile_loadd(6, keys + s * kTileSize, 64);
      _tile_loadd(7, next + s * kTileSize, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + kTileSize, 64);
    _tile_stored(2, scores + 2 * kTileSize, 64);
    _tile_stored(3, scores + 3 * kTileSize, 64);
  }

  void meet_kept(const uint32_t* keys, float* scores) const {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, keys, 64);
    _tile_dpbf16ps(0, 4, 2);
    _tile_dpbf16ps(1, 6, 2);
    if (depth_tiles == 2) {
      _tile_loadd(3, keys + kTileSize, 64);
      _tile_dpbf16ps(0, 5, 3);
      _tile_dpbf16ps(1, 7, 3);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + kTileSize, 64);
  }

  // Queries of few channels stay in tiles 4 to 7 while they meet keys.
  void keep(const bfloat16* queries) const {
    _tile_loadd(4, queries, 64);
    _tile_loadd(6, queries + depth_tiles * 2 * kTileSize, 64);
    if (depth_tiles != 2) return;
    _tile_loadd(5, queries + 2 * kTileSize, 64);
    _tile_loadd(7, queries + 3 * 2 * kTileSize, 64);
  }

  // Adds the values of ``count`` times 32 keys, weighted, to one or two tiles of channels of 32 queries.
  template <bool kTwo>
  void gather(const bfloat16* weights, const uint32_t* values, float* sums, int64_t count) const {
    const int64_t row = channel_tiles * kTileRows * sizeof(float), below = channel_tiles * kTileRows * kTileRows;
    _tile_loadd(0, sums, row);
    _tile_loadd(1, sums + below, row);
    if constexpr (kTwo) {
      _tile_loadd(2, sums + kTileRows, row);
      _tile_loadd(3, sums + below + kTileRows, row);
    }
    for (int64_t s = 0; s < count; s++) {
      _tile_loadd(4, weights + s * 4 * kTileSize, 64);
      _tile_loadd(5, weights + s * 4 * kTileSize + 2 * kTileSize, 64);
      _tile_loadd(6, values + s * channel_tiles * kTileSize, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (kTwo) {
        _tile_loadd(7, values + (s * channel_tiles + 1) * kTileSize, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + below, row);
    if constexpr (kTwo) {
      _tile_stored(2, sums + kTileRows, row);
      _tile_stored(3, sums + below + kTileRows, row);
    }
  }

  // One row's weights of ``count`` times 32 keys; scores are in tiles of 16 keys, weights in tiles of 32.
  static void weigh(const float* scores, bfloat16* weights, int64_t count, float scale, float top, Floats& total) {
    Floats first = {}, second = {};
    const float shift = scale * top;
    for (int64_t s = 0; s < count; s++) {
      const Floats a = exp2<kExpDegree<bfloat16>>(load(scores + s * 4 * kTileSize) * scale - shift);
      const Floats b = exp2<kExpDegree<bfloat16>>(load(scores + s * 4 * kTileSize + 2 * kTileSize) * scale - shift);
      first += a;
      second += b;
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
      std::memcpy(weights + s * 4 * kTileSize, &both, sizeof both);
    }
    total += first + second;
  }

  // 32 queries of one head from row ``first`` on.
  void tile(const bfloat16* q, const uint32_t* keys, const uint32_t* values, bfloat16* out, int64_t first,
            bfloat16* queries, float* sums) const {
    const int64_t rows = std::min(kTileQueries, n.N - first), row = channel_tiles * kTileRows;
    alignas(64) float scores[kTileQueries * kTileKeys];
    alignas(64) bfloat16 weights[kTileQueries * kTileKeys];
    float top[kTileQueries];
    Floats total[kTileQueries] = {};
    std::fill_n(top, kTileQueries, -std::numeric_limits<float>::max());
    std::fill_n(sums, kTileQueries * row, 0.0f);
    std::fill_n(queries, kTileQueries * depth_tiles * kTileDepth, bfloat16{});
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < n.D; d += kTileDepth)
        std::memcpy(queries + ((r / kTileRows * depth_tiles + d / kTileDepth) * kTileRows + r % kTileRows) * kTileDepth,
                    q + (first + r) * n.q_row + d, std::min(kTileDepth, n.D - d) * sizeof(bfloat16));
    const float scale = 1.4426950408889634 / std::sqrt((double)n.D);
    for (int64_t block = 0; block < blocks; block += kTileKeys / kTileDepth) {
      const int64_t some = std::min(kTileKeys / kTileDepth, blocks - block);
      const int64_t known = std::min(some * kTileDepth, n.S - block * kTileDepth);
      if (keeps_queries) keep(queries);
      for (int64_t j = 0; j < some; j++)
        score(queries, keys + (block + j) * 2 * depth_tiles * kTileSize, scores + j * 4 * kTileSize);
      Floats highest[kTileQueries];
      Ints is_higher = {};
      for (int64_t r = 0; r < kTileQueries; r++) {
        highest[r] = highest_of(scores + r * kTileRows, known, 2 * some, 2 * kTileSize);
        is_higher |= highest[r] > top[r];
      }
      if (any(is_higher))  // which is rare after the first blocks
        for (int64_t r = 0; r < kTileQueries; r++)
          renew(highest[r], scale, top[r], total[r], sums + r * row, channel_tiles);
      for (int64_t r = 0; r < kTileQueries; r++)
        weigh(scores + r * kTileRows, weights + r * kTileDepth, some, scale, top[r], total[r]);
      const uint32_t* own = values + block * channel_tiles * kTileSize;
      int64_t c = 0;
      for (; c + 2 <= channel_tiles; c += 2) gather<true>(weights, own + c * kTileSize, sums + c * kTileRows, some);
      if (c < channel_tiles) gather<false>(weights, own + c * kTileSize, sums + c * kTileRows, some);
    }
    for (int64_t r = 0; r < rows; r++) {
      const float share = 1.0f / sum(total[r]);
      each(n.D, [&](int64_t d, int lanes) {
        put(out + (first + r) * width + d, load(sums + r * row + d) * share, lanes);
      });
    }
  }
};

template <typename Sizes>
void tile_attention(const bfloat16* q, const bfloat16* k, const bfloat16* v, bfloat16* out, void* scratch,
                    const Sizes& n) {
  const TileAttention<Sizes> op(n);
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  const int64_t head_size = op.keys_size + op.values_size, tiles = (n.N + kTileQueries - 1) / kTileQueries;
#pragma omp parallel
  {
    const TileShapes shapes;
    std::unique_ptr<bfloat16[]> queries(new bfloat16[kTileQueries * op.depth_tiles * kTileDepth]);
    std::unique_ptr<float[]> sums(new float[kTileQueries * op.channel_tiles * kTileRows]);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < n.B * n.H * op.blocks; task++) {
      const int64_t head = task / op.blocks, b = head / n.H, h = head % n.H;
      uint32_t* keys = packed + head * head_size;
      op.pack(k + b * n.S * n.k_row + h * n.D, v + b * n.S * n.v_row + h * n.D, keys, keys + op.keys_size,
              task % op.blocks);
    }
#pragma omp for schedule(dynamic, 2)
    for (int64_t task = 0; task < n.B * n.H * tiles; task++) {
      const int64_t head = task / tiles, b = head / n.H, h = head % n.H;
      const uint32_t* keys = packed + head * head_size;
      op.tile(q + b * n.N * n.q_row + h * n.D, keys, keys + op.keys_size, out + b * n.N * op.width + h * n.D,
              task % tiles * kTileQueries, queries.get(), sums.get());
    }
  }
}

}  // namespace twinstream

#endif
