"""Metric3D v2 (arXiv 2404.15506): depth and normals of one image, refined together by a recurrent network.

The image becomes DINOv2 tokens; a DPT-like decoder (arXiv 2103.13413) reads from them a first guess of depth and normals at
1/4 of the image's size; convolutional GRUs at 1/4, 1/7 and 1/14 improve it step by step, as RAFT-Stereo does a disparity
(arXiv 2109.07547); the last state is upsampled by learned convex combinations (RAFT, arXiv 2003.12039, section 3.3).
Submodules have the names of the published checkpoints, so that only the backbone needs a map of keys.

Four traps: positions are resampled as in dinov2.py; S and L read the same normed tokens four times, giant2 reads four
un-normed depths; ReluBlock changes its input for all who read it later; the state must stay in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extract.estimators.nets.dinov2 import PATCH_PX, DinoV2, from_dinov2

NEAR_M, FAR_M = 0.1, 200.0  # of the camera with the canonical focal length
_BINS = 256
_STATE_M = 100.0  # the state is (depth - FAR_M) / _STATE_M
_UPSAMPLING = 4
_MIN_KAPPA = 0.01


@dataclass(frozen=True, kw_only=True)
class Metric3DSize:
    """What differs between S, L and giant2.

    blocks: whose tokens are read for features at 1/4, 1/7, 1/14 and 1/14 of the image; normed: after the last LayerNorm.
    features: channels at 1/4, 1/7 and 1/14. hidden: channels of the GRUs. steps: how often the guess is refined.
    """

    backbone: str
    blocks: tuple[int, int, int, int]
    normed: bool
    features: tuple[int, int, int]
    hidden: int
    steps: int


SIZES: dict[str, Metric3DSize] = {
    "small": Metric3DSize(
        backbone="vit_small_patch14_reg4_dinov2",
        blocks=(11, 11, 11, 11),
        normed=True,
        features=(96, 192, 384),
        hidden=48,
        steps=4,
    ),
    "large": Metric3DSize(
        backbone="vit_large_patch14_reg4_dinov2",
        blocks=(23, 23, 23, 23),
        normed=True,
        features=(256, 512, 1024),
        hidden=128,
        steps=8,
    ),
    "giant2": Metric3DSize(
        backbone="vit_giant_patch14_reg4_dinov2",
        blocks=(9, 19, 29, 39),
        normed=False,
        features=(384, 768, 1536),
        hidden=192,
        steps=8,
    ),
}


class Prediction(NamedTuple):
    """depth (B, 1, H, W) in metres for the canonical focal length, confidence (B, 1, H, W); normal (B, 3, H, W) of length 1
    with x right, y down, z away from the camera, and its concentration kappa (B, 1, H, W). All float32."""

    depth: Tensor
    confidence: Tensor
    normal: Tensor
    kappa: Tensor


class Metric3DNet(nn.Module):
    def __init__(self, size: Metric3DSize) -> None:
        super().__init__()
        self.size = size
        self.encoder = DinoV2(size.backbone)
        self.decoder = Decoder(size, self.encoder.width, self.encoder.prefix_tokens)

    def forward(self, images: Tensor) -> Prediction:
        """images (B, 3, H, W), ImageNet-normalised. Sides of multiples of 28 give maps of the same size.

        Others are stretched to multiples of 14; for odd ones of these the map is 2 pixels smaller, as upstream's.
        """
        stretched = [side + -side % PATCH_PX for side in images.shape[-2:]]
        if stretched != list(images.shape[-2:]):
            images = F.interpolate(images, stretched, mode="bilinear", align_corners=False)
        blocks = self.size.blocks
        found = dict(zip(dict.fromkeys(blocks), self.encoder(images, blocks, self.size.normed), strict=True))
        height, width = (side // PATCH_PX for side in stretched)
        prediction: Prediction = self.decoder([found[block] for block in blocks], height, width)
        return prediction


class Decoder(nn.Module):
    """Tokens (B, prefix + h w, C), four times, to the prediction."""

    def __init__(self, size: Metric3DSize, width: int, prefix_tokens: int) -> None:
        super().__init__()
        quarter, seventh, fourteenth = size.features
        self.steps, self.prefix_tokens = size.steps, prefix_tokens
        self.token2feature = nn.ModuleDict(
            {
                "read_3": TokensToFeatures(width, prefix_tokens, nn.Identity()),
                "read_2": TokensToFeatures(width, prefix_tokens, nn.Identity()),
                "read_1": TokensToFeatures(width, prefix_tokens, nn.ConvTranspose2d(width, seventh, 2, stride=2)),
                "read_0": TokensToFeatures(
                    width, prefix_tokens, nn.Sequential(nn.Conv2d(width, quarter, 1), Enlarge())
                ),
            }
        )
        self.decoder_mono = nn.ModuleDict(
            {
                "upconv_3": Fuse(width, fourteenth, scale=1.0, branch=False),
                "upconv_2": Fuse(fourteenth, seventh, scale=2.0),
                "upconv_1": Fuse(seventh, quarter + 2, scale=1.75),  # 2 more for the confidences
            }
        )
        self.depth_regressor = nn.Sequential(_conv3(quarter, _BINS), nn.ReLU(), nn.Conv2d(_BINS, _BINS, 1))
        self.normal_predictor = nn.Sequential(
            *(_conv3(quarter, 128), nn.ReLU(), nn.Conv2d(128, 128, 1), nn.ReLU()),
            *(nn.Conv2d(128, 128, 1), nn.ReLU(), nn.Conv2d(128, 3, 1)),
        )
        self.context_feature_encoder = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    nn.Sequential(ResidualBlock(channels, size.hidden), _conv3(size.hidden, size.hidden))
                    for _ in range(2)
                )
                for name, channels in zip(("outputs04", "outputs08", "outputs16"), size.features, strict=True)
            }
        )
        self.context_zqr_convs = nn.ModuleList(_conv3(size.hidden, 3 * size.hidden) for _ in range(3))
        self.update_block = UpdateBlock(size.hidden)

    def forward(self, tokens: list[Tensor], height: int, width: int) -> Prediction:
        quarter, seventh, fourteenth, coarse = (
            self.token2feature[f"read_{i}"](taken, self.prefix_tokens, height, width) for i, taken in enumerate(tokens)
        )
        # The published weights were trained with in-place ReLUs: whoever reads these two later sees them rectified.
        seventh, fourteenth = seventh.relu(), fourteenth.relu()
        x = self.decoder_mono["upconv_3"](coarse)
        x = self.decoder_mono["upconv_2"](x, fourteenth)
        x = self.decoder_mono["upconv_1"](x, seventh)
        state = self._first_guess(x)
        hidden, context = self._context([quarter, seventh, fourteenth])
        for _ in range(self.steps):
            hidden = self.update_block(hidden, context, state)
            state = state + self.update_block.change(hidden[0])
        return _prediction(upsample_convex(state, 0.25 * self.update_block.mask(hidden[0]).float()))

    def _first_guess(self, x: Tensor) -> Tensor:
        """Decoded features (B, quarter + 2, h, w) to the float32 state (B, 6, h, w): depth, confidence, normal, kappa."""
        features, confidence, kappa = x[:, :-2], x[:, -2:-1].float(), x[:, -1:].float()
        # Depth is the expectation over logarithmic bins (section 3.3 of the paper).
        bins = torch.linspace(0, 1, _BINS, dtype=torch.float64, device=x.device)
        bins = (NEAR_M * (FAR_M / NEAR_M) ** bins).float()
        probabilities = self.depth_regressor(features).float().softmax(dim=1)
        depth = (probabilities * bins[:, None, None]).sum(dim=1, keepdim=True).clamp(NEAR_M, FAR_M)
        normal = _unit(self.normal_predictor(features).float())
        return torch.cat([(depth - FAR_M) / _STATE_M, confidence, normal, _kappa(kappa)], dim=1)

    def _context(self, features: list[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """Features at 1/4, 1/7 and 1/14 to the first hidden states and to the fixed inputs of the GRUs' gates z, r and q."""
        hidden, context = [], []
        for x, heads, gates in zip(
            features, self.context_feature_encoder.values(), self.context_zqr_convs, strict=True
        ):
            hidden.append(heads[0](x).tanh())  # type: ignore[index]
            context.append(gates(heads[1](x).relu()).chunk(3, dim=1))  # type: ignore[index]
        return hidden, context


class TokensToFeatures(nn.Module):
    """Adds a reading of class token and registers to every patch, and brings the patches to another resolution (DPT)."""

    def __init__(self, width: int, prefix_tokens: int, sample: nn.Module) -> None:
        super().__init__()
        self.readoper = nn.ModuleDict(
            {
                "project_patch": nn.Linear(width, width),
                "project_learn": nn.Linear(prefix_tokens * width, width, bias=False),
            }
        )
        self.sample = sample

    def forward(self, tokens: Tensor, prefix_tokens: int, height: int, width: int) -> Tensor:
        patches = self.readoper["project_patch"](tokens[:, prefix_tokens:])
        whole = self.readoper["project_learn"](tokens[:, :prefix_tokens].flatten(1))
        x = F.gelu(patches + whole[:, None])
        features: Tensor = self.sample(x.transpose(1, 2).unflatten(2, (height, width)))
        return features


class Enlarge(nn.Module):
    """Nearest neighbours at 7/2, which brings 1/14 to 1/4. The 1x1 convolution before it may as well come after."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x.float(), scale_factor=3.5, mode="nearest")


class ReluBlock(nn.Module):
    """x to relu(x) + conv(relu(conv(relu(x)))): the shortcut is rectified too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv3(channels, channels), _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        changed: Tensor = self.conv2(self.conv1(x).relu())
        return x + changed


class Fuse(nn.Module):
    """The next finer stage of the decoder: adds its own features to the coarser ones, and enlarges."""

    def __init__(self, channels: int, out: int, scale: float, branch: bool = True) -> None:
        super().__init__()
        self.scale = scale
        self.way_trunk = ReluBlock(channels)
        if branch:
            self.way_branch = ReluBlock(channels)
        self.out_conv = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:
            x = x + self.way_branch(finer)
        x = self.out_conv(self.way_trunk(x))  # 1x1: before or after enlarging is the same, and here cheaper
        if self.scale == 1.0:
            return x
        return F.interpolate(x.float(), scale_factor=self.scale, mode="bilinear", align_corners=True)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv3(channels, out), _conv3(out, out)
        self.norm1, self.norm2 = ChannelNorm(out), ChannelNorm(out)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1), ChannelNorm(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        shortcut: Tensor = self.downsample(x)
        return (shortcut + y).relu()


class ConvGRU(nn.Module):
    """A gated recurrent unit whose gates are convolutions, with an addend for each gate from the context."""

    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        self.convz, self.convr, self.convq = (_conv3(hidden + inputs, hidden) for _ in range(3))

    def forward(self, h: Tensor, context: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        cz, cr, cq = context
        hx = torch.cat([h, *inputs], dim=1)
        z = torch.sigmoid(self.convz(hx) + cz)
        r = torch.sigmoid(self.convr(hx) + cr)
        q = torch.tanh(self.convq(torch.cat([r * h, *inputs], dim=1)) + cq)
        return (1 - z) * h + z * q


class UpdateBlock(nn.Module):
    """One step of all three GRUs; the coarse ones run more often than the fine one ("slow-fast" of RAFT-Stereo)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gru08 = ConvGRU(hidden, 6 + hidden)  # named after RAFT-Stereo's 1/8, 1/16 and 1/32: here 1/4, 1/7 and 1/14
        self.gru16 = ConvGRU(hidden, 2 * hidden)
        self.gru32 = ConvGRU(hidden, hidden)
        self.flow_head = nn.ModuleDict(
            {
                "conv1d": _conv3(hidden, hidden),
                "conv2d": _conv3(hidden, 2),
                "conv1n": _conv3(hidden, hidden),
                "conv2n": _conv3(hidden, 4),
            }
        )
        self.mask = nn.Sequential(_conv3(hidden, hidden), nn.ReLU(), nn.Conv2d(hidden, 9 * _UPSAMPLING**2, 1))

    def forward(self, hidden: list[Tensor], context: list[tuple[Tensor, ...]], state: Tensor) -> list[Tensor]:
        fine, middle, coarse = hidden
        for finest in ("coarse", "middle", "fine"):
            coarse = self.gru32(coarse, context[2], _halved(middle))
            if finest != "coarse":
                middle = self.gru16(middle, context[1], _resized(_halved(fine), middle), _resized(coarse, middle))
            if finest == "fine":
                fine = self.gru08(fine, context[0], state, _resized(middle, fine))
        return [fine, middle, coarse]

    def change(self, h: Tensor) -> Tensor:
        """float32 (B, 6, h, w): what is added to the state."""
        head = self.flow_head
        depth = head["conv2d"](head["conv1d"](h).relu())
        normal = head["conv2n"](head["conv1n"](h).relu())
        return torch.cat([depth, normal], dim=1).float()


def upsample_convex(state: Tensor, weights: Tensor) -> Tensor:
    """(B, C, h, w) to (B, C, 4h, 4w): every fine value is a convex combination of the 3 x 3 coarse ones around it.

    weights: (B, 9 * 4 * 4, h, w) before the softmax over the nine.
    """
    (batch, channels, height, width), k = state.shape, _UPSAMPLING
    shares = weights.view(batch, 1, 9, k, k, height, width).softmax(dim=2)
    around = F.unfold(state, 3, padding=1).view(batch, channels, 9, 1, 1, height, width)
    fine = (shares * around).sum(dim=2)  # (B, C, k, k, h, w)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, k * height, k * width)


def _prediction(state: Tensor) -> Prediction:
    depth = (state[:, :1] * _STATE_M + FAR_M).clamp(NEAR_M, FAR_M)
    return Prediction(depth, state[:, 1:2], _unit(state[:, 2:5]), _kappa(state[:, 5:]))


def _unit(normal: Tensor) -> Tensor:
    return normal / (normal.norm(dim=1, keepdim=True) + 1e-10)


def _kappa(raw: Tensor) -> Tensor:
    """The concentration of the angular distribution around the normal (arXiv 2109.09881), always positive."""
    return F.elu(raw) + 1.0 + _MIN_KAPPA


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x.float(), like.shape[-2:], mode="bilinear", align_corners=True)


def _conv3(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published checkpoint's tensors ("depth_model.{encoder,decoder}. ...") under the names of Metric3DNet.

    norm3 is listed twice there, once inside `downsample`. Names that are not known pass, so that a strict load names them.
    """
    encoder, rest = {}, {}
    for key, value in state.items():
        if key.startswith("depth_model.encoder."):
            encoder[key.removeprefix("depth_model.encoder.")] = value
        elif ".norm3." not in key:
            rest[key.removeprefix("depth_model.")] = value
    return {f"encoder.{key}": value for key, value in from_dinov2(encoder).items()} | rest
