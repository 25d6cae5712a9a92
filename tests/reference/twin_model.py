"""RD with CCL in plain PyTorch, under the names that the released checkpoint has.

Written from the reference's description and recorded numbers, not from `ccl_jax`, which it checks.
Layout is PyTorch's (NCHW); lists of maps run from fine (stride 4) to coarse (stride 16).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

Maps = list[torch.Tensor]
Noise = Sequence[tuple[torch.Tensor, torch.Tensor]]  # per scale: values, and a mask of one channel


@dataclasses.dataclass(frozen=True)
class Plan:
    """What tells one encoder, with its neck and decoder, from another."""

    kernels: tuple[int, ...]  # of a residual block's convolutions
    widening: int  # of an encoder's and a decoder's bottleneck; the neck has none
    depths: tuple[int, int, int]
    neck_depth: int

    @property
    def growth(self) -> int:
        """A block's output channels per nominal channel."""
        return 4 if len(self.kernels) == 3 else 1


BASIC, BOTTLENECK = (3, 3), (1, 3, 1)
PLANS = {
    "resnet10": Plan(BASIC, 1, (1, 1, 1), 1),
    "resnet18": Plan(BASIC, 1, (2, 2, 2), 2),
    "resnet34": Plan(BASIC, 1, (3, 4, 6), 3),
    "resnet50": Plan(BOTTLENECK, 1, (3, 4, 6), 3),
    "wide_resnet50_2": Plan(BOTTLENECK, 2, (3, 4, 6), 3),
}


def down_conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)


def up_conv(channels_in: int, channels_out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels_in, channels_out, kernel_size=2, stride=2, bias=False)


class ResidualBlock(nn.Module):
    """conv1, bn1, conv2, bn2(, conv3, bn3); the first 3x3 of a resampling block resamples."""

    def __init__(self, kernels, channels_in, inner, channels_out, change, shortcut):
        super().__init__()
        self.length = len(kernels)
        self.shortcut = shortcut if change is not None or channels_in != channels_out else None
        resampled = False
        channels = channels_in
        for number, kernel in enumerate(kernels, start=1):
            out = channels_out if number == self.length else inner
            if kernel == 3 and change == "up" and not resampled:
                conv, resampled = up_conv(channels, out), True
            elif kernel == 3 and change == "down" and not resampled:
                conv, resampled = down_conv(channels, out, 3, stride=2), True
            else:
                conv = down_conv(channels, out, kernel)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(out))
            channels = out
        if self.shortcut:
            stride = 2 if change == "down" else 1
            conv = (
                up_conv(channels_in, channels_out)
                if change == "up"
                else down_conv(channels_in, channels_out, 1, stride)
            )
            self.add_module(shortcut, nn.Sequential(conv, nn.BatchNorm2d(channels_out)))

    def forward(self, maps):
        passed = self.get_submodule(self.shortcut)(maps) if self.shortcut else maps
        for number in range(1, self.length + 1):
            maps = self.get_submodule(f"conv{number}")(maps)
            maps = self.get_submodule(f"bn{number}")(maps)
            if number < self.length:
                maps = torch.relu(maps)
        return torch.relu(maps + passed)


def residual_stage(plan, channels_in, planes, depth, change, *, widening, shortcut="downsample"):
    out = planes * plan.growth
    inner = planes * widening
    blocks = [ResidualBlock(plan.kernels, channels_in, inner, out, change, shortcut)]
    blocks += [
        ResidualBlock(plan.kernels, out, inner, out, None, shortcut) for _ in range(depth - 1)
    ]
    return nn.Sequential(*blocks)


class Encoder(nn.Module):
    """The teacher `net_t`: a ResNet without its last stage and classifier."""

    def __init__(self, plan):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        g, w = plan.growth, plan.widening
        self.layer1 = residual_stage(plan, 64, 64, plan.depths[0], None, widening=w)
        self.layer2 = residual_stage(plan, 64 * g, 128, plan.depths[1], "down", widening=w)
        self.layer3 = residual_stage(plan, 128 * g, 256, plan.depths[2], "down", widening=w)

    def forward(self, images):
        maps = torch.relu(self.bn1(self.conv1(images)))
        maps = nn.functional.max_pool2d(maps, 3, stride=2, padding=1)
        fine = self.layer1(maps)
        middle = self.layer2(fine)
        return [fine, middle, self.layer3(middle)]


class ProjectionHead(nn.Module):
    """One scale of the projector: `proj.N`, N counting convolutions, norms and activations."""

    def __init__(self, channels, depthwise):
        super().__init__()
        layers = []
        widths = [channels, channels // 2, channels // 4, channels // 2, channels]
        for before, after in itertools.pairwise(widths):
            if depthwise:
                layers += [nn.Conv2d(before, before, 3, padding=1, groups=before)]
                layers += [nn.Conv2d(before, after, 1)]
            else:
                layers += [nn.Conv2d(before, after, 3, padding=1)]
            layers += [nn.InstanceNorm2d(after), nn.LeakyReLU(0.01)]
        self.proj = nn.Sequential(*layers)

    def forward(self, maps):
        return self.proj(maps)


class Projector(nn.Module):
    """`proj_layer`: heads a, b and c, fine to coarse."""

    def __init__(self, plan, depthwise):
        super().__init__()
        self.proj_a = ProjectionHead(64 * plan.growth, depthwise)
        self.proj_b = ProjectionHead(128 * plan.growth, depthwise)
        self.proj_c = ProjectionHead(256 * plan.growth, depthwise)

    def forward(self, maps):
        return [self.proj_a(maps[0]), self.proj_b(maps[1]), self.proj_c(maps[2])]


class FusionNeck(nn.Module):
    """`mff_oce`: fuses three maps into one code of stride 32."""

    def __init__(self, plan):
        super().__init__()
        fine, middle, coarse = (c * plan.growth for c in (64, 128, 256))
        self.conv1, self.bn1 = down_conv(fine, middle, 3, stride=2), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = down_conv(middle, coarse, 3, stride=2), nn.BatchNorm2d(coarse)
        self.conv3, self.bn3 = down_conv(middle, coarse, 3, stride=2), nn.BatchNorm2d(coarse)
        self.bn_layer = residual_stage(plan, 3 * coarse, 512, plan.neck_depth, "down", widening=1)

    def forward(self, maps):
        fine, middle, coarse = maps
        fine = torch.relu(self.bn1(self.conv1(fine)))
        fine = torch.relu(self.bn2(self.conv2(fine)))
        middle = torch.relu(self.bn3(self.conv3(middle)))
        return self.bn_layer(torch.cat([fine, middle, coarse], dim=1))


class Decoder(nn.Module):
    """The student `net_s`: the code back to three maps."""

    def __init__(self, plan):
        super().__init__()
        entry = 512 * plan.growth
        for number, planes in enumerate((256, 128, 64), start=1):
            stage = residual_stage(
                plan,
                entry,
                planes,
                plan.depths[number - 1],
                "up",
                widening=plan.widening,
                shortcut="upsample",
            )
            self.add_module(f"layer{number}", stage)
            entry = planes * plan.growth

    def forward(self, code):
        coarse = self.layer1(code)
        middle = self.layer2(coarse)
        return [self.layer3(middle), middle, coarse]


@dataclasses.dataclass
class Forward:
    """What one view gives; `rebuilt` is None for the augmented view."""

    targets: Maps
    projected: Maps
    pooled: torch.Tensor
    rebuilt: Maps | None = None


class Twin(nn.Module):
    """The whole network. `projector` is "plain", "depthwise", or None for RD without CCL."""

    def __init__(self, encoder: str = "wide_resnet50_2", projector: str | None = "plain"):
        super().__init__()
        plan = PLANS[encoder]
        self.net_t = Encoder(plan).requires_grad_(False)
        if projector is not None:
            self.proj_layer = Projector(plan, depthwise=projector == "depthwise")
        self.mff_oce = FusionNeck(plan)
        self.net_s = Decoder(plan)
        self.has_projector = projector is not None
        self.train()

    def train(self, mode: bool = True) -> Twin:
        super().train(mode)
        self.net_t.eval()  # frozen: its statistics stay as they were published
        return self

    def encode(self, images: torch.Tensor) -> tuple[Maps, Maps]:
        with torch.no_grad():
            targets = self.net_t(images)
        return targets, self.proj_layer(targets) if self.has_projector else targets

    def forward(self, images: torch.Tensor, noise: Noise | None = None) -> Forward:
        """The clean view: everything there is."""
        targets, projected = self.encode(images)
        if noise is not None:
            projected = [
                maps + values * mask for maps, (values, mask) in zip(projected, noise, strict=True)
            ]
        code = self.mff_oce(projected)
        return Forward(targets, projected, code.mean(dim=(2, 3)), self.net_s(code))

    def two_views(
        self, clean: torch.Tensor, augmented: torch.Tensor, noise: Noise | None = None
    ) -> tuple[Forward, Forward]:
        """Both views as in training; the neck sees the clean one first."""
        first = self(clean, noise)
        targets, projected = self.encode(augmented)
        return first, Forward(targets, projected, self.mff_oce(projected).mean(dim=(2, 3)))

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that a training step changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """The model, each parameter and statistic drawn anew: a function of the seed alone.

    Norm scales stay below 1, so that deep stacks neither explode nor die.
    """
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            normal = torch.randn(value.shape, generator=source, dtype=torch.float64)
            if name.endswith("running_var"):
                drawn = 0.6 + 0.8 * torch.rand(value.shape, generator=source, dtype=torch.float64)
            elif name.endswith(("running_mean", "bias")):
                drawn = 0.15 * normal
            elif value.ndim == 1:
                drawn = 0.7 + 0.1 * normal.clamp(-2, 2)
            else:
                drawn = normal * (2 / value[0].numel()) ** 0.5
            value.copy_(drawn)
    return model


def to_numpy(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies of the state dict's tensors, step counters included."""
    return {name: value.numpy(force=True).copy() for name, value in model.state_dict().items()}


def from_numpy(model: nn.Module, tensors: Mapping[str, np.ndarray]) -> nn.Module:
    """The model with exactly these values; refuses a missing, unexpected or misshapen one."""
    ours = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    model.load_state_dict(ours, strict=True)
    return model
