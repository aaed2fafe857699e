// How the weights of one product are stored, and one row of activations as that product wants it.
#pragma once
#include <vector>

#include "simd.h"

namespace axicon {

constexpr int AHEAD = 4096;  // bytes: the distance at which memory answers in time

enum Format : int32_t { BF16 = 0, INT8 = 1, GROUP4 = 2, GROUP8 = 3, SPARSE = 4 };
enum ScaleType : int32_t { SCALE_F16 = 0, SCALE_BF16 = 1, SCALE_F32 = 2 };

struct Linear {
    int32_t format, outputs, inputs;
    float threshold;        // int8: LLM.int8 entries of at least this magnitude stay apart; 0: none do
    float relative;         // the same, in units of the row's root mean square; 0: none do
    const void* weight;     // packed as linear.h says; of groups, their scales and zeros follow the codes
    const float* scale;     // (N,) absmax of each output's weights; int8 only
    const float* bias;      // (N,) or null
    int32_t group;          // columns that share a scale, a multiple of 16; groups only
    int32_t middle;         // the code that means zero where there are no zeros; groups only
    int32_t scale_type;     // ScaleType of the groups' scales
    int32_t zeros;          // whether groups have zeros of their own
    const int32_t* order;   // (K,) the input that each stored column multiplies, or null; groups only
    const int64_t* start;   // (N / 16,) byte of `weight` at which a block of 16 outputs begins; sparse only
};

struct Outlier { int32_t k; float x; };

struct Share { float scale; int32_t sum; };  // of one group of activations: absmax / 127, and its codes' sum

// One encoded row of activations.
struct Encoded {
    float scale;
    int32_t sum;
    std::vector<Outlier> outliers;
    std::vector<Share> groups;
};

template <int U>
inline __m512i total(const __m512i (&part)[U]) {
    __m512i sum = part[0];
    for (int u = 1; u < U; ++u) sum = _mm512_add_epi32(sum, part[u]);
    return sum;
}

}  // namespace axicon
