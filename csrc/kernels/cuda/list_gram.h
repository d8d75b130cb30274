// Kernels over lists of tensors: how they find their piece of a list, and how those that make Gram matrices end.
//
// Lists of tensors travel as tables in the kernels' parameters (up to 32 KB since CUDA 12.1), so that one launch covers
// them all, nothing is copied to the device beforehand, and CUDA graphs can record the call. Longer lists take several
// launches.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

namespace transferops::cuda {

constexpr int kListThreads = 256;
constexpr int kListWarps = kListThreads / kWarp;

// Which of `count` pieces `chunk` belongs to: the last that begins at or before it. first_chunks[0] is 0.
__device__ inline int piece_of(const std::int64_t* first_chunks, int count, std::int64_t chunk) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first_chunks[middle] <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

constexpr int kGramRows = 8;               // of a tile of a Gram matrix, at most
constexpr std::int64_t kGramChunk = 4096;  // weights that a block takes at a time

// parts[block] = the sum of the threads' sums, of the upper triangle if kDiagonal. By the whole block, in 4 KiB of
// shared memory.
template <int kRows, bool kDiagonal>
__device__ __forceinline__ void write_part(const double (&sums)[kRows][kRows], double* parts) {
    double* const shared = dynamic_shared();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = kDiagonal ? i : 0; j < kRows; ++j) {
            const double sum = sum_lanes(sums[i][j]);
            if (lane == 0) shared[warp * kRows * kRows + i * kRows + j] = sum;
        }
    __syncthreads();  // the warps' sums are complete
    const int index = threadIdx.x, row = index / kRows, column = index % kRows;
    if (row >= kRows || (kDiagonal && row > column)) return;
    double sum = 0;
#pragma unroll
    for (int w = 0; w < kListWarps; ++w) sum += shared[w * kRows * kRows + index];
    parts[std::int64_t{blockIdx.x} * kRows * kRows + index] = sum;
}

struct ListGramPlan {
    int tile;                    // rows of a tile
    std::int64_t tiles, blocks;  // blocks at most, of a launch

    std::int64_t part() const { return std::int64_t{tile} * tile; }
    std::size_t shared_bytes() const { return kListWarps * part() * sizeof(double); }
};

inline ListGramPlan plan_list_gram(std::int64_t rows, int multiprocessors) {
    const int tile = rows <= 4 ? 4 : kGramRows;
    return {tile, ceil_div(rows, tile), std::int64_t{2} * multiprocessors};
}

// The entries of the pair of tiles that begin at `first_row` and `first_column`, in both halves of gram [rows, rows]:
// the sum over `count` parts of what write_part left of each.
cudaError_t add_gram_parts(double* gram, const double* parts, std::int64_t count, std::int64_t rows,
                           std::int64_t first_row, std::int64_t first_column, const ListGramPlan& plan,
                           cudaStream_t stream);

}  // namespace transferops::cuda
