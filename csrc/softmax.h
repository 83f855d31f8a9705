// Softmax of attention's rows over keys that come in blocks, of which a row keeps its largest score and its sum
// (Milakov and Gimelshein 2018, arXiv:1805.02867).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace twinstream {

// The largest of the first ``known`` of some vectors of scores, ``stride`` apart; those behind them do not count.
inline Floats highest_of(float* scores, int64_t known, int64_t vectors, int64_t stride = kLanes) {
  for (int64_t i = known; i < vectors * kLanes; i++)
    scores[i / kLanes * stride + i % kLanes] = -std::numeric_limits<float>::max();
  Floats highest = load(scores);
  for (int64_t j = 1; j < vectors; j++) highest = max(highest, load(scores + j * stride));
  return highest;
}

// Brings a row's largest score up to a further block's, and to it the sums of weights and of values so far.
inline void renew(Floats highest, float scale, float& top, Floats& total, float* out, int64_t out_vectors) {
  const float now = std::max(top, largest(highest));
  if (now == top) return;
  const float shrink = std::exp2(scale * (top - now));
  total *= shrink;
  for (int64_t c = 0; c < out_vectors; c++) store(out + c * kLanes, load(out + c * kLanes) * shrink);
  top = now;
}

}  // namespace twinstream
