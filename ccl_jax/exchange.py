"""Checkpoints of the authors' released PyTorch code become workdirs, and workdirs such files."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ccl_jax import config as configs
from ccl_jax import mesh, settings, settle, setup
from ccl_jax.atomic import write_atomically
from ccl_jax.config import ConfigDict
from ccl_jax.models import pretrained, published
from ccl_jax.models.trees import flatten, save_tree
from ccl_jax.provenance import provenance
from ccl_jax.scoring import architecture_of, load_scorer, map_settings_of
from ccl_jax.state import (
    TRAINED,
    Architecture,
    Frozen,
    TrainState,
    obtain_encoder,
    purpose_key,
    split_parts,
)
from ccl_jax.workdir import check_writable, lock_workdir


class Released(NamedTuple):
    """The content of a released checkpoint, in our trees."""

    params: dict  # of the trained parts
    batch_stats: dict
    encoder: Frozen | None  # most files hold it too
    provenance: dict[str, Any]


def read_released(source: str, architecture: Architecture) -> Released:
    """A released checkpoint for the network `architecture`, every tensor accounted for.

    Raises ValueError where the file cannot be read, or naming each tensor that does not fit.
    """
    file = Path(source)
    if not file.is_file():
        raise ValueError(
            f"config.published.checkpoint={source!r} is not a file; name the checkpoint to "
            f"import, e.g. --config.published.checkpoint=net.pth."
        )
    tensors = pretrained.read_tensors(file, "config.published.checkpoint")
    has_encoder = any(name.startswith(pretrained.RELEASED) for name in tensors)
    parts = (*TRAINED, "encoder") if has_encoder else TRAINED
    _, *wanted = architecture.abstract()
    params, batch_stats = published.from_published(
        tensors, *(split_parts(tree, parts) for tree in wanted), source=str(file)
    )
    encoder = None
    if has_encoder:
        encoder = Frozen(params["encoder"], batch_stats["encoder"])
    return Released(
        split_parts(params, TRAINED),
        split_parts(batch_stats, TRAINED),
        encoder,
        {
            "file": str(file.absolute()),
            "sha256": pretrained.sha256_of(file),
            "tensors": len(tensors),
        },
    )


def check_same_encoder(named: Frozen, inside: Frozen | None, source: str, file: str) -> None:
    """Returns if the encoder of `source` is the one that the checkpoint `file` was trained with.

    Raises ValueError where the checkpoint holds another one, or where nobody can know.
    """
    if inside is None:
        if source == "random":
            raise ValueError(
                f"{file} holds no encoder, and its decoder has not learned to rebuild a random "
                f"one; name the weights it was trained with, e.g. "
                f"--config.encoder.weights=hub:wide_resnet50_2.racm_in1k."
            )
        return
    ours, theirs = flatten(named), flatten(inside)
    apart = {path: float(np.abs(ours[path] - theirs[path]).max()) for path in ours}
    other = [path for path, distance in apart.items() if distance != 0]
    if other:
        worst = max(other, key=lambda path: apart[path])
        raise ValueError(
            f"config.encoder.weights={source!r} is not the encoder that {file} was trained with: "
            f"{len(other)} of {len(ours)} tensors differ, {worst} by up to {apart[worst]:.3g}. Use "
            f"the one inside the checkpoint: --config.encoder.weights={file}."
        )


def import_job(config: ConfigDict, workdir: Path) -> int:
    """Makes a workdir of a released checkpoint, for evaluate, predict, notebooks and training on.

    The optimizer starts anew: the released files hold the state of one that never stepped.
    """
    refuse_used(workdir)
    architecture = architecture_of(config.to_dict())
    where = setup.devices_of(config, shards=1)
    setup.one_process("import")
    released = read_released(config.published.checkpoint, architecture)
    optimizer = settings.optimizer_of(config, 1)  # its state does not depend on the length
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=released.params,
        batch_stats=released.batch_stats,
        opt_state=optimizer.init(released.params),
    )
    with tempfile.TemporaryDirectory() as scratch:
        source = config.encoder.weights
        encoder = Path(scratch) / "encoder"
        key = purpose_key(jax.random.key(config.seed), "encoder", 0)
        try:
            frozen, _ = obtain_encoder(encoder, source, architecture, key, fresh=True)
        except pretrained.HubError as error:
            if released.encoder is None:
                raise
            raise ValueError(
                f"{error.__cause__ or error}\n{source} could not be fetched and compared with the "
                f"encoder inside the checkpoint; to take that one, use "
                f"--config.encoder.weights={config.published.checkpoint}."
            ) from error
        check_same_encoder(frozen, released.encoder, source, config.published.checkpoint)
        with (
            lock_workdir(workdir),
            setup.checkpoints_of(config, workdir) as checkpoints,
        ):
            refuse_used(workdir)
            shutil.copytree(encoder, workdir / "encoder", dirs_exist_ok=True)
            write_description(config, workdir, released)
            checkpoints.save(0, jax.device_put(state, mesh.replicated(where)))
    print(
        f"{workdir}: {released.provenance['tensors']} tensors of {config.published.checkpoint}; "
        f"--job evaluate and --job predict take it from here"
    )
    return 0


def refuse_used(workdir: Path) -> None:
    """Raises ValueError where the workdir holds a checkpoint: it is somebody's training."""
    if any(folder.name.isdigit() for folder in (workdir / "checkpoints").glob("*")):
        raise ValueError(
            f"{workdir} already holds a checkpoint; import into another folder, e.g. "
            f"--workdir={workdir}-imported."
        )


def write_description(config: ConfigDict, workdir: Path, released: Released) -> None:
    """Writes config.json and published.json; whatever data a first start had seen is forgotten."""
    config = settle.with_absolute_roots(config)
    (workdir / "data.json").unlink(missing_ok=True)
    write_atomically(workdir / "config.json", configs.to_json(config))
    provenance = json.dumps(released.provenance, indent=2) + "\n"
    write_atomically(workdir / "published.json", provenance)


def export_job(config: ConfigDict, workdir: Path) -> int:
    """Writes a checkpoint of `workdir`, encoder and all, as the released code would name it."""
    setup.devices_of(config, shards=1)
    setup.one_process("export")
    settle.check_same_model(config, workdir)
    values = config.to_dict()
    scorer = load_scorer(
        workdir,
        architecture=architecture_of(values),
        settings=map_settings_of(values),
        step=config.published.step,
        devices=config.run.devices,
    )
    default = workdir / "published" / f"{scorer.step}.safetensors"
    output = Path(config.published.output or default)
    check_writable(output.absolute().parent, "the folder of --config.published.output")
    tensors = published.to_published(
        *(jax.device_get(tree) for tree in (scorer.params, scorer.batch_stats))
    )
    made = provenance(values) | {"step": scorer.step, "workdir": str(workdir.absolute())}
    save_tree(output, tensors, made)
    print(f"{output}: {len(tensors)} tensors of step {scorer.step}, in PyTorch's layout")
    return 0
