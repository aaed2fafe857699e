// One step of a decoder in one call: every row of the step through every block, all threads in one parallel region.
//
// A small model spends its time between the products, not in them: 30 blocks of 5 calls each cost more in dispatch
// than the weights cost in memory traffic. Here the threads enter one parallel region a step and share its stages.
// The residual stream and all activations between products are float32; products see bf16 or int8 (see linear.h).
#include <omp.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "attention.h"
#include "directions.h"
#include "evict.h"
#include "linear.h"
#include "lowrank.h"
#include "sampling.h"

namespace axicon {

enum Norm : int32_t { RMS = 0, LAYER = 1 };
enum Activation : int32_t { SILU_GATED = 0, RELU = 1, GELU = 2, GELU_TANH = 3 };

struct NormWeights {
    const float *weight, *bias;  // null: absent
    float epsilon;
    int32_t width;
};

struct Block {
    NormWeights before_attention, before_mlp, query, key;
    Linear qkv, out, up, down;
    Linear attention_shortcut, mlp_shortcut;  // without weight: the residual goes around as it is; both or neither
    int32_t window;  // 0: full attention
    float scale;
};

struct Model {
    int32_t blocks, width, heads, kv_heads, head_width, hidden, norm, activation, position_offset;
    int32_t embedding_width, position_width;  // width (D) is the widest that the residual stream becomes
    const bf16* embedding;        // (V, embedding width)
    const bf16* positions;        // (P, width of the first block) or null
    const float* frequencies;     // (K / 2,) of the rotary positions, or null
    const Block* block;
    NormWeights final_norm;
    Linear project_in, head;      // no weight: the embedding is the stream
};

struct Step {
    int32_t rows, wanted, tree_words, threads;
    const int64_t *tokens, *positions;
    const int32_t* request;       // (rows,) index into `committed` and, per block, into `extents`
    const int32_t* offset;        // (rows,) place of the row among the staged nodes of its request
    const int32_t* committed;     // (requests,) committed slots of every head, unless the extent says otherwise
    int32_t requests, reserved;
    const Extent* extents;        // (last - first, requests)
    const uint64_t* hidden;       // (rows, tree_words): staged nodes a row does not see; null for chains
    const int32_t* wanted_rows;   // (wanted,)
    float* logits;                // (wanted, V)
    int32_t first, last;          // blocks to pass; extents begin with `first`
    float* stream;                // (rows, D) residual stream between parts of a step, or null for a whole step
    const Adapter* const* adapters;  // (requests,) the blocks of each one's adapter, or null; null where none has one
    int32_t most_low, reserved2;  // the most numbers between A and B of a product
};

namespace {

// Stages of work shared by the threads of a step. Each thread has its own run of neighbouring pieces, so that it reads
// memory in one stream; one that is done helps the others. Pieces are claimed from counters, and a stage is over when
// all its pieces are done, not when all threads have come: a thread that lost its core holds the others up only if it
// lost it in the middle of a piece. It finds the stages it missed finished and walks through them.
enum Kind { PRODUCTS = 0, ATTENTION = 1, REST = 2 };

class Team {
public:
    Team(int stages, int threads, double* seconds)
        : threads_(threads), runs_(new Counter[size_t(stages) * threads]), done_(new Counter[stages]), seconds_(seconds),
          since_(now()) {}

    // Runs f(piece) for every piece, each on some thread; a thread leaves when all are done.
    template <class F>
    void share(int& stage, int pieces, F&& f, Kind kind = REST) {
        Counter* runs = runs_.get() + size_t(stage) * threads_;
        std::atomic<int>& done = done_[stage++].value;
        const int self = omp_get_thread_num();
        for (int turn = 0; turn < threads_; ++turn) {
            const int other = (self + turn) % threads_;
            const int end = first_of(other + 1, pieces);
            for (int i; (i = first_of(other, pieces) + runs[other].value.fetch_add(1, std::memory_order_relaxed)) < end;) {
                f(i);
                done.fetch_add(1, std::memory_order_release);
            }
        }
        for (int spins = 0; done.load(std::memory_order_acquire) < pieces;)
            if (++spins < SPINS) _mm_pause();
            else std::this_thread::yield();
        if (self == 0) {
            const double end = now();
            seconds_[kind] += end - since_;
            since_ = end;
        }
    }

private:
    static double now() {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }
    static constexpr int SPINS = 4000;  // some tens of microseconds, longer than any piece
    struct alignas(64) Counter {
        std::atomic<int> value{0};
    };
    int first_of(int thread, int pieces) const { return (thread * pieces + threads_ - 1) / threads_; }
    int threads_;
    std::unique_ptr<Counter[]> runs_, done_;  // pieces claimed of each thread's run; pieces done
    double* seconds_;
    double since_;
};

void normalise(const Model& m, const NormWeights& n, const float* x, float* y) {
    const int width = n.width;
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    if (m.norm == LAYER)
        for (int i = 0; i < width; i += LANES) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    for (int i = 0; i < width; i += LANES) {
        const __m512 v = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + n.epsilon));
    for (int i = 0; i < width; i += LANES) {
        __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), inverse);
        if (n.weight) v = _mm512_mul_ps(v, _mm512_loadu_ps(n.weight + i));
        if (n.bias) v = _mm512_add_ps(v, _mm512_loadu_ps(n.bias + i));
        _mm512_storeu_ps(y + i, v);
    }
}

void activate(const Model& m, const float* up, float* y) {
    const int F = m.hidden;
    if (m.activation == SILU_GATED) {
        for (int i = 0; i < F; i += LANES) {
            const __m512 g = _mm512_loadu_ps(up + i), one = _mm512_set1_ps(1.0f);
            const __m512 s = _mm512_div_ps(g, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), g))));
            _mm512_storeu_ps(y + i, _mm512_mul_ps(s, _mm512_loadu_ps(up + F + i)));
        }
    } else if (m.activation == RELU) {
        for (int i = 0; i < F; i += LANES) _mm512_storeu_ps(y + i, _mm512_max_ps(_mm512_loadu_ps(up + i), _mm512_setzero_ps()));
    } else {
        for (int i = 0; i < F; ++i) {
            const float x = up[i];
            y[i] = m.activation == GELU ? 0.5f * x * (1.0f + std::erf(x * 0.70710678f))
                                        : 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
        }
    }
}

struct Tile { int row, count; };  // adjacent rows of one request

// Large tiles share the reading of the cache, small ones share the work: a few rows a tile is enough for both.
std::vector<Tile> tiles(const Step& s) {
    std::vector<Tile> all;
    for (int r = 0; r < s.rows; ++r) {
        const bool joins = !all.empty() && s.request[r] == s.request[all.back().row] && all.back().count < 8;
        if (joins) ++all.back().count;
        else all.push_back({r, 1});
    }
    return all;
}

int committed(const Step& s, int row, int group, const Extent& e) {
    return e.lengths ? e.lengths[group] : s.committed[s.request[row]];
}

// The first slot a row sees in a layer with a sliding window: slots are in the order of their positions.
int first_seen(const Block& b, const Step& s, int row, int group, int first, const Extent& e) {
    const int oldest = b.window > 0 ? std::max(0, int(s.positions[row]) + 1 - b.window) : 0, known = s.committed[s.request[row]];
    if (!e.positions || oldest == 0) return oldest;
    if (oldest >= known) return first + oldest - known;
    const int32_t* positions = e.positions + size_t(group) * e.capacity;
    return int(std::lower_bound(positions, positions + first, oldest) - positions);
}

// What the queries of a tile gave to each slot, added up over the heads of the group and over `every` rows.
void tally_tile(const Step& s, const Tile& tile, int per, int group, const Extent& e, const std::vector<Query>& queries,
                const std::vector<float>& shares) {
    int live = 0;
    for (const Query& q : queries) live = std::max(live, q.live);
    const int stride = (live + LANES - 1) / LANES * LANES;
    for (int r = 0; r < tile.count; ++r) {
        const int offset = s.offset[tile.row + r];
        float* entry = e.tally + (size_t(group) * e.entries + offset / e.every) * e.stride;
        if (offset % e.every == 0) std::fill_n(entry, e.stride, 0.0f);
        for (int h = 0; h < per; ++h) {
            const int i = r * per + h;
            const float* share = shares.data() + size_t(i) * stride;
            for (int t = queries[i].from; t < queries[i].live; ++t) entry[t] += share[t];
        }
    }
}

void attend_tile(const Model& m, const Block& b, const Step& s, const Tile& tile, int group, const float* qkv,
                 const float* turns, const Extent& e, float* out) {
    thread_local std::vector<float> q, scores;
    thread_local std::vector<Query> queries;
    const int K = m.head_width, per = m.heads / m.kv_heads, width = (m.heads + 2 * m.kv_heads) * K;
    const int first = committed(s, tile.row, group, e);
    q.resize(size_t(tile.count) * per * K);
    queries.clear();
    for (int r = tile.row; r < tile.row + tile.count; ++r) {
        const int live = first + s.offset[r] + 1;
        const int from = first_seen(b, s, r, group, first, e);
        for (int h = 0; h < per; ++h) {
            float* to = q.data() + queries.size() * K;
            memcpy(to, qkv + size_t(r) * width + (group * per + h) * K, K * sizeof(float));
            if (b.query.weight) normalise(m, b.query, to, to);
            rotate(to, turns ? turns + size_t(r) * K : nullptr, K);
            for (int i = 0; i < K; i += LANES) _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_loadu_ps(to + i), _mm512_set1_ps(b.scale)));
            queries.push_back({to, out + (size_t(r) * m.heads + group * per + h) * K, from, live, s.hidden ? s.hidden + size_t(r) * s.tree_words : nullptr});
        }
    }
    const size_t at = size_t(group) * e.capacity * K;
    auto run = [&](auto v) {
        auto with = [&](auto shared) { attend<v, shared>(queries.data(), int(queries.size()), e.keys + at, e.values + at, first, scores); };
        queries.size() > 1 ? with(std::true_type{}) : with(std::false_type{});
    };
    switch (K) {
        case 32: run(std::integral_constant<int, 2>{}); break;
        case 64: run(std::integral_constant<int, 4>{}); break;
        case 96: run(std::integral_constant<int, 6>{}); break;
        default: run(std::integral_constant<int, 8>{});
    }
    if (e.tally) tally_tile(s, tile, per, group, e, queries, scores);
}

void append(const Model& m, const Block& b, const Step& s, int row, const float* qkv, const float* turns, const Extent& e) {
    thread_local std::vector<float> k;
    const int K = m.head_width;
    for (int g = 0; g < m.kv_heads; ++g) {
        const float* key = qkv + size_t(m.heads + g) * K;
        const float* value = qkv + size_t(m.heads + m.kv_heads + g) * K;
        k.assign(key, key + K);
        if (b.key.weight) normalise(m, b.key, k.data(), k.data());
        rotate(k.data(), turns ? turns + size_t(row) * K : nullptr, K);
        const size_t slot = size_t(g) * e.capacity + committed(s, row, g, e) + s.offset[row], at = slot * K;
        if (e.positions) e.positions[slot] = s.committed[s.request[row]] + s.offset[row];
        for (int i = 0; i < K; i += LANES) {
            store_bf16(e.keys + at + i, _mm512_loadu_ps(k.data() + i));
            store_bf16(e.values + at + i, _mm512_loadu_ps(value + i));
        }
    }
}

}  // namespace

struct Buffers {
    std::vector<float> x, middle, qkv, attention, up, turns, low;
    std::vector<char> encoded, around;  // what products read, and shortcuts beside them
    std::vector<Encoded> rows, around_rows;
    double seconds[3] = {0, 0, 0};  // by Kind, over all steps
};

void run(const Model& m, const Step& s, Buffers& buf) {
    const int R = s.rows, D = m.width, QKV = (m.heads + 2 * m.kv_heads) * m.head_width, A = m.heads * m.head_width;
    const int U = m.activation == SILU_GATED ? 2 * m.hidden : m.hidden;
    buf.x.resize(s.stream ? 0 : size_t(R) * D); buf.qkv.resize(size_t(R) * QKV); buf.attention.resize(size_t(R) * A);
    buf.up.resize(size_t(R) * U); buf.rows.resize(R);
    const int widest = std::max({D, A, m.hidden, m.embedding_width});
    const bool sliced = m.block->attention_shortcut.weight;
    buf.encoded.resize(size_t(R) * 2 * widest);
    buf.middle.resize(sliced ? size_t(R) * D : 0); buf.around.resize(sliced ? size_t(R) * 2 * D : 0);
    buf.around_rows.resize(sliced ? R : 0);
    float *x = s.stream ? s.stream : buf.x.data(), *qkv = buf.qkv.data(), *attention = buf.attention.data(), *up = buf.up.data();
    buf.turns.resize(m.frequencies ? size_t(R) * m.head_width : 0);
    float* turns = m.frequencies ? buf.turns.data() : nullptr;
    float* middle = sliced ? buf.middle.data() : x;  // the stream between attention and MLP
    char* encoded = buf.encoded.data();
    Encoded* rows = buf.rows.data();
    const std::vector<Tile> parts = tiles(s);
    buf.low.resize(s.adapters ? size_t(R) * s.most_low : 0);
    Team team(m.blocks * 11 + 4, s.threads, buf.seconds);

#pragma omp parallel num_threads(s.threads)
    {
        thread_local std::vector<float> line;
        line.resize(widest);
        float* h = line.data();
        int stage = 0;
        auto product = [&](const Linear& l, int R, auto&& store) {
            // Some pieces per thread, so that one who is held up can be helped, each long enough for the
            // hardware to read ahead.
            const int blocks = l.outputs / LANES, grain = std::max(2, blocks / (8 * s.threads) & ~1);
            team.share(stage, (blocks + grain - 1) / grain, [&](int i) {
                multiply(l, encoded, rows, R, i * grain, std::min(grain, blocks - i * grain), store);
            }, PRODUCTS);
        };
        // The same beside a shortcut, in one stage.
        auto product_beside = [&](const Linear& l, auto&& store, const Linear& around, auto&& store_around) {
            const int own = l.outputs / LANES, all = own + around.outputs / LANES;
            const int grain = std::max(2, all / (8 * s.threads) & ~1), pieces = (own + grain - 1) / grain;
            team.share(stage, pieces + (all - own + grain - 1) / grain, [&](int i) {
                const int first = (i < pieces ? i : i - pieces) * grain;
                if (i < pieces) multiply(l, encoded, rows, R, first, std::min(grain, own - first), store);
                else multiply(around, buf.around.data(), buf.around_rows.data(), R, first, std::min(grain, all - own - first), store_around);
            }, PRODUCTS);
        };
        auto into = [](float* y, int width) {
            return [=](int row, int o, __m512 v) { _mm512_storeu_ps(y + size_t(row) * width + o, v); };
        };
        auto add_to = [=](float* to) {
            return [=](int row, int o, __m512 v) {
                float* y = to + size_t(row) * D + o;
                _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), v));
            };
        };
        auto adapter = [&](int r, int layer) -> const Adapter* {
            const Adapter* blocks = s.adapters ? s.adapters[s.request[r]] : nullptr;
            return blocks ? blocks + layer : nullptr;
        };
        auto low = [&](int r) { return buf.low.data() + size_t(r) * s.most_low; };
        auto put = [&](const Linear& l, int row, const float* from) { encode(l, from, encoded + row * encoded_bytes(l), rows[row]); };
        auto put_around = [&](const Linear& l, int row, const float* from) {
            if (sliced) encode(l, from, buf.around.data() + row * encoded_bytes(l), buf.around_rows[row]);
        };

        team.share(stage, R, [&](int r) {
            for (int i = 0, half = m.head_width / 2; turns && i < half; ++i) {
                const float angle = float(s.positions[r]) * m.frequencies[i];
                turns[size_t(r) * m.head_width + i] = std::cos(angle);
                turns[size_t(r) * m.head_width + half + i] = std::sin(angle);
            }
            if (s.first > 0) return;
            const bool projects = m.project_in.weight;
            float* to = x + size_t(r) * D;
            for (int i = 0; i < m.position_width; i += LANES) {
                const bf16* p = m.positions ? m.positions + (s.positions[r] + m.position_offset) * m.position_width + i : nullptr;
                _mm512_storeu_ps(to + i, p ? load_bf16(p) : _mm512_setzero_ps());
            }
            for (int i = 0; i < m.embedding_width; i += LANES) {
                const __m512 v = load_bf16(m.embedding + s.tokens[r] * m.embedding_width + i);
                if (projects) _mm512_storeu_ps(h + i, v);
                else _mm512_storeu_ps(to + i, _mm512_add_ps(v, _mm512_loadu_ps(to + i)));
            }
            if (projects) put(m.project_in, r, h);
        });
        if (s.first == 0 && m.project_in.weight) product(m.project_in, R, add_to(x));
        for (int layer = s.first; layer < s.last; ++layer) {
            const Block& b = m.block[layer];
            const Extent* extents = s.extents + size_t(layer - s.first) * s.requests;
            team.share(stage, R, [&](int r) {
                put_around(b.attention_shortcut, r, x + size_t(r) * D);
                normalise(m, b.before_attention, x + size_t(r) * D, h);
                if (const Adapter* a = adapter(r, layer)) squeeze(a->qkv, h, low(r));
                put(b.qkv, r, h);
            });
            if (sliced) product_beside(b.qkv, into(qkv, QKV), b.attention_shortcut, into(middle, D));
            else product(b.qkv, R, into(qkv, QKV));
            team.share(stage, R, [&](int r) {
                if (const Adapter* a = adapter(r, layer)) spread(a->qkv, low(r), qkv + size_t(r) * QKV);
                append(m, b, s, r, qkv + size_t(r) * QKV, turns, extents[s.request[r]]);
            });
            team.share(stage, int(parts.size()) * m.kv_heads, [&](int i) {
                const Tile& part = parts[i / m.kv_heads];
                attend_tile(m, b, s, part, i % m.kv_heads, qkv, turns, extents[s.request[part.row]], attention);
            }, ATTENTION);
            team.share(stage, R, [&](int r) { put(b.out, r, attention + size_t(r) * A); });
            product(b.out, R, add_to(middle));
            team.share(stage, R, [&](int r) {
                const Adapter* a = adapter(r, layer);
                if (a) {
                    squeeze(a->out, attention + size_t(r) * A, low(r));
                    spread(a->out, low(r), middle + size_t(r) * D);
                }
                put_around(b.mlp_shortcut, r, middle + size_t(r) * D);
                normalise(m, b.before_mlp, middle + size_t(r) * D, h);
                if (a) squeeze(a->up, h, low(r));
                put(b.up, r, h);
            });
            if (sliced) product_beside(b.up, into(up, U), b.mlp_shortcut, into(x, D));
            else product(b.up, R, into(up, U));
            team.share(stage, R, [&](int r) {
                const Adapter* a = adapter(r, layer);
                if (a) spread(a->up, low(r), up + size_t(r) * U);
                activate(m, up + size_t(r) * U, h);
                if (a) squeeze(a->down, h, low(r));
                put(b.down, r, h);
            });
            product(b.down, R, add_to(x));
            if (s.adapters)
                team.share(stage, R, [&](int r) {
                    if (const Adapter* a = adapter(r, layer)) spread(a->down, low(r), x + size_t(r) * D);
                });
        }
        team.share(stage, s.wanted, [&](int i) {
            normalise(m, m.final_norm, x + size_t(s.wanted_rows[i]) * D, h);
            put(m.head, i, h);
        });
        product(m.head, s.wanted, into(s.logits, m.head.outputs));
    }
}

}  // namespace axicon

extern "C" {

// w (N, K) int8 row-major -> packed bytes of w + 128.
void axicon_pack_int8(const int8_t* w, int N, int K, uint8_t* packed) {
#pragma omp parallel for
    for (int o = 0; o < N; ++o)
        for (int k = 0; k < K; ++k)
            packed[(size_t(o / 16) * K + (k & ~3)) * 16 + (o % 16) * 4 + (k & 3)] = uint8_t(int(w[size_t(o) * K + k]) + 128);
}

// Codes (N, K) one per byte -> the codes of group.h.
void axicon_pack_groups(const uint8_t* codes, int N, int K, int nibbles, uint8_t* packed) {
    const int step = nibbles ? 8 : 4;
#pragma omp parallel for
    for (int o = 0; o < N; ++o) {
        const uint8_t* row = codes + size_t(o) * K;
        for (int k = 0; k < K; k += step)
            for (int i = 0; i < 4; ++i) {
                const uint8_t high = nibbles ? uint8_t(row[k + 4 + i] << 4) : uint8_t(0);
                packed[(size_t(o / 16) * (K / step) + k / step) * 64 + (o % 16) * 4 + i] = uint8_t(row[k + i] | high);
            }
    }
}

void axicon_pack_bf16(const uint16_t* w, int N, int K, uint16_t* packed) {
#pragma omp parallel for
    for (int o = 0; o < N; ++o)
        for (int k = 0; k < K; ++k)
            packed[(size_t(o / 16) * K + (k & ~1)) * 16 + (o % 16) * 2 + (k & 1)] = w[size_t(o) * K + k];
}

void* axicon_buffers_new() { return new axicon::Buffers; }
void axicon_buffers_delete(void* b) { delete static_cast<axicon::Buffers*>(b); }

// Seconds spent so far in products, attention and the rest.
void axicon_seconds(void* b, double* three) {
    std::copy_n(static_cast<axicon::Buffers*>(b)->seconds, 3, three);
}

// Cuts layers with `groups` heads of K channels to their budgets.
void axicon_evict(const axicon::Evicted* layers, int count, int groups, int K, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int i = 0; i < count * groups; ++i) axicon::evict(layers[i / groups], i % groups, K);
}

void axicon_step(const axicon::Model* m, const axicon::Step* s, void* b) { axicon::run(*m, *s, *static_cast<axicon::Buffers*>(b)); }

// y (R, N) = x (R, K) W^T, all float32: one product alone, for tests and benchmarks.
void axicon_linear(const axicon::Linear* l, const float* x, int R, float* y, int threads) {
    std::vector<char> q(size_t(R) * axicon::encoded_bytes(*l));
    std::vector<axicon::Encoded> rows(R);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int r = 0; r < R; ++r) axicon::encode(*l, x + size_t(r) * l->inputs, q.data() + r * axicon::encoded_bytes(*l), rows[r]);
        const int blocks = l->outputs / 16;
#pragma omp for schedule(dynamic)
        for (int b = 0; b < blocks; b += 4)
            axicon::multiply(*l, q.data(), rows.data(), R, b, std::min(4, blocks - b),
                             [&](int r, int o, auto v) { _mm512_storeu_ps(y + size_t(r) * l->outputs + o, v); });
    }
}

// One row of logits per pointer; probs (R, V), good (R).
void axicon_softmax(const float* const* logits, const float* temperatures, int rows, int vocab, float* probs, uint8_t* good,
                    int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(std::min(threads, rows))
    for (int r = 0; r < rows; ++r)
        good[r] = axicon::probabilities(logits[r], vocab, temperatures[r], probs + size_t(r) * vocab);
}

// In place; settings (R, 3): top-k, top-p, min-p.
void axicon_truncate(float* probs, int rows, int vocab, const double* settings, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(std::min(threads, rows))
    for (int r = 0; r < rows; ++r) {
        const double* s = settings + size_t(r) * 3;
        axicon::truncate(probs + size_t(r) * vocab, vocab, int(s[0]), s[1], s[2]);
    }
}

// One draw per row of probs (R, C) and ids (R, C), whose rows lie `stride` apart (0: all rows have the same ids).
void axicon_draw(const float* probs, const int64_t* ids, int rows, int count, int64_t stride, const uint64_t* keys,
                        int64_t* tokens, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(std::min(threads, rows))
    for (int r = 0; r < rows; ++r)
        tokens[r] = axicon::first_arrival(probs + size_t(r) * count, ids + r * stride, count, keys[r]);
}

// 4 words each for counters (block, stream), block = first_block ...
void axicon_philox(uint64_t key, uint32_t stream, int64_t first_block, int64_t blocks, uint32_t* out) {
    for (int64_t b = 0; b < blocks; ++b)
        axicon::philox<1>(key, uint32_t(first_block + b), stream, reinterpret_cast<uint32_t(*)[4]>(out + 4 * b));
}

// Weights as bfloat16 if `narrow`, else float32.
void axicon_add_signs(const void* source, void* out, int64_t rows, int64_t width, const int64_t* first, float keep,
                      float scale, uint64_t key, uint32_t stream, int narrow, int threads) {
    using axicon::bf16;
    if (narrow)
        axicon::add_signs_rows(static_cast<const bf16*>(source), static_cast<bf16*>(out), rows, width, first, keep, scale, key,
                               stream, threads);
    else
        axicon::add_signs_rows(static_cast<const float*>(source), static_cast<float*>(out), rows, width, first, keep, scale, key,
                               stream, threads);
}
}
