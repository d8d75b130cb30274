// The harness of the moments family.

#include "centring.h"
#include "harness.h"
#include "moments.h"

namespace {

using namespace harness;
using namespace transferops;

struct Request {
    std::int64_t function, type, order, seed;
    std::int64_t sets, rows, columns, set_stride, row_stride, displacement;
    std::int64_t classes, multiprocessors, has_shift;
};

template <class T>
void answer(const Request& r, T*) {
    const bool empty = r.sets == 0 || r.rows == 0 || r.columns == 0;
    const std::int64_t extent = (r.sets - 1) * r.set_stride + (r.rows - 1) * r.row_stride + r.columns;
    const Buffer<T> memory(r.displacement + (empty ? 0 : extent));
    T* data = memory.get() + r.displacement;
    for (std::int64_t row = 0; row < (empty ? 0 : r.sets * r.rows); ++row)
        read_exactly(data + row / r.rows * r.set_stride + row % r.rows * r.row_stride, r.columns * sizeof(T));
    const Doubles shift_memory(r.has_shift ? r.sets * r.columns : 0);
    const double* shift = r.has_shift ? shift_memory.read().get() : nullptr;
    const cuda::FeatureSets<T> x{data, r.sets, r.rows, r.columns, r.set_stride, r.row_stride};
    const int multiprocessors = static_cast<int>(r.multiprocessors);

    switch (r.function) {
        case 0: {
            const Buffer<std::int64_t> order(r.rows), offsets(r.classes + 1);
            order.read();
            offsets.read();
            const std::int64_t needed = cuda::class_sums_workspace(r.sets, r.rows, r.columns);
            const Doubles workspace(needed), sums(r.sets * r.classes * r.columns);
            write_header(
                cuda::class_sums(x, order.get(), offsets.get(), r.classes, shift, sums.get(), workspace.get(), nullptr),
                needed);
            return sums.write();
        }
        case 1: {
            const std::int64_t needed = cuda::gram_workspace(r.sets, r.rows, r.columns, multiprocessors);
            const Doubles workspace(needed), gram(r.sets * r.columns * r.columns);
            write_header(cuda::gram(x, shift, gram.get(), workspace.get(), multiprocessors, nullptr), needed);
            return gram.write();
        }
        case 2: {
            const std::int64_t needed = cuda::sample_gram_workspace(r.sets, r.rows, r.columns, multiprocessors);
            const Doubles workspace(needed), gram(r.sets * r.rows * r.rows);
            write_header(cuda::sample_gram(x, shift, gram.get(), workspace.get(), multiprocessors, nullptr), needed);
            return gram.write();
        }
        case 3: {
            const std::int64_t needed = cuda::norm_moments_workspace(r.sets, r.rows, r.columns);
            const Doubles workspace(needed), cubic(r.sets * r.columns), quartic(r.sets);
            write_header(cuda::norm_moments(x, shift, cubic.get(), quartic.get(), workspace.get(), nullptr), needed);
            cubic.write();
            return quartic.write();
        }
        case 4: {  // class sums about the column means, as the torch operators compute them
            const Buffer<std::int64_t> order(r.rows), labels(r.rows), offsets(r.classes + 1), counts(r.classes);
            order.read();
            labels.read();
            const std::int64_t needed = cuda::class_sums_workspace(r.sets, r.rows, r.columns);
            const Doubles workspace(needed), sums(r.sets * r.classes * r.columns), means(r.sets * r.columns);
            cudaError_t status =
                cuda::class_offsets(labels.get(), r.rows, r.classes, offsets.get(), counts.get(), nullptr);
            if (status == cudaSuccess) status = cuda::first_rows(x, means.get(), nullptr);
            if (status == cudaSuccess)
                status = cuda::class_sums(x, order.get(), offsets.get(), r.classes, means.get(), sums.get(),
                                          workspace.get(), nullptr);
            if (status == cudaSuccess)
                status = cuda::recentre(counts.get(), r.sets, r.rows, r.classes, r.columns, sums.get(), means.get(),
                                        nullptr);
            write_header(status, needed);
            const Doubles sizes(r.classes);
            for (std::int64_t c = 0; c < r.classes; ++c) sizes.get()[c] = static_cast<double>(counts.get()[c]);
            sizes.write();
            sums.write();
            return means.write();
        }
        default: {
            const auto precision = static_cast<cuda::Precision>(r.function - 5);
            const std::int64_t needed = cuda::narrow_gram_workspace(x, precision, multiprocessors);
            const Doubles workspace(needed), gram(r.sets * r.columns * r.columns);
            write_header(cuda::narrow_gram(x, shift, precision, gram.get(), workspace.get(), multiprocessors, nullptr),
                         needed);
            return gram.write();
        }
    }
}

}  // namespace

int main() {
    harness::serve<Request>([](const Request& request, auto* type) { answer(request, type); });
}
