// The schema list: every op of the library, one line each. Implementations are registered beside their families.
#include "../include/transferops/version.h"
#include "stable.h"

STABLE_TORCH_LIBRARY(transferops, m) {
    m.def("class_moments(Tensor features, Tensor labels, int num_classes) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("sample_gram(Tensor features) -> (Tensor, Tensor)");
    m.def("norm_moments(Tensor features, Tensor shift) -> (Tensor, Tensor)");
}

extern "C" const char* transferops_version() { return TRANSFEROPS_VERSION; }
