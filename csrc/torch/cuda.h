// What the CUDA bindings need of torch beside tensors: the current stream, the device, scratch memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "stable.h"

namespace transferops {

inline void check_cuda(cudaError_t status) {
    if (status != cudaSuccess) fail("CUDA: ", cudaGetErrorString(status));
}

// Makes a tensor's device the current one for a scope, with torch's current stream there.
struct DeviceScope {
    explicit DeviceScope(const Tensor& tensor) : device(tensor.get_device_index()), guard(device) {
        void* current = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
        stream = static_cast<cudaStream_t>(current);
    }

    int multiprocessors() const {
        int count = 0;
        check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
        return count;
    }

    int device;
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream;
};

// Scratch of so many doubles from torch's allocator, safe to drop after the launch that uses it.
class Workspace {
  public:
    Workspace(const Tensor& like, std::int64_t doubles)
        : tensor_(torch::stable::new_empty(like, {doubles}, ScalarType::Double)), empty_(doubles == 0) {}
    double* data() const { return empty_ ? nullptr : static_cast<double*>(tensor_.data_ptr()); }

  private:
    Tensor tensor_;
    bool empty_;
};

}  // namespace transferops
