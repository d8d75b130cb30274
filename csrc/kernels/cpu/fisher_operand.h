// A layer's inputs and output gradients as one matrix [positions, columns] per sample, and packing of its panels.
//
// Element (n, t, i) stands at sample(n)[positions[t] + columns[i]]: two tables make a linear layer, a convolution of
// any stride, dilation and grouping, and either side's transpose the same thing, and unfolded inputs exist only as the
// few panels in cache. A padded convolution is read from a copy of the images of some samples with the border around
// them.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "fisher.h"
#include "tile.h"

namespace transferops::cpu {

template <class C>
AlignedBuffer<C> zeros(std::int64_t count) {
    auto buffer = aligned_buffer<C>(count);
    std::memset(buffer.get(), 0, static_cast<std::size_t>(count) * sizeof(C));
    return buffer;
}

inline bool is_run(const std::int64_t* offsets, std::int64_t count) {
    for (std::int64_t i = 1; i < count; ++i)
        if (offsets[i] != offsets[0] + i) return false;
    return true;
}

// out [count][kPanel]: element (p, l) = data[depth[p] + width[l]] for l < valid, zero in the lanes beyond.
template <class C, class E>
TRANSFEROPS_CLONES void pack_panel(const E* data, const std::int64_t* depth, std::int64_t count,
                                   const std::int64_t* width, std::int64_t valid, C* __restrict__ out) {
    constexpr std::int64_t kLanes = kPanel<C>;
    if (valid < kLanes) std::memset(out, 0, static_cast<std::size_t>(count * kLanes) * sizeof(C));
    if (is_run(width, valid)) {
        const E* first = data + width[0];
        if (valid == kLanes) {
            for (std::int64_t p = 0; p < count; ++p)
                for (std::int64_t l = 0; l < kLanes; ++l) out[p * kLanes + l] = convert<C>(first[depth[p] + l]);
        } else {
            for (std::int64_t p = 0; p < count; ++p)
                for (std::int64_t l = 0; l < valid; ++l) out[p * kLanes + l] = convert<C>(first[depth[p] + l]);
        }
        return;
    }
    std::int64_t p = 0;
    for (; p + kLanes <= count; p += kLanes) {
        if (is_run(depth + p, kLanes)) {  // a square is read along its rows and turned
            C square[kLanes][kLanes];
            for (std::int64_t l = 0; l < valid; ++l) {
                const E* source = data + depth[p] + width[l];
                for (std::int64_t q = 0; q < kLanes; ++q) square[l][q] = convert<C>(source[q]);
            }
            for (std::int64_t q = 0; q < kLanes; ++q)
                for (std::int64_t l = 0; l < valid; ++l) out[(p + q) * kLanes + l] = square[l][q];
        } else {
            for (std::int64_t q = p; q < p + kLanes; ++q)
                for (std::int64_t l = 0; l < valid; ++l) out[q * kLanes + l] = convert<C>(data[depth[q] + width[l]]);
        }
    }
    for (; p < count; ++p)
        for (std::int64_t l = 0; l < valid; ++l) out[p * kLanes + l] = convert<C>(data[depth[p] + width[l]]);
}

inline std::int64_t volume(const Extent& x) { return x[0] * x[1] * x[2]; }

// One table entry per point of a box, last dimension fastest.
inline std::vector<std::int64_t> box_offsets(const Extent& size, const Extent& stride) {
    std::vector<std::int64_t> offsets;
    offsets.reserve(static_cast<std::size_t>(volume(size)));
    for (std::int64_t z = 0; z < size[0]; ++z)
        for (std::int64_t y = 0; y < size[1]; ++y)
            for (std::int64_t x = 0; x < size[2]; ++x) offsets.push_back(z * stride[0] + y * stride[1] + x * stride[2]);
    return offsets;
}

inline Extent operator*(const Extent& a, const Extent& b) { return {a[0] * b[0], a[1] * b[1], a[2] * b[2]}; }

// Where one weight matrix per group meets a sample: `columns` inputs under the window by `rows` outputs.
struct LayerShape {
    std::int64_t samples, positions, groups, rows, columns;
    std::vector<std::int64_t> weight_index;  // of a column, within a row of the weight [rows, channels, *kernel]

    template <class T>
    explicit LayerShape(const LayerBatch<T>& layer)
        : samples(layer.inputs.samples),
          positions(volume(layer.grad_outputs.size)),
          groups(layer.window.groups),
          rows(layer.grad_outputs.channels / groups) {
        // Columns are ordered with the channels fastest: neighbours in a channels-last image.
        const std::int64_t taps = volume(layer.window.kernel), channels = layer.inputs.channels / groups;
        columns = taps * channels;
        for (std::int64_t tap = 0; tap < taps; ++tap)
            for (std::int64_t c = 0; c < channels; ++c) weight_index.push_back(c * taps + tap);
    }
};

// Read where it stands.
template <class T>
struct Operand {
    using Element = T;
    const T* data;
    std::int64_t sample_stride;
    std::vector<std::int64_t> positions;
    std::vector<std::int64_t> columns;  // those of group 0, then group 1, ...

    const T* sample(std::int64_t n) const { return data + n * sample_stride; }
    std::int64_t elements_per_sample() const { return 0; }  // that have to be held
    void begin(std::int64_t, std::int64_t) {}
    void load(std::int64_t) {}
};

template <class T>
Operand<T> output_operand(const SignalView<T>& x) {
    return {x.data, x.sample_stride, box_offsets(x.size, x.stride),
            box_offsets({1, 1, x.channels}, {0, 0, x.channel_stride})};
}

// The inputs under the window, for inputs that include their padding.
template <class T>
Operand<T> input_operand(const SignalView<T>& x, const Window& window, const Extent& output_size) {
    Operand<T> operand{x.data, x.sample_stride, box_offsets(output_size, x.stride * window.stride), {}};
    const auto taps = box_offsets(window.kernel, x.stride * window.dilation);
    const std::int64_t channels = x.channels / window.groups;
    for (std::int64_t g = 0; g < window.groups; ++g)
        for (const std::int64_t tap : taps)
            for (std::int64_t c = 0; c < channels; ++c)
                operand.columns.push_back(tap + (g * channels + c) * x.channel_stride);
    return operand;
}

// Read from channels-last copies of a few samples at a time, with a border of zeros.
template <class T>
struct PaddedOperand {
    using Element = Compute<T>;
    SignalView<T> source;
    Extent padding, padded, stride;
    std::int64_t first = 0, held = 0;
    AlignedBuffer<Element> images;
    std::vector<std::int64_t> positions, columns;

    explicit PaddedOperand(const LayerBatch<T>& layer) : source(layer.inputs), padding(layer.window.padding) {
        for (int d = 0; d < 3; ++d) padded[d] = source.size[d] + 2 * padding[d];
        stride = {padded[1] * padded[2] * source.channels, padded[2] * source.channels, source.channels};
        const SignalView<Element> view{nullptr, 0, source.channels, padded, elements_per_sample(), 1, stride};
        auto tables = input_operand(view, layer.window, layer.grad_outputs.size);
        positions = std::move(tables.positions);
        columns = std::move(tables.columns);
    }

    const Element* sample(std::int64_t n) const { return images.get() + (n - first) * elements_per_sample(); }
    std::int64_t elements_per_sample() const { return volume(padded) * source.channels; }

    // Makes room for samples first_sample .. first_sample+count-1; borders are written once, load never touches them.
    void begin(std::int64_t first_sample, std::int64_t count) {
        first = first_sample;
        if (count <= held) return;
        held = count;
        images = aligned_buffer<Element>(held * elements_per_sample());
        std::memset(images.get(), 0, static_cast<std::size_t>(held * elements_per_sample()) * sizeof(Element));
    }

    void load(std::int64_t n) {
        Element* image = images.get() + (n - first) * elements_per_sample();
        for (std::int64_t z = 0; z < source.size[0]; ++z)
            for (std::int64_t y = 0; y < source.size[1]; ++y)
                copy_row(source, source.data + n * source.sample_stride + z * source.stride[0] + y * source.stride[1],
                         image + (z + padding[0]) * stride[0] + (y + padding[1]) * stride[1] + padding[2] * stride[2]);
    }

  private:
    // [channels, width] to [width][channels].
    TRANSFEROPS_CLONES static void copy_row(const SignalView<T>& x, const T* row, Element* __restrict__ out) {
        const std::int64_t width = x.size[2], channels = x.channels;
        if (x.channel_stride == 1) {
            for (std::int64_t i = 0; i < width; ++i)
                for (std::int64_t c = 0; c < channels; ++c)
                    out[i * channels + c] = convert<Element>(row[i * x.stride[2] + c]);
        } else {
            for (std::int64_t c = 0; c < channels; ++c)
                for (std::int64_t i = 0; i < width; ++i)
                    out[i * channels + c] = convert<Element>(row[c * x.channel_stride + i * x.stride[2]]);
        }
    }
};

// Calls body(inputs, grad_outputs) with the operands of a layer.
template <class T, class Body>
void with_operands(const LayerBatch<T>& layer, const Body& body) {
    const Operand<T> outputs = output_operand(layer.grad_outputs);
    if (volume(layer.window.kernel) == 1 && layer.window.padding == Extent{0, 0, 0}) {
        Operand<T> inputs = input_operand(layer.inputs, layer.window, layer.grad_outputs.size);
        body(inputs, outputs);
    } else {
        PaddedOperand<T> inputs(layer);
        body(inputs, outputs);
    }
}

// The same matrix with all samples' positions one after the other, as those of one sample.
template <class Source>
Operand<typename Source::Element> all_samples_as_one(Source& x, std::int64_t samples, const ParallelFor& parallel_for) {
    x.begin(0, samples);
    parallel_for(samples, [&](std::int64_t n) { x.load(n); });
    Operand<typename Source::Element> one{x.sample(0), 0, {}, x.columns};
    for (std::int64_t n = 0; n < samples; ++n)
        for (const std::int64_t position : x.positions) one.positions.push_back(x.sample(n) - x.sample(0) + position);
    return one;
}

}  // namespace transferops::cpu
