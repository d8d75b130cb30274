// The exact Fisher information of a softmax output along K directions, from logits and tangents in one read.
//
// Per sample: the highest logit; then, a block of classes at a time, exponentials of the logits and the weighted first
// and second moments of the K rows about a shift, in one pass. The shift is the tangent at the likeliest class, of
// probability p: by Chebyshev's inequality its distance from the mean is at most sqrt(variance / p), so that taking the
// mean's square away costs few digits. Where it would cost many, the sample is gone through once more about its mean.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "fisher.h"
#include "fisher_operand.h"
#include "tile.h"

// Loops over registers that only load or store are unrolled before the compiler takes them for a copy of memory; long
// ones twice, as instructions that count and jump are as dear as others here.
#define TRANSFEROPS_TWICE _Pragma("GCC unroll 2")
#define TRANSFEROPS_UNROLL _Pragma("GCC unroll 8")

namespace transferops::cpu {
namespace {

constexpr std::int64_t kMinBlock = 128;         // classes
constexpr std::int64_t kSpan = 1024;            // classes whose sums are taken in lanes, from there on in float64
constexpr std::int64_t kGroupBytes = 32 << 10;  // of the logits of samples that are looked through ahead
constexpr std::int64_t kSampleSlices = 64;      // added in order
constexpr double kFar = 0.875;  // of a second moment may be the square of the mean: costs 3 of float32's 24 digits

// Rows are worked on in whole vectors, of which the last begins early enough to end with the row; what it has in common
// with the one before it counts once. Rows shorter than a vector are padded to it with what counts for nothing.

template <class E>
constexpr E inverse_factorial(int n) {
    double product = 1;
    for (int i = 2; i <= n; ++i) product *= i;
    return static_cast<E>(1 / product);
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
    Vector sum = Vector{} + inverse_factorial<E>(kTerms);
    for (int i = kTerms - 1; i >= 0; --i) sum = sum * r + inverse_factorial<E>(i);
    const BitVector power = ((BitVector)shifted + kBias) << kMantissa;
    return x < kSmallest ? Vector{} : sum * (Vector)power;
}

// The highest entry of a row of one vector to 2^31 entries, and its place; NaN is higher than nothing.
template <class E>
struct Highest {
    const E* row;
    std::int64_t count;
    E& highest;
    std::int64_t& place;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        using Index = std::conditional_t<std::is_same_v<E, double>, std::int64_t, std::int32_t>;
        using Vector = typename Simd<E, LANES>::Vector;
        using Indices = typename Simd<Index, LANES>::Vector;
        constexpr int kChains = 4;
        Vector best[kChains];
        Indices at[kChains] = {};
        for (auto& lanes : best) lanes = Simd<E, LANES>::load(row);
        const auto look = [&](std::int64_t i, int j) __attribute__((always_inline)) {
            const Vector x = Simd<E, LANES>::load(row + i);
            const auto higher = x > best[j];
            best[j] = higher ? x : best[j];
            at[j] = higher ? Indices{} + static_cast<Index>(i) : at[j];
        };
        std::int64_t i = 0;
        for (; i + kChains * LANES <= count; i += kChains * LANES)
            for (int j = 0; j < kChains; ++j) look(i + j * LANES, j);
        for (; i < count; i += LANES) look(std::min(i, count - LANES), 0);
        for (int j = 1; j < kChains; ++j) {
            const auto higher = best[j] > best[0];
            best[0] = higher ? best[j] : best[0];
            at[0] = higher ? at[j] : at[0];
        }
        int lane = 0;
        for (int l = 1; l < LANES; ++l) lane = best[0][l] > best[0][lane] ? l : lane;
        highest = best[0][lane];
        place = at[0][lane] + lane;
    }
};

// A block of classes of one sample, at least a vector of them. The weights are in whole vectors.
template <class E>
struct Block {
    const E* x;  // [directions][classes], rows row_stride apart
    std::int64_t row_stride, classes;
    const E* weights;
};

// Where tangents are, for caches to get them: a line for each row and kPanel classes, evenly, as rows are too short and
// arithmetic in between is too long for the processor to keep memory busy by itself.
struct Lines {
    const char* data;
    std::int64_t row_bytes, class_bytes;

    const char* of(std::int64_t row, std::int64_t c) const { return data + row * row_bytes + c * class_bytes; }
};

// Rows of a tile and with how many rows, the first of them themselves; rows that are left with themselves: 24 sums and
// the operands fit into 32 registers, 9 into 16.
template <class E, int LANES>
struct TileSize {
    static constexpr bool kMany = LANES == kPanel<E>;  // registers
    static constexpr int kRows = kMany ? 3 : 2, kWide = kMany ? 8 : 4, kTriangle = kMany ? 5 : 3;
};

// weights = exp(logits - highest), and their sum. In the last vector 0 for what is in the one before it, too.
//
// L1 gets meanwhile what the first tile of the block will read. Not for the wide tiles of AVX-512, the first of which
// may read the whole block, as large as L1: not measured there.
template <class E>
struct Exponentials {
    const E* logits;
    std::int64_t count;
    E highest;
    E* weights;
    double& sum;
    Lines tangents;
    std::int64_t rows;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        using Vectors = Simd<E, LANES>;
        typename Vectors::Vector total{};
        const auto exponentials = [&](std::int64_t c) __attribute__((always_inline)) {
            return exp_of_negative<E, LANES>(Vectors::load(logits + c) - highest);
        };
        std::int64_t c = 0;
        for (; c + LANES <= count; c += LANES) {
            if (!TileSize<E, LANES>::kMany && c % kPanel<E> == 0)
                for (std::int64_t k = 0; k < std::min<std::int64_t>(rows, TileSize<E, LANES>::kWide); ++k)
                    __builtin_prefetch(tangents.of(k, c), 0, 3);  // to be read; from L1 on
            total += Vectors::at(weights + c) = exponentials(c);
        }
        if (c < count) {
            Vectors::at(weights + c) = exponentials(count - LANES);
            std::fill_n(weights + c, c + LANES - count, E{0});
            total += Vectors::load(weights + c);
        }
        sum = sum_of_lanes<E, LANES>(total);
    }
};

// In lanes, with y_k = x_k + offset[k]: gram [rows][rows][kPanel] += sum_c weights[c] y_k[c] y_l[c] for k <= l, and
// mean [rows][kPanel] += sum_c weights[c] y_k[c].
//
// L2 gets meanwhile what the next block will read: into L1 it would drive out the block at hand, whose rows often lie a
// multiple of a page apart.
template <class E>
struct Moments {
    Block<E> block;
    std::int64_t rows;
    const E* offset;
    Lines next;
    E* gram;
    E* mean;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        using Size = TileSize<E, LANES>;
        constexpr int kRows = Size::kRows, kWide = Size::kWide, kTriangle = Size::kTriangle;
        std::int64_t k = 0;
        for (; rows - k > kTriangle; k += kRows) {
            std::int64_t l = k + width_of(rows - k, kWide);
            with_width<kRows, kWide>(
                l - k, [&](auto width) __attribute__((always_inline)) { add<LANES, kRows, width(), true>(k, k); });
            for (std::int64_t next; l < rows; l = next) {
                next = l + width_of(rows - l, kWide);
                with_width<1, kWide>(next - l, [&](auto width) __attribute__((always_inline)) {
                    add<LANES, kRows, width(), false>(k, l);
                });
            }
        }
        with_width<1, kTriangle>(
            rows - k, [&](auto width) __attribute__((always_inline)) { add<LANES, width(), width(), true>(k, k); });
    }

  private:
    // Of the rows left, those that one tile takes: not all but one, since the sums of a narrow tile wait for each
    // other.
    static std::int64_t width_of(std::int64_t left, std::int64_t most) {
        return left == most + 1 ? most - 1 : std::min(left, most);
    }

    // Calls f with the constant width, which is LEAST to MOST.
    template <int LEAST, int MOST, class F>
    __attribute__((always_inline)) static inline void with_width(std::int64_t width, const F& f) {
        if constexpr (LEAST < MOST)
            if (width > LEAST) return with_width<LEAST + 1, MOST>(width, f);
        f(std::integral_constant<int, LEAST>{});
    }

    // Rows first .. first+K-1 with rows second .. second+L-1; OWN, with the means of the former, if they begin at the
    // same row.
    template <int LANES, int K, int L, bool OWN>
    __attribute__((always_inline)) inline void add(std::int64_t first, std::int64_t second) const {
        using Vectors = Simd<E, LANES>;
        using Vector = typename Vectors::Vector;
        const auto [x, stride, classes, weights] = block;
        const Lines ahead = next;
        const E *left = x + first * stride, *right = x + second * stride;
        const E *left_offset = offset + first, *right_offset = offset + second;
        E *tile = gram + (first * rows + second) * kPanel<E>, *own_mean = mean + first * kPanel<E>;
        const std::int64_t tile_stride = rows * kPanel<E>;
        Vector sum[K][L], total[K];
        TRANSFEROPS_UNROLL
        for (int k = 0; k < K; ++k) {
            if (OWN) total[k] = Vectors::load(own_mean + k * kPanel<E>);
            TRANSFEROPS_UNROLL
            for (int l = OWN ? k : 0; l < L; ++l) sum[k][l] = Vectors::load(tile + k * tile_stride + l * kPanel<E>);
        }
        const auto step = [&](std::int64_t c, const Vector& weight) __attribute__((always_inline)) {
            Vector weighted[K];
            for (int k = 0; k < K; ++k) {
                const Vector y = Vectors::load(left + k * stride + c) + left_offset[k];
                weighted[k] = y * weight;
                if (!OWN) continue;
                total[k] += weighted[k];
                for (int j = 0; j <= k; ++j) sum[j][k] += weighted[j] * y;
            }
            for (int l = OWN ? K : 0; l < L; ++l) {
                const Vector y = Vectors::load(right + l * stride + c) + right_offset[l];
                for (int k = 0; k < K; ++k) sum[k][l] += weighted[k] * y;
            }
        };
        std::int64_t c = 0;
        TRANSFEROPS_TWICE
        for (; c + LANES <= classes; c += LANES) {
            if (OWN && c % kPanel<E> == 0)
                for (int k = 0; k < K; ++k) __builtin_prefetch(ahead.of(first + k, c), 0, 2);  // to be read; from L2 on
            step(c, Vectors::load(weights + c));
        }
        if (c < classes) step(classes - LANES, Vectors::load(weights + c));
        TRANSFEROPS_UNROLL
        for (int k = 0; k < K; ++k) {
            if (OWN) Vectors::at(own_mean + k * kPanel<E>) = total[k];
            TRANSFEROPS_UNROLL
            for (int l = OWN ? k : 0; l < L; ++l) Vectors::at(tile + k * tile_stride + l * kPanel<E>) = sum[k][l];
        }
    }
};

// sums [1 + rows][rows] += the sums of the first LANES of kPanel lanes each, for the means and the products k <= l;
// leaves zeros in the lanes.
template <class E>
struct TakeLanes {
    E* lanes;
    std::int64_t rows;
    double* sums;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        using Vectors = Simd<E, LANES>;
        for (std::int64_t j = 0; j <= rows; ++j)
            for (std::int64_t i = j * rows + std::max<std::int64_t>(j - 1, 0); i < (j + 1) * rows; ++i) {
                auto& own = Vectors::at(lanes + i * kPanel<E>);
                sums[i] +=
                    sum_of_lanes<double, LANES>(__builtin_convertvector(own, typename Simd<double, LANES>::Vector));
                own = typename Vectors::Vector{};
            }
    }
};

template <class E, class T>
TRANSFEROPS_CLONES void convert_row(const T* source, std::int64_t stride, std::int64_t count, E* __restrict__ row) {
    if (stride == 1)
        for (std::int64_t i = 0; i < count; ++i) row[i] = convert<E>(source[i]);
    else
        for (std::int64_t i = 0; i < count; ++i) row[i] = convert<E>(source[i * stride]);
}

// The sum over samples, one after the other; their highest logits are looked for a few samples ahead, since the shift
// that these choose is somewhere in memory that has to be waited for.
template <class T>
class SampleGram {
    using E = Compute<T>;

  public:
    SampleGram(const T* logits, std::int64_t sample_stride, std::int64_t class_stride, const TangentView<T>& x)
        : logits_(logits),
          logits_sample_stride_(sample_stride),
          logits_class_stride_(class_stride),
          x_(x),
          in_place_(std::is_same_v<E, T> && x.class_stride == 1 && class_stride == 1),
          least_(lanes<E>()),
          block_(block_size(x.directions)),
          group_(std::max<std::int64_t>(kGroupBytes / static_cast<std::int64_t>(sizeof(T)) / x.classes, 1)),
          peaks_(static_cast<std::size_t>(group_)),
          weights_(aligned_buffer<E>(block_)),
          logit_row_(aligned_buffer<E>(block_)),
          rows_(aligned_buffer<E>(x.directions * (in_place_ ? kPanel<E> : block_))),
          offset_(static_cast<std::size_t>(x.directions)),
          lanes_(zeros<E>((1 + x.directions) * x.directions * kPanel<E>)),
          sums_(static_cast<std::size_t>((1 + x.directions) * x.directions)) {}

    // Adds samples begin .. end-1 to gram [K, K].
    void add(std::int64_t begin, std::int64_t end, double* gram) {
        for (std::int64_t first = begin, last; first < end; first = last) {
            last = std::min(first + group_, end);
            for (std::int64_t n = first; n < last; ++n) peaks_[static_cast<std::size_t>(n - first)] = highest_logit(n);
            for (std::int64_t n = first; n < last; ++n) add(n, peaks_[static_cast<std::size_t>(n - first)], gram);
        }
    }

  private:
    struct Peak {
        E highest;
        std::int64_t likeliest;
    };

    void add(std::int64_t n, const Peak& peak, double* gram) {
        const std::int64_t directions = x_.directions;
        const auto [highest, likeliest] = peak;
        for (std::int64_t k = 0; k < directions; ++k) offset_[k] = -convert<E>(*tangent(k, n, likeliest));
        if (!moments(n, highest)) {
            for (std::int64_t k = 0; k < directions; ++k) offset_[k] -= static_cast<E>(sums_[k] / mass_);
            moments(n, highest);
        }
        const double scale = 1 / mass_;
        for (std::int64_t k = 0; k < directions; ++k) {
            const double mean = sums_[k] * scale, *products = sums_.data() + (1 + k) * directions;
            for (std::int64_t l = k; l < directions; ++l)
                gram[k * directions + l] += (products[l] - mean * sums_[l]) * scale;
        }
    }

    static constexpr E kLowest = -std::numeric_limits<E>::infinity();

    // A power of two, so that blocks end where spans do. The tangents of one, with the weights, are to stay in L1 while
    // tiles go over them, except where tiles are so wide that few do and longer loops save more.
    static std::int64_t block_size(std::int64_t directions) {
        const std::uint64_t bytes = cpu_level() == Level::kV4 ? 32 << 10 : 16 << 10;
        const auto fit = bytes / sizeof(E) / static_cast<std::uint64_t>(directions);
        return std::clamp(static_cast<std::int64_t>(std::bit_floor(fit)), kMinBlock, kSpan);
    }

    const T* logit(std::int64_t n, std::int64_t c) const {
        return logits_ + n * logits_sample_stride_ + c * logits_class_stride_;
    }

    const T* tangent(std::int64_t k, std::int64_t n, std::int64_t c) const {
        return x_.data + k * x_.direction_stride + n * x_.sample_stride + c * x_.class_stride;
    }

    std::int64_t padded(std::int64_t count) const { return std::max(count, least_); }

    // How many classes from `first` on are worked on at once.
    std::int64_t classes_from(std::int64_t first) const { return std::min(block_, x_.classes - first); }

    // `count` entries of a row, a vector at least: where they stand, or converted to `copy` with `beyond` after them.
    const E* vectors_of(const T* source, std::int64_t stride, std::int64_t count, E beyond, E* copy) const {
        if constexpr (std::is_same_v<E, T>)
            if (in_place_ && count == padded(count)) return source;
        convert_row(source, stride, count, copy);
        std::fill(copy + count, copy + padded(count), beyond);
        return copy;
    }

    const E* logits_of(std::int64_t n, std::int64_t first, std::int64_t count) const {
        return vectors_of(logit(n, first), logits_class_stride_, count, kLowest, logit_row_.get());
    }

    // The highest logit of sample n, and its class.
    Peak highest_logit(std::int64_t n) const {
        E highest = kLowest;
        std::int64_t likeliest = 0;
        for (std::int64_t first = 0, count; first < x_.classes; first += count) {
            count = classes_from(first);
            E here;
            std::int64_t place;
            run<E>(Highest<E>{logits_of(n, first, count), padded(count), here, place});
            if (here <= highest) continue;
            highest = here;
            likeliest = first + place;
        }
        for (std::int64_t k = 0; k < x_.directions; ++k) __builtin_prefetch(tangent(k, n, likeliest));
        return {highest, likeliest};
    }

    // mass_, and sums_ about the shift. False if a mean is so far from it that squares would lose digits.
    bool moments(std::int64_t n, E highest) {
        std::fill(sums_.begin(), sums_.end(), 0.0);
        mass_ = 0;
        for (std::int64_t first = 0, count; first < x_.classes; first += count) {
            count = classes_from(first);
            double mass;
            run<E>(Exponentials<E>{logits_of(n, first, count), padded(count), highest, weights_.get(), mass,
                                   lines_of(n, first), x_.directions});
            mass_ += mass;
            run<E>(Moments<E>{block_at(n, first, count), x_.directions, offset_.data(), next_lines(n, first),
                              lanes_.get() + x_.directions * kPanel<E>, lanes_.get()});
            if ((first + count) % kSpan == 0 || first + count == x_.classes)
                run<E>(TakeLanes<E>{lanes_.get(), x_.directions, sums_.data()});
        }
        bool close = true;
        for (std::int64_t k = 0; k < x_.directions; ++k)
            close = close && !(sums_[k] * sums_[k] > kFar * mass_ * sums_[(1 + k) * x_.directions + k]);
        return close;
    }

    // What cannot be read where it stands is copied and padded with the shift.
    Block<E> block_at(std::int64_t n, std::int64_t first, std::int64_t count) {
        const std::int64_t room = padded(count);
        const E* row = vectors_of(tangent(0, n, first), x_.class_stride, count, -offset_[0], rows_.get());
        const bool copied = row == rows_.get();
        for (std::int64_t k = 1; copied && k < x_.directions; ++k)
            vectors_of(tangent(k, n, first), x_.class_stride, count, -offset_[k], rows_.get() + k * room);
        return {row, copied ? room : x_.direction_stride, room, weights_.get()};
    }

    Lines lines_of(std::int64_t n, std::int64_t c) const {
        constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
        const T* data = tangent(0, n, c);
        return {reinterpret_cast<const char*>(data), x_.direction_stride * kSize, x_.class_stride * kSize};
    }

    // What the next blocks will read, of this sample or the next.
    Lines next_lines(std::int64_t n, std::int64_t first) const {
        const std::int64_t next = n * x_.classes + first + block_;
        return lines_of(std::min(next / x_.classes, x_.samples - 1), next % x_.classes);
    }

    const T* logits_;
    std::int64_t logits_sample_stride_, logits_class_stride_;
    TangentView<T> x_;
    bool in_place_;
    std::int64_t least_;  // classes of a vector
    std::int64_t block_;
    std::int64_t group_;
    std::vector<Peak> peaks_;                      // of a group of samples
    AlignedBuffer<E> weights_, logit_row_, rows_;  // of one block
    std::vector<E> offset_;                        // minus the shift
    double mass_ = 0;
    AlignedBuffer<E> lanes_;    // of one sample: of the rows [K], then of their products [K, K]
    std::vector<double> sums_;  // the same
};

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
        SampleGram<T> sum(logits, logits_sample_stride, logits_class_stride, tangents);
        double* own = partial.data() + slice * area;
        const std::int64_t end = (slice + 1) * tangents.samples / slices;
        sum.add(slice * tangents.samples / slices, end, own);
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
