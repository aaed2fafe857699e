// Cutting bounded caches to their budget: which slots stay (axicon/kernels/eviction.py is the definition), and moving
// them together, in place and in their order.
#pragma once
#include <algorithm>
#include <cfloat>
#include <numeric>
#include <vector>

#include "simd.h"

namespace axicon {

// One layer of one request. Buffers of K numbers a slot, or one, lie `capacity` slots per head apart.
struct Evicted {
    bf16 *keys, *values;
    int32_t *positions, *lengths;  // (G, capacity) and (G,)
    const float* scores;           // (G, ...), heads `score_stride` apart; higher stays
    float* sums;                   // (G, ...), heads `sum_stride` apart, moved with their slots; or null
    int32_t capacity, score_stride, sum_stride, budget, recent, sinks;
};

inline void evict(const Evicted& e, int group, int K) {
    thread_local std::vector<int32_t> contested;
    thread_local std::vector<char> kept;
    const int live = e.lengths[group];
    if (live <= e.budget) return;
    int32_t* positions = e.positions + size_t(group) * e.capacity;
    const float* scores = e.scores + size_t(group) * e.score_stride;
    kept.assign(live, 0);
    contested.clear();
    for (int s = 0; s < live; ++s)
        if (s >= live - e.recent || positions[s] < e.sinks) kept[s] = 1;
        else contested.push_back(s);
    const int room = std::max(0, e.budget - (live - int(contested.size())));
    // A model may say NaN, which has no place in an order: it is the lowest.
    auto score = [&](int s) { return scores[s] > -FLT_MAX ? scores[s] : -FLT_MAX; };
    std::nth_element(contested.begin(), contested.begin() + room, contested.end(),
                     [&](int a, int b) { return score(a) != score(b) ? score(a) > score(b) : a < b; });
    for (int i = 0; i < room; ++i) kept[contested[i]] = 1;
    bf16 *keys = e.keys + size_t(group) * e.capacity * K, *values = e.values + size_t(group) * e.capacity * K;
    float* sums = e.sums ? e.sums + size_t(group) * e.sum_stride : nullptr;
    int to = 0;
    for (int s = 0; s < live;) {
        if (!kept[s]) { ++s; continue; }
        int end = s;
        while (end < live && kept[end]) ++end;
        if (to != s) {
            const size_t bytes = size_t(end - s) * K * sizeof(bf16);
            memmove(keys + size_t(to) * K, keys + size_t(s) * K, bytes);
            memmove(values + size_t(to) * K, values + size_t(s) * K, bytes);
            memmove(positions + to, positions + s, (end - s) * sizeof(int32_t));
            if (sums) memmove(sums + to, sums + s, (end - s) * sizeof(float));
        }
        to += end - s;
        s = end;
    }
    if (sums) std::fill(sums + to, sums + live, 0.0f);
    e.lengths[group] = to;
}

}  // namespace axicon
