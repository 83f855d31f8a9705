// 3x3 convolutions of stride 1 and padding 1 by minimal filtering (Winograd 1980; Lavin and Gray 2015,
// arXiv:1509.09308): a patch d of 6x6 gives 4x4 results A^T [(G g G^T) * (B^T d B)] A, with 36 products for each pair
// of channels where there would be 144. The points are 0, +-a, +-1/a and infinity with a = 1/sqrt(2); of the usual 0,
// +-1, +-2, numbers of more different sizes are summed, and the error is twice as large. Weights are transformed where
// they are used: that takes some percent of the time, but 36 numbers for 9 would take memory, and be read from it.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "products.h"

namespace twinstream {

constexpr int kTile = 4, kPatch = 6, kPoints = kPatch * kPatch;
constexpr int kPanel = kColumns * kLanes;  // output channels whose sums are in registers at once
constexpr int kDepth = 64;  // input channels of a block
constexpr int kStrip = 96;  // tiles whose sums of a panel stay in the second-level cache with its weights
constexpr int kWeightStep = kDepth * kPanel + kLanes;  // from point to point, but not to the same sets of the cache

// B pictures of H x W positions, C input and O output channels.
struct ConvolutionSizes {
  int64_t B, H, W, C, O;
};

// One way of each transform. A point's row of B^T has the coefficients of the product over all other points q of x - q;
// its row of G and its column of A^T have its powers, the latter divided by that product's value there. Pairs of points
// share their even and odd parts, whose coefficients are powers of two as far as may be.
constexpr float kSmall = 0.707106781f, kLarge = 1.41421356f;

struct OfInputs {
  static constexpr int kIn = kPatch, kOut = kPatch;

  static void apply(const Floats* d, Floats* v) {
    const Floats even_small = d[4] - 2.0f * d[2], odd_small = d[3] - 2.0f * d[1];
    const Floats even_large = d[4] - 0.5f * d[2], odd_large = d[3] - 0.5f * d[1];
    v[0] = d[0] + d[4] - 2.5f * d[2];
    v[1] = even_small + kSmall * odd_small;
    v[2] = even_small - kSmall * odd_small;
    v[3] = even_large + kLarge * odd_large;
    v[4] = even_large - kLarge * odd_large;
    v[5] = d[1] + d[5] - 2.5f * d[3];
  }
};

struct OfWeights {
  static constexpr int kIn = 3, kOut = kPatch;

  static void apply(const Floats* g, Floats* u) {
    const Floats even_small = g[0] + 0.5f * g[2], even_large = g[0] + 2.0f * g[2];
    u[0] = g[0];
    u[1] = even_small + kSmall * g[1];
    u[2] = even_small - kSmall * g[1];
    u[3] = even_large + kLarge * g[1];
    u[4] = even_large - kLarge * g[1];
    u[5] = g[2];
  }
};

struct OfSums {
  static constexpr int kIn = kPatch, kOut = kTile;

  static void apply(const Floats* m, Floats* y) {
    const Floats even_small = m[1] + m[2], odd_small = m[1] - m[2];
    const Floats even_large = m[3] + m[4], odd_large = m[3] - m[4];
    y[0] = m[0] + 0.166666667f * (even_large - 4.0f * even_small);
    y[1] = 0.235702260f * (odd_large - 2.0f * odd_small);
    y[2] = 0.333333333f * (even_large - even_small);
    y[3] = m[5] + 0.471404521f * (odd_large - 0.5f * odd_small);
  }
};

// A transform along the columns, then along the rows; ``take(row, column)`` and ``give(row, column, value)``.
template <typename Of, typename Take, typename Give>
inline void both_ways(Take take, Give give) {
  Floats half[Of::kOut][Of::kIn];
#pragma GCC unroll 6
  for (int j = 0; j < Of::kIn; j++) {
    Floats in[Of::kIn], out[Of::kOut];
#pragma GCC unroll 6
    for (int i = 0; i < Of::kIn; i++) in[i] = take(i, j);
    Of::apply(in, out);
#pragma GCC unroll 6
    for (int i = 0; i < Of::kOut; i++) half[i][j] = out[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < Of::kOut; i++) {
    Floats out[Of::kOut];
    Of::apply(half[i], out);
#pragma GCC unroll 6
    for (int j = 0; j < Of::kOut; j++) give(i, j, out[j]);
  }
}

// Transposes: each step exchanges the off-diagonal blocks of ``kStep`` lanes.
template <int kStep = 1>
inline void transpose(Floats (&x)[kLanes]) {
  Ints low, high;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; lane++) {
    low[lane] = lane & kStep ? kLanes + lane - kStep : lane;
    high[lane] = lane & kStep ? kLanes + lane : lane + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) {
    if (i & kStep) continue;
    const Floats first = x[i], second = x[i + kStep];
    x[i] = shuffle(first, second, low);
    x[i + kStep] = shuffle(first, second, high);
  }
  if constexpr (2 * kStep < kLanes) transpose<2 * kStep>(x);
}

// How a convolution is made of tasks, and their parts. A task is a strip of tiles, or where there are fewer strips than
// threads, a strip and a part of the output channels.
struct Winograd {
  const ConvolutionSizes n;
  const int64_t down, across, tiles, blocks, panels, few, parts, strips, strip, input_step, sum_step;

  Winograd(const ConvolutionSizes& sizes, int64_t threads)
      : n(sizes),
        down((n.H + kTile - 1) / kTile),
        across((n.W + kTile - 1) / kTile),
        tiles(n.B * down * across),
        blocks((n.C + kDepth - 1) / kDepth),
        panels((n.O + kPanel - 1) / kPanel),
        few((tiles + kStrip - 1) / kStrip),
        parts(std::max<int64_t>(1, threads / few)),
        strips(parts > 1 ? few : (few + threads - 1) / threads * threads),
        strip(whole((tiles + strips - 1) / strips)),
        input_step(strip * kDepth + kLanes),
        sum_step(strip * kPanel + kLanes) {}

  // So many tiles in whole groups of kRows.
  static int64_t whole(int64_t count) { return (count + kRows - 1) / kRows * kRows; }

  int64_t depth(int64_t block) const { return std::min<int64_t>(kDepth, n.C - block * kDepth); }

  // A tile's picture, and the first row and column of its results.
  struct Place {
    int64_t b, y, x;
  };

  Place place(int64_t tile) const {
    return {tile / (down * across), tile / across % down * kTile, tile % across * kTile};
  }

  // The patches of ``count`` tiles, transformed: [block of channels][point][tile][channel].
  void transform_inputs(const float* pictures, const float* zeros, int64_t first, int64_t count, float* out) const {
    for (int64_t t = 0; t < whole(count); t++) {
      const float* taps[kPoints];
      const Place at = place(first + t);
      for (int i = 0; i < kPoints; i++) {
        const int64_t y = at.y + i / kPatch - 1, x = at.x + i % kPatch - 1;
        const bool is_inside = t < count && y >= 0 && y < n.H && x >= 0 && x < n.W;
        taps[i] = is_inside ? pictures + ((at.b * n.H + y) * n.W + x) * n.C : zeros;
      }
      each(n.C, [&](int64_t c, int lanes) {
        float* target = out + c / kDepth * kPoints * input_step + t * kDepth + c % kDepth;
        both_ways<OfInputs>([&](int i, int j) { return take(taps[i * kPatch + j] + c, lanes); },
                            [&](int i, int j, Floats v) { store(target + (i * kPatch + j) * input_step, v); });
      });
    }
  }

  // The weights (O, 3, 3, C) of a panel and a block, transformed: [point][channel][output channel].
  void transform_weights(const float* weights, int64_t panel, int64_t block, float* out) const {
    for (int64_t p = 0; p < kPanel; p += kLanes) {
      const int64_t o = panel * kPanel + p, count = std::min<int64_t>(kLanes, n.O - o);
      if (count <= 0) return;
      const float* own = weights + o * 9 * n.C + block * kDepth;
      each(depth(block), [&](int64_t c, int lanes) {
        Floats taps[9][kLanes];
        for (int i = 0; i < 9; i++) {
          for (int r = 0; r < kLanes; r++) taps[i][r] = r < count ? take(own + (r * 9 + i) * n.C + c, lanes) : Floats{};
          transpose(taps[i]);
        }
        for (int k = 0; k < lanes; k++) {
          float* target = out + (c + k) * kPanel + p;
          both_ways<OfWeights>([&](int i, int j) { return taps[i * 3 + j][k]; },
                               [&](int i, int j, Floats u) { store(target + (i * kPatch + j) * kWeightStep, u); });
        }
      });
    }
  }

  // The products of a panel and a block at all points, added to those of earlier blocks: [point][tile][output channel].
  template <int C>
  void multiply(const float* inputs, const float* transformed, const float* weights, int64_t panel, int64_t block,
                int64_t count, float* sums) const {
    const int64_t groups = whole(count) / kRows, turns = kPoints * groups;
    for (int64_t turn = 0; turn < turns; turn++) {
      const int64_t point = turn / groups, tile = turn % groups * kRows;
      prefetch(weights, panel + (block + 1) / blocks, (block + 1) % blocks, turn, turns);
      Floats total[kRows][C] = {};  // of this block alone, as in attention: one long chain would lose digits
      accumulate(total, inputs + (block * kPoints + point) * input_step + tile * kDepth, kDepth,
                 transformed + point * kWeightStep, kPanel, kLanes, depth(block));
      for (int r = 0; r < kRows; r++) {
        for (int c = 0; c < C; c++) {
          float* at = sums + point * sum_step + (tile + r) * kPanel + c * kLanes;
          store(at, block ? load(at) + total[r][c] : total[r][c]);
        }
      }
    }
  }

  // Asks for a share of the next block's weights while this one's are multiplied: they lie in too many places for the
  // processor to find out by itself.
  void prefetch(const float* weights, int64_t panel, int64_t block, int64_t turn, int64_t turns) const {
    const int64_t rows = 9 * std::min<int64_t>(kPanel, n.O - panel * kPanel);
    for (int64_t row = rows * turn / turns; row < rows * (turn + 1) / turns; row++) {
      const float* at = weights + (panel * kPanel * 9 + row) * n.C + block * kDepth;
      for (int64_t c = 0; c < depth(block); c += 16) __builtin_prefetch(at + c, 0, 2);
    }
  }

  // The results of a panel from its sums, and the bias.
  void transform_sums(const float* sums, const float* bias, int64_t first, int64_t count, int64_t panel,
                      float* out) const {
    const int64_t o = panel * kPanel;
    for (int64_t t = 0; t < count; t++) {
      const Place at = place(first + t);
      const int64_t height = n.H - at.y, width = n.W - at.x;
      float* corner = out + ((at.b * n.H + at.y) * n.W + at.x) * n.O + o;
      each(std::min<int64_t>(kPanel, n.O - o), [&](int64_t c, int lanes) {
        const Floats offset = bias ? take(bias + o + c, lanes) : Floats{};
        const float* own = sums + t * kPanel + c;
        both_ways<OfSums>([&](int i, int j) { return load(own + (i * kPatch + j) * sum_step); },
                          [&](int i, int j, Floats y) {
                            if (i < height && j < width) put(corner + (i * n.W + j) * n.O + c, y + offset, lanes);
                          });
      });
    }
  }
};

// x (B, H, W, C), weights (O, 3, 3, C), bias (O) or none, out (B, H, W, O). The result does not depend on ``threads``.
inline void conv3x3(const float* x, const float* weights, const float* bias, float* out, const ConvolutionSizes& n,
                    int64_t threads) {
  const Winograd op(n, threads);
  const std::vector<float> zeros(n.C);
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> inputs(new float[op.blocks * kPoints * op.input_step]);
    std::unique_ptr<float[]> transformed(new float[kPoints * kWeightStep]), sums(new float[kPoints * op.sum_step]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < op.strips * op.parts; task++) {
      const int64_t first = task / op.parts * op.strip, count = std::min(op.strip, op.tiles - first);
      const int64_t part = task % op.parts;
      if (count <= 0) continue;
      op.transform_inputs(x, zeros.data(), first, count, inputs.get());
      for (int64_t panel = op.panels * part / op.parts; panel < op.panels * (part + 1) / op.parts; panel++) {
        const int64_t vectors = (n.O - panel * kPanel + kLanes - 1) / kLanes;
        const auto multiply = vectors >= 3   ? &Winograd::multiply<3>
                              : vectors == 2 ? &Winograd::multiply<2>
                                             : &Winograd::multiply<1>;
        for (int64_t block = 0; block < op.blocks; block++) {
          op.transform_weights(weights, panel, block, transformed.get());
          (op.*multiply)(inputs.get(), transformed.get(), weights, panel, block, count, sums.get());
        }
        op.transform_sums(sums.get(), bias, first, count, panel, out);
      }
    }
  }
}

}  // namespace twinstream
