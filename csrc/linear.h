// Linear maps and 3x3 convolutions of small models, whose weights are packed once and stay in a cache: at some hundred
// rows and channels, a call of a library for large products takes longer than the product.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "winograd.h"

namespace twinstream {

constexpr int64_t kChain = 256;  // steps whose products are summed in one chain, and that stay in the first-level cache
constexpr int64_t kTaskRows = 4 * kRows;

// A packed weight of N output and K input channels: panels of up to kColumns vectors of output channels, each
// [step][output channel], where a step is an input channel or a pair of them.
template <typename T>
struct Panels {
  using E = typename Product<T>::Element;
  static constexpr int kPair = Product<T>::kPair;

  const int64_t N, K, steps, vectors, panels;

  Panels(int64_t n, int64_t k)
      : N(n),
        K(k),
        steps((k + kPair - 1) / kPair),
        vectors((n + kLanes - 1) / kLanes),
        panels((vectors + kColumns - 1) / kColumns) {}

  int64_t bytes() const { return vectors * kLanes * steps * (int64_t)sizeof(E); }

  int64_t first(int64_t panel) const { return vectors * panel / panels; }  // its first vector

  // Calls ``multiply`` with a panel's vectors as a constant.
  template <typename Multiply>
  static void with_width(int64_t vectors, Multiply multiply) {
    if (vectors == 3) multiply(std::integral_constant<int, 3>{});
    if (vectors == 2) multiply(std::integral_constant<int, 2>{});
    if (vectors == 1) multiply(std::integral_constant<int, 1>{});
  }

  void pack(const T* weight, E* packed) const {
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t from = first(panel) * kLanes, width = first(panel + 1) * kLanes - from;
      for (int64_t n = from; n < from + width; n++) {
        E* at = packed + from * steps + n - from;
        for (int64_t step = 0; step < steps; step++, at += width) {
          const T* pair_of = weight + n * K + step * kPair;
          if (n < N) pair(*at, pair_of[0], kPair == 2 && step * kPair + 1 < K ? pair_of[kPair - 1] : T{});
          else *at = E{};
        }
      }
    }
  }
};

// ``count`` numbers as steps, the last pair filled up with zero.
template <typename T>
inline void pack_steps(const T* x, typename Product<T>::Element* out, int64_t count) {
  constexpr int kPair = Product<T>::kPair;
  int64_t step = 0;
  for (; (step + 1) * kPair <= count; step++) pair(out[step], x[step * kPair], x[step * kPair + kPair - 1]);
  if (step * kPair < count) pair(out[step], x[step * kPair], T{});
}

inline void pack_steps(const float* x, float* out, int64_t count) { std::memcpy(out, x, count * sizeof(float)); }

// out (M, N) = rows W^T + bias + residual (M, N), the latter two or none. ``gather(row, step, count, to)`` gives some
// steps of a row. In which order a sum is taken depends on K alone.
template <typename T, typename Gather>
void products(const Panels<T>& n, const typename Panels<T>::E* weight, const T* bias, const T* residual, T* out,
              int64_t M, int64_t threads, Gather gather) {
  using E = typename Panels<T>::E;
  const int64_t blocks = (M + kTaskRows - 1) / kTaskRows;
  const int64_t parts = std::clamp<int64_t>(2 * threads / blocks, 1, n.panels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < blocks * parts; task++) {
    const int64_t first = task / parts * kTaskRows, count = std::min(kTaskRows, M - first), part = task % parts;
    const int64_t row_size = n.vectors * kLanes;
    alignas(64) E rows[kTaskRows * kChain];
    std::unique_ptr<float[]> earlier(n.steps > kChain ? new float[kTaskRows * row_size] : nullptr);
    for (int64_t step = 0; step < n.steps; step += kChain) {
      const int64_t length = std::min(kChain, n.steps - step);
      const bool is_last = step + length == n.steps;
      for (int64_t r = 0; r < count; r++) gather(first + r, step, length, rows + r * kChain);
      for (int64_t r = count; r % kRows; r++) std::fill_n(rows + r * kChain, length, E{});
      for (int64_t panel = n.panels * part / parts; panel < n.panels * (part + 1) / parts; panel++) {
        const int64_t from = n.first(panel) * kLanes, vectors = n.first(panel + 1) - n.first(panel);
        const E* own = weight + from * n.steps + step * vectors * kLanes;
        const auto multiply = [&](auto columns) {
          constexpr int C = decltype(columns)::value;
          for (int64_t tile = 0; tile < count; tile += kRows) {
            Floats sums[kRows][C] = {};
            accumulate(sums, rows + tile * kChain, kChain, own, C * kLanes, kLanes, length);
            for (int64_t r = tile; r < std::min<int64_t>(tile + kRows, count); r++) {
              for (int c = 0; c < C; c++) {
                const int64_t at = from + c * kLanes;
                Floats y = sums[r - tile][c];
                float* kept = earlier.get() + r * row_size + at;
                if (step) y += load(kept);
                if (!is_last) {
                  store(kept, y);
                  continue;
                }
                const int lanes = std::min<int64_t>(kLanes, n.N - at);
                const int64_t place = (first + r) * n.N + at;
                if (bias) y += take(bias + at, lanes);
                if (residual) y += take(residual + place, lanes);
                put(out + place, y, lanes);
              }
            }
          }
        };
        n.with_width(vectors, multiply);
      }
    }
  }
}

// x (M, K) W^T.
template <typename T>
void linear(const T* x, int64_t K, int64_t N, const typename Panels<T>::E* weight, const T* bias, const T* residual,
            T* out, int64_t M, int64_t threads) {
  products(Panels<T>(N, K), weight, bias, residual, out, M, threads,
           [=](int64_t row, int64_t step, int64_t count, typename Panels<T>::E* to) {
             const int64_t k = step * Panels<T>::kPair;
             pack_steps(x + row * K + k, to, std::min(count * Panels<T>::kPair, K - k));
           });
}

// B pictures of H x W positions and C channels, C even, which are enlarged to ``height`` x ``width`` by repetition and
// convolved to N channels at every ``stride``-th position.
struct Taps {
  int64_t B, H, W, C, height, width, stride, N;

  int64_t rows() const { return (height - 1) / stride + 1; }
  int64_t columns() const { return (width - 1) / stride + 1; }
  int64_t positions() const { return B * rows() * columns(); }
};

// A 3x3 convolution of padding 1; its weight is (N, 3, 3, C), packed.
template <typename T>
void small_conv3x3(const T* x, const Taps& n, const typename Panels<T>::E* weight, const T* bias, const T* residual,
                   T* out, int64_t threads) {
  using E = typename Panels<T>::E;
  constexpr int kPair = Panels<T>::kPair;
  const int64_t steps = n.C / kPair, columns = n.columns(), rows = n.rows();  // steps of a tap
  products(Panels<T>(n.N, 9 * n.C), weight, bias, residual, out, n.positions(), threads,
           [=](int64_t row, int64_t step, int64_t count, E* to) {
             const int64_t b = row / (rows * columns), y = row / columns % rows * n.stride, left = row % columns * n.stride;
             while (count > 0) {
               const int64_t tap = step / steps, within = step % steps, some = std::min(count, steps - within);
               const int64_t v = y + tap / 3 - 1, u = left + tap % 3 - 1;
               if (v < 0 || v >= n.height || u < 0 || u >= n.width) {
                 std::fill_n(to, some, E{});
               } else {
                 const int64_t at = (b * n.H + v * n.H / n.height) * n.W + u * n.W / n.width;
                 pack_steps(x + at * n.C + within * kPair, to, some * kPair);
               }
               to += some, step += some, count -= some;
             }
           });
}

// The weight (N, 3, 3, C) of a convolution by minimal filtering (see winograd.h), transformed and packed: [point][panels].
inline void pack_filtered(const float* weight, float* packed, int64_t N, int64_t C) {
  const Panels<float> panels(N, C);
  std::unique_ptr<float[]> transformed(new float[kPoints * N * C]);
  for (int64_t n = 0; n < N; n++) {
    each(C, [&](int64_t c, int lanes) {
      const float* taps = weight + n * 9 * C + c;
      both_ways<OfWeights>([&](int i, int j) { return take(taps + (i * 3 + j) * C, lanes); },
                           [&](int i, int j, Floats u) {
                             put(&transformed[((i * kPatch + j) * N + n) * C + c], u, lanes);
                           });
    });
  }
  const int64_t size = panels.bytes() / sizeof(float);
  for (int64_t point = 0; point < kPoints; point++)
    panels.pack(&transformed[point * N * C], packed + point * size);
}

// ``small_conv3x3`` of stride 1 by minimal filtering, in float32.
inline void small_filtered_conv3x3(const float* x, const Taps& n, const float* weight, const float* bias,
                                   const float* residual, float* out, int64_t threads) {
  const Panels<float> panels(n.N, n.C);
  const int64_t down = (n.height + kTile - 1) / kTile, across = (n.width + kTile - 1) / kTile;
  const int64_t tiles = n.B * down * across, rows = (tiles + kRows - 1) / kRows * kRows;
  const int64_t size = panels.bytes() / sizeof(float), width = panels.vectors * kLanes;
  std::unique_ptr<float[]> inputs(new float[kPoints * rows * n.C]), sums(new float[kPoints * rows * width]);
  const std::unique_ptr<float[]> zeros(new float[n.C]());
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
      const int64_t b = t / (down * across), top = t / across % down * kTile - 1, left = t % across * kTile - 1;
      const float* taps[kPoints];
      for (int i = 0; i < kPoints; i++) {
        const int64_t v = top + i / kPatch, u = left + i % kPatch;
        const bool is_inside = t < tiles && v >= 0 && v < n.height && u >= 0 && u < n.width;
        taps[i] = is_inside ? x + ((b * n.H + v * n.H / n.height) * n.W + u * n.W / n.width) * n.C : zeros.get();
      }
      each(n.C, [&](int64_t c, int lanes) {
        both_ways<OfInputs>([&](int i, int j) { return take(taps[i * kPatch + j] + c, lanes); },
                            [&](int i, int j, Floats v) {
                              put(&inputs[((i * kPatch + j) * rows + t) * n.C + c], v, lanes);
                            });
      });
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < kPoints * panels.panels; task++) {
      const int64_t point = task / panels.panels, panel = task % panels.panels;
      const int64_t from = panels.first(panel) * kLanes, vectors = panels.first(panel + 1) - panels.first(panel);
      panels.with_width(vectors, [&](auto columns) {
        constexpr int C = decltype(columns)::value;
        for (int64_t t = 0; t < rows; t += kRows) {
          Floats total[kRows][C] = {};
          accumulate(total, &inputs[(point * rows + t) * n.C], n.C, weight + point * size + from * n.C, C * kLanes, kLanes,
                     n.C);
          for (int r = 0; r < kRows; r++)
            for (int c = 0; c < C; c++) store(&sums[(point * rows + t + r) * width + from + c * kLanes], total[r][c]);
        }
      });
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t b = t / (down * across), top = t / across % down * kTile, left = t % across * kTile;
      each(n.N, [&](int64_t c, int lanes) {
        const Floats offset = bias ? take(bias + c, lanes) : Floats{};
        both_ways<OfSums>([&](int i, int j) { return load(&sums[((i * kPatch + j) * rows + t) * width + c]); },
                          [&](int i, int j, Floats y) {
                            if (top + i >= n.height || left + j >= n.width) return;
                            const int64_t at = ((b * n.height + top + i) * n.width + left + j) * n.N + c;
                            y += offset;
                            put(out + at, residual ? y + take(residual + at, lanes) : y, lanes);
                          });
      });
    }
  }
}

}  // namespace twinstream
