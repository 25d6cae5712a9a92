"""Every published layout, on a miniature of it with its quirks."""

import shutil

import miniatures as mini
import numpy as np
import pytest

from ccl_jax.data.layouts import describe_source, left_aside, read_split
from ccl_jax.data.pictures import Pictures, TrainingImages, check_pictures
from ccl_jax.data.records import check_files, check_records, read_image, read_mask


def read(root, layout, **options):
    """A split that has passed all checks of a training."""
    split = read_split(root, layout=layout, dataset="set", **options)
    check_records(split.train, split.test)
    check_files([*split.train, *split.test])
    assert split.train == sorted(split.train, key=lambda r: (r.label, r.key))
    return split


def kinds(records):
    """How many images there are by class and kind of defect, and how many have a mask."""
    table = {}
    for record in records:
        images, masks = table.get((record.class_name, record.defect), (0, 0))
        table[record.class_name, record.defect] = (images + 1, masks + (record.mask is not None))
    return table


def test_mvtec_ad_reads_with_its_grey_class_and_its_loose_text_files(tmp_path):
    mini.junk(mini.mvtec(tmp_path / "mvtec"))
    split = read(tmp_path / "mvtec", "mvtec")
    assert split.class_names == ["set/grid", "set/metal_nut"]
    assert kinds(split.train) == {("grid", "good"): (2, 0), ("metal_nut", "good"): (2, 0)}
    assert kinds(split.test)["grid", "bent"] == (1, 1)
    assert read_image(split.train[0], None).shape == (8, 12, 3)


def test_masks_named_like_their_images_pair_as_in_uni_medical(tmp_path):
    split = read(mini.mvtec(tmp_path, masks=""), "mvtec")
    assert kinds(split.test)["metal_nut", "scratch"] == (1, 1)


def test_mvtec_ad_2_reads_its_public_test_and_leaves_validation_and_private_aside(tmp_path):
    root = mini.mvtec2(tmp_path)
    split = read(root, "mvtec2", classes=("can",))
    assert kinds(split.train) == {("can", "good"): (3, 0)}
    assert kinds(split.test) == {("can", "good"): (1, 0), ("can", "bad"): (1, 1)}
    assert read_mask(split.test[0], None).shape == (10, 30)
    notes = left_aside(root, layout="mvtec2", classes=("can",))
    assert notes[0].startswith("2 validation images are set aside")
    assert notes[1].startswith("2 images in test_private and test_private_mixed have no labels")


def test_validation_images_of_mvtec_ad_2_may_train(tmp_path):
    root = mini.mvtec2(tmp_path)
    split = read_split(root, layout="mvtec2", dataset="set", validation="train")
    check_records(split.train, split.test)
    assert kinds(split.train)["can", "good"] == (5, 0)
    notes = left_aside(root, layout="mvtec2", validation="train")
    assert len(notes) == 1 and "test_private" in notes[0]


def test_visa_as_published_goes_by_its_table_and_its_masks_of_small_integers(tmp_path):
    split = read(mini.visa(tmp_path / "VisA"), "visa")
    assert split.class_names == ["set/candle", "set/pcb1"]
    assert kinds(split.train) == {("candle", "good"): (3, 0), ("pcb1", "good"): (3, 0)}
    assert kinds(split.test)["candle", "good"] == (1, 0)
    assert kinds(split.test)["pcb1", "bad"] == (1, 1)
    bad = next(record for record in split.test if record.anomalous)
    assert bad.key == "set/candle/Data/Images/Anomaly/000.JPG"
    assert read_mask(bad, None).sum() == 9


def test_visa_takes_another_table_of_the_user(tmp_path):
    root = mini.visa(tmp_path / "VisA")
    table = (root / "split_csv/1cls.csv").read_text().splitlines()
    few = [line for line in table if line.startswith(("object", "pcb1"))]
    (tmp_path / "few.csv").write_text("\ufeff" + "\r\n".join(few))
    split = read(root, "visa", splits="../few.csv")
    assert split.class_names == ["set/pcb1"]
    assert split == read(root, "visa", splits=str(tmp_path / "few.csv"))


@pytest.mark.parametrize("above", [True, False])
def test_visa_converted_to_one_class_each_reads_from_its_folder_or_the_one_above(tmp_path, above):
    root = mini.visa_converted(tmp_path)
    split = read(root if above else root / "1cls", "visa")
    assert kinds(split.train)["candle", "good"] == (3, 0)
    assert kinds(split.test)["candle", "bad"] == (1, 1)
    assert split.train[0].key == "set/candle/train/good/0000.JPG"


@pytest.mark.parametrize("above", [True, False])
def test_btad_pairs_images_and_masks_of_any_ending(tmp_path, above):
    root = mini.btad(tmp_path)
    mini.junk(root / "BTech_Dataset_transformed")
    split = read(root if above else root / "BTech_Dataset_transformed", "btad")
    assert split.class_names == ["set/01", "set/02", "set/03"]
    assert kinds(split.test)["01", "good"] == (1, 0)
    pairs = [(r.image.suffix, r.mask.suffix) for r in split.test if r.anomalous]
    assert pairs == [(".bmp", ".png"), (".png", ".png"), (".bmp", ".bmp")]
    assert split.train[0].key == "set/01/train/ok/0000.bmp"


def test_real_iad_takes_all_names_from_its_lists(tmp_path):
    split = read(mini.real_iad(tmp_path), "real_iad")
    assert split.class_names == ["set/audiojack", "set/toy"]
    assert kinds(split.train) == {("audiojack", "good"): (10, 0), ("toy", "good"): (10, 0)}
    assert kinds(split.test)["toy", "good"] == (6, 0)  # one view of the defective part is normal
    assert kinds(split.test)["toy", "HS"] == (4, 4)
    bad = next(record for record in split.test if record.anomalous)
    assert bad.key == "set/audiojack/NG/HS/S0001/audiojack__0001_HS_C1_20230921.jpg"
    assert (bad.sample, bad.view) == ("NG/HS/S0001", "C1")
    assert split.train[-1].key == "set/toy/OK/S0002/toy_0002_OK_C5_20230925.jpg"


def test_parts_of_real_iad_have_five_views_and_normal_and_defective_ones_are_apart(tmp_path):
    split = read(mini.real_iad(tmp_path), "real_iad", classes=("toy",))
    parts = {}
    for record in split.test:
        parts.setdefault(record.sample, []).append((record.view, record.anomalous))
    assert set(parts) == {"OK/S0003", "NG/HS/S0001"}
    assert [view for view, _ in parts["NG/HS/S0001"]] == [f"C{i}" for i in (1, 2, 3, 5, 4)]
    assert [bad for _, bad in sorted(parts["NG/HS/S0001"])] == [True, True, True, False, True]


def test_single_view_lists_and_single_views_give_the_same_images(tmp_path):
    root = mini.real_iad(tmp_path)
    by_list = read(root, "real_iad", splits="../realiad_jsons_sv")
    assert kinds(by_list.train)["toy", "good"] == (2, 0)
    assert by_list == read(root, "real_iad", views=("C1",))
    assert len(read(root, "real_iad", views=("C1", "C4")).test) == 8


@pytest.mark.parametrize("place", ["realiad_jsons/realiad_jsons", "realiad_512"])
def test_lists_of_real_iad_are_found_where_releases_put_them(tmp_path, place):
    root = mini.real_iad(tmp_path)
    usual = read(root, "real_iad")
    shutil.move(tmp_path / "realiad_jsons", tmp_path / "lists")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for file in (tmp_path / "lists").iterdir():
        shutil.move(file, tmp_path / place)
    assert read(root, "real_iad") == usual


def test_strips_of_manta_become_five_records_each(tmp_path):
    split = read(mini.manta(tmp_path), "manta")
    assert split.class_names == ["set/maize", "set/screw"]
    assert kinds(split.train) == {("maize", "good"): (10, 0), ("screw", "good"): (10, 0)}
    first = split.train[:5]
    assert [r.view for r in first] == list("01234")
    assert {r.sample for r in first} == {"train/good/000.png"}
    whole = read_image(first[0].image, None)
    np.testing.assert_array_equal(np.hstack([read_image(r, None) for r in first]), whole)


def test_only_views_of_manta_that_show_a_defect_are_anomalous(tmp_path):
    split = read(mini.manta(tmp_path), "manta")
    shown = {(r.class_name, r.defect, r.view) for r in split.test if r.anomalous}
    assert shown == {
        ("maize", "crack", "3"),
        ("screw", "crack", "3"),
        ("screw", "rust", "0"),
        ("screw", "rust", "1"),
    }
    for record in split.test:
        assert record.anomalous == (record.mask is not None)
        assert record.anomalous == bool(read_mask(record, None).any())
        assert record.anomalous or record.defect == "good"


def test_a_domain_of_manta_reads_alone_and_so_does_one_view(tmp_path):
    root = mini.manta(tmp_path)
    split = read(root / "agriculture", "manta")
    assert split.class_names == ["set/maize"]
    assert split.train == [r for r in read(root, "manta").train if r.class_name == "maize"]
    assert {r.view for r in read(root, "manta", views=("3",)).test} == {"3"}


def test_defective_strips_of_manta_that_no_mask_explains_are_anomalous_in_all_views(tmp_path):
    root = mini.manta(tmp_path)
    shutil.rmtree(root / "agriculture/maize/test-pixel/mask")
    mini.save(mini.mask((40, 8), value=0), root / "mechanics/screw/test-pixel/mask/crack/000.png")
    split = read(root, "manta")
    crack = [r for r in split.test if r.defect == "crack"]
    assert [(r.class_name, r.mask is None) for r in crack] == [
        *[("maize", True)] * 5,
        *[("screw", False)] * 5,
    ]


def test_the_small_release_of_manta_reads_like_the_large_one(tmp_path):
    root = mini.manta(tmp_path)
    before = read(root, "manta", classes=("screw",))
    folder = root / "mechanics/screw"
    shutil.move(folder / "test-pixel/mask", folder / "ground_truth")
    shutil.move(folder / "test-pixel", folder / "test")
    after = read(root, "manta", classes=("screw",))
    assert kinds(after.test) == kinds(before.test)


def test_a_meta_json_describes_a_folder_of_any_shape(tmp_path):
    split = read(mini.meta(tmp_path), "meta")
    assert split.class_names == ["set/gear", "set/nut"]
    assert kinds(split.test)["nut", "dent"] == (1, 1)
    assert [r.key for r in split.test[:2]] == ["set/gear/a1.png", "set/gear/deep/er/b.png"]
    shutil.move(tmp_path / "meta.json", tmp_path / "meta_20_0.json")
    assert read(tmp_path, "meta", splits="meta_20_0.json") == split


def test_a_meta_json_without_names_of_defects_reads_as_for_visa(tmp_path):
    mini.meta(tmp_path)
    text = (tmp_path / "meta.json").read_text().replace('"dent"', '""')
    (tmp_path / "meta.json").write_text(text)
    assert kinds(read(tmp_path, "meta").test)["gear", "bad"] == (1, 1)


@pytest.mark.parametrize(
    ("layout", "write"),
    [
        ("mvtec2", mini.mvtec2),
        ("visa", mini.visa),
        ("btad", lambda root: mini.btad(root) / "BTech_Dataset_transformed"),
        ("real_iad", mini.real_iad),
        ("manta", mini.manta),
        ("meta", mini.meta),
    ],
)
def test_a_class_that_is_not_there_gets_a_suggestion_in_every_layout(tmp_path, layout, write):
    (tmp_path / "set").mkdir()
    root = write(tmp_path / "set")
    names = [name.removeprefix("set/") for name in read(root, layout).class_names]
    chosen = read(root, layout, classes=(names[1],))
    assert chosen.class_names == [f"set/{names[1]}"]
    assert {r.label for r in [*chosen.train, *chosen.test]} == {0}
    with pytest.raises(ValueError, match=rf"did you mean '{names[0]}'\?.*there are: {names[0]}, "):
        read(root, layout, classes=(names[0] + "x",))


@pytest.mark.parametrize("layout", ["mvtec", "visa", "btad", "real_iad", "manta", "meta"])
def test_a_root_that_is_not_there_and_one_that_is_empty_are_named(tmp_path, layout):
    with pytest.raises(ValueError, match="gone does not exist"):
        read(tmp_path / "gone", layout)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty.*(holds no|has no|cannot be read)"):
        read(tmp_path / "empty", layout)


def test_unknown_layouts_views_and_lists_that_mean_nothing_are_refused(tmp_path):
    root = mini.mvtec(tmp_path)
    with pytest.raises(
        ValueError, match=r"config\.data\.layout='voc' is unknown; use one of mvtec"
    ):
        read(root, "voc")
    with pytest.raises(ValueError, match=r"config\.data\.splits='a\.csv' has no meaning"):
        read(root, "mvtec", splits="a.csv")
    with pytest.raises(ValueError, match=r"config\.data\.views names 'C1'.*no image of it"):
        read(root, "mvtec", views=("C1",))
    with pytest.raises(ValueError, match="names 'C6', which the data does not have; it has C1, C2"):
        read(mini.real_iad(tmp_path / "iad"), "real_iad", views=("C1", "C6"))


def test_the_folder_above_real_iad_says_which_one_below_it_is_meant(tmp_path):
    mini.real_iad(tmp_path, lists="elsewhere")
    with pytest.raises(ValueError, match=r"--config\.data\.root=.*/realiad_512"):
        read(tmp_path, "real_iad")
    with pytest.raises(ValueError, match=r"has no <class>\.json.*--config\.data\.splits=FOLDER"):
        read(tmp_path / "realiad_512", "real_iad")


def test_a_class_folder_of_real_iad_without_a_list_is_named_with_a_way_out(tmp_path):
    root = mini.real_iad(tmp_path)
    (tmp_path / "realiad_jsons/toy.json").unlink()
    with pytest.raises(ValueError, match=r"for toy; unpack.*classes=\"\('audiojack',\)\""):
        read(root, "real_iad")
    assert read(root, "real_iad", classes=("audiojack",)).class_names == ["set/audiojack"]


def test_lists_of_real_iad_without_a_class_folder_are_left_aside_unless_they_are_chosen(tmp_path):
    root = mini.real_iad(tmp_path)
    assert left_aside(root, layout="real_iad") == []
    shutil.rmtree(root / "toy")
    assert read(root, "real_iad").class_names == ["set/audiojack"]
    (note,) = left_aside(root, layout="real_iad")
    assert note.startswith("1 lists in ") and note.endswith("realiad_512: toy.json")
    with pytest.raises(ValueError, match=r"no .*realiad_512/<class> for toy; unpack"):
        read(root, "real_iad", classes=("audiojack", "toy"))


@pytest.mark.parametrize("name", ["meta.json", "census.json", "._toy.json"])
def test_other_json_in_the_root_of_real_iad_does_not_hide_its_lists(tmp_path, name):
    root = mini.real_iad(tmp_path)
    usual = read(root, "real_iad")
    (root / name).write_text("{}")
    assert read(root, "real_iad") == usual
    (tmp_path / "realiad_jsons" / name).write_text("{}")
    assert read(root, "real_iad") == usual


def test_a_strip_that_five_views_do_not_divide_is_named(tmp_path):
    root = mini.manta(tmp_path)
    mini.save(mini.picture((41, 8)), root / "agriculture/maize/train/good/001.png")
    with pytest.raises(ValueError, match=r"001\.png is 41x8 pixels, so it is no strip of 5"):
        read(root, "manta")


def test_a_training_strip_that_cannot_be_read_stops_by_name_or_is_skipped(tmp_path):
    root = mini.manta(tmp_path)
    bad = root / "agriculture/maize/train/good/001.png"
    bad.write_bytes(b"no picture")
    split = read_split(root, layout="manta", dataset="set")
    assert kinds(split.train)["maize", "good"] == (10, 0)
    assert len({record.crop for record in split.train}) == 5  # cut like its neighbour
    with pytest.raises(ValueError, match=r"5 of 20 .*001\.png cannot be read.*bad_files=skip"):
        check_pictures(split.train, split.test, bad_files="stop")
    check_pictures(split.train, split.test, bad_files="skip")
    images = TrainingImages(Pictures(split.train, 32), "skip")
    index = next(i for i, record in enumerate(split.train) if record.image == bad)
    pixels, passed = images.image(index)
    assert pixels.shape == (32, 32, 3) and all("001.png" in why for why in passed.values())


def test_a_class_of_manta_without_a_readable_strip_and_a_bad_test_strip_are_errors(tmp_path):
    root = mini.manta(tmp_path)
    for file in (root / "agriculture/maize").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"maize/.*\.png cannot be read"):
        read(root, "manta")
    bad = root / "mechanics/screw/test-pixel/good/010.png"
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match=r"010\.png cannot be read"):
        read(root, "manta", classes=("screw",))


def test_masks_of_manta_that_fit_no_strip_or_two_are_named(tmp_path):
    root = mini.manta(tmp_path)
    masks = root / "mechanics/screw/test-pixel/mask"
    shutil.move(masks / "rust/000.png", masks / "000.png")  # of crack/000 or of rust/000?
    with pytest.raises(ValueError, match=r"1 masks in .*mask belong to no strip, or to several"):
        read(root, "manta")
    (masks / "000.png").unlink()
    with pytest.raises(ValueError, match=r"1 defective strips .* no mask .*rust/000\.png; add"):
        read(root, "manta")
    shutil.copy(masks / "crack/000.png", masks / "crack/000_mask.png")
    with pytest.raises(ValueError, match=r"000_mask\.png and 000\.png belong to one strip"):
        read(root, "manta")


def test_a_class_of_manta_with_nothing_to_train_on_is_named(tmp_path):
    root = mini.manta(tmp_path)
    shutil.rmtree(root / "mechanics/screw/train")
    with pytest.raises(ValueError, match=r"1 of 2 classes have no training images: screw; put"):
        read(root, "manta")


def test_one_class_name_in_two_domains_of_manta_is_refused(tmp_path):
    root = mini.manta(tmp_path)
    shutil.copytree(root / "mechanics/screw", root / "agriculture/screw")
    with pytest.raises(ValueError, match=r"2 domains in .* have a class screw"):
        read(root, "manta")


# What lies in a class folder where the layout has nothing; each is read by nobody.
STRAY = ("train/x.png", "train/bad/x.png", "train/good/more/x.png", "test/bent/old/deep/x.png")


@pytest.mark.parametrize("place", STRAY)
@pytest.mark.parametrize(
    ("layout", "write", "inner", "normal"),
    [
        ("mvtec", mini.mvtec, "grid", "good"),
        ("btad", mini.btad, "BTech_Dataset_transformed/01", "ok"),
        ("visa", mini.visa_converted, "1cls/candle", "good"),
        ("mvtec2", mini.mvtec2, "can", "good"),
    ],
)
def test_images_in_odd_places_of_a_class_folder_are_counted(
    tmp_path, layout, write, inner, normal, place
):
    write(root := tmp_path / "set")
    before, notes = read(root, layout), left_aside(root, layout=layout)
    if layout == "mvtec2":
        place = place.replace("test/", "test_public/")
    stray = mini.save(mini.picture(), root / inner / place.replace("good", normal))
    assert read(root, layout) == before
    first, *rest = left_aside(root, layout=layout)
    assert first.startswith(
        f"1 images lie where the layout has none and are not used, the first is {stray};"
    )
    assert rest == notes
    other = before.class_names[1].removeprefix("set/")
    assert len(left_aside(root, layout=layout, classes=(other,))) == len(notes)


def test_every_published_set_names_its_source_and_licence():
    for layout, words in {
        "visa": ("amazon-science/spot-diff", "CC BY 4.0", "VisA_20220922.tar"),
        "btad": ("VT-ADL", "CC BY-SA 4.0", "btad.zip"),
        "real_iad": ("Real-IAD", "no commercial use", "no public download"),
        "manta": ("see https://grainnet.github.io/MANTA",),
        "mvtec2": ("mvtec-ad-2", "CC BY-NC-SA 4.0", "sha256"),
    }.items():
        text = describe_source(layout, "mine")
        assert text.startswith("mine: ") and all(word in text for word in words), text
    assert "MVTec AD" in describe_source("mvtec", "mvtec_anomaly_detection")
    mpdd = describe_source("mvtec", "MPDD")
    assert "stepanje/MPDD" in mpdd and "licence: none stated" in mpdd and "sharepoint" in mpdd
    assert "archive: https://drive.google.com/" in describe_source("mvtec", "medical")
    for layout, name in (("manta", "manta"), ("mvtec", "mpdd"), ("mvtec", "uni_medical")):
        text = describe_source(layout, name)
        assert "without asking" not in text and "/train/good" in text, text
    assert "up to you" in describe_source("mvtec", "photos")
