// From logits to a drawn token: probabilities, the best of them, and the draw. Each row by itself, in an order of
// additions that its length alone decides.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace axicon {

// The lanes of a vector at i that lie in front of the end.
inline __mmask16 lanes(int i, int end) { return end - i >= LANES ? 0xffff : (1u << (end - i)) - 1; }

// probs (V) = softmax(logits / temperature). Terms that are less than e^-87 of the largest are 0. Returns false where a
// logit is NaN or the largest is infinite.
inline bool probabilities(const float* logits, int vocab, float temperature, float* probs) {
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 most = lowest;
    __mmask16 strange = 0;
    for (int i = 0; i < vocab; i += LANES) {
        const __m512 x = _mm512_mask_loadu_ps(lowest, lanes(i, vocab), logits + i);
        strange |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, x);
    }
    const float best = _mm512_reduce_max_ps(most);
    if (strange || !std::isfinite(best)) return false;

    const __m512 shift = _mm512_set1_ps(best), scale = _mm512_set1_ps(1.0f / temperature), floor = _mm512_set1_ps(-87.0f);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int i = 0; i < vocab; i += LANES) {
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_mask_loadu_ps(lowest, lanes(i, vocab), logits + i), shift), scale);
        const __m512 e = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, floor, _CMP_GE_OQ), exp(x));
        sums[i / LANES & 1] = _mm512_add_ps(sums[i / LANES & 1], e);
        _mm512_mask_storeu_ps(probs + i, lanes(i, vocab), e);
    }
    const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])));
    for (int i = 0; i < vocab; i += LANES)
        _mm512_mask_storeu_ps(probs + i, lanes(i, vocab), _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(i, vocab), probs + i), share));
    return true;
}

// The `width` largest, best first and the lower id first among equals. As many groups as `width` have a peak of at
// least the width-th largest peak, so at least that many entries lie at or above it, and nothing below it is wanted.
inline void largest(const float* probs, int vocab, int width, float* values, int64_t* ids) {
    const int size = vocab / 64 > 4 * width ? 64 : 16, groups = (vocab + size - 1) / size;
    std::vector<float> peaks(groups);
    for (int g = 0; g < groups; ++g) {
        __m512 peak = _mm512_setzero_ps();
        for (int i = g * size; i < std::min((g + 1) * size, vocab); i += LANES)
            peak = _mm512_max_ps(peak, _mm512_maskz_loadu_ps(lanes(i, vocab), probs + i));
        peaks[g] = _mm512_reduce_max_ps(peak);
    }
    float least = 0.0f;
    if (groups > width) {
        std::vector<float> order(peaks);
        std::nth_element(order.begin(), order.begin() + (width - 1), order.end(), std::greater<>());
        least = order[width - 1];
    }
    std::vector<std::pair<float, int>> found;
    for (int g = 0; g < groups; ++g)
        if (peaks[g] >= least)
            for (int i = g * size; i < std::min((g + 1) * size, vocab); ++i)
                if (probs[i] >= least) found.emplace_back(-probs[i], i);
    std::nth_element(found.begin(), found.begin() + (width - 1), found.end());
    std::sort(found.begin(), found.begin() + width);
    for (int i = 0; i < width; ++i) values[i] = -found[i].first, ids[i] = found[i].second;
}

inline uint64_t splitmix(uint64_t n) {
    n = (n ^ (n >> 30)) * 0xBF58476D1CE4E5B9u;
    n = (n ^ (n >> 27)) * 0x94D049BB133111EBu;
    return n ^ (n >> 31);
}
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

// argmin of E / p over the candidates, E the unit exponential -log(1 - v) with v hashed from the key and the token's id;
// the lowest id among equals. As E >= v, most candidates are out by v / p alone, and few logarithms are taken.
inline int64_t first_arrival(const float* probs, const int64_t* ids, int count, uint64_t key) {
    float best = std::numeric_limits<float>::infinity();
    int64_t token = std::numeric_limits<int64_t>::max();
    const __m512i golden = _mm512_set1_epi64(GOLDEN), start = _mm512_set1_epi64(key + GOLDEN);
    for (int i = 0; i < count; i += 8) {
        const __mmask8 here = count - i >= 8 ? 0xff : (1u << (count - i)) - 1;
        __m512i z = _mm512_maskz_loadu_epi64(here, ids + i);
        z = _mm512_add_epi64(_mm512_mullo_epi64(z, golden), start);
        z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64(0xBF58476D1CE4E5B9u));
        z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64(0x94D049BB133111EBu));
        z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
        const __m256 v = _mm256_mul_ps(_mm256_add_ps(_mm512_cvtepu64_ps(_mm512_srli_epi64(z, 12)), _mm256_set1_ps(0.5f)),
                                       _mm256_set1_ps(0x1p-52f));
        const __m256 p = _mm256_maskz_loadu_ps(here, probs + i);
        // A little more than the best, so that rounding excludes nobody.
        const __m256 bound = _mm256_mul_ps(p, _mm256_set1_ps(best * (1.0f + 0x1p-20f)));
        unsigned near = here & _mm256_cmp_ps_mask(v, bound, _CMP_NGT_UQ) & _mm256_cmp_ps_mask(p, _mm256_setzero_ps(), _CMP_GT_OQ);
        alignas(32) float vs[8];
        if (near) _mm256_store_ps(vs, v);
        for (; near; near &= near - 1) {
            const int j = i + __builtin_ctz(near);
            const float arrival = -std::log1p(-vs[j - i]) / probs[j];
            if (arrival < best || (arrival == best && ids[j] < token)) best = arrival, token = ids[j];
        }
    }
    return token;
}

}  // namespace axicon
