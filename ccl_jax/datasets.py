"""The data sets of a config: read, described, and what is left aside of them."""

from pathlib import Path

from ccl_jax import prepare, progress
from ccl_jax.config import ConfigDict
from ccl_jax.data import layouts
from ccl_jax.data.pictures import check_pictures
from ccl_jax.data.records import check_records
from ccl_jax.settings import parts_of


def read_split(config: ConfigDict) -> layouts.Split:
    """The records of the config's data, from where `config.data.source` says.

    Prints what of a folder is not used.
    """
    if config.data.source == "prepared":
        bar = progress.callback("fetching shards", "shard", shown=config.run.progress)
        split = prepare.read_prepared(config, bar)
        check_records(split.train, split.test)
        return split
    return read_folder(config)


def read_folder(config: ConfigDict) -> layouts.Split:
    """The records of the config's folder, each opened as far as its size.

    Prints what of it is not used.
    """
    split = list_folder(config)
    check_pictures(split.train, split.test, bad_files=config.data.bad_files)
    print_left_aside(config)
    return split


def list_folder(config: ConfigDict, *, for_census: bool = False) -> layouts.Split:
    """The records of the config's folder, generated first where they are to be; none is opened.

    With `for_census` masks of normal images as well, and anomalous images without the mask that
    they should have: to be judged, not trained on.
    """
    data = config.data
    for key, part in data.parts.items() if data.layout == "joint" else [("", data)]:
        if not part.root:  # which passes the validation where only shards are to be read
            raise ValueError(
                f"config.data.{key and f'parts.{key}.'}root='' must be the folder of the images, "
                f"e.g. --config.data.{key and f'parts.{key}.'}root=/data/photos"
            )
    if data.layout == "synthetic":
        from ccl_jax.data import synthetic  # here: scipy, which other layouts do without

        synthetic.write_benchmark(
            Path(data.root),
            **config.synthetic.to_dict(),
            progress=progress.callback("generating images", "image", shown=config.run.progress),
        )
    if data.layout == "joint":
        split = layouts.read_joint(
            parts_of(config),
            views=data.views,
            validation=data.validation,
            follow_links=data.follow_links,
            for_census=for_census,
        )
    else:
        split = layouts.read_split(
            Path(data.root),
            layout="mvtec" if data.layout == "synthetic" else data.layout,
            dataset=data.name,
            classes=data.classes,
            splits=data.splits,
            views=data.views,
            validation=data.validation,
            follow_links=data.follow_links,
            for_census=for_census,
        )
    check_records(split.train, split.test)
    return split


def print_sources(config: ConfigDict) -> None:
    """Prints where the data come from and their licence; nothing of them needs to be there."""
    for name, part in parts_of(config).items():
        print(layouts.describe_source(part.layout, name), flush=True)


def print_left_aside(config: ConfigDict) -> None:
    """Prints what of the config's folder is not used, which is known to be there."""
    data = config.data
    for name, part in parts_of(config).items():
        for note in layouts.left_aside(
            part.root,
            layout=part.layout,
            classes=part.classes,
            splits=part.splits,
            validation=data.validation,
            follow_links=data.follow_links,
        ):
            print(f"{name}: {note}", flush=True)
