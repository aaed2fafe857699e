// What the kernels use of AVX-512, for processors that have AVX2: two registers of 256 bits stand for one of 512.
//
// The kernels are written once, in the names of the wider instructions. Inside this namespace these definitions hide the
// compiler's own, which it refuses to use without the hardware; only what the kernels need is here. Masks are bits, as
// there; the few steps that need them as vectors are not where the time goes.
#pragma once
#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace axicon {

struct __m512 { __m256 lo, hi; };
struct __m512i { __m256i lo, hi; };
struct __m512d { __m256d lo, hi; };

#define AXICON_ONE(R, name, half, A) inline R name(A a) { return {half(a.lo), half(a.hi)}; }
#define AXICON_TWO(T, name, half) inline T name(T a, T b) { return {half(a.lo, b.lo), half(a.hi, b.hi)}; }
#define AXICON_THREE(T, name, half) inline T name(T a, T b, T c) { return {half(a.lo, b.lo, c.lo), half(a.hi, b.hi, c.hi)}; }
#define AXICON_SAME(T, name, half, A) inline T name(A a) { const auto v = half(a); return {v, v}; }
#define AXICON_SHIFT(name, half) inline __m512i name(__m512i a, int by) { return {half(a.lo, by), half(a.hi, by)}; }

AXICON_TWO(__m512, _mm512_add_ps, _mm256_add_ps)
AXICON_TWO(__m512, _mm512_sub_ps, _mm256_sub_ps)
AXICON_TWO(__m512, _mm512_mul_ps, _mm256_mul_ps)
AXICON_TWO(__m512, _mm512_div_ps, _mm256_div_ps)
AXICON_TWO(__m512, _mm512_min_ps, _mm256_min_ps)
AXICON_TWO(__m512, _mm512_max_ps, _mm256_max_ps)
AXICON_TWO(__m512, _mm512_unpacklo_ps, _mm256_unpacklo_ps)
AXICON_TWO(__m512, _mm512_unpackhi_ps, _mm256_unpackhi_ps)
AXICON_THREE(__m512, _mm512_fmadd_ps, _mm256_fmadd_ps)
AXICON_THREE(__m512, _mm512_fmsub_ps, _mm256_fmsub_ps)
AXICON_THREE(__m512, _mm512_fnmadd_ps, _mm256_fnmadd_ps)
AXICON_SAME(__m512, _mm512_set1_ps, _mm256_set1_ps, float)
AXICON_ONE(__m512i, _mm512_castps_si512, _mm256_castps_si256, __m512)
AXICON_ONE(__m512i, _mm512_cvtps_epi32, _mm256_cvtps_epi32, __m512)
AXICON_ONE(__m512d, _mm512_castps_pd, _mm256_castps_pd, __m512)

AXICON_TWO(__m512i, _mm512_add_epi32, _mm256_add_epi32)
AXICON_TWO(__m512i, _mm512_sub_epi32, _mm256_sub_epi32)
AXICON_TWO(__m512i, _mm512_add_epi64, _mm256_add_epi64)
AXICON_TWO(__m512i, _mm512_and_si512, _mm256_and_si256)
AXICON_TWO(__m512i, _mm512_xor_si512, _mm256_xor_si256)
AXICON_TWO(__m512i, _mm512_srlv_epi32, _mm256_srlv_epi32)
AXICON_SAME(__m512i, _mm512_set1_epi8, _mm256_set1_epi8, char)
AXICON_SAME(__m512i, _mm512_set1_epi32, _mm256_set1_epi32, int32_t)
AXICON_SAME(__m512i, _mm512_set1_epi64, _mm256_set1_epi64x, int64_t)
AXICON_SHIFT(_mm512_slli_epi32, _mm256_slli_epi32)
AXICON_SHIFT(_mm512_srli_epi32, _mm256_srli_epi32)
AXICON_SHIFT(_mm512_srli_epi16, _mm256_srli_epi16)
AXICON_SHIFT(_mm512_srli_epi64, _mm256_srli_epi64)
AXICON_ONE(__m512, _mm512_castsi512_ps, _mm256_castsi256_ps, __m512i)
AXICON_ONE(__m512, _mm512_cvtepi32_ps, _mm256_cvtepi32_ps, __m512i)

AXICON_TWO(__m512d, _mm512_add_pd, _mm256_add_pd)
AXICON_TWO(__m512d, _mm512_unpacklo_pd, _mm256_unpacklo_pd)
AXICON_TWO(__m512d, _mm512_unpackhi_pd, _mm256_unpackhi_pd)
AXICON_ONE(__m512, _mm512_castpd_ps, _mm256_castpd_ps, __m512d)

#undef AXICON_ONE
#undef AXICON_TWO
#undef AXICON_THREE
#undef AXICON_SAME
#undef AXICON_SHIFT

inline __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline __m512d _mm512_setzero_pd() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
inline __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

inline __m512 _mm512_loadu_ps(const void* p) {
    const float* f = static_cast<const float*>(p);
    return {_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)};
}
inline __m512 _mm512_load_ps(const float* p) { return {_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
inline void _mm512_storeu_ps(float* p, __m512 v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
inline void _mm512_store_ps(float* p, __m512 v) { _mm256_store_ps(p, v.lo), _mm256_store_ps(p + 8, v.hi); }
inline __m512i _mm512_loadu_si512(const void* p) {
    const __m256i* i = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(i), _mm256_loadu_si256(i + 1)};
}

inline __m128i high(__m256i v) { return _mm256_extracti128_si256(v, 1); }
inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)), _mm256_cvtepu16_epi32(high(v))};
}
inline __m512i _mm512_cvtepu8_epi32(__m128i v) { return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))}; }
inline __m512 _mm512_cvtph_ps(__m256i v) { return {_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(high(v))}; }
inline __m512d _mm512_cvtps_pd(__m256 v) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
}

// The low 16 or 8 bits of each lane.
inline __m256i _mm512_cvtepi32_epi16(__m512i v) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(v.lo, low), _mm256_and_si256(v.hi, low)), 0xd8);
}
inline __m128i _mm512_cvtepi32_epi8(__m512i v) {
    const __m256i words = _mm256_and_si256(_mm512_cvtepi32_epi16(v), _mm256_set1_epi16(0xff));
    return _mm_packus_epi16(_mm256_castsi256_si128(words), high(words));
}

inline __m512 _mm512_abs_ps(__m512 v) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, v.lo), _mm256_andnot_ps(sign, v.hi)};
}

#undef _mm512_roundscale_ps
inline __m512 _mm512_roundscale_ps(__m512 v, int) {  // to the nearest integer, as 0 asks for
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(v.lo, how), _mm256_round_ps(v.hi, how)};
}
// v 2^n for results that are normal numbers.
inline __m512 _mm512_scalef_ps(__m512 v, __m512 n) {
    const __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(v, _mm512_castsi512_ps(bits));
}

#undef _mm512_shuffle_f32x4
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int quarters) {  // 0x88: those of even number; 0xdd: of odd
    if (quarters == 0x88) return {_mm256_permute2f128_ps(a.lo, a.hi, 0x20), _mm256_permute2f128_ps(b.lo, b.hi, 0x20)};
    return {_mm256_permute2f128_ps(a.lo, a.hi, 0x31), _mm256_permute2f128_ps(b.lo, b.hi, 0x31)};
}
#undef _mm512_extractf32x8_ps
inline __m256 _mm512_castps512_ps256(__m512 v) { return v.lo; }
inline __m256 _mm512_extractf32x8_ps(__m512 v, int) { return v.hi; }

inline float _mm512_reduce_add_ps(__m512 v) {
    const __m256 eight = _mm256_add_ps(v.lo, v.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float _mm512_reduce_max_ps(__m512 v) {
    const __m256 eight = _mm256_max_ps(v.lo, v.hi);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline int32_t _mm512_reduce_add_epi32(__m512i v) {
    const __m256i eight = _mm256_add_epi32(v.lo, v.hi);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), high(eight));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline double _mm512_reduce_add_pd(__m512d v) {
    const __m256d four = _mm256_add_pd(v.lo, v.hi);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// Masks. Lane i of a vector stands for bit i.
inline __m256i spread(unsigned bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), each), each);
}
inline __m512 choose(__mmask16 k, __m512 yes, __m512 no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_castsi256_ps(spread(k))),
            _mm256_blendv_ps(no.hi, yes.hi, _mm256_castsi256_ps(spread(k >> 8)))};
}
inline __mmask16 bits_of(__m256 lo, __m256 hi) { return __mmask16(_mm256_movemask_ps(lo) | _mm256_movemask_ps(hi) << 8); }

#undef _mm512_cmp_ps_mask
#undef _mm256_cmp_ps_mask  // how they compare has to be a constant
#define _mm512_cmp_ps_mask(a, b, how) bits_of(_mm256_cmp_ps((a).lo, (b).lo, how), _mm256_cmp_ps((a).hi, (b).hi, how))
#define _mm256_cmp_ps_mask(a, b, how) __mmask8(_mm256_movemask_ps(_mm256_cmp_ps(a, b, how)))

inline __m256 _mm256_maskz_loadu_ps(__mmask8 k, const float* p) { return _mm256_maskload_ps(p, spread(k)); }
inline __m512 _mm512_maskz_loadu_ps(__mmask16 k, const float* p) {
    return {_mm256_maskload_ps(p, spread(k)), _mm256_maskload_ps(p + 8, spread(k >> 8))};
}
inline __m512 _mm512_mask_loadu_ps(__m512 other, __mmask16 k, const float* p) {
    return k == 0xffff ? _mm512_loadu_ps(p) : choose(k, _mm512_maskz_loadu_ps(k, p), other);
}
inline void _mm512_mask_storeu_ps(float* p, __mmask16 k, __m512 v) {
    if (k == 0xffff) return _mm512_storeu_ps(p, v);
    _mm256_maskstore_ps(p, spread(k), v.lo), _mm256_maskstore_ps(p + 8, spread(k >> 8), v.hi);
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 k, __m512 v) { return choose(k, v, _mm512_setzero_ps()); }
inline __m512 _mm512_maskz_mul_ps(__mmask16 k, __m512 a, __m512 b) { return _mm512_maskz_mov_ps(k, _mm512_mul_ps(a, b)); }
inline __m512 _mm512_mask_max_ps(__m512 other, __mmask16 k, __m512 a, __m512 b) { return choose(k, _mm512_max_ps(a, b), other); }
inline __m512 _mm512_mask_blend_ps(__mmask16 k, __m512 no, __m512 yes) { return choose(k, yes, no); }
inline __m512i _mm512_maskz_cvtps_epi32(__mmask16 k, __m512 v) { return _mm512_cvtps_epi32(_mm512_maskz_mov_ps(k, v)); }
inline __m512 _mm512_maskz_compress_ps(__mmask16 k, __m512 v) {
    alignas(32) float from[16], to[16] = {};
    _mm512_store_ps(from, v);
    int count = 0;
    for (unsigned left = k; left; left &= left - 1) to[count++] = from[std::countr_zero(left)];
    return _mm512_load_ps(to);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void* p) {
    if (k == 0xffff) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    alignas(32) uint16_t words[16] = {};
    for (unsigned left = k; left; left &= left - 1) words[std::countr_zero(left)] = static_cast<const uint16_t*>(p)[std::countr_zero(left)];
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
}
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 k, __m256i v) {
    if (k == 0xffff) return _mm256_storeu_si256(static_cast<__m256i*>(p), v);
    alignas(32) uint16_t words[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), v);
    for (unsigned left = k; left; left &= left - 1) static_cast<uint16_t*>(p)[std::countr_zero(left)] = words[std::countr_zero(left)];
}

#undef _mm512_i32gather_ps
inline __m512 _mm512_i32gather_ps(__m512i at, const float* p, int) {  // entries of 4 bytes
    return {_mm256_i32gather_ps(p, at.lo, 4), _mm256_i32gather_ps(p, at.hi, 4)};
}

inline __m512i _mm512_maskz_loadu_epi64(__mmask8 k, const int64_t* p) {
    auto half = [](unsigned four) { return _mm256_cvtepi32_epi64(_mm256_castsi256_si128(spread(four))); };
    const auto* from = reinterpret_cast<const long long*>(p);
    return {_mm256_maskload_epi64(from, half(k & 15)), _mm256_maskload_epi64(from + 4, half(k >> 4))};
}
inline __m512i _mm512_mullo_epi64(__m512i a, __m512i b) {
    auto half = [](__m256i a, __m256i b) {
        const __m256i cross = _mm256_mullo_epi32(a, _mm256_shuffle_epi32(b, 0xb1));  // low of one, high of the other
        const __m256i upper = _mm256_slli_epi64(_mm256_add_epi32(cross, _mm256_srli_epi64(cross, 32)), 32);
        return _mm256_add_epi64(_mm256_mul_epu32(a, b), upper);
    };
    return {half(a.lo, b.lo), half(a.hi, b.hi)};
}
// Of integers below 2^52, which a double holds: one rounding.
inline __m256 _mm512_cvtepu64_ps(__m512i v) {
    auto half = [](__m256i v) {
        const __m256d base = _mm256_set1_pd(0x1p52);
        return _mm256_cvtpd_ps(_mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(v, _mm256_castpd_si256(base))), base));
    };
    return _mm256_set_m128(half(v.hi), half(v.lo));
}

}  // namespace axicon
