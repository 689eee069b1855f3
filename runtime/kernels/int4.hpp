// The inner kernels of 4-bit products: what int4.cpp and draft_layers.cpp share. The layouts are
// documented in int4.py.
//
// 16 rows of W lie in the lanes of a vector. The activations of a group of columns are rounded to
// 8-bit integers, and the products within a group are summed up as integers, which is exact; then
// the groups of a row follow each other in f32, for every row of x in the same way. So neither
// the other rows of x, nor the number of threads, nor the instruction set changes a bit of the
// result, provided that multiplications and additions are not contracted (-ffp-contract=off).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the codes are little-endian, and so must the machine be"
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK_ROWS = 16, GROUP_SIZE = 64;
constexpr int LINE_COLUMNS = 8, LINE_BYTES = 64;  // a line: the codes of a block in 8 columns
constexpr int LINES = GROUP_SIZE / LINE_COLUMNS;
constexpr int AHEAD = 2048;  // bytes; with few rows of x the processor itself looks ahead enough
constexpr int64_t WEIGHTS_PER_THREAD = 1 << 18;  // fewer are not worth waking a thread

// MOST_ROWS of x share what is read of W, as many as have their sums in registers.
#if defined(__AVX512VNNI__)
constexpr int LANES = 16, MOST_ROWS = 8;
#elif defined(__AVX2__)
constexpr int LANES = 8, MOST_ROWS = 4;
#else
constexpr int LANES = 4, MOST_ROWS = 4;
#endif
constexpr int PARTS = BLOCK_ROWS / LANES;
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Bits load(const void* from) {
    Bits x;
    memcpy(&x, from, sizeof x);
    return x;
}
inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline Halves rounded_to_bf16(Floats x) {
    const Bits bits = (Bits)x, nearest = bits + 0x7fff + (bits >> 16 & 1);
    return __builtin_convertvector((x == x ? nearest : Bits{} + 0x7fc00000) >> 16, Halves);
}

// sum + the products of 4 codes per lane, a byte each, with the 4 signed bytes of `values`.
inline Ints add_products(Ints sum, Bits codes, int32_t values) {
    const Ints x = values - Ints{};
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)x);  // at most 2 * 15 * 127
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else  // two products, at most 15 * 127 each, in 16 bits
    const Shorts first = (Shorts)(codes & 0xff00ff) * ((Shorts)(x << 8) >> 8);
    const Ints pairs = (Ints)(first + (Shorts)(codes >> 8 & 0xff00ff) * ((Shorts)x >> 8));
    return sum + (pairs << 16 >> 16) + (pairs >> 16);
#endif
}

// ---- activations --------------------------------------------------------------------------------

// One group of one row of x: x = value * scale.
struct Group {
    int8_t even[GROUP_SIZE / 2], odd[GROUP_SIZE / 2];  // columns: as the nibbles of W lie
    float scale, sum;
    int32_t start;  // -8 * sum: what codes - 8 add to the products of the codes
};

// from: bf16 [64]. _quantize of int4.py.
inline void quantize(const uint16_t* from, Group& group) {
    constexpr float SHIFT = 3 << 22;  // a float of this size keeps no fraction: adding it rounds
    uint32_t pairs[GROUP_SIZE / 2];
    memcpy(pairs, from, sizeof pairs);
    uint16_t most = 0;
    for (int i = 0; i < GROUP_SIZE; i++) most = std::max<uint16_t>(most, from[i] & 0x7fff);
    const float largest = as_float((uint32_t)most << 16);
    const bool finite = most < 0x7f80, zero = largest < 0x1p-100f;
    const float steps = finite && !zero ? 127 / largest : 0;
    int32_t sum = 0;
    for (int i = 0; i < GROUP_SIZE / 2; i++) {
        const float even = as_float(pairs[i] << 16), odd = as_float(pairs[i] & 0xffff0000);
        const int32_t of_even = (int32_t)(as_bits(even * steps + SHIFT) - as_bits(SHIFT));
        const int32_t of_odd = (int32_t)(as_bits(odd * steps + SHIFT) - as_bits(SHIFT));
        group.even[i] = (int8_t)of_even;
        group.odd[i] = (int8_t)of_odd;
        sum += of_even + of_odd;
    }
    group.scale = !finite ? as_float(0x7fc00000) : zero ? 0 : largest / 127;
    group.sum = (float)sum;
    group.start = -8 * sum;
}

// The groups of all rows of x as products read them: for each MOST_ROWS of them, or what is left,
// [groups, these rows].
struct Activations {
    int64_t num_rows, num_groups;
    Group* groups;

    Group& at(int64_t row, int64_t group) const {
        const int64_t first = row - row % MOST_ROWS;
        const int64_t together = std::min<int64_t>(MOST_ROWS, num_rows - first);
        return groups[first * num_groups + group * together + row - first];
    }
};

// ---- the product --------------------------------------------------------------------------------

struct Weight {
    int64_t num_rows, num_groups;
    const uint8_t* codes;  // [rows / 16, groups, 8 lines, 16 rows, 4]: even column, odd column << 4
    const uint16_t* qparams;  // bf16 [groups, rows, 2] of (scale, zero_point)
};

typedef Floats Block[MOST_ROWS][PARTS];  // rows of x, 16 rows of W

// out [ROWS, 16] = x [groups, ROWS] times a block of W.
template <int ROWS>
void multiply(const Group* x, const Weight& weight, int64_t block, Block& out) {
    const int64_t num_groups = weight.num_groups;
    const uint8_t* codes = weight.codes + block * num_groups * LINES * LINE_BYTES;
    const uint16_t* qparams = weight.qparams + block * BLOCK_ROWS * 2;
    Floats total[ROWS][PARTS] = {};
    for (int64_t g = 0; g < num_groups; g++, x += ROWS, qparams += weight.num_rows * 2) {
        __builtin_prefetch(qparams + BLOCK_ROWS * 2);  // of the next block: each lies elsewhere
        Ints sum[ROWS][PARTS];
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < PARTS; p++) sum[r][p] = Ints{} + x[r].start;
#pragma GCC unroll 8
        for (int i = 0; i < LINES; i++, codes += LINE_BYTES) {
            if (ROWS > 2) __builtin_prefetch(codes + AHEAD);
            for (int p = 0; p < PARTS; p++) {
                const Bits both = load(codes + p * sizeof(Bits));
                const Bits even = both & 0x0f0f0f0f, odd = both >> 4 & 0x0f0f0f0f;
                for (int r = 0; r < ROWS; r++) {
                    int32_t of_even, of_odd;
                    memcpy(&of_even, x[r].even + 4 * i, 4);
                    memcpy(&of_odd, x[r].odd + 4 * i, 4);
                    sum[r][p] = add_products(sum[r][p], even, of_even);
                    sum[r][p] = add_products(sum[r][p], odd, of_odd);
                }
            }
        }
        for (int p = 0; p < PARTS; p++) {
            const Bits pairs = load(qparams + p * LANES * 2);
            const Floats scale = (Floats)(pairs << 16), zero_point = (Floats)(pairs & 0xffff0000);
            for (int r = 0; r < ROWS; r++) {
                const Floats steps = __builtin_convertvector(sum[r][p], Floats);
                total[r][p] += x[r].scale * (scale * steps + zero_point * x[r].sum);
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PARTS; p++) out[r][p] = total[r][p];
}

// Of the MOST_ROWS rows from `first` on, or of those that are left -> how many these are.
template <int ROWS = MOST_ROWS>
int multiply_rows(const Activations& x, int64_t first, const Weight& weight, int64_t block,
                  Block& out) {
    if constexpr (ROWS > 1)
        if (x.num_rows - first < ROWS)
            return multiply_rows<ROWS - 1>(x, first, weight, block, out);
    multiply<ROWS>(x.groups + first * x.num_groups, weight, block, out);
    return ROWS;
}

}  // namespace
