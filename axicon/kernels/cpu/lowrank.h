// Low-rank additions to products: y += B (A x), for the rows of requests that name an adapter.
//
// Everything is float32 and done for one row by one thread in a fixed order, beside the product and not in it: a row's
// bits depend on that row alone, and rows without an adapter pass none of this.
#pragma once
#include "simd.h"

namespace axicon {

struct Pair {
    const float *a, *b;        // (rank, inputs), and B transposed with alpha / r in it: (rank, outputs)
    int32_t rank, first;       // adds to the product's outputs `first` .. `first + outputs - 1`; rank 0: absent
    int32_t outputs, inputs;
};

constexpr int PARTS = 3;  // q, k and v are one product

struct Pairs { Pair part[PARTS]; };

struct Adapter { Pairs qkv, out, up, down; };  // of one block

// The numbers between A and B, of all parts one after the other.
inline void squeeze(const Pairs& p, const float* x, float* low) {
    for (const Pair& part : p.part)
        for (int r = 0; r < part.rank; ++r) {
            const float* a = part.a + size_t(r) * part.inputs;
            __m512 sum = _mm512_setzero_ps();
            for (int k = 0; k < part.inputs; k += LANES) sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + k), _mm512_loadu_ps(x + k), sum);
            *low++ = _mm512_reduce_add_ps(sum);
        }
}

inline void spread(const Pairs& p, const float* low, float* y) {
    for (const Pair& part : p.part) {
        for (int o = 0; o < part.outputs; o += LANES) {
            __m512 sum = _mm512_setzero_ps();
            for (int r = 0; r < part.rank; ++r)
                sum = _mm512_fmadd_ps(_mm512_set1_ps(low[r]), _mm512_loadu_ps(part.b + size_t(r) * part.outputs + o), sum);
            float* to = y + part.first + o;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum));
        }
        low += part.rank;
    }
}

}  // namespace axicon
