// Softmax of attention's rows over keys that come in blocks, of which a row keeps its largest score and its sum
// (Milakov and Gimelshein 2018, arXiv:1805.02867).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace twinstream {

// The largest of the first ``known`` scores; those behind them, up to ``count``, a multiple of kLanes, do not count.
inline Floats highest_of(float* scores, int64_t known, int64_t count) {
  std::fill(scores + known, scores + count, -std::numeric_limits<float>::max());
  Floats highest = load(scores);
  for (int64_t i = kLanes; i < count; i += kLanes) highest = max(highest, load(scores + i));
  return highest;
}

// exp2(scale * (scores - top)) of one row as weights, with the running maximum and sum brought up to date, and what was
// summed of values under the maximum before.
template <int kDegree, typename Weight>
inline void weigh(const float* scores, Weight* weights, int64_t vectors, Floats highest, float scale, float& top,
                  float& total, float* out, int64_t out_vectors) {
  const float now = std::max(top, largest(highest));
  if (now > top) {
    const float shrink = std::exp2(scale * (top - now));
    total *= shrink;
    for (int64_t c = 0; c < out_vectors; c++) store(out + c * kLanes, load(out + c * kLanes) * shrink);
    top = now;
  }
  Floats sums = {};
  for (int64_t j = 0; j < vectors; j++) {
    const Floats w = exp2<kDegree>((load(scores + j * kLanes) - top) * scale);
    sums += w;
    store(weights + j * kLanes, w);
  }
  total += sum(sums);
}

}  // namespace twinstream
