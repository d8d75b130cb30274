// The wide way to the diagonal of fisher_ways.h: tiles of 128 x 256 of per-sample gradients of 16-bit types, which read
// less from L2 than those of fisher.cu, where the slabs of a whole sample fit in shared memory.

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "fisher.h"
#include "fisher_copies.h"
#include "fisher_layer.h"
#include "fisher_plan.h"
#include "fisher_ways.h"

namespace transferops::cuda {
namespace {

constexpr int kHalves = 2;
constexpr int kAhead = 3;  // slabs of the right operand on their way
constexpr int kRightSlots = kAhead + 1;

// Dynamic shared memory, in this order: slabs of the right operand, of the left one, and the tables of a convolution.
// The left operand's are those of a sample, which has a slot for each; samples of few slabs stand side by side, so that
// kAhead of theirs can be on their way.
template <class Operand>
struct WideTile {
    using T = typename Operand::Element;
    using Half = TileShape<T, 128, 128>;
    using Edge = Slab<T, 128, Half::kDepth>;
    using Left = Copier<Operand, Half, Half::kRows, 1>;
    using Right = Copier<Operand, Half, Half::kColumns, kHalves>;
    using Table = typename Left::Table;
    static constexpr bool kHasTables = !std::is_empty_v<Table>;

    __host__ __device__ static std::int64_t slabs(std::int64_t positions) { return ceil_div(positions, Half::kDepth); }
    __host__ __device__ static std::int64_t left_slots(std::int64_t slabs) {
        return ceil_div(kRightSlots, slabs) * slabs;
    }
    static std::size_t bytes(std::int64_t positions) {
        const std::int64_t padded = slabs(positions) * Half::kDepth;
        return (kRightSlots + left_slots(slabs(positions))) * Edge::kBytes +
               (kHasTables ? (Left::table_size(padded) + Right::table_size(padded)) * sizeof(Table) : 0);
    }
};

// parts[split] = the squares of G_n, summed over the samples n of the split: a block per tile and split. Each half of
// the tile is a product of its own, whose accumulators the other half takes over once their squares are added to those
// of the half. The first half's slabs of the left operand stay where they are for the second, so that a slab of 128
// channels is read three times where two tiles of 128 x 128 read it four times. All slabs are one stream, kAhead of
// them on their way, one barrier each. 256 threads (8 warps), at most 255 registers, 192 of them accumulators: one
// block per multiprocessor. Shared memory: 34 KiB of the right operand's slabs and 8.5 KiB for each 32 positions of a
// sample (at least 4), for a convolution also 9 KiB and 48 bytes for each position. Floor, 2 N T O I flops: 24 bytes of
// L2 per clock, so about 470 TFLOP/s (ViT-B/16 fc1, N = 64: 130 us); shared memory, which delivers each fragment of the
// left operand 4 times and of the right one twice, is busy for nearly as long. Positions are padded to 16, rows and
// columns to 128; fewer than 32 positions take as long as 32.
template <class Operand>
__global__ void __launch_bounds__(kTileThreads, 1) wide_tiles(Gradients<Operand> x, Plan plan, float* parts) {
    using Tile = WideTile<Operand>;
    using T = typename Tile::T;
    using Half = typename Tile::Half;

    const int positions = static_cast<int>(x.left.positions), slabs = static_cast<int>(Tile::slabs(positions));
    const int left_slots = static_cast<int>(Tile::left_slots(slabs));
    T* const right_slabs = reinterpret_cast<T*>(dynamic_shared());
    T* const left_slabs = right_slabs + kRightSlots * Tile::Edge::kElements;
    auto* const left_table = reinterpret_cast<typename Tile::Table*>(left_slabs + left_slots * Tile::Edge::kElements);
    auto* const right_table = left_table + Half::kRows + slabs * Half::kDepth;

    const std::int64_t split = blockIdx.x / plan.tiles;
    const std::int64_t begin = split * plan.split_samples, end = min(begin + plan.split_samples, x.samples);
    const TilePlace<Half, kHalves> place(plan, blockIdx.x % plan.tiles);
    const int halves = x.columns() - place.first_column > Half::kColumns ? 2 : 1;
    const int padded = slabs * Half::kDepth;
    typename Tile::Left left(x.left, place.group, place.first_row, begin, left_table, padded);
    typename Tile::Right right(x.right, place.group, place.first_column, begin, right_table, padded);
    if constexpr (Tile::kHasTables) __syncthreads();  // the tables are complete

    // A sample's slabs of the left operand follow one another from first_slot on.
    const auto following = [&](int first_slot) { return first_slot + slabs < left_slots ? first_slot + slabs : 0; };
    const auto left_slab = [&](int slot) { return left_slabs + slot * Tile::Edge::kElements; };
    const auto right_slab = [&](unsigned slot) { return right_slabs + slot * Tile::Edge::kElements; };

    struct {
        std::int64_t sample;
        int half, slab, first_slot;
        unsigned slot;
    } next{begin, 0, 0, 0, 0};  // to be copied
    const auto copy_next = [&] {
        if (next.sample < end) {
            const int position = next.slab * Half::kDepth;
            if (next.half == 0) left.copy(left_slab(next.first_slot + next.slab), position, 0);
            right.copy(right_slab(next.slot), position, next.half);
            next.slot = (next.slot + 1) % kRightSlots;
            if (++next.slab == slabs) {
                next.slab = 0;
                if (++next.half == halves) {
                    next.half = 0;
                    ++next.sample;
                    left.next_sample();
                    right.next_sample();
                    next.first_slot = following(next.first_slot);
                }
            }
        }
        commit_copies();  // also of nothing: the last slabs are waited for by number as well
    };
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) copy_next();

    Accumulators<Half, float> squares[kHalves] = {};
    int first_slot = 0;
    unsigned slot = 0;
    const auto add_half = [&](Accumulators<Half, float>& sums) {
        Accumulators<Half, float> gradient = {};
#pragma unroll 1
        for (int slab = 0; slab < slabs; ++slab) {
            wait_copies<kAhead - 1>();
            __syncthreads();  // this slab is complete, and no warp reads the previous one any more
            copy_next();
            const T* const a = left_slab(first_slot + slab);
            const T* const b = right_slab(slot);
            multiply_step<Half>(gradient, a, b, 0);
            if (positions - slab * Half::kDepth > Half::kStepDepth) multiply_step<Half>(gradient, a, b, 1);
            slot = (slot + 1) % kRightSlots;
        }
        add_squares<Half, float>(sums, gradient);
    };
#pragma unroll 1
    for (std::int64_t sample = begin; sample < end; ++sample) {
        add_half(squares[0]);
        if (halves == 2) add_half(squares[1]);
        first_slot = following(first_slot);
    }

    float* const part = parts + split * x.weights();
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
        place.for_each(
            x,
            [&](int m, int n, int i, std::int64_t index) {
                if (index >= 0) part[index] = squares[half][m][n][i];
            },
            half);
}

// ---------------------------------------------------------------------------------------------------------------------
// Plan and launcher.

template <class Operand>
bool fits(const Gradients<Operand>& x) {
    return !x.empty() && x.left.aligned && x.right.aligned && WideTile<Operand>::bytes(x.left.positions) <= kMostShared;
}

// What a sample of a tile takes, in slabs of a tile of 128 x 128 (fisher.cu): both are bound by what they read from L2,
// three edges where two such tiles read four. Below 32 positions the instructions bind that copy slabs and add squares.
template <class Operand>
double slabs_per_sample(const Gradients<Operand>& x) {
    using Half = typename WideTile<Operand>::Half;
    const double steps = std::max<std::int64_t>(ceil_div(x.left.positions, Half::kStepDepth), Half::kSteps);
    const std::int64_t halves = ceil_div(x.columns(), Half::kColumns), tiles = ceil_div(halves, kHalves);
    return steps / Half::kSteps * (tiles + halves) / (2.0 * tiles);
}

template <class Operand>
Plan plan_for(const Gradients<Operand>& x, int multiprocessors) {
    using Half = typename WideTile<Operand>::Half;
    return plan_tiles(x.groups, ceil_div(x.rows(), Half::kRows), ceil_div(x.columns(), kHalves * Half::kColumns),
                      x.samples, INT64_MAX, 1, 1, {.sample = slabs_per_sample(x), .part = 0.16}, multiprocessors);
}

// body(gradients) if wide tiles serve them, otherwise `none`.
template <class T, class Result, class Body>
Result with_wide_tiles(const LayerBatch<T>& layer, Result none, const Body& body) {
    if constexpr (sizeof(T) == 2)
        if (!has_one_position(layer))
            return with_gradients(layer, [&](const auto& x) -> Result { return fits(x) ? body(x) : none; });
    return none;
}

}  // namespace

template <class T>
cudaError_t wide_diagonal(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                          cudaStream_t stream) {
    return with_wide_tiles(
        layer, cudaErrorInvalidValue, [&]<class Operand>(const Gradients<Operand>& x) -> cudaError_t {
            const Plan plan = plan_for(x, multiprocessors);
            return launch_splits(out, workspace, plan.splits, x.weights(), stream, [&](Compute<T>* parts) {
                return launch(wide_tiles<Operand>, plan.grid(), kTileThreads,
                              WideTile<Operand>::bytes(x.left.positions), stream, x, plan, parts);
            });
        });
}

template <class T>
std::int64_t wide_diagonal_workspace(const LayerBatch<T>& layer, int multiprocessors) {
    return with_wide_tiles(layer, std::int64_t{0}, [&](const auto& x) -> std::int64_t {
        return splits_workspace<Compute<T>>(plan_for(x, multiprocessors).splits, x.weights());
    });
}

template <class T>
double wide_diagonal_cost(const LayerBatch<T>& layer, int multiprocessors) {
    return with_wide_tiles(layer, static_cast<double>(HUGE_VAL), [&]<class Operand>(const Gradients<Operand>& x) {
        using Half = typename WideTile<Operand>::Half;
        const double tiles =
            x.samples * x.groups * ceil_div(x.rows(), Half::kRows) * ceil_div(x.columns(), kHalves * Half::kColumns);
        return std::max(tiles / multiprocessors, 1.0) * slabs_per_sample(x) * Half::kElements / (128 * 64);
    });
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                     \
    template cudaError_t wide_diagonal(const LayerBatch<T>&, Compute<T>*, double*, int, cudaStream_t); \
    template std::int64_t wide_diagonal_workspace(const LayerBatch<T>&, int);                          \
    template double wide_diagonal_cost(const LayerBatch<T>&, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
