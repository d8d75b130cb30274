// The extension module transferops._C: the kernels over NumPy buffers, and the facts of the build.
//
// Loading it also registers the torch ops, which are linked in. No torch type appears here. Outputs are the caller's
// buffers; arguments are checked for shape and layout only (the public functions are in transferops.ops).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../include/transferops/version.h"
#include "../kernels/cpu/fisher.h"
#include "../kernels/cpu/gradients.h"
#include "../kernels/cpu/isa.h"
#include "../kernels/cpu/moments.h"
#include "../kernels/cpu/prediction.h"

namespace py = pybind11;

namespace {

using transferops::cpu::Extent;
using transferops::cpu::GramSegment;
using transferops::cpu::LayerBatch;
using transferops::cpu::MatrixView;
using transferops::cpu::RunningMoments;
using transferops::cpu::serial_for;
using transferops::cpu::SignalView;
using transferops::cpu::TangentView;

using Output = py::array_t<double, py::array::c_style>;
using Counts = py::array_t<std::int64_t, py::array::c_style>;

void require(bool condition, const std::string& message) {
    if (!condition) throw py::value_error(message);
}

double* writable(Output& out, py::ssize_t size, const char* name) {
    require(out.size() == size,
            std::string(name) + ": expected " + std::to_string(size) + " elements, got " + std::to_string(out.size()));
    return out.mutable_data();
}

void require_whole_strides(const char* name, const py::array& array) {
    for (py::ssize_t d = 0; d < array.ndim(); ++d)
        require(array.strides(d) % array.itemsize() == 0,
                std::string(name) + ": expected strides that are whole elements");
}

// Calls body with a null pointer of the array's element type. NumPy has no bfloat16, so it comes as uint16.
template <class Body>
void with_element(const char* name, const py::array& array, const Body& body) {
    const char kind = array.dtype().kind();
    const py::ssize_t size = array.dtype().itemsize();
    require_whole_strides(name, array);
    if (kind == 'f' && size == 4) return body(static_cast<const float*>(nullptr));
    if (kind == 'f' && size == 8) return body(static_cast<const double*>(nullptr));
    if (kind == 'f' && size == 2) return body(static_cast<const transferops::float16*>(nullptr));
    if (kind == 'u' && size == 2) return body(static_cast<const transferops::bfloat16*>(nullptr));
    require(false, std::string(name) + ": expected float32, float64, float16, or bfloat16 as uint16");
}

// Calls body with a MatrixView of the array.
template <class Body>
void with_matrix(const py::array& features, const Body& body) {
    require(features.ndim() == 2, "features: expected 2 dimensions, got " + std::to_string(features.ndim()));
    with_element("features", features, [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        constexpr py::ssize_t kSize = sizeof(T);
        body(MatrixView<T>{static_cast<const T*>(features.data()), features.shape(0), features.shape(1),
                           features.strides(0) / kSize, features.strides(1) / kSize});
    });
}

void require_labels(const Counts& labels, py::ssize_t rows, const char* name, std::int64_t classes) {
    require(labels.ndim() == 1 && labels.size() == rows, std::string("labels: expected one label per row of ") + name);
    for (py::ssize_t n = 0; n < rows; ++n)
        require(labels.data()[n] >= 0 && labels.data()[n] < classes,
                "labels: expected values in 0.." + std::to_string(classes - 1));
}

void class_moments(const py::array& features, const Counts& labels, Counts& counts, Output& sums, Output& gram,
                   Output& shift) {
    with_matrix(features, [&](const auto& x) {
        const std::int64_t classes = counts.size();
        require_labels(labels, x.rows, "features", classes);
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

void empirical_prediction(const py::array& probabilities, const Counts& labels, std::int64_t classes,
                          Output& prediction, Output& mass, Output& totals, Output& lowest) {
    with_matrix(probabilities, [&](const auto& x) {
        require(x.column_stride == 1 || x.columns < 2, "probabilities: expected contiguous rows");
        require_labels(labels, x.rows, "probabilities", classes);
        double* predicted = writable(prediction, x.rows, "prediction");
        double* column_sums = writable(mass, x.columns, "mass");
        double* row_sums = writable(totals, x.rows, "totals");
        double* minima = writable(lowest, x.rows, "lowest");
        const std::int64_t* label = labels.data();
        py::gil_scoped_release release;
        transferops::cpu::empirical_prediction(x, label, classes, predicted, column_sums, row_sums, minima, serial_for);
    });
}

using Extents = std::array<Extent, 4>;  // kernel, stride, padding, dilation

template <class T>
SignalView<T> signal_of(const char* name, const py::array& x) {
    require(x.ndim() == 5, std::string(name) + ": expected 5 dimensions [N, C, depth, height, width]");
    SignalView<T> view{static_cast<const T*>(x.data()), x.shape(0), x.shape(1), {}, 0, 0, {}};
    constexpr py::ssize_t kSize = sizeof(T);
    view.sample_stride = x.strides(0) / kSize;
    view.channel_stride = x.strides(1) / kSize;
    for (int d = 0; d < 3; ++d) {
        view.size[d] = x.shape(2 + d);
        view.stride[d] = x.strides(2 + d) / kSize;
    }
    return view;
}

// Calls body with the LayerBatch of the arrays and the output's data, which must have the type that T computes in.
template <class Body>
void with_layer(const py::array& inputs, const py::array& grad_outputs, const Extents& window, std::int64_t groups,
                py::array& out, const Body& body) {
    with_element("inputs", inputs, [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        using C = transferops::Compute<T>;
        require(grad_outputs.dtype().is(inputs.dtype()), "grad_outputs: expected the dtype of inputs");
        require_whole_strides("grad_outputs", grad_outputs);
        const LayerBatch<T> layer{signal_of<T>("inputs", inputs),
                                  signal_of<T>("grad_outputs", grad_outputs),
                                  {window[0], window[1], window[2], window[3], groups}};
        require(layer.inputs.samples == layer.grad_outputs.samples, "grad_outputs: expected the samples of inputs");
        require(groups > 0 && layer.inputs.channels % groups == 0 && layer.grad_outputs.channels % groups == 0,
                "groups: expected a divisor of the channels");
        for (int d = 0; d < 3; ++d) {
            const std::int64_t room = layer.inputs.size[d] + 2 * window[2][d] - window[3][d] * (window[0][d] - 1) - 1;
            require(window[0][d] > 0 && window[1][d] > 0 && window[2][d] >= 0 && window[3][d] > 0,
                    "window: expected kernel, stride and dilation of at least 1, padding of at least 0");
            require(layer.grad_outputs.size[d] == (room < 0 ? 0 : room / window[1][d] + 1),
                    "grad_outputs: expected the size of the convolution's output");
        }
        require(py::isinstance<py::array_t<C, py::array::c_style>>(out),
                std::string("out: expected a contiguous array of float") + (sizeof(C) == 8 ? "64" : "32"));
        body(layer, static_cast<C*>(out.mutable_data()));
    });
}

std::int64_t weights_of(const auto& layer) {
    const Extent& kernel = layer.window.kernel;
    return layer.grad_outputs.channels * (layer.inputs.channels / layer.window.groups) * kernel[0] * kernel[1] *
           kernel[2];
}

void fisher_diagonal(const py::array& inputs, const py::array& grad_outputs, const Extents& window, std::int64_t groups,
                     py::array& out) {
    with_layer(inputs, grad_outputs, window, groups, out, [&](const auto& layer, auto* result) {
        require(out.size() == weights_of(layer), "out: expected as many elements as the weight");
        py::gil_scoped_release release;
        transferops::cpu::fisher_diagonal(layer, result, serial_for);
    });
}

void fisher_projection(const py::array& inputs, const py::array& grad_outputs, const py::array& directions,
                       const Extents& window, std::int64_t groups, py::array& out) {
    with_layer(inputs, grad_outputs, window, groups, out, [&](const auto& layer, auto* result) {
        using C = std::remove_pointer_t<decltype(result)>;
        require(py::isinstance<py::array_t<C, py::array::c_style>>(directions) && directions.ndim() > 0 &&
                    directions.size() == directions.shape(0) * weights_of(layer),
                "directions: expected a contiguous array [K, weight] of the dtype of out");
        require(out.size() == layer.inputs.samples * directions.shape(0), "out: expected [N, K] elements");
        std::vector<const C*> rows;
        for (py::ssize_t k = 0; k < directions.shape(0); ++k) rows.push_back(static_cast<const C*>(directions.data(k)));
        py::gil_scoped_release release;
        transferops::cpu::fisher_projection(layer, transferops::cpu::Directions<C>(rows), result, serial_for);
    });
}

void grad_norm(const py::array& inputs, const py::array& grad_outputs, const Extents& window, std::int64_t groups,
               py::array& out) {
    with_layer(inputs, grad_outputs, window, groups, out, [&](const auto& layer, auto* result) {
        require(out.size() == layer.inputs.samples, "out: expected one element per sample");
        py::gil_scoped_release release;
        transferops::cpu::grad_norm(layer, result, serial_for);
    });
}

void softmax_fisher_gram(const py::array& logits, const py::array& tangents, Output& gram) {
    with_element("logits", logits, [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        constexpr py::ssize_t kSize = sizeof(T);
        require(tangents.dtype().is(logits.dtype()), "tangents: expected the dtype of logits");
        require_whole_strides("tangents", tangents);
        require(logits.ndim() == 2 && tangents.ndim() == 3 && tangents.shape(1) == logits.shape(0) &&
                    tangents.shape(2) == logits.shape(1),
                "tangents: expected shape [K, N, C] for logits [N, C]");
        const TangentView<T> view{static_cast<const T*>(tangents.data()),
                                  tangents.shape(0),
                                  tangents.shape(1),
                                  tangents.shape(2),
                                  tangents.strides(0) / kSize,
                                  tangents.strides(1) / kSize,
                                  tangents.strides(2) / kSize};
        double* result = writable(gram, view.directions * view.directions, "gram");
        const auto* data = static_cast<const T*>(logits.data());
        const std::int64_t sample_stride = logits.strides(0) / kSize, class_stride = logits.strides(1) / kSize;
        py::gil_scoped_release release;
        transferops::cpu::softmax_fisher_gram(data, sample_stride, class_stride, view, result, serial_for);
    });
}

using Arrays = std::vector<py::array>;

void require_contiguous(const char* name, const py::array& array, py::ssize_t size) {
    require((array.flags() & py::array::c_style) && array.size() == size,
            std::string(name) + ": expected a contiguous array of " + std::to_string(size) + " elements");
}

// Calls body with the RunningMoments of arrays, of which those without a gradient are means alone.
template <class Body>
void with_moments(const Arrays& means, const Arrays& squares, const Arrays& gradients, std::int64_t samples,
                  const Body& body) {
    require(gradients.size() <= means.size() && (squares.empty() || squares.size() == gradients.size()),
            "gradients, squares: expected as many arrays as means");
    require(samples >= 0, "samples: expected at least 0");
    if (gradients.empty()) return;
    with_element("gradients", gradients[0], [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        with_element("means", means[0], [&](auto* moments) {
            using S = std::remove_const_t<std::remove_pointer_t<decltype(moments)>>;
            if constexpr (std::is_floating_point_v<S>) {
                std::vector<RunningMoments<T, S>> tensors;
                for (std::size_t i = 0; i < means.size(); ++i) {
                    require(means[i].dtype().is(means[0].dtype()), "means: expected one dtype");
                    const py::ssize_t size = means[i].size();
                    require_contiguous("means", means[i], size);
                    tensors.push_back(
                        {nullptr, size, size, static_cast<S*>(py::array(means[i]).mutable_data()), nullptr});
                    if (i >= gradients.size()) continue;
                    require(gradients[i].dtype().is(gradients[0].dtype()), "gradients: expected one dtype");
                    require_contiguous("gradients", gradients[i], samples * size);
                    tensors.back().gradients = static_cast<const T*>(gradients[i].data());
                    if (squares.empty()) continue;
                    require(squares[i].dtype().is(means[i].dtype()), "squares: expected the dtype of means");
                    require_contiguous("squares", squares[i], size);
                    tensors.back().squares = static_cast<S*>(py::array(squares[i]).mutable_data());
                }
                body(tensors);
            } else {
                require(false, "means: expected float32 or float64");
            }
        });
    });
}

void gradient_expectation(const Arrays& means, const Arrays& squares, const Arrays& gradients, std::int64_t samples,
                          std::int64_t count) {
    require(gradients.size() == means.size(), "gradients: expected as many arrays as means");
    require(count >= 0, "count: expected at least 0");
    with_moments(means, squares, gradients, samples, [&](const auto& tensors) {
        py::gil_scoped_release release;
        transferops::cpu::gradient_expectation(tensors, samples, count, serial_for);
    });
}

void gradient_expectation_gram(const Arrays& means, const Arrays& squares, const Arrays& gradients,
                               std::int64_t samples, const std::vector<std::int64_t>& counts, std::int64_t lists,
                               Output& gram) {
    const auto size = static_cast<std::int64_t>(means.size()), updated = static_cast<std::int64_t>(counts.size());
    require(lists > 0 && size > 0 && size % lists == 0, "means: expected arrays of lists of equal length");
    const std::int64_t length = size / lists;
    require(0 < updated && updated <= lists && static_cast<std::int64_t>(gradients.size()) == updated * length,
            "gradients: expected arrays of as many lists as there are counts");
    for (std::int64_t k = 0; k < size; ++k)
        require(means[k].size() == means[k % length].size(), "means: expected arrays of the same sizes in every list");
    for (const std::int64_t count : counts) require(count >= 0, "counts: expected at least 0");
    double* result = writable(gram, lists * lists, "gram");
    with_moments(means, squares, gradients, samples, [&](const auto& tensors) {
        std::remove_cvref_t<decltype(tensors)> by_tensor;
        for (std::int64_t i = 0; i < length; ++i)
            for (std::int64_t k = 0; k < lists; ++k) by_tensor.push_back(tensors[k * length + i]);
        py::gil_scoped_release release;
        transferops::cpu::gradient_expectation_gram(by_tensor, lists, samples, counts, result, serial_for);
    });
}

void gradient_gram(const Arrays& gradients, std::int64_t lists, Output& gram) {
    const auto count = static_cast<std::int64_t>(gradients.size());
    require(lists > 0 && count > 0 && count % lists == 0, "gradients: expected arrays of lists of equal length");
    with_element("gradients", gradients[0], [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        const std::int64_t length = count / lists;
        std::vector<const T*> rows;
        std::vector<GramSegment<T>> segments;
        for (std::int64_t i = 0; i < length; ++i)
            for (std::int64_t k = 0; k < lists; ++k) {
                const py::array& array = gradients[k * length + i];
                require(array.dtype().is(gradients[0].dtype()), "gradients: expected one dtype");
                require_contiguous("gradients", array, gradients[i].size());
                rows.push_back(static_cast<const T*>(array.data()));
            }
        for (std::int64_t i = 0; i < length; ++i)
            segments.push_back({rows.data() + i * lists, gradients[i].size(), nullptr, nullptr});
        double* result = writable(gram, lists * lists, "gram");
        py::gil_scoped_release release;
        transferops::cpu::weighted_gram(segments, lists, result, serial_for);
    });
}

void weighted_gram(const py::array& directions, const py::array& weights, const std::optional<py::array>& base,
                   Output& gram) {
    with_matrix(directions, [&](const auto& x) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(x.data)>>;
        using C = transferops::Compute<T>;
        require(x.column_stride == 1 || x.columns < 2, "directions: expected contiguous rows");
        require(py::isinstance<py::array_t<C>>(weights),
                std::string("weights: expected float") + (sizeof(C) == 8 ? "64" : "32"));
        require_contiguous("weights", weights, x.columns);
        if (base) {
            require(base->dtype().is(directions.dtype()), "base: expected the dtype of directions");
            require_contiguous("base", *base, x.columns);
        }
        std::vector<const T*> rows;
        for (std::int64_t k = 0; k < x.rows; ++k) rows.push_back(x.data + k * x.row_stride);
        const std::vector<GramSegment<T>> segments{{rows.data(), x.columns,
                                                    base ? static_cast<const T*>(base->data()) : nullptr,
                                                    static_cast<const C*>(weights.data())}};
        double* result = writable(gram, x.rows * x.rows, "gram");
        py::gil_scoped_release release;
        transferops::cpu::weighted_gram(segments, x.rows, result, serial_for);
    });
}

void gradient_fisher_gram(const py::array& gradients, const py::array& directions, Output& gram, py::array& diagonal,
                          Output& norms) {
    with_matrix(gradients, [&](const auto& x) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(x.data)>>;
        using C = transferops::Compute<T>;
        const std::string type = sizeof(C) == 8 ? "float64" : "float32";
        require(x.column_stride == 1 || x.columns < 2, "gradients: expected contiguous rows");
        require(directions.ndim() == 2 && py::isinstance<py::array_t<C>>(directions),
                "directions: expected a matrix of " + type);
        const std::int64_t count = directions.shape(0);
        require_contiguous("directions", directions, count * x.columns);
        require(py::isinstance<py::array_t<C>>(diagonal), "diagonal: expected " + type);
        require_contiguous("diagonal", diagonal, x.columns);
        double* product = writable(gram, count * count, "gram");
        double* norm = writable(norms, x.rows, "norms");
        auto* squares = static_cast<C*>(diagonal.mutable_data());
        const auto* direction = static_cast<const C*>(directions.data());
        py::gil_scoped_release release;
        transferops::cpu::gradient_fisher_gram(x, direction, count, product, squares, norm, serial_for);
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
    m.def("sample_gram", &sample_gram, py::arg("features"), py::arg("gram").noconvert(), py::arg("shift").noconvert());
    m.def("norm_moments", &norm_moments, py::arg("features"), py::arg("shift"), py::arg("cubic").noconvert(),
          py::arg("quartic").noconvert());
    m.def("empirical_prediction", &empirical_prediction, py::arg("probabilities"), py::arg("labels"),
          py::arg("classes"), py::arg("prediction").noconvert(), py::arg("mass").noconvert(),
          py::arg("totals").noconvert(), py::arg("lowest").noconvert());
    m.def("fisher_diagonal", &fisher_diagonal, py::arg("inputs"), py::arg("grad_outputs"), py::arg("window"),
          py::arg("groups"), py::arg("out"));
    m.def("fisher_projection", &fisher_projection, py::arg("inputs"), py::arg("grad_outputs"), py::arg("directions"),
          py::arg("window"), py::arg("groups"), py::arg("out"));
    m.def("grad_norm", &grad_norm, py::arg("inputs"), py::arg("grad_outputs"), py::arg("window"), py::arg("groups"),
          py::arg("out"));
    m.def("softmax_fisher_gram", &softmax_fisher_gram, py::arg("logits"), py::arg("tangents"),
          py::arg("gram").noconvert());
    m.def("gradient_expectation", &gradient_expectation, py::arg("means"), py::arg("squares"), py::arg("gradients"),
          py::arg("samples"), py::arg("count"));
    m.def("gradient_expectation_gram", &gradient_expectation_gram, py::arg("means"), py::arg("squares"),
          py::arg("gradients"), py::arg("samples"), py::arg("counts"), py::arg("lists"), py::arg("gram").noconvert());
    m.def("gradient_gram", &gradient_gram, py::arg("gradients"), py::arg("lists"), py::arg("gram").noconvert());
    m.def("weighted_gram", &weighted_gram, py::arg("directions"), py::arg("weights"), py::arg("base"),
          py::arg("gram").noconvert());
    m.def("gradient_fisher_gram", &gradient_fisher_gram, py::arg("gradients"), py::arg("directions"),
          py::arg("gram").noconvert(), py::arg("diagonal"), py::arg("norms").noconvert());
    m.def("build_info", &build_info, "The facts of this build: versions, compiler, CUDA architectures, CPU level.");
}
