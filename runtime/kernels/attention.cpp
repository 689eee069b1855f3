// Attention over cache slots for few rows, on CPUs: what attend_in_order of attention.py, which
// builds this file and documents the property that it is made for, calls at the end.
//
// The query heads that share a KV head are folded: row r of T * (A / B) is row r % T of head r / T.
// LANES rows lie in the lanes of a vector, transposed, and see one slot after the other: one
// sequence of operations per lane, in ascending slot order. A slot that a lane does not see adds
// +0 to its sums, so it makes no difference whether it is there. Everything is f32.
// Multiplications and additions are fused where the instruction set has that for vectors, and
// with AVX512-BF16 the scores come from its products of pairs: the bits of a result depend on
// the instruction set that the file was built for, but on no other row or slot.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "elements.hpp"
#include "exponent.hpp"

namespace {

constexpr int DIMS = LANES == 16 ? 16 : 8;
constexpr int SLOTS = 8;   // whose scores, and DIMS of whose sums, are in registers together
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 18;  // fewer are not worth waking a thread
typedef uint32_t Pair __attribute__((may_alias, aligned(2)));  // of bf16 values

inline Floats fused(Floats x, float y, Floats sum) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)x, _mm512_set1_ps(y), (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)x, _mm256_set1_ps(y), (__m256)sum);
#else
    return x * y + sum;
#endif
}

// ---- one block of LANES rows --------------------------------------------------------------------

struct Call {
    int64_t num_heads, num_kv_heads, num_rows, num_slots, head_size;
    double scale;  // of the scores
    const uint8_t* visible;  // [T, S], 0 or 1
    const uint8_t* seen;     // [S], by any row

    int64_t repeats() const { return num_heads / num_kv_heads; }
    int64_t group_rows() const { return repeats() * num_rows; }
    int64_t slots() const { return (num_slots + PIECE - 1) / PIECE * PIECE; }
    int64_t dims() const { return (head_size + PIECE - 1) / PIECE * PIECE; }
};

// Of one thread; its size is that of attention_scratch_bytes in footprint.py.
struct Scratch {
    float* keys;      // [S, D] of one KV head, where they cannot be used as they are
    float* values;    // [D / PIECE, S, PIECE] of one KV head
    float* scores;    // [S, LANES]: of the seen slots only, one after the other, then their weights
    float* queries;   // [D, LANES], then the output
    int32_t* slots;   // [S]: the slots that any lane sees, ascending
    uint32_t* lanes;  // [S]: a bit for each lane that sees that slot
    bool finite;      // no value is infinite or NaN

    Scratch(const Call& call, float* from, int index) {
        const int64_t slots_ = call.slots(), dims = call.dims();
        keys = from + index * (slots_ * (2 * dims + PIECE + 2) + dims * PIECE);
        values = keys + slots_ * dims;
        scores = values + slots_ * dims;
        queries = scores + slots_ * PIECE;
        slots = (int32_t*)(queries + dims * PIECE);
        lanes = (uint32_t*)(slots + slots_);
    }
};

// Which slots the rows of a block see -> how many. Padded to whole SLOTS with one that none sees.
int64_t list_slots(const Call& call, int64_t first, int64_t count, const Scratch& s) {
    memset(s.lanes, 0, call.num_slots * sizeof *s.lanes);
    for (int64_t lane = 0; lane < count; lane++) {
        const uint8_t* visible = call.visible + (first + lane) % call.num_rows * call.num_slots;
        for (int64_t i = 0; i < call.num_slots; i++) s.lanes[i] |= (uint32_t)visible[i] << lane;
    }
    int64_t num = 0;
    for (int64_t i = 0; i < call.num_slots; i++) {
        const uint32_t lanes = s.lanes[i];
        s.slots[num] = (int32_t)i;
        s.lanes[num] = lanes;
        num += lanes != 0;
    }
    for (; num % SLOTS; num++) {
        s.slots[num] = s.slots[num - 1];
        s.lanes[num] = 0;
    }
    return num;
}

inline Ints sees(uint32_t lanes) {
    Bits bit;
    for (int i = 0; i < LANES; i++) bit[i] = 1u << i;
    return (Ints)((lanes & bit) != 0);
}

inline Floats add_product(Floats sum, const float* x, float y) { return fused(load(x), y, sum); }
#ifdef __AVX512BF16__
inline Floats add_product(Floats sum, const Pair* x, Pair y) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load(x), (__m512bh)_mm512_set1_epi32(y));
}
#endif

// s.scores = log2(e) * scale * q k, -inf where a lane does not see -> the largest of each lane.
// queries: [length, LANES]; keys: [S, length], their rows `stride` apart.
template <class Entry>
Floats score(const Call& call, const Entry* queries, const Entry* keys, int64_t stride,
             int64_t length, int64_t num, const Scratch& s) {
    const float scale = (float)(1.4426950408889634 * call.scale);
    Floats most = Floats{} - 0x1.fffffep127f;
    for (int64_t i = 0; i < num; i += SLOTS) {
        const Entry* k[SLOTS];
        for (int j = 0; j < SLOTS; j++) k[j] = keys + s.slots[i + j] * stride;
        Floats sum[SLOTS] = {};
        for (int64_t e = 0; e < length; e++)
            for (int j = 0; j < SLOTS; j++)
                sum[j] = add_product(sum[j], queries + e * LANES, k[j][e]);
        for (int j = 0; j < SLOTS; j++) {
            const Floats x = sees(s.lanes[i + j]) ? sum[j] * scale : Floats{} - INFINITY;
            store(s.scores + (i + j) * LANES, x);
            most = x > most ? x : most;
        }
    }
    return most;
}

// s.scores become weights -> their sum, 0 in a lane that sees nothing.
Floats weigh(Floats most, int64_t num, const Scratch& s) {
    Floats total = {};
    for (int64_t i = 0; i < num; i++) {
        const Floats weight = power_of_two<Bits>(load(s.scores + i * LANES) - most);
        store(s.scores + i * LANES, weight);
        total += weight;
    }
    return total;
}

// s.queries = the mean of the values, as elements in lanes. FINITE: 0 times any value is 0.
template <class Element, bool FINITE>
void average(const Call& call, Floats total, int64_t num, const Scratch& s) {
    const Floats divisor = total == 0 ? Floats{} + 1 : total;
    for (int64_t d = 0; d < call.head_size; d += DIMS) {
        const float* values = s.values + d / PIECE * call.slots() * PIECE + d % PIECE;
        Floats sum[DIMS] = {};
        for (int64_t i = 0; i < num; i++) {
            const Floats weight = load(s.scores + i * LANES);
            const float* value = values + s.slots[i] * PIECE;
            const Ints seen = FINITE ? Ints{} : sees(s.lanes[i]);
            for (int j = 0; j < DIMS; j++) {
                const Floats next = fused(weight, value[j], sum[j]);
                sum[j] = FINITE || seen ? next : sum[j];
            }
        }
        for (int j = 0; j < DIMS; j++) {  // -0 + 0: what one more hidden slot would make of it
            const Bits result = narrow((sum[j] + 0.0f) / divisor, Element{});
            store(s.queries + (d + j) * LANES, (Floats)result);
        }
    }
}

// ---- one KV head --------------------------------------------------------------------------------

template <class Element>
struct Tensors {
    const Element* q;  // [A, T, D]
    int64_t q_head, q_row;
    const Element* keys;  // [B, S, D]
    int64_t keys_head;
    const Element* values;  // [B, S, D]
    int64_t values_head;
    Element* out;  // [A, T, D]
    int64_t out_head, out_row;
};

template <class Element>
constexpr bool IN_PAIRS = false;
#ifdef __AVX512BF16__
template <>
constexpr bool IN_PAIRS<Bf16> = true;
#endif
template <class Element>
constexpr bool WIDENS_KEYS = !IN_PAIRS<Element> && sizeof(Element) < sizeof(float);

template <class Element>
void widen_head(const Call& call, const Element* keys, const Element* values, Scratch& s) {
    const int64_t size = call.head_size, dims = call.dims();
    Ints found = {};
    for (int64_t i = 0; i < call.num_slots; i++, keys += size, values += size) {
        if (!call.seen[i]) continue;
        for (int64_t d = 0; d < dims; d += PIECE) {
            const size_t count = std::min<int64_t>(PIECE, size - d);
            float* to = s.values + (d / PIECE * call.slots() + i) * PIECE;
            const Elements<Element> some(values + d, count);
            for (int j = 0; j < PIECE; j += LANES) {
                const Floats x = widen(some.x + j);
                store(to + j, x);
                found |= (Ints)(((Bits)x & MAGNITUDE) >= INFINITE);
            }
            if (!WIDENS_KEYS<Element>) continue;
            const Elements<Element> some_keys(keys + d, count);
            for (int j = 0; j < PIECE; j += LANES)
                store(s.keys + i * dims + d + j, widen(some_keys.x + j));
        }
    }
    s.finite = true;
    for (int i = 0; i < LANES; i++) s.finite &= !found[i];
}

// to = the queries of `count` rows, 0 in the other lanes: float [D, LANES] or Pair [D / 2, LANES].
template <class Entry, class Element>
void transpose_queries(const Call& call, const Tensors<Element>& t, int64_t kv_head, int64_t first,
                       int64_t count, Entry* to) {
    const int64_t size = call.head_size, first_head = kv_head * call.repeats();
    memset(to, 0, call.dims() * LANES * sizeof(Entry));
    for (int64_t lane = 0; lane < count; lane++) {
        const int64_t row = first + lane, head = first_head + row / call.num_rows;
        const Element* q = t.q + head * t.q_head + row % call.num_rows * t.q_row;
        if constexpr (IN_PAIRS<Element>) {
            for (int64_t e = 0; e < size / 2; e++) to[e * LANES + lane] = ((const Pair*)q)[e];
        } else {
            for (int64_t d = 0; d < size; d += PIECE) {
                const Elements<Element> some(q + d, std::min<int64_t>(PIECE, size - d));
                float wide[PIECE];
                for (int j = 0; j < PIECE; j += LANES) store(wide + j, widen(some.x + j));
                for (int j = 0; j < PIECE; j++) to[(d + j) * LANES + lane] = wide[j];
            }
        }
    }
}

template <class Element>
void store_rows(const Call& call, const Tensors<Element>& t, int64_t kv_head, int64_t first,
                int64_t count, const float* from) {
    const int64_t first_head = kv_head * call.repeats();
    for (int64_t lane = 0; lane < count; lane++) {
        const int64_t row = first + lane, head = first_head + row / call.num_rows;
        Element* out = t.out + head * t.out_head + row % call.num_rows * t.out_row;
        for (int64_t d = 0; d < call.head_size; d++)
            memcpy(out + d, from + d * LANES + lane, sizeof(Element));  // the lower bits
    }
}

template <class Element>
void attend_block(const Call& call, const Tensors<Element>& t, int64_t kv_head, int64_t first,
                  const Scratch& s) {
    const int64_t size = call.head_size;
    const int64_t count = std::min<int64_t>(LANES, call.group_rows() - first);
    const int64_t num = list_slots(call, first, count, s);
    const Element* keys = t.keys + kv_head * t.keys_head;
    Floats most;
    if constexpr (IN_PAIRS<Element>) {
        Pair* queries = (Pair*)s.queries;
        transpose_queries(call, t, kv_head, first, count, queries);
        most = score(call, queries, (const Pair*)keys, size / 2, size / 2, num, s);
    } else {
        transpose_queries(call, t, kv_head, first, count, s.queries);
        const float* const queries = s.queries;
        if constexpr (WIDENS_KEYS<Element>)
            most = score(call, queries, (const float*)s.keys, call.dims(), size, num, s);
        else most = score(call, queries, keys, size, size, num, s);
    }
    const Floats total = weigh(most, num, s);
    if (s.finite) average<Element, true>(call, total, num, s);
    else average<Element, false>(call, total, num, s);
    store_rows(call, t, kv_head, first, count, s.queries);
}

template <class Element>
void attend(const Call& call, const Tensors<Element>& t, float* scratch, int num_threads) {
    const int64_t products = call.num_heads * call.num_rows * call.num_slots * call.head_size;
    const int64_t worth = std::max<int64_t>(1, products / PRODUCTS_PER_THREAD);
    const int threads = (int)std::min<int64_t>(num_threads, worth);
    const int64_t blocks = (call.group_rows() + LANES - 1) / LANES;
    const bool even = call.num_kv_heads % threads == 0;
    const int64_t shares = even ? 1 : std::min<int64_t>(threads, blocks);  // of the rows of a head
#pragma omp parallel num_threads(threads)
    {
        Scratch s(call, scratch, omp_get_thread_num());
        int64_t held = -1;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < call.num_kv_heads * shares; item++) {
            const int64_t kv_head = item / shares, share = item % shares;
            if (held != kv_head)
                widen_head(call, t.keys + kv_head * t.keys_head, t.values + kv_head * t.values_head,
                           s);
            held = kv_head;
            for (int64_t block = blocks * share / shares; block < blocks * (share + 1) / shares;
                 block++)
                attend_block(call, t, kv_head, block * LANES, s);
        }
    }
}

}  // namespace

// q, out [A, T, D], keys, values [B, S, D]: elements of element_bits: 32 f32, 16 fp16, -16 bf16.
// Strides in elements: of q and out over heads and rows, of keys and values over heads; all rows
// are contiguous, and so are the slots of a head. visible [T, S], 0 or 1; scratch: 64-byte aligned.
extern "C" void subspec_attend(int64_t num_heads, int64_t num_kv_heads, int64_t num_rows,
                               int64_t num_slots, int64_t head_size, double scale, int element_bits,
                               const void* q, int64_t q_head, int64_t q_row, const void* keys,
                               int64_t keys_head, const void* values, int64_t values_head,
                               const uint8_t* visible, void* out, int64_t out_head, int64_t out_row,
                               void* scratch, int num_threads) {
    uint8_t* seen = (uint8_t*)scratch;
    Call call = {num_heads, num_kv_heads, num_rows, num_slots, head_size, scale, visible, seen};
    float* const rest = (float*)(seen + call.slots() * sizeof(float));
    memset(seen, 0, num_slots);
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t i = 0; i < num_slots; i++) seen[i] |= visible[row * num_slots + i];
    const auto run = [&](auto element) {
        using Element = decltype(element);
        attend<Element>(call,
                        {(const Element*)q, q_head, q_row, (const Element*)keys, keys_head,
                         (const Element*)values, values_head, (Element*)out, out_head, out_row},
                        rest, num_threads);
    };
    if (element_bits == 32) run(float{});
    else if (element_bits == 16) run(Fp16{});
    else run(Bf16{});
}
