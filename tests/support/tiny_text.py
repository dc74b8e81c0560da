"""Tiny text encoders with their tokenizers, and whole bases saved as real diffusers folders, for tests and benchmarks."""

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from infer import run_folder
from infer.bases.loading import network_of, prediction_type_of
from infer.model.denoiser import JointDenoiser
from infer.model.vae import widen
from infer.run_folder import manifest_for
from infer.sampler import CoGenerator
from tests.support import tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
LENGTH = 16  # tokens of a prompt


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding without merges: one token a letter."""
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=LENGTH)


def clip_text_model(projection: bool = False, seed: int = 1) -> CLIPTextModel | CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=tiny.TEXT // 2 if projection else tiny.TEXT,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=tiny.TEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    """A unigram model over single letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def t5_encoder(seed: int = 1) -> T5EncoderModel:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=tiny.TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def pipeline(name: str) -> Any:
    """The tiny stock pipeline of tests.support.tiny, with text encoders: it takes prompts."""
    made = tiny.PIPELINES[name]()
    if name.startswith("pixart"):
        made.register_modules(tokenizer=t5_tokenizer(), text_encoder=t5_encoder())
    elif name == "sdxl":
        halves = {"text_encoder": _half_width(), "text_encoder_2": clip_text_model(projection=True)}
        made.register_modules(tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), **halves)
    else:
        made.register_modules(tokenizer=clip_tokenizer(), text_encoder=clip_text_model())
    return made


def _half_width() -> CLIPTextModel:
    """SDXL joins the embeddings of its two text encoders: each has half of the width."""
    config = clip_text_model(projection=True).config
    torch.manual_seed(2)
    return CLIPTextModel(config).eval()


def save_base(name: str, folder: Path) -> Path:
    """A base as users have it: a diffusers folder with safetensors."""
    pipeline(name).save_pretrained(folder)
    return folder


def intrinsic_vae() -> Any:
    return widen(tiny.vae())


def save_run(made: Any, folder: Path, rank: int = 4, std: float = 0.3, seed: int = 3) -> Path:
    """A run folder for this pipeline, with a LoRA that changes much: both halves random."""
    network = network_of(made)
    denoiser = JointDenoiser.install(network, rank=rank)
    torch.manual_seed(seed)
    for parameter in denoiser.lora_parameters():
        torch.nn.init.normal_(parameter, std=std)
    lora = denoiser.lora_weights()
    manifest = manifest_for(network, "tiny", prediction_type_of(made), lora, training={"steps": 0})
    run_folder.save_run(str(folder), manifest, lora, intrinsic_vae())
    denoiser.uninstall()
    return folder


def save_community_lora(made: Any, folder: Path) -> Path:
    """A LoRA as others train it on the base: self- and cross-attention and a feed-forward layer, by diffusers' own keys."""
    network = copy.deepcopy(made.unet)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0", "ff.net.2"]))
    torch.manual_seed(5)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    type(made).save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(network))
    return folder


@cache
def models(name: str) -> tuple[str, str]:
    """The addresses of a base and of a run folder for it, in the real formats; made once, removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="ildm-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    made = pipeline(name)
    made.save_pretrained(root / "base")
    save_run(made, root / "run")
    return str(root / "base"), str(root / "run")


@cache
def loaded(name: str) -> CoGenerator:
    """A generator loaded from these folders as a user loads it; leave its pipeline as you found it."""
    generator = CoGenerator.from_pretrained(*models(name), device="cpu")
    generator.pipeline.set_progress_bar_config(disable=True)
    return generator


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest value: float32 rounding, where kernels see other shapes."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
