// The extension module transferops._C: the kernels over NumPy buffers, and the facts of the build.
//
// Loading it also registers the torch ops, which are linked in. No torch type appears here. Outputs are the caller's
// buffers; arguments are checked for shape and layout only (the public functions are in transferops.ops).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../include/transferops/version.h"
#include "../kernels/cpu/isa.h"
#include "../kernels/cpu/moments.h"

namespace py = pybind11;

namespace {

using transferops::cpu::MatrixView;
using transferops::cpu::serial_for;

using Output = py::array_t<double, py::array::c_style>;
using Counts = py::array_t<std::int64_t, py::array::c_style>;

void require(bool condition, const std::string& message) {
    if (!condition) throw py::value_error(message);
}

double* writable(Output& out, py::ssize_t size, const char* name) {
    require(out.size() == size, std::string(name) + ": expected " + std::to_string(size) + " elements, got " +
                                    std::to_string(out.size()));
    return out.mutable_data();
}

// Calls body with a MatrixView of the array's element type. NumPy has no bfloat16, so it comes as uint16.
template <class Body>
void with_matrix(const py::array& features, const Body& body) {
    require(features.ndim() == 2, "features: expected 2 dimensions, got " + std::to_string(features.ndim()));
    const auto call = [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        constexpr py::ssize_t kSize = sizeof(T);
        require(features.strides(0) % kSize == 0 && features.strides(1) % kSize == 0,
                "features: expected strides that are whole elements");
        body(MatrixView<T>{static_cast<const T*>(features.data()), features.shape(0), features.shape(1),
                           features.strides(0) / kSize, features.strides(1) / kSize});
    };
    const char kind = features.dtype().kind();
    const py::ssize_t size = features.dtype().itemsize();
    if (kind == 'f' && size == 4) return call(static_cast<const float*>(nullptr));
    if (kind == 'f' && size == 8) return call(static_cast<const double*>(nullptr));
    if (kind == 'f' && size == 2) return call(static_cast<const transferops::float16*>(nullptr));
    if (kind == 'u' && size == 2) return call(static_cast<const transferops::bfloat16*>(nullptr));
    require(false, "features: expected float32, float64, float16, or bfloat16 as uint16");
}

void class_moments(const py::array& features, const Counts& labels, Counts& counts, Output& sums, Output& gram,
                   Output& shift) {
    with_matrix(features, [&](const auto& x) {
        const std::int64_t classes = counts.size();
        require(labels.ndim() == 1 && labels.size() == x.rows, "labels: expected one label per row of features");
        for (std::int64_t n = 0; n < x.rows; ++n)
            require(labels.data()[n] >= 0 && labels.data()[n] < classes,
                    "labels: expected values in 0.." + std::to_string(classes - 1));
        double* sum = writable(sums, classes * x.columns, "sums");
        double* product = writable(gram, x.columns * x.columns, "gram");
        double* mean = writable(shift, x.columns, "shift");
        std::int64_t* count = counts.mutable_data();
        py::gil_scoped_release release;
        transferops::cpu::class_moments(x, labels.data(), classes, count, sum, product, mean, serial_for);
    });
}

void sample_gram(const py::array& features, Output& gram, Output& shift) {
    with_matrix(features, [&](const auto& x) {
        double* product = writable(gram, x.rows * x.rows, "gram");
        double* mean = writable(shift, x.columns, "shift");
        py::gil_scoped_release release;
        transferops::cpu::sample_gram(x, product, mean, serial_for);
    });
}

void norm_moments(const py::array& features, const Output& shift, Output& cubic, Output& quartic) {
    with_matrix(features, [&](const auto& x) {
        require(shift.size() == x.columns, "shift: expected one element per column of features");
        double* third = writable(cubic, x.columns, "cubic");
        double* fourth = writable(quartic, 1, "quartic");
        py::gil_scoped_release release;
        transferops::cpu::norm_moments(x, shift.data(), third, fourth, serial_for);
    });
}

py::dict build_info() {
    py::dict info;
    info["version"] = transferops_version();
    info["torch"] = TRANSFEROPS_TORCH_VERSION;
    info["cuda"] = std::string(TRANSFEROPS_CUDA_VERSION).empty() ? py::object(py::none())
                                                                 : py::object(py::str(TRANSFEROPS_CUDA_VERSION));
    info["cuda_architectures"] = TRANSFEROPS_CUDA_ARCHITECTURES;
    info["compiler"] = TRANSFEROPS_COMPILER;
    info["build_type"] = TRANSFEROPS_BUILD_TYPE;
    const char* const levels[] = {"baseline", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)"};
    info["cpu_level"] = levels[static_cast<int>(transferops::cpu::cpu_level())];
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of transferops over NumPy buffers (use transferops.ops), and build_info().";
    m.def("class_moments", &class_moments, py::arg("features"), py::arg("labels"), py::arg("counts").noconvert(),
          py::arg("sums").noconvert(), py::arg("gram").noconvert(), py::arg("shift").noconvert());
    m.def("sample_gram", &sample_gram, py::arg("features"), py::arg("gram").noconvert(),
          py::arg("shift").noconvert());
    m.def("norm_moments", &norm_moments, py::arg("features"), py::arg("shift"), py::arg("cubic").noconvert(),
          py::arg("quartic").noconvert());
    m.def("build_info", &build_info, "The facts of this build: versions, compiler, CUDA architectures, CPU level.");
}
