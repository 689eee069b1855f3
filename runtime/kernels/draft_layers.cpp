// All decoder layers of one draft pass in one call, on CPUs: the compiled twin of the layers that
// forward() of transformer.py runs, over the 4-bit products of int4.hpp. compiled_layers.py builds
// this file and calls the functions at its end.
//
// One parallel region; every phase gives each thread a run of its items, and a barrier ends it. A
// row's bits depend neither on the other rows nor on the number of threads: whoever computes an
// item does it in the same way, and a slot that a row does not see is not touched for it.
// T = rows, H = hidden size, A = query heads, B = KV heads, D = head size, I = intermediate size,
// S = live slots
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
constexpr uint32_t MAGNITUDE = 0x7fffffff;

struct Sizes {
    int64_t num_layers, hidden_size, inner_size, num_heads, num_kv_heads, head_size, cache_slots;
    float norm_epsilon, scale;  // of RMSNorm; of the scores
};
struct Linear {
    const uint8_t* codes;
    const uint16_t *qparams, *bias;  // bias: bf16 [N], or null
};
struct Layer {
    Linear q, k, v, o, gate, up, down;
    const uint16_t *input_norm, *q_norm, *k_norm, *post_norm;  // bf16; q_norm, k_norm: or null
    int64_t windowed;  // 0 or 1
};
struct CacheLayer {
    uint16_t *keys, *values;  // bf16 [B, cache slots, D]
};
// One sequence's rows of the pass, and its own cache.
struct Segment {
    int64_t first_row, num_rows, num_slots;
    const uint8_t* visible;    // [rows, S], 0 or 1
    const uint8_t* in_window;  // [rows, S], of the layers that are windowed
    const CacheLayer* layers;  // [layers]
};
struct Rows {
    int64_t num_rows, num_segments;
    uint16_t* x;                // bf16 [T, H], in place
    const uint16_t *cos, *sin;  // bf16 [T, D]
    const int64_t* slots;       // [T]
    const Segment* segments;    // in the order of the rows
};

// ---- numbers ------------------------------------------------------------------------------------

inline float widen(uint16_t x) { return as_float((uint32_t)x << 16); }
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
    Activations hidden, heads, inner;  // `heads` lies where `hidden` does
    uint16_t* qkv;      // bf16 [T, (A + 2 B) D]; the queries' place takes what attention returns
    float* of_threads;  // [threads, thread_floats()]

    Pass(const Sizes& sizes, const Rows& rows, int num_threads, Room& room)
        : sizes(sizes), rows(rows) {
        const int64_t count = rows.num_rows, hidden_groups = sizes.hidden_size / GROUP_SIZE;
        const int64_t head_groups = sizes.num_heads * sizes.head_size / GROUP_SIZE;
        const int64_t inner_groups = sizes.inner_size / GROUP_SIZE;
        Group* const groups = room.take<Group>(count * std::max(hidden_groups, head_groups));
        hidden = {count, hidden_groups, groups};
        heads = {count, head_groups, groups};
        inner = {count, inner_groups, room.take<Group>(count * inner_groups)};
        qkv = room.take<uint16_t>(count * qkv_width());
        of_threads = room.take<float>(num_threads * thread_floats());
    }

    int64_t qkv_width() const {
        return (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_size;
    }
    int64_t dims() const { return (sizes.head_size + PIECE - 1) / PIECE * PIECE; }
    int64_t thread_floats() const { return (2 * TOGETHER + 2 * SLOTS) * dims(); }
    float* of_thread() const { return of_threads + omp_get_thread_num() * thread_floats(); }
    int64_t of_kv_head() const { return sizes.cache_slots * sizes.head_size; }
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

// Rounded before the weight as well, as normalize() of transformer.py.
inline uint16_t normed(uint16_t x, float inverse, uint16_t weight) {
    return rounded_to_bf16(widen(rounded_to_bf16(widen(x) * inverse)) * widen(weight));
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
            some[i] = normed(x[column], inverse, weight[column]);
        }
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

void project_heads(const Pass& pass, const Layer& layer) {
    const int64_t of_kv = pass.sizes.num_kv_heads * pass.sizes.head_size / BLOCK_ROWS;
    const int64_t of_q = pass.sizes.num_heads * pass.sizes.head_size / BLOCK_ROWS;
    const Share mine = share(of_q + 2 * of_kv);
    for (int64_t item = mine.first; item < mine.end; item++) {
        const bool is_q = item < of_q, is_k = !is_q && item < of_q + of_kv;
        const Linear& linear = is_q ? layer.q : is_k ? layer.k : layer.v;
        const int64_t block = is_q ? item : (item - of_q) % of_kv;
        const Weight weight = weight_of(linear, (is_q ? of_q : of_kv) * BLOCK_ROWS, pass.hidden);
        for (int64_t row = 0; row < pass.rows.num_rows; row += MOST_ROWS) {
            Block product;
            const int count = multiply_rows(pass.hidden, row, weight, block, product);
            for (int r = 0; r < count; r++)
                for (int p = 0; p < PARTS; p++)
                    store_bf16(
                        pass.qkv + (row + r) * pass.qkv_width() + item * BLOCK_ROWS + p * LANES,
                        with_bias(product[r][p], linear, block * BLOCK_ROWS + p * LANES));
        }
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

// ---- attention ----------------------------------------------------------------------------------

// to f32 [D] = a head of a row, normed if there is a weight for that, and rotated.
void rotate(const Pass& pass, const uint16_t* x, const uint16_t* norm, int64_t row, float* to) {
    const int64_t size = pass.sizes.head_size, half = size / 2;
    const uint16_t *const cos = pass.rows.cos + row * size, *const sin = pass.rows.sin + row * size;
    if (norm) {
        const float inverse = inverse_size(x, size, pass.sizes.norm_epsilon);
        for (int64_t d = 0; d < size; d++) to[d] = widen(normed(x[d], inverse, norm[d]));
    } else {
        for (int64_t d = 0; d < size; d++) to[d] = widen(x[d]);
    }
    for (int64_t d = 0; d < half; d++) {
        const float first = to[d], second = to[d + half];
        to[d] = first * widen(cos[d]) - second * widen(sin[d]);
        to[d + half] = second * widen(cos[d + half]) + first * widen(sin[d + half]);
    }
}

// Keys and values of the rows into their slots. One thread writes all rows of a head: padding rows
// share a slot.
void fill_slots(const Pass& pass, const Layer& layer, int64_t index) {
    const int64_t size = pass.sizes.head_size, num_heads = pass.sizes.num_kv_heads;
    const Share mine = share(pass.rows.num_segments * num_heads);
    float* const rotated = pass.of_thread();
    for (int64_t item = mine.first; item < mine.end; item++) {
        const Segment& segment = pass.rows.segments[item / num_heads];
        const int64_t head = item % num_heads, of_head = head * pass.of_kv_head();
        for (int64_t row = segment.first_row; row < segment.first_row + segment.num_rows; row++) {
            const uint16_t* const q = pass.qkv + row * pass.qkv_width();
            const uint16_t* const k = q + (pass.sizes.num_heads + head) * size;
            const uint16_t* const v = k + num_heads * size;
            const int64_t slot = of_head + pass.rows.slots[row] * size;
            uint16_t* const key = segment.layers[index].keys + slot;
            rotate(pass, k, layer.k_norm, row, rotated);
            for (int64_t d = 0; d < size; d++) key[d] = rounded_to_bf16(rotated[d]);
            memcpy(segment.layers[index].values + slot, v, size * sizeof *v);
        }
    }
}

// A bit for each of up to SLOTS slots.
inline uint32_t bits_of(const uint8_t* visible, int64_t count) {
    uint8_t some[SLOTS] = {};
    memcpy(some, visible, count == SLOTS ? SLOTS : count);
    uint32_t bits = 0;
    for (int i = 0; i < SLOTS; i += 8) {
        uint64_t bytes;
        memcpy(&bytes, some + i, 8);
        bits |= (uint32_t)(bytes * 0x0102040810204080 >> 56) << i;
    }
    return bits;
}

// bf16 [count, D] -> f32 [dims / 16, SLOTS, 16], with zeros up to dims. The next slots are on their
// way meanwhile: a head's are too few for the processor to look ahead enough.
void widen_slots(const Pass& pass, const uint16_t* from, int64_t count, float* to) {
    const int64_t size = pass.sizes.head_size;
    const uint16_t* const next = from + SLOTS * size;
    for (int64_t i = 0; i < SLOTS * size; i += 64 / sizeof *next) __builtin_prefetch(next + i, 0, 2);
    for (int64_t i = 0; i < count; i++, from += size)
        for (int64_t d = 0; d < size; d += PIECE) {
            float* const piece = to + d * SLOTS + i * PIECE;
            if (size - d >= PIECE)
                for (int j = 0; j < PIECE; j += LANES) store(piece + j, load_bf16(from + d + j));
            else
                for (int j = 0; j < PIECE; j++) piece[j] = d + j < size ? widen(from[d + j]) : 0;
        }
}

// Where vector j from dimension d on, a multiple of PIECE, lies: of slot 0.
inline const float* at(const float* widened, int64_t d, int j) {
    return widened + d * SLOTS + j * LANES / PIECE * PIECE * SLOTS + j * LANES % PIECE;
}

// mean [VECTORS] += weights times the values of some slots, from dimension d on.
template <int VECTORS>
void add_values(float* mean, const float* values, int64_t d, const float* weights,
                const int* slots, int num) {
    Floats sum[VECTORS];
    for (int j = 0; j < VECTORS; j++) sum[j] = load_floats(mean + d + j * LANES);
    for (int n = 0; n < num; n++) {
        const Floats weight = Floats{} + weights[slots[n]];
        for (int j = 0; j < VECTORS; j++)
            sum[j] = fused(weight, load_floats(at(values, d, j) + slots[n] * PIECE), sum[j]);
    }
    for (int j = 0; j < VECTORS; j++) store(mean + d + j * LANES, sum[j]);
}

// What the slots that `seen` has bits for do to a query. keys, values: [dims / 16, SLOTS, 16].
void attend_slots(Query& query, uint32_t seen, const float* keys, const float* values,
                  int64_t dims) {
    Floats scores[SLOTS / LANES], most = Floats{} + query.most;
    for (int p = 0; p < SLOTS / LANES; p++) {
        Floats sum[LANES] = {};
        for (int64_t d = 0; d < dims; d += PIECE)
            for (int j = 0; j < PIECE / LANES; j++) {
                const Floats q = load_floats(query.q + d + j * LANES);
                const float* const key = at(keys, d, j) + p * LANES * PIECE;
                for (int i = 0; i < LANES; i++)
                    sum[i] = fused(q, load_floats(key + i * PIECE), sum[i]);
            }
        sum_lanes(sum);
        scores[p] = sees(seen >> p * LANES) ? sum[0] : Floats{} - INFINITY;
        most = scores[p] > most ? scores[p] : most;
    }
    most = largest(most);
    if (most[0] > query.most) {
        const Floats factor = power_of_two<Bits>(Floats{} + query.most - most);
        for (Floats& total : query.total) total *= factor;
        for (int64_t d = 0; d < dims; d += LANES)
            store(query.mean + d, load_floats(query.mean + d) * factor);
        query.most = most[0];
    }
    float weights[SLOTS];
    for (int p = 0; p < SLOTS / LANES; p++) {
        const Floats weight = power_of_two<Bits>(scores[p] - most);
        store(weights + p * LANES, weight);
        query.total[p] += weight;
    }
    int slots[SLOTS], num = 0;
    for (; seen; seen &= seen - 1) slots[num++] = __builtin_ctz(seen);
    int64_t d = 0;
    for (; d + 8 * LANES <= dims; d += 8 * LANES)
        add_values<8>(query.mean, values, d, weights, slots, num);
    for (; d < dims; d += PIECE)
        add_values<PIECE / LANES>(query.mean, values, d, weights, slots, num);
}

// Queries [first, end) of one KV head and one sequence: query i is row i % T of head i / T.
void attend_together(const Pass& pass, const Layer& layer, int64_t index, const Segment& segment,
                     int64_t first, int64_t end) {
    const int64_t size = pass.sizes.head_size, dims = pass.dims(), num_slots = segment.num_slots;
    const int64_t kv_head =
        first / segment.num_rows / (pass.sizes.num_heads / pass.sizes.num_kv_heads);
    const uint16_t* const cached_keys = segment.layers[index].keys + kv_head * pass.of_kv_head();
    const uint16_t* const cached_values =
        segment.layers[index].values + kv_head * pass.of_kv_head();
    const uint8_t* const visible = layer.windowed ? segment.in_window : segment.visible;
    const float scale = 1.44269504f * pass.sizes.scale;
    float* const keys = pass.of_thread();
    float* const values = keys + SLOTS * dims;
    float* const of_queries = values + SLOTS * dims;
    memset(of_queries, 0, (end - first) * 2 * dims * sizeof *of_queries);
    Query queries[TOGETHER];
    uint16_t* places[TOGETHER];
    for (int64_t i = first; i < end; i++) {
        const int64_t head = i / segment.num_rows, row = i % segment.num_rows;
        const int64_t of_pass = segment.first_row + row;
        uint16_t* const place = pass.qkv + of_pass * pass.qkv_width() + head * size;
        float* const q = of_queries + 2 * (i - first) * dims;
        rotate(pass, place, layer.q_norm, of_pass, q);
        for (int64_t d = 0; d < size; d++) q[d] *= scale;
        places[i - first] = place;
        queries[i - first] = {q, q + dims, visible + row * num_slots, -0x1.fffffep127f, {}};
    }
    for (int64_t slot = 0; slot < num_slots; slot += SLOTS) {
        const int64_t count = std::min<int64_t>(SLOTS, num_slots - slot);
        uint32_t seen[TOGETHER], any = 0;
        for (int64_t i = 0; i < end - first; i++)
            any |= seen[i] = bits_of(queries[i].visible + slot, count);
        if (!any) continue;
        widen_slots(pass, cached_keys + slot * size, count, keys);
        widen_slots(pass, cached_values + slot * size, count, values);
        for (int64_t i = 0; i < end - first; i++)
            if (seen[i]) attend_slots(queries[i], seen[i], keys, values, dims);
    }
    for (int64_t i = 0; i < end - first; i++) {
        float total = 0;
        for (int j = 0; j < SLOTS; j++) total += queries[i].total[j / LANES][j % LANES];
        const float divisor = total == 0 ? 1 : total;
        for (int64_t d = 0; d < size; d++)
            places[i][d] = rounded_to_bf16(queries[i].mean[d] / divisor);
    }
}

void attend(const Pass& pass, const Layer& layer, int64_t index) {
    const int64_t num_heads = pass.sizes.num_heads, repeats = num_heads / pass.sizes.num_kv_heads;
    const Share mine = share(num_heads * pass.rows.num_rows);
    const Segment* segment = pass.rows.segments;
    for (int64_t first = mine.first, end; first < mine.end; first = end) {
        while (first >= num_heads * (segment->first_row + segment->num_rows)) segment++;
        const int64_t base = num_heads * segment->first_row, of_head = repeats * segment->num_rows;
        end = std::min({mine.end, first + TOGETHER,
                        base + ((first - base) / of_head + 1) * of_head});
        attend_together(pass, layer, index, *segment, first - base, end - base);
    }
}

void quantize_heads(const Pass& pass) {
    const Activations& to = pass.heads;
    const Share mine = share(to.num_rows * to.num_groups);
    for (int64_t item = mine.first; item < mine.end; item++) {
        const int64_t row = item / to.num_groups, group = item % to.num_groups;
        quantize(pass.qkv + row * pass.qkv_width() + group * GROUP_SIZE, to.at(row, group));
    }
}

int useful_threads(const Sizes& sizes, int num_threads) {
    const int64_t columns = 2 * (sizes.num_heads + sizes.num_kv_heads) * sizes.head_size;
    const int64_t weights = sizes.hidden_size * (columns + 3 * sizes.inner_size);
    return (int)std::min<int64_t>(
        num_threads, std::max<int64_t>(1, weights / LAYER_WEIGHTS_PER_THREAD));
}

}  // namespace

// Bytes that subspec_draft_layers needs as its scratch.
extern "C" int64_t subspec_draft_scratch_bytes(const Sizes* sizes, int64_t num_rows,
                                               int num_threads) {
    Room room = {nullptr};
    Rows rows = {};
    rows.num_rows = num_rows;
    Pass(*sizes, rows, useful_threads(*sizes, num_threads), room);
    return (int64_t)room.next;
}

// rows->x through the layers; their keys and values into the caches of their segments. scratch:
// 64-byte aligned.
extern "C" void subspec_draft_layers(const Sizes* sizes, const Layer* layers, const Rows* rows,
                                     uint8_t* scratch, int num_threads) {
    const int threads = useful_threads(*sizes, num_threads);
    Room room = {scratch};
    const Pass pass(*sizes, *rows, threads, room);
#pragma omp parallel num_threads(threads)
    for (int64_t index = 0; index < sizes->num_layers; index++) {
        const Layer& layer = layers[index];
        normalize(pass, layer.input_norm);
#pragma omp barrier
        project_heads(pass, layer);
#pragma omp barrier
        fill_slots(pass, layer, index);
#pragma omp barrier
        attend(pass, layer, index);
#pragma omp barrier
        quantize_heads(pass);
#pragma omp barrier
        add_product(pass, pass.heads, layer.o);
#pragma omp barrier
        normalize(pass, layer.post_norm);
#pragma omp barrier
        gate_and_up(pass, layer);
#pragma omp barrier
        add_product(pass, pass.inner, layer.down);
#pragma omp barrier
    }
}
