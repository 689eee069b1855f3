// All decoder layers of one draft pass in one call, on CPUs: the compiled twin of the layers that
// forward() of transformer.py runs, over the 4-bit products of int4.hpp. compiled_layers.py builds
// this file and calls the functions at its end.
//
// One parallel region; every phase gives each thread a run of its items, and a barrier ends it. A
// row's bits depend neither on the other rows nor on the number of threads: whoever computes an
// item does it in the same way, and a slot that a row does not see is not touched for it.
#include "draft_attention.hpp"
#include "draft_delta_net.hpp"
#include "draft_pass.hpp"

namespace {

int useful_threads(const Sizes& sizes, int num_threads) {
    const int64_t heads = sizes.attention_width() + sizes.num_heads * sizes.head_size;
    const int64_t nets = sizes.num_channels() + 2 * sizes.values_width();
    const int64_t columns = sizes.num_value_heads ? std::min(heads, nets) : heads;
    const int64_t weights = sizes.hidden_size * (columns + 3 * sizes.inner_size);
    return (int)std::min<int64_t>(
        num_threads, std::max<int64_t>(1, weights / LAYER_WEIGHTS_PER_THREAD));
}

}  // namespace

// Bytes that subspec_draft_layers needs as its scratch.
extern "C" int64_t subspec_draft_scratch_bytes(const Sizes* sizes, int64_t num_rows,
                                               int num_threads) {
    Room room = {nullptr};
    Rows rows = {};
    rows.num_rows = num_rows;
    Pass(*sizes, rows, useful_threads(*sizes, num_threads), room);
    return (int64_t)room.next;
}

// rows->x through the layers; their keys and values into the caches of their segments. scratch:
// 64-byte aligned.
extern "C" void subspec_draft_layers(const Sizes* sizes, const Layer* layers, const Rows* rows,
                                     uint8_t* scratch, int num_threads) {
    const int threads = useful_threads(*sizes, num_threads);
    Room room = {scratch};
    const Pass pass(*sizes, *rows, threads, room);
#pragma omp parallel num_threads(threads)
    for (int64_t index = 0; index < sizes->num_layers; index++) {
        const Layer& layer = layers[index];
        normalize(pass, layer.input_norm);
#pragma omp barrier
        if (layer.is_delta_net) add_delta_net(pass, layer);
        else add_attention(pass, layer);
        normalize(pass, layer.post_norm);
#pragma omp barrier
        gate_and_up(pass, layer);
#pragma omp barrier
        add_product(pass, pass.inner, layer.down);
#pragma omp barrier
    }
}
