// The attention of a draft pass: over the slots of each sequence's own cache.
#pragma once
#include "draft_pass.hpp"

namespace {

void project_heads(const Pass& pass, const Layer& layer) {
    const int64_t of_kv = pass.sizes.num_kv_heads * pass.sizes.head_size / BLOCK_ROWS;
    const int64_t of_q = pass.sizes.query_width() / BLOCK_ROWS;
    const Share mine = share(of_q + 2 * of_kv);
    for (int64_t item = mine.first; item < mine.end; item++) {
        const bool is_q = item < of_q, is_k = !is_q && item < of_q + of_kv;
        const Linear& linear = is_q ? layer.q : is_k ? layer.k : layer.v;
        const int64_t block = is_q ? item : (item - of_q) % of_kv;
        const Weight weight = weight_of(linear, (is_q ? of_q : of_kv) * BLOCK_ROWS, pass.hidden);
        project(pass, linear, weight, block, item * BLOCK_ROWS);
    }
}

// to f32 [D] = a head of a row, normed if there is a weight for that, and rotated.
void rotate(const Pass& pass, const uint16_t* x, const uint16_t* norm, int64_t row, float* to) {
    const int64_t size = pass.sizes.head_size, turning = pass.sizes.rope_size, half = turning / 2;
    const uint16_t* const cos = pass.rows.cos + row * turning;
    const uint16_t* const sin = pass.rows.sin + row * turning;
    if (norm) {
        const float inverse = inverse_size(x, size, pass.sizes.norm_epsilon);
        for (int64_t d = 0; d < size; d++) to[d] = widen(normed(pass.sizes, x[d], inverse, norm[d]));
    } else {
        for (int64_t d = 0; d < size; d++) to[d] = widen(x[d]);
    }
    for (int64_t d = 0; d < half; d++) {
        const float first = to[d], second = to[d + half];
        to[d] = first * widen(cos[d]) - second * widen(sin[d]);
        to[d + half] = second * widen(cos[d + half]) + first * widen(sin[d + half]);
    }
}

inline const Places& places_in(const Segment& segment, const Layer& layer) {
    return layer.windowed ? segment.in_window : segment.places;
}

// Keys and values of the rows into their slots. One thread writes all rows of a head: padding rows
// share a slot.
void fill_slots(const Pass& pass, const Layer& layer) {
    const int64_t size = pass.sizes.head_size, num_heads = pass.sizes.num_kv_heads;
    const Share mine = share(pass.rows.num_segments * num_heads);
    float* const rotated = pass.of_thread();
    for (int64_t item = mine.first; item < mine.end; item++) {
        const Segment& segment = pass.rows.segments[item / num_heads];
        const CacheLayer& cache = segment.layers[layer.index];
        const int64_t* const slots = places_in(segment, layer).slots;
        const int64_t head = item % num_heads, of_head = head * cache.num_slots * size;
        for (int64_t own = 0; own < segment.num_rows; own++) {
            const int64_t row = segment.first_row + own;
            const uint16_t* const q = pass.qkv + row * pass.qkv_width();
            const uint16_t* const k = q + pass.sizes.query_width() + head * size;
            const uint16_t* const v = k + num_heads * size;
            const int64_t slot = of_head + slots[own] * size;
            uint16_t* const key = cache.keys + slot;
            rotate(pass, k, layer.k_norm, row, rotated);
            for (int64_t d = 0; d < size; d++) key[d] = rounded_to_bf16(rotated[d]);
            memcpy(cache.values + slot, v, size * sizeof *v);
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
void attend_together(const Pass& pass, const Layer& layer, const Segment& segment, int64_t first,
                     int64_t end) {
    const CacheLayer& cache = segment.layers[layer.index];
    const Places& own = places_in(segment, layer);
    const int64_t size = pass.sizes.head_size, dims = pass.dims(), num_slots = own.num_slots;
    const int64_t kv_head =
        first / segment.num_rows / (pass.sizes.num_heads / pass.sizes.num_kv_heads);
    const int64_t of_head = kv_head * cache.num_slots * size;
    const uint16_t* const cached_keys = cache.keys + of_head;
    const uint16_t* const cached_values = cache.values + of_head;
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
        uint16_t* const place = pass.query(of_pass, head);
        float* const q = of_queries + 2 * (i - first) * dims;
        rotate(pass, place, layer.q_norm, of_pass, q);
        for (int64_t d = 0; d < size; d++) q[d] *= scale;
        places[i - first] = place;
        queries[i - first] = {q, q + dims, own.visible + row * num_slots, -0x1.fffffep127f, {}};
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

void attend(const Pass& pass, const Layer& layer) {
    const int64_t num_heads = pass.sizes.num_heads, repeats = num_heads / pass.sizes.num_kv_heads;
    const Share mine = share(num_heads * pass.rows.num_rows);
    const Segment* segment = pass.rows.segments;
    for (int64_t first = mine.first, end; first < mine.end; first = end) {
        while (first >= num_heads * (segment->first_row + segment->num_rows)) segment++;
        const int64_t base = num_heads * segment->first_row, of_head = repeats * segment->num_rows;
        end = std::min({mine.end, first + TOGETHER,
                        base + ((first - base) / of_head + 1) * of_head});
        attend_together(pass, layer, *segment, first - base, end - base);
    }
}

// What attention returned, through its gate.
void quantize_heads(const Pass& pass) {
    const int64_t size = pass.sizes.head_size;
    const Activations to = pass.mixed(pass.sizes.num_heads * size);
    const Share mine = share(to.num_rows * to.num_groups);
    for (int64_t item = mine.first; item < mine.end; item++) {
        const int64_t row = item / to.num_groups, group = item % to.num_groups;
        uint16_t some[GROUP_SIZE];
        for (int i = 0; i < GROUP_SIZE; i++) {
            const int64_t column = group * GROUP_SIZE + i;
            const uint16_t* const head = pass.query(row, column / size);
            some[i] = head[column % size];
            if (!pass.sizes.gated) continue;
            const float gate = 1 / (1 + std::exp(-widen(head[size + column % size])));
            some[i] = rounded_to_bf16(widen(some[i]) * widen(rounded_to_bf16(gate)));
        }
        quantize(some, to.at(row, group));
    }
}

void add_attention(const Pass& pass, const Layer& layer) {
    project_heads(pass, layer);
#pragma omp barrier
    fill_slots(pass, layer);
#pragma omp barrier
    attend(pass, layer);
#pragma omp barrier
    quantize_heads(pass);
#pragma omp barrier
    add_product(pass, pass.mixed(pass.sizes.num_heads * pass.sizes.head_size), layer.o);
#pragma omp barrier
}

}  // namespace
