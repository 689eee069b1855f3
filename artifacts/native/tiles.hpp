// Tiles of a matrix on CPUs, which the decoders and encoders of residuals share: where codes and
// qparams lie, and all tiles of a part in several threads. Included once by each library.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the residual is little-endian, and so must the machine be"
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int TILE_ROWS = 32, TILE_COLUMNS = 64, TILE_WEIGHTS = TILE_ROWS * TILE_COLUMNS;
constexpr int BEYOND_WORDS = 32;  // a row is read, or written, up to 128 bytes from its beginning
constexpr int64_t TILES_PER_THREAD = 64;  // fewer are not worth waking a thread
constexpr int64_t BLOCKS_AT_ONCE = 16;  // small: cores differ in speed, or have other work

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

// decode(codes of a tile, group, first row, its words, their number) -> were these right? Returns
// whether all were.
template <int MOST_WORDS, class Decode>
bool decode_tiles(int64_t num_rows, int64_t num_columns, const Codes& codes, const int32_t* index,
                  const uint32_t* payload, int num_threads, const Decode& decode) {
    const int64_t num_groups = num_columns / TILE_COLUMNS, block_rows = codes.block_rows();
    const int64_t num_blocks = num_rows / block_rows * num_groups;
    bool wrong = false;
#pragma omp parallel num_threads(worth_it(num_blocks, num_threads)) reduction(|| : wrong)
    {
        alignas(64) uint8_t of_block[64 * TILE_COLUMNS];
        alignas(64) uint32_t words[MOST_WORDS + BEYOND_WORDS] = {};
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
                wrong |= !decode(of_block + r * TILE_COLUMNS, group, first_row, words, num_words);
            }
        }
        finish_writes();
    }
    return !wrong;
}

// encode(codes of a tile, group, first row, words [MOST_WORDS + BEYOND_WORDS]) -> how many words are
// the tile's. Contiguous shares of the tiles, some for every thread, are encoded to where they would
// lie if all tiles before them were as long as a tile can be; then the shares are moved together.
template <int MOST_WORDS, class Encode>
int64_t encode_tiles(int64_t num_rows, int64_t num_columns, const Codes& codes, int32_t* index,
                     uint32_t* payload, int num_threads, const Encode& encode) {
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
            alignas(64) uint32_t words[MOST_WORDS + BEYOND_WORDS];
            codes.unpack_pairs(band, group, of_tile);
            const int64_t num_words = encode(of_tile, group, band * TILE_ROWS, words);
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
