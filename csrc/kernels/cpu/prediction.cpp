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
constexpr std::int64_t kChains = 2;     // independent sums, which hide the latency of an addition
constexpr std::int64_t kStep = kChains * kEight;
constexpr std::int64_t kAhead = 2;  // rows between asking for one and reading it

typedef float EightFloats __attribute__((vector_size(32), aligned(4), may_alias));

template <class T>
__attribute__((always_inline)) inline void load(const T* source, EightDoubles& lanes) {
    if constexpr (std::is_same_v<T, double>) {
        lanes = *reinterpret_cast<const EightDoubles*>(source);
    } else {
        EightFloats narrow;
        if constexpr (std::is_same_v<T, float>)
            narrow = *reinterpret_cast<const EightFloats*>(source);
        else
            for (std::int64_t k = 0; k < kEight; ++k) narrow[k] = to_float(source[k]);
        lanes = __builtin_convertvector(narrow, EightDoubles);
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
TRANSFEROPS_CLONES void sum_bag(const MatrixView<T>& x, const Bag& bag, const std::int64_t* order, double* sums,
                                double* totals, double* lowest) {
    std::fill_n(sums, x.columns, 0.0);
    for (std::int64_t first = 0; first < x.columns; first += kStrip) {
        const std::int64_t size = std::min(kStrip, x.columns - first);
        for (std::int64_t place = bag.begin; place < bag.end; ++place) {
            const std::int64_t n = order[place];
            const T* row = x.data + n * x.row_stride + first;
            double* const sum = sums + first;
            EightDoubles total[kChains] = {}, low[kChains];
            for (EightDoubles& lanes : low) lanes = EightDoubles{} + lowest[n];
            const T* ahead = row_ahead(x, bag, order, place);
            std::int64_t i = 0;
            for (; i + kStep <= size; i += kStep) {
                prefetch_step(ahead + first + i);
                for (std::int64_t c = 0; c < kChains; ++c) {
                    EightDoubles value;
                    load(row + i + c * kEight, value);
                    *reinterpret_cast<EightDoubles*>(sum + i + c * kEight) += value;
                    total[c] += value;
                    low[c] = value < low[c] ? value : low[c];
                }
            }
            for (; i < size; ++i) {
                const double value = to_double(row[i]);
                sum[i] += value;
                total[0][0] += value;
                low[0][0] = std::min(low[0][0], value);
            }
            totals[n] += sum_of(total[0] + total[1]);
            for (std::int64_t k = 0; k < kEight; ++k) lowest[n] = std::min({lowest[n], low[0][k], low[1][k]});
        }
    }
}

// prediction[n] = <weights, row n> for the bag's rows.
template <class T>
TRANSFEROPS_CLONES void predict_bag(const MatrixView<T>& x, const Bag& bag, const std::int64_t* order,
                                    const double* weights, double* prediction) {
    for (std::int64_t place = bag.begin; place < bag.end; ++place) {
        const std::int64_t n = order[place];
        const T* row = x.data + n * x.row_stride;
        const T* ahead = row_ahead(x, bag, order, place);
        EightDoubles sum[kChains] = {};
        std::int64_t i = 0;
        for (; i + kStep <= x.columns; i += kStep) {
            prefetch_step(ahead + i);
            for (std::int64_t c = 0; c < kChains; ++c) {
                EightDoubles value;
                load(row + i + c * kEight, value);
                sum[c] += value * *reinterpret_cast<const EightDoubles*>(weights + i + c * kEight);
            }
        }
        for (; i < x.columns; ++i) sum[0][0] += to_double(row[i]) * weights[i];
        prediction[n] = sum_of(sum[0] + sum[1]);
    }
}

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
        sum_bag(x, rows.bags[b], rows.order.data(), sums.get() + b * x.columns, totals, lowest);
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
        predict_bag(x, rows.bags[b], rows.order.data(), weights.get(), prediction);
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
