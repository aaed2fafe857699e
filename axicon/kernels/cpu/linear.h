// Linear layers over any number of rows, y += x W^T, one way of storing W per format (storage.h).
//
// Packed weights lie in blocks of 16 outputs: (N / 16, K / group, 16, group) with the `group` inputs that one
// instruction multiplies side by side, so one 64-byte load feeds every row of the tile.
//   int8  group 4, bytes w + 128 (vpdpbusd wants its first factor unsigned); LLM.int8 arithmetic with outliers per row
//   bf16  group 2, vdpbf16ps with float accumulators
//   sparse  as bf16, of which only the kept weights lie there: a block is a mask of 32 bits for each 64 bytes of the
//         dense one, least significant bit first, and behind all its masks the kept weights in the same order. They are
//         spread out in registers (Flash-LLM: loaded as sparse, computed as dense), so the results are those of bf16.
//   codes of 4 and 8 bits with a scale per group of columns: group.h
// Each output is summed over k in one fixed order, whatever the tile, the thread or the other rows of the batch:
// a row's bits depend on that row alone.
#pragma once
#include <array>

#include "group.h"

namespace axicon {

inline bool floats(const Linear& l) { return l.format == BF16 || l.format == SPARSE; }

inline size_t encoded_bytes(const Linear& l) { return size_t(l.inputs) * (floats(l) ? 2 : 1); }

inline float outlier_limit(const Linear& l, const float* x) {
    const float absolute = l.threshold > 0 ? l.threshold : INFINITY;
    if (l.relative <= 0) return absolute;
    __m512 squares = _mm512_setzero_ps();
    for (int k = 0; k < l.inputs; k += LANES) {
        const __m512 v = _mm512_loadu_ps(x + k);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float rms = std::sqrt(_mm512_reduce_add_ps(squares) / l.inputs);
    return rms > 0 ? std::min(absolute, l.relative * rms) : absolute;
}

inline void encode_int8(const Linear& l, const float* x, int8_t* q, Encoded& e) {
    const int K = l.inputs;
    const __m512 limit = _mm512_set1_ps(outlier_limit(l, x));
    __m512 top = _mm512_setzero_ps();
    for (int k = 0; k < K; k += LANES) {
        const __m512 a = _mm512_abs_ps(_mm512_loadu_ps(x + k));
        top = _mm512_mask_max_ps(top, _mm512_cmp_ps_mask(a, limit, _CMP_LT_OQ), top, a);
    }
    e.scale = _mm512_reduce_max_ps(top);
    e.outliers.clear();
    const __m512 inverse = _mm512_set1_ps(e.scale > 0 ? 127.0f / e.scale : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int k = 0; k < K; k += LANES) {
        const __m512 v = _mm512_loadu_ps(x + k);
        const __mmask16 inside = _mm512_cmp_ps_mask(_mm512_abs_ps(v), limit, _CMP_LT_OQ);
        const __m512i i = _mm512_maskz_cvtps_epi32(inside, _mm512_mul_ps(v, inverse));
        sum = _mm512_add_epi32(sum, i);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8(i));
        for (uint32_t out = uint16_t(~inside); out; out &= out - 1) {
            const int l = __builtin_ctz(out);
            e.outliers.push_back({k + l, x[k + l]});
        }
    }
    e.sum = _mm512_reduce_add_epi32(sum);
}

inline void encode(const Linear& l, const float* x, void* to, Encoded& e) {
    if (l.format == INT8) return encode_int8(l, x, static_cast<int8_t*>(to), e);
    if (!floats(l)) return encode_groups(l, x, static_cast<int8_t*>(to), e);
    bf16* q = static_cast<bf16*>(to);
    for (int k = 0; k < l.inputs; k += LANES) store_bf16(q + k, _mm512_loadu_ps(x + k));
}

// M rows times B blocks of 16 outputs, starting at block `block`. `store(m, o, value)` takes the results.
template <int M, int B, class Store>
inline void tile_int8(const Linear& l, const int8_t* q, const Encoded* rows, int block, Store&& store) {
    const int K = l.inputs;
    const uint8_t* w = static_cast<const uint8_t*>(l.weight) + size_t(block) * K * LANES;
    // One row reads one stream of memory; four sums of it keep the instruction busy. Integers have the same sum in any
    // order. K is a multiple of 16.
    constexpr int U = M * B == 1 ? 4 : 1;
    __m512i part[M][B][U], acc[M][B];
    unroll<M>([&](auto m) { unroll<B>([&](auto b) { unroll<U>([&](auto u) { part[m][b][u] = _mm512_setzero_si512(); }); }); });
    for (int at = 0; at < K; at += 4 * U) {
        unroll<U>([&](auto u) {
            const int k = at + 4 * u;
            __m512i wv[B];
            unroll<B>([&](auto b) {
                const auto* from = w + (size_t(b) * K + k) * LANES;
                _mm_prefetch(reinterpret_cast<const char*>(from) + AHEAD, _MM_HINT_T0);
                wv[b] = _mm512_loadu_si512(from);
            });
            unroll<M>([&](auto m) {
                int32_t four;
                memcpy(&four, q + size_t(m) * K + k, 4);
                const __m512i x = _mm512_set1_epi32(four);
                unroll<B>([&](auto b) { part[m][b][u] = dot4(part[m][b][u], wv[b], x); });
            });
        });
    }
    unroll<M>([&](auto m) { unroll<B>([&](auto b) { acc[m][b] = total(part[m][b]); }); });
    unroll<M>([&](auto m) {
        const Encoded& e = rows[m];
        unroll<B>([&](auto b) {
            const int o = (block + b) * LANES;
            const __m512 scale = _mm512_loadu_ps(l.scale + o);
            const __m512i dot = _mm512_sub_epi32(acc[m][b], _mm512_set1_epi32(128 * e.sum));
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, _mm512_set1_ps(e.scale / 16129.0f)));
            if (!e.outliers.empty()) {
                __m512 extra = _mm512_setzero_ps();
                for (const Outlier& out : e.outliers) {
                    const __m512i four = _mm512_loadu_si512(w + (size_t(b) * K + (out.k & ~3)) * LANES);
                    const __m512i byte = _mm512_and_si512(_mm512_srlv_epi32(four, _mm512_set1_epi32(8 * (out.k & 3))), _mm512_set1_epi32(255));
                    extra = _mm512_fmadd_ps(_mm512_set1_ps(out.x), _mm512_cvtepi32_ps(_mm512_sub_epi32(byte, _mm512_set1_epi32(128))), extra);
                }
                y = _mm512_fmadd_ps(extra, _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / 127.0f)), y);
            }
            store(m, o, y);
        });
    });
}

// The kept weights of a block, one after the other.
struct Kept {
    const char* masks;
    const bf16* values;

    Kept(const Linear& l, int block) : masks(static_cast<const char*>(l.weight) + l.start[block]), values(reinterpret_cast<const bf16*>(masks + 2 * size_t(l.inputs))) {}

    // The 32 weights of inputs k and k + 1, for k = 0, 2, 4, ...
    __m512i next(int k) {
        uint32_t mask;
        memcpy(&mask, masks + 2 * size_t(k), 4);
        _mm_prefetch(masks + 2 * size_t(k) + AHEAD / 8, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
        const bf16* from = values;
        values += __builtin_popcount(mask);
        return expand(mask, from);
    }
};

template <int M, int B, bool Sparse, class Store>
inline void tile_bf16(const Linear& l, const bf16* q, int block, Store&& store) {
    const int K = l.inputs;
    const bf16* w = static_cast<const bf16*>(l.weight) + size_t(block) * K * LANES;
    auto kept = [&] {
        if constexpr (Sparse) return [&]<int... b>(std::integer_sequence<int, b...>) {
            return std::array{Kept(l, block + b)...};
        }(std::make_integer_sequence<int, B>{});
        else return 0;
    }();
    __m512 acc[M][B];
    unroll<M>([&](auto m) { unroll<B>([&](auto b) { acc[m][b] = _mm512_setzero_ps(); }); });
    for (int k = 0; k < K; k += 2) {
        __m512i wv[B];
        unroll<B>([&](auto b) {
            if constexpr (Sparse) {
                wv[b] = kept[b].next(k);
            } else {
                const auto* from = w + (size_t(b) * K + k) * LANES;
                _mm_prefetch(reinterpret_cast<const char*>(from) + AHEAD, _MM_HINT_T0);
                wv[b] = _mm512_loadu_si512(from);
            }
        });
        unroll<M>([&](auto m) {
            int32_t two;
            memcpy(&two, q + size_t(m) * K + k, 4);
            const __m512i x = _mm512_set1_epi32(two);
#ifdef __AVX512BF16__
            unroll<B>([&](auto b) { acc[m][b] = _mm512_dpbf16_ps(acc[m][b], (__m512bh)wv[b], (__m512bh)x); });
#else
            const __m512 lo = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), hi = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000)));
            unroll<B>([&](auto b) {
                acc[m][b] = _mm512_fmadd_ps(lo, _mm512_castsi512_ps(_mm512_slli_epi32(wv[b], 16)), acc[m][b]);
                acc[m][b] = _mm512_fmadd_ps(hi, _mm512_castsi512_ps(_mm512_and_si512(wv[b], _mm512_set1_epi32(0xffff0000))), acc[m][b]);
            });
#endif
        });
    }
    unroll<M>([&](auto m) { unroll<B>([&](auto b) { store(m, (block + b) * LANES, acc[m][b]); }); });
}

template <int M, int B, class Store>
inline void tile(const Linear& l, const char* q, const Encoded* rows, int row, int block, Store&& store) {
    auto shifted = [&](int m, int o, __m512 y) {
        if (l.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(l.bias + o));
        store(row + m, o, y);
    };
    const char* from = q + size_t(row) * encoded_bytes(l);
    switch (l.format) {
        case BF16: return tile_bf16<M, B, false>(l, reinterpret_cast<const bf16*>(from), block, shifted);
        case SPARSE: return tile_bf16<M, B, true>(l, reinterpret_cast<const bf16*>(from), block, shifted);
        case INT8: return tile_int8<M, B>(l, reinterpret_cast<const int8_t*>(from), rows + row, block, shifted);
        case GROUP4: return tile_groups<M, B, true>(l, reinterpret_cast<const int8_t*>(from), rows + row, block, shifted);
        default: return tile_groups<M, B, false>(l, reinterpret_cast<const int8_t*>(from), rows + row, block, shifted);
    }
}

// Rows and blocks of the largest tile, whose sums the registers hold: 32 of 512 bits, or 16 of 256.
#ifdef AXICON_AVX2
constexpr int TALL = 4, BROAD = 1;
#else
constexpr int TALL = 8, BROAD = 2;
#endif

// All rows times `count` blocks of 16 outputs.
template <class Store>
inline void multiply(const Linear& l, const char* q, const Encoded* rows, int R, int block, int count, Store&& store) {
    // One row is a matter of memory alone, which is read fastest in one stream. The order of a float sum is fixed, so of
    // floats it takes four streams not to wait for each addition.
    for (; R == 1 && !floats(l) && count > 0; ++block, --count) tile<1, 1>(l, q, rows, 0, block, store);
    for (; R == 1 && count >= 4; block += 4, count -= 4) tile<1, 4>(l, q, rows, 0, block, store);
    for (; count > 0; block += BROAD, count -= BROAD) {
        auto some = [&](auto m, int row) {
            if (count >= BROAD) tile<m, BROAD>(l, q, rows, row, block, store);
            else tile<m, 1>(l, q, rows, row, block, store);
        };
        int row = 0;
        for (; row + TALL <= R; row += TALL) some(std::integral_constant<int, TALL>{}, row);
        if (TALL > 4 && R - row >= 4) { some(std::integral_constant<int, 4>{}, row); row += 4; }
        if (R - row >= 2) { some(std::integral_constant<int, 2>{}, row); row += 2; }
        if (R - row >= 1) some(std::integral_constant<int, 1>{}, row);
    }
}

}  // namespace axicon
