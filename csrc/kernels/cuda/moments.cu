// Kernels and launchers of moments.h. Figures in the comments are budgets and floors, not yet measured on a GPU: an
// H200 has 132 multiprocessors, 67 TFLOP/s on float64 tensor cores (datasheet) and copies 4.3 TB/s.

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "device.h"
#include "moments.h"

namespace transferops::cuda {
namespace {

// Columns that a lane takes at a time: one 16-byte load.
template <class T>
constexpr int kColumns = 16 / sizeof(T);

// Whether the columns are whole vectors of `width` elements, each aligned to its size, and the shift can be read in
// pairs.
template <class T>
bool vectors_aligned(const FeatureSets<T>& x, const double* shift, int width) {
    return is_aligned(x.data, width * sizeof(T)) && is_aligned(shift, 16) && x.columns % width == 0 &&
           x.row_stride % width == 0 && (x.sets == 1 || x.set_stride % width == 0);
}

// The first `width` of kWidth doubles at `source`, two per access if `aligned`; zeros for the others, and for no
// source.
template <int kWidth>
__device__ void load_doubles(double (&values)[kWidth], const double* source, int width, bool aligned) {
#pragma unroll
    for (int v = 0; v < kWidth; v += 2) {
        Vector<double, 2> pair{};
        if (aligned) {
            if (source && v < width) pair = *reinterpret_cast<const Vector<double, 2>*>(source + v);
        } else {
            if (source && v < width) pair.values[0] = source[v];
            if (source && v + 1 < width) pair.values[1] = source[v + 1];
        }
        values[v] = pair.values[0];
        values[v + 1] = pair.values[1];
    }
}

// The address of `column`, or nullptr if there is no shift.
__device__ const double* shift_at(const double* shift, std::int64_t column) { return shift ? shift + column : nullptr; }

// ---------------------------------------------------------------------------------------------------------------------
// Sums of partial sums, the second pass of class_sums and norm_moments.

// store(column, sum over p = 0 .. count - 1 of partial(p)[column]) for every column. A block takes 32 columns at a
// time.
template <class Partial, class Store>
__device__ void sum_partials(std::int64_t count, std::int64_t columns, Partial partial, Store store) {
    for (std::int64_t first = std::int64_t{kWarp} * blockIdx.y; first < columns;
         first += std::int64_t{kWarp} * gridDim.y) {
        const std::int64_t column = first + threadIdx.x % kWarp;
        const bool exists = column < columns;
        const double sum = sum_parts(exists ? count : 0, [=](std::int64_t p) { return partial(p)[column]; });
        if (threadIdx.x < kWarp && exists) store(column, sum);
        __syncthreads();  // before the next columns take the shared memory
    }
}

// Blocks along x for `items` sums; along y as many as help to fill the device, each looping over groups of 32 columns.
Grid sum_grid(std::int64_t items, std::int64_t columns) {
    constexpr std::int64_t kBlocks = 4096;
    return {items, std::clamp<std::int64_t>(ceil_div(kBlocks, std::max<std::int64_t>(items, 1)), 1,
                                            std::max<std::int64_t>(ceil_div(columns, kWarp), 1))};
}

// ---------------------------------------------------------------------------------------------------------------------
// Class sums. The sorted rows are cut into chunks of equal length, so that the work is even whatever the class sizes. A
// class that lies within one chunk is written straight to the output. Any other leaves one partial sum in each chunk
// that it touches: the "tail" of the chunk it begins in, and the "head" of every later one. A chunk has at most one of
// each.

struct Chunks {
    std::int64_t rows, count;  // rows of a chunk (the last may have fewer), number of chunks
};

Chunks class_sum_chunks(std::int64_t sets, std::int64_t rows, std::int64_t columns) {
    constexpr std::int64_t kWarps = 4096;      // about 32 for each multiprocessor
    constexpr std::int64_t kMinimumRows = 64;  // the partial sums are then below a tenth of float input
    const std::int64_t strips = std::max<std::int64_t>(sets * ceil_div(columns, kWarp * kColumns<float>), 1);
    const std::int64_t wanted = std::clamp<std::int64_t>(kWarps / strips, 16, 1024);
    const std::int64_t chunk_rows = std::max(ceil_div(rows, wanted), kMinimumRows);
    return {chunk_rows, ceil_div(rows, chunk_rows)};
}

// partials[set][chunk][head or tail][column]
__device__ double* class_partial(double* partials, const Chunks& chunks, std::int64_t columns, std::int64_t set,
                                 std::int64_t chunk, bool tail) {
    return partials + ((set * chunks.count + chunk) * 2 + tail) * columns;
}

constexpr int kClassSumThreads = 128;
constexpr int kClassSumRows = 8;  // rows in flight

// One warp per set, chunk and strip of 32 x 16 bytes of columns; the lanes own their columns and never communicate.
// 128 threads, at most 102 registers (170 for 16-bit types), no shared memory: 5 blocks (3) per multiprocessor, and 8
// loads of 512 bytes in flight per warp: 80 KiB (48). Floor: one read of the features, 4 N D / 4.3e12 s for float. Two
// float64 operations and one conversion (16 per clock and multiprocessor: 7.6 TB/s of 16-bit input) are below that.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kClassSumThreads, sizeof(T) < 4 ? 3 : 5)
    class_sums_chunks(FeatureSets<T> x, const std::int64_t* order, const std::int64_t* offsets, std::int64_t classes,
                      const double* shift, double* sums, double* partials, Chunks chunks) {
    constexpr int kWidth = kColumns<T>;
    const std::int64_t strips = ceil_div(x.columns, kWarp * kWidth);
    const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    const std::int64_t chunk = warp / strips % chunks.count, set = warp / strips / chunks.count;
    const std::int64_t column = (warp % strips * kWarp + threadIdx.x % kWarp) * kWidth;
    if (set >= x.sets || column >= x.columns) return;
    const int width = elements_left<kWidth>(x.columns, column);

    const std::int64_t begin = chunk * chunks.rows;
    const int length = static_cast<int>(min(chunks.rows, x.rows - begin));
    const T* data = x.data + set * x.set_stride + column;
    order += begin;
    double offset[kWidth], sum[kWidth] = {};
    load_doubles(offset, shift_at(shift, set * x.columns + column), width, kAligned);

    std::int64_t current = 0;  // the class of row `begin`: the first that ends behind it
    for (std::int64_t last = classes - 1; current < last;) {
        const std::int64_t middle = (current + last) / 2;
        if (offsets[middle + 1] > begin)
            last = middle;
        else
            current = middle + 1;
    }
    // Where the current class ends, counted from `begin`; one more than the chunk has if beyond it.
    const auto find_end = [&] { return static_cast<int>(min(offsets[current + 1] - begin, std::int64_t{length} + 1)); };
    int class_end = find_end();
    const auto finish_class = [&] {
        double* target = sums + (set * classes + current) * x.columns;
        if (offsets[current] < begin)
            target = class_partial(partials, chunks, x.columns, set, chunk, false);
        else if (class_end > length)
            target = class_partial(partials, chunks, x.columns, set, chunk, true);
        store_vector(target + column, sum, width, kAligned);
    };

    for (int first = 0; first < length; first += kClassSumRows) {
        Vector<T, kWidth> rows[kClassSumRows];
        const T* sources[kClassSumRows];  // all addresses before any load; beyond the chunk its last row again
#pragma unroll
        for (int r = 0; r < kClassSumRows; ++r) sources[r] = data + order[min(first + r, length - 1)] * x.row_stride;
        load_vectors(rows, width, kAligned, [&](int r) { return sources[r]; });
#pragma unroll
        for (int r = 0; r < kClassSumRows; ++r) {
            if (first + r >= length) break;
            if (first + r == class_end) {
                finish_class();
                for (; class_end == first + r; class_end = find_end()) ++current;  // steps over empty classes
#pragma unroll
                for (int v = 0; v < kWidth; ++v) sum[v] = 0;
            }
#pragma unroll
            for (int v = 0; v < kWidth; ++v) sum[v] += to_double(rows[r].values[v]) - offset[v];
        }
    }
    finish_class();
}

// One block per set and class (and groups of columns): adds the partial sums of a class that touches several chunks,
// writes zeros for an empty class. 256 threads, at most 64 registers, 2 KiB of shared memory: 4 blocks per
// multiprocessor. Floor: reads at most one row of doubles per 32 rows of the features; most blocks return at once.
__global__ void __launch_bounds__(kSumThreads, 4)
    class_sums_finish(double* sums, double* partials, const std::int64_t* offsets, std::int64_t classes,
                      std::int64_t columns, Chunks chunks) {
    const std::int64_t set = blockIdx.x / classes, current = blockIdx.x % classes;
    const std::int64_t begin = offsets[current], end = offsets[current + 1];
    const std::int64_t first = begin / chunks.rows, last = (end - 1) / chunks.rows;
    if (begin < end && first == last) return;
    double* target = sums + (set * classes + current) * columns;
    sum_partials(
        begin < end ? last - first + 1 : 0, columns,
        [=](std::int64_t p) { return class_partial(partials, chunks, columns, set, first + p, p == 0); },
        [=](std::int64_t column, double sum) { target[column] = sum; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Gram matrices. The output is cut into square tiles, of which those on and above the diagonal are computed, one block
// each; where they are too few for the device, the reduction is split between blocks too, and a second kernel adds the
// splits in order. `gram` reduces over rows, `sample_gram` over columns: the same kernel, reading its operands from
// slabs of the features in shared memory that are either kDepth rows of kTile columns or kTile rows of kDepth columns.

constexpr int kTile = 128;
constexpr int kDepth = 16;
constexpr int kGramThreads = 256;
constexpr int kWarpRows = 64, kWarpColumns = 32;  // of the tile: two warps down, four across
constexpr int kFragmentRows = kWarpRows / 16, kFragmentColumns = kWarpColumns / 8;  // blocks of mma_f64 in those
static_assert(kDepth / 8 == 2);  // one operand is staged during each step of mma_f64
static_assert(kGramThreads == kWarp * (kTile / kWarpRows) * (kTile / kWarpColumns));

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
    static constexpr int kRowStep = kGramThreads / kPairs;                    // of every kRowStep-th row
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

struct GramPlan {
    std::int64_t size, tiles;  // of the matrix, of its upper triangle
    int splits, slabs;         // of the reduction, of each split

    std::int64_t workspace(std::int64_t sets) const { return splits > 1 ? sets * tiles * splits * kTile * kTile : 0; }
};

// Weighs the blocks that run at a time against the partial tiles written and read, in units of one slab at the peak
// rate (2 * 128 * 128 * 16 / (67e12 / 132) s, about a microsecond).
GramPlan plan_gram(std::int64_t sets, std::int64_t size, std::int64_t depth, int multiprocessors) {
    constexpr double kBlockCost = 2, kPassCost = 3, kPartialCost = 0.06;  // start and end, another launch, 2 x 128 KiB
    constexpr std::int64_t kMostPartials = 8;                             // per multiprocessor: 138 MB on 132
    const std::int64_t edge = ceil_div(size, kTile), tiles = edge * (edge + 1) / 2, slabs = ceil_div(depth, kDepth);
    GramPlan best{size, tiles, 1, static_cast<int>(slabs)};
    double least = HUGE_VAL;
    const std::int64_t most = kMostPartials * multiprocessors / std::max<std::int64_t>(sets * tiles, 1);
    for (std::int64_t wanted = 1; wanted <= std::max<std::int64_t>(std::min(most, slabs), 1); ++wanted) {
        const std::int64_t length = ceil_div(slabs, wanted);                   // of a split
        const std::int64_t splits = length > 0 ? ceil_div(slabs, length) : 1;  // none of them empty
        const std::int64_t blocks = sets * tiles * splits;
        double cost = ceil_div(blocks, multiprocessors) * (length + kBlockCost);
        if (splits > 1) cost += kPassCost + kPartialCost * blocks;
        if (cost < least) {
            least = cost;
            best.splits = static_cast<int>(splits);
            best.slabs = static_cast<int>(length);
        }
    }
    return best;
}

// The place of an upper-triangular tile: tiles are counted down the columns, t = column (column + 1) / 2 + row.
struct TilePlace {
    int row, column;

    __device__ explicit TilePlace(std::int64_t tile) : column(static_cast<int>((sqrt(8.0 * tile + 1) - 1) / 2)) {
        while (tiles_before(column) > tile) --column;  // the root is rounded
        while (tiles_before(column + 1) <= tile) ++column;
        row = static_cast<int>(tile - tiles_before(column));
    }

    __device__ static std::int64_t tiles_before(std::int64_t column) { return column * (column + 1) / 2; }
};

// Where a thread's accumulators lie: fragment (m, n), half h, as mma_f64 leaves them.
struct ThreadPlace {
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int row = warp % (kTile / kWarpRows) * kWarpRows, column = warp / (kTile / kWarpRows) * kWarpColumns;
    int group = lane / 4, member = lane % 4;
};

// Writes two neighbours of the upper triangle, and their mirror image. Each half is 64 contiguous bytes for some lanes.
__device__ void write_symmetric(double* gram, std::int64_t size, const TilePlace& tile, const ThreadPlace& thread,
                                int m, int n, int h, const double (&pair)[2]) {
    const std::int64_t row = std::int64_t{tile.row} * kTile + thread.row + m * 16 + h * 8 + thread.group;
    const std::int64_t column = std::int64_t{tile.column} * kTile + thread.column + n * 8 + thread.member * 2;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (row <= column + e && column + e < size) {
            gram[row * size + column + e] = pair[e];
            gram[(column + e) * size + row] = pair[e];
        }
    }
}

// Partial tiles are kept in the order of the accumulators: neighbouring threads write neighbouring pairs.
__device__ double* partial_pair(double* partials, std::int64_t tile, int m, int n, int h) {
    return partials + tile * kTile * kTile + (((m * kFragmentColumns + n) * 2 + h) * kGramThreads + threadIdx.x) * 2;
}

// sums += (operand `left`, 8 of the reduction from `k` on)^T (operand `right`) for the warp's part of the tile.
template <bool kOverRows>
__device__ void multiply(double (&sums)[kFragmentRows][kFragmentColumns][4], const double* left, const double* right,
                         const ThreadPlace& thread, int k) {
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
__global__ void __launch_bounds__(kGramThreads, 1)
    gram_tiles(FeatureSets<T> x, bool aligned, const double* shift, double* gram, double* partials, GramPlan plan) {
    using Layout = Slab<kOverRows>;
    // Tiles run fastest: blocks that run together read the same part of the features.
    const std::int64_t tile_number = blockIdx.x % plan.tiles;
    const int split = static_cast<int>(blockIdx.x / plan.tiles % plan.splits);
    const std::int64_t set = blockIdx.x / plan.tiles / plan.splits;
    const TilePlace tile(tile_number);
    const ThreadPlace thread;
    x.data += set * x.set_stride;
    if (shift) shift += set * x.columns;

    double* const slabs = dynamic_shared();
    const auto slab_at = [&](int number, int operand) { return slabs + (number % 2 * 2 + operand) * Layout::kDoubles; };
    Staged<T, kOverRows> staged;  // one operand of the next slab at a time: there are no registers for both
    const auto load = [&](int number, int operand) {
        const int edge = operand == 0 ? tile.row : tile.column;
        staged.load(x, aligned, shift, std::int64_t{kOverRows ? number : edge} * Layout::kRows,
                    std::int64_t{kOverRows ? edge : number} * Layout::kColumns);
    };

    const std::int64_t depth = kOverRows ? x.rows : x.columns;
    const int begin = split * plan.slabs;
    const int end = static_cast<int>(min(std::int64_t{begin} + plan.slabs, ceil_div(depth, kDepth)));
    double sums[kFragmentRows][kFragmentColumns][4] = {};
    for (int operand = 0; operand < 2 && begin < end; ++operand) {
        load(begin, operand);
        staged.store(slab_at(begin, operand));
    }
    for (int number = begin; number < end; ++number) {
        __syncthreads();  // this slab is complete, and no warp reads the previous one any more
#pragma unroll
        for (int step = 0; step < kDepth / 8; ++step) {
            if (number + 1 < end) load(number + 1, step);
            multiply<kOverRows>(sums, slab_at(number, 0), slab_at(number, 1), thread, step * 8);
            if (number + 1 < end) staged.store(slab_at(number + 1, step));
        }
    }

#pragma unroll
    for (int m = 0; m < kFragmentRows; ++m)
#pragma unroll
        for (int n = 0; n < kFragmentColumns; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const double pair[2] = {sums[m][n][2 * h], sums[m][n][2 * h + 1]};
                if (plan.splits > 1)
                    store_vector(partial_pair(partials, blockIdx.x, m, n, h), pair, 2, true);
                else
                    write_symmetric(gram + set * plan.size * plan.size, plan.size, tile, thread, m, n, h, pair);
            }
}

// One block per tile, set and row m of fragments: adds the splits in order. 256 threads, at most 128 registers, no
// shared memory: 2 blocks per multiprocessor, 8 loads of 16 bytes in flight per thread. Floor: 128 KiB per partial tile
// at 4.3 TB/s, 0.03 us.
__global__ void __launch_bounds__(kGramThreads, 2) gram_finish(double* gram, double* partials, GramPlan plan) {
    const std::int64_t set = blockIdx.x / plan.tiles, tile_number = blockIdx.x % plan.tiles;
    const TilePlace tile(tile_number);
    const ThreadPlace thread;
    const int m = blockIdx.y;
    double sums[kFragmentColumns][2][2] = {};
    for (int split = 0; split < plan.splits; ++split) {
        const std::int64_t partial = (set * plan.splits + split) * plan.tiles + tile_number;
        Vector<double, 2> pairs[kFragmentColumns * 2];
        load_vectors(pairs, 2, true, [&](int i) { return partial_pair(partials, partial, m, i / 2, i % 2); });
#pragma unroll
        for (int i = 0; i < kFragmentColumns * 2; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) sums[i / 2][i % 2][e] += pairs[i].values[e];
    }
#pragma unroll
    for (int n = 0; n < kFragmentColumns; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            write_symmetric(gram + set * plan.size * plan.size, plan.size, tile, thread, m, n, h, sums[n][h]);
}

template <bool kOverRows, class T>
cudaError_t launch_gram(const FeatureSets<T>& x, const double* shift, double* gram, double* workspace,
                        int multiprocessors, cudaStream_t stream) {
    const GramPlan plan =
        plan_gram(x.sets, kOverRows ? x.columns : x.rows, kOverRows ? x.rows : x.columns, multiprocessors);
    const cudaError_t error =
        launch(gram_tiles<T, kOverRows>, Grid{x.sets * plan.tiles * plan.splits, 1}, kGramThreads,
               Slab<kOverRows>::kBytes, stream, x, vectors_aligned(x, shift, 2), shift, gram, workspace, plan);
    if (error != cudaSuccess || plan.splits == 1) return error;
    return launch(gram_finish, Grid{x.sets * plan.tiles, kFragmentRows}, kGramThreads, 0, stream, gram, workspace,
                  plan);
}

// ---------------------------------------------------------------------------------------------------------------------
// Moments weighted by the squared norm of a row.

constexpr int kNormThreads = 256;
constexpr int kNormRows = 16;  // in a batch; their squared norms are known before the first is used
constexpr int kNormWarps = kNormThreads / kWarp;
static_assert(kNormRows == 2 * kNormWarps);                          // a warp sums the norms of two rows
constexpr std::size_t kNormShared = 2 * kNormRows * sizeof(double);  // one batch read while the next is written

// A multiple of the batch; about four blocks for each multiprocessor.
Chunks norm_chunks(std::int64_t sets, std::int64_t rows) {
    constexpr std::int64_t kBlocks = 512;
    const std::int64_t wanted = std::clamp<std::int64_t>(kBlocks / std::max<std::int64_t>(sets, 1), 16, kBlocks);
    const std::int64_t chunk_rows = std::max<std::int64_t>(ceil_div(ceil_div(rows, wanted), kNormRows), 1) * kNormRows;
    return {chunk_rows, ceil_div(rows, chunk_rows)};
}

// partials[set][chunk]: the columns of the cubic moment, then the quartic one; padded, so that pairs are aligned.
__host__ __device__ std::int64_t norm_pitch(std::int64_t columns) { return (columns + 2) / 2 * 2; }

// One block per set and chunk of rows, which it takes in batches: each warp sums the squares of two rows, in pairs of
// columns, so that the shift (8 bytes a column) is read without gaps; then each thread adds the weighted rows for its
// columns, reading them again from cache (a batch is 16 D elements). 256 threads, at most 128 registers, 256 bytes of
// shared memory: 2 blocks per multiprocessor, 64 bytes in flight per thread. Floor: one read of the features from
// memory, 4 N D / 4.3e12 s for float; the second read and the partial sums (16 bytes per column and batch) come from L1
// and L2.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads, 2)
    norm_moments_chunks(FeatureSets<T> x, const double* shift, double* partials, Chunks chunks) {
    constexpr int kWidth = kColumns<T>, kFlight = sizeof(T) < 4 ? 4 : 8;  // rows in flight per thread
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const std::int64_t set = blockIdx.x / chunks.count, chunk = blockIdx.x % chunks.count;
    const std::int64_t begin = chunk * chunks.rows, end = min(begin + chunks.rows, x.rows);
    const T* data = x.data + set * x.set_stride;
    double* partial = partials + blockIdx.x * norm_pitch(x.columns);
    if (shift) shift += set * x.columns;

    double quartic = 0;
    for (std::int64_t first = begin; first < end; first += kNormRows) {
        double* norms = dynamic_shared() + (first - begin) / kNormRows % 2 * kNormRows;
        const int count = static_cast<int>(min(end - first, std::int64_t{kNormRows}));
        const T* batch = data + first * x.row_stride;
        double norm[2] = {};
        const std::int64_t rows[2] = {min(warp, count - 1) * x.row_stride,
                                      min(warp + kNormWarps, count - 1) * x.row_stride};
        for (std::int64_t start = lane * 2; start < x.columns; start += kWidth * kWarp * 2) {
            Vector<T, 2> loaded[kWidth][2];
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const std::int64_t column = start + i * kWarp * 2;
                load_vectors(loaded[i], elements_left<2>(x.columns, column), kAligned,
                             [&](int j) { return batch + column + rows[j]; });
            }
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const std::int64_t column = start + i * kWarp * 2;
                const int width = elements_left<2>(x.columns, column);
                double offset[2];
                load_doubles(offset, shift_at(shift, column), width, kAligned);
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int v = 0; v < 2; ++v) {
                        const double y = v < width ? to_double(loaded[i][j].values[v]) - offset[v] : 0.0;
                        norm[j] += y * y;
                    }
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            norm[j] = sum_lanes(norm[j]);
            if (lane == 0 && warp + j * kNormWarps < count) norms[warp + j * kNormWarps] = norm[j];
        }
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < count) quartic += norms[threadIdx.x] * norms[threadIdx.x];

        for (std::int64_t column = threadIdx.x * kWidth; column < x.columns; column += kNormThreads * kWidth) {
            const int width = elements_left<kWidth>(x.columns, column);
            double offset[kWidth], sum[kWidth];
            load_doubles(offset, shift_at(shift, column), width, kAligned);
            load_doubles(sum, first > begin ? partial + column : nullptr, width, kAligned);
#pragma unroll
            for (int part = 0; part < kNormRows; part += kFlight) {
                Vector<T, kWidth> loaded[kFlight];
                load_vectors(loaded, width, kAligned,
                             [&](int r) { return batch + column + min(part + r, count - 1) * x.row_stride; });
#pragma unroll
                for (int r = 0; r < kFlight; ++r) {
                    if (part + r >= count) break;
#pragma unroll
                    for (int v = 0; v < kWidth; ++v)
                        sum[v] += norms[part + r] * (to_double(loaded[r].values[v]) - offset[v]);
                }
            }
            store_vector(partial + column, sum, width, kAligned);
        }
    }

    if (warp == 0) {
        quartic = sum_lanes<kNormRows>(quartic);
        if (lane == 0) partial[x.columns] = quartic;
    }
}

// One block per set (and groups of columns): adds the chunks. 256 threads, at most 64 registers, 2 KiB of shared
// memory: 4 blocks per multiprocessor. Floor: at most 512 rows of doubles, bound by latency.
__global__ void __launch_bounds__(kSumThreads, 4)
    norm_moments_finish(double* cubic, double* quartic, const double* partials, std::int64_t columns,
                        std::int64_t chunks) {
    const std::int64_t set = blockIdx.x, pitch = norm_pitch(columns);
    sum_partials(
        chunks, columns + 1, [=](std::int64_t p) { return partials + (set * chunks + p) * pitch; },
        [=](std::int64_t column, double sum) {
            (column < columns ? cubic[set * columns + column] : quartic[set]) = sum;
        });
}

}  // namespace

template <class T>
cudaError_t class_sums(const FeatureSets<T>& features, const std::int64_t* order, const std::int64_t* offsets,
                       std::int64_t classes, const double* shift, double* sums, double* workspace,
                       cudaStream_t stream) {
    const std::int64_t sets = features.sets, rows = features.rows, columns = features.columns;
    if (columns == 0 || classes == 0) return cudaSuccess;
    const Chunks chunks = class_sum_chunks(sets, rows, columns);
    const bool aligned = vectors_aligned(features, shift, kColumns<T>) && is_aligned(sums, 16);
    const auto kernel = aligned ? class_sums_chunks<T, true> : class_sums_chunks<T, false>;
    const std::int64_t warps = sets * chunks.count * ceil_div(columns, kWarp * kColumns<T>);
    const cudaError_t error = launch(kernel, Grid{ceil_div(warps * kWarp, kClassSumThreads), 1}, kClassSumThreads, 0,
                                     stream, features, order, offsets, classes, shift, sums, workspace, chunks);
    if (error != cudaSuccess) return error;
    return launch(class_sums_finish, sum_grid(sets * classes, columns), kSumThreads, kSumShared, stream, sums,
                  workspace, offsets, classes, columns, chunks);
}

std::int64_t class_sums_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns) {
    return sets * class_sum_chunks(sets, rows, columns).count * 2 * columns;
}

template <class T>
cudaError_t gram(const FeatureSets<T>& features, const double* shift, double* gram, double* workspace,
                 int multiprocessors, cudaStream_t stream) {
    return launch_gram<true>(features, shift, gram, workspace, multiprocessors, stream);
}

std::int64_t gram_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns, int multiprocessors) {
    return plan_gram(sets, columns, rows, multiprocessors).workspace(sets);
}

template <class T>
cudaError_t sample_gram(const FeatureSets<T>& features, const double* shift, double* gram, double* workspace,
                        int multiprocessors, cudaStream_t stream) {
    return launch_gram<false>(features, shift, gram, workspace, multiprocessors, stream);
}

std::int64_t sample_gram_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns, int multiprocessors) {
    return plan_gram(sets, rows, columns, multiprocessors).workspace(sets);
}

template <class T>
cudaError_t norm_moments(const FeatureSets<T>& features, const double* shift, double* cubic, double* quartic,
                         double* workspace, cudaStream_t stream) {
    const Chunks chunks = norm_chunks(features.sets, features.rows);
    const auto kernel =
        vectors_aligned(features, shift, kColumns<T>) ? norm_moments_chunks<T, true> : norm_moments_chunks<T, false>;
    const cudaError_t error = launch(kernel, Grid{features.sets * chunks.count, 1}, kNormThreads, kNormShared, stream,
                                     features, shift, workspace, chunks);
    if (error != cudaSuccess) return error;
    return launch(norm_moments_finish, sum_grid(features.sets, features.columns + 1), kSumThreads, kSumShared, stream,
                  cubic, quartic, workspace, features.columns, chunks.count);
}

std::int64_t norm_moments_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns) {
    return sets * norm_chunks(sets, rows).count * norm_pitch(columns);
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                                 \
    template cudaError_t class_sums(const FeatureSets<T>&, const std::int64_t*, const std::int64_t*, std::int64_t, \
                                    const double*, double*, double*, cudaStream_t);                                \
    template cudaError_t gram(const FeatureSets<T>&, const double*, double*, double*, int, cudaStream_t);          \
    template cudaError_t sample_gram(const FeatureSets<T>&, const double*, double*, double*, int, cudaStream_t);   \
    template cudaError_t norm_moments(const FeatureSets<T>&, const double*, double*, double*, double*, cudaStream_t);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
