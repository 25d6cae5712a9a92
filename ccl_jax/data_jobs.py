"""The job that looks at data before a training does: `--job prepare`, and its census."""

import json
import os
from pathlib import Path

from ccl_jax import prepare, progress
from ccl_jax.atomic import write_atomically
from ccl_jax.config import ConfigDict
from ccl_jax.data import census_report, layouts
from ccl_jax.data.census import Census, file_of, take_census
from ccl_jax.datasets import list_folder, print_left_aside, print_sources, read_folder
from ccl_jax.settings import parts_of
from ccl_jax.workdir import check_writable


def prepare_job(config: ConfigDict, workdir: Path) -> int:
    """Generates, checks or prepares the data as the config asks; says what they are and hold.

    Returns 1 where `config.data.check` is "full" and finds what would spoil a training; then
    nothing is prepared.
    """
    print_sources(config)
    if config.data.check == "full":
        spoiled = census_of(config, workdir)
        if spoiled or config.data.source == "folder" or not all(prepare.image_folders(config)):
            return spoiled
    split = read_folder(config)
    rows = []
    for label, name in enumerate(split.class_names):
        test = [record for record in split.test if record.label == label]
        rows.append(
            f"{name}: {sum(record.label == label for record in split.train)} to train on, "
            f"{sum(not record.anomalous for record in test)} normal and "
            f"{sum(record.anomalous for record in test)} anomalous to test on"
        )
    print("\n".join([f"{roots_of(config)}: {len(rows)} classes", *rows]), flush=True)
    if config.data.source == "prepared":
        bar = progress.callback("preparing images", "image", shown=config.run.progress)
        print(prepare.write_prepared(config, split, bar))
    return 0


def census_of(config: ConfigDict, workdir: Path) -> int:
    """Opens every file, prints what was found, and writes all of it to WORKDIR/census.json.

    Returns 1 where some of it would spoil a training or its evaluation. Without the folder of the
    images their shards are opened, and all of the checksums compared.
    """
    check_writable(workdir, "--workdir")
    from_shards = config.data.source == "prepared" and not all(prepare.image_folders(config))
    if from_shards:
        bar = progress.callback("fetching shards", "shard", shown=config.run.progress)
        split = prepare.read_prepared(config, bar, full=True)
    else:
        split = list_folder(config, for_census=True)
    census = take_census(
        split.train,
        split.test,
        image_size=config.data.image_size,
        threads=config.run.threads,
        progress=progress.callback("opening images", "image", shown=config.run.progress),
    )
    details = (workdir / "census.json").absolute()
    where = prepare.location_of(config) if from_shards else roots_of(config)
    if from_shards:
        roots = {record.dataset: where for record in (*split.train, *split.test)}
    else:
        roots = {name: os.path.abspath(part.root) for name, part in parts_of(config).items()}
    skipped = skipped_of(census, split) if config.data.bad_files == "skip" else []
    spoiled = census.spoiling > len(skipped)
    found = {"roots": roots, **census_report.as_json(census), "spoiled": spoiled}
    write_atomically(details, json.dumps(found, indent=2) + "\n")
    print(f"{where}: {len(census.classes)} classes\n\n{census_report.as_text(census)}")
    print(f"\n{details}: all files of each finding")
    if skipped:
        print(
            f"{len(skipped)} of the images that cannot be read are only trained on; others of "
            "their classes will stand in for them (config.data.bad_files=skip)."
        )
    if not from_shards:
        print_left_aside(config)
    return 1 if spoiled else 0


def skipped_of(census: Census, split: layouts.Split) -> list[str]:
    """The unreadable images that a training can skip: of classes with others to train on."""
    bad = {file for file, _ in census.findings["unreadable_images"]}
    readable = {record.label for record in split.train if file_of(record) not in bad}
    return [file_of(r) for r in split.train if file_of(r) in bad and r.label in readable]


def roots_of(config: ConfigDict) -> str:
    """The folders of the data, for a line of text."""
    return ", ".join(str(part.root) for part in parts_of(config).values())
