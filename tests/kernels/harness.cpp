// Runs the kernels of csrc/kernels/cuda in the emulation, one request after the other: a header and arrays on standard
// input, the results on standard output; emulator.py is the other side. Every buffer is an allocation of exactly its
// size, so that AddressSanitizer sees an access beyond any of them; all memory that is not input is filled with NaN.

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "centring.h"
#include "moments.h"

namespace {

using namespace transferops;

struct Request {
    std::int64_t function, type, order, seed;
    std::int64_t sets, rows, columns, set_stride, row_stride, displacement;
    std::int64_t classes, multiprocessors, has_shift;
};

void read_exactly(void* target, std::size_t bytes) {
    if (std::fread(target, 1, bytes, stdin) != bytes) std::exit(0);  // the other side has closed the pipe
}

template <class T>
class Buffer {
  public:
    explicit Buffer(std::int64_t count) : bytes_(count * sizeof(T)) {
        if (sparse()) {
            memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory_ == MAP_FAILED) std::exit(72);
        } else {
            memory_ = std::malloc(bytes_);
            std::memset(memory_, 0xff, bytes_);  // NaN in every type
        }
    }
    ~Buffer() {
        if (sparse())
            munmap(memory_, bytes_);
        else
            std::free(memory_);
    }
    Buffer(const Buffer&) = delete;

    T* get() const { return static_cast<T*>(memory_); }
    const Buffer& read() const { return read_exactly(memory_, bytes_), *this; }
    void write() const { std::fwrite(memory_, 1, bytes_, stdout); }

  private:
    bool sparse() const { return bytes_ > std::size_t{1} << 30; }  // for strides beyond 2^31: only pages in use exist

    std::size_t bytes_;
    void* memory_;
};

using Doubles = Buffer<double>;

void write_header(cudaError_t status, std::int64_t workspace) {
    const std::int64_t header[2] = {status, workspace};
    std::fwrite(header, sizeof header, 1, stdout);
}

template <class T>
void answer(const Request& r) {
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
        default: {  // class sums about the column means, as the torch operators compute them
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
    }
}

}  // namespace

int main() {
    for (Request request;;) {
        read_exactly(&request, sizeof request);
        emulation::order = static_cast<emulation::Order>(request.order);
        emulation::seed = static_cast<std::uint64_t>(request.seed);
        switch (request.type) {
#ifndef FLOAT_ONLY  // a mutant is compiled for one type
            case 1:
                answer<double>(request);
                break;
            case 2:
                answer<float16>(request);
                break;
            case 3:
                answer<bfloat16>(request);
                break;
#endif
            default:
                answer<float>(request);
        }
        std::fflush(stdout);
    }
}
