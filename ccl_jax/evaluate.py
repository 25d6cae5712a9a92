"""The separate evaluator: scorer and test records in, results and figures out.

Every test image is scored exactly once, for any batch size and number of devices and processes.
Score maps never leave the devices except for the few that are drawn: pixel metrics come from
histograms of scores. Every process has all numbers at the end; the first one writes them.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ccl_jax import mesh, report
from ccl_jax.data.records import Record, class_of, read_image, read_mask
from ccl_jax.metrics import conventions as published
from ccl_jax.metrics import counts as counting
from ccl_jax.metrics import scores as metrics
from ccl_jax.metrics.counter import Counter
from ccl_jax.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Conventions:
    """How scores become metrics; written into the results."""

    image_label: str  # "folder", or "mask": an image whose resized mask is empty counts as normal
    aupro_fpr_limit: float  # AUPRO is integrated up to this false positive rate
    figures_per_class: int  # images on a class's figure sheet; 0 draws none
    published_metrics: tuple[str, ...] = ()  # other tables' conventions, beside the exact metrics


@dataclasses.dataclass
class Collected:
    """What the pass over the test images leaves on every host, by record index."""

    image_scores: np.ndarray  # float [n]
    anomalous: np.ndarray  # bool [n], by the chosen convention
    regions: np.ndarray  # int [n], connected regions of the mask
    codes: np.ndarray  # float [n, d], pooled neck codes
    maps: dict[int, np.ndarray]  # of the images that are drawn
    counts: counting.Totals  # over all classes


def evaluate(
    scorer: Scorer,
    records: Sequence[Record],
    batches: Iterable[dict[str, np.ndarray]],
    class_names: Sequence[str],
    *,
    conventions: Conventions,
    folder: Path,
    dataset: str,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Scores all records, writes results and figures into `folder`, and returns the results.

    `batches` are this process's evaluation batches of `records`; `class_names` are
    "<dataset>/<class>", in the order of the labels. Metrics lie in 0..1, and are None with a reason
    where a class has none. All processes return the same metrics, once the first has written them.
    """
    start = time.perf_counter()
    masked = classes_with_masks(records)
    drawn = chosen_for_figures(records, conventions.figures_per_class)
    found = collect(scorer, records, batches, len(class_names), masked, drawn, conventions)
    classes, reasons = per_class(records, class_names, found, masked, conventions)
    results = report.summarize(
        classes,
        reasons,
        step=scorer.step,
        dataset=dataset,
        conventions=dataclasses.asdict(conventions) | dataclasses.asdict(scorer.settings),
        provenance={
            **provenance,
            "encoder": scorer.encoder,
            "devices": [str(device) for device in scorer.mesh.devices.flat],
            "seconds": round(time.perf_counter() - start, 3),
        },
    )
    if conventions.published_metrics:
        pixels = pixel_histograms(records, class_names, found)
        results["published_conventions"] = {
            name: published.summarize(name, pixels) for name in conventions.published_metrics
        }
    labels = np.array([record.label for record in records], int)
    normal = ~np.array([record.anomalous for record in records], bool)
    results["diagnostics"] = {
        "neck_v_measure": metrics.neck_v_measure(found.codes[normal], labels[normal], seed=0)
    }
    if mesh.is_first():
        with report.writing(folder):
            draw(folder, records, found, scorer.settings.size, drawn)
            report.write_results(folder, results)
    mesh.barrier(f"results of step {scorer.step}")
    return results


def classes_with_masks(records: Sequence[Record]) -> set[int]:
    """Labels of the classes whose anomalous test images have ground truth masks."""
    return {record.label for record in records if record.anomalous and record.mask is not None}


def chosen_for_figures(records: Sequence[Record], per_class: int) -> dict[str, list[int]]:
    """Indices to draw by class: anomalous images spread over the defects, then normal ones."""
    by_class: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, record in enumerate(records):
        by_class[class_of(record)][record.defect if record.anomalous else ""].append(index)
    chosen = {}
    for name, by_defect in by_class.items():
        normal = by_defect.pop("", [])
        anomalous = interleave([by_defect[defect] for defect in sorted(by_defect)])
        few = anomalous[: max(per_class - per_class // 2, per_class - len(normal))]
        chosen[name] = few + normal[: per_class - len(few)]
    return chosen if per_class else {}


def interleave(groups: list[list[int]]) -> list[int]:
    """The first of each group, then the second of each, and so on."""
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def collect(
    scorer: Scorer,
    records: Sequence[Record],
    batches: Iterable[dict[str, np.ndarray]],
    classes: int,
    masked: set[int],
    drawn: dict[str, list[int]],
    conventions: Conventions,
) -> Collected:
    """One pass over the test images, of which each process scores its own rows of every batch."""
    number, where = len(records), scorer.mesh
    wanted = {index for indices in drawn.values() for index in indices}
    image_scores, codes = np.full(number, np.nan), np.zeros((number, 1))
    anomalous, regions = np.zeros(number, bool), np.zeros(number, int)
    maps: dict[int, np.ndarray] = {}
    counter = Counter(classes, where)
    for batch in batches:
        weights, own_regions = zip(*map(metrics.region_weights, batch["mask"]), strict=True)
        counted = batch["real"] & np.isin(batch["label"], list(masked))
        arrays = mesh.put_batch(
            {
                "image": batch["image"],
                "mask": batch["mask"],
                "weight": np.stack(weights),
                "label": batch["label"],
                "counted": counted,
                "index": batch["index"],
                "anomalous": image_labels(batch, masked, conventions.image_label),
                "regions": np.array(own_regions, np.int32),
            },
            where,
        )
        scores = scorer(arrays["image"])
        counter.add(
            scores.maps,
            arrays["mask"],
            arrays["weight"],
            arrays["label"],
            arrays["counted"],
            regions=sum(own_regions),
        )
        small = {name: arrays[name] for name in ("index", "anomalous", "regions")}
        host = mesh.on_every_host(small | {"score": scores.images, "code": scores.codes}, where)
        real = host["index"] >= 0
        index = host["index"][real]
        if codes.shape[1] != host["code"].shape[1]:  # known from the first batch on
            codes = np.zeros((number, host["code"].shape[1]))
        image_scores[index], codes[index] = host["score"][real], host["code"][real]
        anomalous[index], regions[index] = host["anomalous"][real], host["regions"][real]
        for row in np.flatnonzero(real):
            if int(host["index"][row]) in wanted:
                one = row_of(scores.maps, np.int32(row))
                maps[int(host["index"][row])] = mesh.on_every_host(one, where)
    counts = counting.Totals(*map(mesh.sum_over_processes, counter.totals()))
    return Collected(image_scores, anomalous, regions, codes, maps, counts)


@jax.jit
def row_of(maps: Float[Array, "b h w"], row: Int[Array, ""]) -> Float[Array, "h w"]:
    """One map of a batch, as a sum over the others' zeros: so only that one travels."""
    mine = jnp.arange(maps.shape[0]) == row
    return jnp.where(mine[:, None, None], maps, 0).sum(0)


def image_labels(batch: dict[str, np.ndarray], masked: set[int], convention: str) -> np.ndarray:
    """Which images of a batch count as anomalous.

    By the folder that they lie in; or, as the released code does it and only for classes that have
    masks, by whether anything is left of the mask at the size of the score map.
    """
    if convention == "folder":
        return batch["anomalous"]
    by_mask = batch["mask"].any(axis=(1, 2))
    return np.where(np.isin(batch["label"], list(masked)), by_mask, batch["anomalous"])


def per_class(
    records: Sequence[Record],
    class_names: Sequence[str],
    found: Collected,
    masked: set[int],
    conventions: Conventions,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """Returns (metrics by class, reasons for those that are None by class)."""
    labels = np.array([record.label for record in records], int)
    histograms = counting.class_counts(found.counts, class_names)
    classes: dict[str, dict[str, Any]] = {}
    reasons: dict[str, dict[str, str]] = {}
    for label, name in enumerate(class_names):
        mine = labels == label
        anomalous = found.anomalous[mine]
        values = metrics.image_metrics(found.image_scores[mine], anomalous, name=name)
        values |= metrics.pixel_metrics(
            *histograms[name], int(found.regions[mine].sum()), conventions.aupro_fpr_limit
        )
        own = [record for record in records if record.label == label]
        if any(record.sample for record in own):
            values[metrics.SAMPLE_METRIC] = metrics.sample_auroc(
                found.image_scores[mine], anomalous, [record.sample or record.key for record in own]
            )
        number = {"n_normal": int((~anomalous).sum()), "n_anomalous": int(anomalous.sum())}
        classes[name] = number | values
        why = metrics.why_null(values, **number, has_masks=label in masked)
        if why:
            reasons[name] = why
    return classes, reasons


def pixel_histograms(
    records: Sequence[Record], class_names: Sequence[str], found: Collected
) -> dict[str, metrics.PixelHistogram]:
    """The counts of each class over scores; a score is only known as closely as its bin."""
    labels = np.array([record.label for record in records], int)
    values = counting.bin_values()
    histograms = counting.class_counts(found.counts, class_names)
    return {
        name: metrics.PixelHistogram(
            values, *histograms[name], regions=int(found.regions[labels == label].sum())
        )
        for label, name in enumerate(class_names)
    }


def draw(
    folder: Path,
    records: Sequence[Record],
    found: Collected,
    size: int,
    drawn: dict[str, list[int]],
) -> None:
    """Writes a figure sheet per class, in images of `size` pixels."""
    from ccl_jax import figures  # matplotlib, which a training need not wait for

    for name, indices in drawn.items():
        panels = [
            figures.Panel(
                image=read_image(records[i], size),
                mask=None if records[i].mask is None else read_mask(records[i], size),
                score_map=found.maps[i],
                anomalous=bool(found.anomalous[i]),
                score=float(found.image_scores[i]),
                caption=records[i].defect,
            )
            for i in indices
        ]
        figures.class_sheet(report.sheet_path(folder, name), name, panels)
