// The C interface. setup.py compiles this file into a library per instruction set, and engine/backends/native.py loads the best
// one that the processor runs. ``is_bfloat16`` says what pointers without a type point at; else it is float.
#include "blocks.h"
#include "dbim.h"
#include "residual.h"
#include "winograd.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace twinstream;

namespace {

// Calls ``op`` with a zero of the element type, by which it is chosen.
template <typename Op>
auto with_type(int is_bfloat16, Op op) {
  return is_bfloat16 ? op(bfloat16{}) : op(float{});
}

template <typename T>
const T* in(const void* p, T) {
  return static_cast<const T*>(p);
}

template <typename T>
T* to(void* p, T) {
  return static_cast<T*>(p);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int twinstream_abi() { return 5; }

// Whether this processor has tiles of bfloat16, and the kernel lets this process use them.
static bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (d & kBfloat16) && (d & kTiles) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The best of 3 (AVX-512 and AMX's tiles of bfloat16), 2 (AVX-512 with bfloat16 products), 1 (AVX2 with FMA) and 0
// (baseline) that this processor runs.
EXPORT int twinstream_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bf16"))
    return has_tiles() ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

EXPORT int64_t twinstream_attention_block() { return kBlock; }

EXPORT int64_t twinstream_attention_scratch(int is_bfloat16, const AttentionSizes* n) {
  return with_type(is_bfloat16, [=](auto t) { return attention_scratch<decltype(t)>(*n); });
}

EXPORT void twinstream_attention(int is_bfloat16, const void* q, const void* k, const void* v, const int64_t* tokens,
                                 void* out, void* columns, void* scratch, const AttentionSizes* n, int64_t n_tokens) {
  with_type(is_bfloat16, [=](auto t) {
    attention(in(q, t), in(k, t), in(v, t), tokens, to(out, t), to(columns, t), scratch, *n, n_tokens);
  });
}

EXPORT void twinstream_dbim(int is_bfloat16, const void* q, const void* k, const void* v, const uint8_t* chosen,
                            const int64_t* lengths, const float* gates, void* out, float* masks, void* scratch,
                            const AttentionSizes* n, int logits) {
  with_type(is_bfloat16, [=](auto t) {
    dbim(in(q, t), in(k, t), in(v, t), chosen, lengths, gates, to(out, t), masks, scratch, *n, logits != 0);
  });
}

EXPORT void twinstream_residual_apply(int is_bfloat16, const void* x, const void* attended, const void* columns,
                                      const int64_t* leaders, const void* residuals, void* out, int64_t F, int64_t N,
                                      int64_t K, int64_t C) {
  with_type(is_bfloat16, [=](auto t) {
    residual_apply(in(x, t), in(attended, t), in(columns, t), leaders, in(residuals, t), to(out, t), F, N, K, C);
  });
}

EXPORT void twinstream_residual_add(int is_bfloat16, const void* x, const void* residual, const void* bias, void* out,
                                    int64_t rows, int64_t C) {
  with_type(is_bfloat16,
            [=](auto t) { residual_add(in(x, t), in(residual, t), in(bias, t), to(out, t), rows, C); });
}

EXPORT void twinstream_group_norm(int is_bfloat16, const void* x, const void* shift, const void* weight,
                                  const void* bias, void* out, int64_t B, int64_t N, int64_t C, int64_t G,
                                  int64_t shift_row, float eps, int with_silu) {
  with_type(is_bfloat16, [=](auto t) {
    group_norm(in(x, t), in(shift, t), in(weight, t), in(bias, t), to(out, t), B, N, C, G, shift_row, eps,
               with_silu != 0);
  });
}

EXPORT void twinstream_layer_norm(int is_bfloat16, const void* x, const void* weight, const void* bias, void* out,
                                  int64_t rows, int64_t C, float eps) {
  with_type(is_bfloat16,
            [=](auto t) { layer_norm(in(x, t), in(weight, t), in(bias, t), to(out, t), rows, C, eps); });
}

EXPORT void twinstream_geglu(int is_bfloat16, const void* x, void* out, int64_t rows, int64_t C) {
  with_type(is_bfloat16, [=](auto t) { geglu(in(x, t), to(out, t), rows, C); });
}

EXPORT void twinstream_conv3x3(const float* x, const float* weights, const float* bias, float* out,
                               const ConvolutionSizes* n, int64_t threads) {
  conv3x3(x, weights, bias, out, *n, threads);
}

EXPORT int64_t twinstream_packed_bytes(int is_bfloat16, int64_t N, int64_t K) {
  return with_type(is_bfloat16, [=](auto t) { return Panels<decltype(t)>(N, K).bytes(); });
}

EXPORT void twinstream_pack(int is_bfloat16, const void* weight, void* packed, int64_t N, int64_t K) {
  with_type(is_bfloat16, [=](auto t) {
    const Panels<decltype(t)> panels(N, K);
    panels.pack(in(weight, t), static_cast<typename Panels<decltype(t)>::E*>(packed));
  });
}

EXPORT void twinstream_pack_filtered(const float* weight, float* packed, int64_t N, int64_t C) {
  pack_filtered(weight, packed, N, C);
}

EXPORT void twinstream_resnet(int is_bfloat16, const ResnetBlock* n) {
  with_type(is_bfloat16, [=](auto t) { Typed<decltype(t)>::resnet(*n); });
}

EXPORT void twinstream_convolve(int is_bfloat16, const Convolution* n) {
  with_type(is_bfloat16, [=](auto t) { Typed<decltype(t)>::convolve(*n); });
}

EXPORT void twinstream_attend(int is_bfloat16, const AttentionBlock* n) {
  with_type(is_bfloat16, [=](auto t) { Typed<decltype(t)>::attend(*n); });
}

EXPORT void twinstream_feed_forward(int is_bfloat16, const FeedForwardBlock* n) {
  with_type(is_bfloat16, [=](auto t) { Typed<decltype(t)>::feed_forward(*n); });
}
