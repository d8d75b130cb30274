// What every CUDA kernel here shares: launching, shared memory, wide loads and stores, the tensor cores.
//
// dynamic_shared, load_transposed, load_matrices and the mma_ functions are all that is not plain CUDA C++: the
// emulation in tests/kernels has twins of them, and everything else below runs there as it stands.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../scalar.h"

namespace transferops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr std::size_t kMostShared = 227 * 1024;  // bytes of a block

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

#ifndef TRANSFEROPS_EMULATION

// The block's dynamic shared memory. Static shared memory is not used: its bounds cannot be checked on the CPU.
__device__ __forceinline__ double* dynamic_shared() {
    extern __shared__ double storage[];
    return storage;
}

// c += a b over a 16 x 8 x 8 block by the whole warp. With g = lane / 4 and t = lane % 4 a lane holds
//   a[2 j + h] = A[g + 8 h][t + 4 j],   b[j] = B[t + 4 j][g],   c[2 h + e] = C[g + 8 h][2 t + e],
// which is also the layout of four 8 x 8 x 4 blocks, all that devices before Hopper have.
__device__ __forceinline__ void mma_f64(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                         : "+d"(c[2 * h]), "+d"(c[2 * h + 1])
                         : "d"(a[2 * j + h]), "d"(b[j]));
#endif
}

// c += a b over a 16 x 8 x 8 block, in the layout of mma_f64. Of a and b only the 19 bits of a tf32 count (sign, 8 of
// the exponent, 10 of the fraction); the products are exact, the sums float32 and rounded towards zero.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// c += a b over a 16 x 8 x 16 block of float16 or bfloat16, two to a word, the lower half first:
//   a[2 j + h] = A[g + 8 h][2 t + 8 j ..], b[j] = B[2 t + 8 j ..][g], c as above, sums as in mma_tf32.
template <class T>
__device__ __forceinline__ void mma_16bit(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, bfloat16>)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The transposes of four 8 x 8 matrices of 16-bit elements in shared memory, by the whole warp: lane i names row i % 8
// of matrix i / 8, 16 bytes aligned to 16. words[m] = elements [2 t][g] and [2 t + 1][g] of matrix m.
__device__ __forceinline__ void load_transposed(std::uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// The same without transposing: words[m] = elements [g][2 t] and [g][2 t + 1] of matrix m.
__device__ __forceinline__ void load_matrices(std::uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// Copies 16 bytes from global to shared memory, both aligned to as many, or writes zeros unless they exist. They arrive
// when wait_copies says so, for this thread; for others after a barrier that follows.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool exist) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<std::uint32_t>(__cvta_generic_to_shared(target))),
                 "l"(source), "r"(exist ? 16 : 0)
                 : "memory");
}

// The thread's copies since the last call are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the thread's last kPending groups.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
    T values[kWidth];
};

// vectors[i] = the first `width` of kWidth elements from source(i) on, then zeros. If `aligned`, one access each, and
// all of them or none exist. The loads depend on nothing but these two conditions, so that all are in flight at once.
template <int kWidth, int kCount, class T, class Source>
__device__ __forceinline__ void load_vectors(Vector<T, kWidth> (&vectors)[kCount], int width, bool aligned,
                                             Source source) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        vectors[i] = {};
        if (aligned) {
            if (width > 0) vectors[i] = *reinterpret_cast<const Vector<T, kWidth>*>(source(i));
        } else {
#pragma unroll
            for (int v = 0; v < kWidth; ++v)
                if (v < width) vectors[i].values[v] = source(i)[v];
        }
    }
}

// Writes the first `width` of kWidth doubles, two per access if `aligned` (then all of them are wanted).
template <int kWidth>
__device__ __forceinline__ void store_vector(double* target, const double (&values)[kWidth], int width, bool aligned) {
#pragma unroll
    for (int v = 0; v < kWidth; v += 2) {
        if (aligned) {
            *reinterpret_cast<Vector<double, 2>*>(target + v) = {{values[v], values[v + 1]}};
        } else {
            if (v < width) target[v] = values[v];
            if (v + 1 < width) target[v + 1] = values[v + 1];
        }
    }
}

// The sum of `value` over the first kLanes lanes of the warp, a power of two, in every one of them.
template <int kLanes = kWarp, class C>
__device__ C sum_lanes(C value) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
    return value;
}

// How many of the kWidth elements from `begin` on exist.
template <int kWidth>
__device__ int elements_left(std::int64_t size, std::int64_t begin) {
    return static_cast<int>(max(min(size - begin, std::int64_t{kWidth}), std::int64_t{0}));
}

constexpr int kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * kWarp;
constexpr std::size_t kSumShared = kSumThreads * sizeof(double);

// The sum over p = 0 .. count - 1 of part(p), a number of its own for each lane, in the first warp of a block of
// kSumThreads threads with kSumShared bytes. Each warp adds one stretch of the parts in order, then the stretches are
// added in order.
template <class Part>
__device__ double sum_parts(std::int64_t count, Part part) {
    double* const stretches = dynamic_shared();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const std::int64_t length = ceil_div(count, kSumWarps);
    const std::int64_t begin = warp * length, end = min(begin + length, count);
    double sum = 0;
#pragma unroll 8
    for (std::int64_t p = begin; p < end; ++p) sum += part(p);
    stretches[threadIdx.x] = sum;
    __syncthreads();
    for (int w = 1; w < kSumWarps && warp == 0; ++w) sum += stretches[w * kWarp + lane];
    return sum;
}

inline bool is_aligned(const void* pointer, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

struct Grid {
    std::int64_t x, y;
};

// Launches `kernel`, unless the grid is empty; raises the limit of dynamic shared memory where the default is too low.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Grid grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
    if (grid.x == 0 || grid.y == 0) return cudaSuccess;
    if (grid.x > INT_MAX || grid.y > USHRT_MAX) return cudaErrorInvalidConfiguration;
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace transferops::cuda
