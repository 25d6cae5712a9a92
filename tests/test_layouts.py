"""Folders, sound and unsound, read into records."""

import os

import pytest
from PIL import Image

from ccl_jax.data.layouts import plain_images, read_mvtec
from ccl_jax.data.records import check_records, read_mask


def save(file, size=(6, 4)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(file)


@pytest.fixture
def root(tmp_path):
    """Two classes: one whole, one with nothing but training images."""
    root = tmp_path / "parts"
    for name in ("b.png", "a.png"):
        save(root / "nut/train/good" / name)
    save(root / "nut/test/good/000.png")
    for name in ("000", "001"):
        save(root / f"nut/test/crack/{name}.png")
        save(root / f"nut/ground_truth/crack/{name}_mask.png")
    save(root / "gear/train/good/000.png")
    return root


def test_a_folder_becomes_sorted_records(root):
    train, test, class_names = read_mvtec(root)
    assert class_names == ["parts/gear", "parts/nut"]
    assert [(r.key, r.label) for r in train] == [
        ("parts/gear/train/good/000.png", 0),
        ("parts/nut/train/good/a.png", 1),
        ("parts/nut/train/good/b.png", 1),
    ]
    assert [(r.key, r.anomalous, r.defect, r.mask is not None) for r in test] == [
        ("parts/nut/test/crack/000.png", True, "crack", True),
        ("parts/nut/test/crack/001.png", True, "crack", True),
        ("parts/nut/test/good/000.png", False, "good", False),
    ]
    assert test[1].mask == root / "nut/ground_truth/crack/001_mask.png"
    assert {(r.dataset, r.class_name) for r in test} == {("parts", "nut")}
    check_records(train, test)
    assert read_mask(test[0], 4).all()


def test_classes_choose_and_the_data_set_can_be_named(root):
    chosen = read_mvtec(root, dataset="shop", classes=("nut",))
    assert chosen.class_names == ["shop/nut"]
    assert {r.label for r in chosen.train} == {0}
    assert chosen.train[0].key == "shop/nut/train/good/a.png"
    assert read_mvtec(root, classes=("nut", "gear", "nut")) == read_mvtec(root)


def test_a_relative_folder_or_a_link_gives_the_name_that_was_typed(root, monkeypatch):
    os.symlink(root, root.parent / "linked")
    assert read_mvtec(root.parent / "linked").train[0].dataset == "linked"
    monkeypatch.chdir(root)
    assert read_mvtec(type(root)(".")) == read_mvtec(root)


def test_images_of_any_ending_and_case_count_and_other_files_do_not(root):
    folder = root / "gear/train/good"
    for name in ("1.JPG", "2.Jpeg", "3.bmp", "4.TIF", "5.tiff", "6.webp", ".hidden.png"):
        save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "sub.png").mkdir()
    save(root / ".cache/train/good/0.png")
    split = read_mvtec(root)
    names = [r.image.name for r in split.train if r.class_name == "gear"]
    assert names == ["000.png", "1.JPG", "2.Jpeg", "3.bmp", "4.TIF", "5.tiff", "6.webp"]
    assert split.class_names == ["parts/gear", "parts/nut"]


def test_a_class_without_masks_and_one_without_anomalies_are_fine(root):
    save(root / "gear/test/broken/0.png")
    save(root / "cog/train/good/0.png")
    save(root / "cog/test/good/0.png")
    test = read_mvtec(root).test
    assert [(r.class_name, r.anomalous) for r in test][:2] == [("cog", False), ("gear", True)]
    assert all(r.mask is None for r in test if r.class_name != "nut")


def test_masks_of_normal_images_are_passed_over(root):
    save(root / "nut/ground_truth/good/000_mask.png")
    assert all(r.mask is None for r in read_mvtec(root).test if not r.anomalous)


def test_a_mask_may_have_another_ending_than_its_image(root):
    (root / "nut/ground_truth/crack/000_mask.png").rename(
        root / "nut/ground_truth/crack/000_mask.BMP"
    )
    assert read_mvtec(root).test[0].mask.name == "000_mask.BMP"


def test_one_image_only_is_a_data_set(tmp_path):
    save(tmp_path / "one/nut/train/good/0.png")
    split = read_mvtec(tmp_path / "one")
    assert (len(split.train), split.test, split.class_names) == (1, [], ["one/nut"])


def test_a_missing_folder_and_a_file_in_its_place_are_errors(root):
    with pytest.raises(ValueError, match=r"nowhere does not exist.*--config\.data\.root="):
        read_mvtec(root / "nowhere")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        read_mvtec(root / "nut/train/good/a.png")


def test_an_empty_folder_says_where_photos_belong(tmp_path):
    with pytest.raises(ValueError, match="holds no class folders; put normal photos in"):
        read_mvtec(tmp_path)


def test_a_class_folder_as_root_is_recognised(root):
    with pytest.raises(ValueError, match="itself a class folder") as error:
        read_mvtec(root / "nut")
    assert f"--config.data.root={root} --config.data.classes=\"('nut',)\"" in str(error.value)


def test_classes_without_training_images_are_listed_with_a_way_out(root):
    for empty in ("bolt", "pin"):
        save(root / empty / "test/good/0.png")
    with pytest.raises(ValueError, match="2 of 4 classes have no training images: bolt, pin") as e:
        read_mvtec(root)
    assert f"{root}/bolt/train/good" in str(e.value)
    assert "--config.data.classes=\"('gear', 'nut')\"" in str(e.value)
    assert len(read_mvtec(root, classes=("gear", "nut")).class_names) == 2


def test_only_empty_classes_offer_no_empty_choice(tmp_path):
    (tmp_path / "nut/train/good").mkdir(parents=True)
    with pytest.raises(ValueError, match="1 of 1 classes") as error:
        read_mvtec(tmp_path)
    assert "config.data.classes" not in str(error.value)


def test_an_unknown_class_gets_a_suggestion(root):
    with pytest.raises(ValueError, match=r"'gera'.*did you mean 'gear'\?.*there are: gear, nut"):
        read_mvtec(root, classes=("gera",))
    with pytest.raises(ValueError, match="no such folder; there are: gear, nut"):
        read_mvtec(root, classes=("xyz",))


@pytest.mark.parametrize("kind", ["crack", "dent"])
def test_a_mask_without_its_image_is_an_error(root, kind):
    save(root / f"nut/ground_truth/{kind}/007_mask.png")
    with pytest.raises(ValueError, match=rf"1 masks .*ground_truth/{kind}/007_mask\.png.*delete"):
        read_mvtec(root)


def test_an_anomalous_image_without_mask_beside_masked_ones_is_an_error(root):
    save(root / "nut/test/dent/007.png")
    with pytest.raises(
        ValueError,
        match=r"1 anomalous images .* 2 have one.*dent/007\.png; add .*ground_truth/dent",
    ):
        read_mvtec(root)


def test_a_mask_not_named_like_one_is_an_error_with_the_right_name(root):
    save(root / "nut/ground_truth/crack/000.png")
    with pytest.raises(ValueError, match=r"rename it to 000_mask\.png"):
        read_mvtec(root)


def test_two_masks_for_one_image_are_an_error(root):
    save(root / "nut/ground_truth/crack/000_mask.bmp")
    with pytest.raises(ValueError, match=r"000_mask\.png and 000_mask\.bmp belong to one image"):
        read_mvtec(root)


@pytest.mark.parametrize("folder", ["test", "ground_truth"])
def test_images_that_lie_outside_a_kind_of_defect_are_an_error(root, folder):
    save(root / f"nut/{folder}/loose.png")
    with pytest.raises(ValueError, match=rf"1 images lie in .*/{folder} itself.*loose\.png"):
        read_mvtec(root)


def test_plain_images_are_found_in_all_folders_below_in_order(root):
    save(root / "Z.JPG")
    save(root / ".hidden/0.png")
    save(root / "nut/.x.png")
    found = [file.relative_to(root).as_posix() for file in plain_images(root)]
    assert len(found) == 9 and found == sorted(found)
    assert "Z.JPG" in found and not any("." in name[:1] or "/." in name for name in found)


def test_one_named_file_is_taken_whatever_its_ending(tmp_path):
    file = tmp_path / "photo.upload"
    file.write_bytes(b"")
    assert plain_images(file) == [file]


def test_nothing_to_predict_on_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"gone does not exist.*--config\.predict\.input"):
        plain_images(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"hold no image; names must end in \.png"):
        plain_images(tmp_path)
