// A gated delta net over rows that are a tree, on CPUs: the compiled twin of delta_net_in_torch() of
// delta_net.py, bit for bit. Convolution, gates, rule and gated norm of one value head are a task;
// nothing passes between tasks.
//
// Every operation is a rounded sum, product, quotient or square root in the order of the twin, and
// nothing is fused: so the bits of a row depend neither on the instruction set nor on anything but
// its path. A head's memory [E, F] lies in blocks of COLUMNS columns, which never meet: a block
// walks through a piece of the rows while its memories are in the nearest cache.
// N = rows, K = taps, G / J = key / value heads, E / F = their sizes, C = 2 G E + J F channels
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "elements.hpp"
#include "exponent.hpp"

namespace {

constexpr int SUMS = 8;                   // partial sums of every reduction
constexpr int WIDE = LANES == 16 ? 2 : 1;  // vectors whose sums are in registers together
constexpr int COLUMNS = WIDE * LANES;
constexpr int WIDEST = 32;  // columns of a block, of any instruction set: sizes are rounded up to it
constexpr int ROWS = 32;    // whose inputs are widened together
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 18;  // fewer are not worth waking a thread
constexpr float LOG2_E = 1.44269504f, L2_EPSILON = 1e-6f;
typedef float Partial __attribute__((vector_size(4 * SUMS)));

struct Sizes {
    int64_t num_rows, num_key_heads, num_value_heads, key_size, value_size, num_taps;
    int64_t num_slots, num_ends;
    float query_scale, inverse_value_size, norm_epsilon;
    int32_t rounds_norm;  // 1: the norm's product is an element, before the gate multiplies it
};
// All that is not f32 or a number is elements; strides are in elements.
struct Tensors {
    const void *before, *qkv, *a, *b, *z;  // [K - 1, C], [N, C], [N, J], [N, J], [N, J F]
    int64_t qkv_row, a_row, b_row, z_row;
    void* out;  // [N, J F]; null: only memories are wanted, and there is no z
    int64_t out_row;
    const float *taps, *rate, *step_bias, *norm;  // [C, K], [J], [J], [F]
    const float* memory;                          // [J, E, F]
    const int64_t *windows, *sources, *slots;     // [N, K], [N], [N]
    const int64_t* end_rows;                      // [num_ends]
    float* const* ends;                           // [J, E, F] of each
};

inline int64_t up_to(int64_t size, int64_t piece) { return (size + piece - 1) / piece * piece; }

// Of one thread; its size is that of delta_net_scratch_bytes in footprint.py.
struct Scratch {
    int64_t keys, values;  // E and F, rounded up
    float *taps_q, *taps_k, *taps_v;  // [K, E], [K, E], [K, F]
    float *q, *k, *v, *out;           // [ROWS, E], [ROWS, E], [ROWS, F], [ROWS, F]
    float *decay, *beta;              // [ROWS]
    float* memories;                  // [slots, F / COLUMNS, E, COLUMNS]

    Scratch(const Sizes& sizes, float* from, int index)
        : keys(up_to(sizes.key_size, WIDEST)), values(up_to(sizes.value_size, WIDEST)) {
        const int64_t of_row = 2 * keys + values, of_slot = keys * values;
        const int64_t all = (sizes.num_taps + ROWS) * of_row + ROWS * (values + 2);
        from += index * (all + sizes.num_slots * of_slot);
        const auto take = [&](int64_t count) {
            float* const taken = from;
            from += count;
            return taken;
        };
        taps_q = take(sizes.num_taps * keys), taps_k = take(sizes.num_taps * keys);
        taps_v = take(sizes.num_taps * values);
        q = take(ROWS * keys), k = take(ROWS * keys);
        v = take(ROWS * values), out = take(ROWS * values);
        decay = take(ROWS), beta = take(ROWS);
        memories = from;
    }
    float* memory(int64_t slot, int64_t column) const {
        return memories + (slot * values + column) * keys;
    }
};

// ---- functions of rounded operations ------------------------------------------------------------

// From here on a number is rounded to the element type and back.
template <class Element>
inline Floats rounded(Floats x) {
    if constexpr (sizeof(Element) == sizeof(float)) {
        return x;
    } else {
        const Halves halves = __builtin_convertvector(narrow(x, Element{}), Halves);
        Element elements[LANES];
        memcpy(elements, &halves, sizeof elements);
        return widen(elements);
    }
}

inline Floats exp_of_magnitude(Floats x) {  // e^-|x|
    return power_of_two<Bits>((Floats)((Bits)x | ~MAGNITUDE) * LOG2_E);
}
inline Floats sigmoid(Floats x) {
    const Floats power = exp_of_magnitude(x);
    return (x < 0 ? power : Floats{} + 1) / (power + 1);
}
inline Floats silu(Floats x) {
    const Floats power = exp_of_magnitude(x);
    return x * (x < 0 ? power : Floats{} + 1) / (power + 1);
}
inline Floats softplus(Floats x) {
    const Floats power = exp_of_magnitude(x), ratio = power / (power + 2), square = ratio * ratio;
    Floats series = square * (float)(1.0 / 17) + (float)(1.0 / 15);
    for (int odd = 13; odd > 0; odd -= 2) series = series * square + (float)(1.0 / odd);
    return (x < 0 ? Floats{} : x) + (ratio + ratio) * series;
}

inline float total(const float* sums) {
    float halves[SUMS];
    memcpy(halves, sums, sizeof halves);
    for (int half = SUMS / 2; half; half /= 2)
        for (int i = 0; i < half; i++) halves[i] += halves[half + i];
    return halves[0];
}

// Sum of the squares; behind x are zeros up to a multiple of SUMS.
inline float squares(const float* x, int64_t size) {
    Partial sums = {};
    for (int64_t i = 0; i < size; i += SUMS) {
        Partial some;
        memcpy(&some, x + i, sizeof some);
        sums += some * some;
    }
    float spread[SUMS];
    memcpy(spread, &sums, sizeof spread);
    return total(spread);
}

// ---- the inputs of some rows --------------------------------------------------------------------

template <class Element>
struct Task {
    const Sizes& sizes;
    const Tensors& tensors;
    const Scratch& s;
    int64_t head, first, count;  // of its rows

    bool reads() const { return tensors.out != nullptr; }  // what q reads of the memories
    int64_t channels() const {
        return 2 * sizes.num_key_heads * sizes.key_size + sizes.num_value_heads * sizes.value_size;
    }
    int64_t key_head() const { return head * sizes.num_key_heads / sizes.num_value_heads; }
    int64_t first_q() const { return key_head() * sizes.key_size; }
    int64_t first_k() const { return first_q() + sizes.num_key_heads * sizes.key_size; }
    int64_t first_v() const {
        return 2 * sizes.num_key_heads * sizes.key_size + head * sizes.value_size;
    }

    void transpose_taps(int64_t channel, int64_t size, int64_t wide, float* to) const {
        for (int64_t tap = 0; tap < sizes.num_taps; tap++)
            for (int64_t i = 0; i < wide; i++)
                to[tap * wide + i] =
                    i < size ? tensors.taps[(channel + i) * sizes.num_taps + tap] : 0;
    }

    const Element* window(int64_t row, int64_t tap) const {
        const int64_t at = tensors.windows[row * sizes.num_taps + tap];
        const int64_t before = sizes.num_taps - 1;
        return at < before ? (const Element*)tensors.before + at * channels()
                           : (const Element*)tensors.qkv + (at - before) * tensors.qkv_row;
    }

    // to [wide] = silu of the convolution of some channels, zeros behind them.
    void convolve(int64_t row, int64_t channel, int64_t size, int64_t wide, const float* taps,
                  float* to) const {
        for (int64_t i = 0; i < wide; i += PIECE) {
            Floats mixed[PIECE / LANES] = {};
            const int64_t inside = std::max<int64_t>(0, std::min<int64_t>(PIECE, size - i));
            for (int64_t tap = 0; tap < sizes.num_taps && inside; tap++) {
                const Elements<Element> some(window(row, tap) + channel + i, inside);
                for (int j = 0; j < PIECE / LANES; j++)
                    mixed[j] += widen(some.x + j * LANES) * load(taps + tap * wide + i + j * LANES);
            }
            for (int j = 0; j < PIECE / LANES; j++)
                store(to + i + j * LANES, rounded<Element>(silu(rounded<Element>(mixed[j]))));
        }
    }

    void to_length(float* x, float scale) const {
        const float inverse = 1 / std::sqrt(squares(x, sizes.key_size) + L2_EPSILON);
        for (int64_t i = 0; i < s.keys; i += LANES) store(x + i, load(x + i) * inverse * scale);
    }

    void read_inputs() const {
        for (int64_t i = 0; i < count; i++) {
            float *const q = s.q + i * s.keys, *const k = s.k + i * s.keys;
            convolve(first + i, first_k(), sizes.key_size, s.keys, s.taps_k, k);
            convolve(first + i, first_v(), sizes.value_size, s.values, s.taps_v,
                     s.v + i * s.values);
            to_length(k, 1);
            if (!reads()) continue;
            convolve(first + i, first_q(), sizes.key_size, s.keys, s.taps_q, q);
            to_length(q, sizes.query_scale);
        }
        for (int64_t i = 0; i < count; i += LANES) {
            Element a[LANES] = {}, b[LANES] = {};
            for (int64_t j = 0; j < LANES && i + j < count; j++) {
                a[j] = ((const Element*)tensors.a)[(first + i + j) * tensors.a_row + head];
                b[j] = ((const Element*)tensors.b)[(first + i + j) * tensors.b_row + head];
            }
            const Floats step = softplus(widen(a) + tensors.step_bias[head]);
            const Floats decay = exp_of_magnitude(step * tensors.rate[head]);
            store(s.decay + i, decay);
            store(s.beta + i, rounded<Element>(sigmoid(widen(b))));
        }
    }

    // ---- the rule -------------------------------------------------------------------------------

    // A block of the committed memory into a slot, zeros around it.
    void take_committed(int64_t column, float* to) const {
        const int64_t inside = std::min<int64_t>(COLUMNS, sizes.value_size - column);
        const float* from = tensors.memory + head * sizes.key_size * sizes.value_size + column;
        for (int64_t e = 0; e < sizes.key_size; e++) {
            memcpy(to + e * COLUMNS, from + e * sizes.value_size, inside * sizeof(float));
            for (int64_t i = inside; i < COLUMNS; i++) to[e * COLUMNS + i] = 0;
        }
        for (int64_t i = sizes.key_size * COLUMNS; i < s.keys * COLUMNS; i++) to[i] = 0;
    }

    void leave_end(const float* from, int64_t column, float* end) const {
        const int64_t inside = std::min<int64_t>(COLUMNS, sizes.value_size - column);
        float* to = end + head * sizes.key_size * sizes.value_size + column;
        for (int64_t e = 0; e < sizes.key_size; e++)
            memcpy(to + e * sizes.value_size, from + e * COLUMNS, inside * sizeof(float));
    }

    static Floats sum(const Floats (&sums)[SUMS][WIDE], int i) {
        const Floats even = (sums[0][i] + sums[4][i]) + (sums[2][i] + sums[6][i]);
        return even + ((sums[1][i] + sums[5][i]) + (sums[3][i] + sums[7][i]));
    }

    // own = the memory that follows `from` after row i of the piece, and what q reads of it.
    template <bool READS>
    void step(int64_t i, int64_t column, const float* from, float* own) const {
        const float *const q = s.q + i * s.keys, *const k = s.k + i * s.keys;
        const float decay = s.decay[i], beta = s.beta[i];
        const int64_t end = up_to(sizes.key_size, SUMS);
        Floats sums[SUMS][WIDE] = {}, change[WIDE];
        for (int64_t e = 0; e < end; e += SUMS)
            for (int j = 0; j < SUMS; j++)
                for (int w = 0; w < WIDE; w++)
                    sums[j][w] += load(from + (e + j) * COLUMNS + w * LANES) * k[e + j];
        for (int w = 0; w < WIDE; w++) {
            const Floats known = sum(sums, w) * decay;
            change[w] = (load(s.v + i * s.values + column + w * LANES) - known) * beta;
            for (int j = 0; j < SUMS; j++) sums[j][w] = Floats{};
        }
        for (int64_t e = 0; e < end; e += SUMS)
            for (int j = 0; j < SUMS; j++)
                for (int w = 0; w < WIDE; w++) {
                    const int64_t at = (e + j) * COLUMNS + w * LANES;
                    const Floats memory = load(from + at) * decay + change[w] * k[e + j];
                    store(own + at, memory);
                    if constexpr (READS) sums[j][w] += memory * q[e + j];
                }
        for (int w = 0; READS && w < WIDE; w++)
            store(s.out + i * s.values + column + w * LANES, sum(sums, w));
    }

    void walk(int64_t column) const {
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = first + i, source = tensors.sources[row];
            float* const own = s.memory(tensors.slots[row], column);
            if (source < 0) take_committed(column, own);
            const float* const from = source < 0 ? own : s.memory(source, column);
            if (reads()) step<true>(i, column, from, own);
            else step<false>(i, column, from, own);
            for (int64_t end = 0; end < sizes.num_ends; end++)
                if (tensors.end_rows[end] == row) leave_end(own, column, tensors.ends[end]);
        }
    }

    // ---- what becomes of it ---------------------------------------------------------------------

    void norm_and_gate(int64_t i) const {
        const int64_t size = sizes.value_size, row = first + i;
        float* const x = s.out + i * s.values;
        for (int64_t f = 0; f < s.values; f += LANES) store(x + f, rounded<Element>(load(x + f)));
        for (int64_t f = size; f < s.values; f++) x[f] = 0;
        const float mean = squares(x, size) * sizes.inverse_value_size;
        const float inverse = 1 / std::sqrt(mean + sizes.norm_epsilon);
        const Element* const z = (const Element*)tensors.z + row * tensors.z_row + head * size;
        Element* const out = (Element*)tensors.out + row * tensors.out_row + head * size;
        for (int64_t f = 0; f < size; f += PIECE) {
            const int64_t inside = std::min<int64_t>(PIECE, size - f);
            const Elements<Element> gates(z + f, inside);
            const Elements<float> weights(tensors.norm + f, inside);
            Element results[PIECE];
            for (int j = 0; j < PIECE; j += LANES) {
                Floats y = load(weights.x + j) * rounded<Element>(load(x + f + j) * inverse);
                if (sizes.rounds_norm) y = rounded<Element>(y);
                const Bits bits = narrow(y * silu(widen(gates.x + j)), Element{});
                for (int lane = 0; lane < LANES; lane++) {
                    const uint32_t one = bits[lane];
                    memcpy(results + j + lane, &one, sizeof(Element));  // the lower bits
                }
            }
            memcpy(out + f, results, inside * sizeof(Element));
        }
    }

    void run() const {
        read_inputs();
        for (int64_t column = 0; column < sizes.value_size; column += COLUMNS) walk(column);
        for (int64_t i = 0; i < count && reads(); i++) norm_and_gate(i);
    }
};

template <class Element>
void run(const Sizes& sizes, const Tensors& tensors, float* scratch, int num_threads) {
    const int64_t heads = sizes.num_value_heads, of_head = sizes.key_size * sizes.value_size;
    const int64_t worth = std::max<int64_t>(
        1, sizes.num_rows * heads * of_head / PRODUCTS_PER_THREAD);
    const int threads = (int)std::min({(int64_t)num_threads, worth, heads});
#pragma omp parallel num_threads(threads)
    {
        const Scratch s(sizes, scratch, omp_get_thread_num());
#pragma omp for schedule(static)
        for (int64_t head = 0; head < heads; head++) {
            Task<Element> task = {sizes, tensors, s, head, 0, 0};
            if (task.reads())
                task.transpose_taps(task.first_q(), sizes.key_size, s.keys, s.taps_q);
            task.transpose_taps(task.first_k(), sizes.key_size, s.keys, s.taps_k);
            task.transpose_taps(task.first_v(), sizes.value_size, s.values, s.taps_v);
            for (; task.first < sizes.num_rows; task.first += ROWS) {
                task.count = std::min<int64_t>(ROWS, sizes.num_rows - task.first);
                task.run();
            }
        }
    }
}

}  // namespace

// Rows through a gated delta net; a source's slot is written by an earlier row. An end may be
// `memory` itself if only the first row continues that. element_bits: 32 f32, 16 fp16, -16 bf16.
// scratch: 64-byte aligned, of num_threads threads.
extern "C" void subspec_delta_net(const Sizes* sizes, const Tensors* tensors, int element_bits,
                                  float* scratch, int num_threads) {
    if (element_bits == 32) run<float>(*sizes, *tensors, scratch, num_threads);
    else if (element_bits == 16) run<Fp16>(*sizes, *tensors, scratch, num_threads);
    else run<Bf16>(*sizes, *tensors, scratch, num_threads);
}
