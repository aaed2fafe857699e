// Attention of a few rows of one request over the live slots of its cache, for one key/value head.
//
// The queries of a tile (rows x the query heads that share the key/value head) walk the cache together, so that keys
// and values are read and widened once for all of them. Every query's own arithmetic is the same in any tile: scores
// in blocks of 16 slots from slot 0, sums over slots in ascending order, so its bits depend on its request alone.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"

namespace axicon {

// One request's cache in one layer: (G, capacity, K) keys and values; capacity is a multiple of 16.
struct Extent {
    bf16 *keys, *values;
    const int32_t* lengths;  // (G,) committed slots per head, or null while all heads hold every position
    int32_t* positions;      // (G, capacity), ascending, with lengths; or null
    float* tally;            // (G, entries, stride) attention each slot receives, `every` nodes an entry; or null
    int32_t capacity, entries, stride, every;
};

// Rotary embedding by halves: table holds K/2 cosines, then K/2 sines; null: none.
inline void rotate(float* x, const float* table, int K) {
    const int half = K / 2;
    for (int i = 0; table && i < half; i += LANES) {
        const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + half + i);
        const __m512 c = _mm512_loadu_ps(table + i), s = _mm512_loadu_ps(table + half + i);
        _mm512_storeu_ps(x + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_storeu_ps(x + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

// Lane i of the result is the sum of all lanes of r[i].
inline __m512 sums(const __m512 (&r)[16]) {
    __m512 t[8], u[4], v[2];
    unroll<8>([&](auto i) { t[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1])); });
    auto pd = [](__m512 x) { return _mm512_castps_pd(x); };
    unroll<4>([&](auto i) {
        u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pd(t[2 * i]), pd(t[2 * i + 1]))),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(pd(t[2 * i]), pd(t[2 * i + 1]))));
    });
    unroll<2>([&](auto i) { v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88), _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd)); });
    return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

struct Query {
    const float* q;          // (K,) rotated and scaled
    float* out;              // (K,)
    int from, live;          // slots it sees: from .. live - 1
    const uint64_t* hidden;  // or null; bit i: slot first + i is not visible
};

// In place: scores to e^(score - max), 0 outside the visible slots; returns their sum.
//
// What a node of a tree does not see is taken out while the rest is summed: so the sum has the order, and the bits, of a
// step that computes the node's path alone.
inline float soften(const Query& query, int first, float* s) {
    auto unseen = [&](int t) { return query.hidden[(t - first) / 64] >> ((t - first) % 64) & 1; };
    int live = query.hidden ? first : query.live;
    for (int t = live; t < query.live; ++t)
        if (!unseen(t)) s[live++] = s[t];
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    auto mask = [&](int t) { return live - t >= LANES ? __mmask16(0xffff) : __mmask16((1u << (live - t)) - 1); };
    __m512 top = lowest, total = _mm512_setzero_ps();
    for (int t = query.from; t < live; t += LANES) top = _mm512_max_ps(top, _mm512_mask_loadu_ps(lowest, mask(t), s + t));
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int t = query.from; t < live; t += LANES) {
        const __m512 v = _mm512_sub_ps(_mm512_mask_loadu_ps(lowest, mask(t), s + t), most);
        const __m512 e = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_set1_ps(-87.0f), _CMP_GT_OQ), exp(v));
        _mm512_mask_storeu_ps(s + t, mask(t), e);
        total = _mm512_add_ps(total, e);
    }
    if (query.hidden)
        for (int t = query.live - 1; t >= first; --t) s[t] = unseen(t) ? 0.0f : s[--live];
    return _mm512_reduce_add_ps(total);
}

// 16 slots of keys or values as float32: widened once for several queries, as they are read for a single one. The numbers
// are the same.
template <int K, bool SHARED>
struct Slots {
    alignas(64) float wide[SHARED ? LANES * K : LANES];
    const bf16* from;
    void take(const bf16* p) {
        from = p;
        if constexpr (SHARED)
            for (int i = 0; i < LANES * K; i += LANES) _mm512_store_ps(wide + i, load_bf16(p + i));
    }
    __m512 operator[](int i) const { return SHARED ? _mm512_load_ps(wide + i) : load_bf16(from + i); }
};

template <int V, bool SHARED>  // head width / 16; several queries
void attend(const Query* queries, int count, const bf16* keys, const bf16* values, int first, std::vector<float>& scores) {
    constexpr int K = V * LANES;
    int live = 0, from = INT32_MAX;
    for (int i = 0; i < count; ++i) live = std::max(live, queries[i].live), from = std::min(from, queries[i].from);
    const int stride = (live + LANES - 1) / LANES * LANES;
    scores.resize(size_t(count) * stride);
    Slots<K, SHARED> slots;
    for (int t = from / LANES * LANES; t < live; t += LANES) {
        // Values lie elsewhere: while keys are at work, they are on their way.
        for (int i = 0; i < LANES * K; i += 32) _mm_prefetch(reinterpret_cast<const char*>(values + size_t(t) * K + i), _MM_HINT_T0);
        slots.take(keys + size_t(t) * K);
        for (int i = 0; i < count; ++i) {
            if (t >= queries[i].live || t + LANES <= queries[i].from) continue;
            __m512 q[V], r[LANES];
            unroll<V>([&](auto v) { q[v] = _mm512_loadu_ps(queries[i].q + v * LANES); });
            unroll<LANES>([&](auto l) {
                r[l] = _mm512_mul_ps(q[0], slots[l * K]);
                unroll<V - 1>([&](auto v) { r[l] = _mm512_fmadd_ps(q[v + 1], slots[l * K + (v + 1) * LANES], r[l]); });
            });
            _mm512_storeu_ps(scores.data() + size_t(i) * stride + t, sums(r));
        }
    }
    for (int i = 0; i < count; ++i) {
        const float total = soften(queries[i], first, scores.data() + size_t(i) * stride);
        std::fill_n(queries[i].out, K, 0.0f);
        // The normalisation rides on the probabilities, so that the sum over values needs no second pass.
        float* s = scores.data() + size_t(i) * stride;
        for (int t = queries[i].from; t < queries[i].live; ++t) s[t] /= total;
    }
    for (int t = from / LANES * LANES; t < live; t += LANES) {
        slots.take(values + size_t(t) * K);
        for (int i = 0; i < count; ++i) {
            const float* s = scores.data() + size_t(i) * stride;
            __m512 acc[V];
            unroll<V>([&](auto v) { acc[v] = _mm512_loadu_ps(queries[i].out + v * LANES); });
            const int begin = std::max(t, queries[i].from), end = std::min(t + LANES, queries[i].live);
            for (int j = begin; j < end; ++j) {
                const __m512 p = _mm512_set1_ps(s[j]);
                unroll<V>([&](auto v) { acc[v] = _mm512_fmadd_ps(p, slots[(j - t) * K + v * LANES], acc[v]); });
            }
            unroll<V>([&](auto v) { _mm512_storeu_ps(queries[i].out + v * LANES, acc[v]); });
        }
    }
}

}  // namespace axicon
