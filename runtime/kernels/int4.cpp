// y = x W^T for 4-bit weights and few rows of x, on CPUs: the compiled twin of product_plainly in
// int4.py, which builds this file, documents the layouts and calls the function at its end.
#include <vector>

#include "int4.hpp"

namespace {

constexpr int PIECE_ROWS = 32;  // of x, which go through all of W together

}  // namespace

// x: bf16 [rows, columns]; out: bf16 [rows, W's rows], its rows `stride` elements apart.
extern "C" void subspec_int4_product(int64_t num_rows, int64_t num_columns, const uint16_t* x,
                                     int64_t weight_rows, const uint8_t* codes,
                                     const uint16_t* qparams, uint16_t* out, int64_t stride,
                                     int num_threads) {
    thread_local std::vector<Group> kept;  // between calls
    const int64_t num_groups = num_columns / GROUP_SIZE;
    const Weight weight = {weight_rows, num_groups, codes, qparams};
    const size_t needed = std::min<int64_t>(num_rows, PIECE_ROWS) * num_groups;
    if (kept.size() < needed) kept.resize(needed);
    const int64_t worth = std::max<int64_t>(1, weight_rows * num_columns / WEIGHTS_PER_THREAD);
    const int threads = (int)std::min<int64_t>(num_threads, worth);
    for (int64_t first = 0; first < num_rows; first += PIECE_ROWS) {
        const int64_t rows = std::min<int64_t>(PIECE_ROWS, num_rows - first);
        const Activations groups = {rows, num_groups, kept.data()};
        for (int64_t row = 0; row < rows; row++)
            for (int64_t g = 0; g < num_groups; g++)
                quantize(x + ((first + row) * num_groups + g) * GROUP_SIZE, groups.at(row, g));
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t block = 0; block < weight_rows / BLOCK_ROWS; block++)
            for (int64_t row = 0; row < rows; row += MOST_ROWS) {
                Block product;
                const int count = multiply_rows(groups, row, weight, block, product);
                for (int r = 0; r < count; r++)
                    for (int p = 0; p < PARTS; p++) {
                        const Halves halves = rounded_to_bf16(product[r][p]);
                        memcpy(out + (first + row + r) * stride + block * BLOCK_ROWS + p * LANES,
                               &halves, sizeof halves);
                    }
            }
    }
}
