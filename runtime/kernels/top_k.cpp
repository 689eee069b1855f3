// The largest logits of each row and their log-probabilities, on CPUs: the compiled twin of
// top_k_plainly in top_k.py, which builds this file and calls the function at its end.
#include <cmath>

#include "exponent.hpp"
#include "int4.hpp"

namespace {

constexpr int64_t TOGETHER = 512;  // columns that are passed over if none of them is large enough
constexpr int64_t COLUMNS_PER_THREAD = 1 << 15;  // fewer are not worth waking a thread

// Up to LANES of bf16; -inf in the lanes beyond them.
inline Floats some_of(const uint16_t* from, int64_t count) {
    if (count >= LANES) return load_bf16(from);
    uint16_t some[LANES];
    for (int i = 0; i < LANES; i++) some[i] = i < count ? from[i] : 0xff80;
    return load_bf16(some);
}

// values, ids [k]: the largest first, of equal ones the first column. NaN counts as -inf.
void find_largest(const uint16_t* row, int64_t num_columns, int64_t k, float* values,
                  int64_t* ids) {
    int64_t held = 0;
    for (int64_t first = 0; first < num_columns; first += TOGETHER) {
        const int64_t end = std::min(first + TOGETHER, num_columns);
        Floats most = Floats{} - INFINITY;
        for (int64_t i = first; i < end; i += LANES) {
            const Floats x = some_of(row + i, end - i);
            most = x > most ? x : most;
        }
        if (held == k && !(largest(most)[0] > values[k - 1])) continue;
        for (int64_t i = first; i < end; i++) {
            const float wide = widen(row[i]), x = wide == wide ? wide : -INFINITY;
            if (held == k && !(x > values[k - 1])) continue;
            int64_t place = held < k ? held++ : k - 1;
            for (; place > 0 && x > values[place - 1]; place--) {
                values[place] = values[place - 1];
                ids[place] = ids[place - 1];
            }
            values[place] = x;
            ids[place] = i;
        }
    }
}

// ln of the sum of e^((x - most) / temperature)
float log_sum(const uint16_t* row, int64_t num_columns, float most, float temperature) {
    const float factor = 1.44269504f / temperature;
    Floats sum = {};
    for (int64_t i = 0; i < num_columns; i += LANES)
        sum += power_of_two<Bits>((some_of(row + i, num_columns - i) - most) * factor);
    float total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return std::log(total);
}

}  // namespace

// logits: bf16 [rows, columns], its rows `stride` elements apart; out f32 and ids [rows, k].
extern "C" void subspec_top_k(int64_t num_rows, int64_t num_columns, const uint16_t* logits,
                              int64_t stride, int64_t k, float temperature, float* out,
                              int64_t* ids, int num_threads) {
    const int64_t worth = std::max<int64_t>(1, num_rows * num_columns / COLUMNS_PER_THREAD);
    const int threads = (int)std::min<int64_t>({num_threads, num_rows, worth});
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < num_rows; r++) {
        const uint16_t* const row = logits + r * stride;
        float* const values = out + r * k;
        find_largest(row, num_columns, k, values, ids + r * k);
        const float most = values[0], sum = log_sum(row, num_columns, most, temperature);
        for (int64_t i = 0; i < k; i++) values[i] = (values[i] - most) / temperature - sum;
    }
}
