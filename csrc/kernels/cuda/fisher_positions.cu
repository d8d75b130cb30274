// Kernels and launchers of fisher_positions.h: one kernel that makes tiles of products between positions, or between
// positions and rows of directions, and two things done with a tile while it is in registers. Figures in the comments
// are budgets and floors, not yet measured on a GPU, of the H200 that fisher.cu describes.

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "fisher_layer.h"
#include "fisher_positions.h"
#include "fisher_rows.h"
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
    static_assert(kBlocks * kBytes <= 227 * 1024);
};

// sums += left right^T over all channels. Where both are the `same` rows, those of the left are read alone.
template <class Shape, class E, class C, class Left, class Right, class SlabAt>
__device__ void multiply_rows(Accumulators<Shape, C>& sums, Left left, Right right, std::int64_t channels, bool same,
                              const SlabAt& slab_at) {
    __syncthreads();  // no warp reads the last slabs of a product before
    left.load(0);
    left.store(slab_at(0, 0));
    if (!same) {
        right.load(0);
        right.store(slab_at(1, 0));
    }
    int turn = 0;
    for (std::int64_t channel = 0; channel < channels; channel += Shape::kDepth, turn ^= 1) {
        const std::int64_t next = channel + Shape::kDepth;
        const bool more = next < channels;
        __syncthreads();  // this slab is complete, and no warp reads the previous one any more
        multiply_slabs<Shape, RowSlab>(
            sums, slab_at(0, turn), slab_at(same ? 0 : 1, turn),
            [&](int step) {
                if (more && step == 0) left.load(next);
                if (more && step == 1 && !same) right.load(next);
            },
            [&](int step) {
                if (more && step == 0) left.store(slab_at(0, turn ^ 1));
                if (more && step == 1 && !same) right.store(slab_at(1, turn ^ 1));
            });
    }
}

// One block per unit and tile; what the tile is multiplied by elementwise and summed over its columns is
//   norm: the tile of products a_t . a_s, kept in shared memory, for one of b_t . b_s; pairs of different samples count
//     nothing, tiles above the diagonal twice;
//   contraction: the elements of b, for a tile of D_k a.
// Sums over lanes are by shuffles, over warps and the positions of a sample after a barrier, over tiles by add_parts.
// 256 threads (8 warps), at most 128 registers: two blocks per multiprocessor. Tiles of a norm are 64 x 64 (16-bit: 128
// x 128), of a contraction 128 x 64. Shared memory: 36 KiB (16-bit 105, double 73), of a contraction 31 KiB (double
// 61). Floor: a norm N T (T + 1) (I + O) flops, a contraction 2 N T K I O, where positions fill tiles: a norm has the
// same slab as both operands on the diagonal, 15 (16-bit 22) bytes of L2 per clock at the full rate of mma.sync, which
// HBM meets with 18 of few positions, and 30 (45) elsewhere against 24; a contraction 22. Its products are float for
// 16-bit types too, to keep the bits of the directions: three of tf32.
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
    E* const slabs = reinterpret_cast<E*>(shared);
    C* const column_sums = reinterpret_cast<C*>(shared + Layout::kSlabs);
    C* const kept = reinterpret_cast<C*>(shared + Layout::kSlabs + Layout::kSums);
    const auto slab_at = [&](int operand, int turn) {
        return slabs + (operand == 0 ? turn * Layout::Left::kElements
                                     : 2 * Layout::Left::kElements + turn * Layout::Right::kElements);
    };

    const int unit = blockIdx.x / plan.tiles, tile = blockIdx.x % plan.tiles;
    const int direction = tile / plan.parts, part = tile % plan.parts, tiles = plan.parts / x.groups;
    const int group = part / tiles;
    int row_tile = 0, column_tile = part % tiles;
    if constexpr (kNorm) {
        const UpperTile pair(column_tile);
        row_tile = pair.row;
        column_tile = pair.column;
    }
    const bool diagonal = kNorm && row_tile == column_tile;
    const std::int64_t first_column = std::int64_t{column_tile} * Shape::kColumns;

    const int positions = x.left.positions, first_row = row_tile * Shape::kRows;
    const std::int64_t first_sample = std::int64_t{unit} * plan.packed, origin = first_sample * positions;
    const int samples = min(std::int64_t{plan.packed}, x.samples - first_sample), height = samples * positions;
    const std::int64_t last = x.samples * positions - 1;
    Accumulators<Shape, C> sums = {};
    if constexpr (kNorm) {
        const auto product_of = [&](const Operand& operand) {
            multiply_rows<Shape, E>(
                sums, Rows<Operand, E, Shape, Shape::kRows>(operand, group, origin + first_row, last),
                Rows<Operand, E, Shape, Shape::kColumns>(operand, group, origin + first_column, last), operand.columns,
                diagonal, slab_at);
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
        const std::int64_t first = (direction * x.groups + group) * x.rows() + first_column;
        multiply_rows<Shape, E>(
            sums, Rows<Operand, E, Shape, Shape::kRows>(x.right, group, origin, last),
            Rows<Positions<C>, E, Shape, Shape::kColumns>(directions, 0, first, directions.positions - 1), x.columns(),
            false, slab_at);
    }

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = Shape::warp_row() + m * 16 + h * 8 + lane / 4, position = first_row + row;
            C sum = 0;
#pragma unroll
            for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const std::int64_t column = first_column + Shape::warp_column() + n * 8 + lane % 4 * 2 + e;
                    const C product = sums[m][n][2 * h + e];
                    if constexpr (kNorm) {
                        if (column < height && position / positions == static_cast<int>(column) / positions)
                            sum += product * *own_element<Shape>(kept, 0, m, n, 2 * h + e);
                    } else if (column < x.rows()) {
                        const T* b = x.left.row(min(origin + position, last)) + group * x.rows();
                        sum += product * convert<C>(b[column]);
                    }
                }
            sum = sum_lanes<4>(sum);
            if (lane % 4 == 0) column_sums[Shape::warp_across() * Shape::kRows + row] = sum;
        }
    __syncthreads();
    for (int sample = warp; sample < samples; sample += kTileWarps) {
        const int begin = max(sample * positions - first_row, 0);
        const int end = min((sample + 1) * positions - first_row, Shape::kRows);
        C sum = 0;
        for (int row = begin + lane; row < end; row += kWarp)
#pragma unroll
            for (int across = 0; across < Shape::kWarpsAcross; ++across)
                sum += column_sums[across * Shape::kRows + row];
        sum = sum_lanes(sum);
        if (lane == 0)
            parts[(part * x.samples + first_sample + sample) * count + direction] = kNorm && !diagonal ? 2 * sum : sum;
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

template <class T>
Gradients<Positions<T>> linear_gradients(const LayerBatch<T>& layer) {
    const std::int64_t groups = layer.window.groups;
    return {positions_of(layer.grad_outputs, groups), positions_of(layer.inputs, groups), layer.inputs.samples, groups};
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
