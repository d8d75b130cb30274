// The harness of the gradients family.

#include <algorithm>
#include <memory>
#include <vector>

#include "gradients.h"
#include "harness.h"

namespace {

using namespace harness;
using namespace transferops;

struct Request {
    std::int64_t function, type, order, seed;
    std::int64_t tensors;  // how many sizes follow
    std::int64_t rows;     // samples of the moments, rows of the Gram matrix, samples of the summaries
    std::int64_t count;    // gradients taken in before; directions of the summaries
    std::int64_t extra;    // whether there are squares; 1: a base, 2: weights
    std::int64_t displacement, padding, multiprocessors;
    std::int64_t lists;  // of moments
};

template <class T>
using Buffers = std::vector<std::unique_ptr<Buffer<T>>>;

// Rows of `size` elements, `padding` apart, the first `displacement` from an aligned address; read from the request.
template <class T>
T* read_rows(Buffers<T>& buffers, const Request& r, std::int64_t rows, std::int64_t size) {
    const std::int64_t stride = size + r.padding;
    buffers.push_back(std::make_unique<Buffer<T>>(rows ? r.displacement + (rows - 1) * stride + size : 0));
    T* data = buffers.back()->get() + r.displacement;
    for (std::int64_t row = 0; row < rows; ++row) read_exactly(data + row * stride, size * sizeof(T));
    return data;
}

template <class T, class S>
void answer_expectation(const Request& r, const std::int64_t* sizes) {
    Buffers<T> gradients;
    Buffers<S> moments;
    std::vector<cuda::RunningMoments<T, S>> tensors;
    for (std::int64_t t = 0; t < r.tensors; ++t) {
        const T* data = read_rows(gradients, r, r.rows, sizes[t]);
        S* state[2] = {nullptr, nullptr};
        for (int i = 0; i < 1 + r.extra; ++i) state[i] = read_rows(moments, r, 1, sizes[t]);
        tensors.push_back({data, sizes[t] + r.padding, sizes[t], state[0], state[1]});
    }
    write_header(cuda::gradient_expectation(tensors.data(), r.tensors, r.rows, r.count, nullptr), 0);
    for (const auto& x : tensors) {
        std::fwrite(x.mean, sizeof(S), x.size, stdout);
        if (r.extra) std::fwrite(x.squares, sizeof(S), x.size, stdout);
    }
}

template <class T>
void answer_gram(const Request& r, const std::int64_t* sizes) {
    Buffers<T> memory;
    Buffers<Compute<T>> weights;
    std::vector<const T*> rows;
    std::vector<cuda::GramSegment<T>> segments;
    for (std::int64_t t = 0; t < r.tensors; ++t) {
        for (std::int64_t k = 0; k < r.rows; ++k) rows.push_back(read_rows(memory, r, 1, sizes[t]));
        segments.push_back({nullptr, sizes[t], r.extra & 1 ? read_rows(memory, r, 1, sizes[t]) : nullptr,
                            r.extra & 2 ? read_rows(weights, r, 1, sizes[t]) : nullptr});
    }
    for (std::int64_t t = 0; t < r.tensors; ++t) segments[t].rows = rows.data() + t * r.rows;
    const int multiprocessors = static_cast<int>(r.multiprocessors);
    const std::int64_t needed = cuda::weighted_gram_workspace(segments.data(), r.tensors, r.rows, multiprocessors);
    const Doubles workspace(needed), gram(r.rows * r.rows);
    write_header(
        cuda::weighted_gram(segments.data(), r.tensors, r.rows, gram.get(), workspace.get(), multiprocessors, nullptr),
        needed);
    gram.write();
}

// extra: 1 for squares, and twice the number of lists beyond those that take gradients; count: of the first list, one
// less for each that follows. Per tensor and list: gradients, mean, squares; of the lists beyond the mean alone.
template <class T, class S>
void answer_expectation_gram(const Request& r, const std::int64_t* sizes) {
    Buffers<T> gradients;
    Buffers<S> moments;
    const bool squares = r.extra % 2;
    const std::int64_t lists = r.lists, updated = lists - r.extra / 2;
    std::vector<std::int64_t> counts;
    for (std::int64_t k = 0; k < updated; ++k) counts.push_back(std::max<std::int64_t>(r.count - k, 0));
    std::vector<cuda::RunningMoments<T, S>> tensors;
    for (std::int64_t t = 0; t < r.tensors; ++t)
        for (std::int64_t k = 0; k < lists; ++k) {
            cuda::RunningMoments<T, S> x{nullptr, sizes[t] + r.padding, sizes[t], nullptr, nullptr};
            if (k < updated) x.gradients = read_rows(gradients, r, r.rows, sizes[t]);
            x.mean = read_rows(moments, r, 1, sizes[t]);
            if (k < updated && squares) x.squares = read_rows(moments, r, 1, sizes[t]);
            tensors.push_back(x);
        }
    const cuda::ExpectationGram<T, S> all{tensors.data(), r.tensors, lists, updated, r.rows, counts.data()};
    const int multiprocessors = static_cast<int>(r.multiprocessors);
    const std::int64_t needed = cuda::gradient_expectation_gram_workspace(all, multiprocessors);
    const Doubles workspace(needed), gram(lists * lists);
    write_header(cuda::gradient_expectation_gram(all, gram.get(), workspace.get(), multiprocessors, nullptr), needed);
    for (const auto& x : tensors) {
        std::fwrite(x.mean, sizeof(S), x.size, stdout);
        if (x.squares) std::fwrite(x.squares, sizeof(S), x.size, stdout);
    }
    gram.write();
}

template <class T>
void answer_fisher(const Request& r, std::int64_t columns) {
    using C = Compute<T>;
    Buffers<T> memory;
    const T* gradients = read_rows(memory, r, r.rows, columns);
    const Buffer<C> directions(r.count * columns);
    directions.read();
    const cuda::SampleGradients<T> x{gradients, r.rows, columns, columns + r.padding, directions.get(), r.count};
    const int multiprocessors = static_cast<int>(r.multiprocessors);
    const std::int64_t needed = cuda::gradient_fisher_gram_workspace(x, multiprocessors);
    const Doubles workspace(needed), gram(r.count * r.count), norms(r.rows);
    const Buffer<C> diagonal(columns);
    write_header(cuda::gradient_fisher_gram(x, gram.get(), diagonal.get(), norms.get(), workspace.get(),
                                            multiprocessors, nullptr),
                 needed);
    gram.write();
    diagonal.write();
    norms.write();
}

template <class T>
void answer(const Request& r, T*) {
    const Buffer<std::int64_t> sizes(r.tensors);
    sizes.read();
    switch (r.function) {
        case 0:
            return answer_expectation<T, float>(r, sizes.get());
        case 1:
            return answer_expectation<T, double>(r, sizes.get());
        case 2:
            return answer_gram<T>(r, sizes.get());
        case 4:
            return answer_expectation_gram<T, float>(r, sizes.get());
        case 5:
            return answer_expectation_gram<T, double>(r, sizes.get());
        default:
            return answer_fisher<T>(r, sizes.get()[0]);
    }
}

}  // namespace

int main() {
    harness::serve<Request>([](const Request& request, auto* type) { answer(request, type); });
}
