// The harness of the Fisher family of a layer.

#include "fisher.h"
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
    switch (r.function) {
        case 0: {
            const std::int64_t needed = cuda::fisher_diagonal_workspace(layer, multiprocessors);
            const Doubles workspace(needed);
            const Buffer<C> out(weights);
            write_header(cuda::fisher_diagonal(layer, out.get(), workspace.get(), multiprocessors, nullptr), needed);
            return out.write();
        }
        case 1: {
            const Buffer<C> directions(r.count * weights);
            directions.read();
            const std::int64_t needed = cuda::fisher_projection_workspace(layer, r.count, multiprocessors);
            const Doubles workspace(needed);
            const Buffer<C> out(r.samples * r.count);
            write_header(cuda::fisher_projection(layer, directions.get(), r.count, out.get(), workspace.get(),
                                                 multiprocessors, nullptr),
                         needed);
            return out.write();
        }
        default: {
            const std::int64_t needed = cuda::grad_norm_workspace(layer, multiprocessors);
            const Doubles workspace(needed);
            const Buffer<C> out(r.samples);
            write_header(cuda::grad_norm(layer, out.get(), workspace.get(), multiprocessors, nullptr), needed);
            return out.write();
        }
    }
}

}  // namespace

int main() {
    harness::serve<Request>([](const Request& request, auto* type) { answer(request, type); });
}
