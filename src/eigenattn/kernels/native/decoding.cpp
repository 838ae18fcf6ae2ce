// One step of decoding over latents on a CPU; `arguments.h` says what it is given, and `Step` in Python what it means.

#include "matrices_task.h"
#include "vectors_task.h"

namespace {

// Attend to a part of a row's latents and, if asked, to its window.
template <class Way>
void attend(const Arguments &a, int64_t b, int64_t g, int64_t low, int64_t high, bool with_window, float *results) {
    Way task(a, b, g);
    task.run(low, high, with_window, results);
}

decltype(&attend<ByVectors>) way_of([[maybe_unused]] const Arguments &a) {
#if defined(EIGENATTN_MATRICES)
    if (a.by_matrices) return attend<ByMatrices>;
#endif
    return attend<ByVectors>;
}

}  // namespace

extern "C" {

int eigenattn_lanes() { return LANES; }
int eigenattn_block() { return BLOCK; }
// Whether this machine multiplies matrices of bf16.
int eigenattn_matrices() {
#if defined(EIGENATTN_MATRICES)
    static const bool found = granted();
    return found;
#else
    return 0;
#endif
}
int64_t eigenattn_size() { return sizeof(Arguments); }

void eigenattn_decode(const Arguments *arguments) {
    const Arguments &a = *arguments;
    const Partial partial(a);
    const auto way = way_of(a);
    const int64_t group = a.heads / a.kv_heads, lists = a.batch * a.kv_heads, size = group * partial.size;
    // Few lists are split, so that all threads have work, and none of less than some blocks.
    const int64_t wanted = a.threads > 1 ? (2 * a.threads + lists - 1) / lists : 1;
    const int64_t splits = std::max<int64_t>(std::min(wanted, a.tokens / (8 * BLOCK)), 1);
    thread_local Room<> room;
    float *results = room.of(lists * splits * size);
    in_parallel(lists * splits, a.threads, [&](int64_t i) {
        const int64_t list = i / splits, split = i % splits, b = list / a.kv_heads;
        const int64_t first = std::max<int64_t>(number_of(a.first, b), 0);
        const int64_t stop = std::max(std::min(number_of(a.length, b), a.tokens), first);
        const int64_t each = (stop - first + splits * BLOCK - 1) / (splits * BLOCK) * BLOCK;
        const int64_t low = std::min(first + split * each, stop);
        const bool with_window = split == splits - 1 && a.slots;
        way(a, b, list % a.kv_heads, low, std::min(low + each, stop), with_window, results + i * size);
    });
    in_parallel(a.batch * a.heads, a.threads > 4 ? a.threads : 1, [&](int64_t i) {
        const int64_t list = i / group;
        combine(a, i / a.heads, i % a.heads, results + list * splits * size + i % group * partial.size, splits, size);
    });
}
}
