// How a CPU kernel asks for threads without knowing whose they are.
#pragma once

#include <cstdint>
#include <functional>

namespace transferops::cpu {

// Runs body(0) .. body(count - 1), in any order, possibly at once. The caller of a kernel supplies
// it; results never depend on it, because every task owns its outputs and every sum across tasks is
// taken afterwards in a fixed order.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

inline void serial_for(int64_t count, const std::function<void(int64_t)>& body) {
    for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace transferops::cpu
