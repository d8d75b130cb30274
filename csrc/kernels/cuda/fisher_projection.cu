// The wide way to the projection of fisher_ways.h: tiles of 128 x 128 of per-sample gradients of 16-bit types, which
// read less from L2 than those of fisher.cu, since the first directions are in registers and not in shared memory.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "fisher.h"
#include "fisher_copies.h"
#include "fisher_layer.h"
#include "fisher_plan.h"
#include "fisher_products.h"
#include "fisher_ways.h"

namespace transferops::cuda {
namespace {

constexpr int kOwn = 2;  // directions in registers

// Slabs of one step: four pairs of them leave as much shared memory as two of two steps.
template <class T>
struct StepTile : TileShape<T, 128, 128> {
    static constexpr int kDepth = TileShape<T, 128, 128>::kStepDepth;
};

// Dynamic shared memory, in this order: pairs of slabs; the directions that are not in registers; the warps' sums; the
// tables of a convolution.
template <class Operand>
struct HeldTile {
    using T = typename Operand::Element;
    using Shape = StepTile<T>;
    using Edge = Slab<T, 128, Shape::kDepth>;
    using Left = Copier<Operand, Shape, Shape::kRows, 1>;
    using Right = Copier<Operand, Shape, Shape::kColumns, 1>;
    using Table = typename Left::Table;
    static constexpr bool kHasTables = !std::is_empty_v<Table>;
    static constexpr int kAhead = kHasTables ? 2 : 3;  // pairs of slabs on their way
    static constexpr int kSlots = kAhead + 1;
    static constexpr std::size_t kDirection = Shape::kElements * sizeof(float);

    __host__ __device__ static std::int64_t padded(std::int64_t positions) {
        return ceil_div(positions, Shape::kDepth) * Shape::kDepth;
    }
    // Directions in shared memory, by way of which those of the registers come.
    __host__ __device__ static std::int64_t in_shared(std::int64_t chunk) { return chunk > kOwn ? chunk - kOwn : 1; }

    static std::size_t bytes(std::int64_t positions, std::int64_t chunk) {
        return kSlots * 2 * Edge::kBytes + in_shared(chunk) * kDirection + ProductSums<float>::shared_bytes(chunk) +
               (kHasTables
                    ? (Left::table_size(padded(positions)) + Right::table_size(padded(positions))) * sizeof(Table)
                    : 0);
    }
    // Of directions in a block; 0 if not even those in registers can be served.
    static std::int64_t most_chunk(std::int64_t positions) {
        std::int64_t chunk = kOwn;
        while (bytes(positions, chunk + 1) <= kMostShared) ++chunk;
        return bytes(positions, kOwn) <= kMostShared ? chunk : 0;
    }
};

// parts[slot][n][k] = <G_n, D_k>, summed over the tiles of the slot: a block per slot of tiles, split of samples and
// chunk of directions, as in gradient_tiles of fisher.cu. The pairs of slabs of all its samples are one stream, kAhead
// of them on their way, one barrier each. 256 threads (8 warps), at most 255 registers, of which 64 are a gradient and
// 128 two directions: one block per multiprocessor. Shared memory: 34 KiB of slabs (a convolution 26, and 6 KiB and 48
// bytes for each position), 64 KiB for each further direction: 5 directions, of a convolution of at most 64 positions
// too, of others 4 or 3. Floor, 2 N T O I flops at 350 TFLOP/s, since 24 bytes of L2 per clock are 341 clocks for 16
// positions of a tile; for each direction in shared memory 512 clocks a sample in which that delivers it, in registers
// 128 of arithmetic (ViT-B/16 fc1, N = 64, 5 directions: 250 us). Positions are padded to 16, rows and columns to 128.
template <class Operand>
__global__ void __launch_bounds__(kTileThreads, 1)
    held_tiles(Gradients<Operand> x, Plan plan, const float* directions, std::int64_t count, float* parts) {
    using Tile = HeldTile<Operand>;
    using T = typename Tile::T;
    using Shape = typename Tile::Shape;
    constexpr int kAhead = Tile::kAhead;
    constexpr unsigned kSlots = Tile::kSlots;

    const std::int64_t slot = blockIdx.x % plan.slots, split = blockIdx.x / plan.slots;
    const std::int64_t begin = split * plan.split_samples, end = min(begin + plan.split_samples, x.samples);
    const std::int64_t first_direction = blockIdx.y * plan.chunk;
    const int chunk = static_cast<int>(min(plan.chunk, count - first_direction));
    const int positions = static_cast<int>(x.left.positions), padded = static_cast<int>(Tile::padded(positions));

    T* const slabs = reinterpret_cast<T*>(dynamic_shared());
    float* const held = reinterpret_cast<float*>(slabs + kSlots * 2 * Tile::Edge::kElements);
    float* const warp_sums = held + Tile::in_shared(plan.chunk) * Shape::kElements;
    auto* const left_table = reinterpret_cast<typename Tile::Table*>(reinterpret_cast<char*>(warp_sums) +
                                                                     ProductSums<float>::shared_bytes(plan.chunk));
    auto* const right_table = left_table + Shape::kRows + padded;
    const auto left_slab = [&](unsigned turn) { return slabs + 2 * turn * Tile::Edge::kElements; };
    const auto right_slab = [&](unsigned turn) { return left_slab(turn) + Tile::Edge::kElements; };
    const ProductSums<float> sums{warp_sums, parts + slot * x.samples * count + first_direction, count, chunk};

    for (std::int64_t tile = slot; tile < plan.tiles; tile += plan.slots) {
        const TilePlace<Shape> place(plan, tile);
        typename Tile::Left left(x.left, place.group, place.first_row, begin, left_table, padded);
        typename Tile::Right right(x.right, place.group, place.first_column, begin, right_table, padded);
        Accumulators<Shape, float> own[kOwn] = {};
#pragma unroll 1
        for (int k = 0; k < chunk; ++k) {
            const float* direction = directions + (first_direction + k) * x.weights();
            const int kept = k < kOwn ? 0 : k - kOwn;
#pragma unroll 1
            for (int n = 0; n < Shape::kFragmentColumns; ++n)
                place.for_column(x, n, [&](int m, int n, int i, std::int64_t index) {
                    *own_element<Shape>(held, kept, m, n, i) = index >= 0 ? direction[index] : 0.0f;
                });
            // By way of shared memory: with the addresses of all elements at once, registers would be spilled.
            const volatile float* const stored = held;
#pragma unroll
            for (int j = 0; j < kOwn; ++j)
                if (k == j)
#pragma unroll
                    for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
                        for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
                            for (int i = 0; i < 4; ++i) own[j][m][n][i] = *own_element<Shape>(stored, 0, m, n, i);
        }
        if constexpr (Tile::kHasTables) __syncthreads();  // the tables are complete

        struct {
            std::int64_t sample;
            int position;
            unsigned turn;
        } next{begin, 0, 0};  // to be copied
        const auto copy_next = [&] {
            if (next.sample < end) {
                left.copy(left_slab(next.turn), next.position, 0);
                right.copy(right_slab(next.turn), next.position, 0);
                next.turn = (next.turn + 1) % kSlots;
                next.position += Shape::kDepth;
                if (next.position >= positions) {
                    next.position = 0;
                    ++next.sample;
                    left.next_sample();
                    right.next_sample();
                }
            }
            commit_copies();  // also of nothing: the last slabs are waited for by number as well
        };
#pragma unroll 1
        for (int i = 0; i < kAhead; ++i) copy_next();

        unsigned turn = 0;
#pragma unroll 1
        for (std::int64_t sample = begin; sample < end; ++sample) {
            Accumulators<Shape, float> gradient = {};
#pragma unroll 1
            for (int position = 0; position < positions; position += Shape::kDepth) {
                wait_copies<kAhead - 1>();
                __syncthreads();  // this pair is complete, and no warp reads the previous one any more
                if (position == 0 && sample > begin) sums.finish(sample - 1, tile == slot);
                copy_next();
                multiply_step<Shape>(gradient, left_slab(turn), right_slab(turn), 0);
                turn = (turn + 1) % kSlots;
            }
#pragma unroll
            for (int k = 0; k < kOwn; ++k)
                if (k < chunk) sums.add(sample, k, dot<Shape, float>(gradient, own[k]));
#pragma unroll 1
            for (int k = kOwn; k < chunk; ++k) sums.add(sample, k, dot<Shape, float>(gradient, held, k - kOwn));
        }
        __syncthreads();  // all warps have the last sample's sums, and have read the last slabs and tables
        sums.finish(end - 1, tile == slot);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Plan and launcher.

template <class Operand>
bool fits(const Gradients<Operand>& x) {
    return !x.empty() && x.left.aligned && x.right.aligned && HeldTile<Operand>::most_chunk(x.left.positions) > 0;
}

// What a sample of a tile takes, in slabs of a tile of 128 x 64, both bound by what they read from L2: a step is two
// thirds of one. In that time shared memory delivers a direction; one in registers takes a quarter of it.
template <class Operand>
double slabs_per_sample(const Gradients<Operand>& x, double directions) {
    const double own = std::min<double>(directions, kOwn);
    return ceil_div(x.left.positions, HeldTile<Operand>::Shape::kDepth) * 2 / 3.0 + (directions - own) + own / 4;
}

template <class Operand>
Plan plan_for(const Gradients<Operand>& x, std::int64_t count, int multiprocessors) {
    using Shape = typename HeldTile<Operand>::Shape;
    const std::int64_t most_chunk = HeldTile<Operand>::most_chunk(x.left.positions);
    const double chunk = static_cast<double>(std::min(count, most_chunk));
    return plan_tiles(x.groups, ceil_div(x.rows(), Shape::kRows), ceil_div(x.columns(), Shape::kColumns), x.samples,
                      most_product_slots(x.samples, count, multiprocessors), count, most_chunk,
                      {.sample = slabs_per_sample(x, chunk), .direction = 5.3}, multiprocessors);
}

// body(gradients) if such tiles serve them, otherwise `none`.
template <class T, class Result, class Body>
Result with_held_tiles(const LayerBatch<T>& layer, std::int64_t count, Result none, const Body& body) {
    if constexpr (sizeof(T) == 2)
        if (count > 0) return with_gradients(layer, [&](const auto& x) -> Result { return fits(x) ? body(x) : none; });
    return none;
}

}  // namespace

template <class T>
cudaError_t wide_projection(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count,
                            Compute<T>* out, double* workspace, int multiprocessors, cudaStream_t stream) {
    return with_held_tiles(
        layer, count, cudaErrorInvalidValue, [&]<class Operand>(const Gradients<Operand>& x) -> cudaError_t {
            const Plan plan = plan_for(x, count, multiprocessors);
            const cudaError_t error = launch(held_tiles<Operand>, plan.grid(), kTileThreads,
                                             HeldTile<Operand>::bytes(x.left.positions, plan.chunk), stream, x, plan,
                                             directions, count, reinterpret_cast<float*>(workspace));
            if (error != cudaSuccess) return error;
            return launch_add_parts(out, workspace, plan.slots, x.samples * count, stream);
        });
}

template <class T>
std::int64_t wide_projection_workspace(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors) {
    return with_held_tiles(layer, count, std::int64_t{0}, [&](const auto& x) -> std::int64_t {
        return doubles_for<Compute<T>>(plan_for(x, count, multiprocessors).slots * x.samples * count);
    });
}

template <class T>
double wide_projection_cost(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors) {
    return with_held_tiles(
        layer, count, static_cast<double>(HUGE_VAL), [&]<class Operand>(const Gradients<Operand>& x) {
            using Shape = typename HeldTile<Operand>::Shape;
            const double chunks = ceil_div(count, HeldTile<Operand>::most_chunk(x.left.positions));
            const double tiles =
                x.samples * x.groups * ceil_div(x.rows(), Shape::kRows) * ceil_div(x.columns(), Shape::kColumns);
            return std::max(tiles / multiprocessors, 1.0) * chunks * slabs_per_sample(x, count / chunks);
        });
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                                    \
    template cudaError_t wide_projection(const LayerBatch<T>&, const Compute<T>*, std::int64_t, Compute<T>*, double*, \
                                         int, cudaStream_t);                                                          \
    template std::int64_t wide_projection_workspace(const LayerBatch<T>&, std::int64_t, int);                         \
    template double wide_projection_cost(const LayerBatch<T>&, std::int64_t, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
