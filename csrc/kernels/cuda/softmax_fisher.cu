// Kernels and launchers of softmax_fisher.h. Figures in the comments are budgets and floors, not yet measured on a GPU:
// an H200 has 132 multiprocessors, 67 TFLOP/s on float64 tensor cores (datasheet) and copies 4.3 TB/s.
//
// A sample's classes are taken a chunk at a time. With probabilities p, a chunk's weight w and mean mu_k, its rows
// sqrt(p_c) (T_kc - mu_k) have the chunk's centred Gram matrix as their product; and where a chunk meets the classes
// before it, of weight W and mean m_k, the matrix gains W w / (W + w) (mu_k - m_k)(mu_l - m_l): one column more of the
// same product. So the tangents are read once, nothing cancels, and an error of a mean enters squared.

#include <algorithm>
#include <cfloat>
#include <cstddef>

#include "device.h"
#include "fisher.h"
#include "softmax_fisher.h"

namespace transferops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <int kRows>
constexpr int kResident = kRows <= 16 ? 2 : 1;  // blocks of softmax_gram per multiprocessor

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// The largest logit of a sample, and the sum of exponentials of the others' distance to it.
template <class C>
struct Peak {
    // Not minus infinity: a masked class in front gives exp(-inf) = 0 then, and not exp(-inf + inf).
    C most = sizeof(C) == 4 ? static_cast<C>(-FLT_MAX) : static_cast<C>(-DBL_MAX);
    double sum = 0;

    __device__ void add(C logit) {
        if (logit > most) {
            sum = sum * exponential(most - logit) + 1;
            most = logit;
        } else {
            sum += exponential(logit - most);
        }
    }

    __device__ void add(const Peak& other) {
        const C larger = other.most > most ? other.most : most;
        sum = sum * exponential(most - larger) + other.sum * exponential(other.most - larger);
        most = larger;
    }

    __device__ void add_lanes() {
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            const Peak other{__shfl_xor_sync(kFullWarp, most, distance), __shfl_xor_sync(kFullWarp, sum, distance)};
            add(other);
        }
    }
};

// scales[sample] = {largest logit, 1 / sqrt(sum of exponentials)}. One warp (few classes) or block per sample. 256
// threads, at most 64 registers, 128 bytes of shared memory per block. Floor: one read of the logits, N C / 4.3e12 s
// per byte; softmax_gram reads them again, from L2 up to 50 MB.
template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 4) softmax_scales(TangentBatch<T> x, double* scales) {
    using C = Compute<T>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const std::int64_t sample = kBlock ? blockIdx.x : static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
    if (sample >= x.samples) return;
    const T* logits = x.logits + sample * x.logits_stride;
    Peak<C> peak;
#pragma unroll 4
    for (std::int64_t c = kBlock ? threadIdx.x : lane; c < x.classes; c += kBlock ? kThreads : kWarp)
        peak.add(convert<C>(logits[c]));
    peak.add_lanes();
    if constexpr (kBlock) {
        double* const peaks = dynamic_shared();
        if (lane == 0) {
            peaks[2 * warp] = peak.most;
            peaks[2 * warp + 1] = peak.sum;
        }
        __syncthreads();
        for (int other = 1; other < kWarps && threadIdx.x == 0; ++other)
            peak.add(Peak<C>{static_cast<C>(peaks[2 * other]), peaks[2 * other + 1]});
    }
    if (kBlock ? threadIdx.x == 0 : lane == 0) {
        scales[2 * sample] = peak.most;
        scales[2 * sample + 1] = 1 / sqrt(peak.sum);
    }
}

// The product of kRows directions with as many, and how the warps share it: parts of 32 x 32 (or all of it), and where
// those are fewer than the warps, the classes of a chunk.
template <int kRowCount>
struct Product {
    static constexpr int kRows = kRowCount;
    static constexpr int kClasses = kRows == 8 ? 384 : kRows == 16 ? 192 : kRows == 32 ? 256 : 64;  // of a chunk
    static constexpr int kPart = kRows < 32 ? kRows : 32;
    static constexpr int kPartsDown = kRows / kPart, kParts = kPartsDown * kPartsDown;
    static constexpr int kShares = kWarps / kParts;  // of the classes
    static constexpr int kFragmentRows = kPart <= 16 ? 1 : kPart / 16, kFragmentColumns = kPart / 8;
    // A row: the chunk's classes, then 8 columns of which the first is where the chunk meets those before. 12 modulo 16
    // doubles: the 4 x 4 that half a warp reads of a fragment are then in different banks.
    static constexpr int kPitch = kClasses + 12;
    static constexpr int kWarpRows = kRows / kWarps;  // a warp fills rows warp, warp + kWarps, ...
    static constexpr int kLoads = kClasses / kWarp;
    static constexpr std::size_t kSlab = kRows * kPitch * sizeof(double);
    static constexpr std::size_t kRoots = kClasses * sizeof(double);
    static_assert(kPitch % 16 == 12 && kRows * kRows * sizeof(double) <= kSlab);
};

// Directions `first` .. first + kRows - 1, a chunk of classes at a time on its way from the tangents to a slab. A warp
// owns its rows: means need no other warp.
template <class T, class P>
struct Rows {
    const TangentBatch<T>& x;
    std::int64_t first;
    T values[P::kWarpRows][P::kLoads];
    double means[P::kWarpRows] = {};  // of the sample's classes so far

    __device__ Rows(const TangentBatch<T>& x, int tile) : x(x), first(std::int64_t{tile} * P::kRows) {}

    // Single elements: with 50257 classes no row but the first is aligned, and a warp reads 32 neighbours at a time.
    __device__ void load(std::int64_t sample, std::int64_t chunk) {
        const std::int64_t left = x.classes - chunk - threadIdx.x % kWarp;
#pragma unroll
        for (int r = 0; r < P::kWarpRows; ++r) {
            const std::int64_t direction = first + threadIdx.x / kWarp + r * kWarps;
            const T* source = x.tangents + direction * x.direction_stride + sample * x.sample_stride + chunk;
#pragma unroll
            for (int i = 0; i < P::kLoads; ++i) {
                values[r][i] = {};
                if (direction < x.directions && i * kWarp < left)
                    values[r][i] = source[threadIdx.x % kWarp + i * kWarp];
            }
        }
    }

    // `before`: the weight of the sample's classes before this chunk.
    __device__ void store(double* slab, const double (&roots)[P::kLoads], double before, double weight) {
        const int lane = threadIdx.x % kWarp;
        const double total = before + weight;
        const double share = total > 0 ? weight / total : 0.0;
        const double meeting = sqrt(before * share);
#pragma unroll
        for (int r = 0; r < P::kWarpRows; ++r) {
            double sum = 0;
#pragma unroll
            for (int i = 0; i < P::kLoads; ++i) sum += roots[i] * roots[i] * to_double(values[r][i]);
            sum = sum_lanes(sum);
            const double mean = weight > 0 ? sum / weight : means[r];
            double* row = slab + (threadIdx.x / kWarp + r * kWarps) * P::kPitch;
#pragma unroll
            for (int i = 0; i < P::kLoads; ++i) row[lane + i * kWarp] = roots[i] * (to_double(values[r][i]) - mean);
            const double apart = before > 0 ? mean - means[r] : 0.0;
            if (lane < 8) row[P::kClasses + lane] = lane == 0 ? meeting * apart : 0.0;
            means[r] = before > 0 ? means[r] + share * apart : mean;
        }
    }
};

// One block per pair of kRows directions (blockIdx.y, i <= j of the upper triangle) and every gridDim.x-th sample. The
// chunks of all its samples are one stream: while the warps multiply one, the next is on its way to registers. Sums
// stay in registers until the last sample, then are added over the shares of the classes in order. 256 threads; 8 or 16
// rows: at most 128 registers, 28 KiB of shared memory, 2 blocks and 24 KiB of float in flight per multiprocessor; 32:
// 255 registers, 69 KiB, one block, 32 KiB in flight; 64: 255 registers, 39 or 77 KiB, one block. Floor: one read of
// the tangents, K N C / 4.3e12 s per byte, up to 64 directions; beyond, K / 64 reads, mostly from L2. Above 32
// directions the float64 tensor cores take longer, K^2 N C / 67e12 s. Samples of few classes fill a chunk badly: at 10
// classes a chunk, two barriers and a trip to memory serve 10 K elements, where several samples could share them.
template <class T, int kRowCount>
__global__ void __launch_bounds__(kThreads, kResident<kRowCount>)
    softmax_gram(TangentBatch<T> x, const double* scales, double* parts) {
    using P = Product<kRowCount>;
    using C = Compute<T>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int group = lane / 4, member = lane % 4;
    const int part = warp % P::kParts, share = warp / P::kParts;
    const int part_row = part % P::kPartsDown * P::kPart, part_column = part / P::kPartsDown * P::kPart;
    int right_tile = 0, left_tile = blockIdx.y;  // pairs are counted down the columns of the upper triangle
    while (left_tile > right_tile) left_tile -= ++right_tile;
    const bool square = left_tile == right_tile;

    double* const roots = dynamic_shared();  // of the probabilities
    double* const left_slab = roots + P::kClasses;
    double* const right_slab = square ? left_slab : left_slab + P::kRows * P::kPitch;
    Rows<T, P> left(x, left_tile), right(x, right_tile);

    const auto load = [&](std::int64_t sample, std::int64_t chunk) {
        left.load(sample, chunk);
        if (kRowCount == 64 && !square) right.load(sample, chunk);
        for (int i = threadIdx.x; i < P::kClasses; i += kThreads) {
            const std::int64_t c = chunk + i;
            double root = 0;
            if (c < x.classes) {
                const C logit = convert<C>(x.logits[sample * x.logits_stride + c]);
                root = exponential((logit - static_cast<C>(scales[2 * sample])) / 2) * scales[2 * sample + 1];
            }
            roots[i] = root;
        }
    };

    double sums[P::kFragmentRows][P::kFragmentColumns][4] = {};
    double before = 0;
    std::int64_t sample = blockIdx.x, chunk = 0;
    if (sample < x.samples) load(sample, chunk);
    while (sample < x.samples) {
        __syncthreads();  // the roots are complete, and no warp reads the slabs any more
        {
            double own[P::kLoads], weight = 0;
#pragma unroll
            for (int i = 0; i < P::kLoads; ++i) {
                own[i] = roots[lane + i * kWarp];
                weight += own[i] * own[i];
            }
            weight = sum_lanes(weight);
            if (chunk == 0) before = 0;
            left.store(left_slab, own, before, weight);
            if (kRowCount == 64 && !square) right.store(right_slab, own, before, weight);
            before += weight;
        }
        __syncthreads();  // the slabs are complete, and no warp reads the roots any more
        const int classes = static_cast<int>(min(x.classes - chunk, std::int64_t{P::kClasses}));
        chunk += P::kClasses;
        if (chunk >= x.classes) {
            sample += gridDim.x;
            chunk = 0;
        }
        if (sample < x.samples) load(sample, chunk);

        const int steps = static_cast<int>(ceil_div(classes, 8)) + 1;  // the last: where the chunks meet
        for (int step = share; step < steps; step += P::kShares) {
            const int c = (step == steps - 1 ? P::kClasses : step * 8) + member;
            double a[P::kFragmentRows][4];
#pragma unroll
            for (int m = 0; m < P::kFragmentRows; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = part_row + m * 16 + i % 2 * 8 + group;
                    a[m][i] = P::kRows == 8 && i % 2 == 1 ? 0.0 : left_slab[row * P::kPitch + c + i / 2 * 4];
                }
#pragma unroll
            for (int n = 0; n < P::kFragmentColumns; ++n) {
                const double* row = right_slab + (part_column + n * 8 + group) * P::kPitch + c;
                const double b[2] = {row[0], row[4]};
#pragma unroll
                for (int m = 0; m < P::kFragmentRows; ++m) mma_f64(sums[m][n], a[m], b);
            }
        }
    }

    double* const total = left_slab;
    for (int turn = 0; turn < P::kShares; ++turn) {
        __syncthreads();  // no warp reads the slabs any more, and those before have added theirs
        if (turn != share) continue;
#pragma unroll
        for (int m = 0; m < P::kFragmentRows; ++m)
#pragma unroll
            for (int n = 0; n < P::kFragmentColumns; ++n)
#pragma unroll
                for (int i = 0; i < (P::kRows == 8 ? 2 : 4); ++i) {
                    const int row = part_row + m * 16 + i / 2 * 8 + group;
                    const int column = part_column + n * 8 + member * 2 + i % 2;
                    double& element = total[row * P::kRows + column];
                    element = turn == 0 ? sums[m][n][i] : element + sums[m][n][i];
                }
    }
    __syncthreads();  // the total is complete
    double* const target = parts + (std::int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * P::kRows * P::kRows;
    for (int i = threadIdx.x; i < P::kRows * P::kRows; i += kThreads) target[i] = total[i];
}

// Adds the blocks' parts and writes both halves of the matrix. A block takes 32 elements of a pair of tiles. 256
// threads, at most 64 registers, 2 KiB of shared memory. Floor: one read of the parts, at most 4 MB per pair.
__global__ void __launch_bounds__(kSumThreads, 4)
    softmax_gram_finish(double* gram, const double* parts, std::int64_t count, std::int64_t directions, int rows) {
    int right_tile = 0, left_tile = blockIdx.y;
    while (left_tile > right_tile) left_tile -= ++right_tile;
    const int index = blockIdx.x * kWarp + threadIdx.x % kWarp;  // in the tile
    const std::int64_t row = std::int64_t{left_tile} * rows + index / rows;
    const std::int64_t column = std::int64_t{right_tile} * rows + index % rows;
    const bool exists = row <= column && column < directions;
    const std::int64_t stride = std::int64_t{gridDim.y} * rows * rows;
    const double* part = parts + std::int64_t{blockIdx.y} * rows * rows + index;
    const double sum = sum_parts(exists ? count : 0, [=](std::int64_t p) { return part[p * stride]; });
    if (threadIdx.x < kWarp && exists) gram[row * directions + column] = gram[column * directions + row] = sum;
}

struct GramPlan {
    int rows;                    // of a tile
    std::int64_t pairs, blocks;  // of tiles; along the samples

    std::int64_t parts() const { return blocks * pairs * rows * rows; }
};

template <class T>
GramPlan plan_gram(const TangentBatch<T>& x, int multiprocessors) {
    const int rows = x.directions <= 8 ? 8 : x.directions <= 16 ? 16 : x.directions <= 32 ? 32 : 64;
    const std::int64_t tiles = ceil_div(x.directions, rows), pairs = tiles * (tiles + 1) / 2;
    const int resident = rows <= 16 ? kResident<16> : kResident<64>;
    const std::int64_t wanted =
        std::max<std::int64_t>(ceil_div(resident * multiprocessors, std::max<std::int64_t>(pairs, 1)), 1);
    return {rows, pairs, std::min(x.classes > 0 ? x.samples : 0, wanted)};
}

template <int kRows, class T>
cudaError_t launch_gram(const TangentBatch<T>& x, const GramPlan& plan, const double* scales, double* parts,
                        cudaStream_t stream) {
    using P = Product<kRows>;
    const std::size_t shared = P::kRoots + P::kSlab * (plan.pairs > 1 ? 2 : 1);
    return launch(softmax_gram<T, kRows>, Grid{plan.blocks, plan.pairs}, kThreads, shared, stream, x, scales, parts);
}

}  // namespace

template <class T>
cudaError_t softmax_fisher_gram(const TangentBatch<T>& batch, double* gram, double* workspace, int multiprocessors,
                                cudaStream_t stream) {
    constexpr std::int64_t kWarpClasses = 1024;  // up to here a warp takes a sample, not a block
    const GramPlan plan = plan_gram(batch, multiprocessors);
    double* const scales = workspace;
    double* const parts = workspace + 2 * batch.samples;
    cudaError_t error = cudaSuccess;
    if (plan.parts() > 0) {
        error = batch.classes > kWarpClasses
                    ? launch(softmax_scales<T, true>, Grid{batch.samples, 1}, kThreads, 2 * kWarps * sizeof(double),
                             stream, batch, scales)
                    : launch(softmax_scales<T, false>, Grid{ceil_div(batch.samples, kWarps), 1}, kThreads, 0, stream,
                             batch, scales);
        if (error != cudaSuccess) return error;
        switch (plan.rows) {
            case 8:
                error = launch_gram<8>(batch, plan, scales, parts, stream);
                break;
            case 16:
                error = launch_gram<16>(batch, plan, scales, parts, stream);
                break;
            case 32:
                error = launch_gram<32>(batch, plan, scales, parts, stream);
                break;
            default:
                error = launch_gram<64>(batch, plan, scales, parts, stream);
        }
        if (error != cudaSuccess) return error;
    }
    return launch(softmax_gram_finish, Grid{plan.rows * plan.rows / kWarp, plan.pairs}, kSumThreads, kSumShared, stream,
                  gram, parts, plan.blocks, batch.directions, plan.rows);
}

template <class T>
std::int64_t softmax_fisher_gram_workspace(const TangentBatch<T>& batch, int multiprocessors) {
    const std::int64_t parts = plan_gram(batch, multiprocessors).parts();
    return parts > 0 ? 2 * batch.samples + parts : 0;
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                         \
    template cudaError_t softmax_fisher_gram(const TangentBatch<T>&, double*, double*, int, cudaStream_t); \
    template std::int64_t softmax_fisher_gram_workspace(const TangentBatch<T>&, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
