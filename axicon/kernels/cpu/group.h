// Products with codes of 4 or 8 bits that share a scale, and perhaps a zero, per group of columns:
// w[o, k] = scale[o, j] * (code[o, k] - zero[o, j]), j the group of k (`GroupIntLinear`).
//
// Activations become int8 with a scale of their own per row and group ("W4A8"), so codes are multiplied as they lie,
// and a large entry costs only its own group precision: no outliers to keep apart. Each group's sum is exact in
// integers; groups are added in float, in their order.
//
// Packed, per block of 16 outputs:
//   4 bits  (K / 8, 16, 4) bytes; byte i of an output holds code i in its low half, code i + 4 in its high half
//   8 bits  (K / 4, 16, 4) bytes
// After the codes of all blocks come all scales (N / 16, K / group, 16), then all zeros, uint8 in the same shape.
#pragma once
#include <algorithm>

#include "storage.h"

namespace axicon {

inline void encode_groups(const Linear& l, const float* x, int8_t* q, Encoded& e) {
    const int g = l.group;
    e.groups.resize(l.inputs / g);
    auto at = [&](int k) {
        return l.order ? _mm512_i32gather_ps(_mm512_loadu_si512(l.order + k), x, 4) : _mm512_loadu_ps(x + k);
    };
    for (Share& share : e.groups) {
        const int first = int(&share - e.groups.data()) * g;
        __m512 top = _mm512_setzero_ps();
        __mmask16 unordered = 0;
        for (int k = first; k < first + g; k += LANES) {
            const __m512 v = at(k);
            top = _mm512_max_ps(top, _mm512_abs_ps(v));
            unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        }
        const float absmax = _mm512_reduce_max_ps(top);
        // The smallest floats have no inverse; a group of them is nothing beside its row.
        const __m512 inverse = _mm512_set1_ps(absmax > 1e-30f ? 127.0f / absmax : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        for (int k = first; k < first + g; k += LANES) {
            const __m512i i = _mm512_cvtps_epi32(_mm512_mul_ps(at(k), inverse));
            sum = _mm512_add_epi32(sum, i);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8(i));
        }
        share.scale = unordered ? NAN : absmax / 127.0f;
        share.sum = _mm512_reduce_add_epi32(sum);
    }
}

inline __m512 load_scales(int32_t type, const char* p) {
    switch (type) {
        case SCALE_F16: return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        case SCALE_BF16: return load_bf16(reinterpret_cast<const bf16*>(p));
        default: return _mm512_loadu_ps(p);
    }
}

template <int M, int B, bool NIBBLES, class Store>
inline void tile_groups(const Linear& l, const int8_t* q, const Encoded* rows, int block, Store&& store) {
    constexpr int STEP = NIBBLES ? 8 : 4;  // columns in one load
    const int K = l.inputs, g = l.group, G = K / g, blocks = l.outputs / LANES;
    const size_t codes = size_t(K) / STEP * 64, shares = size_t(G) * LANES;  // bytes and entries of a block
    const int wide = l.scale_type == SCALE_F32 ? 4 : 2;
    const uint8_t* w = static_cast<const uint8_t*>(l.weight);
    const char* scales = reinterpret_cast<const char*>(w + blocks * codes);
    const uint8_t* zeros = reinterpret_cast<const uint8_t*>(scales + blocks * shares * wide);
    w += block * codes, scales += block * shares * wide, zeros += block * shares;

    __m512 y[M][B];
    unroll<M>([&](auto m) { unroll<B>([&](auto b) { y[m][b] = _mm512_setzero_ps(); }); });
    for (int j = 0; j < G; ++j) {
        // One row reads one stream of memory: four sums, as in linear.h.
        constexpr int HALVES = NIBBLES ? 2 : 1, U = M * B == 1 ? 4 / HALVES : 1, SUMS = M * B == 1 ? 4 : 1;
        __m512i part[M][B][SUMS], acc[M][B];
        unroll<M>([&](auto m) {
            unroll<B>([&](auto b) {
                part[m][b][0] = _mm512_set1_epi32(-l.middle * rows[m].groups[j].sum);
                unroll<SUMS - 1>([&](auto u) { part[m][b][u + 1] = _mm512_setzero_si512(); });
            });
        });
        for (int at = j * g; at < (j + 1) * g; at += U * STEP) {
            unroll<U>([&](auto u) {
                const int k = at + u * STEP;
                __m512i code[HALVES][B];
                unroll<B>([&](auto b) {
                    const auto* from = w + b * codes + size_t(k) / STEP * 64;
                    _mm_prefetch(reinterpret_cast<const char*>(from) + AHEAD, _MM_HINT_T0);
                    code[0][b] = _mm512_loadu_si512(from);
                    if constexpr (NIBBLES) {
                        const __m512i half = _mm512_set1_epi8(15);
                        code[1][b] = _mm512_and_si512(_mm512_srli_epi16(code[0][b], 4), half);
                        code[0][b] = _mm512_and_si512(code[0][b], half);
                    }
                });
                unroll<M>([&](auto m) {
                    unroll<HALVES>([&](auto h) {
                        int32_t four;
                        memcpy(&four, q + size_t(m) * K + k + 4 * h, 4);
                        const __m512i x = _mm512_set1_epi32(four);
                        constexpr int sum = SUMS == 1 ? 0 : u * HALVES + h;
                        unroll<B>([&](auto b) { part[m][b][sum] = dot4(part[m][b][sum], code[h][b], x); });
                    });
                });
            });
        }
        unroll<M>([&](auto m) { unroll<B>([&](auto b) { acc[m][b] = total(part[m][b]); }); });
        unroll<B>([&](auto b) {
            const size_t at = b * shares + size_t(j) * LANES;
            const __m512 scale = load_scales(l.scale_type, scales + at * wide);
            __m512 zero = _mm512_setzero_ps();
            if (l.zeros) zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + at))));
            unroll<M>([&](auto m) {
                const Share& share = rows[m].groups[j];
                __m512 dot = _mm512_cvtepi32_ps(acc[m][b]);
                if (l.zeros) dot = _mm512_fnmadd_ps(zero, _mm512_set1_ps(float(share.sum)), dot);
                y[m][b] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(share.scale)), y[m][b]);
            });
        });
    }
    unroll<M>([&](auto m) { unroll<B>([&](auto b) { store(m, (block + b) * LANES, y[m][b]); }); });
}

}  // namespace axicon
