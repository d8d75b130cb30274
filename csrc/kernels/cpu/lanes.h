// Vectors of a chosen width, and code that is compiled for each width and picked at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "isa.h"

namespace transferops::cpu {

template <class E>
constexpr std::int64_t kPanel = 64 / sizeof(E);  // elements in a cache line, and in the widest vector

// A vector of LANES elements, and its place in memory at any alignment. (Vector types lose their attributes as template
// arguments, so templates take E and LANES.)
template <class E, int LANES>
struct Simd {
    typedef E Vector __attribute__((vector_size(LANES * sizeof(E)), aligned(sizeof(E)), may_alias));

    __attribute__((always_inline)) static const Vector& load(const E* p) { return *reinterpret_cast<const Vector*>(p); }
    __attribute__((always_inline)) static Vector& at(E* p) { return *reinterpret_cast<Vector*>(p); }
};

template <class E, int LANES, std::size_t... I>
__attribute__((always_inline)) inline E sum_of_lanes(const typename Simd<E, LANES>::Vector& x,
                                                     std::index_sequence<I...>) {
    if constexpr (LANES == 2)
        return x[0] + x[1];
    else
        return sum_of_lanes<E, LANES / 2>(
            __builtin_shufflevector(x, x, I...) + __builtin_shufflevector(x, x, (I + sizeof...(I))...),
            std::make_index_sequence<sizeof...(I) / 2>{});
}

template <class E, int LANES>
__attribute__((always_inline)) inline E sum_of_lanes(const typename Simd<E, LANES>::Vector& x) {
    return sum_of_lanes<E, LANES>(x, std::make_index_sequence<LANES / 2>{});
}

// Calls op.run<LANES>() compiled for the processor at hand.
template <class E, class Op>
void run_baseline(const Op& op) {
    op.template run<kPanel<E> / 4>();
}

#ifdef TRANSFEROPS_X86_64
template <class E, class Op>
TRANSFEROPS_TARGET_V3 void run_v3(const Op& op) {
    op.template run<kPanel<E> / 2>();
}

template <class E, class Op>
TRANSFEROPS_TARGET_V4 void run_v4(const Op& op) {
    op.template run<kPanel<E>>();
}
#endif

template <class E, class Op>
void run(const Op& op) {
    static const Level level = cpu_level();
#ifdef TRANSFEROPS_X86_64
    if (level == Level::kV4) return run_v4<E>(op);
    if (level == Level::kV3) return run_v3<E>(op);
#endif
    (void)level;
    run_baseline<E>(op);
}

// How many lanes that gives an op.
template <class E>
std::int64_t lanes() {
    const Level level = cpu_level();
    return level == Level::kV4 ? kPanel<E> : level == Level::kV3 ? kPanel<E> / 2 : kPanel<E> / 4;
}

}  // namespace transferops::cpu
