"""Which upstream tensor a target tensor takes after: by name, and by rescaled position where depths differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Union

Shape = tuple[int, ...]
Tree = dict[str, Union["Tree", Shape]]  # Union: evaluated at run time, where 3.10 knows no forward reference with |

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the prefixes that wrappers put before every one of them, each with the name it had."""
    result = {name: name for name in names}
    while result:
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in result)), None)
        if prefix is None:
            break
        result = {name.removeprefix(prefix): original for name, original in result.items()}
    return result


def match_names(target: Mapping[str, Shape], upstream: Mapping[str, Shape]) -> dict[str, str]:
    """Pair the tensors of two models of one family.

    Parts with the same name are paired. Numbered parts (the elements of a ``ModuleList`` or ``Sequential``) are paired
    by number where both models have the same numbers; otherwise by position, in blocks:

    - a block is a numbered part with a weight of two or more dimensions, and the ones without that follow it (the
      norm after a convolution in a plain ``Sequential``);
    - blocks are of one kind if they hold the same names, and the same of their weights are square: a block that
      changes the width is of another kind than one that keeps it;
    - kinds that occur equally often in both models, in the same order, are paired in that order and cut the
      sequence into segments; in a segment the i-th of n target blocks of a kind is paired with upstream block
      round(i (m-1)/(n-1)) of the m of that kind: an even choice if m > n, repeated blocks if m < n.

    Args:
        target: Shape by name.
        upstream: Shape by name.

    Returns:
        Upstream name by target name, for the tensors that have one; an upstream tensor may serve several.
    """
    pairs: dict[str, str] = {}
    _match(_tree(target), _tree(upstream), "", "", pairs)
    return pairs


def _tree(shapes: Mapping[str, Shape]) -> Tree:
    root: Tree = {}
    for name, shape in shapes.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):  # a tensor and a module of one name cannot both be
                break
            node = child
        else:
            node[last] = shape
    return root


def _match(target: Tree, upstream: Tree, target_prefix: str, upstream_prefix: str, pairs: dict[str, str]) -> None:
    numbers = [sorted((key for key in tree if key.isdecimal()), key=int) for tree in (target, upstream)]
    same = {key: key for key in target if key in upstream}
    if numbers[0] != numbers[1]:
        same = {key: key for key in same if not key.isdecimal()}
        same |= _match_blocks(target, upstream, *numbers)
    for key, other in same.items():
        mine, theirs = target[key], upstream[other]
        if isinstance(mine, dict) and isinstance(theirs, dict):
            _match(mine, theirs, f"{target_prefix}{key}.", f"{upstream_prefix}{other}.", pairs)
        elif not isinstance(mine, dict) and not isinstance(theirs, dict):
            pairs[target_prefix + key] = upstream_prefix + other


def _match_blocks(target: Tree, upstream: Tree, mine: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Upstream number by target number, for two sequences of numbered parts that differ."""
    blocks = [_blocks(target, mine), _blocks(upstream, theirs)]
    kinds = [[_kind(tree, block) for block in part] for tree, part in zip((target, upstream), blocks)]
    counts = [Counter(part) for part in kinds]
    equal = {kind for kind, count in counts[0].items() if counts[1][kind] == count}
    anchors = [[i for i, kind in enumerate(part) if kind in equal] for part in kinds]
    if [kinds[0][i] for i in anchors[0]] != [kinds[1][i] for i in anchors[1]]:
        anchors = [[], []]
    paired = dict(zip(*anchors))
    edges = [[-1, *part, len(kind)] for part, kind in zip(anchors, kinds)]
    for start, stop, other_start, other_stop in zip(edges[0], edges[0][1:], edges[1], edges[1][1:]):
        for kind in dict.fromkeys(kinds[0][start + 1 : stop]):
            here = [i for i in range(start + 1, stop) if kinds[0][i] == kind]
            there = [i for i in range(other_start + 1, other_stop) if kinds[1][i] == kind]
            paired |= {i: there[_rescale(k, len(here), len(there))] for k, i in enumerate(here) if there}
    return {a: b for i, j in paired.items() for a, b in zip(blocks[0][i], blocks[1][j])}


def _rescale(index: int, length: int, other: int) -> int:
    """round(index (other-1)/(length-1)), halves up."""
    return (2 * index * (other - 1) + length - 1) // (2 * (length - 1)) if length > 1 else 0


def _blocks(tree: Tree, numbers: Sequence[str]) -> list[list[str]]:
    blocks: list[list[str]] = []
    for number in numbers:
        heavy = any(len(shape) > 1 for _, shape in _leaves(tree[number]))
        if heavy or not blocks:
            blocks.append([number])
        else:
            blocks[-1].append(number)
    return blocks


def _kind(tree: Tree, block: Sequence[str]) -> frozenset[tuple[int, str, int, bool]]:
    return frozenset(
        (position, name, len(shape), len(shape) > 1 and shape[0] == shape[1])
        for position, number in enumerate(block)
        for name, shape in _leaves(tree[number])
    )


def _leaves(node: Tree | Shape, prefix: str = "") -> list[tuple[str, Shape]]:
    if not isinstance(node, dict):
        return [(prefix, node)]
    return [leaf for key, child in node.items() for leaf in _leaves(child, f"{prefix}.{key}")]
