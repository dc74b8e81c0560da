"""Checkpoints of the pretrained estimators in their published formats: the real file names and keys, small, random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROWS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {}
"""By row of the table: what writes a checkpoint, and the settings for its size."""


def written(name: str, **settings: Any) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def note(write: Callable[[Path], None]) -> Callable[[Path], None]:
        ROWS[name] = (write, settings)
        return write

    return note


def backbone(**over: Any) -> Any:
    from transformers import Dinov2Config

    small = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    return Dinov2Config(
        **{**small, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "apply_layernorm": True, **over}
    )


def save(model: Any, folder: Path, **preprocessor: Any) -> None:
    model.save_pretrained(folder)
    said = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], **preprocessor}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))


def livelier(model: Any) -> Any:
    """Random weights that make more of the image than the library's small ones."""
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=(2.0 / p[0].numel()) ** 0.5)
    return model


@written("depth-anything-v2-small", resolution={"shorter": 56, "multiple": 14})
def depth_anything(folder: Path) -> None:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    config = DepthAnythingConfig(
        backbone_config=backbone(),
        reassemble_hidden_size=24,
        patch_size=14,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    save(livelier(DepthAnythingForDepthEstimation(config)), folder)


@written("zoedepth", resolution={"shorter": 32, "multiple": 32})
def zoedepth(folder: Path) -> None:
    from transformers import ZoeDepthConfig, ZoeDepthForDepthEstimation

    config = ZoeDepthConfig(
        backbone_config=backbone(image_size=32, patch_size=16, apply_layernorm=False),
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        bottleneck_features=8,
        num_attractors=[4, 2, 2, 1],
        patch_transformer_hidden_size=16,
        patch_transformer_intermediate_size=16,
        patch_transformer_num_attention_heads=2,
    )
    save(livelier(ZoeDepthForDepthEstimation(config)), folder, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@written("dpt-large", resolution={"shorter": 32, "multiple": 32})
def dpt(folder: Path) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
    )
    save(livelier(DPTForDepthEstimation(config)), folder)


@written("depth-pro", resolution={"square": 64})
def depth_pro(folder: Path) -> None:
    from transformers import DepthProConfig, DepthProForDepthEstimation

    def vit(kind: str, **over: Any) -> dict[str, Any]:
        return {"model_type": kind, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, **over}

    config = DepthProConfig(
        patch_size=16,
        fusion_hidden_size=8,
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[10, 8],
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[12, 12],
        image_model_config=vit("dinov2", image_size=16, patch_size=4),
        patch_model_config=vit("dinov2", image_size=16, patch_size=4),
        fov_model_config=vit("dinov2", image_size=16, patch_size=4),
        use_fov_model=True,
        num_fov_head_layers=0,
    )
    model = DepthProForDepthEstimation(config)
    torch.nn.init.constant_(
        [p for name, p in model.fov_model.head.named_parameters() if name.endswith("bias")][-1], 60.0
    )
    save(model, folder, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@written("mask2former", resolution={"shorter": 64, "multiple": 32}, rules={"threshold": 0.05, "overlap": 0.1})
def mask2former(folder: Path) -> None:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = Mask2FormerConfig(**swin_and_decoder(), num_queries=8, num_labels=5)
    save(sharper(Mask2FormerForUniversalSegmentation(config)), folder)


def swin_and_decoder() -> dict[str, Any]:
    from transformers import SwinConfig

    return {
        "backbone_config": SwinConfig(
            embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_indices=[1, 2, 3, 4]
        ),
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 32,
        "dim_feedforward": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "num_attention_heads": 2,
    }


def sharper(model: Any) -> Any:
    """Masks and classes that differ between queries, so that some win."""
    for name, p in model.named_parameters():
        if ("class_predictor" in name or "quer" in name or "mask_embedder" in name) and p.dim() > 1:
            torch.nn.init.normal_(p, std=1.0)
    return model


@written("oneformer", resolution={"shorter": 64, "multiple": 32}, rules={"threshold": 0.05, "overlap": 0.1})
def oneformer(folder: Path) -> None:
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation

    small = swin_and_decoder()
    width = small.pop("hidden_dim")
    del small["feature_size"], small["mask_feature_size"]
    config = OneFormerConfig(
        **small,
        hidden_dim=width,
        mask_dim=width,
        conv_dim=width,
        num_queries=8,
        num_labels=5,
        task_seq_len=16,
        max_seq_len=16,
        text_encoder_width=width,
        text_encoder_context_length=16,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=64,
        text_encoder_n_ctx=4,
        is_training=False,
    )
    save(sharper(OneFormerForUniversalSegmentation(config)), folder)
    clip_tokenizer(folder)


def clip_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)


@written("eomt", resolution={"longer": 64}, rules={"threshold": 0.05, "overlap": 0.1})
def eomt(folder: Path) -> None:
    from transformers import EomtConfig, EomtForUniversalSegmentation

    config = EomtConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        num_blocks=1,
        num_queries=8,
        num_labels=5,
        mlp_ratio=2,
        num_register_tokens=1,
    )
    save(sharper(EomtForUniversalSegmentation(config)), folder)


@written("tipsv2", resolution={"shorter": 56, "multiple": 14})
def tipsv2(folder: Path) -> None:
    from transformers import Tipsv2DptConfig, Tipsv2DptForDensePrediction, Tipsv2VisionConfig

    vision = Tipsv2VisionConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = Tipsv2DptConfig(
        backbone_config=vision,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
    )
    save(livelier(Tipsv2DptForDensePrediction(config)), folder, do_normalize=False)


@written("sapiens2-normal", resolution={"longer": 64, "multiple": 16})
def sapiens2(folder: Path) -> None:
    from transformers import Sapiens2Config, Sapiens2ForNormalEstimation, Sapiens2HeadConfig

    head = Sapiens2HeadConfig(
        use_pixel_shuffle=True, upsample_out_channels=[16, 16], upsample_kernel_size=3, conv_out_channels=[8]
    )
    config = Sapiens2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        num_first_full_attention_layers=1,
        num_last_full_attention_layers=1,
        image_size=[64, 48],
        num_register_tokens=2,
        num_labels=3,
        head_config=head,
    )
    model = livelier(Sapiens2ForNormalEstimation(config))
    # Towards the camera: between opposite normals, the last digits would decide what is invalid.
    model.decode_head.predictor.bias.data.copy_(torch.tensor([0.0, 0.0, 6.0]))
    save(model, folder)


@written("marigold-normals", resolution={"longer": 64, "multiple": 8}, steps=2)
def marigold_normals(folder: Path) -> None:
    marigold(folder, "MarigoldNormalsPipeline")


@written("marigold-depth", resolution={"longer": 64, "multiple": 8}, steps=2)
def marigold_depth(folder: Path) -> None:
    marigold(folder, "MarigoldDepthPipeline")


def marigold(folder: Path, pipeline: str) -> None:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet = diffusers.UNet2DConditionModel(
        in_channels=8,
        out_channels=4,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        sample_size=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    clip_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=8)
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    cls = getattr(diffusers, pipeline)
    cls(
        unet, vae, scheduler, text, tokenizer, default_denoising_steps=2, default_processing_resolution=64
    ).save_pretrained(folder)


# ---- controlnet-aux: the networks have one size each -----------------------------------------------------------------


def state_of(kind: str) -> dict[str, torch.Tensor]:
    """Random weights of a line network, under its own keys."""
    from extract.estimators.controlnet_lines import KINDS

    return KINDS[kind].make().state_dict()


@written("lineart", shorter=64)
def lineart(folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_of("lineart"), folder / "lineart.safetensors")


@written("lineart-annotators", shorter=64)
def lineart_annotators(folder: Path) -> None:
    torch.save(state_of("lineart"), made(folder) / "sk_model.pth")


@written("lineart-coarse", shorter=64)
def lineart_coarse(folder: Path) -> None:
    torch.save(state_of("lineart"), made(folder) / "sk_model2.pth")


@written("lineart-anime", shorter=64)
def lineart_anime(folder: Path) -> None:
    state = {f"module.{key}": value for key, value in state_of("lineart_anime").items()}
    torch.save(state, made(folder) / "netG.pth")


@written("pidinet", shorter=64)
def pidinet(folder: Path) -> None:
    state = {f"module.{key}": value for key, value in state_of("pidinet").items()}
    torch.save({"state_dict": state}, made(folder) / "table5_pidinet.pth")


@written("teed", shorter=64)
def teed(folder: Path) -> None:
    torch.save(state_of("teed"), made(folder) / "5_model.pth")


@written("hed", shorter=64)
def hed(folder: Path) -> None:
    torch.save(state_of("hed"), made(folder) / "ControlNetHED.pth")


@written("normal-bae", shorter=64)
def normal_bae(folder: Path) -> None:
    from extract.estimators.nets.controlnet_aux_nets import made_quietly, network_class

    options = SimpleNamespace(architecture="BN", sampling_ratio=0.4, importance_ratio=0.7)
    net = made_quietly(network_class("normalbae.nets.NNET", "NNET"), options)
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"model": state}, made(folder) / "scannet.pt")


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
