// Gram matrices on the narrow tensor cores (moments.h). Figures in the comments are budgets and floors, not yet
// measured on a GPU: an H200 has 132 multiprocessors of about 1.75 GHz, dense tensor rates of 990 (bfloat16) and 495
// TFLOP/s (tf32) by its datasheet, of which mma.sync reaches about two thirds, and L2 gives a multiprocessor about 24
// bytes per clock.

#include <cmath>
#include <cstddef>
#include <type_traits>

#include "feature_sets.h"
#include "fragments.h"
#include "gram_tiles.h"

namespace transferops::cuda {
namespace {

// The shift of a column, so that x - shift is rounded as a float, not at the size of x.
template <class T>
struct Origin {
    float high = 0, low = 0;

    Origin() = default;
    __device__ explicit Origin(double shift)
        : high(static_cast<float>(shift)), low(static_cast<float>(shift - to_double(high))) {}
    __device__ float distance(T x) const { return to_float(x) - high - low; }
};

template <>
struct Origin<double> {
    double shift = 0;

    Origin() = default;
    __device__ explicit Origin(double shift) : shift(shift) {}
    __device__ float distance(double x) const { return static_cast<float>(x - shift); }
};

// x as an element of a slab, rounded to nearest.
template <class E>
__device__ E element(float x) {
    if constexpr (std::is_same_v<E, tf32>) {
        return {x != x ? x : round_to_tf32(x)};
    } else if constexpr (std::is_same_v<E, bfloat16>) {
        const auto bits = __builtin_bit_cast(std::uint32_t, x);
        const std::uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
        return {static_cast<std::uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16)};
    } else {
        return x;
    }
}

// Tiles of 256 x 128 read the least from L2: a thread holds 128 sums, which leaves no registers for those of a slab
// apart (float) or for a slab of doubles.
template <class T, class E>
using ShapeFor =
    TileShape<E, std::is_same_v<E, float> || std::is_same_v<T, double> ? SquareTile::kRows : TallTile::kRows, 128>;

// Rows that are summed in float before they are added to the totals: for float in sums of slabs, rounded to nearest;
// otherwise on the tensor cores, which round every step of 8 rows (tf32) or 16 towards zero. Totals of the latter are
// again float, rounded to nearest, for so many runs as keep the error of both below 2^-14.
template <class E>
struct Runs {
    static constexpr bool kFloat = std::is_same_v<E, float>;
    using Total = std::conditional_t<kFloat, double, float>;
    static constexpr int kSlabs = (kFloat ? 1024 : 2048) / TileShape<E, 128, 128>::kDepth;
    static constexpr std::int64_t kMostSlabs = kFloat ? INT_MAX : 512 * kSlabs;  // of a block
};

// Dynamic shared memory, in this order: totals, origins of both operands' columns, two slabs of each in turn.
template <class T, class E>
struct NarrowShared {
    using Shape = ShapeFor<T, E>;
    using Total = typename Runs<E>::Total;
    using Left = Slab<E, Shape::kRows, Shape::kDepth>;
    using Right = Slab<E, Shape::kColumns, Shape::kDepth>;
    static constexpr std::size_t kTotals = Shape::kElements * sizeof(Total);
    static constexpr int kColumns = Shape::kRows + Shape::kColumns;  // of the features
    static constexpr std::size_t kOrigins = kColumns * sizeof(Origin<T>);
    static constexpr std::size_t kBytes = kTotals + kOrigins + 2 * (Left::kBytes + Right::kBytes);
    static_assert(kBytes <= kMostShared);
};

// A slab on its way from global to shared memory, in the registers of the block: a thread moves kWidth neighbouring
// columns, always the same, of every kStep-th row.
template <class T, class E, int kEdge>
struct NarrowStaged {
    static constexpr int kDepth = ShapeFor<T, E>::kDepth;
    using Layout = Slab<E, kEdge, kDepth>;
    static constexpr int kWidth = 16 / sizeof(T), kVectors = kEdge / kWidth;
    static constexpr int kStep = kTileThreads / kVectors, kLoads = kDepth / kStep;

    Vector<T, kWidth> values[kLoads];
    int width, height;  // how many of the thread's columns, and of the slab's rows, exist

    __device__ static int column() { return threadIdx.x % kVectors * kWidth; }
    __device__ static int row(int load) { return threadIdx.x / kVectors + load * kStep; }

    // Beyond the last row, that row is read again; `store` makes it zero.
    __device__ void load(const FeatureSets<T>& x, bool aligned, std::int64_t first_row, std::int64_t first_column) {
        width = elements_left<kWidth>(x.columns, first_column + column());
        height = static_cast<int>(min(x.rows - first_row, std::int64_t{kDepth}));
        const T* source = x.data + first_row * x.row_stride + first_column + column();
        load_vectors(values, width, aligned, [&](int i) { return source + min(row(i), height - 1) * x.row_stride; });
    }

    __device__ void store(E* slab, const Origin<T>* origins) const {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            Vector<E, kWidth> elements;
#pragma unroll
            for (int v = 0; v < kWidth; ++v)
                elements.values[v] = element<E>(
                    row(i) < height && v < width ? origins[column() + v].distance(values[i].values[v]) : 0.0f);
            *reinterpret_cast<Vector<E, kWidth>*>(slab + Layout::at(column(), row(i))) = elements;
        }
    }
};

// One block per tile, split and set, as in gram.cu. Products of E: float by way of three of tf32, tf32 or bfloat16.
// Sums are float for a run of rows, then added to totals in shared memory. 256 threads, at most 255 registers; tiles of
// 256 x 128 (8 warps of 64 x 64, 128 accumulators) but 128 x 128 (64 x 32, 64, and as many fresh ones) for float and
// double features; 180 to 185 or 164 KiB (double features in fast modes 100) of shared memory: one block per
// multiprocessor. Floor: N D^2 flops (half the matrix, and 256 / D or 128 / D more), times 3 for float, over two thirds
// of the dense rate; or what a row of a tile reads of L2, whichever is more. Clocks of a row of 256 x 128, 128 x 128:
//   tensor cores          float 72 (128 x 128), tf32 46, bfloat16 23;
//   L2                    float features 64, 43 (128 x 128); 16-bit ones 32; double 85 (128 x 128);
//   shared memory         tf32 12 written and 32 read, bfloat16 6 and 16.
// So float is bound by the tensor cores; the fast modes by L2, at about 235 TFLOP/s, 470 from 16-bit features: each
// element is read once per tile. Totals cost 2048 clocks of shared memory a run, 3 % or less. To go beyond takes
// clusters that share slabs.
template <class T, class E>
__global__ void __launch_bounds__(kTileThreads, 1)
    gram_narrow(FeatureSets<T> x, bool aligned, const double* shift, double* gram, double* partials, GramPlan plan) {
    using Layout = NarrowShared<T, E>;
    using Shape = typename Layout::Shape;
    using Total = typename Layout::Total;
    const GramBlock<Shape> block(plan, ceil_div(x.rows, Shape::kDepth));
    x.data += block.set * x.set_stride;
    if (shift) shift += block.set * x.columns;

    char* const shared = reinterpret_cast<char*>(dynamic_shared());
    Total* const totals = reinterpret_cast<Total*>(shared);
    Origin<T>* const origins = reinterpret_cast<Origin<T>*>(shared + Layout::kTotals);
    E* const slabs = reinterpret_cast<E*>(shared + Layout::kTotals + Layout::kOrigins);
    const auto left_slab = [&](int number) { return slabs + number % 2 * Layout::Left::kElements; };
    const auto right_slab = [&](int number) {
        return left_slab(0) + 2 * Layout::Left::kElements + number % 2 * Layout::Right::kElements;
    };
    for (int i = threadIdx.x; i < Layout::kColumns; i += kTileThreads) {
        const bool right = i >= Shape::kRows;
        const std::int64_t column = block.first(right) + (right ? i - Shape::kRows : i);
        origins[i] = Origin<T>(shift && column < x.columns ? shift[column] : 0.0);
    }
    __syncthreads();  // the origins are complete

    Accumulators<Shape, float> sums = {};
    bool first_run = true;
    const auto finish_run = [&] {
        for_each_pair<Shape>([&](int m, int n, int h) {
            auto& pair = *reinterpret_cast<Vector<Total, 2>*>(own_pair<Shape>(totals, 0, m, n, h));
            Vector<Total, 2> total{};
            if (!first_run) total = pair;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                total.values[e] += static_cast<Total>(sums[m][n][2 * h + e]);
                sums[m][n][2 * h + e] = 0;
            }
            pair = total;
        });
        first_run = false;
    };
    NarrowStaged<T, E, Shape::kRows> left;  // one of the two at a time
    NarrowStaged<T, E, Shape::kColumns> right;
    stream_slabs(
        block.begin, block.end,
        [&](int number, int operand) {
            const std::int64_t row = std::int64_t{number} * Shape::kDepth;
            if (operand == 0)
                left.load(x, aligned, row, block.first(0));
            else
                right.load(x, aligned, row, block.first(1));
        },
        [&](int number, int operand) {
            if (operand == 0)
                left.store(left_slab(number), origins);
            else
                right.store(right_slab(number), origins + Shape::kRows);
        },
        [&](int number, auto before, auto after) {
            multiply_slabs<Shape>(sums, left_slab(number), right_slab(number), before, after);
            if ((number - block.begin) % Runs<E>::kSlabs == Runs<E>::kSlabs - 1) finish_run();
        });
    finish_run();
    write_tile(plan, block, gram, partials, [&](int m, int n, int h, double (&pair)[2]) {
        const Total* total = own_pair<Shape>(totals, 0, m, n, h);
        pair[0] = to_double(total[0]);
        pair[1] = to_double(total[1]);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Features rounded ahead. What is multiplied as bfloat16 is read once per tile, so that of wide features of 4 or 8
// bytes a copy of 2 bytes pays: per row, D (4 + 2) bytes of memory against D^2 flops at 470 instead of 235 TFLOP/s
// (double: 8 + 2, 90). The products are of the same numbers either way.

template <class T, class E>
constexpr bool kMayRound = std::is_same_v<E, bfloat16> && sizeof(T) > 2;

// Rows of the copy begin at multiples of 16 bytes and end with zeros.
template <class T>
std::int64_t rounded_pitch(const FeatureSets<T>& x) {
    return ceil_div(x.columns, 8) * 8;
}

template <class T>
std::int64_t rounded_doubles(const FeatureSets<T>& x) {
    return x.sets * x.rows * rounded_pitch(x) / 4;
}

template <class T, class E>
bool rounds_ahead(const FeatureSets<T>& x) {
    constexpr std::int64_t kMostDoubles = std::int64_t{1} << 31;  // 16 GiB; more than that may not be free
    return kMayRound<T, E> && x.columns >= (sizeof(T) == 4 ? 768 : 320) && rounded_doubles(x) <= kMostDoubles;
}

constexpr int kRoundThreads = 256;
constexpr int kRoundFlight = 8;            // rows in flight
constexpr std::int64_t kRoundedRows = 32;  // of a block

// rounded [sets][rows][pitch] = x - shift. A thread takes 16 bytes of a row at a time, of the same columns throughout.
// 256 threads, at most 80 registers, no shared memory: 3 blocks per multiprocessor, 96 KiB in flight. Floor: one read
// and one write of half or a quarter of it, 6 N D / 4.3e12 s for float.
template <class T>
__global__ void __launch_bounds__(kRoundThreads, 3)
    round_ahead(FeatureSets<T> x, bool aligned, const double* shift, bfloat16* rounded, std::int64_t pitch) {
    constexpr int kWidth = 16 / sizeof(T);
    const std::int64_t groups = ceil_div(x.rows, kRoundedRows), set = blockIdx.x / groups;
    const std::int64_t column = (std::int64_t{blockIdx.y} * kRoundThreads + threadIdx.x) * kWidth;
    if (column >= pitch) return;
    const int width = elements_left<kWidth>(x.columns, column);
    const T* source = x.data + set * x.set_stride + column;
    Origin<T> origins[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v)
        origins[v] = Origin<T>(shift && v < width ? shift[set * x.columns + column + v] : 0.0);
    const std::int64_t begin = blockIdx.x % groups * kRoundedRows, end = min(begin + kRoundedRows, x.rows);
    for (std::int64_t first = begin; first < end; first += kRoundFlight) {
        Vector<T, kWidth> values[kRoundFlight];
        load_vectors(values, width, aligned, [&](int r) { return source + min(first + r, end - 1) * x.row_stride; });
#pragma unroll
        for (int r = 0; r < kRoundFlight; ++r) {
            if (first + r >= end) break;
            Vector<bfloat16, kWidth> elements;
#pragma unroll
            for (int v = 0; v < kWidth; ++v)
                elements.values[v] = element<bfloat16>(v < width ? origins[v].distance(values[r].values[v]) : 0.0f);
            *reinterpret_cast<Vector<bfloat16, kWidth>*>(rounded + (set * x.rows + first + r) * pitch + column) =
                elements;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

template <class T, class E>
GramPlan plan_narrow(std::int64_t sets, std::int64_t size, std::int64_t depth, int multiprocessors) {
    using Shape = ShapeFor<T, E>;
    constexpr double kRead = (Shape::kRows + Shape::kColumns) * sizeof(T) / 24.0;
    constexpr double kRowCost = (std::is_same_v<E, float> && kRead < 72 ? 72 : kRead) / 2048;  // clocks, as above
    return plan_gram<Shape>(sets, size, depth, Shape::kDepth, kRowCost * Shape::kDepth, multiprocessors,
                            Runs<E>::kMostSlabs);
}

template <class T, class E>
cudaError_t launch_narrow(const FeatureSets<T>& x, bool aligned, const double* shift, double* gram, double* workspace,
                          int multiprocessors, cudaStream_t stream) {
    using Layout = NarrowShared<T, E>;
    const GramPlan plan = plan_narrow<T, E>(x.sets, x.columns, x.rows, multiprocessors);
    const cudaError_t error = launch(gram_narrow<T, E>, Grid{x.sets * plan.tiles * plan.splits, 1}, kTileThreads,
                                     Layout::kBytes, stream, x, aligned, shift, gram, workspace, plan);
    if (error != cudaSuccess) return error;
    return finish_gram(gram, workspace, x.sets, plan, UpperTile<typename Layout::Shape>::kRatio == 2, stream);
}

// The same of a rounded copy, which takes the first of the workspace.
template <class T>
cudaError_t launch_rounded(const FeatureSets<T>& x, bool aligned, const double* shift, double* gram, double* workspace,
                           int multiprocessors, cudaStream_t stream) {
    const std::int64_t pitch = rounded_pitch(x);
    const Grid grid{x.sets * ceil_div(x.rows, kRoundedRows),
                    ceil_div(pitch, kRoundThreads * std::int64_t{16 / sizeof(T)})};
    auto* const rounded = reinterpret_cast<bfloat16*>(workspace);
    const cudaError_t error = launch(round_ahead<T>, grid, kRoundThreads, 0, stream, x, aligned, shift, rounded, pitch);
    if (error != cudaSuccess) return error;
    const FeatureSets<bfloat16> copy{rounded, x.sets, x.rows, x.columns, x.rows * pitch, pitch};
    return launch_narrow<bfloat16, bfloat16>(copy, true, nullptr, gram, workspace + rounded_doubles(x), multiprocessors,
                                             stream);
}

// body(null pointer of the element type).
template <class Body>
auto with_element(Precision precision, const Body& body) {
    if (precision == Precision::kFloat32) return body(static_cast<float*>(nullptr));
    if (precision == Precision::kTf32) return body(static_cast<tf32*>(nullptr));
    return body(static_cast<bfloat16*>(nullptr));
}

}  // namespace

template <class T>
cudaError_t narrow_gram(const FeatureSets<T>& x, const double* shift, Precision precision, double* gram,
                        double* workspace, int multiprocessors, cudaStream_t stream) {
    const bool aligned = vectors_aligned(x, shift, 16 / sizeof(T));
    return with_element(precision, [&]<class E>(E*) {
        if constexpr (kMayRound<T, E>)
            if (rounds_ahead<T, E>(x))
                return launch_rounded(x, aligned, shift, gram, workspace, multiprocessors, stream);
        return launch_narrow<T, E>(x, aligned, shift, gram, workspace, multiprocessors, stream);
    });
}

template <class T>
std::int64_t narrow_gram_workspace(const FeatureSets<T>& x, Precision precision, int multiprocessors) {
    const auto partials = [&]<class R, class E>(R*, E*) {
        return plan_narrow<R, E>(x.sets, x.columns, x.rows, multiprocessors).template workspace<ShapeFor<R, E>>(x.sets);
    };
    return with_element(precision, [&]<class E>(E* element) {
        if (rounds_ahead<T, E>(x)) return rounded_doubles(x) + partials(element, element);
        return partials(static_cast<T*>(nullptr), element);
    });
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                           \
    template cudaError_t narrow_gram(const FeatureSets<T>&, const double*, Precision, double*, double*, int, \
                                     cudaStream_t);                                                          \
    template std::int64_t narrow_gram_workspace(const FeatureSets<T>&, Precision, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
