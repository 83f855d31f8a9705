// Whole blocks of small models in one call: the parts of a block are some microseconds each, and so is a call.
#pragma once

#include "attention.h"
#include "geglu.h"
#include "linear.h"
#include "norms.h"

namespace twinstream {

constexpr int64_t kGatedRows = 256;

// A normalisation's weight and bias.
struct Norm {
  const void *weight, *bias;
};

// A packed weight, and the bias or none.
struct Map {
  const void *weight, *bias;
};

// B pictures (H, W, C) to (H, W, O), of which each has ``shift`` (O) every ``shift_row`` elements, or one for all.
struct ResnetBlock {
  const void *x, *shift;
  void* out;
  Norm norm1, norm2;
  Map conv1, conv2, shortcut;  // the first has no bias, which is part of the shift; no shortcut where C = O
  int64_t B, H, W, C, O, groups, shift_row, is_filtered, threads;
  float eps;
};

// A convolution, or where its weight is (O, C) a linear map, of pictures (H, W, C), which are normalised before, with
// silu or without, where there is a norm, and enlarged. The residual has the result's shape, or there is none.
struct Convolution {
  const void *x, *residual;
  void* out;
  Norm norm;
  Map map;
  int64_t B, H, W, C, height, width, stride, O, groups, is_pointwise, with_silu, is_filtered, threads;
  float eps;
};

// out = x + attention of norm(x), for B rows x of N positions and H heads of D channels. Keys and values are the
// positions' own, or given: (B, S, H*D).
struct AttentionBlock {
  const void *x, *keys, *values;
  void* out;
  Norm norm;
  Map into, to_out;  // to queries, and to keys and values where these are the positions' own
  int64_t B, N, S, H, D, threads;
  float eps;
};

// out = x + feed-forward of norm(x), for M rows x of C channels; the hidden ones are 4 C, gated.
struct FeedForwardBlock {
  const void* x;
  void* out;
  Norm norm;
  Map into, to_out;
  int64_t M, C, threads;
  float eps;
};

// The operands of one element type.
template <typename T>
struct Typed {
  using E = typename Panels<T>::E;

  static const T* of(const void* p) { return static_cast<const T*>(p); }
  static const E* packed(const Map& map) { return static_cast<const E*>(map.weight); }

  static std::unique_ptr<T[]> room(int64_t count) { return std::unique_ptr<T[]>(new T[count]); }

  // By minimal filtering where the weight is packed for it, which is for float alone.
  static void conv3x3(const T* x, const Taps& n, const Map& map, const T* residual, T* out, int64_t is_filtered,
                      int64_t threads) {
    if constexpr (std::is_same_v<T, float>) {
      if (is_filtered) return small_filtered_conv3x3(x, n, packed(map), of(map.bias), residual, out, threads);
    }
    small_conv3x3(x, n, packed(map), of(map.bias), residual, out, threads);
  }

  static void resnet(const ResnetBlock& n) {
    const int64_t positions = n.H * n.W, rows = n.B * positions;
    const auto normed = room(rows * std::max(n.C, n.O)), hidden = room(rows * n.O);
    const T *x = of(n.x), *residual = x;
    T* out = static_cast<T*>(n.out);
    group_norm(x, (const T*)nullptr, of(n.norm1.weight), of(n.norm1.bias), normed.get(), n.B, positions, n.C, n.groups,
               0, n.eps, true);
    conv3x3(normed.get(), {n.B, n.H, n.W, n.C, n.H, n.W, 1, n.O}, n.conv1, nullptr, hidden.get(), n.is_filtered,
            n.threads);
    group_norm(hidden.get(), of(n.shift), of(n.norm2.weight), of(n.norm2.bias), normed.get(), n.B, positions, n.O,
               n.groups, n.shift_row, n.eps, true);
    if (n.shortcut.weight) {
      linear(x, n.C, n.O, packed(n.shortcut), of(n.shortcut.bias), (const T*)nullptr, hidden.get(), rows, n.threads);
      residual = hidden.get();
    }
    conv3x3(normed.get(), {n.B, n.H, n.W, n.O, n.H, n.W, 1, n.O}, n.conv2, residual, out, n.is_filtered, n.threads);
  }

  static void convolve(const Convolution& n) {
    const T* x = of(n.x);
    const auto normed = room(n.norm.weight ? n.B * n.H * n.W * n.C : 0);
    if (n.norm.weight) {
      group_norm(x, (const T*)nullptr, of(n.norm.weight), of(n.norm.bias), normed.get(), n.B, n.H * n.W, n.C, n.groups,
                 0, n.eps, n.with_silu != 0);
      x = normed.get();
    }
    T* out = static_cast<T*>(n.out);
    if (n.is_pointwise)
      linear(x, n.C, n.O, packed(n.map), of(n.map.bias), of(n.residual), out, n.B * n.H * n.W, n.threads);
    else
      conv3x3(x, {n.B, n.H, n.W, n.C, n.height, n.width, n.stride, n.O}, n.map, of(n.residual), out, n.is_filtered,
              n.threads);
  }

  static void attend(const AttentionBlock& n) {
    const int64_t rows = n.B * n.N, C = n.H * n.D;
    const int64_t width = n.keys ? C : 3 * C;  // of what ``into`` gives
    const auto normed = room(rows * C), projected = room(rows * width);
    const AttentionSizes sizes{n.B, n.N, n.S, n.H, n.D, width, n.keys ? C : width, n.keys ? C : width};
    const std::unique_ptr<char[]> scratch(new char[attention_scratch<T>(sizes)]);
    layer_norm(of(n.x), of(n.norm.weight), of(n.norm.bias), normed.get(), rows, C, n.eps);
    linear(normed.get(), C, width, packed(n.into), of(n.into.bias), (const T*)nullptr, projected.get(), rows, n.threads);
    const T* keys = n.keys ? of(n.keys) : projected.get() + C;
    const T* values = n.values ? of(n.values) : projected.get() + 2 * C;
    attention(projected.get(), keys, values, nullptr, normed.get(), (T*)nullptr, scratch.get(), sizes, 0);
    linear(normed.get(), C, C, packed(n.to_out), of(n.to_out.bias), of(n.x), static_cast<T*>(n.out), rows, n.threads);
  }

  static void feed_forward(const FeedForwardBlock& n) {
    const int64_t some = std::min(n.M, kGatedRows);
    const auto normed = room(some * n.C), gates = room(some * 8 * n.C), hidden = room(some * 4 * n.C);
    for (int64_t first = 0; first < n.M; first += some) {
      const int64_t rows = std::min(some, n.M - first);
      const T* x = of(n.x) + first * n.C;
      layer_norm(x, of(n.norm.weight), of(n.norm.bias), normed.get(), rows, n.C, n.eps);
      linear(normed.get(), n.C, 8 * n.C, packed(n.into), of(n.into.bias), (const T*)nullptr, gates.get(), rows, n.threads);
      geglu(gates.get(), hidden.get(), rows, 4 * n.C);
      linear(hidden.get(), 4 * n.C, n.C, packed(n.to_out), of(n.to_out.bias), x, static_cast<T*>(n.out) + first * n.C,
             rows, n.threads);
    }
  }
};

}  // namespace twinstream
