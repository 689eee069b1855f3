// Exact FP8 weights, and their residuals in both directions, for CPUs: the compiled twin of fp8.py
// and fp8_residual.py, whose first pages specify the formats. fp8_cpu.py builds this file and calls
// its last four functions.
//
// A row of a tile (64 weights) is worked on at a time. What a window consists of fits bytes, so the
// windows of a row's 16 codes are tables of 16 bytes, looked up 16 weights at a time. Widths follow
// from codes, qparams and scales alone and are bounded for any values of these, so nothing that a
// stream holds can lead outside of the arrays; whether its length was right is one comparison at the
// end of a tile. The loops are written for the compiler to vectorise.
#include <cmath>

#include "tiles.hpp"
#if !defined(PORTABLE) && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512VBMI__) && defined(__AVX512CD__) && defined(__AVX512DQ__)
#define VECTOR_PATH
#endif
#if defined(__SSSE3__)
#include <immintrin.h>
#endif

namespace {

constexpr int RADIX = 4, NUMBERS = TILE_COLUMNS / RADIX;  // of a row
constexpr int KEPT = 31;  // magnitudes of each sign in a window
constexpr int MOST_BIT_WORDS = (1 + TILE_WEIGHTS / RADIX * 24 + 31) / 32;
constexpr int MOST_WORDS = MOST_BIT_WORDS + TILE_WEIGHTS / 4;  // 897; fp8_cpu.py knows it too

// f32 [.., columns] of the whole matrix; a block has `rows` rows and `groups` groups.
struct Scales {
    const float* values;
    int64_t columns, rows, groups, first_row;
    float at(int64_t group, int64_t row) const {
        return values[(first_row + row) / rows * columns + group / groups];
    }
};

inline int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline int32_t select(bool first, int32_t one, int32_t other) {  // a branch is not vectorised
    const int32_t mask = -(int32_t)first;
    return (one & mask) | (other & ~mask);
}

// ---- windows ------------------------------------------------------------------------------------

// _ends of fp8_residual.py for one step (code - 8.5); x is never -0.
inline int32_t end_at(float step, float scale, float zero_point, float r) {
    const int32_t bits = bits_of((step * scale + zero_point) * r);
    const int32_t magnitude = bits & 0x7fffffff, below = bits >> 31;
    // In steps of 2^-9, at most 8: above zero the ceiling, which is one more than the floor of the
    // next smaller number; below zero the floor.
    const int32_t steps = bits_of(float_of(std::min(magnitude, 121 << 23)) * 512);
    const int32_t up = std::min(steps, 1) & ~below;
    const int32_t tiny = (int32_t)float_of(steps - up) + up;
    const int32_t above_bias = magnitude - (120 << 23) + (0xfffff & ~below);
    const int32_t normal = std::min(above_bias >> 20, 127 + below);
    return std::max(tiny, normal) ^ below;  // of numbers below 2^-6 `tiny` is larger, else not
}

#ifdef VECTOR_PATH
// end_at for sixteen steps.
inline __m512i ends_at(__m512 step, float scale, float zero_point, float r) {
    const __m512 product = _mm512_mul_ps(step, _mm512_set1_ps(scale));  // exact
    const __m512 sum = _mm512_add_ps(product, _mm512_set1_ps(zero_point));
    const __m512 x = _mm512_mul_ps(sum, _mm512_set1_ps(r)), magnitude = _mm512_abs_ps(x);
    const __mmask16 below = _mm512_movepi32_mask(_mm512_castps_si512(x));
    const __mmask16 is_tiny = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
    const __m512i bias = _mm512_mask_blend_epi32(below, _mm512_set1_epi32(0xfffff - (120 << 23)),
                                                 _mm512_set1_epi32(-(120 << 23)));
    const __m512i largest =
        _mm512_mask_blend_epi32(below, _mm512_set1_epi32(127), _mm512_set1_epi32(126));
    __m512i end = _mm512_add_epi32(_mm512_castps_si512(magnitude), bias);
    end = _mm512_min_epi32(_mm512_srai_epi32(end, 20), largest);
    const __m512 steps = _mm512_mul_ps(magnitude, _mm512_set1_ps(512));
    const __m512i down = _mm512_cvttps_epi32(steps);
    const __m512i up = _mm512_cvt_roundps_epi32(steps, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    end = _mm512_mask_mov_epi32(end, is_tiny, _mm512_mask_blend_epi32(below, up, down));
    return _mm512_mask_xor_epi32(end, below, end, _mm512_set1_epi32(-1));
}
#endif

// ends [17]: where the windows of the 16 codes begin, and where the last one ends; each ends where
// the next one begins.
inline void fill_ends(float scale, float zero_point, float fp8_scale, int32_t* ends) {
    const float r = fp8_scale >= 0x1p-50f && fp8_scale <= 0x1p50f ? 1 / fp8_scale : 1;
#ifdef VECTOR_PATH
    const __m512 code = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 step = _mm512_sub_ps(code, _mm512_set1_ps(8.5f));
    _mm512_storeu_si512(ends, ends_at(step, scale, zero_point, r));
#else
    for (int c = 0; c < 16; c++) ends[c] = end_at((float)c - 8.5f, scale, zero_point, r);
#endif
    ends[16] = end_at(7.5f, scale, zero_point, r);
}

constexpr int32_t IS_END[16] = {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};  // of the codes

// The windows of the 16 codes of a row. An entry from `both` on is the escape, if there is one.
struct alignas(16) Table {
    uint8_t floor[16], positive[16], both[16], is_cut[16];

    void fill(float scale, float zero_point, float fp8_scale) {
        int32_t ends[17];
        fill_ends(scale, zero_point, fp8_scale, ends);
        alignas(64) int32_t floors[16], positives[16], boths[16], cut[16];
        for (int c = 0; c < 16; c++) {
            const int32_t low = ends[c], high = ends[c + 1];
            const int32_t bottom = std::max(std::max(low, -high), 0);
            const int32_t kept = std::max(bottom, std::max(high, -low) - KEPT);
            const int32_t above = std::max(high - kept, 0);
            floors[c] = kept;
            positives[c] = above;
            boths[c] = above + std::max(-low - kept, 0);
            cut[c] = kept > bottom | IS_END[c];
        }
        for (int c = 0; c < 16; c++) floor[c] = (uint8_t)floors[c];
        for (int c = 0; c < 16; c++) positive[c] = (uint8_t)positives[c];
        for (int c = 0; c < 16; c++) both[c] = (uint8_t)boths[c];
        for (int c = 0; c < 16; c++) is_cut[c] = (uint8_t)cut[c];
    }
};

// What a table says about 64 codes. (Written in the vectors that are read next: a processor waits
// for a load that spans several recent stores.)
inline void look_up(const uint8_t* table, const uint8_t* codes, uint8_t* out) {
#if defined(__AVX512BW__)
    const __m512i all = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table));
    _mm512_store_si512(out, _mm512_shuffle_epi8(all, _mm512_load_si512(codes)));
#elif defined(__AVX2__)
    const __m256i all = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
    for (int i = 0; i < TILE_COLUMNS / 32; i++) {
        const __m256i pick = _mm256_load_si256((const __m256i*)codes + i);
        _mm256_store_si256((__m256i*)out + i, _mm256_shuffle_epi8(all, pick));
    }
#elif defined(__SSSE3__)
    const __m128i all = _mm_load_si128((const __m128i*)table);
    for (int i = 0; i < TILE_COLUMNS / 16; i++) {
        const __m128i pick = _mm_load_si128((const __m128i*)codes + i);
        _mm_store_si128((__m128i*)out + i, _mm_shuffle_epi8(all, pick));
    }
#else
    for (int i = 0; i < TILE_COLUMNS; i++) out[i] = table[codes[i]];
#endif
}

// One row of a tile: the windows of its weights, and the sizes and widths of the numbers that hold
// their entries.
struct Row {
    alignas(64) uint8_t floor[TILE_COLUMNS], positive[TILE_COLUMNS], both[TILE_COLUMNS];
    alignas(64) uint8_t size[TILE_COLUMNS], is_cut[TILE_COLUMNS];
    alignas(64) int32_t pair[NUMBERS];  // the product of the first two sizes of a number
    alignas(64) int32_t width[NUMBERS];  // its bits

    void fill(const uint8_t* codes, const Table& table, bool everywhere) {
        look_up(table.floor, codes, floor);
        look_up(table.positive, codes, positive);
        look_up(table.both, codes, both);
        look_up(table.is_cut, codes, is_cut);
        for (int i = 0; i < TILE_COLUMNS; i++)
            size[i] = std::max<uint8_t>(both[i] + (is_cut[i] | (uint8_t)everywhere), 1);
#ifdef VECTOR_PATH
        const __m512i sizes = _mm512_load_si512(size), byte = _mm512_set1_epi16(255);
        const __m512i pairs = _mm512_mullo_epi16(_mm512_and_si512(sizes, byte),
                                                 _mm512_srli_epi16(sizes, 8));
        const __m512i first = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff));
        __m512i most = _mm512_mullo_epi32(first, _mm512_srli_epi32(pairs, 16));
        most = _mm512_sub_epi32(most, _mm512_set1_epi32(1));
        _mm512_store_si512(pair, first);
        _mm512_store_si512(width, _mm512_sub_epi32(_mm512_set1_epi32(32), _mm512_lzcnt_epi32(most)));
#else
        for (int n = 0; n < NUMBERS; n++) {
            uint32_t four;
            memcpy(&four, size + RADIX * n, 4);
            pair[n] = (four & 255) * (four >> 8 & 255);
            const float most = (float)(int32_t)(pair[n] * ((four >> 16 & 255) * (four >> 24)) - 1);
            width[n] = std::max((bits_of(most) >> 23) - 126, 0);  // below 2^24: exact
        }
#endif
    }
};

inline uint64_t mask_of(const uint8_t* flags) {  // [64] of 0 or 255
    uint64_t mask = 0;
#if defined(__SSE2__)
    for (int i = 0; i < TILE_COLUMNS / 16; i++) {
        const __m128i some = _mm_load_si128((const __m128i*)flags + i);
        mask |= (uint64_t)(uint32_t)_mm_movemask_epi8(some) << 16 * i;
    }
#else
    for (int i = 0; i < TILE_COLUMNS; i++) mask |= (uint64_t)(flags[i] & 1) << i;
#endif
    return mask;
}

// ---- decoding -----------------------------------------------------------------------------------

// The numbers of a row, whose bits begin at `offset`, which moves behind them.
inline void fetch(const Row& row, const uint8_t* bits, uint64_t& offset, int32_t* number) {
#ifdef VECTOR_PATH
    const __m512i width = _mm512_load_si512(row.width), none = _mm512_setzero_si512();
    __m512i end = _mm512_add_epi32(width, _mm512_alignr_epi32(width, none, 15));  // running sums
    end = _mm512_add_epi32(end, _mm512_alignr_epi32(end, none, 14));
    end = _mm512_add_epi32(end, _mm512_alignr_epi32(end, none, 12));
    end = _mm512_add_epi32(end, _mm512_alignr_epi32(end, none, 8));
    end = _mm512_add_epi32(end, _mm512_set1_epi32((int)(offset % 8)));
    const __m512i begin = _mm512_sub_epi32(end, width);
    const __m512i near = _mm512_loadu_si512(bits + offset / 8);  // a row takes at most 49 bytes
    const __m512i first_byte = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    __m512i byte = _mm512_shuffle_epi8(_mm512_srli_epi32(begin, 3), first_byte);
    byte = _mm512_add_epi8(byte, _mm512_set1_epi32(0x03020100));  // 7 + 24 bits are in four bytes
    __m512i value = _mm512_permutexvar_epi8(byte, near);
    value = _mm512_srlv_epi32(value, _mm512_and_si512(begin, _mm512_set1_epi32(7)));
    value = _mm512_andnot_si512(_mm512_sllv_epi32(_mm512_set1_epi32(-1), width), value);
    _mm512_store_si512(number, value);
    const __m512i last = _mm512_permutexvar_epi32(_mm512_set1_epi32(15), end);
    offset += _mm_cvtsi128_si32(_mm512_castsi512_si128(last)) - offset % 8;
#else
    for (int n = 0; n < NUMBERS; n++) {
        uint32_t value;
        memcpy(&value, bits + offset / 8, 4);
        number[n] = (int32_t)(value >> offset % 8 & ((1u << row.width[n]) - 1));
        offset += row.width[n];
    }
#endif
}

// The numbers of a row, split into its FP8 codes -> mask of those that are escaped.
inline uint64_t split(const Row& row, const int32_t* number, uint8_t* out) {
#ifdef VECTOR_PATH  // as below, sixteen numbers at a time
    const auto whole = [](__m512 x) {
        return _mm512_roundscale_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    };
    const __m512 pair = _mm512_cvtepi32_ps(_mm512_load_si512(row.pair));
    const __m512 number_of = _mm512_cvtepi32_ps(_mm512_load_si512(number));
    __m512 upper = whole(_mm512_div_ps(number_of, pair));
    __m512 lower = _mm512_fnmadd_ps(upper, pair, number_of);
    const __mmask16 over = _mm512_cmp_ps_mask(lower, _mm512_setzero_ps(), _CMP_LT_OQ);
    upper = _mm512_mask_sub_ps(upper, over, upper, _mm512_set1_ps(1));
    lower = _mm512_mask_add_ps(lower, over, lower, pair);
    const __m512i sizes = _mm512_load_si512(row.size), byte = _mm512_set1_epi32(255);
    const __m512 n0 = _mm512_cvtepi32_ps(_mm512_and_si512(sizes, byte));
    const __m512 n2 = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(sizes, 16), byte));
    const __m512 half = _mm512_set1_ps(0.5f);
    const __m512 e1 = whole(_mm512_div_ps(_mm512_add_ps(lower, half), n0));
    const __m512 e3 = whole(_mm512_div_ps(_mm512_add_ps(upper, half), n2));
    // e1 << 8 | e0 is below 2^24, so one sum in floats joins them.
    const __m512 e0 = _mm512_fnmadd_ps(e1, n0, lower), e2 = _mm512_fnmadd_ps(e3, n2, upper);
    const __m512 high = _mm512_set1_ps(256);
    const __m512i first = _mm512_cvttps_epi32(_mm512_fmadd_ps(e1, high, e0));
    const __m512i last = _mm512_cvttps_epi32(_mm512_fmadd_ps(e3, high, e2));
    const __m512i entries = _mm512_or_si512(first, _mm512_slli_epi32(last, 16));
    const __m512i positives = _mm512_load_si512(row.positive);
    const __mmask64 negative = _mm512_cmpge_epu8_mask(entries, positives);
    const __m512i code = _mm512_add_epi8(_mm512_load_si512(row.floor), entries);
    const __m512i sign = _mm512_sub_epi8(_mm512_set1_epi8((char)128), positives);
    _mm512_store_si512(out, _mm512_mask_add_epi8(code, negative, code, sign));
    return _mm512_cmpge_epu8_mask(entries, _mm512_load_si512(row.both));
#else
    alignas(64) uint8_t entry[TILE_COLUMNS], escaped[TILE_COLUMNS];
    for (int n = 0; n < NUMBERS; n++) {
        uint32_t four;
        memcpy(&four, row.size + RADIX * n, 4);
        const float n0 = (float)(int32_t)(four & 255), n2 = (float)(int32_t)(four >> 16 & 255);
        const float pair = (float)row.pair[n], whole = (float)number[n];  // below 2^24: exact
        // The quotient may be rounded up to the next integer; the sign of what is left tells.
        float upper = (float)(int32_t)(whole / pair), lower = whole - upper * pair;
        const float over = lower < 0 ? 1.0f : 0.0f;
        upper -= over;
        lower += over * pair;
        // Below 2^13, (x + 1/2) / n is too far from any integer for rounding to matter.
        const int32_t e1 = (int32_t)((lower + 0.5f) / n0), e3 = (int32_t)((upper + 0.5f) / n2);
        const int32_t e0 = (int32_t)(lower - (float)e1 * n0), e2 = (int32_t)(upper - (float)e3 * n2);
        const uint32_t all = e0 | e1 << 8 | e2 << 16 | (uint32_t)e3 << 24;
        memcpy(entry + RADIX * n, &all, 4);
    }
    for (int i = 0; i < TILE_COLUMNS; i++) {
        const uint8_t negative = entry[i] >= row.positive[i] ? 255 : 0;
        out[i] = row.floor[i] + entry[i] + (negative & (128 - row.positive[i]));
        escaped[i] = entry[i] >= row.both[i] ? 255 : 0;
    }
    return mask_of(escaped);
#endif
}

// words [MOST_WORDS + BEYOND_WORDS], the tile's first -> was num_words the number of these?
bool decode_tile(const uint8_t* codes, const Grid& qparams, const Scales& scales, int64_t group,
                 int64_t first_row, const uint32_t* words, int64_t num_words, uint8_t* out) {
    if (num_words < 1) return false;
    const bool everywhere = words[0] & 1;
    uint64_t escaped[TILE_ROWS], offset = 1;
    Row rows[TILE_ROWS];
    alignas(64) int32_t numbers[TILE_ROWS][NUMBERS];
    // Short loops: the steps of one row wait for each other, those of different rows do not, and the
    // processor overlaps what is close together.
    for (int r = 0; r < TILE_ROWS; r++) {
        Table table;
        table.fill(qparams.scale(group, first_row + r), qparams.zero_point(group, first_row + r),
                   scales.at(group, first_row + r));
        rows[r].fill(codes + r * TILE_COLUMNS, table, everywhere);
    }
    for (int r = 0; r < TILE_ROWS; r++)
        fetch(rows[r], (const uint8_t*)words, offset, numbers[r]);
    for (int r = 0; r < TILE_ROWS; r++)
        escaped[r] = split(rows[r], numbers[r], out + r * TILE_COLUMNS);
    const int64_t bit_words = (offset + 31) / 32;
    const uint8_t* stored = (const uint8_t*)(words + bit_words);
    int num_escapes = 0;
    for (int r = 0; r < TILE_ROWS; r++)
        for (uint64_t mask = escaped[r]; mask; mask &= mask - 1)
            out[r * TILE_COLUMNS + __builtin_ctzll(mask)] = stored[num_escapes++];
    return bit_words + (num_escapes + 3) / 4 == num_words;
}

// ---- encoding -----------------------------------------------------------------------------------

// The codes of a row whose windows hold its weights: how many windows begin at or below each.
inline void choose_codes(const uint8_t* weight, const int32_t* ends, uint8_t* out) {
    alignas(64) int8_t ordinal[TILE_COLUMNS];
    alignas(64) uint8_t code[TILE_COLUMNS] = {};
    for (int i = 0; i < TILE_COLUMNS; i++)
        ordinal[i] = (int8_t)(weight[i] ^ (uint8_t)(-(weight[i] >> 7) & 127));
    for (int c = 1; c < 16; c++) {
        const int8_t end = (int8_t)ends[c];
        for (int i = 0; i < TILE_COLUMNS; i++) code[i] += ordinal[i] >= end;
    }
    for (int i = 0; i < TILE_COLUMNS / 2; i++) out[i] = code[2 * i] | code[2 * i + 1] << 4;
}

// The entries of a row's FP8 codes; outside: 255 where one is escaped.
inline void enter(const Row& row, const uint8_t* weight, uint8_t* entry, uint8_t* outside) {
    for (int i = 0; i < TILE_COLUMNS; i++) {
        const uint8_t negative = (uint8_t)-(weight[i] >> 7), positives = row.positive[i];
        const uint8_t distance = (weight[i] & 127) - row.floor[i];  // below the floor it is large
        const uint8_t others = row.both[i] - positives;
        const uint8_t count = (others & negative) | (positives & ~negative);
        outside[i] = distance >= count ? 255 : 0;
        const uint8_t inside = distance + (negative & positives);
        entry[i] = (row.both[i] & outside[i]) | (inside & ~outside[i]);
    }
}

// weight: FP8 codes [32][64] -> words [MOST_WORDS + BEYOND_WORDS]; returns how many are the tile's.
int64_t encode_tile(const uint8_t* codes, const Grid& qparams, const Scales& scales, int64_t group,
                    int64_t first_row, const uint8_t* weight, uint32_t* words) {
    Table tables[TILE_ROWS];
    Row rows[TILE_ROWS];
    alignas(64) uint8_t entries[TILE_ROWS][TILE_COLUMNS];
    uint64_t escaped[TILE_ROWS];
    uint8_t everywhere = 0;
    for (int r = 0; r < TILE_ROWS; r++) {
        alignas(64) uint8_t outside[TILE_COLUMNS];
        tables[r].fill(qparams.scale(group, first_row + r), qparams.zero_point(group, first_row + r),
                       scales.at(group, first_row + r));
        rows[r].fill(codes + r * TILE_COLUMNS, tables[r], false);
        enter(rows[r], weight + r * TILE_COLUMNS, entries[r], outside);
        escaped[r] = mask_of(outside);
        for (int i = 0; i < TILE_COLUMNS; i++) everywhere |= outside[i] & (rows[r].is_cut[i] ^ 1);
    }
    uint64_t offset = 1, pending = everywhere;  // the bits from offset / 8 * 8 on
    for (int r = 0; r < TILE_ROWS; r++) {
        if (everywhere) rows[r].fill(codes + r * TILE_COLUMNS, tables[r], true);
        const Row& row = rows[r];
        alignas(64) int32_t number[NUMBERS];
        for (int n = 0; n < NUMBERS; n++) {
            uint32_t sizes, own;
            memcpy(&sizes, row.size + RADIX * n, 4);
            memcpy(&own, entries[r] + RADIX * n, 4);
            const int32_t lower = (own & 255) + (sizes & 255) * (own >> 8 & 255);
            const int32_t upper = (own >> 16 & 255) + (sizes >> 16 & 255) * (own >> 24);
            number[n] = lower + row.pair[n] * upper;
        }
        for (int n = 0; n < NUMBERS; n++) {
            pending |= (uint64_t)number[n] << offset % 8;
            memcpy((uint8_t*)words + offset / 8, &pending, 8);
            pending >>= (offset % 8 + row.width[n]) / 8 * 8;
            offset += row.width[n];
        }
    }
    memcpy((uint8_t*)words + offset / 8, &pending, 8);  // fills the last word
    const int64_t bit_words = (offset + 31) / 32;
    uint8_t* stored = (uint8_t*)(words + bit_words);
    int64_t num_escapes = 0;
    for (int r = 0; r < TILE_ROWS; r++)
        for (uint64_t mask = escaped[r]; mask; mask &= mask - 1)
            stored[num_escapes++] = weight[r * TILE_COLUMNS + __builtin_ctzll(mask)];
    while (num_escapes % 4) stored[num_escapes++] = 0;  // fills the last word here
    return bit_words + num_escapes / 4;
}

// ---- the exact weights --------------------------------------------------------------------------

// bf16(f32(code) * scale) for 64 codes, which are never NaN.
inline void widen_row(const uint8_t* codes, float scale, uint16_t* out) {
    for (int i = 0; i < TILE_COLUMNS; i++) {
        const int32_t m = codes[i] & 127, sign = codes[i] >> 7 << 15;
        const int32_t normal = (m << 20) + (120 << 23), tiny = bits_of((float)m * 0x1p-9f);
        const int32_t bits = bits_of(float_of(select(m < 8, tiny, normal)) * scale);
        out[i] = (uint16_t)((uint32_t)(bits + 0x7fff + (bits >> 16 & 1)) >> 16 ^ sign);
    }
}

}  // namespace

// weight: FP8 codes [rows, columns]; codes: nibble pairs; scales as in Scales; index [tiles + 1];
// payload [tiles * MOST_WORDS], which is filled from its beginning. Returns the number of words.
extern "C" int64_t subspec_fp8_encode(int64_t num_rows, int64_t num_columns, const uint8_t* weight,
                                      const uint8_t* codes, const uint16_t* qparams,
                                      int64_t group_stride, const float* values,
                                      int64_t scale_columns, int64_t block_rows,
                                      int64_t block_groups, int64_t first_row, int32_t* index,
                                      uint32_t* payload, int num_threads) {
    const Grid grid = {qparams, group_stride};
    const Scales scales = {values, scale_columns, block_rows, block_groups, first_row};
    const auto encode = [&](const uint8_t* of_tile, int64_t group, int64_t row, uint32_t* words) {
        alignas(64) uint8_t own[TILE_WEIGHTS];
        for (int r = 0; r < TILE_ROWS; r++)
            memcpy(own + r * TILE_COLUMNS, weight + (row + r) * num_columns + group * TILE_COLUMNS,
                   TILE_COLUMNS);
        return encode_tile(of_tile, grid, scales, group, row, own, words);
    };
    return encode_tiles<MOST_WORDS>(num_rows, num_columns, {codes, num_columns, 0}, index, payload,
                                    num_threads, encode);
}

// weight: FP8 codes [rows, columns] -> out: nibble pairs [rows, columns / 2], the 4-bit codes whose
// windows hold the weights.
extern "C" void subspec_fp8_choose(int64_t num_rows, int64_t num_columns, const uint8_t* weight,
                                   const uint16_t* qparams, int64_t group_stride,
                                   const float* values, int64_t scale_columns, int64_t block_rows,
                                   int64_t block_groups, int64_t first_row, uint8_t* out,
                                   int num_threads) {
    const Grid grid = {qparams, group_stride};
    const Scales scales = {values, scale_columns, block_rows, block_groups, first_row};
    const int64_t num_groups = num_columns / TILE_COLUMNS;
    const int threads = worth_it(num_rows / TILE_ROWS * num_groups, num_threads);
#pragma omp parallel for schedule(dynamic, BLOCKS_AT_ONCE) num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t group = 0; group < num_groups; group++) {
            const int64_t at = row * num_columns + group * TILE_COLUMNS;
            int32_t ends[17];
            fill_ends(grid.scale(group, row), grid.zero_point(group, row), scales.at(group, row),
                      ends);
            choose_codes(weight + at, ends, out + at / 2);
        }
}

// index: checked to rise from 0 to the words of payload. out: the exact weights in bf16, or their
// FP8 codes. Returns 0 if the words of every tile were right; otherwise what is in `out` has no
// meaning.
extern "C" int subspec_fp8_decode(int64_t num_rows, int64_t num_columns, const uint8_t* codes,
                                  int tile_rows, const uint16_t* qparams, int64_t group_stride,
                                  const float* values, int64_t scale_columns, int64_t block_rows,
                                  int64_t block_groups, int64_t first_row, const int32_t* index,
                                  const uint32_t* payload, void* out, int as_bf16,
                                  int num_threads) {
    const Grid grid = {qparams, group_stride};
    const Scales scales = {values, scale_columns, block_rows, block_groups, first_row};
    const auto decode = [&](const uint8_t* of_tile, int64_t group, int64_t row,
                            const uint32_t* words, int64_t num_words) {
        alignas(64) uint8_t own[TILE_WEIGHTS];
        const bool right = decode_tile(of_tile, grid, scales, group, row, words, num_words, own);
        for (int r = 0; r < TILE_ROWS; r++) {
            const int64_t at = (row + r) * num_columns + group * TILE_COLUMNS;
            const uint8_t* from = own + r * TILE_COLUMNS;
            if (!as_bf16) {
                write_through((uint8_t*)out + at, from, TILE_COLUMNS);
                continue;
            }
            alignas(64) uint16_t wide[TILE_COLUMNS];
            widen_row(from, scales.at(group, row + r), wide);
            write_through((uint16_t*)out + at, wide, 2 * TILE_COLUMNS);
        }
        return right;
    };
    return !decode_tiles<MOST_WORDS>(num_rows, num_columns, {codes, num_columns, tile_rows}, index,
                                     payload, num_threads, decode);
}

// codes: FP8 [rows, columns] -> out: the exact weights in bf16.
extern "C" void subspec_fp8_widen(int64_t num_rows, int64_t num_columns, const uint8_t* codes,
                                  const float* values, int64_t scale_columns, int64_t block_rows,
                                  int64_t block_groups, int64_t first_row, uint16_t* out,
                                  int num_threads) {
    const Scales scales = {values, scale_columns, block_rows, block_groups, first_row};
    const int64_t num_groups = num_columns / TILE_COLUMNS;
    const int threads = worth_it(num_rows / TILE_ROWS * num_groups, num_threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, BLOCKS_AT_ONCE) nowait
        for (int64_t row = 0; row < num_rows; row++)
            for (int64_t group = 0; group < num_groups; group++) {
                const int64_t at = row * num_columns + group * TILE_COLUMNS;
                alignas(64) uint16_t wide[TILE_COLUMNS];
                widen_row(codes + at, scales.at(group, row), wide);
                write_through(out + at, wide, 2 * TILE_COLUMNS);
            }
        finish_writes();
    }
}
