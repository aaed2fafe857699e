// Vector helpers shared by the kernels. They need AVX-512 with VNNI, or AVX2: on other processors the library is not
// built and axicon says which torch path it runs instead.
#pragma once
#include <immintrin.h>

#if !(defined __AVX512F__ && defined __AVX512BW__ && defined __AVX512DQ__ && defined __AVX512VL__ && defined __AVX512VNNI__)
#define AXICON_AVX2
#include "avx2.h"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace axicon {

using bf16 = uint16_t;
constexpr int LANES = 16;

inline __m512 widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline __m512 load_bf16(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// Round to nearest even, as torch does.
inline __m256i narrow(__m512 v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
inline void store_bf16(bf16* p, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }

// e^x by Cody-Waite reduction and a degree-6 polynomial; relative error below 2e-7 in the range it keeps.
inline __m512 exp(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// Keeps the compiler from making one rounding of this one and the next.
inline __m512 rounded(__m512 v) {
#ifdef AXICON_AVX2
    __asm__("" : "+x"(v.lo), "+x"(v.hi));
#else
    __asm__("" : "+v"(v));
#endif
    return v;
}

// acc += four products of a byte of w (unsigned) and of x (signed) in each lane.
inline __m512i dot4(__m512i acc, __m512i w, __m512i x) {
#ifndef AXICON_AVX2
    // Written as an instruction because GCC copies the accumulator before and after the intrinsic, which costs a fifth of
    // the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
#else
    auto half = [](__m256i acc, __m256i w, __m256i x) {
#ifdef __AVXVNNI__
        return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
        // Products of bytes added in pairs do not fit 16 bits, so even and odd bytes are multiplied apart, as 16 bits.
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
        return _mm256_add_epi32(acc, _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8))));
#endif
    };
    return {half(acc.lo, w.lo, x.lo), half(acc.hi, w.hi, x.hi)};
#endif
}

#if defined AXICON_AVX2 || !defined __AVX512VBMI2__
// Of each mask of 8 bits, the bytes that bring the first values to their places; 128 and more make zeros.
struct Places {
    uint8_t bytes[256][16];
    constexpr Places() : bytes() {
        for (int mask = 0; mask < 256; ++mask)
            for (int i = 0, from = 0; i < 8; ++i) {
                const bool there = mask >> i & 1;
                bytes[mask][2 * i] = there ? 2 * from : 255;
                bytes[mask][2 * i + 1] = there ? 2 * from + 1 : 255;
                from += there;
            }
    }
};
inline constexpr Places PLACES;
#endif

// Values of 16 bits, one for each bit of the mask, at the places of the bits; zeros elsewhere. Reads 64 bytes.
inline __m512i expand(uint32_t mask, const bf16* from) {
#if !defined AXICON_AVX2 && defined __AVX512VBMI2__
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(from));
#else
    auto eight = [&](int i) {
        const int own = mask >> 8 * i & 255;
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        from += __builtin_popcount(own);
        return _mm_shuffle_epi8(values, _mm_loadu_si128(reinterpret_cast<const __m128i*>(PLACES.bytes[own])));
    };
    const __m128i a = eight(0), b = eight(1), c = eight(2), d = eight(3);
    const __m256i lo = _mm256_set_m128i(b, a), hi = _mm256_set_m128i(d, c);
#ifdef AXICON_AVX2
    return {lo, hi};
#else
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
#endif
#endif
}

// Calls f(0), f(1), ... f(N-1) with compile-time indices, so that arrays of registers stay in registers.
template <int N, class F>
inline __attribute__((always_inline)) void unroll(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (f(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

}  // namespace axicon
