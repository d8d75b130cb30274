// Kernels and launchers of fisher.h and fisher_ways.h: one kernel that makes tiles of per-sample gradients, and three
// things done with a tile while it is in registers. Figures in the comments are budgets and floors, not yet measured on
// a GPU: an H200 has 132 multiprocessors, dense tensor rates of 990 (16-bit), 495 (tf32) and 67 TFLOP/s (float64) by
// its datasheet, of which mma.sync reaches about two thirds, and L2 gives a multiprocessor about 24 bytes per clock.

#include <algorithm>
#include <cstddef>

#include "fisher.h"
#include "fisher_layer.h"
#include "fisher_plan.h"
#include "fisher_products.h"
#include "fisher_tiles.h"
#include "fisher_ways.h"

namespace transferops::cuda {
namespace {

// What is done with a tile.
struct Diagonal {};
struct Sum {};
struct Projection {};
struct Norm {};

template <class T, class Use>
using ShapeFor = TileShape<T, 128, sizeof(T) == 2 && !std::is_same_v<Use, Projection> ? 128 : 64>;

// Whether it leaves numbers per sample.
template <class Use>
constexpr bool kHasProducts = std::is_same_v<Use, Projection> || std::is_same_v<Use, Norm>;

// Dynamic shared memory, in this order: two slabs of each operand in turn; the tables of columns; two sets of the
// warps' sums; the directions.
template <class Operand, class Use>
struct Shared {
    using T = typename Operand::Element;
    using Shape = ShapeFor<T, Use>;
    using Left = Slab<T, Shape::kRows, Shape::kDepth>;
    using Right = Slab<T, Shape::kColumns, Shape::kDepth>;
    using Column = typename Operand::Column;
    static constexpr bool kHasTables = !std::is_empty_v<Column>;
    static constexpr std::size_t kSlabs = 2 * (Left::kBytes + Right::kBytes);
    static constexpr std::size_t kTables = kHasTables ? (Shape::kRows + Shape::kColumns) * sizeof(Column) : 0;
    static constexpr std::size_t kDirection = Shape::kElements * sizeof(Compute<T>);

    __host__ __device__ static constexpr std::size_t sums(std::int64_t chunk) {
        return kHasProducts<Use> ? ProductSums<Compute<T>>::shared_bytes(chunk) : 0;
    }
    static constexpr std::size_t bytes(std::int64_t chunk) {
        return kSlabs + kTables + sums(chunk) + (std::is_same_v<Use, Projection> ? chunk * kDirection : 0);
    }
    static constexpr std::int64_t most_chunk() {
        std::int64_t chunk = 1;
        while (std::is_same_v<Use, Projection> && bytes(chunk + 1) <= kMostShared) ++chunk;
        return chunk;
    }
    static_assert(bytes(1) <= kMostShared && most_chunk() <= kTileThreads);
};

// One block per slot of tiles, split of samples and chunk of directions. The slabs of all its samples are one stream:
// while the warps multiply one pair in shared memory the next is on its way to registers, one barrier per slab, and
// what is done with a finished gradient runs beside the loads of the next sample.
//   diagonal: its square is added to a second set of accumulators, written per split;
//   sum: goes on with the next sample, written per split;
//   projection, norm: dotted with the directions in shared memory or with itself; summed over lanes by shuffles, over
//     warps after the next barrier, over the tiles of the slot in parts[slot][sample][direction].
// 256 threads (8 warps), at most 255 registers (float 208): one block per multiprocessor, 2 warps per scheduler. Tiles
// are 128 x 128 for 16-bit types (but in a projection) and 128 x 64 otherwise. Shared memory: 35 KiB (16-bit), 26
// (float) or 50 (double) of slabs, 6 KiB more for a convolution; a projection adds 32 KiB (double 64) per direction, of
// which 5 or 6 (2) fit: its samples are passed over once for every so many. Floor, 2 N T O I flops each: 16-bit, 40
// bytes of L2 per clock against 24 at the full rate of mma.sync, so about 350 TFLOP/s (ViT-B/16 fc1, N = 64: 170 us;
// fisher_diagonal.cu and, of directions, fisher_projection.cu read less); float, three products of tf32 for one, about
// 100 TFLOP/s; double, 67; and for each direction 256 clocks a sample (double 512) in which shared memory delivers it,
// half of what a slab takes. Positions are padded to whole slabs, 32 or 16, and rows and columns to whole tiles: a
// smaller tile would be better for layers of fewer than 64 channels.
template <class Operand, class Use>
__global__ void __launch_bounds__(kTileThreads, 1)
    gradient_tiles(Gradients<Operand> x, Plan plan, const Compute<typename Operand::Element>* directions,
                   std::int64_t count, Compute<typename Operand::Element>* parts) {
    using T = typename Operand::Element;
    using C = Compute<T>;
    using Layout = Shared<Operand, Use>;
    using Shape = typename Layout::Shape;
    using Column = typename Operand::Column;

    char* const shared = reinterpret_cast<char*>(dynamic_shared());
    T* const slabs = reinterpret_cast<T*>(shared);
    const auto left_slab = [&](int turn) { return slabs + turn * Layout::Left::kElements; };
    const auto right_slab = [&](int turn) { return left_slab(2) + turn * Layout::Right::kElements; };
    Column* const tables = reinterpret_cast<Column*>(shared + Layout::kSlabs);
    C* const warp_sums = reinterpret_cast<C*>(shared + Layout::kSlabs + Layout::kTables);
    C* const held = reinterpret_cast<C*>(shared + Layout::kSlabs + Layout::kTables + Layout::sums(plan.chunk));

    const std::int64_t slot = blockIdx.x % plan.slots, split = blockIdx.x / plan.slots;
    const std::int64_t begin = split * plan.split_samples, end = min(begin + plan.split_samples, x.samples);
    const std::int64_t first_direction = blockIdx.y * plan.chunk;
    const int chunk = std::is_same_v<Use, Projection> ? static_cast<int>(min(plan.chunk, count - first_direction)) : 1;

    const ProductSums<C> sums{warp_sums, parts + slot * x.samples * count + first_direction, count, chunk};

    for (std::int64_t tile = slot; tile < plan.tiles; tile += plan.slots) {
        const TilePlace<Shape> place(plan, tile);
        typename Operand::template Loader<Shape, Shape::kRows> left(x.left, place.group, place.first_row, tables);
        typename Operand::template Loader<Shape, Shape::kColumns> right(
            x.right, place.group, place.first_column, Layout::kHasTables ? tables + Shape::kRows : nullptr);
        if constexpr (std::is_same_v<Use, Projection>) {
            for (int k = 0; k < chunk; ++k) {
                const C* direction = directions + (first_direction + k) * x.weights();
                place.for_each(x, [&](int m, int n, int i, std::int64_t index) {
                    *own_element<Shape>(held, k, m, n, i) = index >= 0 ? direction[index] : C{0};
                });
            }
        }
        if constexpr (Layout::kHasTables) __syncthreads();  // the tables are complete

        Accumulators<Shape, C> gradient = {};
        Accumulators<Shape, C> squares = {};
        left.load(begin, 0);
        left.store(left_slab(0));
        right.load(begin, 0);
        right.store(right_slab(0));
        std::int64_t position = 0;
        int turn = 0;
        for (std::int64_t sample = begin; sample < end; turn ^= 1) {
            std::int64_t next_sample = sample, next_position = position + Shape::kDepth;
            if (next_position >= x.left.positions) {
                ++next_sample;
                next_position = 0;
            }
            const bool more = next_sample < end;
            __syncthreads();  // this slab is complete, and no warp reads the previous one any more
            if constexpr (kHasProducts<Use>)
                if (position == 0 && sample > begin) sums.finish(sample - 1, tile == slot);
            multiply_slabs<Shape>(
                gradient, left_slab(turn), right_slab(turn),
                [&](int step) {
                    if (more && step == 0) left.load(next_sample, next_position);
                    if (more && step == 1) right.load(next_sample, next_position);
                },
                [&](int step) {
                    if (more && step == 0) left.store(left_slab(turn ^ 1));
                    if (more && step == 1) right.store(right_slab(turn ^ 1));
                });

            if (!std::is_same_v<Use, Sum> && next_sample != sample) {
                if constexpr (std::is_same_v<Use, Diagonal>) {
                    add_squares<Shape, C>(squares, gradient);
                } else if constexpr (std::is_same_v<Use, Norm>) {
                    sums.add(sample, 0, dot<Shape, C>(gradient, gradient));
                } else {
                    for (int k = 0; k < chunk; ++k) sums.add(sample, k, dot<Shape, C>(gradient, held, k));
                }
#pragma unroll
                for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
                    for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) gradient[m][n][i] = 0;
            }
            sample = next_sample;
            position = next_position;
        }

        if constexpr (!kHasProducts<Use>) {
            C* part = parts + split * x.weights();
            const auto& result = std::is_same_v<Use, Sum> ? gradient : squares;
            place.for_each(x, [&](int m, int n, int i, std::int64_t index) {
                if (index >= 0) part[index] = result[m][n][i];
            });
        } else {
            __syncthreads();  // all warps have the last sample's sums, and have read the last slabs and tables
            sums.finish(end - 1, tile == slot);
        }
    }
}

// |x|^2 of a sample's one position, of a group, by a warp: in every lane.
template <class T>
__device__ double square_norm(const Positions<T>& x, std::int64_t sample, std::int64_t group) {
    constexpr int kWidth = 16 / sizeof(T), kLoads = 4;
    const T* data = x.data + sample * x.sample_stride + group * x.columns;
    double sum = 0;
    for (std::int64_t first = threadIdx.x % kWarp * kWidth; first < x.columns; first += kLoads * kWarp * kWidth) {
        Vector<T, kWidth> values[kLoads][1];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const std::int64_t column = first + i * kWarp * kWidth;
            load_vectors(values[i], elements_left<kWidth>(x.columns, column), x.aligned,
                         [&](int) { return data + column; });
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
#pragma unroll
            for (int v = 0; v < kWidth; ++v) {
                const double value = to_double(values[i][0].values[v]);
                sum += value * value;
            }
    }
    return sum_lanes(sum);
}

// out[n] = |b_n|^2 |a_n|^2, summed over groups: the norms of gradients at one position. A warp takes a sample. 256
// threads, at most 64 registers, no shared memory: 4 blocks and 64 KiB in flight per multiprocessor. Floor: one read of
// both operands.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 4) outer_product_norms(Gradients<Positions<T>> x, Compute<T>* out) {
    const std::int64_t sample = std::int64_t{blockIdx.x} * kTileWarps + threadIdx.x / kWarp;
    if (sample >= x.samples) return;
    double sum = 0;
    for (std::int64_t group = 0; group < x.groups; ++group)
        sum += square_norm(x.left, sample, group) * square_norm(x.right, sample, group);
    if (threadIdx.x % kWarp == 0) out[sample] = static_cast<Compute<T>>(sum);
}

// out[i] = sum over p < count of parts[p][i], in double. A block takes 32 elements. 256 threads, at most 64 registers,
// 2 KiB of shared memory. Floor: one read of the parts.
template <class C>
__global__ void __launch_bounds__(kSumThreads, 4)
    add_parts(C* out, const C* parts, std::int64_t count, std::int64_t size) {
    const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
    const double sum = sum_parts(index < size ? count : 0, [=](std::int64_t p) { return parts[p * size + index]; });
    if (threadIdx.x < kWarp && index < size) out[index] = static_cast<C>(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Plans and launchers.

// body(gradients, use): the diagonal as a sum of products of squares at one position.
template <class T, class Body>
auto with_diagonal(const LayerBatch<T>& layer, const Body& body) {
    if (has_one_position(layer)) {
        constexpr std::int64_t kDepth = ShapeFor<Compute<T>, Sum>::kDepth;
        const std::int64_t groups = layer.window.groups, samples = layer.inputs.samples;
        const auto squares = [&](const Signal<T>& x) {
            return Squares<T>{
                x.data, samples, kDepth, x.channels / groups, x.sample_stride, vectors_aligned(x, groups)};
        };
        return body(Gradients<Squares<T>>{squares(layer.grad_outputs), squares(layer.inputs), ceil_div(samples, kDepth),
                                          groups},
                    Sum{});
    }
    return with_gradients(layer, [&](const auto& x) { return body(x, Diagonal{}); });
}

// What a sample of a tile takes, in slabs of positions. Shared memory delivers a direction in half the time of a slab.
template <class Use, class Operand>
double slabs_per_sample(const Gradients<Operand>& x, double directions) {
    const auto slabs = static_cast<double>(ceil_div(x.left.positions, Shared<Operand, Use>::Shape::kDepth));
    return std::is_same_v<Use, Projection> ? slabs + directions / 2 : slabs;
}

template <class Use, class Operand>
Plan plan_for(const Gradients<Operand>& x, std::int64_t count, int multiprocessors) {
    using Layout = Shared<Operand, Use>;
    using Shape = typename Layout::Shape;
    constexpr bool kProducts = kHasProducts<Use>, kDirections = std::is_same_v<Use, Projection>;
    const double chunk = static_cast<double>(std::min(count, Layout::most_chunk()));
    return plan_tiles(
        x.groups, ceil_div(x.rows(), Shape::kRows), ceil_div(x.columns(), Shape::kColumns), x.samples,
        kProducts ? most_product_slots(x.samples, count, multiprocessors) : INT64_MAX, count, Layout::most_chunk(),
        {.sample = slabs_per_sample<Use>(x, chunk), .part = kProducts ? 0 : 0.08, .direction = kDirections ? 2.7 : 0},
        multiprocessors);
}

// The costs of fisher_ways.h.
template <class Use, class T>
double tiles_cost(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors) {
    return with_gradients(layer, [&]<class Operand>(const Gradients<Operand>& x) {
        using Layout = Shared<Operand, Use>;
        using Shape = typename Layout::Shape;
        const double chunks = std::max<std::int64_t>(ceil_div(count, Layout::most_chunk()), 1);
        const double tiles =
            x.samples * x.groups * ceil_div(x.rows(), Shape::kRows) * ceil_div(x.columns(), Shape::kColumns);
        return std::max(tiles / multiprocessors, 1.0) * chunks * slabs_per_sample<Use>(x, count / chunks) *
               Shape::kElements / (128 * 64);
    });
}

template <class Use, class T>
std::int64_t products_workspace(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors) {
    return with_gradients(layer, [&](const auto& x) -> std::int64_t {
        if (x.empty() || count == 0) return 0;
        const Plan plan = plan_for<Use>(x, count, multiprocessors);
        return doubles_for<Compute<T>>(plan.slots * x.samples * count);
    });
}

template <class Use, class T>
cudaError_t launch_products(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count,
                            Compute<T>* out, double* workspace, int multiprocessors, cudaStream_t stream) {
    return with_gradients(layer, [&]<class Operand>(const Gradients<Operand>& x) -> cudaError_t {
        const std::int64_t size = x.samples * count;
        if (x.empty() || count == 0) return launch_add_parts(out, workspace, 0, size, stream);
        const Plan plan = plan_for<Use>(x, count, multiprocessors);
        const cudaError_t error =
            launch(gradient_tiles<Operand, Use>, plan.grid(), kTileThreads, Shared<Operand, Use>::bytes(plan.chunk),
                   stream, x, plan, directions, count, reinterpret_cast<Compute<T>*>(workspace));
        if (error != cudaSuccess) return error;
        return launch_add_parts(out, workspace, plan.slots, size, stream);
    });
}

}  // namespace

template <class C>
cudaError_t launch_add_parts(C* out, const double* parts, std::int64_t count, std::int64_t size, cudaStream_t stream) {
    return launch(add_parts<C>, Grid{ceil_div(size, kWarp), 1}, kSumThreads, kSumShared, stream, out,
                  reinterpret_cast<const C*>(parts), count, size);
}

template <class T>
cudaError_t tile_diagonal(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                          cudaStream_t stream) {
    return with_diagonal(layer, [&]<class Operand, class Use>(const Gradients<Operand>& x, Use) -> cudaError_t {
        if (x.empty()) return launch_add_parts(out, workspace, 0, x.weights(), stream);
        const Plan plan = plan_for<Use>(x, 1, multiprocessors);
        return launch_splits(out, workspace, plan.splits, x.weights(), stream, [&](Compute<T>* parts) {
            return launch(gradient_tiles<Operand, Use>, plan.grid(), kTileThreads, Shared<Operand, Use>::bytes(1),
                          stream, x, plan, nullptr, 1, parts);
        });
    });
}

template <class T>
std::int64_t tile_diagonal_workspace(const LayerBatch<T>& layer, int multiprocessors) {
    return with_diagonal(layer, [&]<class Use>(const auto& x, Use) -> std::int64_t {
        if (x.empty()) return 0;
        return splits_workspace<Compute<T>>(plan_for<Use>(x, 1, multiprocessors).splits, x.weights());
    });
}

template <class T>
double tile_diagonal_cost(const LayerBatch<T>& layer, int multiprocessors) {
    return tiles_cost<Diagonal>(layer, 1, multiprocessors);
}

template <class T>
cudaError_t tile_projection(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count,
                            Compute<T>* out, double* workspace, int multiprocessors, cudaStream_t stream) {
    return launch_products<Projection>(layer, directions, count, out, workspace, multiprocessors, stream);
}

template <class T>
std::int64_t tile_projection_workspace(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors) {
    return products_workspace<Projection>(layer, count, multiprocessors);
}

template <class T>
double tile_projection_cost(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors) {
    return tiles_cost<Projection>(layer, count, multiprocessors);
}

template <class T>
cudaError_t tile_norm(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                      cudaStream_t stream) {
    return launch_products<Norm>(layer, static_cast<const Compute<T>*>(nullptr), 1, out, workspace, multiprocessors,
                                 stream);
}

template <class T>
std::int64_t tile_norm_workspace(const LayerBatch<T>& layer, int multiprocessors) {
    return products_workspace<Norm>(layer, 1, multiprocessors);
}

template <class T>
double tile_norm_cost(const LayerBatch<T>& layer, int multiprocessors) {
    return tiles_cost<Norm>(layer, 1, multiprocessors);
}

template <class T>
cudaError_t outer_product_norm(const LayerBatch<T>& layer, Compute<T>* out, cudaStream_t stream) {
    const auto x = linear_gradients(layer);
    return launch(outer_product_norms<T>, Grid{ceil_div(x.samples, kTileWarps), 1}, kTileThreads, 0, stream, x, out);
}

template cudaError_t launch_add_parts(float*, const double*, std::int64_t, std::int64_t, cudaStream_t);
template cudaError_t launch_add_parts(double*, const double*, std::int64_t, std::int64_t, cudaStream_t);

#define TRANSFEROPS_INSTANTIATE(T)                                                                                    \
    template cudaError_t tile_diagonal(const LayerBatch<T>&, Compute<T>*, double*, int, cudaStream_t);                \
    template std::int64_t tile_diagonal_workspace(const LayerBatch<T>&, int);                                         \
    template double tile_diagonal_cost(const LayerBatch<T>&, int);                                                    \
    template cudaError_t tile_projection(const LayerBatch<T>&, const Compute<T>*, std::int64_t, Compute<T>*, double*, \
                                         int, cudaStream_t);                                                          \
    template std::int64_t tile_projection_workspace(const LayerBatch<T>&, std::int64_t, int);                         \
    template double tile_projection_cost(const LayerBatch<T>&, std::int64_t, int);                                    \
    template cudaError_t tile_norm(const LayerBatch<T>&, Compute<T>*, double*, int, cudaStream_t);                    \
    template std::int64_t tile_norm_workspace(const LayerBatch<T>&, int);                                             \
    template double tile_norm_cost(const LayerBatch<T>&, int);                                                        \
    template cudaError_t outer_product_norm(const LayerBatch<T>&, Compute<T>*, cudaStream_t);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
