// Attention in bfloat16 on processors with AMX, whose instructions multiply tiles of 16 rows by 32 elements. The walk over blocks of keys is that of attention.h.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "simd.h"
#include "softmax.h"

namespace twinstream {

constexpr int64_t kTileRows = 16;    // queries, keys or channels
constexpr int64_t kTileDepth = 32;   // what is summed over: channels of a query, or keys
constexpr int64_t kTileSize = 256;   // pairs of bfloat16
constexpr int64_t kTileQueries = 32, kTileKeys = 256;  // of a block, whose scores stay in the first-level cache

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

  explicit TileAttention(const Sizes& sizes)
      : n(sizes),
        width(n.H * n.D),
        depth_tiles((n.D + kTileDepth - 1) / kTileDepth),
        channel_tiles((n.D + kTileRows - 1) / kTileRows),
        blocks((n.S + kTileDepth - 1) / kTileDepth),
        keys_size(blocks * 2 * depth_tiles * kTileSize),
        values_size(blocks * channel_tiles * kTileSize) {}

  int64_t scratch_bytes() const { return n.B * n.H * (keys_size + values_size) * (int64_t)sizeof(uint32_t); }

  static uint32_t pair(bfloat16 x, bfloat16 y) { return x.bits | (uint32_t)y.bits << 16; }

  // 32 keys and values of one head: two tiles of keys for each 32 channels, [pair of channels][key], and a tile for each
  // 16 channels of values, [pair of keys][channel].
  void pack(const bfloat16* k, const bfloat16* v, uint32_t* keys, uint32_t* values, int64_t block) const {
    const auto at = [&](const bfloat16* x, int64_t row, int64_t key, int64_t d) {
      return key < n.S && d < n.D ? x[key * row + d] : bfloat16{};
    };
    for (int64_t lane = 0; lane < kTileDepth; lane++) {
      const int64_t key = block * kTileDepth + lane;
      uint32_t* tile = keys + (block * 2 + lane / kTileRows) * depth_tiles * kTileSize + lane % kTileRows;
      for (int64_t step = 0; step < depth_tiles * kTileRows; step++)
        tile[step * kTileRows] = pair(at(k, n.k_row, key, 2 * step), at(k, n.k_row, key, 2 * step + 1));
    }
    for (int64_t step = 0; step < kTileRows; step++) {
      const int64_t key = block * kTileDepth + 2 * step;
      uint32_t* row = values + block * channel_tiles * kTileSize + step * kTileRows;
      for (int64_t d = 0; d < channel_tiles * kTileRows; d++)
        row[d / kTileRows * kTileSize + d % kTileRows] = pair(at(v, n.v_row, key, d), at(v, n.v_row, key + 1, d));
    }
  }

  // Scores of 32 queries and two tiles of keys.
  void score(const bfloat16* queries, const uint32_t* keys, float* scores) const {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < depth_tiles; s++) {
      _tile_loadd(4, queries + s * 2 * kTileSize, 64);
      _tile_loadd(5, queries + (depth_tiles + s) * 2 * kTileSize, 64);
      _tile_loadd(6, keys + s * kTileSize, 64);
      _tile_loadd(7, keys + (depth_tiles + s) * kTileSize, 64);
      multiply();
    }
    const int64_t row = kTileKeys * sizeof(float);
    _tile_stored(0, scores, row);
    _tile_stored(1, scores + kTileRows, row);
    _tile_stored(2, scores + kTileRows * kTileKeys, row);
    _tile_stored(3, scores + kTileRows * kTileKeys + kTileRows, row);
  }

  // Adds the values of some keys, weighted, to two tiles of channels, or to one.
  void gather(const bfloat16* weights, const uint32_t* values, float* sums, int64_t count, bool two) const {
    const int64_t row = channel_tiles * kTileRows * sizeof(float), below = channel_tiles * kTileRows * kTileRows;
    const int64_t second = two ? 1 : 0;  // where there is one alone, it is worked on twice, and stored once
    _tile_loadd(0, sums, row);
    _tile_loadd(1, sums + second * kTileRows, row);
    _tile_loadd(2, sums + below, row);
    _tile_loadd(3, sums + below + second * kTileRows, row);
    for (int64_t s = 0; s < count; s++) {
      _tile_loadd(4, weights + s * kTileDepth, kTileKeys * sizeof(bfloat16));
      _tile_loadd(5, weights + kTileRows * kTileKeys + s * kTileDepth, kTileKeys * sizeof(bfloat16));
      _tile_loadd(6, values + s * channel_tiles * kTileSize, 64);
      _tile_loadd(7, values + (s * channel_tiles + second) * kTileSize, 64);
      multiply();
    }
    _tile_stored(0, sums, row);
    _tile_stored(2, sums + below, row);
    if (!two) return;
    _tile_stored(1, sums + kTileRows, row);
    _tile_stored(3, sums + below + kTileRows, row);
  }

  static void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // 32 queries of one head from row ``first`` on.
  void tile(const bfloat16* q, const uint32_t* keys, const uint32_t* values, bfloat16* out, int64_t first,
            bfloat16* queries, float* sums) const {
    const int64_t rows = std::min(kTileQueries, n.N - first), row = channel_tiles * kTileRows;
    alignas(64) float scores[kTileQueries * kTileKeys];
    alignas(64) bfloat16 weights[kTileQueries * kTileKeys] = {};
    float top[kTileQueries], total[kTileQueries] = {};
    std::fill_n(top, kTileQueries, -std::numeric_limits<float>::max());
    std::fill_n(sums, kTileQueries * row, 0.0f);
    std::fill_n(queries, kTileQueries * depth_tiles * kTileDepth, bfloat16{});
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < n.D; d++)
        queries[((r / kTileRows * depth_tiles + d / kTileDepth) * kTileRows + r % kTileRows) * kTileDepth + d % kTileDepth] =
            q[(first + r) * n.q_row + d];
    const float scale = 1.4426950408889634 / std::sqrt((double)n.D);
    for (int64_t block = 0; block < blocks; block += kTileKeys / kTileDepth) {
      const int64_t some = std::min(kTileKeys / kTileDepth, blocks - block), count = some * kTileDepth;
      for (int64_t j = 0; j < some; j++)
        score(queries, keys + (block + j) * 2 * depth_tiles * kTileSize, scores + j * kTileDepth);
      const int64_t known = std::min(count, n.S - block * kTileDepth);
      for (int64_t r = 0; r < rows; r++) {
        float* own = scores + r * kTileKeys;
        weigh<kExpDegree<bfloat16>>(own, weights + r * kTileKeys, count / kLanes, highest_of(own, known, count), scale,
                                    top[r], total[r], sums + r * row, channel_tiles);
      }
      for (int64_t c = 0; c < channel_tiles; c += 2)
        gather(weights, values + (block * channel_tiles + c) * kTileSize, sums + c * kTileRows, some,
               c + 1 < channel_tiles);
    }
    for (int64_t r = 0; r < rows; r++) {
      const float share = 1.0f / total[r];
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
