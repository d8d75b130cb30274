// Gram matrices in float64 (moments.h). Figures in the comments are budgets and floors, not yet measured on a GPU: an
// H200 has 132 multiprocessors, 67 TFLOP/s on float64 tensor cores (datasheet) and copies 4.3 TB/s.
//
// `gram` reduces over rows, `sample_gram` over columns: the same kernel, reading its operands from slabs of the
// features in shared memory that are either kDepth rows of kTile columns or kTile rows of kDepth columns.

#include <algorithm>
#include <cstddef>

#include "feature_sets.h"
#include "gram_tiles.h"

namespace transferops::cuda {
namespace {

using Shape = SquareTile;
constexpr int kTile = Shape::kRows, kDepth = Shape::kDepth;
constexpr int kFragmentRows = Shape::kFragmentRows, kFragmentColumns = Shape::kFragmentColumns;
static_assert(Shape::kStepDepth == 8);  // of mma_f64

// A piece of the features in shared memory, in double and shifted, with the layout of global memory: consecutive
// columns adjacent. The pitch is 4 modulo 16 doubles: then the 4 x 4 doubles that half a warp reads of a fragment are
// in different banks, whichever index runs along the pitch.
template <bool kOverRows>
struct Slab {
    static constexpr int kRows = kOverRows ? kDepth : kTile, kColumns = kOverRows ? kTile : kDepth;
    static constexpr int kPitch = kColumns + 4;
    static constexpr int kDoubles = kRows * kPitch;
    static constexpr std::size_t kBytes = 2 * 2 * kDoubles * sizeof(double);  // two operands, two of each in turn
    static constexpr int kPairs = kColumns / 2;                               // a thread moves two columns at a time
    static constexpr int kRowStep = kTileThreads / kPairs;                    // of every kRowStep-th row
    static constexpr int kLoads = kRows / kRowStep;
    static_assert(kPitch % 16 == 4);

    // Element `k` of the reduction for row or column `index` of the tile.
    __device__ static int at(int index, int k) { return kOverRows ? k * kPitch + index : index * kPitch + k; }
};

// A slab on its way from global to shared memory, in the registers of the block.
template <class T, bool kOverRows>
struct Staged {
    using Layout = Slab<kOverRows>;
    Vector<T, 2> values[Layout::kLoads];
    double shift[2];
    int width, height;  // how many of the thread's two columns, and of the slab's rows, exist

    __device__ static int slab_row(int load) { return threadIdx.x / Layout::kPairs + load * Layout::kRowStep; }
    __device__ static int slab_column() { return threadIdx.x % Layout::kPairs * 2; }

    // Beyond the last row, that row is read again; `store` makes it zero.
    __device__ void load(const FeatureSets<T>& x, bool aligned, const double* offsets, std::int64_t row,
                         std::int64_t column) {
        column += slab_column();
        width = elements_left<2>(x.columns, column);
        height = static_cast<int>(min(x.rows - row, std::int64_t{Layout::kRows}));
        load_doubles(shift, shift_at(offsets, column), width, aligned);
        const T* source = x.data + row * x.row_stride + column;
        load_vectors(values, width, aligned,
                     [&](int i) { return source + min(slab_row(i), height - 1) * x.row_stride; });
    }

    __device__ void store(double* slab) const {
#pragma unroll
        for (int i = 0; i < Layout::kLoads; ++i) {
            Vector<double, 2> pair;
#pragma unroll
            for (int v = 0; v < 2; ++v)
                pair.values[v] = slab_row(i) < height && v < width ? to_double(values[i].values[v]) - shift[v] : 0.0;
            *reinterpret_cast<Vector<double, 2>*>(slab + slab_row(i) * Layout::kPitch + slab_column()) = pair;
        }
    }
};

// sums += (operand `left`, 8 of the reduction from `k` on)^T (operand `right`) for the warp's part of the tile.
template <bool kOverRows>
__device__ void multiply(double (&sums)[kFragmentRows][kFragmentColumns][4], const double* left, const double* right,
                         const ThreadPlace<Shape>& thread, int k) {
    using Layout = Slab<kOverRows>;
    double a[kFragmentRows][4];
#pragma unroll
    for (int m = 0; m < kFragmentRows; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[m][i] = left[Layout::at(thread.row + m * 16 + i % 2 * 8 + thread.group, k + i / 2 * 4 + thread.member)];
#pragma unroll
    for (int n = 0; n < kFragmentColumns; ++n) {
        double b[2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
            b[j] = right[Layout::at(thread.column + n * 8 + thread.group, k + j * 4 + thread.member)];
#pragma unroll
        for (int m = 0; m < kFragmentRows; ++m) mma_f64(sums[m][n], a[m], b);
    }
}

// One block per tile, split and set. While the warps multiply one pair of slabs in shared memory, the next is on its
// way to registers; one barrier per slab. 256 threads (8 warps of 64 x 32), at most 255 registers (128 of them
// accumulators), 66 KiB (over rows) or 80 KiB (over columns) of shared memory: one block, 2 warps per scheduler, 16
// independent chains of mma_f64 each. Floor: N D^2 flops for `gram` (half the matrix), N D^2 / 67e12 s; diagonal tiles
// are computed whole, so 1 + 128 / D of that. A slab takes 2048 clocks of the tensor cores at the peak rate, 1024 of
// shared memory (768 reads, 256 writes) and 256 of the conversion unit; global memory sees 16 KiB of float per 2048
// clocks and multiprocessor, from L2.
template <class T, bool kOverRows>
__global__ void __launch_bounds__(kTileThreads, 1)
    gram_tiles(FeatureSets<T> x, bool aligned, const double* shift, double* gram, double* partials, GramPlan plan) {
    using Layout = Slab<kOverRows>;
    const GramBlock<Shape> block(plan, ceil_div(kOverRows ? x.rows : x.columns, kDepth));
    const ThreadPlace<Shape> thread;
    x.data += block.set * x.set_stride;
    if (shift) shift += block.set * x.columns;

    double* const slabs = dynamic_shared();
    const auto slab_at = [&](int number, int operand) { return slabs + (number % 2 * 2 + operand) * Layout::kDoubles; };
    Staged<T, kOverRows> staged;  // one operand of the next slab at a time: there are no registers for both
    double sums[kFragmentRows][kFragmentColumns][4] = {};
    stream_slabs(
        block.begin, block.end,
        [&](int number, int operand) {
            const std::int64_t first = std::int64_t{number} * kDepth;
            staged.load(x, aligned, shift, kOverRows ? first : block.first(operand),
                        kOverRows ? block.first(operand) : first);
        },
        [&](int number, int operand) { staged.store(slab_at(number, operand)); },
        [&](int number, auto before, auto after) {
#pragma unroll
            for (int step = 0; step < Shape::kSteps; ++step) {
                before(step);
                multiply<kOverRows>(sums, slab_at(number, 0), slab_at(number, 1), thread, step * Shape::kStepDepth);
                after(step);
            }
        });
    write_tile(plan, block, gram, partials, [&](int m, int n, int h, double (&pair)[2]) {
        pair[0] = sums[m][n][2 * h];
        pair[1] = sums[m][n][2 * h + 1];
    });
}

// One block per tile, set and four fragments of a row m of them: adds the splits in order. 256 threads, at most 128
// registers, no shared memory: 2 blocks per multiprocessor, 8 loads of 16 bytes in flight per thread. Floor: 128 KiB
// (of tiles of 256 x 128 twice that) per partial tile at 4.3 TB/s, 0.03 us.
template <class Tile>
__global__ void __launch_bounds__(kTileThreads, 2) gram_finish(double* gram, double* partials, GramPlan plan) {
    constexpr int kFragments = 4;
    const std::int64_t set = blockIdx.x / plan.tiles, number = blockIdx.x % plan.tiles;
    const UpperTile<Tile> tile(number);
    const int m = blockIdx.y % Tile::kFragmentRows, first = blockIdx.y / Tile::kFragmentRows * kFragments;
    double sums[kFragments][2][2] = {};
    for (int split = 0; split < plan.splits; ++split) {
        const std::int64_t partial = (set * plan.splits + split) * plan.tiles + number;
        Vector<double, 2> pairs[kFragments * 2];
        load_vectors(pairs, 2, true, [&](int i) { return own_pair<Tile>(partials, partial, m, first + i / 2, i % 2); });
#pragma unroll
        for (int i = 0; i < kFragments * 2; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) sums[i / 2][i % 2][e] += pairs[i].values[e];
    }
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            write_symmetric(gram + set * plan.size * plan.size, plan.size, tile, m, first + n, h, sums[n][h]);
}

GramPlan plan_float64(std::int64_t sets, std::int64_t size, std::int64_t depth, int multiprocessors) {
    return plan_gram<Shape>(sets, size, depth, kDepth, 1, multiprocessors);
}

template <bool kOverRows, class T>
cudaError_t launch_gram(const FeatureSets<T>& x, const double* shift, double* gram, double* workspace,
                        int multiprocessors, cudaStream_t stream) {
    const GramPlan plan =
        plan_float64(x.sets, kOverRows ? x.columns : x.rows, kOverRows ? x.rows : x.columns, multiprocessors);
    const cudaError_t error =
        launch(gram_tiles<T, kOverRows>, Grid{x.sets * plan.tiles * plan.splits, 1}, kTileThreads,
               Slab<kOverRows>::kBytes, stream, x, vectors_aligned(x, shift, 2), shift, gram, workspace, plan);
    return error != cudaSuccess ? error : finish_gram(gram, workspace, x.sets, plan, false, stream);
}

}  // namespace

cudaError_t finish_gram(double* gram, double* partials, std::int64_t sets, const GramPlan& plan, bool tall,
                        cudaStream_t stream) {
    if (plan.splits == 1) return cudaSuccess;
    const auto finish = [&]<class Tile>(Tile) {
        const Grid grid{sets * plan.tiles, Tile::kFragmentRows * Tile::kFragmentColumns / 4};
        return launch(gram_finish<Tile>, grid, kTileThreads, 0, stream, gram, partials, plan);
    };
    return tall ? finish(TallTile{}) : finish(SquareTile{});
}

template <class T>
cudaError_t gram(const FeatureSets<T>& features, const double* shift, double* gram, double* workspace,
                 int multiprocessors, cudaStream_t stream) {
    return launch_gram<true>(features, shift, gram, workspace, multiprocessors, stream);
}

std::int64_t gram_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns, int multiprocessors) {
    return plan_float64(sets, columns, rows, multiprocessors).workspace<Shape>(sets);
}

template <class T>
cudaError_t sample_gram(const FeatureSets<T>& features, const double* shift, double* gram, double* workspace,
                        int multiprocessors, cudaStream_t stream) {
    return launch_gram<false>(features, shift, gram, workspace, multiprocessors, stream);
}

std::int64_t sample_gram_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns, int multiprocessors) {
    return plan_float64(sets, rows, columns, multiprocessors).workspace<Shape>(sets);
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                        \
    template cudaError_t gram(const FeatureSets<T>&, const double*, double*, double*, int, cudaStream_t); \
    template cudaError_t sample_gram(const FeatureSets<T>&, const double*, double*, double*, int, cudaStream_t);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
