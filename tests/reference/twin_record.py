"""How far the PyTorch twin, in float64, is from what was recorded of the original code.

Each function returns {recorded quantity: relative difference}.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch

from tests.reference import twin_losses
from tests.reference.goldens import Golden, make_input, make_integers, sample_indices
from tests.reference.twin_model import PLANS, Encoder, Forward, Twin, from_numpy, to_numpy
from tests.reference.twin_step import TwinTraining

Differences = dict[str, float]
PROJECTORS = {"rd": None, "rd_lgc:dp=False": "plain", "rd_lgc:dp=True": "depthwise"}
LOCAL_INPUTS = ("q_b", "k_b", "q_grid", "k_grid")
RECORDED_TERMS = {
    "loss_cos": "cosine",
    "loss_scl": "global",
    "loss_dense": "local",
    "loss_total": "loss",
    "grad_norm_before_clip": "gradient_norm",
}


def double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array)).double()


def images(golden: Golden, tag: str) -> torch.Tensor:
    return double(make_input(tag, golden.meta["inputs"][tag], golden.meta["input_seed"]))


def encoder_differences(name: str) -> Differences:
    """The twin's three encoder maps against a `teacher_*` golden of a ResNet."""
    golden = Golden(name)
    weights = {key: value for key, value in golden.weights().items() if "layer4." not in key}
    architecture = golden.meta["key_table"].split(":")[1]
    encoder = from_numpy(Encoder(PLANS[architecture]).double().eval(), weights)
    with torch.no_grad():
        maps = encoder(images(golden, *golden.meta["inputs"]))
    return {
        f"feat{i}": golden.difference(f"feat{i}", scale.numpy(), f64=True)
        for i, scale in enumerate(maps)
    }


def recorded_noise(golden: Golden) -> list | None:
    """Per scale (values, mask), or None where the recording's gate was closed."""
    seed = golden.meta.get("noise_seed")
    if seed is None:
        return None
    noise = []
    for scale in range(3):
        b, c, h, w = golden.meta["arrays"][f"q_grid{scale}"]["shape"]
        values = make_input(f"noise{scale}", (b, c, h, w), seed)
        mask = make_integers(f"noise_mask{scale}", 0, 2, (b, 1, h, w), seed)
        noise.append((double(values), double(mask)))
    return noise


def quantities(first: Forward, second: Forward | None) -> dict[str, torch.Tensor]:
    """What a golden of a network may hold, under its name there."""
    assert first.rebuilt is not None
    found = {"glo_feats": first.pooled}
    lists = {"feats_t": first.targets, "feats_s": first.rebuilt}
    if second is not None:
        found["glo_feats_k"] = second.pooled
        lists |= {"feats_t_q": first.targets, "feats_t_k": second.targets}
        lists |= {"q_grid": first.projected, "k_grid": second.projected}
    found |= {f"{key}{i}": scale for key, maps in lists.items() for i, scale in enumerate(maps)}
    return found


def network_differences(name: str) -> Differences:
    """One forward pass, running statistics included, against an `rd*` golden."""
    golden = Golden(name)
    twin = Twin("wide_resnet50_2", PROJECTORS[golden.meta["model"]]).double()
    from_numpy(twin, golden.weights()).train(golden.meta["mode"] == "train")
    clean, *augmented = (images(golden, tag) for tag in golden.meta["inputs"])
    with torch.no_grad():
        if augmented and twin.training:
            found = quantities(*twin.two_views(clean, *augmented, recorded_noise(golden)))
        else:
            found = quantities(twin(clean), None)
    found |= {f"bn/{key}": value for key, value in twin.state_dict().items()}
    return {
        key: golden.difference(key, found[key].numpy(), f64="num_batches" not in key)
        for key in golden.meta["arrays"]
    }


def case_differences(
    golden: Golden, case: str, names: list[str], loss_of: Callable[..., torch.Tensor]
) -> Differences:
    """A recorded loss and its gradients; infinite for one that should (not) be there."""
    inputs = {name: double(golden[name]).requires_grad_() for name in names}
    loss = loss_of(inputs)
    if loss.requires_grad:
        loss.backward()
    key = f"{case}/loss"
    found = {key: golden.difference(key, loss.detach().numpy(), f64=True)}
    present = golden.meta["cases"][case]["grads_present"]
    for name, tensor in inputs.items():
        key = f"{case}/grad_{name}"
        if tensor.grad is not None and name in present:
            found[key] = golden.difference(key, tensor.grad.numpy(), f64=True)
        elif tensor.grad is not None or name in present:
            found[key] = np.inf
    return found


def loss_differences(name: str) -> Differences:
    """All cases of a `loss_*` golden that the method uses."""
    golden = Golden(name)
    kinds = {"scl": global_case, "dense": local_case, "regression": cosine_case}
    compute = kinds[name.removeprefix("loss_").split("_")[0]]
    found: Differences = {}
    for case, settings in golden.meta["cases"].items():
        found |= compute(golden, case, settings)
    return found


def global_case(golden: Golden, case: str, settings: dict) -> Differences:
    labels, temperature = torch.tensor(settings["labels"]), settings["temperature"]
    first_release = case.startswith("scl_v1")
    form = twin_losses.global_two_view if first_release else twin_losses.global_second_release
    names = ["feats", "feats_k"] if first_release else ["feats"]
    return case_differences(
        golden, case, names, lambda x: form(*x.values(), labels, temperature=temperature)
    )


def local_case(golden: Golden, case: str, settings: dict) -> Differences:
    names = [[f"{kind}{scale}" for scale in settings["scales"]] for kind in LOCAL_INPUTS]
    drawn = golden.arrays.get(f"{case}/negatives")  # absent where nobody has a negative

    def loss_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return settings["lam"] * twin_losses.local_contrastive(
            *([inputs[name] for name in kind] for kind in names),
            torch.tensor(settings["labels"]),
            None if drawn is None else torch.from_numpy(drawn).long(),
            temperature=settings["temperature"],
        )

    return case_differences(golden, case, [*itertools.chain(*names)], loss_of)


def cosine_case(golden: Golden, case: str, _: dict) -> Differences:
    if not case.startswith("cos_flat"):
        return {}
    _, flat, average, weight = case.split("_")
    factor = float(weight.removeprefix("lam")) / (3 if average == "avg1" else 1)
    names = [[f"{side}{scale}" for scale in range(3)] for side in "ts"]

    def loss_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        maps = ([inputs[name] for name in side] for side in names)
        return factor * twin_losses.cosine_distillation(*maps, flat=flat == "flat1")

    return case_differences(golden, case, [*itertools.chain(*names)], loss_of)


def trajectory_differences(name: str) -> Differences:
    """Loss terms, gradient norms and sampled weights over the recorded optimisation steps."""
    golden = Golden(name)
    projector = PROJECTORS[golden.meta["model"]]
    twin = from_numpy(Twin("wide_resnet50_2", projector).double(), golden.weights())
    training = TwinTraining(twin, global_form="second_release")
    shape = next(iter(golden.meta["inputs"].values()))
    rows: list[dict[str, float]] = []
    sampled: dict[str, list] = {
        key: [] for key in golden.meta["arrays"] if key[:4] == "par/" and key.endswith("/samples")
    }
    for step, labels in enumerate(golden.meta["labels"]):
        seed = golden.meta["input_seed"]
        views = (double(make_input(f"{tag}_step{step}", shape, seed)) for tag in ("img", "aug_img"))
        negatives = torch.from_numpy(golden[f"negatives_step{step}"]).long()
        rows.append(training.step(*views, torch.tensor(labels), negatives))
        values = to_numpy(twin)
        for key, history in sampled.items():
            parameter = key.split("/")[1]
            where = sample_indices(f"param:{parameter}", values[parameter].size, 16)
            history.append(values[parameter].reshape(-1)[where])
    found = {
        key: golden.difference(key, np.array([row[term] for row in rows]), f64=True)
        for key, term in RECORDED_TERMS.items()
    }
    return found | {
        key: golden.difference(key, np.stack(history), f64=True) for key, history in sampled.items()
    }
