"""Miniatures of the published data sets, quirks included; tests write them where they need them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(size=(12, 8), seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def mask(size=(12, 8), value=255, box=(2, 2, 5, 5)):
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = value
    return Image.fromarray(pixels)


def save(image, file):
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return file


def junk(root):
    """What operating systems and people leave behind."""
    for name in (".DS_Store", "Thumbs.db", "readme.txt", "__MACOSX/01/train/good/._000.png"):
        file = Path(root) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"junk")


def mvtec(root, classes=("grid", "metal_nut"), masks="_mask"):
    """MVTec AD, of which one class is single-channel; MPDD and Uni-Medical look the same."""
    for number, name in enumerate(classes):
        mode = "L" if number == 0 else "RGB"
        for i in range(2):
            save(picture(seed=i).convert(mode), root / name / f"train/good/{i:03}.png")
        save(picture(seed=3).convert(mode), root / name / "test/good/000.png")
        for defect in ("bent", "scratch"):
            save(picture(seed=4).convert(mode), root / name / f"test/{defect}/000.png")
            save(mask(), root / name / f"ground_truth/{defect}/000{masks}.png")
    for file in ("license.txt", "readme.txt"):
        (root / file).write_text("")
    return root


def mvtec2(root, classes=("can", "fruit_jelly")):
    for name in classes:
        for part, number in (("train", 3), ("validation", 2), ("test_public", 1)):
            for i in range(number):
                save(picture((30, 10)), root / name / part / f"good/{i:03}_regular.png")
        save(picture((30, 10)), root / name / "test_public/bad/000_overexposed.png")
        truth = root / name / "test_public/ground_truth/bad/000_overexposed_mask.png"
        save(mask((30, 10)), truth)
        for part in ("test_private", "test_private_mixed"):
            save(picture((30, 10)), root / name / part / "000_mixed.png")
    return root


def visa(root, classes=("candle", "pcb1")):
    """As published: a table of splits, .JPG, masks of small integers."""
    rows = ["object,split,label,image,mask"]
    for name in classes:
        for i in range(4):
            file = f"{name}/Data/Images/Normal/{i:04}.JPG"
            save(picture(seed=i), root / file)
            rows.append(f"{name},{'test' if i == 1 else 'train'},normal,{file},")
        file, truth = f"{name}/Data/Images/Anomaly/000.JPG", f"{name}/Data/Masks/Anomaly/000.png"
        save(picture(seed=9), root / file)
        save(mask(value=3), root / truth)
        rows.append(f"{name},test,anomaly,{file},{truth}")
        (root / name / "image_anno.csv").write_text("image,label,mask\n")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return root


def visa_converted(root, classes=("candle", "pcb1")):
    for name in classes:
        for i in range(3):
            save(picture(seed=i), root / "1cls" / name / f"train/good/{i:04}.JPG")
        save(picture(seed=5), root / "1cls" / name / "test/good/0005.JPG")
        save(picture(seed=9), root / "1cls" / name / "test/bad/000.JPG")
        save(mask(), root / "1cls" / name / "ground_truth/bad/000.png")
    return root


def btad(root):
    """Images and masks of either ending, in a folder that the archive adds."""
    endings = {"01": ("bmp", "png"), "02": ("png", "png"), "03": ("bmp", "bmp")}
    for name, (image, truth) in endings.items():
        folder = root / "BTech_Dataset_transformed" / name
        for i in range(2):
            save(picture(seed=i), folder / f"train/ok/{i:04}.{image}")
        save(picture(seed=5), folder / f"test/ok/0005.{image}")
        save(picture(seed=6), folder / f"test/ko/0000.{image}")
        save(mask(), folder / f"ground_truth/ko/0000.{truth}")
    return root


def real_iad(root, classes=("audiojack", "toy"), lists="realiad_jsons"):
    """Two normal parts to train on, a normal and a defective one to test; one view of it is OK."""
    for name in classes:
        listed = {"meta": {"normal_class": "OK", "prefix": f"{name}/"}, "train": [], "test": []}
        separator = "__" if name == "audiojack" else "_"

        def add(part, sample, code, view, *, shown=None, of=listed, name=name, sep=separator):
            shown = code if shown is None else shown
            where = f"OK/S{sample:04}" if code == "OK" else f"NG/{code}/S{sample:04}"
            stem = f"{where}/{name}{sep}{sample:04}_{shown}_C{view}_2023092{view}"
            seed = view + 10 * sample + 100 * (code != "OK")
            save(picture(seed=seed), root / "realiad_512" / name / f"{stem}.jpg")
            entry = {"category": name, "anomaly_class": shown, "image_path": f"{stem}.jpg"}
            if shown != "OK":
                save(mask(), root / "realiad_512" / name / f"{stem}.png")
            entry["mask_path"] = f"{stem}.png" if shown != "OK" else None
            of[part].append(entry)

        for view in range(1, 6):
            add("train", 1, "OK", view)
            add("train", 2, "OK", view)
            add("test", 3, "OK", view)
            add("test", 1, "HS", view, shown="OK" if view == 4 else "HS")
        for folder, views in ((lists, "12345"), ("realiad_jsons_sv", "1")):
            some = {
                part: [entry for entry in listed[part] if entry["image_path"][-5] in views]
                for part in ("train", "test")
            }
            file = root / folder / f"{name}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(listed | some))
    return root / "realiad_512"


def strip(size=8, seed=0):
    return picture((5 * size, size), seed)


def manta(root):
    """Two domains; defects in single views; masks in one folder, or in one for each defect."""
    for folder in ("agriculture/maize", "mechanics/screw"):
        for i in range(2):
            save(strip(seed=i), root / folder / f"train/good/{i:03}.png")
        save(strip(seed=5), root / folder / "test-pixel/good/010.png")
        save(strip(seed=6), root / folder / "test-pixel/crack/000.png")
    shows_in_view_3 = mask((40, 8), box=(26, 2, 30, 5))
    save(shows_in_view_3, root / "agriculture/maize/test-pixel/mask/000.png")
    save(strip(seed=7), root / "mechanics/screw/test-pixel/rust/000.png")
    save(shows_in_view_3, root / "mechanics/screw/test-pixel/mask/crack/000.png")
    shows_in_views_0_and_1 = mask((40, 8), value=1, box=(6, 0, 10, 8))
    save(shows_in_views_0_and_1, root / "mechanics/screw/test-pixel/mask/rust/000.png")
    return root


def entry(file, *, mask="", defect="good", anomaly=0):
    return {
        "img_path": file,
        "mask_path": mask,
        "cls_name": file.split("/")[0],
        "specie_name": defect,
        "anomaly": anomaly,
    }


def meta(root, classes=("gear", "nut")):
    """ADer's description of a folder of any shape, with its doubled slashes."""
    parts = {"train": {}, "test": {}}
    for name in classes:
        for i in range(2):
            save(picture(seed=i), root / name / f"a{i}.png")
        save(picture(seed=4), root / name / "deep/er/b.png")
        save(mask(), root / name / "truth/b.png")
        parts["train"][name] = [entry(f"{name}//a0.png")]
        bad = entry(f"{name}/deep/er/b.png", mask=f"{name}/truth/b.png", defect="dent", anomaly=1)
        parts["test"][name] = [entry(f"./{name}/a1.png"), bad]
    (root / "meta.json").write_text(json.dumps(parts))
    return root
