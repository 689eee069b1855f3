// The residual of exact weights, both directions, for CPUs: the compiled twin of residual.py, whose
// first page specifies the format. residual_cpu.py builds this file and calls its last two
// functions.
//
// A tile (32 x 64 weights) is worked on in small local arrays: its codes, its words and its 16-bit
// patterns are copied in or out as wholes. Widths follow from codes and qparams alone and are bounded
// for any values of these, so nothing that a stream holds can lead outside of the arrays; whether
// its length was right is one comparison at the end of a tile. The loops are written for the
// compiler to vectorise; with AVX-512, bf16 and f32 are decoded by a path in intrinsics.
#include <algorithm>
#include <cstdint>
#include <cstring>
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the residual is little-endian, and so must the machine be"
#endif
#if !defined(PORTABLE) && defined(__AVX512F__) && defined(__AVX512DQ__) && \
    defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__BMI2__)
#define VECTOR_PATH
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int TILE_ROWS = 32, TILE_COLUMNS = 64, TILE_WEIGHTS = TILE_ROWS * TILE_COLUMNS;
constexpr int BINADES = 6;
constexpr int MOST_BIT_WORDS = TILE_WEIGHTS * 14 / 32;  // fp16: two weights in at most 28 bits
constexpr int MOST_WORDS = MOST_BIT_WORDS + TILE_WEIGHTS / 2;  // 1920; residual_cpu.py knows it too
constexpr int BEYOND_WORDS = 32;  // a row is read, or written, up to 128 bytes from its beginning
constexpr int64_t TILES_PER_THREAD = 64;  // fewer are not worth waking a thread
constexpr int64_t BLOCKS_AT_ONCE = 16;  // small: cores differ in speed, or have other work

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

// bfloat16 [groups, rows, 2] of (scale, zero_point); the groups may lie further apart.
struct Grid {
    const uint16_t* pairs;
    int64_t group_stride;
    float at(int64_t group, int64_t row, int which) const {
        const uint32_t bits = (uint32_t)pairs[group * group_stride + 2 * row + which] << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    float scale(int64_t group, int64_t row) const { return at(group, row, 0); }
    float zero_point(int64_t group, int64_t row) const { return at(group, row, 1); }
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

// in [64][N] bytes -> out [N][64]: each pass takes the top bit of a byte's index to the bottom.
template <int N> void transpose(const uint8_t* in, uint8_t* out) {
    constexpr int HALF = 32 * N;
    alignas(64) uint8_t other[2 * HALF];
    const auto rotate = [](const uint8_t* from, uint8_t* to) {
        for (int i = 0; i < HALF; i++) {
            to[2 * i] = from[i];
            to[2 * i + 1] = from[i + HALF];
        }
    };
    rotate(in, other);
    rotate(other, out);
    rotate(out, other);
    rotate(other, out);
    rotate(out, other);
    rotate(other, out);
}

// Codes of one part. tile_rows 0: nibble pairs [rows, columns / 2]; 64 or 32: ATen's packed layout
// [rows / tile_rows, columns, tile_rows / 2], where byte (k, r) holds row r in its low nibble and
// row r + tile_rows / 2 in its high one; 16: that of runtime/kernels/int4.py, [rows / 16, columns / 8, 16, 4]
// bytes, nibble pairs four bytes at a time.
struct Codes {
    const uint8_t* bytes;
    int64_t num_columns;
    int tile_rows;

    int block_rows() const { return tile_rows == 64 ? 64 : 32; }

    // out [block_rows][64], one code per byte
    void unpack(int64_t block, int64_t group, uint8_t* out) const {
        const int64_t first = block * num_columns + group * TILE_COLUMNS;
        if (tile_rows == 64) unpack_tile<32>(bytes + first * 32, out);
        else if (tile_rows == 32) unpack_tile<16>(bytes + first * 16, out);
        else if (tile_rows == 16) unpack_words(block, group, out);
        else unpack_pairs(block, group, out);
    }
    static void unpack_row(const uint8_t* pairs, uint8_t* out) {
        for (int i = 0; i < TILE_COLUMNS / 2; i++) {
            out[2 * i] = pairs[i] & 15;
            out[2 * i + 1] = pairs[i] >> 4;
        }
    }
    void unpack_pairs(int64_t band, int64_t group, uint8_t* out) const {
        for (int r = 0; r < TILE_ROWS; r++, out += TILE_COLUMNS) {
            const int64_t first = (band * TILE_ROWS + r) * num_columns + group * TILE_COLUMNS;
            unpack_row(bytes + first / 2, out);
        }
    }
    void unpack_words(int64_t band, int64_t group, uint8_t* out) const {
        for (int r = 0; r < TILE_ROWS; r++, out += TILE_COLUMNS) {
            const int64_t block = (band * TILE_ROWS + r) / 16, row = r % 16;
            const uint8_t* from = bytes + (block * num_columns + group * TILE_COLUMNS) * 8 + row * 4;
            alignas(64) uint8_t pairs[TILE_COLUMNS / 2];
            for (int i = 0; i < TILE_COLUMNS / 8; i++) memcpy(pairs + 4 * i, from + 64 * i, 4);
            unpack_row(pairs, out);
        }
    }
    template <int N> static void unpack_tile(const uint8_t* from, uint8_t* out) {
        alignas(64) uint8_t both[64 * N];
        transpose<N>(from, both);
        for (int i = 0; i < 64 * N; i++) {
            out[i] = both[i] & 15;
            out[i + 64 * N] = both[i] >> 4;
        }
    }
};

// Writes past the caches; both addresses are multiples of 16. The rows of a tile lie far apart in
// the output, and to fetch their lines only to overwrite them costs a sixth of the time.
inline void write_through(void* out, const void* from, int num_bytes) {
#ifdef __SSE2__
    for (int i = 0; i < num_bytes / 16; i++)
        _mm_stream_si128((__m128i*)out + i, _mm_load_si128((const __m128i*)from + i));
#else
    memcpy(out, from, num_bytes);
#endif
}
inline void finish_writes() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

inline int worth_it(int64_t num_tiles, int num_threads) {
    return (int)std::max<int64_t>(1, std::min<int64_t>(num_threads, num_tiles / TILES_PER_THREAD));
}

template <class Format>
bool decode_part(int64_t num_rows, int64_t num_columns, const Codes& codes, const Grid& qparams,
                 const int32_t* index, const uint32_t* payload, const uint16_t* lower, void* out,
                 int num_threads) {
    const int64_t num_groups = num_columns / TILE_COLUMNS, block_rows = codes.block_rows();
    const int64_t num_blocks = num_rows / block_rows * num_groups;
    bool wrong = false;
#pragma omp parallel num_threads(worth_it(num_blocks, num_threads)) reduction(|| : wrong)
    {
        alignas(64) uint8_t of_block[64 * TILE_COLUMNS];
        alignas(64) uint32_t words[MOST_WORDS + BEYOND_WORDS] = {};
        alignas(64) uint16_t patterns[TILE_WEIGHTS];
#pragma omp for schedule(dynamic, BLOCKS_AT_ONCE) nowait
        for (int64_t b = 0; b < num_blocks; b++) {
            const int64_t block = b / num_groups, group = b % num_groups;
            codes.unpack(block, group, of_block);
            for (int64_t r = 0; r < block_rows; r += TILE_ROWS) {
                const int64_t first_row = block * block_rows + r;
                const int64_t tile = first_row / TILE_ROWS * num_groups + group;
                const int64_t num_words = (int64_t)index[tile + 1] - index[tile];
                if (num_words < 0 || num_words > MOST_WORDS) {
                    wrong = true;
                    continue;
                }
                memcpy(words, payload + index[tile], 4 * num_words);
                wrong |= !decode_tile<Format>(of_block + r * TILE_COLUMNS, qparams, group, first_row,
                                              words, num_words, patterns);
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
            }
        }
        finish_writes();
    }
    return !wrong;
}

// Contiguous shares of the tiles, some for every thread, are encoded to where they would lie if all
// tiles before them were as long as a tile can be; then the shares are moved together.
template <class Format>
int64_t encode_part(int64_t num_rows, int64_t num_columns, const uint16_t* halves, bool is_f32,
                    const Codes& codes, const Grid& qparams, int32_t* index, uint32_t* payload,
                    int num_threads) {
    const int64_t num_groups = num_columns / TILE_COLUMNS;
    const int64_t num_tiles = num_rows / TILE_ROWS * num_groups;
    num_threads = worth_it(num_tiles, num_threads);
    const int num_shares = 4 * num_threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int share = 0; share < num_shares; share++) {
        const int64_t first = num_tiles * share / num_shares;
        uint32_t* end = payload + first * MOST_WORDS;
        for (int64_t tile = first; tile < num_tiles * (share + 1) / num_shares; tile++) {
            const int64_t band = tile / num_groups, group = tile % num_groups;
            alignas(64) uint8_t of_tile[TILE_WEIGHTS];
            alignas(64) uint16_t patterns[TILE_WEIGHTS];
            alignas(64) uint32_t words[MOST_WORDS + BEYOND_WORDS];
            codes.unpack_pairs(band, group, of_tile);
            for (int r = 0; r < TILE_ROWS; r++) {
                const int64_t at = (band * TILE_ROWS + r) * num_columns + group * TILE_COLUMNS;
                uint16_t* row = patterns + r * TILE_COLUMNS;
                if (!is_f32) memcpy(row, halves + at, 2 * TILE_COLUMNS);
                else for (int k = 0; k < TILE_COLUMNS; k++) row[k] = halves[2 * (at + k) + 1];
            }
            const int64_t num_words = encode_tile<Format>(of_tile, qparams, group, band * TILE_ROWS,
                                                          patterns, words);
            memcpy(end, words, 4 * num_words);
            end += num_words;
            index[tile + 1] = (int32_t)num_words;
        }
    }
    int64_t num_words = index[0] = 0;
    for (int share = 0; share < num_shares; share++) {
        const int64_t first = num_tiles * share / num_shares, begin = num_words;
        for (int64_t tile = first; tile < num_tiles * (share + 1) / num_shares; tile++)
            index[tile + 1] = (int32_t)(num_words += index[tile + 1]);
        memmove(payload + begin, payload + first * MOST_WORDS, 4 * (num_words - begin));
    }
    return num_words;
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
