// What the layers of a draft pass share: their sizes, one pass with its scratch, norms, products with
// the substitutes, and the feed-forward. compiled_layers.py has the same structures.
//
// T = rows, H = hidden size, A = query heads, B = KV heads, D = head size, I = intermediate size,
// S = live slots; of delta nets: G / J = key / value heads, E / F = their sizes, K = taps,
// C = 2 G E + J F channels
#pragma once
#include <omp.h>

#include <cmath>

#include "exponent.hpp"
#include "int4.hpp"

namespace {

constexpr int64_t LAYER_WEIGHTS_PER_THREAD = 1 << 20;  // fewer are not worth a layer's barriers
constexpr int SLOTS = 16;     // whose scores are computed together
constexpr int TOGETHER = 16;  // query rows that share what is widened of a KV head
constexpr int PIECE = 16;     // head sizes are rounded up to it in the scratch
constexpr int SUMS = 16;      // partial sums of a norm
constexpr int NET_ROWS = 4;   // that share what is read of a memory
constexpr uint32_t MAGNITUDE = 0x7fffffff;

struct Sizes {
    int64_t num_layers, hidden_size, inner_size, num_heads, num_kv_heads, head_size, rope_size;
    int64_t gated;  // 1 if the rows of a gate follow those of each query head
    int64_t num_key_heads, num_value_heads, key_size, value_size, num_taps;  // of delta nets
    int64_t rounds_late;  // 1: norms multiply by their weight before they round
    float norm_epsilon, norm_offset, scale;  // of RMSNorm; added to its weights; of the scores

    int64_t query_width() const { return num_heads * head_size * (gated ? 2 : 1); }
    int64_t attention_width() const { return query_width() + 2 * num_kv_heads * head_size; }
    int64_t num_channels() const { return 2 * num_key_heads * key_size + values_width(); }
    int64_t values_width() const { return num_value_heads * value_size; }
};
struct Linear {
    const uint8_t* codes;
    const uint16_t *qparams, *bias;  // bias: bf16 [N], or null
};
struct Small {  // bf16, or f32
    const void* numbers;
    int64_t is_f32;

    float at(int64_t i) const;
};
// An attention or a delta net, and a feed-forward.
struct Layer {
    Linear q, k, v, o, qkv, z, out, gate, up, down;
    const uint16_t *input_norm, *q_norm, *k_norm, *post_norm;  // bf16; q_norm, k_norm: or null
    const uint16_t *b, *a;  // bf16 [J, H]
    int64_t windowed, is_delta_net;  // 0 or 1
    int64_t index;                   // among the attentions or the delta nets
};
struct CacheLayer {
    uint16_t *keys, *values;  // bf16 [B, slots, D]
    int64_t num_slots;
};
// Of a delta net: its small tensors, what is committed, and what nodes have left. W = rows of a tree.
struct CacheNet {
    Small taps, decay_log, step_bias, norm;  // [C, K], [J], [J], [F]
    const uint16_t* conv;   // bf16 [K - 1, C]
    const float* memory;    // [J, E, F]
    uint16_t* inputs;       // bf16 [W, C]
    float *keys, *updates;  // [G, W, E], [J, W, F]
    float* path_decays;     // [J, W], logs
    int64_t num_nodes;      // W
};
// Where a sequence's rows lie in the caches of some layers.
struct Places {
    const int64_t* slots;    // [rows]
    const uint8_t* visible;  // [rows, S], 0 or 1
    int64_t num_slots;       // S
};
// One sequence's rows of the pass, and its own cache.
struct Segment {
    int64_t first_row, num_rows;
    Places places, in_window;  // in_window: in layers that are windowed
    const CacheLayer* layers;  // [attentions]
    const CacheNet* nets;      // [delta nets]
    // Of delta nets: where the rows are in their tree, and what they follow.
    const int64_t *nodes, *parents, *windows;  // [rows], [rows], [rows, K]
    const uint8_t* above;                      // [rows, num_above]
    int64_t num_above, num_together;  // the first rows, whose parents have run before this pass
};
struct Rows {
    int64_t num_rows, num_segments;
    uint16_t* x;                // bf16 [T, H], in place
    const uint16_t *cos, *sin;  // bf16 [T, rope size]
    const Segment* segments;    // in the order of the rows
};

// ---- numbers ------------------------------------------------------------------------------------

inline float widen(uint16_t x) { return as_float((uint32_t)x << 16); }
inline float Small::at(int64_t i) const {
    return is_f32 ? ((const float*)numbers)[i] : widen(((const uint16_t*)numbers)[i]);
}
inline uint16_t rounded_to_bf16(float x) {
    const uint32_t bits = as_bits(x), nearest = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((x == x ? nearest : 0x7fc00000) >> 16);
}
inline Floats load_floats(const float* from) { return (Floats)load(from); }
inline void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }
inline Floats load_bf16(const uint16_t* from) {
    Halves x;
    memcpy(&x, from, sizeof x);
    return (Floats)(__builtin_convertvector(x, Bits) << 16);
}
inline void store_bf16(uint16_t* to, Floats x) {
    const Halves halves = rounded_to_bf16(x);
    memcpy(to, &halves, sizeof halves);
}
inline Floats through_bf16(Floats x) {
    return (Floats)(__builtin_convertvector(rounded_to_bf16(x), Bits) << 16);
}

inline Floats fused(Floats x, Floats y, Floats sum) {
#if defined(__AVX512VNNI__)
    return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
    return x * y + sum;
#endif
}

inline Floats silu(Floats x) {
    const Floats power = power_of_two<Bits>((Floats)((Bits)x | ~MAGNITUDE) * 1.44269504f);  // e^-|x|
    return x * (x < 0 ? power : Floats{} + 1) / (1 + power);
}

// x[0] = the sums of x[0] to x[LANES - 1], that of x[i] in lane i.
template <int S = LANES / 2>
inline void sum_lanes(Floats* x) {
    Ints near, far;  // lane i of x[j], or of x[j + S] where i has the bit S; and what lies S off
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        near[i] = i & S ? LANES + i : i;
        far[i] = i & S ? LANES + i - S : i + S;
    }
#pragma GCC unroll 8
    for (int j = 0; j < S; j++)
        x[j] = __builtin_shuffle(x[j], x[j + S], near) + __builtin_shuffle(x[j], x[j + S], far);
    if constexpr (S > 1) sum_lanes<S / 2>(x);
}

// The largest lane, in all lanes; NaN counts for nothing.
template <int S = LANES / 2>
inline Floats largest(Floats x) {
    Ints other;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) other[i] = i ^ S;
    const Floats moved = __builtin_shuffle(x, other), larger = moved > x ? moved : x;
    if constexpr (S > 1) return largest<S / 2>(larger);
    else return larger;
}

inline Ints sees(uint32_t bits) {
    Bits bit;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) bit[i] = 1u << i;
    return (Ints)((bits & bit) != 0);
}

// ---- one pass -----------------------------------------------------------------------------------

// Hands out 64-byte aligned pieces of the scratch; from nullptr on it only counts.
struct Room {
    uint8_t* next;

    template <class T>
    T* take(int64_t count) {
        T* const taken = (T*)next;
        next += (count * sizeof(T) + 63) / 64 * 64;
        return taken;
    }
};

struct Share {
    int64_t first, end;
};

// This thread's run of `count` items.
inline Share share(int64_t count) {
    const int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num();
    return {count * mine / threads, count * (mine + 1) / threads};
}

// One query row of one head, while slots go by.
struct Query {
    float* q;     // [D], 0 up to the next vector; already times log2(e) / sqrt(D)
    float* mean;  // [D], of the values, times the sum of `total`
    const uint8_t* visible;
    float most;  // of the scores so far
    Floats total[SLOTS / LANES];
};

struct Pass {
    Sizes sizes;
    Rows rows;
    Activations hidden, inner;  // what mixers return lies where `hidden` does
    Group* mixed_groups;
    // bf16 [T, width()]: q, k, v, or the channels and z of a delta net; the place of the queries,
    // or of z, takes what is returned.
    uint16_t* qkv;
    uint16_t* normed;   // bf16 [T, H], where there are delta nets
    float* steps;       // [T, 2 J], b and a
    float* of_threads;  // [threads, thread_floats()]

    Pass(const Sizes& sizes, const Rows& rows, int num_threads, Room& room)
        : sizes(sizes), rows(rows) {
        const int64_t count = rows.num_rows, hidden_groups = sizes.hidden_size / GROUP_SIZE;
        const int64_t head_groups =
            std::max(sizes.num_heads * sizes.head_size, sizes.values_width()) / GROUP_SIZE;
        const int64_t inner_groups = sizes.inner_size / GROUP_SIZE;
        mixed_groups = room.take<Group>(count * std::max(hidden_groups, head_groups));
        hidden = {count, hidden_groups, mixed_groups};
        inner = {count, inner_groups, room.take<Group>(count * inner_groups)};
        qkv = room.take<uint16_t>(count * qkv_width());
        normed = room.take<uint16_t>(has_nets() ? count * sizes.hidden_size : 0);
        steps = room.take<float>(count * 2 * sizes.num_value_heads);
        of_threads = room.take<float>(num_threads * thread_floats());
    }

    bool has_nets() const { return sizes.num_value_heads > 0; }
    int64_t qkv_width() const {
        return std::max(sizes.attention_width(), sizes.num_channels() + sizes.values_width());
    }
    Activations mixed(int64_t width) const {
        return {rows.num_rows, width / GROUP_SIZE, mixed_groups};
    }
    uint16_t* query(int64_t row, int64_t head) const {
        return qkv + row * qkv_width() + head * sizes.head_size * (sizes.gated ? 2 : 1);
    }
    int64_t dims() const { return (sizes.head_size + PIECE - 1) / PIECE * PIECE; }
    int64_t thread_floats() const {
        const int64_t of_nets = NET_ROWS * (2 * sizes.key_size + 3 * sizes.value_size) +
                                sizes.num_taps * (2 * sizes.key_size + sizes.value_size);
        return std::max((2 * TOGETHER + 2 * SLOTS) * dims(), of_nets);
    }
    float* of_thread() const { return of_threads + omp_get_thread_num() * thread_floats(); }
};

// ---- norms and products -------------------------------------------------------------------------

// 1 / sqrt(mean of x^2 + epsilon)
float inverse_size(const uint16_t* x, int64_t count, float epsilon) {
    float sum[SUMS] = {}, total = 0;
    int64_t i = 0;
    for (; i + SUMS <= count; i += SUMS)
        for (int j = 0; j < SUMS; j++) sum[j] += widen(x[i + j]) * widen(x[i + j]);
    for (int j = 0; i < count; i++, j++) sum[j] += widen(x[i]) * widen(x[i]);
    for (int j = 0; j < SUMS; j++) total += sum[j];
    return 1 / std::sqrt(total / (float)count + epsilon);
}

// As normalize() of transformer.py.
inline uint16_t normed(const Sizes& sizes, uint16_t x, float inverse, uint16_t weight) {
    const float own = widen(x) * inverse;
    if (sizes.rounds_late) return rounded_to_bf16(own * (widen(weight) + sizes.norm_offset));
    return rounded_to_bf16(widen(rounded_to_bf16(own)) * widen(weight));
}

void normalize(const Pass& pass, const uint16_t* weight) {
    const Activations& to = pass.hidden;
    const Share mine = share(to.num_rows * to.num_groups);
    int64_t held = -1;
    float inverse = 0;
    for (int64_t item = mine.first; item < mine.end; item++) {
        const int64_t row = item / to.num_groups, group = item % to.num_groups;
        const uint16_t* const x = pass.rows.x + row * pass.sizes.hidden_size;
        if (held != row) inverse = inverse_size(x, pass.sizes.hidden_size, pass.sizes.norm_epsilon);
        held = row;
        uint16_t some[GROUP_SIZE];
        for (int i = 0; i < GROUP_SIZE; i++) {
            const int64_t column = group * GROUP_SIZE + i;
            some[i] = normed(pass.sizes, x[column], inverse, weight[column]);
        }
        if (pass.has_nets())
            memcpy(pass.normed + row * pass.sizes.hidden_size + group * GROUP_SIZE, some,
                   sizeof some);
        quantize(some, to.at(row, group));
    }
}

inline Weight weight_of(const Linear& linear, int64_t num_rows, const Activations& x) {
    return {num_rows, x.num_groups, linear.codes, linear.qparams};
}

// A vector of a product, rounded as its twin does it.
inline Floats with_bias(Floats product, const Linear& linear, int64_t column) {
    const Floats rounded = through_bf16(product);
    return linear.bias ? through_bf16(rounded + load_bf16(linear.bias + column)) : rounded;
}

// Rows of W, in blocks, times the rows, to their columns from `column` on.
void project(const Pass& pass, const Linear& linear, const Weight& weight, int64_t block,
             int64_t column) {
    for (int64_t row = 0; row < pass.rows.num_rows; row += MOST_ROWS) {
        Block product;
        const int count = multiply_rows(pass.hidden, row, weight, block, product);
        for (int r = 0; r < count; r++)
            for (int p = 0; p < PARTS; p++)
                store_bf16(pass.qkv + (row + r) * pass.qkv_width() + column + p * LANES,
                           with_bias(product[r][p], linear, block * BLOCK_ROWS + p * LANES));
    }
}

// The rows += from W^T + bias.
void add_product(const Pass& pass, const Activations& from, const Linear& linear) {
    const int64_t size = pass.sizes.hidden_size;
    const Weight weight = weight_of(linear, size, from);
    const Share mine = share(size / BLOCK_ROWS);
    for (int64_t block = mine.first; block < mine.end; block++)
        for (int64_t row = 0; row < pass.rows.num_rows; row += MOST_ROWS) {
            Block product;
            const int count = multiply_rows(from, row, weight, block, product);
            for (int r = 0; r < count; r++)
                for (int p = 0; p < PARTS; p++) {
                    const int64_t column = block * BLOCK_ROWS + p * LANES;
                    uint16_t* const x = pass.rows.x + (row + r) * size + column;
                    store_bf16(x, load_bf16(x) + with_bias(product[r][p], linear, column));
                }
        }
}

// pass.inner = silu(gate) * up, a group of columns at a time.
void gate_and_up(const Pass& pass, const Layer& layer) {
    const Weight gate = weight_of(layer.gate, pass.sizes.inner_size, pass.hidden);
    const Weight up = weight_of(layer.up, pass.sizes.inner_size, pass.hidden);
    const Share mine = share(pass.inner.num_groups);
    for (int64_t group = mine.first; group < mine.end; group++)
        for (int64_t row = 0; row < pass.rows.num_rows; row += MOST_ROWS) {
            uint16_t some[MOST_ROWS][GROUP_SIZE];
            int count = 0;
            for (int i = 0; i < GROUP_SIZE; i += BLOCK_ROWS) {
                const int64_t first = group * GROUP_SIZE + i;
                Block gates, ups;
                count = multiply_rows(pass.hidden, row, gate, first / BLOCK_ROWS, gates);
                multiply_rows(pass.hidden, row, up, first / BLOCK_ROWS, ups);
                for (int r = 0; r < count; r++)
                    for (int p = 0; p < PARTS; p++) {
                        const int64_t column = first + p * LANES;
                        const Floats of_gate = with_bias(gates[r][p], layer.gate, column);
                        const Floats of_up = with_bias(ups[r][p], layer.up, column);
                        store_bf16(some[r] + i + p * LANES, through_bf16(silu(of_gate)) * of_up);
                    }
            }
            for (int r = 0; r < count; r++) quantize(some[r], pass.inner.at(row + r, group));
        }
}

}  // namespace
