// The mix of two branches' cross-attention (DCI, ECCV 2024, eq. 3 to 5; the formulas are in kernels/dbim.py): attention
// and masks of all rows in one pass, the softmax over space, and the mix in place.
#pragma once

#include <vector>

#include "attention.h"

namespace twinstream {

// One row's mask at one position, from that row of the map. ``own`` and ``chosen`` (S) indicate tokens.
inline float mask_of(const float* scores, float scale, float top, float total, const float* own, const float* chosen,
                     float token_scale, int64_t S) {
  const auto share = [&](int64_t s, int lanes) {
    return exp2<6>((take(scores + s, lanes) - top) * scale) / total * take(own + s, lanes);
  };
  Floats highest = {};
  each(S, [&](int64_t s, int lanes) { highest = max(highest, share(s, lanes)); });
  const float peak = largest(highest), power = token_scale * 1.44269504f;
  Floats among_own = {}, among_chosen = {};
  each(S, [&](int64_t s, int lanes) {
    const Floats sharpened = exp2<6>(min((share(s, lanes) - peak) * power, all(127.0f)));
    among_own += sharpened * take(own + s, lanes);
    among_chosen += sharpened * take(chosen + s, lanes);
  });
  return sum(among_chosen) / sum(among_own);
}

// q, out (2M, N, H*D); k, v (2M, S, H*D); chosen (2M, S); lengths (2M); gates (M, 4); masks (2M, H, N) for our use.
template <typename T>
void dbim(const T* q, const T* k, const T* v, const uint8_t* chosen, const int64_t* lengths, const float* gates, T* out,
          float* masks, void* scratch, const AttentionSizes& n, bool logits) {
  const int64_t pairs = n.B / 2, width = n.H * n.D;
  std::vector<float> own(n.B * n.S), wanted(n.B * n.S);
  for (int64_t i = 0; i < n.B * n.S; i++) {
    const int64_t s = i % n.S;
    own[i] = s >= 1 && s <= lengths[i / n.S];
    wanted[i] = chosen[i] != 0;
  }
  const float unscaled = 1.0f / std::sqrt((float)n.D);
  attend(q, k, v, out, scratch, n,
         [&](int64_t b, int64_t h, int64_t row, const float* scores, float scale, float top, float total) {
           float& mask = masks[(b * n.H + h) * n.N + row];
           if (logits) {
             Floats sums = {};
             const float* chosen_here = &wanted[b * n.S];
             each(n.S, [&](int64_t s, int lanes) { sums += take(scores + s, lanes) * take(chosen_here + s, lanes); });
             mask = sum(sums) * unscaled;
           } else {
             mask = mask_of(scores, scale, top, total, &own[b * n.S], &wanted[b * n.S], gates[b % pairs * 4 + 1], n.S);
           }
         });
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t head = 0; head < n.B * n.H; head++) {
      float* mask = masks + head * n.N;
      const float *gate = gates + head / n.H % pairs * 4, power = gate[2] * 1.44269504f, gain = gate[3];
      const float peak = *std::max_element(mask, mask + n.N);
      Floats sums = {};
      each(n.N, [&](int64_t i, int lanes) {
        const Floats share = exp2<6>((take(mask + i, lanes) - peak) * power);
        sums += only(share, lanes);
        put(mask + i, share, lanes);
      });
      const float scale = gain / sum(sums);
      each(n.N, [&](int64_t i, int lanes) { put(mask + i, take(mask + i, lanes) * scale, lanes); });
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < pairs * n.N; task++) {
      const int64_t m = task / n.N, row = task % n.N;
      for (int64_t h = 0; h < n.H; h++) {
        const float concept_gate = masks[(m * n.H + h) * n.N + row];
        const float other_gate = masks[((pairs + m) * n.H + h) * n.N + row];
        const float share = 1.0f / (1.0f + std::exp(gates[m * 4] * other_gate - concept_gate));
        T* mixed = out + (m * n.N + row) * width + h * n.D;
        const T* other = mixed + pairs * n.N * width;
        each(n.D, [&](int64_t d, int lanes) {
          put(mixed + d, take(mixed + d, lanes) * share + take(other + d, lanes) * (1.0f - share), lanes);
        });
      }
    }
  }
}

}  // namespace twinstream
