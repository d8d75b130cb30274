#include "prediction.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "tile.h"

namespace transferops::cpu {
namespace {

constexpr std::int64_t kBagRows = 512;  // rows of one class that a task adds up
constexpr std::int64_t kStrip = 1024;   // columns at a time, whose sums stay in L1
constexpr std::int64_t kStep = 16;  // elements at a time, in sums of their own, which hide the latency of an addition
constexpr std::int64_t kAhead = 2;  // rows between asking for one and reading it

template <class T, int LANES>
__attribute__((always_inline)) inline typename Simd<double, LANES>::Vector load(const T* source) {
    if constexpr (std::is_same_v<T, double>) {
        return Simd<double, LANES>::load(source);
    } else if constexpr (std::is_same_v<T, float>) {
        return __builtin_convertvector(Simd<float, LANES>::load(source), typename Simd<double, LANES>::Vector);
    } else {
        typename Simd<float, LANES>::Vector narrow;
        for (int l = 0; l < LANES; ++l) narrow[l] = to_float(source[l]);
        return __builtin_convertvector(narrow, typename Simd<double, LANES>::Vector);
    }
}

// Rows order[begin .. end), all of one class.
struct Bag {
    std::int64_t label, begin, end;
};

// Rows by class, and the bags that they make, class by class.
struct Bags {
    std::vector<std::int64_t> order;
    std::vector<Bag> bags;

    Bags(const std::int64_t* labels, std::int64_t rows, std::int64_t classes) : order(rows) {
        std::vector<std::int64_t> next(static_cast<std::size_t>(classes + 1), 0);
        for (std::int64_t n = 0; n < rows; ++n) ++next[labels[n] + 1];
        for (std::int64_t c = 0; c < classes; ++c) {
            next[c + 1] += next[c];
            for (std::int64_t begin = next[c]; begin < next[c + 1]; begin += kBagRows)
                bags.push_back({c, begin, std::min(begin + kBagRows, next[c + 1])});
        }
        for (std::int64_t n = 0; n < rows; ++n) order[next[labels[n]]++] = n;
    }
};

// The row that the bag takes kAhead rows later. Rows of a class lie apart, which hides them from the hardware's own
// prefetching, so they are asked for.
template <class T>
const T* row_ahead(const MatrixView<T>& x, const Bag& bag, const std::int64_t* order, std::int64_t place) {
    return x.data + order[std::min(place + kAhead, bag.end - 1)] * x.row_stride;
}

template <class T>
__attribute__((always_inline)) inline void prefetch_step(const T* source) {
    for (std::int64_t i = 0; i < kStep; i += 64 / sizeof(T)) __builtin_prefetch(source + i);
}

// sums [columns] = the sum of the bag's rows, and the rows' own sums and smallest elements.
template <class T>
struct SumBag {
    const MatrixView<T>& x;
    const Bag& bag;
    const std::int64_t* order;
    double *sums, *totals, *lowest;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        using Vectors = Simd<double, LANES>;
        constexpr int kVectors = kStep / LANES;
        std::fill_n(sums, x.columns, 0.0);
        for (std::int64_t first = 0; first < x.columns; first += kStrip) {
            const std::int64_t size = std::min(kStrip, x.columns - first);
            for (std::int64_t place = bag.begin; place < bag.end; ++place) {
                const std::int64_t n = order[place];
                const T *row = x.data + n * x.row_stride + first, *ahead = row_ahead(x, bag, order, place) + first;
                double* const sum = sums + first;
                typename Vectors::Vector total[kVectors] = {}, low[kVectors];
                for (auto& lanes : low) lanes = total[0] + lowest[n];
                std::int64_t i = 0;
                for (; i + kStep <= size; i += kStep) {
                    prefetch_step(ahead + i);
                    for (int v = 0; v < kVectors; ++v) {
                        const auto value = load<T, LANES>(row + i + v * LANES);
                        Vectors::at(sum + i + v * LANES) += value;
                        total[v] += value;
                        low[v] = value < low[v] ? value : low[v];
                    }
                }
                double whole = 0, least = lowest[n];
                for (const auto& lanes : total) whole += sum_of_lanes<double, LANES>(lanes);
                for (const auto& lanes : low)
                    for (int l = 0; l < LANES; ++l) least = std::min(least, lanes[l]);
                for (; i < size; ++i) {
                    const double value = to_double(row[i]);
                    sum[i] += value;
                    whole += value;
                    least = std::min(least, value);
                }
                totals[n] += whole;
                lowest[n] = least;
            }
        }
    }
};

// prediction[n] = <weights, row n> for the bag's rows.
template <class T>
struct PredictBag {
    const MatrixView<T>& x;
    const Bag& bag;
    const std::int64_t* order;
    const double* weights;
    double* prediction;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        using Vectors = Simd<double, LANES>;
        constexpr int kVectors = kStep / LANES;
        for (std::int64_t place = bag.begin; place < bag.end; ++place) {
            const std::int64_t n = order[place];
            const T *row = x.data + n * x.row_stride, *ahead = row_ahead(x, bag, order, place);
            typename Vectors::Vector sum[kVectors] = {};
            std::int64_t i = 0;
            for (; i + kStep <= x.columns; i += kStep) {
                prefetch_step(ahead + i);
                for (int v = 0; v < kVectors; ++v)
                    sum[v] += load<T, LANES>(row + i + v * LANES) * Vectors::load(weights + i + v * LANES);
            }
            double whole = 0;
            for (const auto& lanes : sum) whole += sum_of_lanes<double, LANES>(lanes);
            for (; i < x.columns; ++i) whole += to_double(row[i]) * weights[i];
            prediction[n] = whole;
        }
    }
};

// Adds up the bags of each class in its first one, and those to the mass, for columns begin .. end.
void join_bags(const std::vector<Bag>& bags, std::int64_t columns, std::int64_t begin, std::int64_t end, double* sums,
               double* mass) {
    std::fill(mass + begin, mass + end, 0.0);
    std::size_t first = 0;
    for (std::size_t b = 0; b < bags.size(); ++b) {
        if (bags[b].label != bags[first].label) first = b;
        const double* own = sums + static_cast<std::int64_t>(b) * columns;
        double* whole = sums + static_cast<std::int64_t>(first) * columns;
        for (std::int64_t z = begin; z < end; ++z) {
            mass[z] += own[z];
            if (b != first) whole[z] += own[z];
        }
    }
}

}  // namespace

template <class T>
void empirical_prediction(const MatrixView<T>& x, const std::int64_t* labels, std::int64_t classes, double* prediction,
                          double* mass, double* totals, double* lowest, const ParallelFor& parallel_for) {
    const Bags rows(labels, x.rows, classes);
    const auto count = static_cast<std::int64_t>(rows.bags.size());
    const auto sums = aligned_buffer<double>(count * x.columns);
    std::fill_n(totals, x.rows, 0.0);
    std::fill_n(lowest, x.rows, std::numeric_limits<double>::infinity());
    parallel_for(count, [&](std::int64_t b) {
        run<double>(SumBag<T>{x, rows.bags[b], rows.order.data(), sums.get() + b * x.columns, totals, lowest});
    });
    parallel_for(ceil_div(x.columns, kStrip), [&](std::int64_t strip) {
        const std::int64_t begin = strip * kStrip;
        join_bags(rows.bags, x.columns, begin, std::min(begin + kStrip, x.columns), sums.get(), mass);
    });
    std::vector<std::int64_t> firsts;  // the first bag of each bag's class
    for (std::int64_t b = 0; b < count; ++b)
        firsts.push_back(b > 0 && rows.bags[b].label == rows.bags[b - 1].label ? firsts.back() : b);
    parallel_for(count, [&](std::int64_t task) {
        const std::int64_t b = count - 1 - task;  // the rows read last are still in the cache
        const double* joint = sums.get() + firsts[b] * x.columns;
        const auto weights = aligned_buffer<double>(x.columns);
        for (std::int64_t z = 0; z < x.columns; ++z) weights[z] = mass[z] > 0 ? joint[z] / mass[z] : 0.0;
        run<double>(PredictBag<T>{x, rows.bags[b], rows.order.data(), weights.get(), prediction});
    });
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                                \
    template void empirical_prediction(const MatrixView<T>&, const std::int64_t*, std::int64_t, double*, double*, \
                                       double*, double*, const ParallelFor&);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cpu
