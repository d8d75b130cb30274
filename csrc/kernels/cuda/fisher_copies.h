// Slabs of aligned operands of per-sample gradients on their way to shared memory by asynchronous copies: they take no
// registers meanwhile, so that several can be on their way.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fisher_tiles.h"

namespace transferops::cuda {

// Copies slabs of an operand, one sample after the other, for a tile in which kParts edges of it stand side by side.
// copy(slab, position, part): the positions from `position` on, zeros beyond the last one and beyond the last column. A
// table is the block's, in shared memory; the caller waits for the block before the first copy.
template <class Operand, class Shape, int kEdge, int kParts>
struct Copier;

template <class T, class Shape, int kEdge, int kParts>
struct Copier<Positions<T>, Shape, kEdge, kParts> {
    using Base = Share<T, Shape, kEdge>;
    using Table = typename Positions<T>::Column;  // none

    const Positions<T>& x;
    const T* data;  // the thread's first position of the sample
    int width;      // columns of the operand from the thread's first one on, none if negative

    static int table_size(std::int64_t) { return 0; }

    __device__ Copier(const Positions<T>& x, std::int64_t group, std::int64_t first, std::int64_t sample, Table*, int)
        : x(x) {
        const std::int64_t column = first + Base::channel();
        data = x.data + sample * x.sample_stride + Base::position(0) * x.position_stride + group * x.columns + column;
        width = static_cast<int>(x.columns - column);
    }

    __device__ void copy(T* slab, int position, int part) const {
        const T* const source = data + (position * x.position_stride + part * kEdge);
        const int height = static_cast<int>(x.positions) - position;
#pragma unroll
        for (int i = 0; i < Base::kLoads; ++i)
            copy_async(slab + Base::Layout::at(Base::channel(), Base::position(i)),
                       source + i * Base::kStep * x.position_stride,
                       part * kEdge < width && Base::position(i) < height);
    }

    __device__ void next_sample() { data += x.sample_stride; }
};

// Of a convolution: its table has the columns, then the corners of the windows of all positions, which are
// found once per block.
template <class T, class Shape, int kEdge, int kParts>
struct Copier<Patches<T>, Shape, kEdge, kParts> {
    using Base = Share<T, Shape, kEdge>;
    using Table = typename Patches<T>::Column;
    static constexpr int kColumns = kEdge * kParts;

    const Patches<T>& x;
    const T* data;  // of the sample
    const Table* table;

    static int table_size(std::int64_t positions) { return kColumns + static_cast<int>(positions); }

    // `positions`: those of the operand, in whole slabs.
    __device__ Copier(const Patches<T>& x, std::int64_t group, std::int64_t first, std::int64_t sample, Table* table,
                      int positions)
        : x(x), data(x.data + sample * x.sample_stride + group * x.channels), table(table) {
        for (int i = threadIdx.x; i < kColumns; i += kTileThreads) table[i] = x.column(first + i);
        for (int t = threadIdx.x; t < positions; t += kTileThreads) {
            const auto corner = x.corner(t);
            table[kColumns + t] = {x.offset(corner), corner};
        }
    }

    __device__ void copy(T* slab, int position, int part) const {
        const Table column = table[part * kEdge + Base::channel()];
#pragma unroll
        for (int i = 0; i < Base::kLoads; ++i) {
            const Table corner = table[kColumns + position + Base::position(i)];
            copy_async(slab + Base::Layout::at(Base::channel(), Base::position(i)),
                       data + (corner.offset + column.offset), x.is_inside(corner.place, column.place));
        }
    }

    __device__ void next_sample() { data += x.sample_stride; }
};

}  // namespace transferops::cuda
