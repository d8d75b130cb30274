// The harness of the Fisher family of a layer.

#include "fisher.h"
#include "fisher_ways.h"
#include "harness.h"

namespace {

using namespace harness;
using namespace transferops;

struct Layout {
    std::int64_t displacement, sample_stride;
    cuda::Extent stride;
};

struct Request {
    std::int64_t function, type, order, seed;
    std::int64_t samples, in_channels, out_channels;
    cuda::Extent in_size, out_size;
    Layout in, out;
    cuda::Window window;
    std::int64_t count, multiprocessors;
};

// A signal in memory of exactly its extent, its elements read from the other side.
template <class T>
struct StoredSignal {
    Buffer<T> memory;
    cuda::Signal<T> signal;

    StoredSignal(std::int64_t samples, std::int64_t channels, const cuda::Extent& size, const Layout& layout)
        : memory(layout.displacement + extent(samples, channels, size, layout)),
          signal{memory.get() + layout.displacement, samples, channels, size, layout.sample_stride, layout.stride} {
        T* const data = memory.get() + layout.displacement;
        for (std::int64_t n = 0; n < samples; ++n)
            for (std::int64_t d = 0; d < size.depth; ++d)
                for (std::int64_t h = 0; h < size.height; ++h)
                    for (std::int64_t w = 0; w < size.width; ++w)
                        read_exactly(data + n * layout.sample_stride + d * layout.stride.depth +
                                         h * layout.stride.height + w * layout.stride.width,
                                     channels * sizeof(T));
    }

    static std::int64_t extent(std::int64_t samples, std::int64_t channels, const cuda::Extent& size,
                               const Layout& layout) {
        if (samples * channels * size.volume() == 0) return 0;
        return (samples - 1) * layout.sample_stride + (size.depth - 1) * layout.stride.depth +
               (size.height - 1) * layout.stride.height + (size.width - 1) * layout.stride.width + channels;
    }
};

template <class T>
void answer(const Request& r, T*) {
    using C = Compute<T>;
    const StoredSignal<T> inputs(r.samples, r.in_channels, r.in_size, r.in);
    const StoredSignal<T> grad_outputs(r.samples, r.out_channels, r.out_size, r.out);
    const cuda::LayerBatch<T> layer{inputs.signal, grad_outputs.signal, r.window};
    const std::int64_t weights = r.out_channels * (r.in_channels / r.window.groups) * r.window.kernel.volume();
    const int multiprocessors = static_cast<int>(r.multiprocessors);
    const bool projects = r.function == 1 || r.function == 5 || r.function == 6 || r.function == 9;
    Buffer<C> directions(projects ? r.count * weights : 0);
    directions.read();
    // run(workspace, output) of a function that needs so many doubles.
    const auto give = [&](std::int64_t needed, std::int64_t size, const auto& run) {
        const Doubles workspace(needed);
        const Buffer<C> out(size);
        write_header(run(workspace.get(), out.get()), needed);
        out.write();
    };
    switch (r.function) {
        case 0:
            return give(cuda::fisher_diagonal_workspace(layer, multiprocessors), weights, [&](double* space, C* out) {
                return cuda::fisher_diagonal(layer, out, space, multiprocessors, nullptr);
            });
        case 1:
            return give(cuda::fisher_projection_workspace(layer, r.count, multiprocessors), r.samples * r.count,
                        [&](double* space, C* out) {
                            return cuda::fisher_projection(layer, directions.get(), r.count, out, space,
                                                           multiprocessors, nullptr);
                        });
        case 2:
            return give(cuda::grad_norm_workspace(layer, multiprocessors), r.samples, [&](double* space, C* out) {
                return cuda::grad_norm(layer, out, space, multiprocessors, nullptr);
            });
        case 3:
            return give(cuda::tile_norm_workspace(layer, multiprocessors), r.samples, [&](double* space, C* out) {
                return cuda::tile_norm(layer, out, space, multiprocessors, nullptr);
            });
        case 4:
            return give(cuda::ghost_norm_workspace(layer), r.samples,
                        [&](double* space, C* out) { return cuda::ghost_norm(layer, out, space, nullptr); });
        case 5:
            return give(cuda::tile_projection_workspace(layer, r.count, multiprocessors), r.samples * r.count,
                        [&](double* space, C* out) {
                            return cuda::tile_projection(layer, directions.get(), r.count, out, space, multiprocessors,
                                                         nullptr);
                        });
        case 7:
            return give(cuda::tile_diagonal_workspace(layer, multiprocessors), weights, [&](double* space, C* out) {
                return cuda::tile_diagonal(layer, out, space, multiprocessors, nullptr);
            });
        case 8:
            return give(cuda::wide_diagonal_workspace(layer, multiprocessors), weights, [&](double* space, C* out) {
                return cuda::wide_diagonal(layer, out, space, multiprocessors, nullptr);
            });
        case 9:
            return give(cuda::wide_projection_workspace(layer, r.count, multiprocessors), r.samples * r.count,
                        [&](double* space, C* out) {
                            return cuda::wide_projection(layer, directions.get(), r.count, out, space, multiprocessors,
                                                         nullptr);
                        });
        default:
            return give(cuda::contraction_workspace(layer, r.count), r.samples * r.count, [&](double* space, C* out) {
                return cuda::contraction(layer, directions.get(), r.count, out, space, nullptr);
            });
    }
}

}  // namespace

int main() {
    harness::serve<Request>([](const Request& request, auto* type) { answer(request, type); });
}
