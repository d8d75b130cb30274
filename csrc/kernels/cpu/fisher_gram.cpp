// The exact Fisher information of a softmax output along K directions, from logits and tangents in one read.
//
// Per sample: the probabilities; then, a block of classes at a time, while its tangents are in cache: their weighted
// means, centring, and the weighted Gram of the K rows, whose sums leave the registers into float64. Blocks are put
// together by the rule for merging covariances (Chan, Golub, LeVeque), so that no two large numbers are subtracted.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "fisher.h"
#include "fisher_operand.h"
#include "tile.h"

namespace transferops::cpu {
namespace {

constexpr std::int64_t kBlockBytes = 32 << 10;             // of one block of all directions' tangents, in L1
constexpr std::int64_t kMinBlock = 512, kMaxBlock = 1024;  // classes
constexpr std::int64_t kSampleSlices = 64;                 // added in order

// Rows in cache are worked on in whole vectors: they are padded to multiples of kPanel with what counts for nothing.
// Sums are taken in lanes over at most kMaxBlock classes, the lanes' sum in float64.

// Calls op.run<LANES>() compiled for the processor at hand.
template <class E, class Op>
void run_baseline(const Op& op) {
    op.template run<kPanel<E> / 4>();
}

#ifdef TRANSFEROPS_X86_64
template <class E, class Op>
TRANSFEROPS_TARGET_V3 void run_v3(const Op& op) {
    op.template run<kPanel<E> / 2>();
}

template <class E, class Op>
TRANSFEROPS_TARGET_V4 void run_v4(const Op& op) {
    op.template run<kPanel<E>>();
}
#endif

template <class E, class Op>
void run(const Op& op) {
    static const Level level = cpu_level();
#ifdef TRANSFEROPS_X86_64
    if (level == Level::kV4) return run_v4<E>(op);
    if (level == Level::kV3) return run_v3<E>(op);
#endif
    (void)level;
    run_baseline<E>(op);
}

// exp(x) for x <= 0, to a few units in the last place; 0 where the result would be no normal number, NaN for NaN:
// x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor series of exp(r).
template <class E, int LANES>
__attribute__((always_inline)) inline typename Simd<E, LANES>::Vector exp_of_negative(
    const typename Simd<E, LANES>::Vector& x) {
    constexpr bool kDouble = std::is_same_v<E, double>;
    using Bits = std::conditional_t<kDouble, std::uint64_t, std::uint32_t>;
    using Vector = typename Simd<E, LANES>::Vector;
    using BitVector = typename Simd<Bits, LANES>::Vector;
    constexpr int kMantissa = kDouble ? 52 : 23;
    constexpr Bits kBias = kDouble ? 1023 : 127;
    constexpr E kRound = E(3) * static_cast<E>(std::uint64_t{1} << (kMantissa - 1));  // x + kRound has no fraction
    constexpr E kLog2High = kDouble ? E(0x1.62e42fefa38p-1) : E(0x1.62ep-1);          // times n is exact
    constexpr E kLog2Low = kDouble ? E(0x1.ef35793c7673p-45) : E(0x1.0bfbe8p-15);
    constexpr E kSmallest = kDouble ? E(-708) : E(-87);
    constexpr int kTerms = kDouble ? 13 : 7;  // the next is below 2^-55 or 2^-27
    const Vector shifted = x * E(0x1.71547652b82fep+0) + kRound;
    const Vector n = shifted - kRound;
    const Vector r = (x - n * kLog2High) - n * kLog2Low;
    Vector sum = r * 0 + E(1);
    for (int i = kTerms; i > 0; --i) sum = sum * (r * (E(1) / E(i))) + E(1);
    const BitVector power = ((BitVector)shifted + kBias) << kMantissa;
    return x < kSmallest ? Vector{} : sum * (Vector)power;
}

template <class E, int LANES, std::size_t... I>
__attribute__((always_inline)) inline E sum_of_lanes(const typename Simd<E, LANES>::Vector& x,
                                                     std::index_sequence<I...>) {
    if constexpr (LANES == 2)
        return x[0] + x[1];
    else
        return sum_of_lanes<E, LANES / 2>(
            __builtin_shufflevector(x, x, I...) + __builtin_shufflevector(x, x, (I + sizeof...(I))...),
            std::make_index_sequence<sizeof...(I) / 2>{});
}

// The sum of value(i) over i = 0, LANES, .., count - LANES, in four chains, so that additions do not wait for each
// other.
template <class E, int LANES, class Value>
__attribute__((always_inline)) inline double sum_of(std::int64_t count, const Value& value) {
    typename Simd<E, LANES>::Vector chain[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) chain[j] += value(i + j * LANES);
    for (; i < count; i += LANES) chain[0] += value(i);
    return sum_of_lanes<E, LANES>((chain[0] + chain[1]) + (chain[2] + chain[3]), std::make_index_sequence<LANES / 2>{});
}

template <class E>
struct Highest {
    const E* row;
    std::int64_t count;
    E& highest;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        auto lanes = Simd<E, LANES>::load(row);
        for (std::int64_t i = LANES; i < count; i += LANES) {
            const auto x = Simd<E, LANES>::load(row + i);
            lanes = x > lanes ? x : lanes;
        }
        highest = lanes[0];
        for (int l = 1; l < LANES; ++l) highest = lanes[l] > highest ? lanes[l] : highest;
    }
};

// row = exp(row - highest), and its sum.
template <class E>
struct Exponentials {
    E* row;
    std::int64_t count;
    E highest;
    double& sum;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        sum = sum_of<E, LANES>(count, [x = *this](std::int64_t i) __attribute__((always_inline)) {
            const auto value = exp_of_negative<E, LANES>(Simd<E, LANES>::load(x.row + i) - x.highest);
            Simd<E, LANES>::at(x.row + i) = value;
            return value;
        });
    }
};

template <class E>
struct Sum {
    const E* row;
    std::int64_t count;
    double& sum;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        sum = sum_of<E, LANES>(
            count, [this](std::int64_t i) __attribute__((always_inline)) { return Simd<E, LANES>::load(row + i); });
    }
};

// The sum of row - shift under weights. Meanwhile the caches get what will be asked for next, `ahead`: rows are too
// short for the processor to guess it.
template <class E>
struct WeightedSum {
    const E* row;
    E shift;
    const E* weights;
    std::int64_t count;
    const char* ahead;
    std::int64_t ahead_bytes;  // per element of the row
    double& sum;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        sum = sum_of<E, LANES>(count, [x = *this](std::int64_t i) __attribute__((always_inline)) {
            __builtin_prefetch(x.ahead + i * x.ahead_bytes);
            return (Simd<E, LANES>::load(x.row + i) - x.shift) * Simd<E, LANES>::load(x.weights + i);
        });
    }
};

// lanes [rows][rows][kPanel] += sum_c weights[c] (x_k[c] - centre[k]) (x_l[c] - centre[l]) for k <= l: 4 by 4 rows at a
// time (4 by 2 where registers are few), then what is left by twos and ones.
template <class E>
struct Gram {
    const E* x;
    std::int64_t row_stride, rows;
    const E* centre;
    const E* weights;
    std::int64_t count;
    double* lanes;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        constexpr int kMost = LANES == kPanel<E> ? 4 : 2;
        const auto step = [this](std::int64_t k) { return rows - k >= 4 ? 4 : rows - k >= 2 ? 2 : 1; };
        for (std::int64_t k = 0; k < rows; k += step(k))
            for (std::int64_t l = k, width; l < rows; l += width) {
                width = std::min<std::int64_t>(step(l), kMost);
                switch (step(k) * 8 + width) {
                    case 4 * 8 + 4:
                        add<LANES, 4, kMost>(k, l);
                        break;
                    case 4 * 8 + 2:
                        add<LANES, 4, 2>(k, l);
                        break;
                    case 4 * 8 + 1:
                        add<LANES, 4, 1>(k, l);
                        break;
                    case 2 * 8 + 2:
                        add<LANES, 2, 2>(k, l);
                        break;
                    case 2 * 8 + 1:
                        add<LANES, 2, 1>(k, l);
                        break;
                    default:
                        add<LANES, 1, 1>(k, l);
                }
            }
    }

  private:
    template <int LANES, int K, int L>
    __attribute__((always_inline)) inline void add(std::int64_t first, std::int64_t second) const {
        if (K == L && first == second) return add_rows<LANES, K, L, K == L>(first, second);
        add_rows<LANES, K, L, false>(first, second);
    }

    // Rows first .. first+K-1 with rows second .. second+L-1; DIAGONAL if they are the same.
    template <int LANES, int K, int L, bool DIAGONAL>
    __attribute__((always_inline)) inline void add_rows(std::int64_t first, std::int64_t second) const {
        using Vectors = Simd<E, LANES>;
        using Vector = typename Vectors::Vector;
        using Wide = Simd<double, LANES>;
        Vector sum[K][L] = {};
        const E *left = x + first * row_stride, *right = x + second * row_stride;
        for (std::int64_t c = 0; c < count; c += LANES) {
            const Vector weight = Vectors::load(weights + c);
            Vector other[L];
            for (int l = 0; l < L; ++l) other[l] = Vectors::load(right + l * row_stride + c) - centre[second + l];
            for (int k = 0; k < K; ++k) {
                const Vector own = DIAGONAL ? other[k] : Vectors::load(left + k * row_stride + c) - centre[first + k];
                const Vector weighted = own * weight;
                for (int l = DIAGONAL ? k : 0; l < L; ++l) sum[k][l] += weighted * other[l];
            }
        }
        for (int k = 0; k < K; ++k)
            for (int l = DIAGONAL ? k : 0; l < L; ++l)
                Wide::at(lanes + ((first + k) * rows + second + l) * kPanel<E>) +=
                    __builtin_convertvector(sum[k][l], typename Wide::Vector);
    }
};

template <class E, class T>
TRANSFEROPS_CLONES void convert_row(const T* source, std::int64_t stride, std::int64_t count, E* __restrict__ row) {
    if (stride == 1)
        for (std::int64_t i = 0; i < count; ++i) row[i] = convert<E>(source[i]);
    else
        for (std::int64_t i = 0; i < count; ++i) row[i] = convert<E>(source[i * stride]);
}

template <class E>
TRANSFEROPS_CLONES void scale_row(E* row, std::int64_t count, E factor) {
    for (std::int64_t i = 0; i < count; ++i) row[i] *= factor;
}

// weights [padded] = softmax(logits [classes]), zero from there on.
template <class E, class T>
void softmax_row(const T* logits, std::int64_t stride, std::int64_t classes, std::int64_t padded, E* weights) {
    convert_row(logits, stride, classes, weights);
    std::fill(weights + classes, weights + padded, -std::numeric_limits<E>::infinity());
    E highest;
    run<E>(Highest<E>{weights, padded, highest});
    double sum = 0;
    for (std::int64_t first = 0; first < padded; first += kMaxBlock) {
        double part;
        run<E>(Exponentials<E>{weights + first, std::min(kMaxBlock, padded - first), highest, part});
        sum += part;
    }
    scale_row(weights, padded, static_cast<E>(1 / sum));
}

// Mass and means of a sample's classes so far.
struct Merged {
    double mass;
    std::vector<double> mean;

    // Takes in a block, and adds to gram [K, K] the rank-one term by which the parts' Grams fall short of the whole's.
    void take(double block_mass, const std::vector<double>& block_mean, double* gram) {
        if (block_mass == 0) return;
        const auto directions = static_cast<std::int64_t>(mean.size());
        const double both = mass + block_mass, share = block_mass / both;
        for (std::int64_t k = 0; k < directions; ++k)
            for (std::int64_t l = k; mass != 0 && l < directions; ++l)
                gram[k * directions + l] += mass * share * (block_mean[k] - mean[k]) * (block_mean[l] - mean[l]);
        for (std::int64_t k = 0; k < directions; ++k) mean[k] += share * (block_mean[k] - mean[k]);
        mass = both;
    }
};

// Adds samples begin .. end to the upper triangle of gram [K, K].
template <class T>
void gram_of_samples(const T* logits, std::int64_t logits_sample_stride, std::int64_t logits_class_stride,
                     const TangentView<T>& x, std::int64_t begin, std::int64_t end, double* gram) {
    using E = Compute<T>;
    const std::int64_t directions = x.directions;
    const auto fit = static_cast<std::int64_t>(kBlockBytes / sizeof(E)) / directions / kMinBlock * kMinBlock;
    const std::int64_t block = std::clamp(fit, kMinBlock, kMaxBlock);
    const std::int64_t padded = ceil_div(x.classes, kPanel<E>) * kPanel<E>;
    const auto weights = aligned_buffer<E>(padded), rows = aligned_buffer<E>(directions * block);
    std::vector<double> lanes(static_cast<std::size_t>(directions * directions * kPanel<E>), 0.0);
    std::vector<double> mean(static_cast<std::size_t>(directions));
    std::vector<E> centre(static_cast<std::size_t>(directions));
    Merged merged{0, std::vector<double>(static_cast<std::size_t>(directions))};
    const bool in_place = std::is_same_v<E, T> && x.class_stride == 1;

    for (std::int64_t n = begin; n < end; ++n) {
        softmax_row(logits + n * logits_sample_stride, logits_class_stride, x.classes, padded, weights.get());
        merged.mass = 0;
        std::fill(merged.mean.begin(), merged.mean.end(), 0.0);
        const T* sample = x.data + n * x.sample_stride;
        for (std::int64_t first = 0, count; first < x.classes; first += count) {
            // Whole vectors, read where they stand if they can be; or what is left beyond them, from a padded copy.
            count = std::min(block, x.classes - first);
            if (count >= kPanel<E>) count = count / kPanel<E> * kPanel<E>;
            const bool direct = in_place && count >= kPanel<E>;
            const std::int64_t whole = ceil_div(count, kPanel<E>) * kPanel<E>;
            const E* weight = weights.get() + first;
            const E* source = rows.get();
            std::int64_t stride = block;
            if constexpr (std::is_same_v<E, T>)
                if (direct) source = sample + first, stride = x.direction_stride;
            double mass;
            run<E>(Sum<E>{weight, whole, mass});
            for (std::int64_t k = 0; k < directions; ++k) {
                const T* row = sample + k * x.direction_stride;
                const E shift = convert<E>(row[0]);
                const T* next = first + count < x.classes ? row + (first + count) * x.class_stride
                                : n + 1 < end             ? row + x.sample_stride
                                                          : row;
                if (!direct) {
                    convert_row(row + first * x.class_stride, x.class_stride, count, rows.get() + k * block);
                    std::fill(rows.get() + k * block + count, rows.get() + k * block + whole, shift);
                }
                run<E>(WeightedSum<E>{source + k * stride, shift, weight, whole, reinterpret_cast<const char*>(next),
                                      static_cast<std::int64_t>(sizeof(T)), mean[k]});
                if (mass != 0) mean[k] /= mass;
                centre[k] = shift + static_cast<E>(mean[k]);
            }
            run<E>(Gram<E>{source, stride, directions, centre.data(), weight, whole, lanes.data()});
            merged.take(mass, mean, gram);
        }
    }
    for (std::int64_t k = 0; k < directions; ++k)
        for (std::int64_t l = k; l < directions; ++l)
            for (std::int64_t lane = 0; lane < kPanel<E>; ++lane)
                gram[k * directions + l] += lanes[(k * directions + l) * kPanel<E> + lane];
}

}  // namespace

template <class T>
void softmax_fisher_gram(const T* logits, std::int64_t logits_sample_stride, std::int64_t logits_class_stride,
                         const TangentView<T>& tangents, double* gram, const ParallelFor& parallel_for) {
    const std::int64_t area = tangents.directions * tangents.directions;
    std::fill_n(gram, area, 0.0);
    if (area == 0 || tangents.samples == 0 || tangents.classes == 0) return;
    const std::int64_t slices = std::min(tangents.samples, kSampleSlices);
    std::vector<double> partial(static_cast<std::size_t>(slices * area), 0.0);
    parallel_for(slices, [&](std::int64_t slice) {
        gram_of_samples(logits, logits_sample_stride, logits_class_stride, tangents, slice * tangents.samples / slices,
                        (slice + 1) * tangents.samples / slices, partial.data() + slice * area);
    });
    for (std::int64_t slice = 0; slice < slices; ++slice)
        for (std::int64_t k = 0; k < tangents.directions; ++k)
            for (std::int64_t l = k; l < tangents.directions; ++l)
                gram[k * tangents.directions + l] += partial[slice * area + k * tangents.directions + l];
    for (std::int64_t k = 0; k < tangents.directions; ++k)
        for (std::int64_t l = 0; l < k; ++l) gram[k * tangents.directions + l] = gram[l * tangents.directions + k];
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                          \
    template void softmax_fisher_gram(const T*, std::int64_t, std::int64_t, const TangentView<T>&, double*, \
                                      const ParallelFor&);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cpu
