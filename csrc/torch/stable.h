// The part of torch that the bindings use: the stable ABI only, so that one build runs on torch 2.11 and later.
#pragma once

// 2.11 in the stable ABI's encoding (major in the top byte, minor in the next). Defined here, not on the command line,
// so that no file can be compiled against another version by accident.
#define TORCH_TARGET_VERSION 0x020b000000000000ull

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/scalar.h"

namespace transferops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// Throws "argument: expected ..., got ...", the form of every error in this library.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << '[';
    for (std::int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
    text << ']';
    return text.str();
}

// Calls body with a null pointer of the kernel's element type for a floating dtype.
template <class Body>
void dispatch_floating(const char* argument, ScalarType dtype, const Body& body) {
    switch (dtype) {
        case ScalarType::Float:
            return body(static_cast<const float*>(nullptr));
        case ScalarType::Double:
            return body(static_cast<const double*>(nullptr));
        case ScalarType::Half:
            return body(static_cast<const float16*>(nullptr));
        case ScalarType::BFloat16:
            return body(static_cast<const bfloat16*>(nullptr));
        default:
            fail(argument, ": expected float32, float64, float16 or bfloat16, got another dtype");
    }
}

inline void check_dtype(const char* argument, const Tensor& tensor, ScalarType dtype, const char* name) {
    if (tensor.scalar_type() != dtype) fail(argument, ": expected dtype ", name, ", got another dtype");
}

}  // namespace transferops
