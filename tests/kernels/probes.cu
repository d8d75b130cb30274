// Small kernels, right and wrong, that show what the emulation reports. One is run per process: probes NAME ORDER.

#include <cstdio>
#include <cstring>
#include <vector>

#include "device.h"

namespace {

using namespace transferops::cuda;

__global__ void reverse(double* out, bool with_barrier) {
    double* shared = dynamic_shared();
    shared[threadIdx.x] = threadIdx.x;
    if (with_barrier) __syncthreads();
    out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void read_unwritten(double* out) { out[threadIdx.x] = dynamic_shared()[threadIdx.x]; }

__global__ void write_beyond_shared(double* out) {
    out[threadIdx.x] = dynamic_shared()[threadIdx.x + 1] = threadIdx.x;  // the last thread: one too far
}

__global__ void write_beyond_output(double* out) { out[threadIdx.x + 1] = 0; }

__global__ void half_at_barrier(double* out) {
    if (threadIdx.x < blockDim.x / 2) __syncthreads();
    out[threadIdx.x] = 0;
}

__global__ void two_barriers(double* out) {
    if (threadIdx.x < blockDim.x / 2)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 0;
}

__global__ void barrier_against_collective(double* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        out[threadIdx.x] = __shfl_xor_sync(kFullWarp, threadIdx.x == 63 ? (__syncthreads(), 0.0) : 0.0, 1);
}

__global__ void lane_missing(double* out) {
    if (threadIdx.x % kWarp != 7) __syncwarp();
    out[threadIdx.x] = 0;
}

__global__ void different_collectives(double* out) {
    if (threadIdx.x % 2 == 0)
        __syncwarp();
    else
        __syncwarp();
    out[threadIdx.x] = 0;
}

__global__ void partial_mask(double* out) {
    if (threadIdx.x < 16) __syncwarp(0xffffu);
    out[threadIdx.x] = 0;
}

// Sums over the warp, and what lane 5 has, as exchanged by shuffles.
__global__ void shuffles(double* out) {
    double sum = threadIdx.x;
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
    out[threadIdx.x] = sum + 1000 * __shfl_sync(kFullWarp, static_cast<double>(threadIdx.x), 5);
}

// C = A B for A[i][k] = 8 i + k and B[k][j] = k + 100 j, by the fragment layout that device.h describes.
__global__ void product(double* out) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    double a[4], b[2], c[4] = {};
    for (int j = 0; j < 2; ++j) {
        for (int h = 0; h < 2; ++h) a[2 * j + h] = 8 * (g + 8 * h) + t + 4 * j;
        b[j] = t + 4 * j + 100 * g;
    }
    mma_f64(c, a, b);
    for (int h = 0; h < 2; ++h)
        for (int e = 0; e < 2; ++e) out[(g + 8 * h) * 8 + 2 * t + e] = c[2 * h + e];
}

// C = A B for A[i][k] = i - k and B[k][j] = k + 16 j in 16 bits, from [k][i] and [k][j] in shared memory.
template <class T>
__global__ void product_16bit(double* out, T (*encode)(int)) {
    T* const left = reinterpret_cast<T*>(dynamic_shared());
    T* const right = left + 256;  // columns 8 .. 15 are those of 0 .. 7
    for (int index = threadIdx.x; index < 256; index += kWarp) {
        left[index] = encode(index % 16 - index / 16);
        right[index] = encode(index / 16 + 16 * (index % 8));
    }
    __syncwarp();
    const int lane = threadIdx.x, place = (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8;
    std::uint32_t a[4], b[4];
    load_transposed(a, left + place);
    load_transposed(b, right + place);
    float c[4] = {};
    mma_16bit<T>(c, a, {b[0], b[2]});
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

template <class T>
T encode(int value) {  // exact: of at most 8 bits
    const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, static_cast<float>(value));
    if (std::is_same_v<T, transferops::bfloat16>) return {static_cast<std::uint16_t>(bits >> 16)};
    if (value == 0) return {0};
    return {static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | (((bits >> 13) & 0x3ffffu) - (112u << 10)))};
}

// C = A B for A[i][k] = i + k and B[k][j] = k + 100 j, each with a 12th significant bit or later ones that a tf32 does
// not have; column 0 is C[i][0] = +-1 with a product added that turns it by less than a unit in the last place.
__global__ void product_tf32(double* out) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float a[4], b[2], c[4] = {};
    for (int j = 0; j < 2; ++j) {
        for (int h = 0; h < 2; ++h) a[2 * j + h] = (g + 8 * h + t + 4 * j) * (1 + 0x1p-13f);
        b[j] = (t + 4 * j + 100 * g) * (1 + 0x1p-13f);
    }
    mma_tf32(c, a, b);
    for (int h = 0; h < 2; ++h)
        for (int e = 0; e < 2; ++e) out[(g + 8 * h) * 8 + 2 * t + e] = c[2 * h + e];
    const float first[4] = {t == 0 ? 0x1p-13f : 0.0f, t == 0 ? 0x1p-13f : 0.0f, 0, 0}, second[2] = {0x1.8p-12f, 0};
    for (int i = 0; i < 4; ++i) c[i] = (g + i / 2 * 8) % 2 ? -1 - 0x1p-23f : 1;
    mma_tf32(c, first, second);
    for (int h = 0; h < 2; ++h)
        if (t == 0) out[(g + 8 * h) * 8] = c[2 * h];
}

// Copies of what the threads before wrote and of nothing, a group each, as they are once both, the first or none of the
// groups are waited for.
__global__ void copies(double* out, int waited) {
    double* const shared = dynamic_shared();
    shared[2 * threadIdx.x] = shared[2 * threadIdx.x + 1] = -1;
    out[threadIdx.x + 64] = threadIdx.x;
    __syncthreads();
    const bool second = threadIdx.x % 2;
    for (int group = 0; group < 2; ++group) {
        if (second == group) copy_async(shared + 2 * threadIdx.x, out + 64 + threadIdx.x / 2 * 2, threadIdx.x < 32);
        commit_copies();
    }
    if (waited == 2) wait_copies<0>();
    if (waited == 1) wait_copies<1>();
    __syncthreads();
    out[threadIdx.x] = shared[2 * threadIdx.x + 1];
    wait_copies<0>();
}

__global__ void copy_misaligned(double* out) {
    copy_async(dynamic_shared() + 1, out, true);
    wait_copies<0>();
}

__global__ void copy_forgotten(double* out) { copy_async(dynamic_shared() + 2 * threadIdx.x, out, true); }

// The order in which the threads run.
__global__ void ranks(double* out) { out[threadIdx.x] = out[64]++; }

}  // namespace

int main(int, char** arguments) {
    const char* name = arguments[1];
    emulation::order = static_cast<emulation::Order>(arguments[2][0] - '0');
    std::vector<double> out(128);
    const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
    const auto run = [&](auto kernel, int threads, std::size_t shared, auto... more) {
        return launch(kernel, Grid{1, 1}, threads, shared, nullptr, out.data(), more...);
    };
    cudaError_t status = cudaSuccess;
    if (is("reverse")) status = run(reverse, 64, 64 * sizeof(double), true);
    if (is("reverse without barrier")) status = run(reverse, 64, 64 * sizeof(double), false);
    if (is("unwritten")) status = run(read_unwritten, 64, 64 * sizeof(double));
    if (is("beyond shared")) status = run(write_beyond_shared, 64, 64 * sizeof(double));
    if (is("beyond output")) status = run(write_beyond_output, 128, 0);
    if (is("half at barrier")) status = run(half_at_barrier, 64, 0);
    if (is("two barriers")) status = run(two_barriers, 64, 0);
    if (is("barrier against collective")) status = run(barrier_against_collective, 64, 0);
    if (is("lane missing")) status = run(lane_missing, 64, 0);
    if (is("different collectives")) status = run(different_collectives, 64, 0);
    if (is("partial mask")) status = run(partial_mask, 64, 0);
    if (is("shuffles")) status = run(shuffles, 64, 0);
    if (is("product")) status = run(product, 32, 0);
    using transferops::bfloat16, transferops::float16;
    if (is("product of float16")) status = run(product_16bit<float16>, 32, 1024, encode<float16>);
    if (is("product of bfloat16")) status = run(product_16bit<bfloat16>, 32, 1024, encode<bfloat16>);
    if (is("product of tf32")) status = run(product_tf32, 32, 0);
    if (is("copies")) status = run(copies, 64, 1024, 2);
    if (is("copies of which one is waited for")) status = run(copies, 64, 1024, 1);
    if (is("copies of which none is waited for")) status = run(copies, 64, 1024, 0);
    if (is("copy misaligned")) status = run(copy_misaligned, 32, 1024);
    if (is("copy forgotten")) status = run(copy_forgotten, 32, 1024);
    if (is("ranks")) status = run(ranks, 64, 0);
    if (is("too many threads")) status = run(read_unwritten, 1025, 0);
    if (is("too much shared memory")) status = run(read_unwritten, 1, 228 * 1024);
    if (is("much shared memory")) status = run(read_unwritten, 1, 100 * 1024);
    if (status != cudaSuccess) return std::printf("error %d\n", status), 0;
    for (const double value : out) std::printf("%.17g\n", value);
}
