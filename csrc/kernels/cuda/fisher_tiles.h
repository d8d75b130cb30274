// Tiles of per-sample gradients on the tensor cores: slabs of operands in shared memory, fragments of them in
// registers.
//
// A tile is a part of G_n = sum_t b_nt a_nt^T [rows, columns]; its left operand are output gradients b, one per row,
// its right operand inputs a, one per column ("channels" of either). A slab is what one operand has of kDepth
// positions.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "device.h"
#include "fisher.h"

namespace transferops::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarp;

// The shape of a tile and of the warps' parts of it. Wide tiles read the least from L2; narrow ones leave registers for
// the promoted sums of float and for double, and shared memory for directions.
template <class T, bool kWide>
struct TileShape {
    static constexpr int kRows = 128, kColumns = kWide ? 128 : 64;
    static constexpr int kDepth = sizeof(T) == 2 ? 32 : 16;
    static constexpr int kSteps = 2;  // products of the tensor cores per slab
    static constexpr int kStepDepth = kDepth / kSteps;
    static constexpr int kWarpRows = kWide ? 64 : 32, kWarpColumns = 32;
    static constexpr int kWarpsDown = kRows / kWarpRows;
    static constexpr int kFragmentRows = kWarpRows / 16, kFragmentColumns = kWarpColumns / 8;
    static constexpr int kElements = kRows * kColumns;
    static_assert(kTileWarps == kWarpsDown * (kColumns / kWarpColumns));
};

// How kDepth positions of kEdge channels lie in shared memory: as in global memory, channels adjacent. The pitch keeps
// what a warp reads of a fragment in different banks: 16 bytes more than a multiple of 128 for load_transposed, 8 words
// modulo 32 for float, 4 modulo 16 for double.
template <class T, int kEdge, int kDepth>
struct Slab {
    static constexpr int kPitch = kEdge + (sizeof(T) == 8 ? 4 : 8);
    static constexpr int kElements = kPitch * kDepth;
    static constexpr std::size_t kBytes = kElements * sizeof(T);
    static_assert(kEdge % 64 == 0 && kPitch * sizeof(T) % 16 == 0);

    __device__ static int at(int channel, int position) { return position * kPitch + channel; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Fragments: 16 channels by one step of positions, spread over a warp so that they serve as either operand. Word 2 j +
// h belongs to half h of the channels and half j of the positions.

template <class T>
struct Fragment {  // float16 and bfloat16: positions in pairs
    std::uint32_t words[4];

    template <class Layout>
    __device__ void load(const T* slab, int channel, int position) {
        const int line = threadIdx.x % 8, h = threadIdx.x / 8 % 2, j = threadIdx.x / 16 % 2;
        load_transposed(words, slab + Layout::at(channel + h * 8, position + j * 8 + line));
    }
};

// Each number as the sum of two of 11 significant bits, but for the last of its 24 bits in half of all cases.
template <>
struct Fragment<float> {
    float high[4], low[4];

    template <class Layout>
    __device__ void load(const float* slab, int channel, int position) {
        const int group = threadIdx.x % kWarp / 4, member = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = slab[Layout::at(channel + i % 2 * 8 + group, position + i / 2 * 4 + member)];
            high[i] = round_to_tf32(x);
            low[i] = x - high[i];  // exact; mma_tf32 cuts its 12th bit off
        }
    }

    // To nearest, ties away from zero. Bits below those of a tf32 need not be cleared: mma_tf32 does not see them, but
    // the difference above does.
    __device__ static float round_to_tf32(float x) {
        return __builtin_bit_cast(float, (__builtin_bit_cast(std::uint32_t, x) + 0x1000u) & 0xffffe000u);
    }
};

template <>
struct Fragment<double> {
    double values[4];

    template <class Layout>
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
    const std::uint32_t words[2] = {right.words[h], right.words[2 + h]};
    mma_16bit<T>(sums, left.words, words);
}

__device__ inline void multiply(float (&sums)[4], const Fragment<float>& left, const Fragment<float>& right, int h) {
    const float high[2] = {right.high[h], right.high[2 + h]}, low[2] = {right.low[h], right.low[2 + h]};
    mma_tf32(sums, left.low, high);
    mma_tf32(sums, left.high, low);
    mma_tf32(sums, left.high, high);
}

__device__ inline void multiply(double (&sums)[4], const Fragment<double>& left, const Fragment<double>& right, int h) {
    const double values[2] = {right.values[h], right.values[2 + h]};
    mma_f64(sums, left.values, values);
}

// ---------------------------------------------------------------------------------------------------------------------
// Operands in global memory, and slabs of them on their way to shared memory in the registers of the block.

// What a thread moves: kWidth neighbouring channels, always the same, of every kStep-th position of a slab.
template <class T, class Shape, int kEdge>
struct Share {
    using Layout = Slab<T, kEdge, Shape::kDepth>;
    static constexpr int kWidth = 16 / sizeof(T), kVectors = kEdge / kWidth;
    static constexpr int kStep = kTileThreads / kVectors, kLoads = Shape::kDepth / kStep;

    Vector<T, kWidth> values[kLoads];

    __device__ static int channel() { return threadIdx.x % kVectors * kWidth; }
    __device__ static int position(int load) { return threadIdx.x / kVectors + load * kStep; }

    // Zeros from position `height` on.
    __device__ void store(T* slab, int height) const {
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            *reinterpret_cast<Vector<T, kWidth>*>(slab + Layout::at(channel(), position(i))) =
                position(i) < height ? values[i] : Vector<T, kWidth>{};
    }
};

// Positions of a linear layer.
template <class T>
struct Positions {
    using Element = T;
    struct Column {};  // needs no table

    const T* data;
    std::int64_t positions, columns, sample_stride, position_stride;  // columns: the channels of a group
    bool aligned;                                                     // to 16 bytes, in every row

    __host__ __device__ std::int64_t weight_column(std::int64_t column) const { return column; }

    template <class Shape, int kEdge>
    struct Loader : Share<T, Shape, kEdge> {
        using Base = Share<T, Shape, kEdge>;

        const Positions& x;
        const T* data;
        int width, height;  // how many of the thread's channels, and of the slab's positions, exist

        __device__ Loader(const Positions& x, std::int64_t group, std::int64_t first, Column*) : x(x) {
            const std::int64_t column = first + Base::channel();
            data = x.data + group * x.columns + column;
            width = elements_left<Base::kWidth>(x.columns, column);
        }

        // Beyond the last position, that position is read again.
        __device__ void load(std::int64_t sample, std::int64_t position) {
            height = static_cast<int>(min(x.positions - position, std::int64_t{Shape::kDepth}));
            const T* source = data + sample * x.sample_stride + position * x.position_stride;
            load_vectors(Base::values, width, x.aligned,
                         [&](int i) { return source + min(Base::position(i), height - 1) * x.position_stride; });
        }

        __device__ void store(T* slab) const { Base::store(slab, height); }
    };
};

// Inputs under the window of a convolution. The columns are the elements of the kernel by the channels of a group, the
// latter fastest, so that neighbours are neighbours in memory. Output gradients are the case of a 1 x 1 x 1 window.
// Indices are unfolded, never elements.
template <class T>
struct Patches {
    using Element = T;
    struct Box {
        int depth, height, width;
    };

    // How far a column is from the window's corner. Beyond the last one, no element of any window is inside.
    struct Column {
        std::int64_t offset;
        Box place;
    };
    static constexpr int kOutside = INT_MIN / 2;

    const T* data;
    std::int64_t positions, columns, sample_stride;
    Extent strides;  // of the signal
    int channels;    // of a group
    Box size, outputs, kernel, stride, padding, dilation;
    bool aligned;  // to 16 bytes, for every element of the kernel

    // Where a column stands in the weight, which has the elements of the kernel fastest.
    __host__ __device__ std::int64_t weight_column(std::int64_t column) const {
        const int c = static_cast<int>(column);
        return c % channels * (kernel.depth * kernel.height * kernel.width) + c / channels;
    }

    __device__ Column column(std::int64_t index) const {
        if (index >= columns) return {0, {kOutside, 0, 0}};
        const int element = static_cast<int>(index) / channels, channel = static_cast<int>(index) % channels;
        const Box place{element / (kernel.width * kernel.height) * dilation.depth,
                        element / kernel.width % kernel.height * dilation.height,
                        element % kernel.width * dilation.width};
        return {offset(place) + channel, place};
    }

    __device__ std::int64_t offset(const Box& place) const {
        return place.depth * strides.depth + place.height * strides.height + place.width * strides.width;
    }

    // The corner of the window at an output position.
    __device__ Box corner(std::int64_t position) const {
        if (position >= positions) return {kOutside, 0, 0};
        const int t = static_cast<int>(position), row = t / outputs.width;
        return {row / outputs.height * stride.depth - padding.depth,
                row % outputs.height * stride.height - padding.height,
                t % outputs.width * stride.width - padding.width};
    }

    __device__ bool is_inside(const Box& corner, const Box& place) const {
        const auto within = [](int index, int size) {
            return static_cast<unsigned>(index) < static_cast<unsigned>(size);
        };
        return within(corner.depth + place.depth, size.depth) && within(corner.height + place.height, size.height) &&
               within(corner.width + place.width, size.width);
    }

    template <class Shape, int kEdge>
    struct Loader : Share<T, Shape, kEdge> {
        using Base = Share<T, Shape, kEdge>;

        const Patches& x;
        const Column* table;  // of the thread's columns
        Column column;        // the first of them
        const T* data;

        // Fills the table of columns; the caller waits for the block before the first load.
        __device__ Loader(const Patches& x, std::int64_t group, std::int64_t first, Column* columns)
            : x(x),
              table(columns + Base::channel()),
              column(x.column(first + Base::channel())),
              data(x.data + group * x.channels) {
            if (threadIdx.x < kEdge) columns[threadIdx.x] = x.column(first + threadIdx.x);
        }

        __device__ void load(std::int64_t sample, std::int64_t position) {
#pragma unroll
            for (int i = 0; i < Base::kLoads; ++i) {
                const Box corner = x.corner(position + Base::position(i));
                const std::int64_t start = sample * x.sample_stride + x.offset(corner);
                auto& vector = Base::values[i];
                vector = {};
                if (x.aligned) {
                    if (x.is_inside(corner, column.place))
                        vector = *reinterpret_cast<const Vector<T, Base::kWidth>*>(data + start + column.offset);
                } else {
#pragma unroll
                    for (int v = 0; v < Base::kWidth; ++v)
                        if (x.is_inside(corner, table[v].place)) vector.values[v] = data[start + table[v].offset];
                }
            }
        }

        __device__ void store(T* slab) const { Base::store(slab, Shape::kDepth); }
    };
};

}  // namespace transferops::cuda
