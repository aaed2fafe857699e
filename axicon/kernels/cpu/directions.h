// Random directions that are counted instead of drawn, added to weights as they are read: a direction of plus and minus
// ones takes one bit per weight and is stored nowhere (axicon/kernels/directions.py is the definition).
#pragma once
#include <algorithm>

#include "simd.h"

namespace axicon {

// Philox-4x32-10 (Salmon et al., SC 2011): 128 bits each for counters (block, stream, 0, 0), block = first ... first + N - 1.
template <int N>
inline void philox(uint64_t key, uint32_t first, uint32_t stream, uint32_t (*out)[4]) {
    uint64_t c0[N], c1[N], c2[N], c3[N];  // words of 32 bits, wide for the compiler to multiply as vectors
    uint64_t k0 = uint32_t(key), k1 = key >> 32;
    for (int i = 0; i < N; ++i) c0[i] = uint32_t(first + i), c1[i] = stream, c2[i] = c3[i] = 0;
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < N; ++i) {
            const uint64_t a = 0xD2511F53u * c0[i], b = 0xCD9E8D57u * c2[i];
            c0[i] = (b >> 32) ^ c1[i] ^ k0;
            c1[i] = b & 0xffffffffu;
            c2[i] = (a >> 32) ^ c3[i] ^ k1;
            c3[i] = a & 0xffffffffu;
        }
        k0 = (k0 + 0x9E3779B9u) & 0xffffffffu;
        k1 = (k1 + 0xBB67AE85u) & 0xffffffffu;
    }
    for (int i = 0; i < N; ++i) out[i][0] = c0[i], out[i][1] = c1[i], out[i][2] = c2[i], out[i][3] = c3[i];
}

inline __m512 load_float(const float* p, __mmask16 live) { return _mm512_maskz_loadu_ps(live, p); }
inline __m512 load_float(const bf16* p, __mmask16 live) { return widen(_mm256_maskz_loadu_epi16(live, p)); }
inline void store_float(float* p, __m512 v, __mmask16 live) { _mm512_mask_storeu_ps(p, live, v); }
inline void store_float(bf16* p, __m512 v, __mmask16 live) { _mm256_mask_storeu_epi16(p, live, narrow(v)); }

struct Signed {
    __m512 plus, minus, kept;
    bool keeps;

    Signed(float keep, float scale)
        : plus(_mm512_set1_ps(scale)), minus(_mm512_set1_ps(-scale)), kept(_mm512_set1_ps(keep)), keeps(keep == 1.0f) {}

    __m512 operator()(__m512 v, uint32_t signs) const {
        if (!keeps) v = rounded(_mm512_mul_ps(v, kept));
        return _mm512_add_ps(v, _mm512_mask_blend_ps(__mmask16(signs), minus, plus));
    }
};

// out[i] = round(source[i] * keep) + scale * z[first + i], i < count, z of plus and minus ones. Two roundings.
template <class T>
void add_signs(const T* source, T* out, int64_t count, int64_t first, float keep, float scale, uint64_t key, uint32_t stream) {
    constexpr int BITS = 128, BLOCKS = 8;
    const Signed move(keep, scale);
    uint32_t words[BLOCKS][4];
    for (int64_t i = 0; i < count;) {
        const int64_t element = first + i;
        philox<BLOCKS>(key, uint32_t(element / BITS), stream, words);
        const int begin = int(element % BITS), end = int(std::min<int64_t>(BLOCKS * BITS, begin + count - i));
        for (int bit = begin; bit < end;) {
            const int n = std::min(16 - bit % 16, end - bit);
            const __mmask16 live = __mmask16((1u << n) - 1);
            const uint32_t signs = words[bit / BITS][bit % BITS / 32] >> (bit % 32);
            store_float(out + i, move(load_float(source + i, live), signs), live);
            bit += n, i += n;
        }
    }
}

// Rows of `width` elements; row r begins at element first[r] of the direction.
template <class T>
void add_signs_rows(const T* source, T* out, int64_t rows, int64_t width, const int64_t* first, float keep, float scale,
                    uint64_t key, uint32_t stream, int threads) {
    constexpr int64_t PIECE = 1 << 15;
    const int64_t pieces = (width + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PIECE)
    for (int64_t p = 0; p < rows * pieces; ++p) {
        const int64_t row = p / pieces, begin = p % pieces * PIECE, at = row * width + begin;
        add_signs(source + at, out + at, std::min(PIECE, width - begin), first[row] + begin, keep, scale, key, stream);
    }
}

}  // namespace axicon
