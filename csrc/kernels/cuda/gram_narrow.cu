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

template <class E>
using ShapeOf = TileShape<E, kTile, kTile>;
template <class E>
using SlabOf = Slab<E, kTile, ShapeOf<E>::kDepth>;

// Rows that are summed in float before they are added to the totals in double: for float in sums of slabs, rounded to
// nearest; otherwise on the tensor cores, which round every step of 8 rows (tf32) or 16 towards zero.
template <class E>
constexpr int kRunSlabs = (std::is_same_v<E, float> ? 1024 : 2048) / ShapeOf<E>::kDepth;

// Dynamic shared memory, in this order: totals, origins of both operands' columns, two slabs of each in turn.
template <class T, class E>
struct NarrowShared {
    static constexpr std::size_t kTotals = kTile * kTile * sizeof(double);
    static constexpr std::size_t kOrigins = 2 * kTile * sizeof(Origin<T>);
    static constexpr std::size_t kBytes = kTotals + kOrigins + 4 * SlabOf<E>::kBytes;
    static_assert(kBytes <= 227 * 1024);
};

// A slab on its way from global to shared memory, in the registers of the block: a thread moves kWidth neighbouring
// columns, always the same, of every kStep-th row.
template <class T, class E>
struct NarrowStaged {
    static constexpr int kWidth = 16 / sizeof(T), kVectors = kTile / kWidth;
    static constexpr int kStep = kGramThreads / kVectors, kLoads = ShapeOf<E>::kDepth / kStep;

    Vector<T, kWidth> values[kLoads];
    int width, height;  // how many of the thread's columns, and of the slab's rows, exist

    __device__ static int column() { return threadIdx.x % kVectors * kWidth; }
    __device__ static int row(int load) { return threadIdx.x / kVectors + load * kStep; }

    // Beyond the last row, that row is read again; `store` makes it zero.
    __device__ void load(const FeatureSets<T>& x, bool aligned, std::int64_t first_row, std::int64_t first_column) {
        width = elements_left<kWidth>(x.columns, first_column + column());
        height = static_cast<int>(min(x.rows - first_row, std::int64_t{ShapeOf<E>::kDepth}));
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
            *reinterpret_cast<Vector<E, kWidth>*>(slab + SlabOf<E>::at(column(), row(i))) = elements;
        }
    }
};

// One block per tile, split and set, as in gram.cu. Products of E: float by way of three of tf32, tf32 or bfloat16.
// Sums are float for a run of rows, then added to totals in double in shared memory. 256 threads (8 warps of 64 x 32),
// at most 255 registers (128 of them accumulators for float, 64 otherwise), 164 or 165 KiB of shared memory: one block
// per multiprocessor. Floor: N D^2 flops (half the matrix, and 128 / D more), times 3 for float, over two thirds of the
// dense rate; or 256 elements of the features per row of a tile from L2, whichever is more: float input takes 43 clocks
// a row, against 72 (float), 24 (tf32) and 12 (bfloat16) of the tensor cores, so that the two fast modes are bound by
// L2 at about 180 TFLOP/s, 370 for 16-bit input. Totals cost 2048 clocks of shared memory a run, 3 % for float and 8 to
// 17 % of the tensor cores' time otherwise.
template <class T, class E>
__global__ void __launch_bounds__(kGramThreads, 1)
    gram_narrow(FeatureSets<T> x, bool aligned, const double* shift, double* gram, double* partials, GramPlan plan) {
    using Shape = ShapeOf<E>;
    using Layout = NarrowShared<T, E>;
    const std::int64_t tile_number = blockIdx.x % plan.tiles;
    const int split = static_cast<int>(blockIdx.x / plan.tiles % plan.splits);
    const std::int64_t set = blockIdx.x / plan.tiles / plan.splits;
    const UpperTile tile(tile_number);
    const ThreadPlace thread;
    x.data += set * x.set_stride;
    if (shift) shift += set * x.columns;

    char* const shared = reinterpret_cast<char*>(dynamic_shared());
    double* const totals = dynamic_shared();
    Origin<T>* const origins = reinterpret_cast<Origin<T>*>(shared + Layout::kTotals);
    E* const slabs = reinterpret_cast<E*>(shared + Layout::kTotals + Layout::kOrigins);
    const auto slab_at = [&](int number, int operand) {
        return slabs + (number % 2 * 2 + operand) * SlabOf<E>::kElements;
    };
    const auto first_column = [&](int operand) { return std::int64_t{operand == 0 ? tile.row : tile.column} * kTile; };
    {
        const std::int64_t column = first_column(threadIdx.x / kTile) + threadIdx.x % kTile;
        static_assert(kGramThreads == 2 * kTile);
        origins[threadIdx.x] = Origin<T>(shift && column < x.columns ? shift[column] : 0.0);
    }
    NarrowStaged<T, E> staged;
    const auto load = [&](int number, int operand) {
        staged.load(x, aligned, std::int64_t{number} * Shape::kDepth, first_column(operand));
    };
    const auto store = [&](int number, int operand) {
        staged.store(slab_at(number, operand), origins + operand * kTile);
    };

    const int begin = split * plan.slabs;
    const int end = static_cast<int>(min(std::int64_t{begin} + plan.slabs, ceil_div(x.rows, Shape::kDepth)));
    Accumulators<Shape, float> sums = {};
    bool first_run = true;
    const auto finish_run = [&] {
#pragma unroll
        for (int m = 0; m < kFragmentRows; ++m)
#pragma unroll
            for (int n = 0; n < kFragmentColumns; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    auto& pair = *reinterpret_cast<Vector<double, 2>*>(partial_pair(totals, 0, m, n, h));
                    Vector<double, 2> total{};
                    if (!first_run) total = pair;
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        total.values[e] += to_double(sums[m][n][2 * h + e]);
                        sums[m][n][2 * h + e] = 0;
                    }
                    pair = total;
                }
        first_run = false;
    };

    __syncthreads();  // the origins are complete
    for (int operand = 0; operand < 2 && begin < end; ++operand) {
        load(begin, operand);
        store(begin, operand);
    }
    for (int number = begin; number < end; ++number) {
        __syncthreads();  // this slab is complete, and no warp reads the previous one any more
        multiply_slabs<Shape>(
            sums, slab_at(number, 0), slab_at(number, 1),
            [&](int step) {
                if (number + 1 < end) load(number + 1, step);
            },
            [&](int step) {
                if (number + 1 < end) store(number + 1, step);
            });
        if ((number - begin) % kRunSlabs<E> == kRunSlabs<E> - 1) finish_run();
    }
    finish_run();

#pragma unroll
    for (int m = 0; m < kFragmentRows; ++m)
#pragma unroll
        for (int n = 0; n < kFragmentColumns; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const double* total = partial_pair(totals, 0, m, n, h);  // the thread's own
                const double pair[2] = {total[0], total[1]};
                if (plan.splits > 1)
                    store_vector(partial_pair(partials, blockIdx.x, m, n, h), pair, 2, true);
                else
                    write_symmetric(gram + set * plan.size * plan.size, plan.size, tile, thread, m, n, h, pair);
            }
}

template <class E>
GramPlan plan_narrow(std::int64_t sets, std::int64_t size, std::int64_t depth, int multiprocessors) {
    constexpr double kRowCost = (std::is_same_v<E, float> ? 72 : 43) / 2048.0;  // clocks, as above
    return plan_gram(sets, size, depth, ShapeOf<E>::kDepth, kRowCost * ShapeOf<E>::kDepth, multiprocessors);
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
    return with_element(precision, [&]<class E>(E*) -> cudaError_t {
        const GramPlan plan = plan_narrow<E>(x.sets, x.columns, x.rows, multiprocessors);
        const bool aligned = vectors_aligned(x, shift, NarrowStaged<T, E>::kWidth);
        const cudaError_t error = launch(gram_narrow<T, E>, Grid{x.sets * plan.tiles * plan.splits, 1}, kGramThreads,
                                         NarrowShared<T, E>::kBytes, stream, x, aligned, shift, gram, workspace, plan);
        return error != cudaSuccess ? error : finish_gram(gram, workspace, x.sets, plan, stream);
    });
}

std::int64_t narrow_gram_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns, Precision precision,
                                   int multiprocessors) {
    return with_element(
        precision, [&]<class E>(E*) { return plan_narrow<E>(sets, columns, rows, multiprocessors).workspace(sets); });
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                           \
    template cudaError_t narrow_gram(const FeatureSets<T>&, const double*, Precision, double*, double*, int, \
                                     cudaStream_t);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
