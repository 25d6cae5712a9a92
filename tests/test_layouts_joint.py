"""Several data sets at once, and large ones."""

import json
import os
import time

import miniatures as mini
import pytest
from conftest import ROOT

from ccl_jax import config as configs
from ccl_jax import settle
from ccl_jax.data import pipeline
from ccl_jax.data.layouts import Part, read_joint, read_split
from ccl_jax.data.records import check_records
from ccl_jax.datasets import read_split as split_of
from ccl_jax.validation import validate

# fmt: off
MVTEC = (
    "carpet", "grid", "leather", "tile", "wood", "bottle", "cable", "capsule", "hazelnut",
    "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper",
)
VISA = (
    "pcb1", "pcb2", "pcb3", "pcb4", "macaroni1", "macaroni2", "capsules", "candle", "cashew",
    "chewinggum", "fryum", "pipe_fryum",
)
REAL_IAD = (
    "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint",
    "mounts", "pcb", "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll",
    "regulator", "rolled_strip_base", "sim_card_set", "switch", "tape", "terminalblock",
    "toothbrush", "toy", "toy_brick", "transistor1", "u_block", "usb", "usb_adaptor", "vcpill",
    "wooden_beads", "woodstick", "zipper",
)
# fmt: on


@pytest.fixture
def parts(tmp_path):
    """The four data sets of configs/joint.py with few classes each."""
    for name in ("mvtec", "visa", "btad", "iad"):
        (tmp_path / name).mkdir()
    return {
        "mvtec": Part("mvtec", mini.mvtec(tmp_path / "mvtec", classes=("toothbrush", "zipper"))),
        "visa": Part("visa", mini.visa(tmp_path / "visa")),
        "btad": Part("btad", mini.btad(tmp_path / "btad")),
        "real_iad": Part("real_iad", mini.real_iad(tmp_path / "iad", ("toothbrush", "zipper"))),
    }


def test_equal_names_in_two_data_sets_stay_two_classes(parts):
    split = read_joint(parts)
    check_records(split.train, split.test)
    assert split.class_names == [
        "btad/01",
        "btad/02",
        "btad/03",
        "mvtec/toothbrush",
        "mvtec/zipper",
        "real_iad/toothbrush",
        "real_iad/zipper",
        "visa/candle",
        "visa/pcb1",
    ]
    for record in [*split.train, *split.test]:
        assert split.class_names[record.label] == f"{record.dataset}/{record.class_name}"
    assert {record.label for record in split.train} == set(range(9))


def test_a_joint_set_is_its_parts_one_after_the_other(parts):
    split = read_joint(parts)
    alone = read_split(parts["real_iad"].root, layout="real_iad", dataset="real_iad")
    mine = [record for record in split.train if record.dataset == "real_iad"]
    assert [record.key for record in mine] == [record.key for record in alone.train]
    assert read_joint(dict(reversed(parts.items()))) == split  # whatever the order of the settings


def test_views_are_chosen_where_there_are_any(parts):
    split = read_joint(parts, views=("C2",))
    assert {record.view for record in split.train} == {"", "C2"}
    del parts["real_iad"]
    with pytest.raises(ValueError, match=r"config\.data\.views names 'C2'"):
        read_joint(parts, views=("C2",))


def test_views_that_leave_a_class_nothing_to_train_on_are_refused(parts, tmp_path):
    parts["manta"] = Part("manta", mini.manta(tmp_path / "manta"))
    expected = (
        r"config\.data\.views=\('C1',\) leaves 2 of 11 classes without training images: "
        r"manta/maize, manta/screw; theirs are of the views 0, 1, 2, 3, 4"
    )
    with pytest.raises(ValueError, match=expected):
        read_joint(parts, views=("C1",))
    assert len(read_joint(parts, views=("C1", "4")).class_names) == 11


def test_an_error_in_a_part_names_the_settings_of_the_part(parts, tmp_path):
    wrong = parts | {"visa": Part("visa", tmp_path / "gone")}
    with pytest.raises(ValueError, match=r"In the part 'visa': .*config\.data\.parts\.visa\.root="):
        read_joint(wrong)
    wrong = parts | {"btad": parts["btad"]._replace(classes=("04",))}
    with pytest.raises(ValueError, match=r"config\.data\.parts\.btad\.classes names '04'"):
        read_joint(wrong)


def joint_config(parts):
    config = configs.read_config_file(ROOT / "configs/joint.py")
    for name, part in parts.items():
        config.data.parts[name].root = str(part.root)
    return config


def test_the_joint_config_names_four_data_sets_by_root(parts):
    config = joint_config(parts)
    validate(config)
    assert split_of(config) == read_joint(parts)
    config.data.parts.mvtec.classes = ("zipper",)
    assert "mvtec/toothbrush" not in split_of(config).class_names


def test_a_joint_config_survives_json(parts):
    config = joint_config(parts)
    again = configs.from_json(configs.to_json(config))
    assert split_of(again) == split_of(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.parts.visa.layout", "joint"),
        ("data.parts.visa.root", ""),
        ("data.parts.visa.classes", ("a", 1)),
        ("data.parts.visa.splits", None),
    ],
)
def test_illegal_settings_of_a_part_are_refused_by_name(key, value):
    config = configs.read_config_file(ROOT / "configs/joint.py")
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=rf"config\.{key}=.* must be .*--config\.{key}="):
        validate(config)


def test_a_joint_config_without_parts_or_with_half_a_part_is_refused():
    config = configs.read_config_file(ROOT / "configs/folder.py")
    config.data.layout = "joint"
    with pytest.raises(ValueError, match=r"needs the data sets in config\.data\.parts"):
        validate(config)
    config = configs.read_config_file(ROOT / "configs/joint.py").unlock()
    del config.data.parts.visa["layout"]
    with pytest.raises(ValueError, match=r"config\.data\.parts\.visa\.layout is missing"):
        validate(config)


def test_a_workdir_remembers_its_parts_wherever_a_later_job_starts(parts, tmp_path, monkeypatch):
    config = joint_config(parts)
    config.data.parts.mvtec.root = "mvtec"
    monkeypatch.chdir(tmp_path)
    kept = settle.with_absolute_roots(config)
    assert kept.data.parts.mvtec.root == str(tmp_path / "mvtec") and kept.data.root == ""
    assert config.data.parts.mvtec.root == "mvtec"
    monkeypatch.chdir(tmp_path / "visa")
    assert split_of(kept) == read_joint(parts)


def test_moved_parts_are_a_matter_of_how_to_run_and_other_layouts_are_not(parts):
    old, new = joint_config(parts), joint_config(parts)
    new.data.parts.visa.root = "/elsewhere"
    new.data.parts.btad.classes = ("01",)
    what, how = configs.differences(old, new)
    assert [line.split(":")[0] for line in what] == ["data.parts.btad.classes"]
    assert [line.split(":")[0] for line in how] == ["data.parts.visa.root"]


def started_within(seconds, config):
    """The split of a config, once its first batch is there too; in time of a core, not of a clock.

    What `pytest -s` prints is several times what a training takes: tests check types and shapes.
    """
    start = time.process_time()
    split = split_of(config)
    listed = time.process_time()
    with pipeline.train_batches(
        split.train,
        image_size=config.data.image_size,
        batch_size=config.train.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        threads=config.run.threads,
        workers=config.run.workers,
    ) as batches:
        assert next(batches)["image"].shape[0] == config.train.batch_size
    end = time.process_time()
    count = len(split.train) + len(split.test)
    print(
        f"\n{count} records of {len(split.class_names)} classes: listed and their headers opened "
        f"in {listed - start:.2f} s, first batch in {end - listed:.2f} s of a core"
    )
    assert end - start < seconds
    return split


def test_the_sixty_classes_of_the_joint_config_are_read_in_seconds(tmp_path):
    for name in ("mvtec", "visa", "btad", "iad"):
        (tmp_path / name).mkdir()
    config = joint_config(
        {
            "mvtec": Part("mvtec", mini.mvtec(tmp_path / "mvtec", MVTEC)),
            "visa": Part("visa", mini.visa(tmp_path / "visa", VISA)),
            "btad": Part("btad", mini.btad(tmp_path / "btad") / "BTech_Dataset_transformed"),
            "real_iad": Part("real_iad", mini.real_iad(tmp_path / "iad", REAL_IAD)),
        }
    )
    split = started_within(10, config)
    assert len(split.class_names) == len(set(split.class_names)) == 60
    assert {record.label for record in split.train} == set(range(60))
    assert len({name.partition("/")[2] for name in split.class_names}) == 58


def write_large_real_iad(root, *, classes, parts, one):
    """A set like Real-IAD of `classes` x `parts` x 5 images, all hard links of one."""
    for number in range(classes):
        name = f"product_{number:02}"
        listed = {"train": [], "test": []}
        for part in range(parts):
            bad = part % 4 == 3
            folder = f"NG/HS/S{part:04}" if bad else f"OK/S{part:04}"
            (root / "realiad_512" / name / folder).mkdir(parents=True)
            for view in range(1, 6):
                code = "HS" if bad else "OK"
                stem = f"{folder}/{name}_{part:04}_{code}_C{view}_2023"
                entry = {"category": name, "anomaly_class": code, "mask_path": None}
                os.link(one, root / "realiad_512" / name / f"{stem}.jpg")
                if bad:
                    os.link(one, root / "realiad_512" / name / f"{stem}.png")
                    entry["mask_path"] = f"{stem}.png"
                entry["image_path"] = f"{stem}.jpg"
                listed["test" if bad or part % 4 == 2 else "train"].append(entry)
        (root / "realiad_jsons").mkdir(exist_ok=True)
        (root / "realiad_jsons" / f"{name}.json").write_text(json.dumps(listed))
    return root / "realiad_512"


@pytest.mark.slow
def test_twenty_thousand_images_are_listed_in_seconds_and_none_is_asked_for_twice(
    tmp_path, monkeypatch
):
    one = mini.save(mini.picture(), tmp_path / "one.jpg")
    root = write_large_real_iad(tmp_path, classes=20, parts=200, one=one)
    asked = []
    stat = os.stat

    def counting(path, *args, **options):
        asked.append(path)
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", counting)
    split = read_split(root, layout="real_iad")
    assert len(split.train) + len(split.test) == 20_000
    assert len(split.train) == 10_000 and len(split.class_names) == 20
    assert len({str(path) for path in asked if str(path).endswith((".jpg", ".png"))}) == 0
    monkeypatch.undo()
    config = configs.read_config_file(ROOT / "configs/real_iad.py")
    config.data.root = str(root)
    assert len(started_within(40, config).train) == 10_000
