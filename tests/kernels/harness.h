// What the harnesses share: each runs the kernels of one family in the emulation, one request after the other. A
// request is a header and arrays on standard input, the answer a status, the size of the workspace and the results on
// standard output; emulator.py is the other side. Every buffer is an allocation of exactly its size, so that
// AddressSanitizer sees an access beyond any of them; all memory that is not input is filled with NaN.
#pragma once

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device.h"

namespace harness {

inline void read_exactly(void* target, std::size_t bytes) {
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

inline void write_header(cudaError_t status, std::int64_t workspace) {
    const std::int64_t header[2] = {status, workspace};
    std::fwrite(header, sizeof header, 1, stdout);
}

// Reads requests, each a struct of 64-bit integers with at least `type`, `order` and `seed`, until the other side
// closes the pipe, and calls answer(request, null pointer of the element type).
template <class Request, class Answer>
void serve(const Answer& answer) {
    using namespace transferops;
    for (Request request;;) {
        read_exactly(&request, sizeof request);
        emulation::order = static_cast<emulation::Order>(request.order);
        emulation::seed = static_cast<std::uint64_t>(request.seed);
#ifdef ONLY_TYPE  // of a mutant
        answer(request, static_cast<ONLY_TYPE*>(nullptr));
#else
        switch (request.type) {
            case 1:
                answer(request, static_cast<double*>(nullptr));
                break;
            case 2:
                answer(request, static_cast<float16*>(nullptr));
                break;
            case 3:
                answer(request, static_cast<bfloat16*>(nullptr));
                break;
            default:
                answer(request, static_cast<float*>(nullptr));
        }
#endif
        std::fflush(stdout);
    }
}

}  // namespace harness
