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

#include "exponential.h"
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

// The highest entry of a row of one vector to 2^31 entries, and its place; of no use if any is NaN.
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
        constexpr int kChains = 2, kGroup = 4;  // vectors that share a place
        Vector best[kChains];
        Indices at[kChains] = {};
        for (auto& lanes : best) lanes = Simd<E, LANES>::load(row);
        const auto look = [&](int j, const Vector& x, const Indices& i) __attribute__((always_inline)) {
            const auto higher = x > best[j];
            best[j] = higher ? x : best[j];
            at[j] = higher ? i : at[j];
        };
        std::int64_t i = 0;
        for (; i + kChains * kGroup * LANES <= count; i += kChains * kGroup * LANES)
            for (int j = 0; j < kChains; ++j) {
                const std::int64_t first = i + j * kGroup * LANES;
                Vector x[kGroup];
                for (int g = 0; g < kGroup; ++g) x[g] = Simd<E, LANES>::load(row + first + g * LANES);
                for (int half = kGroup / 2; half > 0; half /= 2)
                    for (int g = 0; g < half; ++g) x[g] = x[g] > x[g + half] ? x[g] : x[g + half];
                look(j, x[0], Indices{} + static_cast<Index>(first));
            }
        for (; i < count; i += LANES) {
            const std::int64_t first = std::min(i, count - LANES);
            look(0, Simd<E, LANES>::load(row + first), Indices{} + static_cast<Index>(first));
        }
        for (int j = 1; j < kChains; ++j) look(0, best[j], at[j]);
        int lane = 0;
        for (int l = 1; l < LANES; ++l) lane = best[0][l] > best[0][lane] ? l : lane;
        highest = best[0][lane];
        place = at[0][lane] + lane;
        for (int g = 1; g < kGroup && row[place] < highest; ++g) place += LANES;
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
        using Size = TileSize<E, LANES>;
        const auto [logits, count, highest, weights, sum, tangents, rows] = *this;  // no store changes these
        const std::int64_t ahead = Size::kMany ? 0 : std::min<std::int64_t>(rows, Size::kWide);
        const auto exponential = [&](std::int64_t c) __attribute__((always_inline)) {
            return Exponential<E, LANES>::of(Vectors::load(logits + std::min(c, count - LANES)) - highest);
        };
        typename Vectors::Vector total{};
        auto next = exponential(0);
        std::int64_t c = 0;
        for (; c + LANES <= count; c += LANES) {
            if (c % kPanel<E> == 0)
                for (std::int64_t k = 0; k < ahead; ++k)
                    __builtin_prefetch(tangents.of(k, c), 0, 3);  // to be read; from L1 on
            const auto own = next;
            next = exponential(c + LANES);
            total += Vectors::at(weights + c) = own.value();
        }
        if (c < count) {
            Vectors::at(weights + c) = next.value();
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
        std::int64_t k = 0, narrow = -1;
        for (; rows - k > kTriangle; k += kRows) {
            std::int64_t l = k + width_of(rows - k, kWide);
            with_width<kRows, kWide>(l - k, [&](auto width) __attribute__((always_inline)) {
                add<LANES, kRows, width() - kRows, true>(k, k + kRows);
            });
            for (std::int64_t next; l < rows; l = next) {
                next = l + width_of(rows - l, kWide);
                if (kRows == 2 && rows % 2 == 0 && next - l == 2 && narrow < 0) {
                    narrow = k;
                    continue;
                }
                with_width<1, kWide>(next - l, [&](auto width) __attribute__((always_inline)) {
                    add<LANES, kRows, width(), false>(k, l);
                });
            }
        }
        // Two rows that were to go with the last two alone do it in the tile of these.
        if constexpr (kRows == 2)
            if (narrow >= 0) return add<LANES, 2, 2, true>(k, narrow);
        with_width<1, kTriangle>(
            rows - k, [&](auto width) __attribute__((always_inline)) { add<LANES, width(), 0, true>(k, rows); });
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

    // The K rows from `first` on with the L rows from `second` on; OWN, with themselves, too, and their means.
    template <int LANES, int K, int L, bool OWN>
    __attribute__((always_inline)) inline void add(std::int64_t first, std::int64_t second) const {
        using Vectors = Simd<E, LANES>;
        using Vector = typename Vectors::Vector;
        constexpr int kOwn = OWN ? K : 0;
        const auto [x, stride, classes, weights] = block;
        const Lines ahead = next;
        const E *left = x + first * stride, *right = x + second * stride;
        const E *left_offset = offset + first, *right_offset = offset + second;
        const auto mean_of = [&](int k) __attribute__((always_inline)) -> Vector& {
            return Vectors::at(mean + (first + k) * kPanel<E>);
        };
        // Of row k of the left and row l of those that it meets, which are the left's own first.
        const auto product_of = [&](int k, int l) __attribute__((always_inline)) -> Vector& {
            const std::int64_t i = first + k, j = l < kOwn ? first + l : second + (l - kOwn);
            return Vectors::at(gram + (std::min(i, j) * rows + std::max(i, j)) * kPanel<E>);
        };
        Vector sum[K][kOwn + L], total[K];
        TRANSFEROPS_UNROLL
        for (int k = 0; k < K; ++k) {
            if (OWN) total[k] = mean_of(k);
            TRANSFEROPS_UNROLL
            for (int l = OWN ? k : 0; l < kOwn + L; ++l) sum[k][l] = product_of(k, l);
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
            for (int l = 0; l < L; ++l) {
                const Vector y = Vectors::load(right + l * stride + c) + right_offset[l];
                for (int k = 0; k < K; ++k) sum[k][kOwn + l] += weighted[k] * y;
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
            if (OWN) mean_of(k) = total[k];
            TRANSFEROPS_UNROLL
            for (int l = OWN ? k : 0; l < kOwn + L; ++l) product_of(k, l) = sum[k][l];
        }
    }
};

// sums [1 + rows][rows] += the sums of the first LANES of kPanel lanes each, for the means and the products k <= l;
// leaves zeros in the lanes. Four at a time, which may be as many as three too many: lanes and sums have room for
// these, and they are zeros or taken before their turn.
template <class E>
struct TakeLanes {
    E* lanes;
    std::int64_t rows;
    double* sums;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        for (std::int64_t j = 0; j <= rows; ++j)
            for (std::int64_t i = j * rows + std::max<std::int64_t>(j - 1, 0); i < (j + 1) * rows; i += kFour) {
                E* own = lanes + i * kPanel<E>;
                const auto a = four_of<LANES>(own), b = four_of<LANES>(own + kPanel<E>),
                           c = four_of<LANES>(own + 2 * kPanel<E>), d = four_of<LANES>(own + 3 * kPanel<E>);
                const auto ab = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
                const auto cd = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
                Simd<double, kFour>::at(sums + i) +=
                    __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
            }
    }

    static constexpr int kFour = 4, kRoom = kFour - 1;

  private:
    using Four = typename Simd<double, kFour>::Vector;

    // The lanes of a sum added up to four, if they are more; fewer have zeros beyond them.
    template <int LANES>
    __attribute__((always_inline)) static inline Four four_of(E* own) {
        using Vectors = Simd<E, std::max(LANES, kFour)>;
        const Four four = folded<std::max(LANES, kFour)>(Vectors::load(own), std::make_index_sequence<LANES / 2>{});
        Vectors::at(own) = typename Vectors::Vector{};
        return four;
    }

    template <int LANES, std::size_t... I>
    __attribute__((always_inline)) static inline Four folded(const typename Simd<E, LANES>::Vector& x,
                                                             std::index_sequence<I...>) {
        if constexpr (LANES == kFour)
            return __builtin_convertvector(x, Four);
        else
            return folded<LANES / 2>(
                __builtin_shufflevector(x, x, I...) + __builtin_shufflevector(x, x, (I + sizeof...(I))...),
                std::make_index_sequence<sizeof...(I) / 2>{});
    }
};

// gram [rows][rows] += (products - sums sums^T / mass) / mass, with sums [rows] and products [rows][rows], of both of
// which k <= l counts.
struct AddCovariance {
    const double *sums, *products;
    double mass;
    std::int64_t rows;
    double* gram;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        using Vectors = Simd<double, LANES>;
        const double scale = 1 / mass;
        for (std::int64_t k = 0; k < rows; ++k) {
            const double mean = sums[k] * scale, *own = products + k * rows;
            double* out = gram + k * rows;
            std::int64_t l = 0;
            for (; l + LANES <= rows; l += LANES)
                Vectors::at(out + l) += (Vectors::load(own + l) - mean * Vectors::load(sums + l)) * scale;
            for (; l < rows; ++l) out[l] += (own[l] - mean * sums[l]) * scale;
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
          lanes_(zeros<E>(((1 + x.directions) * x.directions + TakeLanes<E>::kRoom) * kPanel<E>)),
          sums_(static_cast<std::size_t>((1 + x.directions) * x.directions + TakeLanes<E>::kRoom)) {}

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
        run<double>(AddCovariance{sums_.data(), sums_.data() + directions, mass_, directions, gram});
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
