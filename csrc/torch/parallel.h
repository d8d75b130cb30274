// Torch's thread pool, in the form in which the CPU kernels ask for threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "../kernels/cpu/parallel.h"
#include "stable.h"

namespace transferops {

// Tasks are taken one by one from a counter, not cut into equal ranges: tiles on the diagonal cost half of the others.
inline void torch_parallel_for(std::int64_t count, const std::function<void(std::int64_t)>& body) {
    const std::int64_t threads = std::min<std::int64_t>(count, torch::stable::get_num_threads());
    std::atomic<std::int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) {
        for (std::int64_t i = next++; i < count; i = next++) body(i);
    });
}

}  // namespace transferops
