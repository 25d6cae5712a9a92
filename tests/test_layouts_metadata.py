"""JSON and CSV files that are damaged, incomplete, or name what they must not."""

import json
import re
import unicodedata

import miniatures as mini
import pytest

from ccl_jax.data.layouts import read_split
from ccl_jax.data.records import check_records

FILES = {
    "visa": (mini.visa, "split_csv/1cls.csv"),
    "real_iad": (mini.real_iad, "../realiad_jsons/toy.json"),
    "meta": (mini.meta, "meta.json"),
}
JSON = ("real_iad", "meta")


def written(tmp_path, layout):
    """The root of a miniature and its metadata file."""
    (tmp_path / "set").mkdir()
    write, name = FILES[layout]
    root = write(tmp_path / "set")
    return root, (root / name).resolve()


def refused(root, layout, *expected):
    with pytest.raises(ValueError) as error:
        read_split(root, layout=layout, dataset="set")
    for text in expected:
        assert str(text) in str(error.value), error.value
    return str(error.value)


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret.png", "nut/../../secret.png", "C:/secret.png", "//host/x.png"],
)
def test_paths_that_are_absolute_or_leave_the_root_are_refused_with_their_entry(
    tmp_path, layout, path
):
    root, file = written(tmp_path, layout)
    mini.save(mini.picture(), tmp_path / "set/secret.png")
    image = {
        "visa": "candle/Data/Images/Normal/0000.JPG",
        "real_iad": "OK/S0001/toy_0001_OK_C1_20230921.jpg",
        "meta": "gear//a0.png",
    }[layout]
    text = file.read_text()
    assert image in text
    file.write_text(text.replace(image, path, 1))
    entry = {"visa": "line 2", "real_iad": "train entry 1", "meta": "train of gear, entry 1"}
    refused(root, layout, file.name, entry[layout], repr(path), "leads out of the data folder")


@pytest.mark.parametrize("name", ["", " ", "a/b", "../../x", "..", "a\\b", "a\nb"])
@pytest.mark.parametrize("layout", ["visa", "meta"])
def test_class_names_that_are_no_names_are_refused_with_their_file(tmp_path, layout, name):
    root, file = written(tmp_path, layout)
    if layout == "visa":
        quoted = f'"{name}"'
        file.write_text(file.read_text() + f"{quoted},train,normal,candle/x.JPG,\n")
    else:
        content = json.loads(file.read_text())
        content["train"][name] = []
        file.write_text(json.dumps(content))
    refused(root, layout, file.name, f"names a class {name!r}", "rename it there")


@pytest.mark.parametrize("layout", FILES)
def test_class_names_of_metadata_are_composed(tmp_path, layout):
    root, file = written(tmp_path, layout)
    apart, whole = unicodedata.normalize("NFD", "Gehäuse"), "Gehäuse"
    if layout == "real_iad":
        file.rename(file.with_name(f"{apart}.json"))
        (root / "toy").rename(root / whole)
    else:
        old = {"visa": "\ncandle,", "meta": '"nut": ['}[layout]
        text = json.dumps(json.loads(file.read_text())) if layout == "meta" else file.read_text()
        assert old in text
        file.write_text(text.replace(old, old.replace("candle", apart).replace("nut", apart)))
    assert f"set/{whole}" in read_split(root, layout=layout, dataset="set").class_names
    chosen = read_split(root, layout=layout, dataset="set", classes=(apart,))
    assert chosen.class_names == [f"set/{whole}"] and chosen.train and chosen.test


@pytest.mark.parametrize("layout", FILES)
def test_a_mask_that_leaves_the_root_is_refused_as_well(tmp_path, layout):
    root, file = written(tmp_path, layout)
    mask = {
        "visa": "candle/Data/Masks/Anomaly/000.png",
        "real_iad": "NG/HS/S0001/toy_0001_HS_C1_20230921.png",
        "meta": "gear/truth/b.png",
    }[layout]
    text = file.read_text()
    assert mask in text
    file.write_text(text.replace(mask, "../mask.png", 1))
    refused(root, layout, file.name, "'../mask.png'", "leads out of the data folder")


@pytest.mark.parametrize("layout", FILES)
def test_files_that_are_listed_and_not_there_are_counted_and_the_first_is_named(tmp_path, layout):
    root, _ = written(tmp_path, layout)
    endings = (".JPG", ".jpg") if layout != "meta" else ("a0.png",)
    gone = [file for file in sorted(root.rglob("*")) if file.name.endswith(endings)][:2]
    for file in gone:
        file.unlink()
    refused(root, layout, "2 of ", "are not there, the first is", gone[0].name, "unpack all")


@pytest.mark.parametrize("layout", JSON)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no valid JSON"),
        ("", "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
        ("[]", "has no "),
        ('{"train": 5, "test": 5}', "has no "),
        ("\udcff", "cannot be read: it is not utf-8"),
    ],
)
def test_json_that_is_damaged_or_something_else_is_named(tmp_path, layout, content, message):
    root, file = written(tmp_path, layout)
    file.write_bytes(content.encode(errors="surrogateescape"))
    refused(root, layout, file.name, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_path": None}, "has no text 'image_path'"),
        ({"image_path": 7}, "has no text 'image_path'"),
        ({"anomaly_class": None}, "has no text 'anomaly_class'"),
        ({"mask_path": ["a"]}, "has no text 'mask_path'"),
    ],
)
def test_an_entry_of_real_iad_that_lacks_a_field_is_named(tmp_path, change, message):
    root, file = written(tmp_path, "real_iad")
    content = json.loads(file.read_text())
    content["test"][1] |= change
    file.write_text(json.dumps(content))
    refused(root, "real_iad", "toy.json, test entry 2,", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anomaly": 2}, "anomaly=2; write 0 for normal"),
        ({"anomaly": "1"}, "anomaly='1'"),
        ({"img_path": 3}, "has no text 'img_path'"),
        ({"specie_name": 3}, "has no text 'specie_name'"),
    ],
)
def test_an_entry_of_a_meta_json_that_makes_no_sense_is_named(tmp_path, change, message):
    root, file = written(tmp_path, "meta")
    content = json.loads(file.read_text())
    content["test"]["nut"][1] |= change
    file.write_text(json.dumps(content))
    refused(root, "meta", "meta.json, test of nut, entry 2,", message)


def test_entries_that_are_no_objects_and_lists_that_are_none_are_named(tmp_path):
    root, file = written(tmp_path, "meta")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"train": {"nut": ["a.png"]}}))
    refused(root, "meta", "train of nut, entry 1, has no text 'img_path'")
    file.write_text(json.dumps(content | {"train": {"nut": {"a": 1}}}))
    refused(root, "meta", "train of nut, is no list")
    file.write_text(json.dumps({"train": {}, "test-pixel": {}}))
    refused(root, "meta", "no object 'test'", "--config.data.layout=manta")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("object,split,label,image,mask", "object,split,image", "has no column label, mask"),
        ("train,normal,", "learn,normal,", "split='learn'; write train or test"),
        ("train,normal,", "train,fine,", "label='fine'; write normal or anomaly"),
        ("candle,test,normal,", "candle,test\n", "line 3, is too short"),
        ("candle,test,normal,", "x" * 200_000, "is no valid table (field larger"),
    ],
)
def test_a_table_of_visa_that_makes_no_sense_is_named(tmp_path, old, new, message):
    root, file = written(tmp_path, "visa")
    file.write_text(file.read_text().replace(old, new, 1))
    refused(root, "visa", "1cls.csv", message)


def test_a_table_of_visa_that_is_missing_says_where_there_is_one(tmp_path):
    root, file = written(tmp_path, "visa")
    file.unlink()
    refused(root, "visa", "1cls.csv does not exist", "amazon-science/spot-diff")


@pytest.mark.parametrize("layout", JSON)
def test_a_class_with_nothing_to_train_on_is_named_with_a_way_out(tmp_path, layout):
    root, file = written(tmp_path, layout)
    content = json.loads(file.read_text())
    if layout == "meta":
        content["train"]["nut"] = []
        usable, empty = "gear", "nut"
    else:
        content["train"] = []
        usable, empty = "audiojack", "toy"
    file.write_text(json.dumps(content))
    refused(
        root,
        layout,
        "1 of 2 classes in ",
        f"no training images: {empty}",
        f"--config.data.classes=\"('{usable}',)\"",
    )


@pytest.mark.parametrize("layout", JSON)
def test_masks_for_some_anomalous_images_only_are_an_error(tmp_path, layout):
    root, file = written(tmp_path, layout)
    text = file.read_text()
    if layout == "meta":
        more = mini.entry("gear/b1.png", defect="dent", anomaly=1)
        mini.save(mini.picture(), root / "gear/b1.png")
        content = json.loads(text)
        content["test"]["gear"].append(more)
        text = json.dumps(content)
    else:
        text = re.sub(r'"NG/HS/S0001/toy_0001_HS_C1_\d+\.png"', "null", text)
    file.write_text(text)
    refused(root, layout, "1 anomalous images have no mask", "set/")


def test_masks_of_normal_images_are_passed_over(tmp_path):
    root, file = written(tmp_path, "meta")
    content = json.loads(file.read_text())
    content["test"]["nut"][0]["mask_path"] = "nut/truth/gone.png"
    file.write_text(json.dumps(content))
    test = read_split(root, layout="meta").test
    assert all(record.mask is None for record in test if not record.anomalous)


def test_an_image_that_is_listed_twice_or_in_both_parts_is_an_error(tmp_path):
    root, file = written(tmp_path, "meta")
    content = json.loads(file.read_text())
    content["test"]["nut"].append(content["train"]["nut"][0])
    file.write_text(json.dumps(content))
    split = read_split(root, layout="meta", dataset="set")
    with pytest.raises(ValueError, match=r"2 records have the key set/nut/a0\.png"):
        check_records(split.train, split.test)


def test_anomalous_training_images_of_a_list_are_refused(tmp_path):
    root, file = written(tmp_path, "visa")
    file.write_text(file.read_text().replace("candle,test,anomaly", "candle,train,anomaly"))
    split = read_split(root, layout="visa", dataset="set")
    with pytest.raises(
        ValueError, match="1 training images are anomalous, the first is set/candle"
    ):
        check_records(split.train, split.test)
