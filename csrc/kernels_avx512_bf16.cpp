// AVX-512 with products of bfloat16 pairs (Intel from Cooper Lake on, AMD from Zen 4 on).
#include "standard_headers.h"
#if defined(DIFFPO_AVX512_BF16)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define VEC_WIDTH 16
#define REGISTERS 32
#define MAX_ROWS 14
#define DIFFPO_PAIR_PRODUCTS 1
#define DIFFPO_NAME "avx512_bf16"
#define DIFFPO_ENTRY kernels_avx512_bf16
#include "instruction_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
