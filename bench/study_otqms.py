"""OTQMS and its rivals on few-shot targets: accuracy, samples and seconds of every strategy, over targets and seeds.

    python bench/study_otqms.py --data digits_multi.npz                            # every domain in turn as the target
    python bench/study_otqms.py --data digits_multi.npz --targets usps,street --seeds 0,1 --strategies recommended
    python bench/study_otqms.py --data digits_multi.npz --unrelated 4              # with sources that can only hurt
    python bench/study_otqms.py --data pacs_img64.npz --image-size 32              # images made smaller, for speed
    python bench/study_otqms.py --table                                            # only the tables of what is there

Images go to the built-in convolutional network. Feature vectors get a linear head and the usual preparation of word
counts: every row is divided by its sum, every feature then standardised over its domain (labels are not looked at; the
target's test inputs are).

Each training is written down as it ends, in a journal per data set, target and number of shots; the same command goes
on where it was stopped, and several may run at once on different targets. Tables and pictures are of all journals.
One thread, so that the results are those of any machine with the same vector instructions; with others sums round
differently, and single trainings end elsewhere within the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from run import ROOT, environment
from torch import nn
from torch.nn import functional as F

from transferops._figures import DPI, new_figure, plain_axes
from transferops.adapt.journal import Journal
from transferops.data import Domain, DomainBundle, few_shot_split, load_bundle
from transferops.otqms import OTQMS, FeatureNet, TrainingOptions, network_for
from transferops.otqms.pool import Pool
from transferops.otqms.strategies import expand
from transferops.otqms.training import evaluate

JOURNALS = ROOT / "bench" / "results" / "study_otqms"
BASELINES = ("target-only", "all-sources", "pooled-then-fine-tuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an .npz file or a folder domain/class/image")
    parser.add_argument("--image-size", type=int, help="resize images to so many pixels square")
    parser.add_argument(
        "--epochs", type=int, default=TrainingOptions.epochs, help="of phases without a number of their own"
    )
    parser.add_argument("--targets", help="names, separated by commas; all domains if left out")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--strategies", default="target-only,all-sources,pooled-then-fine-tuned,recommended")
    parser.add_argument("--unrelated", type=int, default=0, help="so many sources that can only hurt")
    parser.add_argument("--beside", action="store_true", help="other work runs on this machine: show no seconds")
    parser.add_argument("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    JOURNALS.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        bundle, data = prepared(Path(arguments.data), arguments.image_size)
        options = TrainingOptions(epochs=arguments.epochs)
        if options.epochs != TrainingOptions.epochs:
            data += f"-{options.epochs}-epochs"
        strategies = expand(arguments.strategies.split(","))
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        for seed in seeds:
            for target in arguments.targets.split(",") if arguments.targets else bundle.domains:
                train(
                    bundle,
                    data,
                    target,
                    seed,
                    arguments.shots,
                    strategies,
                    arguments.unrelated,
                    options,
                    arguments.beside,
                )
    write_tables()


def prepared(path: Path, image_size: int | None) -> tuple[DomainBundle, str]:
    """The domains as they are trained on, and what they are called."""
    if path.is_dir():
        return load_bundle(path, image_size), path.stem
    bundle, name = load_bundle(path), path.stem
    if len(bundle.sample_shape) == 1:
        change = standardized
    elif image_size is not None:
        change, name = partial(resized, size=image_size), f"{name}-{image_size}-pixels"
    else:
        return bundle, name
    domains = {key: Domain(key, change(domain.inputs), domain.labels) for key, domain in bundle.domains.items()}
    return DomainBundle(domains, bundle.class_names), name


def standardized(counts: torch.Tensor) -> torch.Tensor:
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return (shares - shares.mean(0)) / shares.std(0).clamp_min(1e-6)


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def network(bundle: DomainBundle) -> nn.Module:
    shape = bundle.sample_shape
    return FeatureNet(shape[0], bundle.classes, hidden=0) if len(shape) == 1 else network_for(shape, bundle.classes)


def train(
    bundle: DomainBundle,
    data: str,
    target: str,
    seed: int,
    shots: int,
    strategies: Sequence[str],
    unrelated: int,
    options: TrainingOptions,
    beside: bool,
) -> None:
    """What is not in the journal yet."""
    name = f"{data}-{target}-{shots}-shots" + (f"-{unrelated}-unrelated" if unrelated else "")
    about = {"data": data, "target": target, "shots": shots, "unrelated": unrelated}
    journal = Journal(JOURNALS / f"{name}.jsonl", about)
    done = {(row["strategy"], row["seed"]) for row in journal.results}
    missing = [strategy for strategy in strategies if (strategy, seed) not in done]
    if not missing:
        return
    domain, sources = bundle.choose(target)
    sources = [*sources, *islands(sources, unrelated, seed)]
    split = few_shot_split(domain, shots, seed=seed)
    trainer = OTQMS(
        partial(network, bundle),
        split.train,
        {source.name: source for source in sources},
        validation=split.validation,
        options=options,
        seed=seed,
    )
    test = Pool({"test": split.test}, trainer.device)
    for strategy in missing:
        run = trainer.fit(strategy)
        taken = run.allocated
        accuracy = evaluate(run.model, test).accuracy
        journal.add(
            {
                "strategy": strategy,
                "seed": seed,
                "accuracy": accuracy,
                "samples_per_epoch": run.samples_per_epoch,
                "epochs": len(run.epochs),
                "seconds": run.seconds,
                "allocation_seconds": run.allocation_seconds,
                "preparation_seconds": run.source_model_seconds,
                "beside_other_work": beside,
                "quantities": taken.quantities,
                "shares": taken.shares,
                **environment(),
            }
        )
        print(f"{name} seed {seed} {strategy}: {100 * accuracy:.1f} % in {run.seconds:.0f} s", flush=True)


UNRELATED = ("shuffled labels", "shifted labels", "noise", "one class for all")


def islands(sources: Sequence[Domain], count: int, seed: int) -> list[Domain]:
    """Sources that can only hurt, of the size of an average source: of every kind one after the other."""
    generator = torch.Generator().manual_seed(seed)
    whole = sources[seed % len(sources)]
    size = sum(len(source) for source in sources) // len(sources)
    index = torch.randint(len(whole), (size,), generator=generator)
    inputs, labels = whole.inputs[index], whole.labels[index]
    classes = int(labels.max()) + 1
    noise = torch.randn(inputs.shape, generator=generator) * inputs.std() + inputs.mean()
    contents = (
        (inputs, labels[torch.randperm(size, generator=generator)]),
        (inputs, (labels + 1) % classes),
        (noise, labels),
        (inputs, torch.full_like(labels, seed % classes)),
    )
    if count > len(UNRELATED):
        raise SystemExit(f"unrelated: expected at most {len(UNRELATED)}, got {count}")
    return [Domain(name, *content) for name, content in zip(UNRELATED[:count], contents)]


def journals() -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for path in sorted(JOURNALS.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        yield lines[0]["about"], lines[1:]


def write_tables() -> None:
    """study_otqms.md, .json and a picture per data set, from all journals."""
    groups: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = {}
    for about, rows in journals():
        key = about["data"], about["shots"], about["unrelated"]
        groups.setdefault(key, {})[about["target"]] = rows
    sections, document = [], []
    for (data, shots, unrelated), by_target in groups.items():
        summary = summarize(by_target)
        document.append({"data": data, "shots": shots, "unrelated": unrelated, **summary})
        title = f"{data}, {shots} shots per class" + (f", with {unrelated} unrelated sources" if unrelated else "")
        sections.append(f"## {title}\n\n{as_markdown(summary)}")
        suffix = f"-{unrelated}-unrelated" if unrelated else ""
        plot(summary, title, JOURNALS.parent / f"study_otqms-{data}-{shots}-shots{suffix}.png")
    head = (
        "# OTQMS and its rivals\n\n"
        "Test accuracy in %, mean over the seeds there are; then the mean over the targets, of the seeds that every "
        "target has, its standard error over them (of the targets' means). Strategies with every target and seed stand "
        "first. Unrelated: their share of the loss. One "
        "thread; seconds of the fastest training (others ran beside other work), its preparation included; - where "
        "none is known to have had the machine to itself.\n"
    )
    (JOURNALS.parent / "study_otqms.md").write_text("\n".join([head, *sections]))
    (JOURNALS.parent / "study_otqms.json").write_text(json.dumps({"studies": document}, indent=1) + "\n")
    print("\n".join(sections))


def summarize(by_target: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means by strategy and target. A strategy's overall mean is over the (target, seed) pairs that all have."""
    targets = list(by_target)
    names = list(dict.fromkeys(row["strategy"] for rows in by_target.values() for row in rows))
    table: dict[str, Any] = {}
    for name in names:
        rows = {(t, row["seed"]): row for t in targets for row in by_target[t] if row["strategy"] == name}
        by_seed: dict[int, list[float]] = {}
        for (_, seed), row in rows.items():
            by_seed.setdefault(seed, []).append(row["accuracy"])
        timed = [r["seconds"] + r["preparation_seconds"] for r in rows.values() if not r.get("beside_other_work")]
        complete = [fmean(values) for values in by_seed.values() if len(values) == len(targets)]
        table[name] = {
            "by_target": {
                t: fmean(values) if (values := [row["accuracy"] for (u, _), row in rows.items() if u == t]) else None
                for t in targets
            },
            "mean": fmean(complete) if complete else None,
            "error": stdev(complete) / len(complete) ** 0.5 if len(complete) > 1 else None,
            "seeds": len(complete),
            "trainings": len(rows),
            "samples_per_epoch": fmean(row["samples_per_epoch"] for row in rows.values()),
            "seconds": min(timed) if timed else None,
            "unrelated_share": fmean(sum(row["shares"].get(u, 0.0) for u in UNRELATED) for row in rows.values()),
        }
    return {"targets": targets, "strategies": dict(sorted(table.items(), key=lambda item: -(item[1]["mean"] or 0)))}


def as_markdown(summary: dict[str, Any]) -> str:
    targets = summary["targets"]
    lines = [
        f"| strategy | {' | '.join(targets)} | mean | seeds | samples per epoch | unrelated | seconds |",
        "|---" * (len(targets) + 6) + "|",
    ]
    for name, row in summary["strategies"].items():
        cells = ["-" if row["by_target"][t] is None else f"{100 * row['by_target'][t]:.1f}" for t in targets]
        mean = "-" if row["mean"] is None else f"{100 * row['mean']:.1f}"
        if row["error"] is not None:
            mean += f" ± {100 * row['error']:.1f}"
        unrelated = f"{row['unrelated_share']:.1%}" if row["unrelated_share"] else "-"
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        numbers = f"{row['seeds']} | {row['samples_per_epoch']:.0f} | {unrelated} | {seconds}"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} | {numbers} |")
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], title: str, path: Path) -> None:
    """Accuracy of every strategy: a dot per target, the mean and its standard error."""
    rows = {name: row for name, row in summary["strategies"].items() if row["mean"] is not None}
    if not rows:
        return
    figure = new_figure(1.2 + 0.4 * len(rows))
    axes = plain_axes(figure.subplots())
    for position, row in enumerate(rows.values()):
        values = [100 * value for value in row["by_target"].values() if value is not None]
        axes.plot(values, [position] * len(values), "o", color="tab:blue", alpha=0.3, markersize=5)
        error = 100 * (row["error"] or 0)
        axes.errorbar(100 * row["mean"], position, xerr=error, fmt="D", color="tab:blue", capsize=4)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %  (dots: targets; diamond and bar: mean and standard error)")
    axes.set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    main()
