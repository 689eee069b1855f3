// The delta nets of a draft pass: a node attends over the nodes above it and reads the committed
// memory once, as run_draft() of delta_draft.py, which says why that is the rule.
//
// A value head of a sequence is a task. Key heads are computed by each value head that uses them, and
// left for later nodes by the first of them: rows that follow others of the pass wait for those.
#pragma once
#include "draft_pass.hpp"

namespace {

// b and a of the rows, of exact weights.
void project_steps(const Pass& pass, const uint16_t* weight, int64_t column) {
    const int64_t hidden = pass.sizes.hidden_size, width = 2 * pass.sizes.num_value_heads;
    for (int64_t row = 0; row < pass.rows.num_rows; row++) {
        const uint16_t* const x = pass.normed + row * hidden;
        Floats sum = {};
        for (int64_t i = 0; i < hidden; i += LANES)
            sum = fused(load_bf16(x + i), load_bf16(weight + i), sum);
        float total = 0;
        for (int i = 0; i < LANES; i++) total += sum[i];
        pass.steps[row * width + column] = total;
    }
}

void project_net(const Pass& pass, const Layer& layer) {
    const Sizes& sizes = pass.sizes;
    const int64_t heads = sizes.num_value_heads, channels = sizes.num_channels();
    const int64_t of_qkv = channels / BLOCK_ROWS, of_z = sizes.values_width() / BLOCK_ROWS;
    const Share mine = share(of_qkv + of_z + 2 * heads);
    for (int64_t item = mine.first; item < mine.end; item++) {
        if (item < of_qkv + of_z) {
            const bool is_z = item >= of_qkv;
            const Linear& linear = is_z ? layer.z : layer.qkv;
            const int64_t num_rows = is_z ? sizes.values_width() : channels;
            project(pass, linear, weight_of(linear, num_rows, pass.hidden),
                    is_z ? item - of_qkv : item, item * BLOCK_ROWS);
        } else {
            const int64_t column = item - of_qkv - of_z;
            const uint16_t* const weight = column < heads ? layer.b : layer.a;
            project_steps(pass, weight + column % heads * sizes.hidden_size, column);
        }
    }
}

// A value head of one sequence, and some rows of that.
struct NetTask {
    const Pass& pass;
    const Segment& segment;
    const CacheNet& net;
    int64_t head;
    // Of the thread: [K, E], [K, E], [K, F], then [NET_ROWS, E] twice and [NET_ROWS, F] thrice
    float *taps_q, *taps_k, *taps_v, *q, *k, *v, *known, *out;
    float beta[NET_ROWS], decay[NET_ROWS];  // decay: of the path, its log

    const Sizes& sizes() const { return pass.sizes; }
    int64_t key_head() const { return head * sizes().num_key_heads / sizes().num_value_heads; }
    bool owns_key() const {
        return head == 0 || key_head() != (head - 1) * sizes().num_key_heads / sizes().num_value_heads;
    }
    int64_t first_q() const { return key_head() * sizes().key_size; }
    int64_t first_k() const { return first_q() + sizes().num_key_heads * sizes().key_size; }
    int64_t first_v() const {
        return 2 * sizes().num_key_heads * sizes().key_size + head * sizes().value_size;
    }
    uint16_t* channels_of(int64_t row) const {
        return pass.qkv + (segment.first_row + row) * pass.qkv_width();
    }

    void take_room(float* room) {
        const int64_t taps = sizes().num_taps, keys = sizes().key_size, values = sizes().value_size;
        const auto take = [&](int64_t count) {
            float* const taken = room;
            room += count;
            return taken;
        };
        taps_q = take(taps * keys), taps_k = take(taps * keys), taps_v = take(taps * values);
        q = take(NET_ROWS * keys), k = take(NET_ROWS * keys);
        v = take(NET_ROWS * values), known = take(NET_ROWS * values), out = take(NET_ROWS * values);
    }

    void transpose_taps(int64_t channel, int64_t size, float* to) const {
        for (int64_t tap = 0; tap < sizes().num_taps; tap++)
            for (int64_t i = 0; i < size; i++)
                to[tap * size + i] = net.taps.at((channel + i) * sizes().num_taps + tap);
    }

    // to [size] = silu of the convolution of some channels; their inputs are left for later nodes.
    void convolve(int64_t row, int64_t channel, int64_t size, const float* taps, bool leaves,
                  float* to) const {
        const int64_t channels = sizes().num_channels(), before = sizes().num_taps - 1;
        const uint16_t* const own = channels_of(row) + channel;
        for (int64_t tap = 0; tap < sizes().num_taps; tap++) {
            const int64_t at = segment.windows[row * sizes().num_taps + tap];
            const uint16_t* from = net.conv + at * channels + channel;
            if (at >= before) from = net.inputs + (at - before) * channels + channel;
            if (tap == before) from = own;
            for (int64_t i = 0; i < size; i += LANES) {
                const Floats sum = tap ? load_floats(to + i) : Floats{};
                store(to + i, fused(load_bf16(from + i), load_floats(taps + tap * size + i), sum));
            }
        }
        for (int64_t i = 0; i < size; i += LANES) store(to + i, silu(load_floats(to + i)));
        if (leaves)
            memcpy(net.inputs + segment.nodes[row] * channels + channel, own, size * sizeof *own);
    }

    static float dot(const float* x, const float* y, int64_t size) {
        Floats sum = {};
        for (int64_t i = 0; i < size; i += LANES)
            sum = fused(load_floats(x + i), load_floats(y + i), sum);
        float total = 0;
        for (int i = 0; i < LANES; i++) total += sum[i];
        return total;
    }

    static void scale(float* x, float factor, int64_t size) {
        for (int64_t i = 0; i < size; i += LANES) store(x + i, load_floats(x + i) * factor);
    }

    void read_inputs(int64_t row, int64_t i) {
        const int64_t keys = sizes().key_size, values = sizes().value_size;
        const int64_t node = segment.nodes[row], parent = segment.parents[row];
        float *const own_q = q + i * keys, *const own_k = k + i * keys;
        convolve(row, first_q(), keys, taps_q, owns_key(), own_q);
        convolve(row, first_k(), keys, taps_k, owns_key(), own_k);
        convolve(row, first_v(), values, taps_v, true, v + i * values);
        scale(own_q, 1 / std::sqrt((dot(own_q, own_q, keys) + 1e-6f) * (float)keys), keys);
        scale(own_k, 1 / std::sqrt(dot(own_k, own_k, keys) + 1e-6f), keys);
        if (owns_key())
            memcpy(net.keys + (key_head() * net.num_nodes + node) * keys, own_k,
                   keys * sizeof(float));
        const float* const steps =
            pass.steps + (segment.first_row + row) * 2 * sizes().num_value_heads;
        beta[i] = 1 / (1 + std::exp(-steps[head]));
        const float a = steps[sizes().num_value_heads + head] + net.step_bias.at(head);
        const float step = std::max(a, 0.0f) + std::log1p(std::exp(-std::fabs(a)));
        float* const path_decays = net.path_decays + head * net.num_nodes;
        const float above = parent == node ? 0 : path_decays[parent];
        decay[i] = above - std::exp(net.decay_log.at(head)) * step;
        path_decays[node] = decay[i];
    }

    // known and out = what k and q of COUNT rows read of the committed memory.
    template <int COUNT>
    void read_memory() const {
        const int64_t keys = sizes().key_size, values = sizes().value_size;
        const float* const memory = net.memory + head * keys * values;
        float factors[COUNT];
        for (int r = 0; r < COUNT; r++) factors[r] = std::exp(decay[r]);
        for (int64_t f = 0; f < values; f += LANES) {
            Floats of_k[COUNT] = {}, of_q[COUNT] = {};
            for (int64_t e = 0; e < keys; e++) {
                const Floats held = load_floats(memory + e * values + f);
                for (int r = 0; r < COUNT; r++) {
                    of_k[r] = fused(held, Floats{} + k[r * keys + e], of_k[r]);
                    of_q[r] = fused(held, Floats{} + q[r * keys + e], of_q[r]);
                }
            }
            for (int r = 0; r < COUNT; r++) {
                store(known + r * values + f, of_k[r] * factors[r]);
                store(out + r * values + f, of_q[r] * factors[r]);
            }
        }
    }

    // The same of what the nodes above have written, and what the row itself writes.
    void read_nodes(int64_t row, int64_t i) const {
        const int64_t keys = sizes().key_size, values = sizes().value_size;
        const float *const own_q = q + i * keys, *const own_k = k + i * keys;
        float *const known_ = known + i * values, *const out_ = out + i * values;
        const float* const path_decays = net.path_decays + head * net.num_nodes;
        for (int64_t node = 0; node < segment.num_above; node++) {
            if (!segment.above[row * segment.num_above + node]) continue;
            const float share = std::exp(decay[i] - path_decays[node]);
            const float* const key = net.keys + (key_head() * net.num_nodes + node) * keys;
            const float* const update = net.updates + (head * net.num_nodes + node) * values;
            const Floats of_k = Floats{} + share * dot(key, own_k, keys);
            const Floats of_q = Floats{} + share * dot(key, own_q, keys);
            for (int64_t f = 0; f < values; f += LANES) {
                const Floats written = load_floats(update + f);
                store(known_ + f, fused(written, of_k, load_floats(known_ + f)));
                store(out_ + f, fused(written, of_q, load_floats(out_ + f)));
            }
        }
        float* const update = net.updates + (head * net.num_nodes + segment.nodes[row]) * values;
        const Floats own = Floats{} + dot(own_k, own_q, keys);
        for (int64_t f = 0; f < values; f += LANES) {
            const Floats fresh = (load_floats(v + i * values + f) - load_floats(known_ + f)) * beta[i];
            store(update + f, fresh);
            store(out_ + f, fused(fresh, own, load_floats(out_ + f)));
        }
    }

    // Through the norm and the gate, to the place of z.
    void finish(int64_t row, int64_t i) const {
        const int64_t values = sizes().value_size;
        float* const x = out + i * values;
        for (int64_t f = 0; f < values; f += LANES) store(x + f, through_bf16(load_floats(x + f)));
        const float mean = dot(x, x, values) / (float)values;
        const float inverse = 1 / std::sqrt(mean + sizes().norm_epsilon);
        uint16_t* const z = channels_of(row) + sizes().num_channels() + head * values;
        for (int64_t f = 0; f < values; f += LANES) {
            Floats weight;
            for (int lane = 0; lane < LANES; lane++) weight[lane] = net.norm.at(f + lane);
            const Floats normed = through_bf16(load_floats(x + f) * inverse) * weight;
            const Floats rounded = net.norm.is_f32 ? normed : through_bf16(normed);
            store_bf16(z + f, rounded * silu(load_bf16(z + f)));
        }
    }

    void run(int64_t from, int64_t to) {
        take_room(pass.of_thread());
        transpose_taps(first_q(), sizes().key_size, taps_q);
        transpose_taps(first_k(), sizes().key_size, taps_k);
        transpose_taps(first_v(), sizes().value_size, taps_v);
        for (int64_t first = from; first < to; first += NET_ROWS) {
            const int64_t count = std::min<int64_t>(NET_ROWS, to - first);
            for (int64_t i = 0; i < count; i++) read_inputs(first + i, i);
            if (count == 4) read_memory<4>();
            else if (count == 3) read_memory<3>();
            else if (count == 2) read_memory<2>();
            else read_memory<1>();
            for (int64_t i = 0; i < count; i++) read_nodes(first + i, i);
            for (int64_t i = 0; i < count; i++) finish(first + i, i);
        }
    }
};
static_assert(NET_ROWS == 4, "run() lists the numbers of rows");

// First the rows of each sequence that run together, then the others, one after another.
void run_net(const Pass& pass, const Layer& layer) {
    const int64_t heads = pass.sizes.num_value_heads;
    const Share mine = share(pass.rows.num_segments * heads);
    int64_t most = 0;
    for (int64_t i = 0; i < pass.rows.num_segments; i++) {
        const Segment& segment = pass.rows.segments[i];
        most = std::max(most, segment.num_rows - segment.num_together);
    }
    for (int64_t turn = 0; turn <= most; turn++) {
        for (int64_t item = mine.first; item < mine.end; item++) {
            const Segment& segment = pass.rows.segments[item / heads];
            const int64_t first = turn ? segment.num_together + turn - 1 : 0;
            const int64_t end = std::min(segment.num_together + turn, segment.num_rows);
            NetTask task = {pass, segment, segment.nets[layer.index], item % heads};
            if (first < end) task.run(first, end);
        }
        if (turn < most) {
#pragma omp barrier
        }
    }
}

void quantize_values(const Pass& pass) {
    const Activations to = pass.mixed(pass.sizes.values_width());
    const Share mine = share(to.num_rows * to.num_groups);
    for (int64_t item = mine.first; item < mine.end; item++) {
        const int64_t row = item / to.num_groups, group = item % to.num_groups;
        const uint16_t* const z = pass.qkv + row * pass.qkv_width() + pass.sizes.num_channels();
        quantize(z + group * GROUP_SIZE, to.at(row, group));
    }
}

void add_delta_net(const Pass& pass, const Layer& layer) {
    project_net(pass, layer);
#pragma omp barrier
    run_net(pass, layer);
#pragma omp barrier
    quantize_values(pass);
#pragma omp barrier
    add_product(pass, pass.mixed(pass.sizes.values_width()), layer.out);
#pragma omp barrier
}

}  // namespace
