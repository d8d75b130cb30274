// Runs CUDA kernels on the CPU: compile the .cu file as C++ with this directory in front of the include path.
//
//   g++ -std=c++20 -fsanitize=address -I tests/kernels/emulation -x c++ csrc/kernels/cuda/moments.cu
//
// Every CUDA thread is a fiber; blocks run one after the other. A fiber runs until it has to wait at a barrier or a
// warp collective; then the first fiber that can run goes on, in one of three thread orders. So a warp runs as far
// ahead of the others as the barriers allow: a missing barrier gives wrong results in at least one order. Dynamic
// shared memory is allocated with exactly the size of the launch and filled with NaN for every block, so that
// AddressSanitizer sees an access beyond it and reading what nobody wrote shows. A barrier that some threads never
// reach ends the process with a message. An asynchronous copy arrives when its thread waits for it and not before.
//
// Limits: it finds faults of indices, tails and barriers. It says nothing about memory ordering, races between blocks,
// occupancy or speed, and has no static shared memory, atomics, partial warp masks, TMA or wgmma. GCC and Clang only.
#pragma once

#define TRANSFEROPS_EMULATION 1

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

// ---- the part of the runtime's interface that the launchers use ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // threadIdx follows the running fiber

namespace emulation {

enum class Order { forward, backward, shuffled };

inline Order order = Order::forward;  // which of the fibers that can run goes first
inline std::uint64_t seed = 0;        // of the shuffled order, which is another one for every block

template <class... Arguments>
[[noreturn]] void fail(const char* format, Arguments... arguments) {
    std::fputs("emulation: ", stderr);
    std::fprintf(stderr, format, arguments...);
    std::fputc('\n', stderr);
    std::_Exit(70);
}

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr std::size_t kStack = 128 * 1024, kSharedDefault = 48 * 1024, kSharedMost = 227 * 1024;

enum class State { ready, at_barrier, at_collective, finished };

// An asynchronous copy that nobody has waited for yet.
struct Copy {
    void* target;
    const void* source;  // nullptr: zeros
};

struct Fiber {
    void* registers[5];  // where __builtin_setjmp keeps what it needs to resume
    ucontext_t first;    // and what the first switch to it needs
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    void* fake_stack = nullptr;  // AddressSanitizer's
    State state = State::finished;
    unsigned line = 0;  // of the barrier or collective it waits at
    dim3 thread;
    std::deque<std::vector<Copy>> copies{1};  // by group, of which the last is not yet committed
};

struct Warp {
    unsigned arrived = 0;
    std::array<void*, kWarp> operands{};
};

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
    Fiber main;                                  // the launching thread
    const void* main_stack = nullptr;
    std::size_t main_stack_size = 0;
    unsigned current = 0, threads = 0, arrived = 0, finished = 0;
    std::array<Warp, kMostThreads / kWarp> warps;
    std::vector<unsigned> by_rank, rank_of;                // the thread order
    std::array<std::uint64_t, kMostThreads / 64> ready{};  // bit r: the thread of rank r can run
    std::function<void()> kernel;
    std::unique_ptr<void, decltype(&std::free)> shared{nullptr, &std::free};
    std::map<const void*, std::size_t> shared_limits;  // raised by cudaFuncSetAttribute
};

inline Block block;

// ---- fibers ----

__attribute__((noinline, noreturn, no_sanitize("address"))) inline void resume(Fiber& to) {
    if (to.started) __builtin_longjmp(to.registers, 1);
    setcontext(&to.first);
    std::abort();
}

__attribute__((noinline, no_sanitize("address"))) inline void save_and_resume(Fiber& from, Fiber& to) {
    if (__builtin_setjmp(from.registers) == 0) resume(to);
}

// AddressSanitizer has to know which stack is in use. That of the launching thread is the one that the very first
// switch leaves.
inline void begin_switch([[maybe_unused]] Fiber& from, [[maybe_unused]] Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
    const bool to_main = &to == &block.main;
    __sanitizer_start_switch_fiber(&from.fake_stack, to_main ? block.main_stack : to.stack.get(),
                                   to_main ? block.main_stack_size : kStack);
#endif
}

inline void end_switch([[maybe_unused]] Fiber& arrived) {
#ifdef __SANITIZE_ADDRESS__
    const void* left;
    std::size_t size;
    __sanitizer_finish_switch_fiber(arrived.fake_stack, &left, &size);
    if (!block.main_stack) {
        block.main_stack = left;
        block.main_stack_size = size;
    }
#endif
}

inline void switch_fibers(Fiber& from, Fiber& to) {
    if (&from == &to) return;
    from.started = true;
    begin_switch(from, to);
    save_and_resume(from, to);
    end_switch(from);
}

inline void make_ready(unsigned thread) {
    const unsigned rank = block.rank_of[thread];
    block.fibers[thread]->state = State::ready;
    block.ready[rank / 64] |= std::uint64_t{1} << rank % 64;
}

[[noreturn]] inline void report_divergence() {
    unsigned barrier = 0, collective = 0, line = 0;
    for (unsigned t = 0; t < block.threads; ++t) {
        barrier += block.fibers[t]->state == State::at_barrier;
        collective += block.fibers[t]->state == State::at_collective;
        line = std::max(line, block.fibers[t]->line);
    }
    fail(
        "divergence in block (%u, %u): of %u threads %u wait at __syncthreads, %u at a warp collective (one at line "
        "%u), %u have returned",
        blockIdx.x, blockIdx.y, block.threads, barrier, collective, line, block.finished);
}

inline void switch_to_rank(Fiber& from, unsigned rank) {
    block.current = block.by_rank[rank];
    threadIdx = block.fibers[block.current]->thread;
    switch_fibers(from, *block.fibers[block.current]);
}

// The current thread stops being ready, unless released meanwhile; the first ready one in the order goes on.
inline void yield() {
    Fiber& from = *block.fibers[block.current];
    for (unsigned w = 0; w * 64 < block.threads; ++w) {
        if (block.ready[w] == 0) continue;
        return switch_to_rank(from, w * 64 + std::countr_zero(block.ready[w]));
    }
    if (block.finished < block.threads) report_divergence();
    switch_fibers(from, block.main);
}

inline void wait(State state, unsigned line) {
    const unsigned rank = block.rank_of[block.current];
    block.ready[rank / 64] &= ~(std::uint64_t{1} << rank % 64);
    block.fibers[block.current]->state = state;
    block.fibers[block.current]->line = line;
}

inline void fiber_main() {
    end_switch(*block.fibers[block.current]);
    for (;;) {  // one kernel after the other
        block.kernel();
        if (std::ranges::any_of(block.fibers[block.current]->copies, [](auto& group) { return !group.empty(); }))
            fail("block (%u, %u): thread %u has returned before its copies", blockIdx.x, blockIdx.y, block.current);
        block.fibers[block.current]->copies.resize(1);
        ++block.finished;
        wait(State::finished, 0);
        yield();
    }
}

// ---- barriers and warp collectives ----

inline void barrier(unsigned line) {
    wait(State::at_barrier, line);
    if (++block.arrived == block.threads) {
        block.arrived = 0;
        for (unsigned t = 0; t < block.threads; ++t) {
            if (block.fibers[t]->line != line)
                fail("divergence in block (%u, %u): threads wait at different __syncthreads, lines %u and %u",
                     blockIdx.x, blockIdx.y, block.fibers[t]->line, line);
            make_ready(t);
        }
    }
    yield();
}

// Every lane brings an operand; the last to arrive does exchange(operands of all lanes, lanes) for the warp.
template <class Exchange>
void collective(unsigned mask, void* operand, unsigned line, Exchange exchange) {
    if (mask != 0xffffffffu) fail("line %u: a warp collective with the partial mask %08x", line, mask);
    const unsigned number = block.current / kWarp, begin = number * kWarp;
    const unsigned lanes = std::min(kWarp, block.threads - begin);
    Warp& warp = block.warps[number];
    warp.operands[block.current - begin] = operand;
    wait(State::at_collective, line);
    if (++warp.arrived == lanes) {
        warp.arrived = 0;
        for (unsigned lane = 0; lane < lanes; ++lane)
            if (block.fibers[begin + lane]->line != line)
                fail("divergence in a warp: lanes wait at lines %u and %u", block.fibers[begin + lane]->line, line);
        exchange(warp.operands, lanes);
        for (unsigned lane = 0; lane < lanes; ++lane) make_ready(begin + lane);
    }
    yield();
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, unsigned line) {
    struct Operand {
        T value, result;
        unsigned source;
    } mine{value, value, source};
    collective(mask, &mine, line, [](auto& operands, unsigned lanes) {
        for (unsigned lane = 0; lane < lanes; ++lane) {
            Operand& operand = *static_cast<Operand*>(operands[lane]);
            if (operand.source < lanes) operand.result = static_cast<Operand*>(operands[operand.source])->value;
        }
    });
    return mine.result;
}

// ---- launches ----

inline void run_block(std::size_t shared_bytes, std::mt19937_64& random) {
    if (order == Order::backward)
        std::iota(block.by_rank.rbegin(), block.by_rank.rend(), 0u);
    else
        std::iota(block.by_rank.begin(), block.by_rank.end(), 0u);
    if (order == Order::shuffled) std::shuffle(block.by_rank.begin(), block.by_rank.end(), random);
    for (unsigned rank = 0; rank < block.threads; ++rank) block.rank_of[block.by_rank[rank]] = rank;
    block.shared.reset(std::malloc(shared_bytes));
    std::memset(block.shared.get(), 0xff, shared_bytes);
    block.finished = 0;
    for (unsigned t = 0; t < block.threads; ++t) make_ready(t);
    switch_to_rank(block.main, 0);
}

inline cudaError_t run(const cudaLaunchConfig_t& config, const void* function, std::function<void()> kernel) {
    const dim3 grid = config.gridDim, threads = config.blockDim;
    const std::size_t limit = block.shared_limits.contains(function) ? block.shared_limits[function] : kSharedDefault;
    block.threads = threads.x * threads.y * threads.z;
    if (block.threads == 0 || block.threads > kMostThreads || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 ||
        grid.y > 0xffffu || grid.z == 0 || grid.z > 0xffffu)
        return cudaErrorInvalidConfiguration;
    if (config.dynamicSmemBytes > limit) return cudaErrorInvalidValue;
    block.kernel = std::move(kernel);
    gridDim = grid;
    blockDim = threads;
    block.by_rank.resize(block.threads);
    block.rank_of.resize(block.threads);
    while (block.fibers.size() < block.threads) {
        Fiber& fiber = *block.fibers.emplace_back(std::make_unique<Fiber>());
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = fiber.stack.get();
        fiber.first.uc_stack.ss_size = kStack;
        makecontext(&fiber.first, fiber_main, 0);
    }
    for (unsigned t = 0; t < block.threads; ++t)
        block.fibers[t]->thread = dim3(t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y);
    std::mt19937_64 random(seed);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                run_block(config.dynamicSmemBytes, random);
            }
    return cudaSuccess;
}

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
    return emulation::run(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, parameters); });
}

inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || static_cast<std::size_t>(bytes) > emulation::kSharedMost) return cudaErrorInvalidValue;
    emulation::block.shared_limits[function] = static_cast<std::size_t>(bytes);
    return cudaSuccess;
}

// ---- what kernels see ----

using std::max, std::min;

inline void __syncthreads(std::source_location where = std::source_location::current()) {
    emulation::barrier(where.line());
}

inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location where = std::source_location::current()) {
    emulation::collective(mask, nullptr, where.line(), [](auto&, unsigned) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, std::source_location where = std::source_location::current()) {
    return emulation::shuffle(mask, value, static_cast<unsigned>(source) % 32, where.line());
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, std::source_location where = std::source_location::current()) {
    return emulation::shuffle(mask, value, emulation::block.current % 32 ^ static_cast<unsigned>(distance),
                              where.line());
}

namespace transferops::cuda {

inline double* dynamic_shared() { return static_cast<double*>(emulation::block.shared.get()); }

// The twin of mma_f64 in csrc/kernels/cuda/device.h, where the layout of the fragments is described.
inline void mma_f64(double (&c)[4], const double (&a)[4], const double (&b)[2],
                    std::source_location where = std::source_location::current()) {
    struct Operand {
        double* c;
        const double *a, *b;
    } mine{c, a, b};
    emulation::collective(0xffffffffu, &mine, where.line(), [](auto& operands, unsigned lanes) {
        if (lanes != 32) emulation::fail("mma_f64 in a warp of %u lanes", lanes);
        double left[16][8], right[8][8];  // right[column][k]
        for (int lane = 0; lane < 32; ++lane) {
            const Operand& operand = *static_cast<Operand*>(operands[lane]);
            for (int i = 0; i < 4; ++i) left[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = operand.a[i];
            for (int j = 0; j < 2; ++j) right[lane / 4][lane % 4 + j * 4] = operand.b[j];
        }
        for (int lane = 0; lane < 32; ++lane) {
            double* out = static_cast<Operand*>(operands[lane])->c;
            for (int i = 0; i < 4; ++i)
                for (int k = 0; k < 8; ++k) out[i] += left[lane / 4 + i / 2 * 8][k] * right[lane % 4 * 2 + i % 2][k];
        }
    });
}

// The sums of the narrow tensor cores: exact up to double, then float, rounded towards zero.
inline float round_towards_zero(double value) {
    const float nearest = static_cast<float>(value);
    return std::abs(static_cast<double>(nearest)) > std::abs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// c += a b over a 16 x 8 x kDepth block; `unpack` writes the part of A and of B (by column) that a lane holds.
template <int kDepth, class Word, class Unpack>
void mma_float(float (&c)[4], const Word (&a)[4], const Word (&b)[2], unsigned line, Unpack unpack) {
    struct Operand {
        float* c;
        const Word *a, *b;
    } mine{c, a, b};
    emulation::collective(0xffffffffu, &mine, line, [&](auto& operands, unsigned lanes) {
        if (lanes != 32) emulation::fail("mma in a warp of %u lanes", lanes);
        double left[16][kDepth], right[8][kDepth];
        for (int lane = 0; lane < 32; ++lane) {
            const Operand& operand = *static_cast<Operand*>(operands[lane]);
            for (int i = 0; i < 4; ++i)
                unpack(left[lane / 4 + i % 2 * 8] + i / 2 * (kDepth / 2), lane % 4, operand.a[i]);
            for (int j = 0; j < 2; ++j) unpack(right[lane / 4] + j * (kDepth / 2), lane % 4, operand.b[j]);
        }
        for (int lane = 0; lane < 32; ++lane) {
            float* out = static_cast<Operand*>(operands[lane])->c;
            for (int i = 0; i < 4; ++i) {
                double sum = out[i];
                for (int k = 0; k < kDepth; ++k) sum += left[lane / 4 + i / 2 * 8][k] * right[lane % 4 * 2 + i % 2][k];
                out[i] = round_towards_zero(sum);
            }
        }
    });
}

// The twins of mma_tf32, mma_16bit, load_transposed and load_matrices in csrc/kernels/cuda/device.h.
inline void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2],
                     std::source_location where = std::source_location::current()) {
    mma_float<8>(c, a, b, where.line(), [](double* row, int member, float word) {
        row[member] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(word) & 0xffffe000u);
    });
}

template <class T>
void mma_16bit(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
               std::source_location where = std::source_location::current()) {
    mma_float<16>(c, a, b, where.line(), [](double* row, int member, std::uint32_t word) {
        row[2 * member] = to_float(T{static_cast<std::uint16_t>(word)});
        row[2 * member + 1] = to_float(T{static_cast<std::uint16_t>(word >> 16)});
    });
}

// Four 8 x 8 matrices from shared memory: lane i names row i % 8 of matrix i / 8; words[m] = pick(element, g, 2 t).
template <class Pick>
void load_matrices_by(std::uint32_t (&words)[4], const void* row, unsigned line, Pick pick) {
    struct Operand {
        std::uint32_t* words;
        const std::uint16_t* row;
    } mine{words, static_cast<const std::uint16_t*>(row)};
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
        emulation::fail("line %u: matrices at a misaligned address", line);
    emulation::collective(0xffffffffu, &mine, line, [&](auto& operands, unsigned lanes) {
        if (lanes != 32) emulation::fail("matrices loaded by a warp of %u lanes", lanes);
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m) {
                const auto at = [&](int row, int column) -> std::uint32_t {
                    return static_cast<Operand*>(operands[m * 8 + row])->row[column];
                };
                static_cast<Operand*>(operands[lane])->words[m] = pick(at, lane / 4, lane % 4 * 2);
            }
    });
}

inline void load_transposed(std::uint32_t (&words)[4], const void* row,
                            std::source_location where = std::source_location::current()) {
    load_matrices_by(words, row, where.line(),
                     [](auto at, int group, int pair) { return at(pair, group) | at(pair + 1, group) << 16; });
}

inline void load_matrices(std::uint32_t (&words)[4], const void* row,
                          std::source_location where = std::source_location::current()) {
    load_matrices_by(words, row, where.line(),
                     [](auto at, int group, int pair) { return at(group, pair) | at(group, pair + 1) << 16; });
}

// The twins of copy_async, commit_copies and wait_copies. What is on its way is not there before it is waited for, and
// what it replaces is gone at once: both are NaN.
inline void copy_async(void* target, const void* source, bool exist,
                       std::source_location where = std::source_location::current()) {
    if (reinterpret_cast<std::uintptr_t>(target) % 16 != 0 ||
        (exist && reinterpret_cast<std::uintptr_t>(source) % 16 != 0))
        emulation::fail("line %u: a copy at a misaligned address", where.line());
    std::memset(target, 0xff, 16);
    emulation::block.fibers[emulation::block.current]->copies.back().push_back({target, exist ? source : nullptr});
}

inline void commit_copies() { emulation::block.fibers[emulation::block.current]->copies.emplace_back(); }

template <int kPending>
void wait_copies() {
    auto& groups = emulation::block.fibers[emulation::block.current]->copies;
    for (; groups.size() > kPending + 1; groups.pop_front())
        for (const emulation::Copy& copy : groups.front()) {
            if (copy.source)
                std::memcpy(copy.target, copy.source, 16);
            else
                std::memset(copy.target, 0, 16);
        }
}

}  // namespace transferops::cuda
