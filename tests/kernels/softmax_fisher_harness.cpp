// The harness of the Fisher information of a softmax.

#include "harness.h"
#include "softmax_fisher.h"

namespace {

using namespace harness;
using namespace transferops;

struct Request {
    std::int64_t type, order, seed;
    std::int64_t directions, samples, classes;
    std::int64_t logits_stride, direction_stride, sample_stride, displacement;
    std::int64_t multiprocessors;
};

template <class T>
void answer(const Request& r, T*) {
    const std::int64_t rows = r.classes ? r.samples : 0, sheets = rows ? r.directions : 0;
    const Buffer<T> logits(rows ? r.displacement + (rows - 1) * r.logits_stride + r.classes : 0);
    const Buffer<T> tangents(
        sheets ? r.displacement + (sheets - 1) * r.direction_stride + (rows - 1) * r.sample_stride + r.classes : 0);
    const cuda::TangentBatch<T> batch{logits.get() + r.displacement,
                                      r.logits_stride,
                                      tangents.get() + r.displacement,
                                      r.directions,
                                      r.samples,
                                      r.classes,
                                      r.direction_stride,
                                      r.sample_stride};
    for (std::int64_t n = 0; n < rows; ++n)
        read_exactly(const_cast<T*>(batch.logits) + n * r.logits_stride, r.classes * sizeof(T));
    for (std::int64_t k = 0; k < sheets; ++k)
        for (std::int64_t n = 0; n < rows; ++n)
            read_exactly(const_cast<T*>(batch.tangents) + k * r.direction_stride + n * r.sample_stride,
                         r.classes * sizeof(T));
    const int multiprocessors = static_cast<int>(r.multiprocessors);
    const std::int64_t needed = cuda::softmax_fisher_gram_workspace(batch, multiprocessors);
    const Doubles workspace(needed), gram(r.directions * r.directions);
    write_header(cuda::softmax_fisher_gram(batch, gram.get(), workspace.get(), multiprocessors, nullptr), needed);
    gram.write();
}

}  // namespace

int main() {
    harness::serve<Request>([](const Request& request, auto* type) { answer(request, type); });
}
