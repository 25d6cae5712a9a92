"""Names, links and junk: what lies on real disks, and what must not be followed."""

import errno
import json
import os
import shutil
import unicodedata

import miniatures as mini
import pytest

from ccl_jax.data.layouts import plain_images, read_split
from ccl_jax.data.records import check_records, read_image, read_mask


@pytest.fixture
def root(tmp_path):
    return mini.mvtec(tmp_path / "parts")


def read(root, layout="mvtec", **options):
    split = read_split(root, layout=layout, dataset="set", **options)
    check_records(split.train, split.test)
    return split


def test_upper_case_endings_blanks_and_unicode_in_names_pair_all_the_same(tmp_path):
    folder = tmp_path / "Stück 1 /β ß"
    for kind, name in (("train/good", "öl 1.PNG"), ("test/öl fleck", "bild ä.JPG")):
        mini.save(mini.picture(), folder / kind / name)
    truth = folder / "ground_truth" / unicodedata.normalize("NFD", "öl fleck")
    mini.save(mini.mask(), truth / unicodedata.normalize("NFD", "bild ä_mask.Png"))
    split = read(folder.parent)
    assert split.class_names == ["set/β ß"]
    assert (split.test[0].defect, split.test[0].key) == (
        "öl fleck",
        "set/β ß/test/öl fleck/bild ä.JPG",
    )
    assert read_mask(split.test[0], None).sum() == 9


def test_accents_stored_as_one_character_or_two_give_the_same_records(tmp_path):
    splits = []
    for form in ("NFC", "NFD"):
        root = tmp_path / form
        for name in ("Ärmel", "zéro"):
            mini.save(mini.picture(), root / unicodedata.normalize(form, name) / "train/good/é.png")
        splits.append(read(root))
    assert [r.key for r in splits[0].train] == [r.key for r in splits[1].train]
    assert splits[0].class_names == splits[1].class_names
    assert read(tmp_path / "NFD", classes=("zéro",)).class_names == ["set/zéro"]


def test_lists_find_names_whose_accents_are_stored_in_another_way(tmp_path):
    mini.save(mini.picture(), tmp_path / unicodedata.normalize("NFD", "é/Ä.png"))
    content = {"train": {"é": [mini.entry("é/Ä.png")]}, "test": {}}
    (tmp_path / "meta.json").write_text(json.dumps(content, ensure_ascii=False))
    assert read(tmp_path, "meta").train[0].key == "set/é/Ä.png"


def test_names_that_are_not_utf_8_are_refused_with_the_repair(root):
    name = os.fsdecode(b"caf\xe9.png")
    mini.save(mini.picture(), root / "grid/train/good" / name)
    with pytest.raises(ValueError, match=r"good holds a name that is not UTF-8, 'caf\\udce9\.png'"):
        read(root)


def test_junk_of_every_system_is_passed_over(root):
    before = read(root)
    mini.junk(root)
    mini.junk(root / "grid/train/good")
    for folder in ("@eaDir", "lost+found", "$RECYCLE.BIN"):
        mini.save(mini.picture(), root / folder / "train/good/0.png")
        mini.save(mini.picture(), root / "grid/test" / folder / "0.png")
    assert read(root) == before
    assert not any("@eaDir" in str(file) for file in plain_images(root))


def test_images_need_not_be_square(tmp_path):
    mini.save(mini.picture((60, 10)), tmp_path / "a/train/good/0.png")
    assert read_image(read(tmp_path).train[0], 32).shape == (32, 32, 3)


def test_links_within_the_root_are_followed(root):
    shutil.move(root / "grid/train", root / ".kept")
    (root / "grid/train").symlink_to("../.kept")
    good = root / "metal_nut/train/good"
    (good / "linked.png").symlink_to("000.png")
    split = read(root)
    assert "set/grid/train/good/000.png" in {r.key for r in split.train}
    assert "set/metal_nut/train/good/linked.png" in {r.key for r in split.train}


def test_the_root_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert [r.key for r in read(tmp_path / "link").train] == [r.key for r in read(root).train]


@pytest.mark.parametrize(
    "what", ["grid", "grid/train", "grid/test/bent", "grid/train/good/000.png"]
)
def test_a_link_out_of_the_root_is_refused_unless_it_is_permitted(root, tmp_path, what):
    before = read(root)
    shutil.move(root / what, tmp_path / "away")
    (root / what).symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match=rf"{what} is a link to .*away, outside of") as error:
        read(root)
    assert "--config.data.follow_links=True" in str(error.value)
    assert read(root, follow_links=True) == before


def test_a_link_out_of_the_root_in_a_class_that_is_not_chosen_does_not_matter(root, tmp_path):
    shutil.move(root / "grid", tmp_path / "away")
    (root / "grid").symlink_to(tmp_path / "away")
    assert read(root, classes=("metal_nut",)).class_names == ["set/metal_nut"]


def test_a_link_to_nothing_is_named(root, tmp_path):
    (root / "bolt").symlink_to(tmp_path / "disk that is not mounted")
    with pytest.raises(ValueError, match=r"bolt is a link to .*not mounted, which does not exist"):
        read(root)


def test_links_in_a_circle_end(root):
    (root / "grid/test/round").symlink_to("../test")
    (root / "grid/test/self").symlink_to("self")
    with pytest.raises(ValueError, match="self is a link to self, which does not exist"):
        read(root)
    (root / "grid/test/self").unlink()
    assert read(root).class_names == ["set/grid", "set/metal_nut"]


LISTED = {
    "visa": (mini.visa, "candle/Data/Images/Anomaly/000.JPG"),
    "real_iad": (mini.real_iad, "toy/NG/HS/S0001/toy_0001_HS_C1_20230921.jpg"),
    "meta": (mini.meta, "gear/deep/er/b.png"),
}


@pytest.mark.parametrize("layout", LISTED)
@pytest.mark.parametrize("whole_folder", [True, False])
def test_lists_follow_links_as_folders_do(tmp_path, layout, whole_folder):
    write, file = LISTED[layout]
    (tmp_path / "set").mkdir()
    root = write(tmp_path / "set")
    before = read(root, layout)
    moved = (root / file).parent if whole_folder else root / file
    shutil.move(moved, tmp_path / "away")
    moved.symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match=r"is a link to .*away, outside of the data folder"):
        read(root, layout)
    assert read(root, layout, follow_links=True) == before


def test_a_folder_that_may_not_be_read_is_named(root, monkeypatch):
    scan = os.scandir

    def forbidden(folder):
        if str(folder).endswith("grid/test"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", forbidden)  # the tests may run as root, who may read it
    with pytest.raises(ValueError, match="grid/test cannot be listed: permission denied"):
        read(root)
