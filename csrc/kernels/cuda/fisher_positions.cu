// Kernels and launchers of fisher_ways.h: one kernel that makes tiles of products between positions, or between
// positions and rows of directions, and two things done with a tile while it is in registers. Figures in the comments
// are budgets and floors, not yet measured on a GPU, of the H200 that fisher.cu describes.

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "fisher_layer.h"
#include "fisher_rows.h"
#include "fisher_ways.h"
#include "gram_tiles.h"

namespace transferops::cuda {
namespace {

struct GhostNorm {};
struct Contraction {};

// What the tensor cores multiply: directions have more bits than 16-bit inputs.
template <class T, class Use>
using ElementFor = std::conditional_t<std::is_same_v<Use, Contraction>, Compute<T>, T>;

template <class T, class Use>
using ShapeFor = std::conditional_t<std::is_same_v<Use, Contraction>, TileShape<Compute<T>, 128, 64>,
                                    std::conditional_t<sizeof(T) == 2, TileShape<T, 128, 128>, TileShape<T, 64, 64>>>;

// Which blocks do what: block (unit, tile) takes a tile of the products of one sample with many positions, or of
// several with few, which one tile then holds.
struct PositionPlan {
    std::int64_t packed, units;  // samples of a unit
    std::int64_t tiles, parts;   // of a unit, of each of its results: blocks are counted in 32 bits

    template <class Shape>
    PositionPlan(std::int64_t samples, std::int64_t positions, Shape)
        : packed(std::max<std::int64_t>(Shape::kRows / std::max<std::int64_t>(positions, 1), 1)),
          units(ceil_div(samples, packed)) {}

    Grid grid() const { return {units * tiles, 1}; }
};

template <class Operand>
PositionPlan plan_ghost_norm(const Gradients<Operand>& x) {
    using Shape = ShapeFor<typename Operand::Element, GhostNorm>;
    PositionPlan plan(x.samples, x.left.positions, Shape{});
    const std::int64_t edge = ceil_div(plan.packed * x.left.positions, Shape::kRows);
    plan.tiles = plan.parts = x.groups * (edge * (edge + 1) / 2);
    return plan;
}

template <class T>
PositionPlan plan_contraction(const Gradients<Positions<T>>& x, std::int64_t count) {
    using Shape = ShapeFor<T, Contraction>;
    PositionPlan plan(x.samples, x.left.positions, Shape{});
    plan.parts = x.groups * ceil_div(x.rows(), Shape::kColumns);
    plan.tiles = count * plan.parts;
    return plan;
}

// Dynamic shared memory, in this order: two slabs of each operand in turn; the warps' sums over columns; the first
// product of a norm.
template <class T, class Use>
struct Shared {
    using E = ElementFor<T, Use>;
    using C = Compute<T>;
    using Shape = ShapeFor<T, Use>;
    using Left = RowSlab<E, Shape::kRows, Shape::kDepth>;
    using Right = RowSlab<E, Shape::kColumns, Shape::kDepth>;
    static constexpr std::size_t kSlabs = 2 * (Left::kBytes + Right::kBytes);
    static constexpr std::size_t kSums = Shape::kWarpsAcross * Shape::kRows * sizeof(C);
    static constexpr std::size_t kKept = std::is_same_v<Use, GhostNorm> ? Shape::kElements * sizeof(C) : 0;
    static constexpr std::size_t kBytes = kSlabs + kSums + kKept;
    static constexpr int kBlocks = sizeof(C) == 4 && Shape::kElements <= 128 * 64 ? 2 : 1;  // per multiprocessor
    static_assert(kBlocks * kBytes <= kMostShared);
};

// sums += left right^T over all channels. Where both are the `same` rows, those of the left are read alone.
template <class Layout, class Left, class Right>
__device__ void multiply_rows(Accumulators<typename Layout::Shape, typename Layout::C>& sums, Left left, Right right,
                              std::int64_t channels, bool same) {
    using Shape = typename Layout::Shape;
    auto* const slabs = reinterpret_cast<typename Layout::E*>(dynamic_shared());
    const auto left_slab = [&](int number) { return slabs + number % 2 * Layout::Left::kElements; };
    const auto right_slab = [&](int number) {
        return same ? left_slab(number) : slabs + 2 * Layout::Left::kElements + number % 2 * Layout::Right::kElements;
    };
    __syncthreads();  // no warp reads the last slab of a product before
    stream_slabs(
        0, static_cast<int>(ceil_div(channels, Shape::kDepth)),
        [&](int number, int operand) {
            const std::int64_t first = std::int64_t{number} * Shape::kDepth;
            if (operand == 0) left.load(first);
            if (operand == 1 && !same) right.load(first);
        },
        [&](int number, int operand) {
            if (operand == 0) left.store(left_slab(number));
            if (operand == 1 && !same) right.store(right_slab(number));
        },
        [&](int number, auto before, auto after) {
            multiply_slabs<Shape, RowSlab>(sums, left_slab(number), right_slab(number), before, after);
        });
}

// What a block computes.
template <class Use, class Shape>
struct BlockPlace {
    int part, direction, group;
    int first_row = 0;              // of the unit's positions
    std::int64_t first_column = 0;  // of its positions, or of the rows of a direction
    std::int64_t first_sample, origin;
    int samples;  // of the unit

    template <class Operand>
    __device__ BlockPlace(const Gradients<Operand>& x, const PositionPlan& plan, unsigned block) {
        const int unit = block / plan.tiles, tile = block % plan.tiles, tiles = plan.parts / x.groups;
        part = tile % plan.parts;
        direction = tile / plan.parts;
        group = part / tiles;
        if constexpr (std::is_same_v<Use, GhostNorm>) {
            const UpperTile<Shape> pair(part % tiles);
            first_row = pair.row * Shape::kRows;
            first_column = pair.column * Shape::kColumns;
        } else {
            first_column = std::int64_t{part % tiles} * Shape::kColumns;
        }
        first_sample = std::int64_t{unit} * plan.packed;
        origin = first_sample * x.left.positions;
        samples = static_cast<int>(min(plan.packed, x.samples - first_sample));
    }

    __device__ bool on_diagonal() const { return std::is_same_v<Use, GhostNorm> && first_row == first_column; }
};

// One block per unit and tile; what the tile is multiplied by elementwise and summed over its columns is
//   norm: the tile of products a_t . a_s, kept in shared memory, for one of b_t . b_s; pairs of different samples count
//     nothing, tiles above the diagonal twice;
//   contraction: the elements of b, for a tile of D_k a.
// Sums over lanes are by shuffles, over warps and the positions of a sample after a barrier, over tiles by add_parts.
// 256 threads (8 warps), at most 128 registers and two blocks per multiprocessor, but for 16-bit norms and double 255
// and one. Tiles of a norm are 64 x 64 (16-bit: 128 x 128), of a contraction 128 x 64. Shared memory: 37 KiB (16-bit
// 106, double 73), of a contraction 31 KiB (double 62). Floor: a norm N T (T + 1) (I + O) flops, a contraction 2 N T K
// I O, where positions fill tiles. On the diagonal the slabs of a norm serve as both operands, 15 (16-bit 22) bytes of
// L2 per clock at the full rate of mma.sync, and HBM delivers 18: few positions are one read of the operands. Elsewhere
// it is 30 (45) bytes against 24 of L2, in a contraction 22. Its products are of float for 16-bit types too, to keep
// the bits of the directions: three of tf32, a third of two thirds of the dense rate.
template <class Operand, class Use>
__global__ void __launch_bounds__(kTileThreads, Shared<typename Operand::Element, Use>::kBlocks)
    position_tiles(Gradients<Operand> x, Positions<Compute<typename Operand::Element>> directions, std::int64_t count,
                   PositionPlan plan, Compute<typename Operand::Element>* parts) {
    using T = typename Operand::Element;
    using Layout = Shared<T, Use>;
    using Shape = typename Layout::Shape;
    using E = typename Layout::E;
    using C = Compute<T>;
    constexpr bool kNorm = std::is_same_v<Use, GhostNorm>;

    char* const shared = reinterpret_cast<char*>(dynamic_shared());
    C* const column_sums = reinterpret_cast<C*>(shared + Layout::kSlabs);
    C* const kept = reinterpret_cast<C*>(shared + Layout::kSlabs + Layout::kSums);
    unsigned block = blockIdx.x;
    const BlockPlace<Use, Shape> place(x, plan, block);
    const std::int64_t last = x.samples * x.left.positions - 1;
    Accumulators<Shape, C> sums = {};
    if constexpr (kNorm) {
        const auto product_of = [&](const Operand& operand) {
            multiply_rows<Layout>(
                sums, Rows<Operand, E, Shape, Shape::kRows>(operand, place.group, place.origin + place.first_row, last),
                Rows<Operand, E, Shape, Shape::kColumns>(operand, place.group, place.origin + place.first_column, last),
                operand.columns, place.on_diagonal());
        };
        product_of(x.right);
#pragma unroll
        for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
            for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    *own_element<Shape>(kept, 0, m, n, i) = sums[m][n][i];
                    sums[m][n][i] = 0;
                }
        product_of(x.left);
    } else {
        const std::int64_t first = (std::int64_t{place.direction} * x.groups + place.group) * x.rows();
        multiply_rows<Layout>(sums, Rows<Operand, E, Shape, Shape::kRows>(x.right, place.group, place.origin, last),
                              Rows<Positions<C>, E, Shape, Shape::kColumns>(directions, 0, first + place.first_column,
                                                                            directions.positions - 1),
                              x.columns(), false);
    }

    asm volatile("" : "+r"(block));  // the place is found again: there are no registers for it beside the products
    const BlockPlace<Use, Shape> at(x, plan, block);
    const int positions = static_cast<int>(x.left.positions), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = Shape::warp_row() + m * 16 + h * 8 + lane / 4, position = at.first_row + row;
            C sum = 0;
#pragma unroll
            for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const std::int64_t column = at.first_column + Shape::warp_column() + n * 8 + lane % 4 * 2 + e;
                    const C product = sums[m][n][2 * h + e];
                    if constexpr (kNorm) {
                        if (position / positions == static_cast<int>(column) / positions)  // the same sample
                            sum += product * *own_element<Shape>(kept, 0, m, n, 2 * h + e);
                    } else if (column < x.rows()) {
                        const T* b = x.left.row(min(at.origin + position, last)) + at.group * x.rows();
                        sum += product * convert<C>(b[column]);
                    }
                }
            sum = sum_lanes<4>(sum);
            if (lane % 4 == 0) column_sums[Shape::warp_across() * Shape::kRows + row] = sum;
        }
    __syncthreads();
    for (int sample = warp; sample < at.samples; sample += kTileWarps) {
        const int begin = max(sample * positions - at.first_row, 0);
        const int end = min((sample + 1) * positions - at.first_row, Shape::kRows);
        C sum = 0;
        for (int row = begin + lane; row < end; row += kWarp)
#pragma unroll
            for (int across = 0; across < Shape::kWarpsAcross; ++across)
                sum += column_sums[across * Shape::kRows + row];
        sum = sum_lanes(sum);
        if (lane == 0)
            parts[(at.part * x.samples + at.first_sample + sample) * count + at.direction] =
                kNorm && !at.on_diagonal() ? 2 * sum : sum;
    }
}

template <class Use, class Operand>
cudaError_t launch_positions(const Gradients<Operand>& x,
                             const Positions<Compute<typename Operand::Element>>& directions, std::int64_t count,
                             const PositionPlan& plan, Compute<typename Operand::Element>* out, double* workspace,
                             cudaStream_t stream) {
    using T = typename Operand::Element;
    const cudaError_t error = launch(position_tiles<Operand, Use>, plan.grid(), kTileThreads, Shared<T, Use>::kBytes,
                                     stream, x, directions, count, plan, reinterpret_cast<Compute<T>*>(workspace));
    if (error != cudaSuccess) return error;
    return launch_add_parts(out, workspace, plan.parts, x.samples * count, stream);
}

// Where blocks outnumber the multiprocessors, these take them in turn.
template <class Shape>
double cost(const PositionPlan& plan, std::int64_t slabs, int multiprocessors) {
    return static_cast<double>(ceil_div(plan.units * plan.tiles, multiprocessors)) * slabs * Shape::kElements /
           (128 * 64);
}

}  // namespace

template <class T>
double ghost_norm_cost(const LayerBatch<T>& layer, int multiprocessors) {
    return with_gradients(layer, [&](const auto& x) -> double {
        using Shape = ShapeFor<T, GhostNorm>;
        if (x.empty()) return HUGE_VAL;
        const std::int64_t slabs = ceil_div(x.columns(), Shape::kDepth) + ceil_div(x.rows(), Shape::kDepth);
        return cost<Shape>(plan_ghost_norm(x), slabs, multiprocessors);
    });
}

template <class T>
cudaError_t ghost_norm(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, cudaStream_t stream) {
    return with_gradients(layer, [&](const auto& x) {
        return launch_positions<GhostNorm>(x, {}, 1, plan_ghost_norm(x), out, workspace, stream);
    });
}

template <class T>
std::int64_t ghost_norm_workspace(const LayerBatch<T>& layer) {
    return with_gradients(layer,
                          [&](const auto& x) { return doubles_for<Compute<T>>(plan_ghost_norm(x).parts * x.samples); });
}

template <class T>
double contraction_cost(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors) {
    using Shape = ShapeFor<T, Contraction>;
    if (!is_linear(layer)) return HUGE_VAL;
    const auto x = linear_gradients(layer);
    if (x.empty() || count == 0 || x.left.positions > Shape::kRows) return HUGE_VAL;
    return cost<Shape>(plan_contraction(x, count), ceil_div(x.columns(), Shape::kDepth), multiprocessors);
}

template <class T>
cudaError_t contraction(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count, Compute<T>* out,
                        double* workspace, cudaStream_t stream) {
    const auto x = linear_gradients(layer);
    const std::int64_t rows = count * x.groups * x.rows();
    const bool aligned = is_aligned(directions, 16) && x.columns() * sizeof(Compute<T>) % 16 == 0;
    return launch_positions<Contraction>(x, {directions, rows, x.columns(), 0, x.columns(), aligned}, count,
                                         plan_contraction(x, count), out, workspace, stream);
}

template <class T>
std::int64_t contraction_workspace(const LayerBatch<T>& layer, std::int64_t count) {
    const auto x = linear_gradients(layer);
    return doubles_for<Compute<T>>(plan_contraction(x, count).parts * x.samples * count);
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                                \
    template cudaError_t ghost_norm(const LayerBatch<T>&, Compute<T>*, double*, cudaStream_t);                    \
    template std::int64_t ghost_norm_workspace(const LayerBatch<T>&);                                             \
    template double ghost_norm_cost(const LayerBatch<T>&, int);                                                   \
    template cudaError_t contraction(const LayerBatch<T>&, const Compute<T>*, std::int64_t, Compute<T>*, double*, \
                                     cudaStream_t);                                                               \
    template std::int64_t contraction_workspace(const LayerBatch<T>&, std::int64_t);                              \
    template double contraction_cost(const LayerBatch<T>&, std::int64_t, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
