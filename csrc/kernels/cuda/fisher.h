// What a weight's per-sample gradients are asked for, without the gradients in memory, on CUDA devices; free of torch.
//
// Products and sums over positions and over the samples of a block are float32 (float64 for float64 inputs), sums over
// blocks float64. The order of every sum is fixed by the sizes and `multiprocessors`: results are bit for bit the same
// from run to run. A workspace is scratch of as many doubles as its function returns, aligned to 16 bytes (nullptr
// where that is 0). Outputs are contiguous and fully written, also for empty inputs. Nothing here allocates or
// synchronises.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../scalar.h"

namespace transferops::cuda {

struct Extent {
    std::int64_t depth = 1, height = 1, width = 1;

    __host__ __device__ std::int64_t volume() const { return depth * height * width; }
};

// A strided [samples, depth, height, width, channels] tensor, read only. The channels are contiguous; strides count
// elements.
template <class T>
struct Signal {
    const T* data;
    std::int64_t samples, channels;
    Extent size;
    std::int64_t sample_stride;
    Extent stride;
};

// Which inputs meet which weights, as in a convolution with zero padding.
struct Window {
    Extent kernel, stride, padding{0, 0, 0}, dilation;
    std::int64_t groups = 1;
};

// A layer's inputs and the gradients at its outputs. The gradient of its weight [O, I / groups, *kernel] for sample n
// is G_n = sum_t b_nt a_nt^T over output positions t, with b_nt the output gradients and a_nt the inputs under the
// window. A linear layer is the case of a 1 x 1 x 1 window and its positions as the width. Channels are read 16 bytes
// at a time where those of a group are whole such vectors. The caller guarantees that groups divide the channels, and
// that the number of positions, of columns I / groups * kernel, and the extent of padded inputs along each axis are
// below 2^30.
template <class T>
struct LayerBatch {
    Signal<T> inputs, grad_outputs;
    Window window;
};

// out [O, I / groups, *kernel] = sum_n G_n * G_n, elementwise.
template <class T>
cudaError_t fisher_diagonal(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                            cudaStream_t stream);
template <class T>
std::int64_t fisher_diagonal_workspace(const LayerBatch<T>& layer, int multiprocessors);

// out [samples, count] = <G_n, D_k> for directions D [count, O, I / groups, *kernel].
template <class T>
cudaError_t fisher_projection(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count,
                              Compute<T>* out, double* workspace, int multiprocessors, cudaStream_t stream);
template <class T>
std::int64_t fisher_projection_workspace(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors);

// out [samples] = |G_n|^2.
template <class T>
cudaError_t grad_norm(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                      cudaStream_t stream);
template <class T>
std::int64_t grad_norm_workspace(const LayerBatch<T>& layer, int multiprocessors);

}  // namespace transferops::cuda
