// Every parallel CPU kernel with its tasks on threads of their own, for ThreadSanitizer (scripts/sanitize_threads.sh).
//
// The kernels are given std::thread in place of torch's pool: OpenMP's synchronisation is invisible to
// ThreadSanitizer, which would report each of its barriers. Besides, every result must be that of one thread, bit by
// bit.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/kernels/cpu/fisher.h"
#include "../../csrc/kernels/cpu/gradients.h"
#include "../../csrc/kernels/cpu/moments.h"
#include "../../csrc/kernels/cpu/prediction.h"

namespace {

using namespace transferops::cpu;
using transferops::Compute;

// Neighbouring tasks on different threads, with nothing between them but the start and the end. A shared counter of
// tasks would order them, and a thread that started early could take them all: either hides a race.
void threaded_for(std::int64_t count, const std::function<void(std::int64_t)>& body) {
    const std::int64_t most = std::min<std::int64_t>(count, 16);
    std::vector<std::thread> threads;
    for (std::int64_t t = 0; t < most; ++t)
        threads.emplace_back([&, t] {
            for (std::int64_t i = t; i < count; i += most) body(i);
        });
    for (auto& thread : threads) thread.join();
}

int failures = 0;

// Runs call(outputs, parallel_for) serially and with threads.
template <class Call>
void check(const char* name, std::size_t bytes, const Call& call) {
    std::vector<unsigned char> alone(bytes + 64), together(bytes + 64);
    call(alone.data(), serial_for);
    call(together.data(), threaded_for);
    const bool same = std::memcmp(alone.data(), together.data(), bytes) == 0;
    std::printf("%-32s %s\n", name, same ? "same bits" : "DIFFERENT");
    failures += !same;
}

template <class T>
std::vector<T> numbers(std::size_t count) {
    std::vector<T> x(count);
    unsigned state = 1;
    for (auto& value : x) {
        state = state * 1664525u + 1013904223u;
        value = static_cast<T>(static_cast<float>(state >> 8) / (1 << 23) - 1.0f);
    }
    return x;
}

template <class T>
void moments(std::int64_t rows, std::int64_t columns) {
    const auto x = numbers<T>(static_cast<std::size_t>(rows * columns));
    const MatrixView<T> view{x.data(), rows, columns, columns, 1};
    std::vector<std::int64_t> labels(static_cast<std::size_t>(rows));
    for (std::int64_t n = 0; n < rows; ++n) labels[static_cast<std::size_t>(n)] = n * 7 % 5;
    const auto d = static_cast<std::size_t>(columns), n = static_cast<std::size_t>(rows);
    check("class_moments", 8 * (5 + 5 * d + d * d + d), [&](void* out, const ParallelFor& parallel_for) {
        auto* sums = static_cast<double*>(out) + 5;
        class_moments(view, labels.data(), 5, static_cast<std::int64_t*>(out), sums, sums + 5 * d, sums + 5 * d + d * d,
                      parallel_for);
    });
    check("sample_gram", 8 * (n * n + d), [&](void* out, const ParallelFor& parallel_for) {
        auto* gram = static_cast<double*>(out);
        sample_gram(view, gram, gram + n * n, parallel_for);
    });
    const auto shift = numbers<double>(d);
    check("norm_moments", 8 * (d + 1), [&](void* out, const ParallelFor& parallel_for) {
        auto* cubic = static_cast<double*>(out);
        norm_moments(view, shift.data(), cubic, cubic + d, parallel_for);
    });
    check("empirical_prediction", 8 * (3 * n + d), [&](void* out, const ParallelFor& parallel_for) {
        auto* prediction = static_cast<double*>(out);
        empirical_prediction(view, labels.data(), 5, prediction, prediction + n, prediction + n + d,
                             prediction + 2 * n + d, parallel_for);
    });
}

// [samples, channels, height, width] contiguous.
template <class T>
SignalView<T> image(const std::vector<T>& x, std::int64_t samples, std::int64_t channels, std::int64_t height,
                    std::int64_t width) {
    return {x.data(), samples, channels, {1, height, width}, channels * height * width, height * width, {0, width, 1}};
}

template <class T>
void layer(std::int64_t samples, std::int64_t in, std::int64_t out_channels, std::int64_t size, std::int64_t kernel,
           std::int64_t groups) {
    const std::int64_t out_size = size + 1 - kernel + 2 * (kernel / 2);
    const auto a = numbers<T>(static_cast<std::size_t>(samples * in * size * size));
    const auto b = numbers<T>(static_cast<std::size_t>(samples * out_channels * out_size * out_size));
    Window window;
    window.kernel = {1, kernel, kernel};
    window.padding = {0, kernel / 2, kernel / 2};
    window.groups = groups;
    const LayerBatch<T> batch{image(a, samples, in, size, size), image(b, samples, out_channels, out_size, out_size),
                              window};
    const auto weights = static_cast<std::size_t>(out_channels * in / groups * kernel * kernel);
    const auto directions = numbers<Compute<T>>(3 * weights);
    const std::size_t element = sizeof(Compute<T>), n = static_cast<std::size_t>(samples);
    check("fisher_diagonal", element * weights, [&](void* out, const ParallelFor& parallel_for) {
        fisher_diagonal(batch, static_cast<Compute<T>*>(out), parallel_for);
    });
    check("fisher_projection", element * n * 3, [&](void* out, const ParallelFor& parallel_for) {
        const std::vector<const Compute<T>*> moves{directions.data(), directions.data() + weights,
                                                   directions.data() + 2 * weights};
        fisher_projection(batch, Directions<Compute<T>>(moves), static_cast<Compute<T>*>(out), parallel_for);
    });
    check("grad_norm", element * n, [&](void* out, const ParallelFor& parallel_for) {
        grad_norm(batch, static_cast<Compute<T>*>(out), parallel_for);
    });
}

template <class T>
void softmax(std::int64_t directions, std::int64_t samples, std::int64_t classes) {
    const auto z = numbers<T>(static_cast<std::size_t>(samples * classes));
    const auto t = numbers<T>(static_cast<std::size_t>(directions * samples * classes));
    const TangentView<T> view{t.data(), directions, samples, classes, samples * classes, classes, 1};
    check("softmax_fisher_gram", 8 * static_cast<std::size_t>(directions * directions),
          [&](void* out, const ParallelFor& parallel_for) {
              softmax_fisher_gram(z.data(), classes, 1, view, static_cast<double*>(out), parallel_for);
          });
}

template <class T>
void gradients(std::int64_t lists, std::int64_t size) {
    const auto x = numbers<T>(static_cast<std::size_t>(lists * size));
    const auto length = static_cast<std::size_t>(size);
    check("gradient_expectation", 8 * length, [&](void* out, const ParallelFor& parallel_for) {
        auto* mean = static_cast<float*>(out);
        const std::vector<RunningMoments<T, float>> tensors{{x.data(), size, size, mean, mean + size}};
        gradient_expectation(tensors, lists, 0, parallel_for);
    });
    const std::size_t pairs = static_cast<std::size_t>(lists * lists);
    check("gradient_expectation_gram", 8 * pairs + 4 * length * static_cast<std::size_t>(lists),
          [&](void* out, const ParallelFor& parallel_for) {
              auto* gram = static_cast<double*>(out);
              auto* means = reinterpret_cast<float*>(gram + pairs);
              std::vector<RunningMoments<T, float>> tensors;
              for (std::int64_t k = 0; k < lists; ++k)
                  tensors.push_back({x.data() + k * size, size, size, means + k * size, nullptr});
              const std::vector<std::int64_t> counts(static_cast<std::size_t>(lists), 0);
              gradient_expectation_gram(tensors, lists, 1, counts, gram, parallel_for);
          });
    const auto weights = numbers<Compute<T>>(length);
    std::vector<const T*> rows;
    for (std::int64_t k = 0; k < lists; ++k) rows.push_back(x.data() + k * size);
    check("weighted_gram", 8 * pairs, [&](void* out, const ParallelFor& parallel_for) {
        const std::vector<GramSegment<T>> segments{{rows.data(), size, x.data(), weights.data()}};
        weighted_gram(segments, lists, static_cast<double*>(out), parallel_for);
    });
    const auto moves = numbers<Compute<T>>(3 * length);
    const std::size_t diagonal = length * sizeof(Compute<T>), samples = static_cast<std::size_t>(lists);
    check("gradient_fisher_gram", 8 * 9 + 8 * samples + diagonal, [&](void* out, const ParallelFor& parallel_for) {
        auto* gram = static_cast<double*>(out);
        gradient_fisher_gram(MatrixView<T>{x.data(), lists, size, size, 1}, moves.data(), 3, gram,
                             reinterpret_cast<Compute<T>*>(gram + 9 + samples), gram + 9, parallel_for);
    });
}

}  // namespace

int main() {
    moments<float>(700, 130);
    moments<double>(90, 300);
    moments<float>(2500, 9);            // enough rows for slices of them
    layer<float>(6, 5, 9, 7, 3, 1);     // tiles over positions
    layer<float>(40, 33, 40, 1, 1, 1);  // one position
    layer<double>(5, 8, 8, 6, 3, 8);    // many small groups
    layer<float>(3, 20, 30, 24, 1, 1);  // more than 512 positions
    softmax<float>(4, 300, 17);
    softmax<double>(3, 40, 3000);
    gradients<float>(5, 70000);
    gradients<double>(9, 5000);
    return failures > 0;
}
