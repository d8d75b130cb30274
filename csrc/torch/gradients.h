// What the CPU and the CUDA registration of the gradients family share: argument checks, and how tensors lie in memory.
//
// The kernels take tensors as flat stretches of memory. Tensors that belong together (a gradient and its moments, the
// same tensor of several lists) are taken as they lie if all of them are dense and lie alike, channels last for
// instance; otherwise as contiguous copies.
//
// Lists pass through the stable ABI as vectors of tensors, those that an op changes too (which the schema says). A list
// of lists has no schema type: it comes flat, with the number of lists.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "apart.h"
#include "stable.h"

namespace transferops {

// Whether the elements fill one stretch of memory, in whatever order.
inline bool is_dense(const Tensor& tensor, std::int64_t first_dimension = 0) {
    std::vector<std::pair<std::int64_t, std::int64_t>> dimensions;  // stride, size
    for (std::int64_t d = first_dimension; d < tensor.dim(); ++d) {
        if (tensor.size(d) == 0) return true;
        if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
    }
    std::sort(dimensions.begin(), dimensions.end());
    std::int64_t extent = 1;
    for (const auto& [stride, size] : dimensions) {
        if (stride != extent) return false;
        extent *= size;
    }
    return true;
}

// Whether elements of the same index lie at the same places, without the leading `extra` dimensions of `other`.
inline bool lie_alike(const Tensor& tensor, const Tensor& other, std::int64_t extra = 0) {
    for (std::int64_t d = 0; d < tensor.dim(); ++d)
        if (tensor.size(d) > 1 && tensor.stride(d) != other.stride(d + extra)) return false;
    return true;
}

inline bool same_shape(const Tensor& tensor, const Tensor& other, std::int64_t extra = 0) {
    if (tensor.dim() + extra != other.dim()) return false;
    for (std::int64_t d = 0; d < tensor.dim(); ++d)
        if (tensor.size(d) != other.size(d + extra)) return false;
    return true;
}

inline void check_alike(const char* argument, std::size_t index, const Tensor& tensor, const Tensor& like,
                        std::int64_t extra = 0) {
    if (!same_shape(like, tensor, extra))
        fail(argument, ": expected ", extra ? "samples of " : "", "shape ", shape_of(like), " at index ", index,
             ", got ", shape_of(tensor));
    if (tensor.is_cuda() != like.is_cuda() || tensor.get_device_index() != like.get_device_index())
        fail(argument, ": expected one device for all tensors, got another at index ", index);
}

// Writes what a kernel had as a copy to where it belongs.
inline void write_back(const Tensor& from, const Tensor& to) {
    Tensor target = to;
    if (from.data_ptr() != to.data_ptr()) torch::stable::copy_(target, from);
}

// Gradients of a list of tensors with their running moments, which are written back to where they came from.
struct MomentsArguments {
    struct Item {
        Tensor gradient, mean;
        std::optional<Tensor> squares;
        std::int64_t sample_stride;
    };

    std::vector<Item> items;
    std::int64_t samples = 1;

    MomentsArguments(const TensorList& means, const TensorList& squares, const TensorList& gradients, bool stacked,
                     std::int64_t count)
        : means_(means), squares_(squares) {
        if (gradients.size() != means.size())
            fail("gradients: expected ", means.size(), " tensors, as means, got ", gradients.size());
        if (!squares.empty() && squares.size() != means.size())
            fail("squares: expected ", means.size(), " tensors, as means, or none, got ", squares.size());
        if (count < 0) fail("count: expected at least 0, got ", count);
        const std::int64_t extra = stacked;
        std::vector<Operand> changed;
        for (std::size_t i = 0; i < means.size(); ++i) {
            check_alike("means", i, means[i], means[i]);
            check_alike("gradients", i, gradients[i], means[i], extra);
            if (stacked && i > 0 && gradients[i].size(0) != samples)
                fail("gradients: expected ", samples, " samples at index ", i, ", got ", gradients[i].size(0));
            if (stacked) samples = gradients[i].size(0);
            const ScalarType type = means[i].scalar_type();
            if (type != ScalarType::Float && type != ScalarType::Double)
                fail("means: expected float32 or float64, got another dtype at index ", i);
            if (!squares.empty()) {
                check_alike("squares", i, squares[i], means[i]);
                if (squares[i].scalar_type() != type)
                    fail("squares: expected the dtype of means, got another at index ", i);
                changed.push_back({"squares", i, &squares[i], true});
            }
            changed.push_back({"means", i, &means[i], true});
            items.push_back(item(i, gradients[i], extra));
        }
        check_apart(changed);
    }

    // Calls body(null pointer of the gradients' type, null pointer of the moments', items) for the items of each pair.
    template <class Body>
    void by_type(const Body& body) const {
        std::vector<std::pair<ScalarType, ScalarType>> types;
        for (const Item& x : items) {
            const std::pair type{x.gradient.scalar_type(), x.mean.scalar_type()};
            if (std::find(types.begin(), types.end(), type) == types.end()) types.push_back(type);
        }
        for (const auto& type : types) {
            std::vector<const Item*> chosen;
            for (const Item& x : items)
                if (x.gradient.scalar_type() == type.first && x.mean.scalar_type() == type.second) chosen.push_back(&x);
            dispatch_floating("gradients", type.first, [&](auto* null) {
                if (type.second == ScalarType::Double)
                    body(null, static_cast<double*>(nullptr), chosen);
                else
                    body(null, static_cast<float*>(nullptr), chosen);
            });
        }
    }

    // Writes moments that the kernels had as copies to where they belong.
    void write_back() const {
        for (std::size_t i = 0; i < items.size(); ++i) {
            transferops::write_back(items[i].mean, means_[i]);
            if (items[i].squares) transferops::write_back(*items[i].squares, squares_[i]);
        }
    }

  private:
    Item item(std::size_t i, const Tensor& gradient, std::int64_t extra) const {
        const bool wants_squares = !squares_.empty();
        const bool direct = is_dense(means_[i]) && (!wants_squares || lie_alike(means_[i], squares_[i]));
        Item x{gradient, direct ? means_[i] : torch::stable::contiguous(means_[i]), std::nullopt, 0};
        if (wants_squares) x.squares = direct ? squares_[i] : torch::stable::contiguous(squares_[i]);
        if (!lie_alike(x.mean, gradient, extra)) {
            x.gradient = torch::stable::contiguous(gradient);
            if (!lie_alike(x.mean, x.gradient, extra)) {  // dense moments in another order than the copy
                x.mean = torch::stable::contiguous(means_[i]);
                if (wants_squares) x.squares = torch::stable::contiguous(squares_[i]);
            }
        }
        if (extra) x.sample_stride = x.gradient.stride(0);
        return x;
    }

    TensorList means_, squares_;
};

// `lists` lists of running means, of which the first counts.size() take gradients, and perhaps have squares.
struct ExpectationGramArguments {
    TensorList means, squares, gradients;  // [lists][length], [updated][length] or none, [updated][length]
    std::int64_t lists, updated, length, samples = 1;

    ExpectationGramArguments(const TensorList& all_means, const TensorList& all_squares,
                             const TensorList& all_gradients, bool stacked, const std::vector<std::int64_t>& counts,
                             std::int64_t list_count)
        : means(all_means),
          squares(all_squares),
          gradients(all_gradients),
          lists(list_count),
          updated(static_cast<std::int64_t>(counts.size())),
          own_means_(all_means),
          own_squares_(all_squares) {
        const auto size = static_cast<std::int64_t>(means.size());
        if (lists < 1 || size == 0 || size % lists != 0)
            fail("means: expected tensors of ", lists, " lists of equal length, got ", size);
        length = size / lists;
        if (updated < 1 || updated > lists) fail("counts: expected 1 to ", lists, " of them, got ", updated);
        for (const std::int64_t count : counts)
            if (count < 0) fail("counts: expected at least 0, got ", count);
        check_number("gradients", gradients);
        if (!squares.empty()) check_number("squares", squares);
        const ScalarType state = means[0].scalar_type(), type = gradients[0].scalar_type();
        if (state != ScalarType::Float && state != ScalarType::Double)
            fail("means: expected float32 or float64, got another dtype");
        if (stacked) samples = gradients[0].dim() > 0 ? gradients[0].size(0) : 0;
        std::vector<Operand> operands;
        for (std::int64_t i = 0; i < length; ++i) {
            const Tensor& like = all_means[i];
            bool direct = is_dense(like);
            for (std::int64_t k = 0; k < lists; ++k) {
                const std::int64_t place = k * length + i;
                check("means", place, means[place], like, 0, state);
                operands.push_back({"means", static_cast<std::size_t>(place), &own_means_[place], k < updated});
                direct = direct && lie_alike(like, means[place]);
                if (k >= updated) continue;
                check("gradients", place, gradients[place], like, stacked, type);
                if (stacked && gradients[place].size(0) != samples)
                    fail("gradients: expected ", samples, " samples at index ", place, ", got ",
                         gradients[place].size(0));
                direct = direct && lie_alike(like, gradients[place], stacked);
                if (squares.empty()) continue;
                check("squares", place, squares[place], like, 0, state);
                operands.push_back({"squares", static_cast<std::size_t>(place), &own_squares_[place], true});
                direct = direct && lie_alike(like, squares[place]);
            }
            if (!direct) copy_tensor(i);
        }
        check_apart(operands);
    }

    // The moments [length][lists], as the kernels of either device take them.
    template <class Moments, class T, class S>
    std::vector<Moments> moments() const {
        std::vector<Moments> out;
        for (std::int64_t i = 0; i < length; ++i)
            for (std::int64_t k = 0; k < lists; ++k) {
                const std::int64_t place = k * length + i;
                Moments x{nullptr, 0, means[place].numel(), static_cast<S*>(means[place].data_ptr()), nullptr};
                if (k < updated) {
                    x.gradients = static_cast<const T*>(gradients[place].data_ptr());
                    if (gradients[place].dim() > means[place].dim()) x.sample_stride = gradients[place].stride(0);
                    if (!squares.empty()) x.squares = static_cast<S*>(squares[place].data_ptr());
                }
                out.push_back(x);
            }
        return out;
    }

    // Calls body(null pointer of the gradients' type, null pointer of the moments').
    template <class Body>
    void by_type(const Body& body) const {
        dispatch_floating("gradients", gradients[0].scalar_type(), [&](auto* null) {
            if (means[0].scalar_type() == ScalarType::Double)
                body(null, static_cast<double*>(nullptr));
            else
                body(null, static_cast<float*>(nullptr));
        });
    }

    void write_back() const {
        for (std::int64_t place = 0; place < updated * length; ++place) {
            transferops::write_back(means[place], own_means_[place]);
            if (!squares.empty()) transferops::write_back(squares[place], own_squares_[place]);
        }
    }

  private:
    void check_number(const char* argument, const TensorList& tensors) const {
        const std::int64_t size = updated * length;
        if (static_cast<std::int64_t>(tensors.size()) != size)
            fail(argument, ": expected ", size, " tensors, ", length, " for each of the counts, got ", tensors.size());
    }

    void check(const char* argument, std::int64_t place, const Tensor& tensor, const Tensor& like, std::int64_t extra,
               ScalarType type) const {
        check_alike(argument, static_cast<std::size_t>(place), tensor, like, extra);
        if (tensor.is_cuda() != own_means_[0].is_cuda() ||
            tensor.get_device_index() != own_means_[0].get_device_index())
            fail(argument, ": expected one device for all tensors, got another at index ", place);
        if (tensor.scalar_type() != type)
            fail(argument, ": expected one dtype for all tensors, got another at index ", place);
    }

    void copy_tensor(std::int64_t i) {
        for (std::int64_t place = i; place < lists * length; place += length) {
            means[place] = torch::stable::contiguous(means[place]);
            if (place >= updated * length) continue;
            gradients[place] = torch::stable::contiguous(gradients[place]);
            if (!squares.empty()) squares[place] = torch::stable::contiguous(squares[place]);
        }
    }

    TensorList own_means_, own_squares_;
};

// The rows of a Gram matrix: `lists` lists of tensors, one after the other.
struct GramArguments {
    TensorList tensors;  // [lists][tensors of a list]
    std::int64_t lists, length;

    GramArguments(const TensorList& gradients, std::int64_t list_count) : tensors(gradients), lists(list_count) {
        const auto size = static_cast<std::int64_t>(gradients.size());
        if (lists < 1 || size == 0 || size % lists != 0)
            fail("gradients: expected tensors of ", lists, " lists of equal length, got ", size);
        length = size / lists;
        for (std::int64_t i = 0; i < length; ++i) {
            bool direct = is_dense(gradients[i]);
            for (std::int64_t k = 0; k < lists; ++k) {
                const std::int64_t place = k * length + i;
                check_alike("gradients", static_cast<std::size_t>(place), gradients[place], gradients[i]);
                if (gradients[place].scalar_type() != gradients[0].scalar_type())
                    fail("gradients: expected one dtype for all tensors, got another at index ", place);
                direct = direct && lie_alike(gradients[i], gradients[place]);
            }
            for (std::int64_t k = 0; k < lists && !direct; ++k)
                tensors[k * length + i] = torch::stable::contiguous(gradients[k * length + i]);
        }
        if (length > 0) check_one_device();
    }

    // Per tensor of a list, its address in every list: [length][lists].
    template <class T>
    std::vector<const T*> rows() const {
        std::vector<const T*> pointers;
        for (std::int64_t i = 0; i < length; ++i)
            for (std::int64_t k = 0; k < lists; ++k)
                pointers.push_back(static_cast<const T*>(tensors[k * length + i].data_ptr()));
        return pointers;
    }

    template <class Segment, class T>
    std::vector<Segment> segments(const std::vector<const T*>& pointers) const {
        std::vector<Segment> out;
        for (std::int64_t i = 0; i < length; ++i)
            out.push_back({pointers.data() + i * lists, tensors[i].numel(), nullptr, nullptr});
        return out;
    }

  private:
    void check_one_device() const {
        for (std::size_t i = 1; i < tensors.size(); ++i)
            if (tensors[i].is_cuda() != tensors[0].is_cuda() ||
                tensors[i].get_device_index() != tensors[0].get_device_index())
                fail("gradients: expected one device for all tensors, got another at index ", i);
    }
};

// What products of elements of a dtype are taken in.
inline ScalarType compute_type(const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_columns(const char* argument, const Tensor& tensor, std::int64_t columns, const char* shape,
                          std::int64_t dimensions, const Tensor& like) {
    if (tensor.dim() != dimensions || tensor.size(dimensions - 1) != columns)
        fail(argument, ": expected shape ", shape, " with P = ", columns, ", got ", shape_of(tensor));
    if (tensor.is_cuda() != like.is_cuda()) fail(argument, ": expected one device for all tensors, got another");
}

// Rows with contiguous columns; other layouts are copied.
inline Tensor with_contiguous_columns(const Tensor& rows) {
    return rows.size(1) > 1 && rows.stride(1) != 1 ? torch::stable::contiguous(rows) : rows;
}

// Directions [K, P], weights [P] and perhaps a base [P], as the kernels want them.
struct WeightedArguments {
    Tensor directions, weights;
    std::optional<Tensor> base;

    WeightedArguments(const Tensor& rows, const Tensor& row_weights, const std::optional<Tensor>& origin)
        : directions(rows), weights(row_weights), base(origin) {
        if (rows.dim() != 2) fail("directions: expected shape [K, P], got ", shape_of(rows));
        check_columns("weights", weights, rows.size(1), "[P]", 1, rows);
        directions = with_contiguous_columns(rows);
        weights = torch::stable::contiguous(torch::stable::to(weights, compute_type(rows)));
        if (!base) return;
        check_columns("base", *base, rows.size(1), "[P]", 1, rows);
        if (base->scalar_type() != rows.scalar_type()) fail("base: expected the dtype of directions, got another");
        base = torch::stable::contiguous(*base);
    }

    template <class T>
    std::vector<const T*> rows() const {
        std::vector<const T*> pointers;
        for (std::int64_t k = 0; k < directions.size(0); ++k)
            pointers.push_back(static_cast<const T*>(directions.data_ptr()) + k * directions.stride(0));
        return pointers;
    }

    template <class Segment, class T>
    std::vector<Segment> segments(const std::vector<const T*>& pointers) const {
        using Weight = std::remove_reference_t<decltype(*Segment{}.weights)>;
        return {{pointers.data(), directions.size(1), base ? static_cast<const T*>(base->data_ptr()) : nullptr,
                 static_cast<Weight*>(weights.data_ptr())}};
    }
};

// Per-sample gradients [N, P] and directions [K, P], as the kernels want them.
struct SampleArguments {
    Tensor gradients, directions;

    SampleArguments(const Tensor& rows, const Tensor& moves) : gradients(rows), directions(moves) {
        if (rows.dim() != 2) fail("gradients: expected shape [N, P], got ", shape_of(rows));
        check_columns("directions", moves, rows.size(1), "[K, P]", 2, rows);
        gradients = with_contiguous_columns(rows);
        directions = torch::stable::contiguous(torch::stable::to(moves, compute_type(rows)));
    }
};

}  // namespace transferops
