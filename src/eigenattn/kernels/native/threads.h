// How work is shared out over threads, and the memory that each keeps.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(EIGENATTN_STD_THREADS)
#include <atomic>
#include <thread>
#endif

namespace {

// Numbers a thread works with: memory that begins where a vector may, and is kept.
template <class T = float> class Room {
  public:
    T *of(int64_t count) {
        if (int64_t(held.size()) < count + 64) held.resize(count + 64);
        return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(held.data()) + 63) / 64 * 64);
    }

  private:
    std::vector<T> held;
};

template <class Function> void in_parallel(int64_t count, int64_t threads, Function function) {
    threads = std::min(threads, count);
    if (threads <= 1) {
        for (int64_t i = 0; i < count; i++) function(i);
        return;
    }
#if defined(EIGENATTN_STD_THREADS)  // a thread sanitiser does not understand OpenMP's
    std::atomic<int64_t> next{0};
    std::vector<std::thread> workers;
    for (int64_t i = 0; i < threads; i++)
        workers.emplace_back([&] {
            for (int64_t j; (j = next++) < count;) function(j);
        });
    for (auto &worker : workers) worker.join();
#else
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) function(i);
#endif
}

}  // namespace
