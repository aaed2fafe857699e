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

// Values of a row, the largest first, sorted only as far as they are asked for.
class Descending {
  public:
    // Entries of at least `least`, which is above 0.
    Descending(const float* probs, int vocab, float least) {
        static thread_local std::vector<float> room;
        if (int(room.size()) < vocab + LANES) room.resize(vocab + LANES);
        values = room.data();
        for (int i = 0; i < vocab; i += LANES) {
            const __m512 p = _mm512_maskz_loadu_ps(lanes(i, vocab), probs + i);
            const __mmask16 in = _mm512_cmp_ps_mask(p, _mm512_set1_ps(least), _CMP_GE_OQ);
            _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(in, p));
            count += __builtin_popcount(in);
        }
    }
    int size() const { return count; }
    float operator[](int i) {
        while (i >= sorted) {
            float *from = values + sorted, *to = from + std::min(std::max(64, 2 * sorted), count - sorted), *end = values + count;
            if (to != end) std::nth_element(from, to, end, std::greater<>());
            std::sort(from, to, std::greater<>());
            sorted = int(to - values);
        }
        return values[i];
    }

  private:
    float* values;
    int count = 0, sorted = 0;
};

inline float most(const float* probs, int vocab) {
    __m512 best = _mm512_setzero_ps();
    for (int i = 0; i < vocab; i += LANES) best = _mm512_max_ps(best, _mm512_maskz_loadu_ps(lanes(i, vocab), probs + i));
    return _mm512_reduce_max_ps(best);
}

// The sum of entries of at least `least`.
inline double mass_from(const float* probs, int vocab, float least) {
    __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int i = 0; i < vocab; i += LANES) {
        const __m512 p = _mm512_maskz_loadu_ps(lanes(i, vocab), probs + i);
        const __m512 kept = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(p, _mm512_set1_ps(least), _CMP_GE_OQ), p);
        sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(kept)));
        sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(kept, 1)));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1]));
}

// What top-k (0: all), top-p and min-p leave of probs (V), in place: what is out is 0, the rest sums to 1. Each of the
// three is a lowest probability that stays, so entries of equal probability stay or go together.
inline void truncate(float* probs, int vocab, int top_k, double top_p, double min_p) {
    if (top_k >= vocab) top_k = 0;
    constexpr float smallest = std::numeric_limits<float>::min();
    float least = smallest;
    if (min_p > 0) {
        // As a float, the least number that is not below the product.
        const double bound = min_p * double(most(probs, vocab));
        const float near = float(bound);
        least = std::max(least, near < bound ? std::nextafterf(near, 2.0f) : near);
    }
    double whole = 1.0;
    if (top_k > 0) {
        Descending order(probs, vocab, smallest);
        const float last = top_k < order.size() ? order[top_k - 1] : smallest;
        if (top_p < 1.0) whole = mass_from(probs, vocab, last);
        least = std::max(least, last);
    }
    if (top_p < 1.0) {
        // All entries below (1 - top_p) / V together are too few to be reached; half of it leaves room for rounding.
        const float low = top_k > 0 ? smallest : float(0.5 * (1.0 - top_p) / vocab);
        Descending order(probs, vocab, std::max(low, smallest));
        double mass = 0.0;
        for (int i = 0; i < order.size(); ++i) {
            mass += double(order[i]);
            if (mass >= top_p * whole) {
                least = std::max(least, order[i]);
                break;
            }
        }
    }
    const double mass = mass_from(probs, vocab, least);
    const __m512 share = _mm512_set1_ps(float(1.0 / mass)), bound = _mm512_set1_ps(least);
    for (int i = 0; i < vocab; i += LANES) {
        const __m512 p = _mm512_maskz_loadu_ps(lanes(i, vocab), probs + i);
        _mm512_mask_storeu_ps(probs + i, lanes(i, vocab),
                              _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(p, bound, _CMP_GE_OQ), p, share));
    }
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
        const __m256 p = _mm256_maskz_loadu_ps(here, probs + i);
        const __mmask8 in = _mm256_cmp_ps_mask(p, _mm256_setzero_ps(), _CMP_GT_OQ);
        if (!in) continue;
        __m512i z = _mm512_maskz_loadu_epi64(here, ids + i);
        z = _mm512_add_epi64(_mm512_mullo_epi64(z, golden), start);
        z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64(0xBF58476D1CE4E5B9u));
        z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64(0x94D049BB133111EBu));
        z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
        const __m256 v = _mm256_mul_ps(_mm256_add_ps(_mm512_cvtepu64_ps(_mm512_srli_epi64(z, 12)), _mm256_set1_ps(0.5f)),
                                       _mm256_set1_ps(0x1p-52f));
        // A little more than the best, so that rounding excludes nobody.
        const __m256 bound = _mm256_mul_ps(p, _mm256_set1_ps(best * (1.0f + 0x1p-20f)));
        unsigned near = in & _mm256_cmp_ps_mask(v, bound, _CMP_NGT_UQ);
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
