// GroupNorm with or without SiLU on channels-last activations (Wu and He 2018, arXiv:1803.08494), and LayerNorm.
// Statistics are exact: means and sums of squared distances of small chunks, merged by Chan's formula.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace twinstream {

// Count, mean and sum of squared distances from it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void merge(const Moments& other) {
    const double total = count + other.count, distance = other.mean - mean;
    squares += other.squares + distance * distance * count * other.count / total;
    mean += distance * other.count / total;
    count = total;
  }
};

template <int kDegree>
inline Floats silu(Floats x) {
  return x / (1.0f + exp2<kDegree>(min(x * -1.44269504f, all(127.0f))));
}

// Moments of each group of x + shift over positions [first, last) of one image (positions, C).
template <typename T>
void chunk_moments(const T* x, const T* shift, int64_t first, int64_t last, int64_t C, int64_t G, Moments* groups,
                   float* means, float* squares) {
  const float count = last - first, share = 1.0f / count;
  each(C, [&](int64_t c, int lanes) {
    Floats total = {}, apart = {};
    for (int64_t at = first; at < last; at++) total += take(x + at * C + c, lanes);
    const Floats mean = total * share;
    for (int64_t at = first; at < last; at++) {
      const Floats distance = take(x + at * C + c, lanes) - mean;
      apart += distance * distance;
    }
    put(means + c, shift ? mean + take(shift + c, lanes) : mean, lanes);
    put(squares + c, apart, lanes);
  });
  const int64_t width = C / G;
  for (int64_t g = 0; g < G; g++) {
    double mean = 0, total = 0;
    for (int64_t c = g * width; c < (g + 1) * width; c++) mean += means[c];
    mean /= width;
    for (int64_t c = g * width; c < (g + 1) * width; c++)
      total += squares[c] + count * (means[c] - mean) * (means[c] - mean);
    groups[g] = {(double)count * width, mean, total};
  }
}

// y = silu((x + shift - mean) / sqrt(var + eps) * weight + bias) over groups of channels; x (B, N, C); shift none, or
// (C) every ``shift_row`` elements for each image. The mean is subtracted before scaling: folded into an offset, a large
// one would cancel inexactly.
template <typename T>
void group_norm(const T* x, const T* shift, const T* weight, const T* bias, T* out, int64_t B, int64_t N, int64_t C,
                int64_t G, int64_t shift_row, float eps, bool with_silu) {
  const int64_t chunk = std::clamp<int64_t>(8192 / C, 8, 128);  // positions that stay in the first-level cache
  const int64_t chunks = (N + chunk - 1) / chunk;
  std::vector<Moments> parts(B * chunks * G);
  std::vector<float> offset(B * C), centre(B * C), scale(B * C);
#pragma omp parallel
  {
    std::vector<float> means(C), squares(C);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * chunks; task++) {
      const int64_t first = task % chunks * chunk, b = task / chunks;
      chunk_moments(x + b * N * C, shift ? shift + b * shift_row : nullptr, first, std::min(N, first + chunk), C, G,
                    &parts[task * G], means.data(), squares.data());
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * G; task++) {
      const int64_t b = task / G, g = task % G, width = C / G;
      Moments all_of;
      for (int64_t i = 0; i < chunks; i++) all_of.merge(parts[(b * chunks + i) * G + g]);
      const double rstd = 1.0 / std::sqrt(all_of.squares / all_of.count + eps);
      for (int64_t c = g * width; c < (g + 1) * width; c++) {
        offset[b * C + c] = shift ? as_float(shift[b * shift_row + c]) : 0.0f;
        centre[b * C + c] = all_of.mean;
        scale[b * C + c] = rstd * as_float(weight[c]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < B * N; row++) {
      const float *o = &offset[row / N * C], *m = &centre[row / N * C], *s = &scale[row / N * C];
      each(C, [&](int64_t c, int lanes) {
        const Floats moved = take(x + row * C + c, lanes) + take(o + c, lanes) - take(m + c, lanes);
        Floats y = moved * take(s + c, lanes) + take(bias + c, lanes);
        if (with_silu) y = silu<kExpDegree<T>>(y);
        put(out + row * C + c, y, lanes);
      });
    }
  }
}

// LayerNorm (Ba et al. 2016, arXiv:1607.06450) over the last axis of (rows, C).
template <typename T>
void layer_norm(const T* x, const T* weight, const T* bias, T* out, int64_t rows, int64_t C, float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T* own = x + row * C;
    Floats sums = {};
    each(C, [&](int64_t c, int lanes) { sums += take(own + c, lanes); });
    const float mean = sum(sums) / C;
    Floats squares = {};
    each(C, [&](int64_t c, int lanes) {
      const Floats distance = take(own + c, lanes) - mean;
      squares += only(distance * distance, lanes);
    });
    const float rstd = 1.0f / std::sqrt(sum(squares) / C + eps);
    each(C, [&](int64_t c, int lanes) {
      const Floats y = (take(own + c, lanes) - mean) * rstd;
      put(out + row * C + c, y * take(weight + c, lanes) + take(bias + c, lanes), lanes);
    });
  }
}

}  // namespace twinstream
