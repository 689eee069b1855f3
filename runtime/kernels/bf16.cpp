// y = x W^T in bf16 on CPUs without instructions for it: the compiled twin of product_plainly in
// bf16.py, which builds this file and calls the function at its end.
//
// Batch-invariant: the order of a sum is fixed. 8 lanes take every other column of 16, then the
// columns between them; then the lanes are added up. A product of two bf16 numbers is exact in f32
// (unless it underflows), so with and without fused instructions the bits are the same.
#include <algorithm>
#include <cstdint>
#include <cstring>
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bf16 numbers are read in pairs, whose first one has the lower bits"
#endif
#ifdef __FMA__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8, STEP = 2 * LANES;  // columns
constexpr int ROWS = 4, COLUMNS = 3;  // of y, whose sums are in registers together
constexpr int64_t BYTES_AT_ONCE = 192 << 10;  // of W: part of a second-level cache, 256 KiB or more
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 19;  // 25 us or so: fewer are not worth waking one
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

inline Bits load(const uint16_t* from) {
    Bits pairs;
    memcpy(&pairs, from, sizeof pairs);
    return pairs;
}
inline Floats first(Bits pairs) { return (Floats)(pairs << 16); }
inline Floats second(Bits pairs) { return (Floats)(pairs & 0xffff0000); }

inline Floats add_product(Floats sum, Floats x, Floats y) {
#ifdef __FMA__
    return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
    return sum + x * y;
#endif
}

inline uint16_t rounded(Floats lanes) {
    float four[4], two[2];
    for (int i = 0; i < 4; i++) four[i] = lanes[i] + lanes[4 + i];
    for (int i = 0; i < 2; i++) two[i] = four[i] + four[2 + i];
    const float sum = two[0] + two[1];
    uint32_t bits;
    memcpy(&bits, &sum, 4);
    return sum == sum ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// R rows of x and C rows of W, each num_columns long -> out [R][C], its rows `stride` apart.
template <int R, int C>
void multiply(const uint16_t* x, const uint16_t* w, int64_t num_columns, uint16_t* out,
              int64_t stride) {
    Floats sums[R][C] = {};
    for (int64_t k = 0; k < num_columns; k += STEP) {
        Floats of_w[C];
        for (int c = 0; c < C; c++) of_w[c] = first(load(w + c * num_columns + k));
        for (int r = 0; r < R; r++) {
            const Floats of_x = first(load(x + r * num_columns + k));
            for (int c = 0; c < C; c++) sums[r][c] = add_product(sums[r][c], of_x, of_w[c]);
        }
        for (int c = 0; c < C; c++) of_w[c] = second(load(w + c * num_columns + k));
        for (int r = 0; r < R; r++) {
            const Floats of_x = second(load(x + r * num_columns + k));
            for (int c = 0; c < C; c++) sums[r][c] = add_product(sums[r][c], of_x, of_w[c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) out[r * stride + c] = rounded(sums[r][c]);
}

template <int R>
void multiply_columns(const uint16_t* x, const uint16_t* w, int64_t count, int64_t num_columns,
                      uint16_t* out, int64_t stride) {
    int64_t c = 0;
    for (; c + COLUMNS <= count; c += COLUMNS)
        multiply<R, COLUMNS>(x, w + c * num_columns, num_columns, out + c, stride);
    for (; c < count; c++) multiply<R, 1>(x, w + c * num_columns, num_columns, out + c, stride);
}

}  // namespace

// x: [rows, columns]; w: [weight_rows, columns]; out: [rows, weight_rows], its rows `stride` apart;
// all bf16. columns: a multiple of 16.
extern "C" void subspec_bf16_product(int64_t num_rows, int64_t num_columns, const uint16_t* x,
                                     int64_t weight_rows, const uint16_t* w, uint16_t* out,
                                     int64_t stride, int num_threads) {
    const int64_t products = num_rows * weight_rows * num_columns;
    const int64_t worth = std::max<int64_t>(1, products / PRODUCTS_PER_THREAD);
    const int threads = (int)std::min<int64_t>(num_threads, worth);
    const int64_t fitting = BYTES_AT_ONCE / (2 * num_columns) / COLUMNS * COLUMNS;
    const int64_t shared = (weight_rows + threads - 1) / threads;  // so that every thread has some
    const int64_t at_once = std::max<int64_t>(COLUMNS, std::min(fitting, shared));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t c = 0; c < weight_rows; c += at_once) {
        const int64_t count = std::min(at_once, weight_rows - c);
        const uint16_t* some = w + c * num_columns;
        int64_t r = 0;
        for (; r + ROWS <= num_rows; r += ROWS)
            multiply_columns<ROWS>(x + r * num_columns, some, count, num_columns,
                                   out + r * stride + c, stride);
        for (; r < num_rows; r++)
            multiply_columns<1>(x + r * num_columns, some, count, num_columns,
                                out + r * stride + c, stride);
    }
}
