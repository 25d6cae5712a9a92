"""Every setting, once, with its unit; the other configs change only what differs.

The values here are the published RD+CCL recipe (first release, December 2024), except for what
names a data set. A setting that the two releases treat differently says so.
"""

from ml_collections import config_dict


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns the default config; `data.root` must still be set.

    `method` (as in `--config configs/demo.py:rd`) is "rd_ccl", or "rd": reverse distillation
    alone, without projector, noise and contrastive losses, which CCL is compared with.
    """
    config = config_dict.ConfigDict(
        {
            "name": "default",  # shown in logs and tables
            "seed": 42,  # root of every random number: weights, order, views, noise, negatives
            "data": data(),
            "synthetic": synthetic(),
            "encoder": {
                # "builtin", a resnet18 learned from procedural images; "random"; a .safetensors or
                # .pth file in timm or torchvision naming; or "hub:NAME", a timm model on the hub.
                "weights": "hub:wide_resnet50_2.racm_in1k",
            },
            "model": model(),
            "loss": loss(),
            "augment": augment(),
            "optimizer": optimizer(),
            "train": train(),
            "eval": evaluation(),
            "predict": predict(),
            "published": published(),
            "pretrain": pretrain(),
            "benchmark": benchmark(),
            "run": run(),
        }
    )
    if method == "rd":
        config.model.projector = "none"
        config.model.noise_probability = 0.0
        config.loss.local.weight = 0.0
        config.loss.global_.weight = 0.0
    elif method != "rd_ccl":
        raise ValueError(f'a config file takes ":rd_ccl" or ":rd" after its name, not ":{method}".')
    return config.lock()  # a misspelt key is an error, not a setting that nobody reads


def data() -> dict:
    """Which images, and how they become batches."""
    return {
        # "mvtec": <class>/train/good ..., also your own photos; "mvtec2", "visa", "btad",
        # "real_iad", "manta": as published; "meta": what root/meta.json names; "joint": the data
        # sets of `parts`; "synthetic": generated into root first. See ccl_jax/data/layouts.
        "layout": "mvtec",
        "root": "",  # folder that holds one folder per class
        "name": "",  # name of the data set in results; "" takes the folder's name
        "classes": (),  # names of the classes to use; () takes all
        # For "joint", by name: {"layout", "root", "classes", "splits"} as here; configs/joint.py.
        "parts": {},
        # Other lists than the published ones, relative to root: a .csv ("visa") or .json ("meta")
        # file, or a folder ("real_iad"), e.g. ../realiad_jsons/realiad_jsons_sv.
        "splits": "",
        "views": (),  # of sets with several views of a part, e.g. ("C1",); () takes all
        "validation": "leave",  # of "mvtec2": its validation images set aside; "train": used too
        "follow_links": False,  # whether links may lead out of root
        "image_size": 256,  # pixels, height and width; divisible by 32
        "source": "folder",  # root as it is, or "prepared": shards that --job prepare has written
        "prepared": "",  # folder or URL (gs://bucket/mvtec) of the shards; "" is ROOT-prepared
        "prepared_images": "original",  # as found; "resized": once, to image_size, as PNG
        "cache_dir": "",  # folder for local copies of shards at URLs; "" is ~/.cache/ccl_jax
        "shuffle": "plain",  # "plain", or "class_balanced": every class equally often
        # What `--job prepare` opens of each file: "headers", as every job does before it starts, or
        # "full": all pixels, which finds what is cut off, empty, or there twice.
        "check": "headers",
        # GiB of memory per process for decoded images, so that each is read from its file once; a
        # set that does not fit (images x image_size^2 x 3 bytes) is not kept at all; 0: never keep.
        "cache_gib": 2.0,
        # An unreadable training image: "stop" there, or "skip" it: the next readable one of its
        # class stands in for it, and it is named at once and at the end. A test image always stops.
        "bad_files": "stop",
    }


def synthetic() -> dict:
    """The generated benchmark, used where data.layout is "synthetic"."""
    return {
        "image_size": 128,  # pixels, height and width of the written images
        "train_per_class": 60,  # normal training images per class
        "test_normal_per_class": 20,  # normal test images per class
        "test_per_defect": 5,  # anomalous test images per class and kind of defect
        "seed": 0,  # of the generator; the training seed leaves the benchmark alone
    }


def model() -> dict:
    """Encoder, projector, neck and decoder."""
    return {
        "family": "rd",  # reverse distillation
        "encoder": "wide_resnet50_2",  # "resnet50", "resnet34", "resnet18"; for trials "resnet10"
        "projector": "plain",  # "plain" 3x3, "depthwise" separable, or "none" (RD without CCL)
        "noise_probability": 0.3085,  # of disturbing a step's projected maps: P(N(0, 1) > 0.5)
        "compute_dtype": "float32",  # or "bfloat16"; parameters and losses stay float32
        # Images over which BatchNorm takes its statistics in training: 0, the whole batch; or
        # groups of so many, e.g. those of one device, which then need no word from the others.
        "norm_images": 0,
    }


def loss() -> dict:
    """The three terms; a weight of 0 leaves a term out."""
    return {
        "cosine": {
            "weight": 1.0,
            "flat": True,  # cosine of an image's whole flattened map; False: mean over positions
        },
        "local": {
            "weight": 1.0,
            "temperature": 0.05,
            "match": "global",  # as released: best match anywhere; "window": the supplement's
            "window": 5,  # positions, side of the square window; only for match="window"
            "same_class_candidates": False,  # supplement: also match another image of the class
            # Where negatives come from: "batch", as released, every image of another class, for
            # which each device receives the maps of all others; "near", only the next `reach`
            # images of the (shuffled) batch, which costs the same on any number of devices and
            # gives the same numbers on any; "auto", "batch" on up to 8 devices, above that "near".
            "negatives": "auto",
            "reach": 15,  # images; 15 are as many as the published batch of 16 offers
        },
        "global_": {
            "weight": 1.0,
            "temperature": 0.05,
            "form": "two_view",  # first release; "second_release": one view, attracts negatives
        },
    }


def augment() -> dict:
    """The second view, made from the resized image on the device, in this order."""
    return {
        "crop_scale": (0.8, 1.0),  # share of the area
        "crop_ratio": (3 / 4, 4 / 3),  # width / height
        "horizontal_flip": 0.5,  # probability
        "vertical_flip": 0.5,  # probability
        "brightness": 0.4,  # factor drawn from [1 - b, 1 + b]
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,  # turns, drawn from [-h, h]
        "grayscale": 0.2,  # probability
        "blur_kernel": 23,  # pixels, odd
        "blur_sigma": (0.1, 2.0),  # pixels
        "rotation": 15.0,  # degrees, drawn from [-r, r]
    }


def optimizer() -> dict:
    """Two Adam optimizers behind one gradient clip."""
    return {
        "projector_lr": 1e-3,
        "lr": 5e-3,  # neck and decoder
        "betas": (0.5, 0.999),
        "clip_norm": 5.0,  # global L2 norm over all trained parameters; 0 switches it off
        "decay_at": 1.0,  # share of the steps after which both rates are divided by ten; 1: never
        # (both releases configure 0.8, but attach it to an optimizer that never steps)
    }


def train() -> dict:
    """How long, how much at once, and what is kept."""
    return {
        "batch_size": 16,  # images per step over all devices; batches run across epochs
        "epochs": 200,  # passes over the training images (second release: 100)
        "steps": 0,  # optimizer steps; 0 derives them from epochs
        "log_every": 10,  # steps between lines in the log
        "checkpoint_every": 1000,  # steps
        "keep_checkpoints": 2,  # the newest
        # Also the one whose evaluation (eval.every_steps, or a follower's) has the highest mean of
        # this metric, e.g. "image_auroc"; "": none. It is chosen on the test set: for looking at.
        "keep_best": "",
        "keep_every": 0,  # steps; also all checkpoints at multiples of it, for good; 0: none
    }


def evaluation() -> dict:
    """How test images become numbers; recorded in results.json."""
    return {
        "every_steps": 0,  # evaluate during training; 0: only at the end
        "batch_size": 16,  # images over all devices
        "smoothing_sigma": 4.0,  # pixels of the score map; 0 switches it off
        "combine": "add",  # of the scales; or "mul", or "concatenate" (one distance for all scales)
        "distance": "cosine",  # of target and rebuilt features; or "l2", which has no upper bound
        "pool": 1,  # pixels, side of the average pool before the image score's maximum; 1: none
        "image_label": "folder",  # or "mask": released code, a defect lost in resizing is normal
        "aupro_fpr_limit": 0.3,  # AUPRO is integrated up to this false positive rate
        # Also pixel metrics as published tables take them: "adeval_50" (second release's table),
        # "threshold_step" (its other evaluator); for comparison only, beside the exact ones.
        "published_metrics": (),
        "figures_per_class": 4,  # test images on the figure sheet, half anomalous; 0: no figures
        "step": -1,  # checkpoint to evaluate; -1: the newest
        "follow": False,  # of `--job evaluate`: every checkpoint of a running training as it comes
        "poll_seconds": 10.0,  # between looks for one
        # Seconds without a new checkpoint, and without a training in the workdir, after which a
        # follower gives up; 0: it waits without end.
        "follow_patience": 3600.0,
    }


def predict() -> dict:
    """What `--job predict` reads and writes."""
    return {
        "input": "",  # an image or a folder of images
        "output": "",  # folder; "" is WORKDIR/predictions
        "batch_size": 8,
        "step": -1,  # checkpoint; -1: the newest
    }


def published() -> dict:
    """Checkpoints in the naming of the authors' released code."""
    return {
        "checkpoint": "",  # .pth or .safetensors file that `--job import` reads
        "output": "",  # file that `--job export` writes; "" is WORKDIR/published/<step>.safetensors
        "step": -1,  # checkpoint to export; -1: the newest
    }


def pretrain() -> dict:
    """An encoder's own training, on procedural images (`--job pretrain`)."""
    return {
        # Also "gratings", "noise", "leaves", "tiles", "objects", "reliefs": equally many of each.
        "kinds": ("networks",),
        "per_kind": 640,  # classes of each kind
        "image_size": 64,  # pixels, a multiple of 16
        "composite": False,  # two pictures in one image
        "dense": False,  # a class at every position; False: of the pooled maps
        "head_weights": (0.0, 0.0, 1.0),  # of the losses on stages 1 to 3
        "label_smoothing": 0.1,  # share of the target that all classes get alike
        "batch_size": 80,  # images over all devices; a multiple of kinds times devices
        "lr": 1e-3,  # of AdamW, at its highest
        "weight_decay": 0.05,  # of AdamW, on kernels
        "warmup_steps": 200,  # over which the rate rises
        "steps": 1250,  # more steps go on from before the rate fell
        "decay_share": 0.25,  # of the steps, the last ones, over which the rate falls to zero
        "checkpoint_every": 200,  # steps
        "log_every": 50,  # steps between lines in the log
        # After that: damaged images among normal ones, of products that are new in every step.
        "episodes": episodes(),
    }


def episodes() -> dict:
    """A phase in which damaged images are to be found."""
    return {
        # of products
        "kinds": ("networks", "gratings", "noise", "leaves", "tiles", "objects", "reliefs"),
        "per_kind": 1,  # products of each kind in a step; a multiple of the devices
        "group": 8,  # images of a product
        "sound": 2,  # of them without a defect
        "image_size": 64,  # pixels, a multiple of 16
        "softness": 0.15,  # squared distance of unit vectors over which weights fall by e
        "memory": 1024,  # positions of a product's images that others are compared with
        "stage_weight": 0.5,  # of the losses on each stage alone; on all together: 1
        "image_weight": 0.5,  # of the loss on image scores; on positions: 1
        "lr": 1e-3,  # of AdamW, at its highest
        "weight_decay": 0.05,  # of AdamW, on kernels
        "warmup_steps": 60,  # over which the rate rises
        "steps": 3000,  # more steps go on from before the rate fell; 0 leaves the phase out
        "decay_share": 0.4,  # of the steps, as above
        "checkpoint_every": 200,  # steps
        "log_every": 50,  # steps between lines in the log
    }


def benchmark() -> dict:
    """What `--job benchmark` times; images a batch: train.batch_size and eval.batch_size."""
    return {
        "steps": 20,  # that are timed, of the training and of each of its parts
        "warm_up": 3,  # steps before them that do not count
        "images": 320,  # of the training data, that are read to time the input pipeline
        # Score maps whose metrics are timed; 0: as many as there are test images, or 1725 (as MVTec
        # AD has) where the data are not at hand.
        "metric_images": 0,
        "page": "",  # Markdown page whose part the table replaces, as docs/benchmarks.md; "": none
    }


def run() -> dict:
    """Settings that only say how to run; a workdir may be continued with others."""
    return {
        "devices": 0,  # devices to use; 0: all
        "parameter_shards": 1,  # devices that hold parameters and optimizer state together
        # Of several processes: "auto" reads JAX_COORDINATOR_ADDRESS or the environment of SLURM,
        # Open MPI or a TPU slice on Kubernetes; "slurm", "ompi", "mpi4py", "k8s", "gcetpu" (TPU
        # VMs) or "gketpu" insist on one; "none": this process runs alone.
        "cluster": "auto",
        "heartbeat_seconds": 100,  # without a sign of life of a process before the others end
        "threads": 4,  # that decode images, per process
        "workers": 0,  # processes that decode images which are not kept in memory; 0: threads only
        # Bit for bit the same on GPUs from run to run: --xla_gpu_deterministic_ops=true, without
        # autotuning and atomic sums (how much slower was not measured). CPUs need it not.
        "deterministic": False,
        # Less device memory, more time: maps within residual blocks and projector heads are not
        # kept for the backward pass but computed again; same numbers, up to rounding. XLA for CPUs
        # merges the two computations, so that it changes nothing there.
        "remat": False,
        # Folder of compiled programs, from which the next start takes them; "": none is kept. The
        # environment variable JAX_COMPILATION_CACHE_DIR, where set, names another.
        "compilation_cache": "~/.cache/ccl_jax/xla",
        "progress": True,  # progress bars
        "tensorboard": True,  # events beside metrics.jsonl
        # At these a training saves and ends: Ctrl-C, and what schedulers send before they kill.
        "stop_signals": ("SIGINT", "SIGTERM", "SIGUSR1"),
        # Exit status after one; 0: 128 + its number, as 143, which schedulers read as unfinished.
        "unfinished_exit_code": 0,
        # Without progress before a process ends itself, status 70, and names what holds it up; six
        # times as long while it starts or compiles; 0: never.
        "stall_seconds": 600.0,
        "peak_tflops": 0.0,  # of one device, for `mfu` in the log; 0: by its kind, where known
    }
