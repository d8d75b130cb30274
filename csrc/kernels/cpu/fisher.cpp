// Tiles of the per-sample gradient, over positions, each squared, reduced or dotted with the directions' tiles.
//
// In slabs: operands that every task needs are packed first, by all threads; then the tasks run, each on tiles that are
// its own, with the sums over tasks taken afterwards in order. Three more routes are elsewhere: the projection and the
// norm at few positions (fisher_contraction.h, fisher_norm.h), and layers of many small groups (fisher_planes.h).
#include "fisher.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "fisher_contraction.h"
#include "fisher_grid.h"
#include "fisher_norm.h"
#include "fisher_operand.h"
#include "fisher_planes.h"
#include "fisher_tile.h"

namespace transferops::cpu {
namespace {

constexpr std::int64_t kPieceRows = 128;  // of B that are packed as one task

// Some positions of one sample: what one run of the register tile sums.
struct Run {
    std::int64_t sample, first, depth;
    bool starts, ends;  // the sample
};

// The runs of all samples, in order.
std::vector<Run> runs_of(std::int64_t samples, std::int64_t positions) {
    std::vector<Run> runs;
    for (std::int64_t n = 0; n < samples; ++n)
        for (std::int64_t first = 0; first < positions; first += kPositions) {
            const std::int64_t depth = std::min(kPositions, positions - first);
            runs.push_back({n, first, depth, first == 0, first + depth == positions});
        }
    return runs;
}

// A slab of runs, and where each one's rows begin when their rows stand one after the other.
struct Slab {
    const Run* runs;
    std::int64_t count;
    std::vector<std::int64_t> begin;  // [count + 1]
};

// Cuts runs into slabs of at most kSlabElements (or one run): several whole samples, or a part of one.
std::vector<Slab> slabs_of(const std::vector<Run>& runs, std::int64_t per_position, std::int64_t per_sample) {
    std::vector<Slab> slabs;
    const auto total = static_cast<std::int64_t>(runs.size());
    for (std::int64_t first = 0, next; first < total; first = next) {
        Slab slab{&runs[first], 0, {0}};
        std::int64_t elements = 0;
        for (next = first; next < total; ++next) {
            const Run& run = runs[next];
            const std::int64_t more = run.depth * per_position + (run.starts ? per_sample : 0);
            const bool split = !run.starts || !run.ends;
            if (next > first && (elements + more > kSlabElements || (split && run.sample != runs[first].sample))) break;
            elements += more;
            slab.begin.push_back(slab.begin.back() + run.depth);
        }
        slab.count = next - first;
        slabs.push_back(std::move(slab));
    }
    return slabs;
}

template <class C>
void square_all(C* x, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) x[i] *= x[i];
}

// Forms every tile of every run, sum over its positions of b_t a_t^T, and hands its operands to the sink, which says
// what to do with the product. A tile's runs come in order, in one task.
template <class C, class Source, class T, class Sink>
void gradient_tiles(Source& a, const Operand<T>& b, const LayerShape& shape, bool square, Sink& sink,
                    const ParallelFor& parallel_for) {
    const Grid<C> grid(shape);
    const Level level = cpu_level();
    const std::int64_t panel_row = grid.row_panels() * kPanel<C>;
    const std::int64_t pieces = ceil_div(grid.rows, kPieceRows);  // of a run, which may be the only one
    const std::vector<Run> runs = runs_of(shape.samples, shape.positions);
    const std::vector<Slab> slabs = slabs_of(runs, grid.groups * panel_row, a.elements_per_sample());
    std::int64_t most = 0;
    for (const Slab& slab : slabs) most = std::max(most, slab.begin.back());
    const auto packed_b = aligned_buffer<C>(most * grid.groups * panel_row);  // [run][group][panel][position][kPanel]

    for (const Slab& slab : slabs) {
        a.begin(slab.runs[0].sample, slab.runs[slab.count - 1].sample - slab.runs[0].sample + 1);
        sink.begin_slab(slab.count, grid.tasks());
        parallel_for(slab.count * grid.groups * pieces, [&](std::int64_t task) {
            const std::int64_t r = task / pieces / grid.groups, group = task / pieces % grid.groups;
            const std::int64_t first = task % pieces * kPieceRows;
            const Run& run = slab.runs[r];
            if (run.starts && group == 0 && first == 0) a.load(run.sample);
            C* out = packed_b.get() + (slab.begin[r] * grid.groups + group * run.depth) * panel_row + first * run.depth;
            for (std::int64_t row = first; row < std::min(first + kPieceRows, grid.rows); row += kPanel<C>) {
                pack_panel(b.sample(run.sample), b.positions.data() + run.first, run.depth,
                           b.columns.data() + group * grid.rows + row, std::min(kPanel<C>, grid.rows - row), out);
                if (square) square_all(out, run.depth * kPanel<C>);
                out += run.depth * kPanel<C>;
            }
        });
        parallel_for(grid.tasks(), [&](std::int64_t task) {
            const std::int64_t row_block = task % grid.row_blocks();
            const std::int64_t column_tile = task / grid.row_blocks() % grid.column_tiles();
            const std::int64_t group = task / grid.row_blocks() / grid.column_tiles();
            const std::int64_t row_end = std::min((row_block + 1) * grid.task_row_tiles, grid.row_tiles());
            const std::int64_t panels = grid.panels_of(column_tile);
            const auto packed_a = aligned_buffer<C>(std::min(kPositions, slab.begin.back()) * kTileColumns<C>);
            auto results = sink.begin_task(slab.count);
            // As many runs at a time as fit kPositions: a tile is then updated from L1 by all of them.
            for (std::int64_t first = 0, next; first < slab.count; first = next) {
                next = first + 1;
                while (next < slab.count && slab.begin[next + 1] - slab.begin[first] <= kPositions) ++next;
                for (std::int64_t r = first; r < next; ++r) {
                    const Run& run = slab.runs[r];
                    C* out = packed_a.get() + (slab.begin[r] - slab.begin[first]) * kTileColumns<C>;
                    for (std::int64_t panel = 0; panel < panels; ++panel) {
                        const std::int64_t column = column_tile * kTileColumns<C> + panel * kPanel<C>;
                        pack_panel(a.sample(run.sample), a.positions.data() + run.first, run.depth,
                                   a.columns.data() + group * grid.columns + column,
                                   std::min(kPanel<C>, grid.columns - column), out + panel * run.depth * kPanel<C>);
                    }
                    if (square) square_all(out, panels * run.depth * kPanel<C>);
                }
                for (std::int64_t j = row_block * grid.task_row_tiles; j < row_end; ++j)
                    for (std::int64_t r = first; r < next; ++r) {
                        const std::int64_t depth = slab.runs[r].depth;
                        const C* rows = packed_b.get() + (slab.begin[r] * grid.groups + group * depth) * panel_row;
                        const TileOperands<C> x{depth,
                                                packed_a.get() + (slab.begin[r] - slab.begin[first]) * kTileColumns<C>,
                                                depth * kPanel<C>, panels, rows + row_tile_offset<C>(j, depth)};
                        results.tile(level, x, grid.tile(group, column_tile, j), r, slab.runs[r]);
                    }
            }
            sink.end_task(task, results);
        });
        sink.end_slab(slab.runs);
    }
}

// Whether a weight's columns are in the order that they have in tiles, as those of a linear layer are: a permutation
// that ascends is none.
bool keeps_order(const LayerShape& shape) { return std::ranges::is_sorted(shape.weight_index); }

// Sinks. A tile whose sample has more runs to come is kept unfinished, except where the result is linear in it.

// total += G_n * G_n.
template <class C>
struct DiagonalSink {
    C* total;
    C* unfinished;  // untouched if no sample has more than one run

    void begin_slab(std::int64_t, std::int64_t) {}
    DiagonalSink& begin_task(std::int64_t) { return *this; }

    void tile(Level level, const TileOperands<C>& x, std::int64_t index, std::int64_t, const Run& run) {
        C* partial = unfinished + index * kTileArea<C>;
        if (run.ends)
            multiply_tile(level, x, SquareTile<C>{total + index * kTileArea<C>, run.starts ? nullptr : partial});
        else if (run.starts)
            multiply_tile(level, x, StoreTile<C>{partial});
        else
            multiply_tile(level, x, AddTile<C>{partial});
    }

    void end_task(std::int64_t, DiagonalSink&) {}
    void end_slab(const Run*) {}
};

// out = G_0, in the weight's own layout: of squared operands, with samples in the place of positions, the diagonal.
template <class C>
struct SumSink {
    C* out;  // [groups * rows][columns]
    const LayerShape& shape;
    const Grid<C> grid{shape};
    const bool in_order = keeps_order(shape);

    void begin_slab(std::int64_t, std::int64_t) {}
    SumSink& begin_task(std::int64_t) { return *this; }

    void tile(Level level, const TileOperands<C>& x, std::int64_t index, std::int64_t, const Run& run) {
        const auto [group, first_column, first_row] = grid.begin_of(index);
        C* target = out + (group * grid.rows + first_row) * grid.columns;
        const std::int64_t rows = std::min(kTileRows, grid.rows - first_row);
        const std::int64_t columns = std::min(kTileColumns<C>, grid.columns - first_column);
        if (in_order && rows == kTileRows && columns == kTileColumns<C>) {
            if (run.starts) return multiply_tile(level, x, StoreTile<C>{target + first_column, grid.columns});
            return multiply_tile(level, x, AddTile<C>{target + first_column, grid.columns});
        }
        alignas(64) C sums[kTileArea<C>];
        multiply_tile(level, x, StoreTile<C>{sums});
        for (std::int64_t row = 0; row < rows; ++row)
            for (std::int64_t i = 0; i < columns; ++i) {
                C& sum = target[row * grid.columns + shape.weight_index[first_column + i]];
                sum = (run.starts ? C(0) : sum) + sums[row * kTileColumns<C> + i];
            }
    }

    void end_task(std::int64_t, SumSink&) {}
    void end_slab(const Run*) {}
};

// `count` numbers per sample, added up in float64: in lanes within a task, then over tasks in order.
template <class C>
class SampleSums {
  public:
    std::vector<double> total;  // [samples][count]

    SampleSums(std::int64_t samples, std::int64_t count)
        : total(static_cast<std::size_t>(samples * count), 0.0), count_(count) {}

    void begin_slab(std::int64_t runs, std::int64_t tasks) {
        runs_ = runs;
        tasks_ = tasks;
        partial_.assign(static_cast<std::size_t>(tasks * runs * count_), 0.0);
    }

    std::vector<double> lanes(std::int64_t runs) const {
        return std::vector<double>(static_cast<std::size_t>(runs * count_ * kPanel<C>), 0.0);
    }

    double* lanes_of(std::vector<double>& lanes, std::int64_t run) const {
        return lanes.data() + run * count_ * kPanel<C>;
    }

    void end_task(std::int64_t task, const std::vector<double>& lanes) {
        for (std::int64_t i = 0; i < runs_ * count_; ++i)
            for (std::int64_t l = 0; l < kPanel<C>; ++l)
                partial_[task * runs_ * count_ + i] += lanes[i * kPanel<C> + l];
    }

    template <class SampleOf>
    void end_slab(const SampleOf& sample_of) {
        for (std::int64_t task = 0; task < tasks_; ++task)
            for (std::int64_t r = 0; r < runs_; ++r)
                for (std::int64_t k = 0; k < count_; ++k)
                    total[sample_of(r) * count_ + k] += partial_[(task * runs_ + r) * count_ + k];
    }

    void write(C* out) const {
        for (const double value : total) *out++ = static_cast<C>(value);
    }

  private:
    std::int64_t count_, runs_ = 0, tasks_ = 0;
    std::vector<double> partial_;  // [tasks][runs][count]
};

// sums[n][k] += <G_n, D_k> with the directions' tiles [tile][k].
template <class C>
struct ProjectionSink {
    const C* directions;
    std::int64_t count;
    SampleSums<C>& sums;

    struct Task {
        const ProjectionSink& sink;
        std::vector<double> lanes;

        void tile(Level level, const TileOperands<C>& x, std::int64_t index, std::int64_t run, const Run&) {
            multiply_tile(level, x,
                          DotTile<C>{sink.directions + index * sink.count * kTileArea<C>, sink.count,
                                     sink.sums.lanes_of(lanes, run)});
        }
    };

    void begin_slab(std::int64_t runs, std::int64_t tasks) { sums.begin_slab(runs, tasks); }
    Task begin_task(std::int64_t runs) { return {*this, sums.lanes(runs)}; }
    void end_task(std::int64_t task, const Task& results) { sums.end_task(task, results.lanes); }
    void end_slab(const Run* runs) {
        sums.end_slab([&](std::int64_t r) { return runs[r].sample; });
    }
};

// sums[n] += |G_n|^2.
template <class C>
struct NormSink {
    C* unfinished;  // untouched if no sample has more than one run
    SampleSums<C>& sums;

    struct Task {
        const NormSink& sink;
        std::vector<double> lanes;

        void tile(Level level, const TileOperands<C>& x, std::int64_t index, std::int64_t run, const Run& which) {
            C* partial = sink.unfinished + index * kTileArea<C>;
            if (which.ends)
                multiply_tile(level, x, NormTile<C>{which.starts ? nullptr : partial, sink.sums.lanes_of(lanes, run)});
            else if (which.starts)
                multiply_tile(level, x, StoreTile<C>{partial});
            else
                multiply_tile(level, x, AddTile<C>{partial});
        }
    };

    void begin_slab(std::int64_t runs, std::int64_t tasks) { sums.begin_slab(runs, tasks); }
    Task begin_task(std::int64_t runs) { return {*this, sums.lanes(runs)}; }
    void end_task(std::int64_t task, const Task& results) { sums.end_task(task, results.lanes); }
    void end_slab(const Run* runs) {
        sums.end_slab([&](std::int64_t r) { return runs[r].sample; });
    }
};

// Tiles [tile] of a weight back to its own layout, [groups * rows][columns].
template <class C>
void unpack_tiles(const C* tiles, const LayerShape& shape, C* out, const ParallelFor& parallel_for) {
    const Grid<C> grid(shape);
    const bool in_order = keeps_order(shape);
    parallel_for(grid.groups * grid.row_tiles(), [&](std::int64_t task) {
        const std::int64_t group = task / grid.row_tiles(), j = task % grid.row_tiles();
        for (std::int64_t row = j * kTileRows; row < std::min((j + 1) * kTileRows, grid.rows); ++row) {
            C* target = out + (group * grid.rows + row) * grid.columns;
            for (std::int64_t first = 0; first < grid.columns; first += kTileColumns<C>) {
                const C* source = tiles + grid.tile(group, first / kTileColumns<C>, j) * kTileArea<C> +
                                  row % kTileRows * kTileColumns<C>;
                const std::int64_t columns = std::min(kTileColumns<C>, grid.columns - first);
                if (in_order)
                    std::copy_n(source, columns, target + first);
                else
                    for (std::int64_t i = 0; i < columns; ++i) target[shape.weight_index[first + i]] = source[i];
            }
        }
    });
}

// Directions, each [groups * rows][columns], to tiles [tile][direction], zero beyond the edges.
template <class C>
AlignedBuffer<C> pack_tiles(Directions<C> directions, const LayerShape& shape, const ParallelFor& parallel_for) {
    const Grid<C> grid(shape);
    const auto count = static_cast<std::int64_t>(directions.size());
    auto tiles = aligned_buffer<C>(grid.tiles() * count * kTileArea<C>);
    const bool in_order = keeps_order(shape);
    parallel_for(grid.tiles(), [&](std::int64_t tile) {
        const auto [group, first, first_row] = grid.begin_of(tile);
        const std::int64_t rows = std::min(kTileRows, grid.rows - first_row);
        const std::int64_t columns = std::min(kTileColumns<C>, grid.columns - first);
        C* out = tiles.get() + tile * count * kTileArea<C>;
        std::memset(out, 0, static_cast<std::size_t>(count * kTileArea<C>) * sizeof(C));
        for (std::int64_t k = 0; k < count; ++k)
            for (std::int64_t row = 0; row < rows; ++row) {
                const C* source = directions[k] + (group * grid.rows + first_row + row) * grid.columns;
                C* target = out + k * kTileArea<C> + row * kTileColumns<C>;
                if (in_order)
                    std::copy_n(source + first, columns, target);
                else
                    for (std::int64_t i = 0; i < columns; ++i) target[i] = source[shape.weight_index[first + i]];
            }
    });
    return tiles;
}

// Diagonal and products from planes (fisher_planes.h), with sums over groups in order.

// out = sum_n G_n * G_n.
template <class T>
void plane_diagonal(const LayerBatch<T>& layer, const LayerShape& shape, Compute<T>* out,
                    const ParallelFor& parallel_for) {
    plane_gradients(
        layer, shape,
        [&](std::int64_t, std::int64_t group, const std::vector<Compute<T>>& gradient) {
            Compute<T>* own = out + group * static_cast<std::int64_t>(gradient.size());
            for (std::size_t i = 0; i < gradient.size(); ++i) own[i] += gradient[i] * gradient[i];
        },
        parallel_for);
}

// out [samples, number of directions] = <G_n, D_k>, or [samples] = |G_n|^2 without directions.
template <class T>
void plane_products(const LayerBatch<T>& layer, const LayerShape& shape, Directions<Compute<T>> directions,
                    Compute<T>* out, const ParallelFor& parallel_for) {
    const std::int64_t area = shape.rows * shape.columns;
    const std::int64_t count = std::max<std::int64_t>(static_cast<std::int64_t>(directions.size()), 1);
    std::vector<double> sums(static_cast<std::size_t>(shape.groups * shape.samples * count));
    plane_gradients(
        layer, shape,
        [&](std::int64_t n, std::int64_t group, const std::vector<Compute<T>>& gradient) {
            for (std::int64_t k = 0; k < count; ++k) {
                const Compute<T>* other = directions.empty() ? gradient.data() : directions[k] + group * area;
                double sum = 0;
                for (std::int64_t i = 0; i < area; ++i) sum += static_cast<double>(gradient[i]) * other[i];
                sums[(group * shape.samples + n) * count + k] = sum;
            }
        },
        parallel_for);
    for (std::int64_t i = 0; i < shape.samples * count; ++i) {
        double sum = 0;
        for (std::int64_t group = 0; group < shape.groups; ++group) sum += sums[group * shape.samples * count + i];
        out[i] = static_cast<Compute<T>>(sum);
    }
}

bool is_empty(const LayerShape& shape) {
    return shape.samples == 0 || shape.positions == 0 || shape.rows == 0 || shape.columns == 0;
}

}  // namespace

template <class T>
void fisher_diagonal(const LayerBatch<T>& layer, Compute<T>* out, const ParallelFor& parallel_for) {
    using C = Compute<T>;
    LayerShape shape(layer);
    const bool planes = tiles_are_mostly_empty<C>(shape);
    if (planes || is_empty(shape)) std::fill_n(out, shape.groups * shape.rows * shape.columns, C(0));
    if (is_empty(shape)) return;
    if (planes) return plane_diagonal(layer, shape, out, parallel_for);
    with_operands(layer, [&](auto& a, const auto& b) {
        if (shape.positions == 1) {  // (B * B)^T (A * A): samples take the place of positions
            auto inputs = all_samples_as_one(a, shape.samples, parallel_for);
            auto outputs = b;
            const auto rows = all_samples_as_one(outputs, shape.samples, parallel_for);
            std::swap(shape.samples, shape.positions);
            SumSink<C> sink{out, shape};
            gradient_tiles<C>(inputs, rows, shape, true, sink, parallel_for);
        } else {
            const std::int64_t area = Grid<C>(shape).tiles() * kTileArea<C>;
            const auto total = zeros<C>(area);
            const auto unfinished = aligned_buffer<C>(shape.positions > kPositions ? area : 0);
            DiagonalSink<C> sink{total.get(), unfinished.get()};
            gradient_tiles<C>(a, b, shape, false, sink, parallel_for);
            unpack_tiles(total.get(), shape, out, parallel_for);
        }
    });
}

template <class T>
void fisher_projection(const LayerBatch<T>& layer, Directions<Compute<T>> directions, Compute<T>* out,
                       const ParallelFor& parallel_for) {
    using C = Compute<T>;
    const LayerShape shape(layer);
    const auto count = static_cast<std::int64_t>(directions.size());
    std::fill_n(out, shape.samples * count, C(0));
    if (is_empty(shape) || count == 0) return;
    if (tiles_are_mostly_empty<C>(shape)) return plane_products(layer, shape, directions, out, parallel_for);
    with_operands(layer, [&](auto& a, const auto& b) {
        if (contraction_is_cheaper(shape.positions, count)) {
            auto outputs = b;
            contract<C>(all_samples_as_one(a, shape.samples, parallel_for),
                        all_samples_as_one(outputs, shape.samples, parallel_for), shape, directions, out, parallel_for);
        } else {
            const auto tiles = pack_tiles(directions, shape, parallel_for);
            SampleSums<C> sums(shape.samples, count);
            ProjectionSink<C> sink{tiles.get(), count, sums};
            gradient_tiles<C>(a, b, shape, false, sink, parallel_for);
            sums.write(out);
        }
    });
}

template <class T>
void grad_norm(const LayerBatch<T>& layer, Compute<T>* out, const ParallelFor& parallel_for) {
    using C = Compute<T>;
    const LayerShape shape(layer);
    std::fill_n(out, shape.samples, C(0));
    if (is_empty(shape)) return;
    if (tiles_are_mostly_empty<C>(shape)) return plane_products(layer, shape, Directions<C>(), out, parallel_for);
    with_operands(layer, [&](auto& a, const auto& b) {
        if (ghost_norm_is_cheaper(shape)) return ghost_norm<C>(a, b, shape, out, parallel_for);
        const std::int64_t area = Grid<C>(shape).tiles() * kTileArea<C>;
        const auto unfinished = aligned_buffer<C>(shape.positions > kPositions ? area : 0);
        SampleSums<C> sums(shape.samples, 1);
        NormSink<C> sink{unfinished.get(), sums};
        gradient_tiles<C>(a, b, shape, false, sink, parallel_for);
        sums.write(out);
    });
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                                  \
    template void fisher_diagonal(const LayerBatch<T>&, Compute<T>*, const ParallelFor&);                           \
    template void fisher_projection(const LayerBatch<T>&, Directions<Compute<T>>, Compute<T>*, const ParallelFor&); \
    template void grad_norm(const LayerBatch<T>&, Compute<T>*, const ParallelFor&);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cpu
