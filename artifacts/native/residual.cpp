// The residual of exact weights, both directions, for CPUs: the compiled twin of residual.py, whose
// first page specifies the format. residual_cpu.py builds this file and calls its last two
// functions.
//
// A tile (32 x 64 weights) is worked on in small local arrays: its codes, its words and its 16-bit
// patterns are copied in or out as wholes. Widths follow from codes and qparams alone and are bounded
// for any values of these, so nothing that a stream holds can lead outside of the arrays; whether
// its length was right is one comparison at the end of a tile. The loops are written for the
// compiler to vectorise; with AVX-512, bf16 and f32 are decoded by a path in intrinsics.
#include "tiles.hpp"
#if !defined(PORTABLE) && defined(__AVX512F__) && defined(__AVX512DQ__) && \
    defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__BMI2__)
#define VECTOR_PATH
#include <immintrin.h>
#endif

namespace {

constexpr int BINADES = 6;
constexpr int MOST_BIT_WORDS = TILE_WEIGHTS * 14 / 32;  // fp16: two weights in at most 28 bits
constexpr int MOST_WORDS = MOST_BIT_WORDS + TILE_WEIGHTS / 2;  // 1920; residual_cpu.py knows it too

struct BFloat16 {
    static constexpr int FRACTION_BITS = 7, RADIX = 4;  // RADIX weights share one number
    using Real = float;  // holds the product of two window sizes exactly
    using Codes = uint32_t;  // one byte per weight of a number
};
struct Float16 {
    static constexpr int FRACTION_BITS = 10, RADIX = 2;
    using Real = double;
    using Codes = uint16_t;
};

// ---- windows ------------------------------------------------------------------------------------

// An end of an interval as a sign and a 15-bit magnitude: _magnitude of residual.py.
template <class Format> inline int16_t narrowed(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    if (Format::FRACTION_BITS == 7) return (int16_t)(bits >> 16);
    const int32_t magnitude = std::max((bits & 0x7fffffff) - (112 << 23), 0) >> 13;
    return (int16_t)(std::min(magnitude, 0x7bff) | (bits >> 31 & 0x8000));
}
template <class Format> inline int16_t low_end(int32_t code, float scale, float zero_point) {
    return narrowed<Format>(((float)code - 8.5f) * scale + zero_point);
}
template <class Format> inline int16_t high_end(int32_t code, float scale, float zero_point) {
    return narrowed<Format>(((float)code - 7.5f) * scale + zero_point);
}

// _windows of residual.py, shorter because low < high and neither is -0. Entry `last` is the
// escape. Whatever the ends are, 0 <= last <= 12 << FRACTION_BITS.
struct Window {
    int16_t floor, positive, last;
};
template <class Format> inline Window window_between(int16_t low, int16_t high) {
    const int16_t below = std::min<int16_t>(low & 0x7fff, 0x7f7f);
    const int16_t above = std::min<int16_t>(high & 0x7fff, 0x7f7f);
    const int16_t zero_inside = (int16_t)(low ^ high) >> 15;
    const int16_t bottom = std::min(below, above) & ~zero_inside;
    const int16_t kept = std::max(below, above) - (BINADES << Format::FRACTION_BITS) + 1;
    const int16_t floor = std::max(bottom, kept);
    const int16_t positive = std::max<int16_t>(above - floor + 1, 0) & ~(high >> 15);
    const int16_t negative = std::max<int16_t>(below - floor + 1, 0) & low >> 15;
    return {floor, positive, (int16_t)(positive + negative)};
}

// One row of a tile: the windows of its 64 weights and the numbers that hold their entries. What
// plays the same part lies side by side, which suits vectors: of number n's four weights the first
// is at n, the third at NUMBERS + n, the second and the fourth PAIRS behind these.
template <class Format> struct Row {
    static constexpr int RADIX = Format::RADIX;
    static constexpr int PAIRS = TILE_COLUMNS / 2, NUMBERS = TILE_COLUMNS / RADIX;
    alignas(64) int16_t floor[TILE_COLUMNS], positive[TILE_COLUMNS], last[TILE_COLUMNS];
    alignas(64) int32_t product[PAIRS];  // of the window sizes of two weights
    alignas(64) int64_t width[NUMBERS];  // bits of a number

    Row(const uint8_t* codes, float scale, float zero_point) {
        alignas(64) int32_t code[TILE_COLUMNS];
        for (int n = 0; n < NUMBERS; n++) {
            typename Format::Codes four;
            memcpy(&four, codes + RADIX * n, RADIX);
            code[n] = four & 15;
            code[PAIRS + n] = four >> 8 & 15;
            if (RADIX == 2) continue;
            code[NUMBERS + n] = (uint32_t)four >> 16 & 15;
            code[PAIRS + NUMBERS + n] = (uint32_t)four >> 24 & 15;
        }
        alignas(64) int16_t low[TILE_COLUMNS], high[TILE_COLUMNS];
        for (int i = 0; i < TILE_COLUMNS; i++) {
            low[i] = low_end<Format>(code[i], scale, zero_point);
            high[i] = high_end<Format>(code[i], scale, zero_point);
        }
        for (int i = 0; i < TILE_COLUMNS; i++) {
            const Window window = window_between<Format>(low[i], high[i]);
            floor[i] = window.floor;
            positive[i] = window.positive;
            last[i] = window.last;
        }
        for (int p = 0; p < PAIRS; p++) product[p] = (last[p] + 1) * (last[PAIRS + p] + 1);
#pragma GCC unroll 1  // else GCC peels all of it before it could vectorise it
        for (int n = 0; n < NUMBERS; n++) {
            const double upper = RADIX == 4 ? product[NUMBERS + n] : 1;
            const double most = product[n] * upper - 0.5;  // exact: its exponent is the width
            uint64_t bits;
            memcpy(&bits, &most, 8);
            width[n] = (bits >> 52) - 1022;
        }
    }

    // int16 flags [64] of 0 or 1 in this order -> bit i is weight i of the row.
    static uint64_t mask(const int16_t* flags) {
        uint64_t all = 0;
        for (int n = 0; n < NUMBERS; n++) {
            uint64_t four = flags[n] | flags[PAIRS + n] << 1;
            if (RADIX == 4) four |= flags[NUMBERS + n] << 2 | flags[PAIRS + NUMBERS + n] << 3;
            all |= four << RADIX * n;
        }
        return all;
    }
};

// ---- decoding -----------------------------------------------------------------------------------

// Decodes the 64 weights of one tile row -> mask of those that are escaped. `offset` is where the
// row's bits begin in the tile's, and moves behind them. Quotients of such small integers, taken in
// Real, never round up to the next integer.
template <class Format>
uint64_t decode_row(const uint8_t* codes, float scale, float zero_point, const uint8_t* bits,
                    uint64_t& offset, uint16_t* patterns) {
    constexpr int RADIX = Format::RADIX;
    constexpr int PAIRS = Row<Format>::PAIRS, NUMBERS = Row<Format>::NUMBERS;
    using Real = typename Format::Real;
    const Row<Format> row(codes, scale, zero_point);
    alignas(64) double number[NUMBERS];
    for (int n = 0; n < NUMBERS; n++) {
        uint64_t value;
        memcpy(&value, bits + offset / 8, 8);
        value = value >> offset % 8 & ((1ull << row.width[n]) - 1);
        number[n] = (double)(int64_t)value;
        offset += row.width[n];
    }
    alignas(64) int32_t joined[PAIRS];  // the entries of two weights
#pragma GCC unroll 1
    for (int n = 0; n < NUMBERS; n++) {
        if (RADIX == 2) {
            joined[n] = (int32_t)number[n];
            continue;
        }
        const double product = row.product[n];
        const int32_t upper = (int32_t)(number[n] / product);
        joined[n] = (int32_t)(number[n] - upper * product);
        joined[NUMBERS + n] = upper;
    }
    alignas(64) int16_t entry[TILE_COLUMNS];
    for (int p = 0; p < PAIRS; p++) {
        const int32_t size = row.last[p] + 1, upper = (int32_t)((Real)joined[p] / (Real)size);
        entry[p] = (int16_t)(joined[p] - upper * size);
        entry[PAIRS + p] = (int16_t)upper;
    }
    alignas(64) uint16_t pattern[TILE_COLUMNS];
    alignas(64) int16_t flags[TILE_COLUMNS];
    int16_t any = 0;
    for (int i = 0; i < TILE_COLUMNS; i++) {
        const int16_t negative = -(int16_t)(entry[i] >= row.positive[i]);
        pattern[i] = row.floor[i] + entry[i] + (negative & (0x8000 - row.positive[i]));
        flags[i] = entry[i] >= row.last[i];
        any |= flags[i];
    }
    for (int n = 0; n < NUMBERS; n++) {
        uint64_t four = pattern[n] | (uint32_t)pattern[PAIRS + n] << 16;
        if (RADIX == 4) {
            const uint16_t third = pattern[NUMBERS + n], fourth = pattern[PAIRS + NUMBERS + n];
            four |= (uint64_t)(third | (uint32_t)fourth << 16) << 32;
        }
        memcpy(patterns + RADIX * n, &four, 2 * RADIX);
    }
    return any ? Row<Format>::mask(flags) : 0;  // none in most rows
}

// Decodes the weights of a tile and marks those that are escaped, a mask per row -> bits read.
template <class Format>
uint64_t decode_rows(const uint8_t* codes, const Grid& qparams, int64_t group, int64_t first_row,
                     const uint8_t* bits, uint16_t* patterns, uint64_t* escaped) {
    uint64_t offset = 0;
    for (int r = 0; r < TILE_ROWS; r++) {
        const float scale = qparams.scale(group, first_row + r);
        const float zero_point = qparams.zero_point(group, first_row + r);
        escaped[r] = decode_row<Format>(codes + r * TILE_COLUMNS, scale, zero_point, bits, offset,
                                        patterns + r * TILE_COLUMNS);
    }
    return offset;
}

#ifdef VECTOR_PATH
inline __m512i running_sum(__m512i x) {  // inclusive, over eight 64-bit lanes
    const __m512i none = _mm512_setzero_si512();
    x = _mm512_add_epi64(x, _mm512_alignr_epi64(x, none, 7));
    x = _mm512_add_epi64(x, _mm512_alignr_epi64(x, none, 6));
    return _mm512_add_epi64(x, _mm512_alignr_epi64(x, none, 4));
}
inline __m512d half(__m512 x, int h) {  // eight of sixteen lanes, widened
    return _mm512_cvtps_pd(h ? _mm512_extractf32x8_ps(x, 1) : _mm512_castps512_ps256(x));
}
inline __m512 join(__m512d low, __m512d high) {  // its inverse
    const __m512 lower = _mm512_castps256_ps512(_mm512_cvtpd_ps(low));
    return _mm512_insertf32x8(lower, _mm512_cvtpd_ps(high), 1);
}
inline __m512 whole(__m512 x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}
inline __m512d whole(__m512d x) {
    return _mm512_roundscale_pd(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}

// The windows of all 16 codes of a row. A permute that looks one up sees only the low four bits of
// its selector.
struct alignas(64) Table {
    int32_t floor[16], positive[16];
    float size[16];
    void fill(float scale, float zero_point) {
        for (int code = 0; code < 16; code++) {
            const int16_t low = low_end<BFloat16>(code, scale, zero_point);
            const Window window =
                window_between<BFloat16>(low, high_end<BFloat16>(code, scale, zero_point));
            floor[code] = window.floor;
            positive[code] = window.positive;
            size[code] = (float)(window.last + 1);
        }
    }
};

// A lane holds one number, or one of its weights. Integers are held in floats or doubles that
// represent them exactly. Three short loops: the steps of one row wait for each other, those of
// different rows do not, and the processor overlaps what is close together.
template <>
uint64_t decode_rows<BFloat16>(const uint8_t* codes, const Grid& qparams, int64_t group,
                               int64_t first_row, const uint8_t* bits, uint16_t* patterns,
                               uint64_t* escaped) {
    Table tables[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++)
        tables[r].fill(qparams.scale(group, first_row + r), qparams.zero_point(group, first_row + r));

    // Every number, fetched and split into two for two weights each.
    alignas(64) float joined[TILE_ROWS][2][16];
    const __m512i seven = _mm512_set1_epi64(7), eight = _mm512_set1_epi64(0x0706050403020100);
    const __m512i first_byte = _mm512_set4_epi32(0x08080808, 0x08080808, 0, 0);  // of each lane
    uint64_t offset = 0;
    for (int r = 0; r < TILE_ROWS; r++) {
        const __m512 sizes = _mm512_load_ps(tables[r].size);
        const __m512i pick = _mm512_load_si512(codes + r * TILE_COLUMNS);
        __m512 size[4];
        for (int j = 0; j < 4; j++)
            size[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(pick, 8 * j), sizes);
        const __m512 pair01 = _mm512_mul_ps(size[0], size[1]);
        const __m512 pair23 = _mm512_mul_ps(size[2], size[3]);
        const uint8_t* from = bits + offset / 8;  // the row takes at most 87 bytes from here
        const __m512i near = _mm512_loadu_si512(from), far = _mm512_loadu_si512(from + 64);
        __m512i before = _mm512_set1_epi64(offset % 8);
        __m512d low[2], high[2];
        for (int h = 0; h < 2; h++) {
            const __m512d pair = half(pair01, h);
            const __m512d count = _mm512_mul_pd(pair, half(pair23, h));
            const __m512d most = _mm512_sub_pd(count, _mm512_set1_pd(0.5));  // as in Row
            const __m512i width = _mm512_sub_epi64(
                _mm512_srli_epi64(_mm512_castpd_si512(most), 52), _mm512_set1_epi64(1022));
            const __m512i end = _mm512_add_epi64(running_sum(width), before);
            const __m512i begin = _mm512_sub_epi64(end, width);
            before = _mm512_permutexvar_epi64(seven, end);
            __m512i byte = _mm512_shuffle_epi8(_mm512_srli_epi64(begin, 3), first_byte);
            byte = _mm512_add_epi8(byte, eight);
            __m512i value = _mm512_permutex2var_epi8(near, byte, far);
            value = _mm512_srlv_epi64(value, _mm512_and_si512(begin, seven));
            const __m512i beyond = _mm512_sllv_epi64(_mm512_set1_epi64(-1), width);
            const __m512d number = _mm512_cvtepu64_pd(_mm512_andnot_si512(beyond, value));
            high[h] = whole(_mm512_div_pd(number, pair));
            low[h] = _mm512_fnmadd_pd(high[h], pair, number);
        }
        _mm512_store_ps(joined[r][0], join(low[0], low[1]));
        _mm512_store_ps(joined[r][1], join(high[0], high[1]));
        offset += _mm_cvtsi128_si64(_mm512_castsi512_si128(before)) - offset % 8;
    }

    // Every entry and its pattern.
    const __m512i zip = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i zip_upper = _mm512_add_epi32(zip, _mm512_set1_epi32(8));
    for (int r = 0; r < TILE_ROWS; r++) {
        const __m512 sizes = _mm512_load_ps(tables[r].size);
        const __m512i floors = _mm512_load_si512(tables[r].floor);
        const __m512i positives = _mm512_load_si512(tables[r].positive);
        const __m512i picks = _mm512_load_si512(codes + r * TILE_COLUMNS);
        __m512i two[2];
        uint64_t mask = 0;
        for (int h = 0; h < 2; h++) {
            __m512i pick[2], pattern[2];
            __m512 size[2], entry[2];
            for (int j = 0; j < 2; j++) {
                pick[j] = _mm512_srli_epi32(picks, 8 * (2 * h + j));
                size[j] = _mm512_permutexvar_ps(pick[j], sizes);
            }
            const __m512 both = _mm512_load_ps(joined[r][h]);
            entry[1] = whole(_mm512_div_ps(both, size[0]));
            entry[0] = _mm512_fnmadd_ps(entry[1], size[0], both);
            for (int j = 0; j < 2; j++) {
                const __m512i e = _mm512_cvtps_epi32(entry[j]);
                const __m512i positive = _mm512_permutexvar_epi32(pick[j], positives);
                const __mmask16 negative = _mm512_cmpge_epi32_mask(e, positive);
                const __m512i sign = _mm512_sub_epi32(_mm512_set1_epi32(0x8000), positive);
                pattern[j] = _mm512_add_epi32(e, _mm512_permutexvar_epi32(pick[j], floors));
                pattern[j] = _mm512_mask_add_epi32(pattern[j], negative, pattern[j], sign);
                const __m512 next = _mm512_add_ps(entry[j], _mm512_set1_ps(1));
                const __mmask16 last = _mm512_cmp_ps_mask(next, size[j], _CMP_GE_OQ);
                mask |= _pdep_u64(last, 0x1111111111111111ull << (2 * h + j));
            }
            two[h] = _mm512_mask_blend_epi16(0xaaaaaaaa, pattern[0],
                                             _mm512_slli_epi32(pattern[1], 16));
        }
        uint16_t* row = patterns + r * TILE_COLUMNS;
        _mm512_store_si512(row, _mm512_permutex2var_epi32(two[0], zip, two[1]));
        _mm512_store_si512(row + 32, _mm512_permutex2var_epi32(two[0], zip_upper, two[1]));
        escaped[r] = mask;
    }
    return offset;
}
#endif

// words [MOST_WORDS + BEYOND_WORDS], the tile's first -> was num_words the number of these?
template <class Format>
bool decode_tile(const uint8_t* codes, const Grid& qparams, int64_t group, int64_t first_row,
                 const uint32_t* words, int64_t num_words, uint16_t* patterns) {
    uint64_t escaped[TILE_ROWS];
    uint16_t place[TILE_WEIGHTS];
    const uint64_t num_bits = decode_rows<Format>(codes, qparams, group, first_row,
                                                  (const uint8_t*)words, patterns, escaped);
    int num_escapes = 0;
    for (int r = 0; r < TILE_ROWS; r++)
        for (uint64_t mask = escaped[r]; mask; mask &= mask - 1)
            place[num_escapes++] = r * TILE_COLUMNS + __builtin_ctzll(mask);
    const int64_t bit_words = (num_bits + 31) / 32;
    const uint16_t* stored = (const uint16_t*)(words + bit_words);
    for (int i = 0; i < num_escapes; i++) patterns[place[i]] = stored[i];
    return bit_words + (num_escapes + 1) / 2 == num_words;
}

// ---- encoding -----------------------------------------------------------------------------------

// patterns [32][64] -> words [MOST_WORDS + BEYOND_WORDS]; returns how many are the tile's.
template <class Format>
int64_t encode_tile(const uint8_t* codes, const Grid& qparams, int64_t group, int64_t first_row,
                    const uint16_t* patterns, uint32_t* words) {
    constexpr int RADIX = Format::RADIX;
    constexpr int PAIRS = Row<Format>::PAIRS, NUMBERS = Row<Format>::NUMBERS;
    uint16_t escaped[TILE_WEIGHTS + 1];
    int num_escapes = 0;
    uint64_t offset = 0, pending = 0;  // the bits from offset / 8 * 8 on
    for (int r = 0; r < TILE_ROWS; r++, codes += TILE_COLUMNS, patterns += TILE_COLUMNS) {
        const Row<Format> row(codes, qparams.scale(group, first_row + r),
                              qparams.zero_point(group, first_row + r));
        alignas(64) uint16_t pattern[TILE_COLUMNS];
        for (int n = 0; n < NUMBERS; n++) {
            pattern[n] = patterns[RADIX * n];
            pattern[PAIRS + n] = patterns[RADIX * n + 1];
            if (RADIX == 2) continue;
            pattern[NUMBERS + n] = patterns[RADIX * n + 2];
            pattern[PAIRS + NUMBERS + n] = patterns[RADIX * n + 3];
        }
        alignas(64) int16_t entry[TILE_COLUMNS], flags[TILE_COLUMNS];
        int16_t any = 0;
        for (int i = 0; i < TILE_COLUMNS; i++) {
            const int16_t negative = (int16_t)pattern[i] >> 15, positive = row.positive[i];
            const int16_t distance = (pattern[i] & 0x7fff) - row.floor[i];
            const int16_t count = negative ? row.last[i] - positive : positive;
            flags[i] = (distance < 0) | (distance >= count);
            entry[i] = flags[i] ? row.last[i] : (int16_t)(distance + (positive & negative));
            any |= flags[i];
        }
        alignas(64) int32_t joined[PAIRS];
        for (int p = 0; p < PAIRS; p++)
            joined[p] = entry[p] + (row.last[p] + 1) * entry[PAIRS + p];
        for (int n = 0; n < NUMBERS; n++) {
            uint64_t value = joined[n];
            if (RADIX == 4) value += (uint64_t)row.product[n] * joined[NUMBERS + n];
            pending |= value << offset % 8;
            memcpy((uint8_t*)words + offset / 8, &pending, 8);
            pending >>= (offset % 8 + row.width[n]) / 8 * 8;
            offset += row.width[n];
        }
        for (uint64_t mask = any ? Row<Format>::mask(flags) : 0; mask; mask &= mask - 1)
            escaped[num_escapes++] = patterns[__builtin_ctzll(mask)];
    }
    memcpy((uint8_t*)words + offset / 8, &pending, 8);  // fills the last word
    const int64_t bit_words = (offset + 31) / 32;
    escaped[num_escapes] = 0;  // fills the last word here
    memcpy(words + bit_words, escaped, 4 * ((num_escapes + 1) / 2));
    return bit_words + (num_escapes + 1) / 2;
}

// ---- whole parts --------------------------------------------------------------------------------

template <class Format>
bool decode_part(int64_t num_rows, int64_t num_columns, const Codes& codes, const Grid& qparams,
                 const int32_t* index, const uint32_t* payload, const uint16_t* lower, void* out,
                 int num_threads) {
    const auto decode = [&](const uint8_t* of_tile, int64_t group, int64_t first_row,
                            const uint32_t* words, int64_t num_words) {
        alignas(64) uint16_t patterns[TILE_WEIGHTS];
        const bool right =
            decode_tile<Format>(of_tile, qparams, group, first_row, words, num_words, patterns);
        for (int i = 0; i < TILE_ROWS; i++) {
            const int64_t at = (first_row + i) * num_columns + group * TILE_COLUMNS;
            const uint16_t* upper = patterns + i * TILE_COLUMNS;
            if (!lower) {
                write_through((uint16_t*)out + at, upper, 2 * TILE_COLUMNS);
                continue;
            }
            alignas(64) uint32_t whole[TILE_COLUMNS];
            for (int k = 0; k < TILE_COLUMNS; k++)
                whole[k] = (uint32_t)upper[k] << 16 | lower[at + k];
            write_through((uint32_t*)out + at, whole, 4 * TILE_COLUMNS);
        }
        return right;
    };
    return decode_tiles<MOST_WORDS>(num_rows, num_columns, codes, index, payload, num_threads, decode);
}

template <class Format>
int64_t encode_part(int64_t num_rows, int64_t num_columns, const uint16_t* halves, bool is_f32,
                    const Codes& codes, const Grid& qparams, int32_t* index, uint32_t* payload,
                    int num_threads) {
    const auto encode = [&](const uint8_t* of_tile, int64_t group, int64_t first_row,
                            uint32_t* words) {
        alignas(64) uint16_t patterns[TILE_WEIGHTS];
        for (int r = 0; r < TILE_ROWS; r++) {
            const int64_t at = (first_row + r) * num_columns + group * TILE_COLUMNS;
            uint16_t* row = patterns + r * TILE_COLUMNS;
            if (!is_f32) memcpy(row, halves + at, 2 * TILE_COLUMNS);
            else for (int k = 0; k < TILE_COLUMNS; k++) row[k] = halves[2 * (at + k) + 1];
        }
        return encode_tile<Format>(of_tile, qparams, group, first_row, patterns, words);
    };
    return encode_tiles<MOST_WORDS>(num_rows, num_columns, codes, index, payload, num_threads, encode);
}

}  // namespace

// weights: bf16, fp16 or f32 [rows, columns]; codes: nibble pairs; index [tiles + 1]; payload
// [tiles * MOST_WORDS], which is filled from its beginning. Returns the number of words.
extern "C" int64_t subspec_encode(int64_t num_rows, int64_t num_columns, const void* weights,
                                  int fraction_bits, int is_f32, const uint8_t* codes,
                                  const uint16_t* qparams, int64_t group_stride, int32_t* index,
                                  uint32_t* payload, int num_threads) {
    const auto encode = fraction_bits == 7 ? encode_part<BFloat16> : encode_part<Float16>;
    return encode(num_rows, num_columns, (const uint16_t*)weights, is_f32 != 0,
                  {codes, num_columns, 0}, {qparams, group_stride}, index, payload, num_threads);
}

// index: checked to rise from 0 to the words of payload. lower: of f32 weights, else null. Returns
// 0 if the words of every tile were right; otherwise what is in `out` has no meaning.
extern "C" int subspec_decode(int64_t num_rows, int64_t num_columns, const uint8_t* codes,
                              int tile_rows, const uint16_t* qparams, int64_t group_stride,
                              const int32_t* index, const uint32_t* payload,
                              const uint16_t* lower, void* out, int fraction_bits,
                              int num_threads) {
    const auto decode = fraction_bits == 7 ? decode_part<BFloat16> : decode_part<Float16>;
    return !decode(num_rows, num_columns, {codes, num_columns, tile_rows}, {qparams, group_stride},
                   index, payload, lower, out, num_threads);
}
