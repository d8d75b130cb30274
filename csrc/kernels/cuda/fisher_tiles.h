// Operands of per-sample gradients in global memory, and slabs of them on their way to shared memory in the registers
// of the block.
//
// A tile is a part of G_n = sum_t b_nt a_nt^T [rows, columns]; its left operand are output gradients b, one per row,
// its right operand inputs a, one per column ("channels" of either).
#pragma once

#include <climits>
#include <cstdint>

#include "fisher.h"
#include "fragments.h"

namespace transferops::cuda {

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

    // A position, counted over the samples.
    __device__ const T* row(std::int64_t index) const {
        return data + index / positions * sample_stride + index % positions * position_stride;
    }

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

// Squares of a linear layer's single positions, by way of which its diagonal is one product, (b * b)^T (a * a): the
// samples take the place of positions, a slab of them that of a sample.
template <class T>
struct Squares {
    using Element = Compute<T>;
    struct Column {};

    const T* data;
    std::int64_t samples, positions, columns, sample_stride;  // positions: of a slab
    bool aligned;                                             // to 16 bytes, in every row

    __host__ __device__ std::int64_t weight_column(std::int64_t column) const { return column; }

    template <class Shape, int kEdge>
    struct Loader {
        using Layout = Slab<Element, kEdge, Shape::kDepth>;
        static constexpr int kShare = kEdge * Shape::kDepth / kTileThreads;  // elements of a thread
        static constexpr int kWidth = kShare < 16 / sizeof(T) ? kShare : 16 / sizeof(T);
        static constexpr int kVectors = kEdge / kWidth, kStep = kTileThreads / kVectors, kLoads = kShare / kWidth;

        const Squares& x;
        const T* data;
        Vector<T, kWidth> values[kLoads];
        int width, height;  // how many of the thread's columns, and of the slab's samples, exist

        __device__ static int column() { return threadIdx.x % kVectors * kWidth; }
        __device__ static int row(int load) { return threadIdx.x / kVectors + load * kStep; }

        __device__ Loader(const Squares& x, std::int64_t group, std::int64_t first, Column*) : x(x) {
            data = x.data + group * x.columns + first + column();
            width = elements_left<kWidth>(x.columns, first + column());
        }

        // Beyond the last sample, that sample is read again.
        __device__ void load(std::int64_t slab, std::int64_t) {
            const std::int64_t first = slab * Shape::kDepth;
            height = static_cast<int>(min(x.samples - first, std::int64_t{Shape::kDepth}));
            load_vectors(values, width, x.aligned,
                         [&](int i) { return data + (first + min(row(i), height - 1)) * x.sample_stride; });
        }

        __device__ void store(Element* slab) const {
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                Vector<Element, kWidth> squares{};
#pragma unroll
                for (int v = 0; v < kWidth; ++v) {
                    const Element value = row(i) < height ? convert<Element>(values[i].values[v]) : Element{0};
                    squares.values[v] = value * value;
                }
                *reinterpret_cast<Vector<Element, kWidth>*>(slab + Layout::at(column(), row(i))) = squares;
            }
        }
    };
};

// Divides numbers from 0 to 2^31 - 1 by a product and a shift (Granlund and Montgomery, 1994): with 2^shift >= value
// and the multiplier 2^(31 + shift) / value, rounded up, the quotient is less than 1 / value too large.
struct Divisor {
    std::uint32_t value, multiplier;
    int shift;

    // A divisor of 0, that of an empty signal, of which no index is divided, stands as 1.
    explicit Divisor(std::int64_t divisor) : value(static_cast<std::uint32_t>(divisor > 0 ? divisor : 1)), shift(0) {
        while ((std::uint64_t{1} << shift) < value) ++shift;
        multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + shift)) + value - 1) / value);
    }

    __host__ __device__ int quotient(int x) const {
        const auto high =
            static_cast<std::uint32_t>(std::uint64_t{2u * static_cast<std::uint32_t>(x)} * multiplier >> 32);
        return static_cast<int>(high >> shift);
    }
    __host__ __device__ int remainder(int x, int quotient) const { return x - quotient * static_cast<int>(value); }
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
    Box size, kernel, stride, padding, dilation;
    Divisor by_channels, by_kernel_width, by_kernel_height, by_output_width, by_output_height;
    bool aligned;  // to 16 bytes, for every element of the kernel

    // Where a column stands in the weight, which has the elements of the kernel fastest.
    __host__ __device__ std::int64_t weight_column(std::int64_t column) const {
        const int c = static_cast<int>(column);
        return c % channels * (kernel.depth * kernel.height * kernel.width) + c / channels;
    }

    __device__ Column column(std::int64_t index) const {
        if (index >= columns) return {0, {kOutside, 0, 0}};
        const int element = by_channels.quotient(static_cast<int>(index));
        const int channel = by_channels.remainder(static_cast<int>(index), element);
        const int row = by_kernel_width.quotient(element), plane = by_kernel_height.quotient(row);
        const Box place{plane * dilation.depth, by_kernel_height.remainder(row, plane) * dilation.height,
                        by_kernel_width.remainder(element, row) * dilation.width};
        return {offset(place) + channel, place};
    }

    __device__ std::int64_t offset(const Box& place) const {
        return place.depth * strides.depth + place.height * strides.height + place.width * strides.width;
    }

    // The corner of the window at an output position.
    __device__ Box corner(std::int64_t position) const {
        if (position >= positions) return {kOutside, 0, 0};
        const int t = static_cast<int>(position), row = by_output_width.quotient(t);
        const int plane = by_output_height.quotient(row);
        return {plane * stride.depth - padding.depth,
                by_output_height.remainder(row, plane) * stride.height - padding.height,
                by_output_width.remainder(t, row) * stride.width - padding.width};
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
