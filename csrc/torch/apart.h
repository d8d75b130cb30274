// Whether tensors that an op changes have memory of their own.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "stable.h"

namespace transferops {

// A tensor of float32 or float64 that an op changes or only reads, and what an error calls it.
struct Operand {
    const char* argument;
    std::size_t index;
    const Tensor* tensor;
    bool changed;
};

// Calls body with the place of each element, counted in elements from the first.
template <class Body>
void for_each_place(const Tensor& tensor, const Body& body) {
    std::vector<std::int64_t> index(static_cast<std::size_t>(tensor.dim()), 0);
    std::int64_t place = 0, d = 0;
    while (d >= 0) {
        body(place);
        for (d = tensor.dim() - 1; d >= 0; --d) {
            place += tensor.stride(d);
            if (++index[d] < tensor.size(d)) break;
            place -= tensor.size(d) * tensor.stride(d);
            index[d] = 0;
        }
    }
}

// Whether no two elements can lie at one place, since every dimension steps over all that smaller steps reach. Of some
// tensors this is not so, and no two do.
inline bool steps_over_itself(const Tensor& tensor) {
    std::vector<std::pair<std::int64_t, std::int64_t>> dimensions;  // stride, size
    for (std::int64_t d = 0; d < tensor.dim(); ++d)
        if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
    std::sort(dimensions.begin(), dimensions.end());
    std::int64_t reach = 0;
    for (const auto& [stride, size] : dimensions) {
        if (stride <= reach) return false;
        reach += stride * (size - 1);
    }
    return true;
}

// Where an operand lies, in units of a float32.
struct Stretch {
    const Operand* operand;
    std::int64_t begin, end, width;  // width: of an element

    explicit Stretch(const Operand& what)
        : operand(&what),
          begin(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(what.tensor->data_ptr()) / sizeof(float))),
          end(begin),
          width(what.tensor->scalar_type() == ScalarType::Double ? 2 : 1) {
        std::int64_t last = 0;
        for (std::int64_t d = 0; d < what.tensor->dim(); ++d)
            last += (what.tensor->size(d) - 1) * what.tensor->stride(d);
        end += (last + 1) * width;
    }
};

// `check_apart` of stretches that overlap each other, by looking at every element.
inline void check_elements_apart(std::vector<Stretch> stretches) {
    std::int64_t begin = stretches[0].begin, end = stretches[0].end;
    for (const Stretch& x : stretches) {
        begin = std::min(begin, x.begin);
        end = std::max(end, x.end);
    }
    std::vector<bool> taken(static_cast<std::size_t>(end - begin), false);
    // Those that are changed come first, and take their places.
    std::stable_partition(stretches.begin(), stretches.end(), [](const Stretch& x) { return x.operand->changed; });
    for (const Stretch& x : stretches)
        for_each_place(*x.operand->tensor, [&](std::int64_t place) {
            const auto first = taken.begin() + (x.begin - begin + place * x.width), last = first + x.width;
            if (std::find(first, last, true) != last)
                fail(x.operand->argument, ": expected memory of its own for every element at index ", x.operand->index,
                     ", got some that another element has");
            if (x.operand->changed) std::fill(first, last, true);
        });
}

// Fails if two elements lie at one place: of one tensor that is changed (an expanded one, for instance), or of one that
// is changed and another. Tensors that are only read may share memory with each other.
//
// Sorting the tensors by address settles it for most. Where their stretches overlap, as those of columns of a matrix
// do, every element is looked at.
inline void check_apart(const std::vector<Operand>& operands) {
    std::vector<Stretch> stretches;
    for (const Operand& operand : operands)
        if (operand.tensor->numel() > 0) stretches.emplace_back(operand);
    std::sort(stretches.begin(), stretches.end(), [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
    for (auto first = stretches.begin(); first != stretches.end();) {
        auto next = first + 1;
        for (std::int64_t end = first->end; next != stretches.end() && next->begin < end; ++next)
            end = std::max(end, next->end);
        const bool alone = next == first + 1;
        if (!alone || (first->operand->changed && !steps_over_itself(*first->operand->tensor)))
            check_elements_apart({first, next});
        first = next;
    }
}

}  // namespace transferops
