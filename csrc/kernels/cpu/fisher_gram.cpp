// The exact Fisher information of a softmax output along K directions, from logits and tangents in one read.
//
// Per sample: exponentials of the logits; then, a block of classes at a time, the weighted first and second moments of
// the K rows about a shift, in one pass. The shift is the tangent at the likeliest class, of probability p: by
// Chebyshev's inequality its distance from the mean is at most sqrt(variance / p), so that taking the mean's square
// away costs few digits. Where it would cost many, the sample is gone through once more about its mean.
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
constexpr double kFar = 0.875;  // of a second moment may be the square of the mean: costs 3 of float32's 24 digits

// Rows in cache are worked on in whole vectors: they are padded to multiples of kPanel with what counts for nothing.
// Sums are taken in lanes over at most kMaxBlock classes, from there on in float64.

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
    Vector sum = r * 0 + inverse_factorial<E>(kTerms);
    for (int i = kTerms - 1; i >= 0; --i) sum = sum * r + inverse_factorial<E>(i);
    const BitVector power = ((BitVector)shifted + kBias) << kMantissa;
    return x < kSmallest ? Vector{} : sum * (Vector)power;
}

// The highest entry of a row of fewer than 2^31, and its place; NaN is higher than nothing.
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
        for (; i < count; i += LANES) look(i, 0);
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

// row = exp(row - highest), and its sum, in four chains so that additions do not wait for each other.
template <class E>
struct Exponentials {
    E* row;
    std::int64_t count;
    E highest;
    double& sum;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        using Vectors = Simd<E, LANES>;
        typename Vectors::Vector chain[4] = {};
        std::int64_t i = 0;
        const auto value = [x = *this](std::int64_t at) __attribute__((always_inline)) {
            return Vectors::at(x.row + at) = exp_of_negative<E, LANES>(Vectors::load(x.row + at) - x.highest);
        };
        for (; i + 4 * LANES <= count; i += 4 * LANES)
            for (int j = 0; j < 4; ++j) chain[j] += value(i + j * LANES);
        for (; i < count; i += LANES) chain[0] += value(i);
        sum = sum_of_lanes<E, LANES>((chain[0] + chain[1]) + (chain[2] + chain[3]));
    }
};

// A block of classes of one sample: `whole` of them (whole vectors) where they stand, then one vector of the rest.
template <class E>
struct Block {
    const E* x;  // [directions][whole], rows row_stride apart
    std::int64_t row_stride, whole;
    const E* rest;     // [directions][kPanel], or null
    const E* weights;  // [whole + kPanel]
};

// In lanes, with y_k = x_k - shift[k]: gram [rows][rows][kPanel] += sum_c weights[c] y_k[c] y_l[c] for k <= l, and
// mean [rows][kPanel] += sum_c weights[c] y_k[c]. By tiles of 4 by 4 rows (4 by 2 where registers are few), then what
// is left by twos and ones. Meanwhile the caches get what will be asked for next, `ahead`, in equal parts from every
// tile: rows are too short for the processor to guess it.
template <class E>
struct Moments {
    Block<E> block;
    std::int64_t rows;
    const E* shift;
    const char* ahead;
    std::int64_t ahead_row_bytes, ahead_class_bytes;
    bool first_block;  // overwrites
    double* gram;
    double* mean;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        constexpr int kMost = LANES == kPanel<E> ? 4 : 2;
        const auto step = [this](std::int64_t k) { return rows - k >= 4 ? 4 : rows - k >= 2 ? 2 : 1; };
        const auto width = [&](std::int64_t l) { return std::min(step(l), kMost); };
        std::int64_t tiles = 0, tile = 0;
        for (std::int64_t k = 0; k < rows; k += step(k))
            for (std::int64_t l = k; l < rows; l += width(l)) ++tiles;
        for (std::int64_t k = 0; k < rows; k += step(k))
            for (std::int64_t l = k; l < rows; l += width(l), ++tile) {
                const Tile here{k, l, tile * rows / tiles, (tile + 1) * rows / tiles};
                switch (step(k) * 8 + width(l)) {
                    case 4 * 8 + 4:
                        add<LANES, 4, kMost>(here);
                        break;
                    case 4 * 8 + 2:
                        add<LANES, 4, 2>(here);
                        break;
                    case 4 * 8 + 1:
                        add<LANES, 4, 1>(here);
                        break;
                    case 2 * 8 + 2:
                        add<LANES, 2, 2>(here);
                        break;
                    case 2 * 8 + 1:
                        add<LANES, 2, 1>(here);
                        break;
                    default:
                        add<LANES, 1, 1>(here);
                }
            }
    }

  private:
    struct Tile {
        std::int64_t first, second, ahead_begin, ahead_end;  // rows
    };

    template <int LANES, int K, int L>
    __attribute__((always_inline)) inline void add(const Tile& tile) const {
        if (tile.first == tile.second) return add_rows<LANES, K, L, true>(tile);
        add_rows<LANES, K, L, false>(tile);
    }

    // Rows first .. first+K-1 with rows second .. second+L-1; OWN, with the means of the former, if they begin at the
    // same row.
    template <int LANES, int K, int L, bool OWN>
    __attribute__((always_inline)) inline void add_rows(const Tile& tile) const {
        using Vectors = Simd<E, LANES>;
        using Vector = typename Vectors::Vector;
        constexpr bool kSquare = OWN && K == L;
        const auto [first, second, ahead_begin, ahead_end] = tile;
        Vector sum[K][L] = {}, total[K] = {};
        const auto take = [&, first = first, second = second](const E* left, const E* right, std::int64_t stride,
                                                              const E* weights) __attribute__((always_inline)) {
            const Vector weight = Vectors::load(weights);
            Vector other[L];
            for (int l = 0; l < L; ++l) other[l] = Vectors::load(right + l * stride) - shift[second + l];
            for (int k = 0; k < K; ++k) {
                const Vector own = kSquare ? other[k] : Vectors::load(left + k * stride) - shift[first + k];
                const Vector weighted = own * weight;
                if (OWN) total[k] += weighted;
                for (int l = kSquare ? k : 0; l < L; ++l) sum[k][l] += weighted * other[l];
            }
        };
        const E *left = block.x + first * block.row_stride, *right = block.x + second * block.row_stride;
        for (std::int64_t c = 0; c < block.whole; c += LANES) {
            if (c % kPanel<E> == 0)
                for (std::int64_t k = ahead_begin; k < ahead_end; ++k)
                    __builtin_prefetch(ahead + k * ahead_row_bytes + c * ahead_class_bytes);
            take(left + c, right + c, block.row_stride, block.weights + c);
        }
        if (block.rest != nullptr)
            for (std::int64_t c = 0; c < kPanel<E>; c += LANES)
                take(block.rest + first * kPanel<E> + c, block.rest + second * kPanel<E> + c, kPanel<E>,
                     block.weights + block.whole + c);
        for (int k = 0; k < K; ++k) {
            for (int l = kSquare ? k : 0; l < L; ++l)
                add_lanes<LANES>(gram + ((first + k) * rows + second + l) * kPanel<E>, sum[k][l]);
            if (OWN) add_lanes<LANES>(mean + (first + k) * kPanel<E>, total[k]);
        }
    }

    template <int LANES>
    __attribute__((always_inline)) inline void add_lanes(double* to, const typename Simd<E, LANES>::Vector& x) const {
        using Wide = Simd<double, LANES>;
        const auto wide = __builtin_convertvector(x, typename Wide::Vector);
        if (first_block)
            Wide::at(to) = wide;
        else
            Wide::at(to) += wide;
    }
};

// sums [count] = the sums of the first LANES of kPanel lanes each.
template <class E>
struct LaneSums {
    const double* lanes;
    std::int64_t count;
    double* sums;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        constexpr int kWide = kPanel<double> * LANES / kPanel<E>;  // as many bytes as LANES elements
        using Wide = Simd<double, kWide>;
        for (std::int64_t i = 0; i < count; ++i) {
            const double* own = lanes + i * kPanel<E>;
            typename Wide::Vector sum = Wide::load(own);
            for (int l = kWide; l < LANES; l += kWide) sum += Wide::load(own + l);
            sums[i] = sum_of_lanes<double, kWide>(sum);
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

// The sum over samples, one after the other.
template <class T>
class SampleGram {
    using E = Compute<T>;

  public:
    SampleGram(const T* logits, std::int64_t sample_stride, std::int64_t class_stride, const TangentView<T>& x)
        : logits_(logits),
          logits_sample_stride_(sample_stride),
          logits_class_stride_(class_stride),
          x_(x),
          in_place_(std::is_same_v<E, T> && x.class_stride == 1),
          block_(block_size(x.directions)),
          weights_(aligned_buffer<E>(ceil_div(x.classes, kPanel<E>) * kPanel<E>)),
          rows_(aligned_buffer<E>(x.directions * (in_place_ ? kPanel<E> : block_))),
          shift_(static_cast<std::size_t>(x.directions)),
          lanes_(static_cast<std::size_t>((1 + x.directions) * x.directions * kPanel<E>)),
          sums_(lanes_.size() / kPanel<E>) {}

    // Adds sample n to gram [K, K].
    void add(std::int64_t n, double* gram) {
        const std::int64_t directions = x_.directions;
        const auto [mass, likeliest] = softmax(n);
        for (std::int64_t k = 0; k < directions; ++k)
            shift_[k] =
                convert<E>(x_.data[k * x_.direction_stride + n * x_.sample_stride + likeliest * x_.class_stride]);
        if (!moments(n, mass)) {
            for (std::int64_t k = 0; k < directions; ++k) shift_[k] += static_cast<E>(sums_[k] / mass);
            moments(n, mass);
        }
        const double scale = 1 / mass;
        for (std::int64_t k = 0; k < directions; ++k) {
            const double mean = sums_[k] * scale, *products = sums_.data() + (1 + k) * directions;
            for (std::int64_t l = k; l < directions; ++l)
                gram[k * directions + l] += (products[l] - mean * sums_[l]) * scale;
        }
    }

  private:
    static std::int64_t block_size(std::int64_t directions) {
        const auto fit = static_cast<std::int64_t>(kBlockBytes / sizeof(E)) / directions / kMinBlock * kMinBlock;
        return std::clamp(fit, kMinBlock, kMaxBlock);
    }

    // weights_ = exp(logits - highest), zero beyond the classes; their sum, and the class of the highest.
    std::pair<double, std::int64_t> softmax(std::int64_t n) {
        const std::int64_t padded = ceil_div(x_.classes, kPanel<E>) * kPanel<E>;
        const T* next = logits_ + std::min(n + 1, x_.samples - 1) * logits_sample_stride_;
        for (std::int64_t c = 0; c < x_.classes; c += kPanel<E>) __builtin_prefetch(next + c * logits_class_stride_);
        const T* row = logits_ + n * logits_sample_stride_;
        E highest = -std::numeric_limits<E>::infinity();
        std::int64_t likeliest = 0;
        for (std::int64_t first = 0; first < padded; first += kMaxBlock) {
            const std::int64_t count = std::min(kMaxBlock, x_.classes - first),
                               room = std::min(kMaxBlock, padded - first);
            E* part = weights_.get() + first;
            convert_row(row + first * logits_class_stride_, logits_class_stride_, count, part);
            std::fill(part + count, part + room, -std::numeric_limits<E>::infinity());
            E here;
            std::int64_t place;
            run<E>(Highest<E>{part, room, here, place});
            if (here <= highest) continue;
            highest = here;
            likeliest = first + place;
        }
        double mass = 0;
        for (std::int64_t first = 0; first < padded; first += kMaxBlock) {
            double part;
            run<E>(Exponentials<E>{weights_.get() + first, std::min(kMaxBlock, padded - first), highest, part});
            mass += part;
        }
        return {mass, likeliest};
    }

    // sums_ about shift_. False if a mean is so far from it that squares would lose digits.
    bool moments(std::int64_t n, double mass) {
        const T* sample = x_.data + n * x_.sample_stride;
        for (std::int64_t first = 0, count; first < x_.classes; first += count) {
            count = std::min(block_, x_.classes - first);
            const T* start = sample + first * x_.class_stride;
            const T* next = first + count < x_.classes ? start + count * x_.class_stride
                            : n + 1 < x_.samples       ? sample + x_.sample_stride
                                                       : start;
            run<E>(Moments<E>{block_at(start, count, weights_.get() + first), x_.directions, shift_.data(),
                              reinterpret_cast<const char*>(next),
                              x_.direction_stride * static_cast<std::int64_t>(sizeof(T)),
                              x_.class_stride * static_cast<std::int64_t>(sizeof(T)), first == 0,
                              lanes_.data() + x_.directions * kPanel<E>, lanes_.data()});
        }
        run<E>(LaneSums<E>{lanes_.data(), static_cast<std::int64_t>(sums_.size()), sums_.data()});
        bool close = true;
        for (std::int64_t k = 0; k < x_.directions; ++k)
            close = close && !(sums_[k] * sums_[k] > kFar * mass * sums_[(1 + k) * x_.directions + k]);
        return close;
    }

    // Classes start .. start + count - 1. What cannot be read where it stands is copied, converted and padded with the
    // shift.
    Block<E> block_at(const T* start, std::int64_t count, const E* weights) {
        const std::int64_t whole = in_place_ ? count / kPanel<E> * kPanel<E> : 0, rest = count - whole;
        const std::int64_t room = ceil_div(rest, kPanel<E>) * kPanel<E>;
        for (std::int64_t k = 0; rest != 0 && k < x_.directions; ++k) {
            E* row = rows_.get() + k * room;
            convert_row(start + k * x_.direction_stride + whole * x_.class_stride, x_.class_stride, rest, row);
            std::fill(row + rest, row + room, shift_[k]);
        }
        if constexpr (std::is_same_v<E, T>)
            if (in_place_) return {start, x_.direction_stride, whole, rest != 0 ? rows_.get() : nullptr, weights};
        return {rows_.get(), room, room, nullptr, weights};
    }

    const T* logits_;
    std::int64_t logits_sample_stride_, logits_class_stride_;
    TangentView<T> x_;
    bool in_place_;
    std::int64_t block_;
    AlignedBuffer<E> weights_, rows_;
    std::vector<E> shift_;
    std::vector<double> lanes_, sums_;  // of one sample: of the rows [K], then of their products [K, K]
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
        for (std::int64_t n = slice * tangents.samples / slices; n < end; ++n) sum.add(n, own);
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
