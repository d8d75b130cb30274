// Rows of products between positions, or between positions and directions: slabs of them on their way from global to
// shared memory in the registers of the block. A row is what one position, or one row of a direction, has of channels,
// which are what is summed over.
#pragma once

#include <cstdint>

#include "fisher_tiles.h"

namespace transferops::cuda {

// What a thread moves: kWidth neighbouring channels, always the same of a slab, of every kStep-th row. T is converted
// to E on the way.
template <class T, class E, class Shape, int kEdge>
struct RowShare {
    using Layout = RowSlab<E, kEdge, Shape::kDepth>;
    static constexpr int kWidth = 16 / sizeof(T), kVectors = Shape::kDepth / kWidth;
    static constexpr int kStep = kTileThreads / kVectors, kLoads = kEdge / kStep;
    static_assert(kLoads * kStep == kEdge);

    Vector<T, kWidth> values[kLoads];

    __device__ static int channel() { return threadIdx.x % kVectors * kWidth; }
    __device__ static int row(int load) { return threadIdx.x / kVectors + load * kStep; }

    __device__ void store(E* slab) const {
        constexpr int kPart = 16 / sizeof(E);
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
#pragma unroll
            for (int first = 0; first < kWidth; first += kPart) {
                Vector<E, kPart> part;
#pragma unroll
                for (int v = 0; v < kPart; ++v) {
                    if constexpr (std::is_same_v<T, E>)
                        part.values[v] = values[i].values[first + v];
                    else
                        part.values[v] = convert<E>(values[i].values[first + v]);
                }
                *reinterpret_cast<Vector<E, kPart>*>(slab + Layout::at(row(i), channel() + first)) = part;
            }
    }
};

// Rows `first`, first + 1, ... of an operand, positions counted over the samples. Beyond row `last` that one is read
// again: what comes of it is not used.
template <class Operand, class E, class Shape, int kEdge>
struct Rows;

template <class T, class E, class Shape, int kEdge>
struct Rows<Positions<T>, E, Shape, kEdge> : RowShare<T, E, Shape, kEdge> {
    using Base = RowShare<T, E, Shape, kEdge>;

    const Positions<T>& x;
    const T* rows[Base::kLoads];

    __device__ Rows(const Positions<T>& x, std::int64_t group, std::int64_t first, std::int64_t last) : x(x) {
#pragma unroll
        for (int i = 0; i < Base::kLoads; ++i)
            rows[i] = x.row(min(first + Base::row(i), last)) + group * x.columns + Base::channel();
    }

    __device__ void load(std::int64_t first_channel) {
        const int width = elements_left<Base::kWidth>(x.columns, first_channel + Base::channel());
        load_vectors(Base::values, width, x.aligned, [&](int i) { return rows[i] + first_channel; });
    }
};

template <class T, class E, class Shape, int kEdge>
struct Rows<Patches<T>, E, Shape, kEdge> : RowShare<T, E, Shape, kEdge> {
    using Base = RowShare<T, E, Shape, kEdge>;

    const Patches<T>& x;
    const T* data;
    std::int64_t starts[Base::kLoads];  // of the windows
    typename Patches<T>::Box corners[Base::kLoads];

    __device__ Rows(const Patches<T>& x, std::int64_t group, std::int64_t first, std::int64_t last)
        : x(x), data(x.data + group * x.channels) {
#pragma unroll
        for (int i = 0; i < Base::kLoads; ++i) {
            const std::int64_t row = min(first + Base::row(i), last);
            corners[i] = x.corner(row % x.positions);
            starts[i] = row / x.positions * x.sample_stride + x.offset(corners[i]);
        }
    }

    __device__ void load(std::int64_t first_channel) {
        const std::int64_t channel = first_channel + Base::channel();
        if (x.aligned) {
            const auto column = x.column(channel);
#pragma unroll
            for (int i = 0; i < Base::kLoads; ++i) {
                auto& vector = Base::values[i];
                vector = {};
                if (x.is_inside(corners[i], column.place))
                    vector = *reinterpret_cast<const Vector<T, Base::kWidth>*>(data + (starts[i] + column.offset));
            }
        } else {
#pragma unroll
            for (int v = 0; v < Base::kWidth; ++v) {
                const auto column = x.column(channel + v);
#pragma unroll
                for (int i = 0; i < Base::kLoads; ++i)
                    Base::values[i].values[v] =
                        x.is_inside(corners[i], column.place) ? data[starts[i] + column.offset] : T{};
            }
        }
    }
};

}  // namespace transferops::cuda
