// Per-sample gradients of convolutions whose groups have so few rows and columns that tiles would be mostly empty, as
// depthwise convolutions do: each weight's is one product of two rows along all positions.
//
// A channel of the input is cut by the stride into phases, in each of which neighbouring outputs read neighbouring
// inputs; a row of output gradients lies in the same pitch, with zeros in the gaps. Where there is a gap, an input is
// multiplied with zero: one that is infinite or NaN makes its channel's gradients NaN, unless no window reads it.
#pragma once

#include <algorithm>
#include <vector>

#include "fisher_operand.h"
#include "row_products.h"

namespace transferops::cpu {

constexpr std::int64_t kProductLength = 2048;  // summed in lanes, from there on one after the other

template <class C>
bool tiles_are_mostly_empty(const LayerShape& shape) {
    const std::int64_t tile = ceil_div(shape.rows, 8) * 8 * ceil_div(shape.columns, kPanel<C>) * kPanel<C>;
    return shape.groups > 1 && tile >= 2 * shape.rows * shape.columns;
}

inline Extent operator-(const Extent& a, const Extent& b) { return {a[0] - b[0], a[1] - b[1], a[2] - b[2]}; }

// The planes of one group of one sample, and its gradient.
template <class T>
class PlaneGradient {
    using C = Compute<T>;

  public:
    PlaneGradient(const LayerBatch<T>& layer, const LayerShape& shape)
        : layer_(layer),
          rows_(shape.rows),
          channels_(layer.inputs.channels / shape.groups),
          output_(layer.grad_outputs.size) {
        const Window& w = layer.window;
        for (int d = 0; d < 3; ++d) {
            phases_[d] = std::min(w.stride[d], (w.kernel[d] - 1) * w.dilation[d] + 1);
            size_[d] = output_[d] + (w.kernel[d] - 1) * w.dilation[d] / w.stride[d];
        }
        for (int d = 0; d < 3; ++d) read_[d] = read_along(w, d);
        pitch_ = {size_[1] * size_[2], size_[2], 1};
        length_ = 1;
        for (int d = 0; d < 3; ++d) length_ += (output_[d] - 1) * pitch_[d];
        const std::int64_t plane = volume(size_), channel = volume(phases_) * plane;
        inputs_ = zeros<C>(channels_ * channel);
        outputs_ = zeros<C>(rows_ * length_);
        for (std::int64_t c = 0; c < channels_; ++c)
            for (const Extent& tap : points_of(w.kernel)) {
                std::int64_t phase = 0, offset = 0;
                for (int d = 0; d < 3; ++d) {
                    const std::int64_t place = tap[d] * w.dilation[d];
                    phase = phase * phases_[d] + place % w.stride[d];
                    offset += place / w.stride[d] * pitch_[d];
                }
                right_.push_back(inputs_.get() + c * channel + phase * plane + offset);
            }
        for (std::int64_t r = 0; r < rows_; ++r) left_.push_back(outputs_.get() + r * length_);
        gradient.resize(static_cast<std::size_t>(rows_) * right_.size());
        part_.resize(gradient.size());
    }

    std::vector<C> gradient;  // [rows, channels, *kernel]

    void compute(std::int64_t sample, std::int64_t group) {
        const Window& w = layer_.window;
        C* plane = inputs_.get();
        for (std::int64_t c = group * channels_; c < (group + 1) * channels_; ++c)
            for (const Extent& phase : points_of(phases_)) {
                copy(layer_.inputs, sample, c, phase - w.padding, w.stride, size_, plane);
                clear_unread(phase, plane);
                plane += volume(size_);
            }
        for (std::int64_t r = 0; r < rows_; ++r)
            copy(layer_.grad_outputs, sample, group * rows_ + r, {0, 0, 0}, {1, 1, 1}, output_,
                 outputs_.get() + r * length_);
        std::fill(gradient.begin(), gradient.end(), C(0));
        const auto columns = static_cast<std::int64_t>(right_.size());
        std::vector<const C*> left = left_, right = right_;
        for (std::int64_t first = 0; first < length_; first += kProductLength) {
            run<C>(RowProducts<C>{left.data(), rows_, right.data(), columns, std::min(kProductLength, length_ - first),
                                  part_.data(), columns});
            for (std::size_t i = 0; i < part_.size(); ++i) gradient[i] += part_[i];
            for (const C*& row : left) row += kProductLength;
            for (const C*& row : right) row += kProductLength;
        }
    }

  private:
    // Which elements of which phase a window reads, [phases, size] of one dimension; empty if all are read.
    std::vector<bool> read_along(const Window& w, int d) const {
        std::vector<bool> read(static_cast<std::size_t>(phases_[d] * size_[d]));
        for (std::int64_t k = 0; k < w.kernel[d]; ++k) {
            const std::int64_t place = k * w.dilation[d];
            const std::int64_t first = place % w.stride[d] * size_[d] + place / w.stride[d];
            std::fill_n(read.begin() + first, output_[d], true);
        }
        return std::find(read.begin(), read.end(), false) == read.end() ? std::vector<bool>() : read;
    }

    void clear_unread(const Extent& phase, C* plane) const {
        if (read_[0].empty() && read_[1].empty() && read_[2].empty()) return;
        for (const Extent& point : points_of(size_)) {
            bool read = true;
            for (int d = 0; d < 3; ++d) read &= read_[d].empty() || read_[d][phase[d] * size_[d] + point[d]];
            if (!read) plane[point[0] * pitch_[0] + point[1] * pitch_[1] + point[2]] = C(0);
        }
    }

    static std::vector<Extent> points_of(const Extent& box) {
        std::vector<Extent> points;
        for (std::int64_t z = 0; z < box[0]; ++z)
            for (std::int64_t y = 0; y < box[1]; ++y)
                for (std::int64_t x = 0; x < box[2]; ++x) points.push_back({z, y, x});
        return points;
    }

    // Elements begin + step * (z, y, x) of a channel, for points of `box`, to pitch_; those that do not exist are left.
    void copy(const SignalView<T>& x, std::int64_t sample, std::int64_t channel, const Extent& begin,
              const Extent& step, const Extent& box, C* out) const {
        const T* source = x.data + sample * x.sample_stride + channel * x.channel_stride;
        Extent first, last;
        for (int d = 0; d < 3; ++d) {
            first[d] = begin[d] < 0 ? ceil_div(-begin[d], step[d]) : 0;
            last[d] = begin[d] < x.size[d] ? std::min(box[d], ceil_div(x.size[d] - begin[d], step[d])) : 0;
        }
        const auto offset = [&](int d, std::int64_t i) { return (begin[d] + i * step[d]) * x.stride[d]; };
        for (std::int64_t z = first[0]; z < last[0]; ++z)
            for (std::int64_t y = first[1]; y < last[1]; ++y)
                if (first[2] < last[2])
                    copy_row(source + offset(0, z) + offset(1, y) + offset(2, first[2]), step[2] * x.stride[2],
                             last[2] - first[2], out + z * pitch_[0] + y * pitch_[1] + first[2]);
    }

    TRANSFEROPS_CLONES static void copy_row(const T* source, std::int64_t stride, std::int64_t count,
                                            C* __restrict__ out) {
        if (stride == 1)
            for (std::int64_t i = 0; i < count; ++i) out[i] = convert<C>(source[i]);
        else
            for (std::int64_t i = 0; i < count; ++i) out[i] = convert<C>(source[i * stride]);
    }

    const LayerBatch<T>& layer_;
    std::int64_t rows_, channels_;
    Extent output_, phases_, size_, pitch_;  // size_ of a phase
    std::vector<bool> read_[3];
    std::int64_t length_;  // of the rows
    AlignedBuffer<C> inputs_, outputs_;
    std::vector<const C*> left_, right_;
    std::vector<C> part_;
};

// Calls use(sample, group, gradient [rows, channels, *kernel]) for all; the samples of a group in order, in one task.
template <class T, class Use>
void plane_gradients(const LayerBatch<T>& layer, const LayerShape& shape, const Use& use,
                     const ParallelFor& parallel_for) {
    parallel_for(shape.groups, [&](std::int64_t group) {
        PlaneGradient<T> planes(layer, shape);
        for (std::int64_t n = 0; n < shape.samples; ++n) {
            planes.compute(n, group);
            use(n, group, planes.gradient);
        }
    });
}

}  // namespace transferops::cpu
