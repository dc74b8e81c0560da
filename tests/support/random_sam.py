"""SAM networks whose weights are made by a rule, so that masks follow the image, differ from point to point, and survive.

Real weights are neither shipped nor fetched. The rule: values that depend on a tensor's name alone (tests/support/seeded.py),
with the gains below, which make places and points count beside the picture; queries and keys between tokens and positions share
their weights, so that a point attends to its surroundings; and the logits are lowered, so that masks cover 5 to 50 % of an
image. The predicted quality then spreads over about 0..0.9, stability over 0.2..0.9. Such masks are ragged and their boxes
nearly as large as the image, so that the usual box suppression would leave one: THRESHOLDS let many masks survive.
"""

from typing import Any

import torch

from tests.support.seeded import seeded_weights

THRESHOLDS = {"quality": 0.8, "stability": 0.6, "nms": 0.99}
FIXTURE_SIDE, FIXTURE_SIZES = 256, ((192, 256), (224, 160))
FIXTURE_SETTINGS = {"points_per_side": 5, "quality": 0.4, "stability": 0.5, "nms": 0.995}
"""Of tests/fixtures/sam2_masks.npz: pixels on the encoder's side, (height, width) of the seeded pictures, MaskSettings."""
GAINS = {
    "weight": 1.0,
    r"neck\.convs\.\d\.weight": 0.05,
    r"conv_s\d\.weight": 1.0,
    r"(iou|mask|obj_score)_tokens?\.weight": 16.0,
    r"(point_embed|no_mask_embed)(\.\d)?\.weight": 3.0,
    r"cross_attn_(token_to_image|image_to_token)\.q_proj\.weight": 4.0,
    r"cross_attn_image_to_token\.(v|o|out)_proj\.weight": 4.0,
    r"output_hypernetworks_mlps\.\d\.proj_out\.weight": 32.0,
    r"iou_prediction_head\.proj_out\.weight": 4.0,
}


def with_rule(model: Any) -> Any:
    """Gives a SamModel, Sam2Model or EdgeTamModel its weights."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = seeded_weights(shapes, GAINS)
    for name in shapes:
        if "cross_attn" in name and ".k_proj." in name:
            weights[name] = weights[name.replace(".k_proj.", ".q_proj.")]
        if "output_hypernetworks" in name and name.endswith("proj_out.bias"):
            weights[name] = torch.full(shapes[name], -8.0)
    weights["prompt_encoder.shared_embedding.positional_embedding"] = weights[
        "shared_image_embedding.positional_embedding"
    ]
    model.load_state_dict(weights)
    return model.eval()


def sam2_tiny(side: int = 1024) -> Any:
    """The published tiny configuration (39 M parameters), for images of `side` pixels: a mask has side / 4."""
    from transformers import Sam2Config, Sam2Model

    steps = [[side // step, side // step] for step in (4, 8, 16)]
    vision, prompts = {"backbone_feature_sizes": steps}, {"image_size": side}
    return with_rule(Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompts)))


def sam2_small() -> Any:
    """A Sam2Model of 0.2 M parameters for images of 128 pixels: a mask has 32."""
    from transformers import Sam2Config, Sam2Model

    backbone = {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 48, 64],
        "num_attention_heads_per_stage": [1, 2, 3, 4],
        "blocks_per_stage": [1, 1, 2, 1],
        "global_attention_blocks": [3],
        "window_size_per_stage": [8, 4, 4, 4],
        "model_type": "sam2_hiera_det_model",
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": [64, 48, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    }
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
    prompts = {"hidden_size": 32, "image_size": 128}
    return with_rule(
        Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    )


def sam_small() -> Any:
    """A SamModel of as small a size."""
    from transformers import SamConfig, SamModel

    vision = {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 128,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 64,
        "num_pos_feats": 16,
    }
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
    prompts = {"hidden_size": 32, "image_size": 128, "image_embedding_size": 8}
    return with_rule(
        SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    )


def edgetam_small() -> Any:
    """An EdgeTamModel of as small a size, on a small network of timm."""
    from transformers import EdgeTamConfig, EdgeTamModel

    vision = {
        "backbone_config": {
            "model_type": "timm_wrapper",
            "architecture": "test_convnext",
            "label_names": ["none"],
            "num_classes": 1,
            "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
        },
        "backbone_channel_list": [64, 48, 32, 24],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    }
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
    prompts = {"hidden_size": 32, "image_size": 128}
    return with_rule(
        EdgeTamModel(EdgeTamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    )
