"""Mistakes to put into the kernels of a layer's Fisher information, and the runs that notice them."""

from __future__ import annotations

from fisher_emulator import SOURCES, WIDE_PROJECTION, FisherEmulator
from fisher_reference import expected
from mutants import Case, Family
from test_cuda_fisher import conv_layer, linear_layer, unused_inputs_layer

FISHER_CHANGES = (
    ("parts: one more", "device.h", "p < end; ++p) sum += part(p)", "p <= end; ++p) sum += part(p)"),
    ("parts: a stretch missing", "device.h", "w < kSumWarps && warp == 0", "w < kSumWarps - 1 && warp == 0"),
    ("parts: an element too many", "fisher.cu", "kWarp && index < size)", "kWarp && index <= size)"),
    ("vectors: a load beyond the width", "device.h", "if (v < width) vectors[i]", "if (v <= width) vectors[i]"),
    ("float: the low half of the left lost", "fragments.h", "mma_tf32(sums, left.low, high);", ""),
    ("float: the low half of the right lost", "fragments.h", "mma_tf32(sums, left.high, low);", ""),
    (
        "fragments: the halves of the right swapped",
        "fragments.h",
        "right.high[2 + h]}, low",
        "right.high[3 - h]}, low",
    ),
    ("positions: one more", "fisher_tiles.h", "position(i) < height ?", "position(i) <= height ?"),
    ("squares: a sample more", "fisher_tiles.h", "row(i) < height ? convert", "row(i) <= height ? convert"),
    (
        "squares: not of all samples",
        "fisher.cu",
        "squares(layer.inputs), ceil_div(samples, kDepth)",
        "squares(layer.inputs), samples / kDepth",
    ),
    ("one position: a sample too many", "fisher.cu", "if (sample >= x.samples) return;", ""),
    ("one position: a stretch of columns missing", "fisher.cu", "first += kLoads * kWarp *", "first += 5 * kWarp *"),
    ("squares: sums begun anew", "fisher.cu", "!std::is_same_v<Use, Sum> && next_sample", "next_sample"),
    ("positions: a channel more", "device.h", "min(size - begin,", "min(size - begin + 1,"),
    ("patches: quotients rounded down", "fisher_tiles.h", "+ value - 1) / value)", ") / value)"),
    ("patches: a position more", "fisher_tiles.h", "if (position >= positions)", "if (position > positions)"),
    ("patches: a column more", "fisher_tiles.h", "if (index >= columns)", "if (index > columns)"),
    (
        "patches: beyond the input",
        "fisher_tiles.h",
        "static_cast<unsigned>(index) <",
        "static_cast<unsigned>(index) <=",
    ),
    ("patches: the padding forgotten", "fisher_tiles.h", "* stride.height - padding.height", "* stride.height"),
    (
        "patches: the weight in the order of the columns",
        "fisher_tiles.h",
        "return c % channels * (kernel.depth * kernel.height * kernel.width) + c / channels;",
        "return c;",
    ),
    ("patches: the table of the wrong operand", "fisher.cu", "tables + Shape::kRows : nullptr", "tables : nullptr"),
    ("a slab too early", "fisher.cu", "right.store(right_slab(turn ^ 1))", "right.store(right_slab(turn))"),
    ("a sample too few", "fisher.cu", "sample < end; turn ^= 1", "sample < end - 1; turn ^= 1"),
    ("a position too few", "fisher.cu", "next_position >= x.left.positions", "next_position >= x.left.positions - 1"),
    ("an element beyond the matrix", "fisher_plan.h", "c < x.columns() ?", "c <= x.columns() ?"),
    ("a row beyond the matrix", "fisher_plan.h", "r < x.rows() &&", "r <= x.rows() &&"),
    (
        "one set of warps' sums for two samples",
        "fisher_products.h",
        "warps[(sample % 2 * kTileWarps + warp)",
        "warps[(sample % 1 * kTileWarps + warp)",
    ),
    (
        "shared memory too small",
        "fisher.cu",
        "kSlabs + kTables + sums(chunk) +",
        "kSlabs + kTables + sums(chunk) - 16 +",
    ),
    ("a tile's sums replace those before", "fisher_products.h", "first_tile ? sum :", "true ? sum :"),
    ("a direction too many", "fisher.cu", "min(plan.chunk, count - first_direction)", "min(plan.chunk, count)"),
    ("rows: beyond the last", "fisher_rows.h", "x.row(min(first + Base::row(i), last))", "x.row(first + Base::row(i))"),
    (
        "rows: beyond the last window",
        "fisher_rows.h",
        "row = min(first + Base::row(i), last)",
        "row = first + Base::row(i)",
    ),
    ("rows: a window of the first sample", "fisher_rows.h", "row / x.positions * x.sample_stride +", ""),
    ("rows: the first group", "fisher_rows.h", "last)) + group * x.columns +", "last)) +"),
    (
        "ghost: pairs of different samples",
        "fisher_positions.cu",
        "position / positions == static_cast<int>(column) / positions",
        "true",
    ),
    ("ghost: tiles above the diagonal once", "fisher_positions.cu", "? 2 * sum : sum", "? sum : sum"),
    (
        "ghost: the diagonal for all tiles",
        "fisher_positions.cu",
        "place.origin + place.first_column, last",
        "place.origin + place.first_row, last",
    ),
    (
        "ghost: the slab of nobody",
        "fisher_positions.cu",
        "return same ? left_slab(number) :",
        "return false ? left_slab(number) :",
    ),
    ("ghost: the first product goes on", "fisher_positions.cu", "                    sums[m][n][i] = 0;", ""),
    (
        "contraction: a row too many",
        "fisher_positions.cu",
        "} else if (column < x.rows()) {",
        "} else if (column <= x.rows()) {",
    ),
    (
        "contraction: the first group",
        "fisher_positions.cu",
        "* x.groups + place.group) * x.rows()",
        "* x.groups) * x.rows()",
    ),
    (
        "contraction: the first direction",
        "fisher_positions.cu",
        "(std::int64_t{place.direction} *",
        "(std::int64_t{0} *",
    ),
    (
        "rows: a warp across missing",
        "fisher_positions.cu",
        "across < Shape::kWarpsAcross; ++across",
        "across < Shape::kWarpsAcross - 1; ++across",
    ),
    (
        "rows: the last unit missing",
        "fisher_positions.cu",
        "units(ceil_div(samples, packed))",
        "units(samples / packed)",
    ),
    ("rows: shared memory too small", "fisher_positions.cu", "kSlabs + kSums + kKept;", "kSlabs + kSums + kKept - 16;"),
)


def fisher_cases() -> list[Case]:
    cases = []
    linear = linear_layer((3, 18, 66, 130))
    conv = conv_layer(
        2, (4, 6), (1, 5, 6), (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2), groups=2
    )
    for function, layer, multiprocessors in [
        ("tile_norm", linear_layer((3, 2, 65, 3)), 1),
        ("diagonal", linear, 1),
        ("diagonal", linear, 16),
        ("diagonal", linear_layer((19, 1, 5, 3)), 1),
        ("norm", linear_layer((3, 1, 5, 700)), 1),
        ("tile_projection", linear_layer((4, 2, 193, 130), count=2), 1),
        ("tile_projection", linear_layer((2, 3, 5, 6), count=9), 4),
        ("tile_norm", linear_layer((2, 17, 9, 7), inputs={"row_padding": 1}), 4),
        ("diagonal", conv, 1),
        ("tile_projection", conv, 4),
        ("tile_norm", conv_layer(2, (3, 2), (1, 1, 40), (1, 1, 25), padding=(0, 0, 3)), 1),
        ("tile_norm", unused_inputs_layer(), 1),
        ("tile_norm", linear_layer((2, 2, 7 * 64 + 1, 3)), 4),
        ("ghost_norm", linear_layer((35, 2, 18, 40), groups=2, inputs={"row_padding": 1}), 4),
        ("ghost_norm", linear_layer((1, 70, 20, 3)), 4),
        ("ghost_norm", conv, 4),
        ("contraction", linear_layer((50, 3, 36, 140), groups=2, count=3), 4),
    ]:

        def run(emulator, order, function=function, layer=layer, multiprocessors=multiprocessors):
            return emulator.run(function, layer, multiprocessors=multiprocessors, order=order)

        cases.append(Case(f"{function} {layer.weight_shape}", run, expected(function, layer)))
    return cases


FRAGMENT_CHANGES = (
    ("16 bits: the halves of the channels swapped", "fragments.h", "channel + h * 8,", "channel + 8 - h * 8,"),
    (
        "16 bits: halves of channels for those of positions",
        "fragments.h",
        "h = kRight ? high : low, j = kRight ? low : high",
        "h = kRight ? low : high, j = kRight ? high : low",
    ),
    (
        "16 bits: halves of rows for those of channels",
        "fragments.h",
        "channel + h * 8 + line, position + j * 8)",
        "channel + j * 8 + line, position + h * 8)",
    ),
    ("16 bits: the other word of the right", "fragments.h", "right.words[2 * h + 1]", "right.words[3 - 2 * h]"),
)


def fragment_cases() -> list[Case]:
    cases = []
    for function, layer in (
        ("diagonal", linear_layer((2, 19, 21, 18), "bfloat16")),
        ("diagonal", conv_layer(2, (3, 2), (1, 4, 5), (1, 3, 3), "bfloat16")),
        ("ghost_norm", linear_layer((2, 19, 21, 18), "bfloat16")),
    ):

        def run(emulator, order, function=function, layer=layer):
            return emulator.run(function, layer, order=order)

        cases.append(Case(f"{function} {layer.weight_shape}", run, expected(function, layer)))
    return cases


WIDE_CHANGES = (
    ("wide: a slot fewer", "fisher_diagonal.cu", "kRightSlots = kAhead + 1", "kRightSlots = kAhead"),
    (
        "wide: a sample fewer side by side",
        "fisher_diagonal.cu",
        "ceil_div(kRightSlots, slabs)",
        "ceil_div(kAhead, slabs)",
    ),
    ("wide: a slab not waited for", "fisher_diagonal.cu", "wait_copies<kAhead - 1>", "wait_copies<kAhead>"),
    (
        "wide: the last slabs not counted",
        "fisher_diagonal.cu",
        "        commit_copies();",
        "        if (next.sample < end) commit_copies();",
    ),
    (
        "wide: the next sample's slabs over this one's",
        "fisher_diagonal.cu",
        "first_slot + slabs < left_slots ?",
        "false ?",
    ),
    ("wide: the first half twice", "fisher_diagonal.cu", "position, next.half)", "position, 0)"),
    (
        "wide: the second half not there",
        "fisher_diagonal.cu",
        "first_column > Half::kColumns",
        "first_column > Half::kColumns + 8",
    ),
    (
        "wide: a step not there",
        "fisher_diagonal.cu",
        "Half::kDepth > Half::kStepDepth",
        "Half::kDepth > Half::kStepDepth + 1",
    ),
    (
        "wide: the left operand where the first sample has it",
        "fisher_diagonal.cu",
        "        first_slot = following(first_slot);\n    }",
        "    }",
    ),
    ("wide: the left operand of the first sample", "fisher_diagonal.cu", "left.next_sample();", ""),
    ("wide: the second half into the first", "fisher_diagonal.cu", "add_half(squares[1])", "add_half(squares[0])"),
    ("wide: written to the first half", "fisher_plan.h", "part * Shape::kColumns +", ""),
    ("wide: tiles of one half", "fisher_plan.h", "kParts * Shape::kColumns)", "Shape::kColumns)"),
    ("wide: shared memory too small", "fisher_diagonal.cu", "* sizeof(Table) : 0)", "* sizeof(Table) : -32)"),
    ("wide: a position more", "fisher_copies.h", "Base::position(i) < height", "Base::position(i) <= height"),
    ("wide: a column more", "fisher_copies.h", "part * kEdge < width", "part * kEdge <= width"),
    ("wide: columns of the first half", "fisher_copies.h", "x.position_stride + part * kEdge)", "x.position_stride)"),
    ("wide: windows of the first half", "fisher_copies.h", "table[part * kEdge + Base", "table[Base"),
    ("wide: corners of the first slab", "fisher_copies.h", "table[kColumns + position +", "table[kColumns +"),
    (
        "wide: the table over the other's",
        "fisher_diagonal.cu",
        "left_table + Half::kRows + slabs * Half::kDepth",
        "left_table + Half::kRows",
    ),
    ("held: a slot fewer", "fisher_projection.cu", "kSlots = kAhead + 1", "kSlots = kAhead"),
    ("held: a pair not waited for", "fisher_projection.cu", "wait_copies<kAhead - 1>", "wait_copies<kAhead>"),
    (
        "held: the last pairs not counted",
        "fisher_projection.cu",
        "            commit_copies();",
        "            if (next.sample < end) commit_copies();",
    ),
    (
        "held: a position too few",
        "fisher_projection.cu",
        "next.position >= positions",
        "next.position >= positions - 1",
    ),
    ("held: the right operand of the first sample", "fisher_projection.cu", "right.next_sample();", ""),
    ("held: one direction for both in registers", "fisher_projection.cu", "if (k == j)", "if (k > j || k == 0)"),
    ("held: a direction over another", "fisher_projection.cu", "k < kOwn ? 0 : k - kOwn", "0"),
    ("held: the first direction in shared memory", "fisher_projection.cu", "held, k - kOwn)", "held, 0)"),
    (
        "held: a direction too many",
        "fisher_projection.cu",
        "min(plan.chunk, count - first_direction)",
        "min(plan.chunk, count)",
    ),
    (
        "held: the directions of the first chunk",
        "fisher_projection.cu",
        "(first_direction + k) * x.weights()",
        "k * x.weights()",
    ),
    ("held: parts of the first slot", "fisher_projection.cu", "slot * x.samples * count + first", "first"),
    (
        "held: the table over the other's",
        "fisher_projection.cu",
        "left_table + Shape::kRows + padded",
        "left_table + Shape::kRows",
    ),
    ("held: no room for sums", "fisher_projection.cu", "ProductSums<float>::shared_bytes(chunk) +", "0 +"),
    (
        "held: no room for directions",
        "fisher_projection.cu",
        "in_shared(chunk) * kDirection",
        "(in_shared(chunk) - 1) * kDirection",
    ),
)


def wide_cases() -> list[Case]:
    cases = []
    conv = conv_layer(3, (16, 24), (1, 6, 7), (1, 3, 3), "bfloat16", count=5, padding=(0, 1, 1))
    for function, layer, multiprocessors in (
        ("wide_diagonal", linear_layer((5, 5, 8, 8), "bfloat16"), 1),
        ("wide_diagonal", linear_layer((6, 17, 136, 16), "bfloat16"), 1),
        ("wide_diagonal", linear_layer((2, 33, 512 + 8, 16), "bfloat16"), 4),
        ("wide_diagonal", linear_layer((3, 113, 256, 8), "bfloat16"), 1),
        ("wide_diagonal", linear_layer((3, 160, 8, 136), "bfloat16"), 1),
        ("wide_diagonal", conv, 1),
        ("wide_diagonal", conv_layer(2, (16, 16), (1, 7, 8), (1, 3, 3), "bfloat16", groups=2), 1),
        (WIDE_PROJECTION, linear_layer((5, 17, 136, 16), "bfloat16", count=9), 1),
        (WIDE_PROJECTION, linear_layer((3, 80, 4 * 128 + 8, 136), "bfloat16", count=2), 1),
        (WIDE_PROJECTION, conv, 1),
    ):

        def run(emulator, order, function=function, layer=layer, multiprocessors=multiprocessors):
            return emulator.run(function, layer, multiprocessors=multiprocessors, order=order)

        cases.append(Case(f"{function} {layer.weight_shape}", run, expected(function, layer)))
    return cases


FISHER_FAMILIES = {
    "fisher": Family(
        SOURCES,
        ("fisher.cu", "fisher_positions.cu", "fragments.h", "device.h"),
        FISHER_CHANGES,
        FisherEmulator,
        fisher_cases,
    ),
    "fragments": Family(SOURCES, (), FRAGMENT_CHANGES, FisherEmulator, fragment_cases, "bfloat16"),
    "wide": Family(
        SOURCES,
        ("fisher_diagonal.cu", "fisher_projection.cu"),
        WIDE_CHANGES,
        FisherEmulator,
        wide_cases,
        "bfloat16",
    ),
}
