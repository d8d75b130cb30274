// Products on the tensor cores from slabs of two operands in shared memory, by way of fragments of them in registers.
//
// A product is sum_t b_t a_t^T [rows, columns] over positions t; its left operand has a channel per row, its right
// operand one per column. A slab is what one operand has of kDepth positions. In products between positions, which are
// summed over channels, the two change places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "device.h"

namespace transferops::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarp;

// A float of at most 11 significant bits, all that mma_tf32 sees.
struct tf32 {
    float value;
};

// The shape of a tile and of the warps' parts of it. Large tiles read the least from L2; small ones leave registers for
// the promoted sums of float and for double, and shared memory for directions.
template <class T, int kTileRows, int kTileColumns>
struct TileShape {
    static constexpr int kRows = kTileRows, kColumns = kTileColumns;
    static constexpr int kDepth = sizeof(T) == 2 ? 32 : 16;
    static constexpr int kSteps = 2;  // products of the tensor cores per slab
    static constexpr int kStepDepth = kDepth / kSteps;
    static constexpr int kElements = kRows * kColumns;
    static constexpr int kWarpColumns = kElements > 128 * 128 ? 64 : 32, kWarpsAcross = kColumns / kWarpColumns;
    static constexpr int kWarpsDown = kTileWarps / kWarpsAcross, kWarpRows = kRows / kWarpsDown;
    static constexpr int kFragmentRows = kWarpRows / 16, kFragmentColumns = kWarpColumns / 8;
    static_assert(kWarpRows % 16 == 0 && kRows == kWarpsDown * kWarpRows && kColumns == kWarpsAcross * kWarpColumns);

    __device__ static int warp_across() { return threadIdx.x / kWarp / kWarpsDown; }
    __device__ static int warp_row() { return threadIdx.x / kWarp % kWarpsDown * kWarpRows; }
    __device__ static int warp_column() { return warp_across() * kWarpColumns; }
};

// How kDepth positions of kEdge channels lie in shared memory: as in global memory, channels adjacent. The pitch keeps
// what a warp reads of a fragment in different banks: 16 bytes more than a multiple of 128 for load_transposed, 8 words
// modulo 32 for float, 4 modulo 16 for double.
template <class T, int kEdge, int kDepth>
struct Slab {
    static constexpr bool kDepthAdjacent = false;
    static constexpr int kPitch = kEdge + (sizeof(T) == 8 ? 4 : 8);
    static constexpr int kElements = kPitch * kDepth;
    static constexpr std::size_t kBytes = kElements * sizeof(T);
    static_assert(kEdge % 64 == 0 && kPitch * sizeof(T) % 16 == 0);

    __device__ static int at(int channel, int position) { return position * kPitch + channel; }
};

// The same of a product between positions: rows of kDepth channels, again adjacent. Of the pitch, 16 bytes times an odd
// number serve load_matrices, 20 words float, 4 modulo 16 double.
template <class T, int kEdge, int kDepth>
struct RowSlab {
    static constexpr bool kDepthAdjacent = true;
    static constexpr int kPitch = kDepth + (sizeof(T) == 2 ? 8 : 4);
    static constexpr int kElements = kPitch * kEdge;
    static constexpr std::size_t kBytes = kElements * sizeof(T);
    static_assert(kPitch * sizeof(T) % 16 == 0);

    __device__ static int at(int row, int channel) { return row * kPitch + channel; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Fragments: 16 channels by one step of positions, spread over a warp so that they serve as either operand. Word 2 j +
// h belongs to half h of the channels and half j of the positions; of a right operand of 16 bits word 2 h + j, because
// the tensor cores take what belongs to half h from neighbouring registers.

template <class T>
struct Fragment {  // float16 and bfloat16: positions in pairs
    std::uint32_t words[4];

    template <class Layout, bool kRight>
    __device__ void load(const T* slab, int channel, int position) {
        const int line = threadIdx.x % 8, low = threadIdx.x / 8 % 2, high = threadIdx.x / 16 % 2;
        const int h = kRight ? high : low, j = kRight ? low : high;
        if constexpr (Layout::kDepthAdjacent)
            load_matrices(words, slab + Layout::at(channel + h * 8 + line, position + j * 8));
        else
            load_transposed(words, slab + Layout::at(channel + h * 8, position + j * 8 + line));
    }
};

// To nearest, ties away from zero. Bits below those of a tf32 need not be cleared for mma_tf32, which does not see
// them, but are for the difference from what they were. Some NaN become 0.
__device__ inline float round_to_tf32(float x) {
    return __builtin_bit_cast(float, (__builtin_bit_cast(std::uint32_t, x) + 0x1000u) & 0xffffe000u);
}

// Each number as the sum of two of 11 significant bits, but for the last of its 24 bits in half of all cases.
template <>
struct Fragment<float> {
    float high[4], low[4];

    template <class Layout, bool>
    __device__ void load(const float* slab, int channel, int position) {
        const int group = threadIdx.x % kWarp / 4, member = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = slab[Layout::at(channel + i % 2 * 8 + group, position + i / 2 * 4 + member)];
            high[i] = round_to_tf32(x);
            low[i] = x - high[i];  // exact; mma_tf32 cuts its 12th bit off. NaN for NaN
        }
    }
};

template <>
struct Fragment<tf32> {
    float values[4];

    template <class Layout, bool>
    __device__ void load(const tf32* slab, int channel, int position) {
        const int group = threadIdx.x % kWarp / 4, member = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            values[i] = slab[Layout::at(channel + i % 2 * 8 + group, position + i / 2 * 4 + member)].value;
    }
};

template <>
struct Fragment<double> {
    double values[4];

    template <class Layout, bool>
    __device__ void load(const double* slab, int channel, int position) {
        const int group = threadIdx.x % kWarp / 4, member = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            values[i] = slab[Layout::at(channel + i % 2 * 8 + group, position + i / 2 * 4 + member)];
    }
};

// sums += left right^T for all of `left` and half h of `right`: 16 x 8 numbers, as mma_f64 lays them out.
template <class T>
__device__ void multiply(float (&sums)[4], const Fragment<T>& left, const Fragment<T>& right, int h) {
    const std::uint32_t words[2] = {right.words[2 * h], right.words[2 * h + 1]};
    mma_16bit<T>(sums, left.words, words);
}

__device__ inline void multiply(float (&sums)[4], const Fragment<float>& left, const Fragment<float>& right, int h) {
    const float high[2] = {right.high[h], right.high[2 + h]}, low[2] = {right.low[h], right.low[2 + h]};
    mma_tf32(sums, left.low, high);
    mma_tf32(sums, left.high, low);
    mma_tf32(sums, left.high, high);
}

__device__ inline void multiply(float (&sums)[4], const Fragment<tf32>& left, const Fragment<tf32>& right, int h) {
    const float values[2] = {right.values[h], right.values[2 + h]};
    mma_tf32(sums, left.values, values);
}

__device__ inline void multiply(double (&sums)[4], const Fragment<double>& left, const Fragment<double>& right, int h) {
    const double values[2] = {right.values[h], right.values[2 + h]};
    mma_f64(sums, left.values, values);
}

template <class Shape, class C>
using Accumulators = C[Shape::kFragmentRows][Shape::kFragmentColumns][4];

template <class Shape, class C>
__device__ void add_squares(Accumulators<Shape, C>& squares, const Accumulators<Shape, C>& values) {
#pragma unroll
    for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
        for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) squares[m][n][i] += values[m][n][i] * values[m][n][i];
}

// Tiles in shared memory in the order of the accumulators, so that a warp reads 512 neighbouring bytes; each thread
// writes and reads its own: accumulator i of fragment (m, n) of tile k.
template <class Shape, class C>
__device__ C* own_element(C* tiles, int k, int m, int n, int i) {
    constexpr int kWidth = 16 / sizeof(C);
    const int fragment = (k * Shape::kFragmentRows + m) * Shape::kFragmentColumns + n;
    return tiles + ((fragment * 4 + i / kWidth * kWidth) * kTileThreads + threadIdx.x * kWidth + i % kWidth);
}

// sums += the product of step `step` of two slabs.
template <class Shape, template <class, int, int> class Layout = Slab, class T, class C>
__device__ void multiply_step(Accumulators<Shape, C>& sums, const T* left, const T* right, int step) {
    const int position = step * Shape::kStepDepth;
    Fragment<T> a[Shape::kFragmentRows], b;
#pragma unroll
    for (int m = 0; m < Shape::kFragmentRows; ++m)
        a[m].template load<Layout<T, Shape::kRows, Shape::kDepth>, false>(left, Shape::warp_row() + m * 16, position);
#pragma unroll
    for (int n = 0; n < Shape::kFragmentColumns; ++n) {
        if (n % 2 == 0)
            b.template load<Layout<T, Shape::kColumns, Shape::kDepth>, true>(right, Shape::warp_column() + n * 8,
                                                                             position);
#pragma unroll
        for (int m = 0; m < Shape::kFragmentRows; ++m) multiply(sums[m][n], a[m], b, n % 2);
    }
}

// sums += the product of two slabs. The tensor cores round float sums towards zero, so those of float operands are
// theirs only within a slab. `before(step)` and `after(step)` run around each step.
template <class Shape, template <class, int, int> class Layout = Slab, class T, class C, class Before, class After>
__device__ void multiply_slabs(Accumulators<Shape, C>& sums, const T* left, const T* right, Before before,
                               After after) {
    constexpr bool kPromotes = std::is_same_v<T, float>;
    C fresh[kPromotes ? Shape::kFragmentRows : 1][Shape::kFragmentColumns][4] = {};
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
        before(step);
        if constexpr (kPromotes)
            multiply_step<Shape, Layout>(fresh, left, right, step);
        else
            multiply_step<Shape, Layout>(sums, left, right, step);
        after(step);
    }
    if constexpr (kPromotes) {
#pragma unroll
        for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
            for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] += fresh[m][n][i];
    }
}

// Products of the slabs `begin` to `end` - 1 of two operands: load(number, operand) brings a slab to registers, store
// on to shared memory, where slabs take turns. multiply(number, before, after) has two steps, around which the next
// slab of either operand is moved.
template <class Load, class Store, class Multiply>
__device__ void stream_slabs(int begin, int end, Load load, Store store, Multiply multiply) {
    for (int operand = 0; operand < 2 && begin < end; ++operand) {
        load(begin, operand);
        store(begin, operand);
    }
    for (int number = begin; number < end; ++number) {
        __syncthreads();  // this slab is complete, and no warp reads the previous one any more
        const int next = number + 1;
        multiply(
            number,
            [&](int step) {
                if (next < end) load(next, step);
            },
            [&](int step) {
                if (next < end) store(next, step);
            });
    }
}

}  // namespace transferops::cuda
