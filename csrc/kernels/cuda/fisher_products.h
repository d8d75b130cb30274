// Products of a tile of per-sample gradients with tiles of directions, and their sums over what holds parts of a tile:
// lanes by shuffles, warps by way of shared memory after the next barrier, tiles in global memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "fragments.h"

namespace transferops::cuda {

template <class Shape, class C>
__device__ C dot(const Accumulators<Shape, C>& gradient, const Accumulators<Shape, C>& direction) {
    C sums[4] = {};
#pragma unroll
    for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
        for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] += gradient[m][n][i] * direction[m][n][i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// With direction k of those in shared memory (own_element).
template <class Shape, class C>
__device__ C dot(const Accumulators<Shape, C>& gradient, const C* directions, int k) {
    constexpr int kWidth = 16 / sizeof(C);
    C sums[kWidth] = {};
#pragma unroll
    for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
        for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
            for (int i = 0; i < 4; i += kWidth) {
                const auto direction =
                    *reinterpret_cast<const Vector<C, kWidth>*>(own_element<Shape>(directions, k, m, n, i));
#pragma unroll
                for (int v = 0; v < kWidth; ++v) sums[v] += gradient[m][n][i + v] * direction.values[v];
            }
#pragma unroll
    for (int v = 1; v < kWidth; ++v) sums[0] += sums[v];
    return sums[0];
}

// Of a block: its samples' products with `chunk` directions, two samples in turn in shared memory, then in
// parts[sample * count + k], where those of the block's tiles are added.
template <class C>
struct ProductSums {
    C* warps;  // [2][kTileWarps][chunk]
    C* parts;
    std::int64_t count;
    int chunk;

    __host__ __device__ static constexpr std::size_t shared_bytes(std::int64_t chunk) {
        return ceil_div(2 * kTileWarps * chunk * sizeof(C), 16) * 16;
    }

    // A thread's part of a product.
    __device__ void add(std::int64_t sample, int k, C product) const {
        const C sum = sum_lanes(product);
        if (threadIdx.x % kWarp == 0) of_warp(sample, threadIdx.x / kWarp, k) = sum;
    }

    // After a barrier, by one thread per direction.
    __device__ void finish(std::int64_t sample, bool first_tile) const {
        if (const int k = threadIdx.x; k < chunk) {
            C sum = 0;
#pragma unroll
            for (int warp = 0; warp < kTileWarps; ++warp) sum += of_warp(sample, warp, k);
            C& part = parts[sample * count + k];
            part = first_tile ? sum : part + sum;
        }
    }

  private:
    __device__ C& of_warp(std::int64_t sample, int warp, int k) const {
        return warps[(sample % 2 * kTileWarps + warp) * chunk + k];
    }
};

// How many slots of tiles have parts of their own.
inline std::int64_t most_product_slots(std::int64_t samples, std::int64_t count, int multiprocessors) {
    constexpr std::int64_t kMostParts = std::int64_t{1} << 25;  // 128 MiB of float
    return std::clamp<std::int64_t>(kMostParts / (samples * count), 1, 4 * std::int64_t{multiprocessors});
}

}  // namespace transferops::cuda
