"""People's own set-ups: bases in other files, textual inversions, clip_skip, IP-Adapters, threads, copies of a network."""

import copy
import json
import shutil
import threading
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from torch import nn

from infer.bases.loading import describe_base, open_base
from infer.model.denoiser import JointDenoiser
from infer.run_folder import load_run
from infer.sampler import CoGenerator
from shards.core.errors import UsageError, UserError
from tests.support import tiny, tiny_text
from tests.support.ldm import save_single_file
from tests.support.tiny_text import loaded, models

PROMPT, SMALL = "a red cube", {"size": 64, "steps": 2}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def alike(one: Any, other: Any) -> bool:
    """Whether two pipelines have the same weights everywhere."""
    for name, part in one.components.items():
        if isinstance(part, nn.Module):
            theirs = getattr(other, name).state_dict()
            if any(not torch.equal(value, theirs[key]) for key, value in part.state_dict().items()):
                return False
    return True


# ---- bases in other files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "pixart_sigma"])
def test_a_folder_with_weights_of_one_variant_only_is_read_without_being_told(name, tmp_path):
    tiny_text.pipeline(name).save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.glob("*/diffusion_pytorch_model.safetensors"))
    assert alike(open_base(str(tmp_path), dtype=torch.float32), tiny_text.pipeline(name))


def test_a_folder_with_several_variants_asks_for_one_and_a_wrong_one_is_refused(tmp_path):
    pipeline = tiny_text.pipeline("sd15")
    for variant in ("fp16", "ema"):
        pipeline.save_pretrained(tmp_path, variant=variant)
    with pytest.raises(UserError, match="variants ema, fp16 only; pass one of them with --variant"):
        open_base(str(tmp_path), dtype=torch.float32)
    assert alike(open_base(str(tmp_path), dtype=torch.float32, variant="ema"), pipeline)
    with pytest.raises(UserError, match="no weights of the variant bf16; it has ema, fp16"):
        open_base(str(tmp_path), dtype=torch.float32, variant="bf16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_base_in_shards_is_read(variant, tmp_path):
    pipeline = tiny_text.pipeline("sd15")
    pipeline.save_pretrained(tmp_path, variant=variant, max_shard_size="100KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    assert alike(open_base(str(tmp_path), dtype=torch.float32), pipeline)


def test_a_base_in_one_file_is_read_with_a_config_folder_and_says_so_without(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, run = models("sd15")
    file = save_single_file(tiny_text.pipeline("sd15"), tmp_path / "model.safetensors")
    made = open_base(str(file), dtype=torch.float32, config=base)
    assert alike(made, DiffusionPipeline.from_pretrained(base))
    assert alike(open_base(f"{file}?config={base}", dtype=torch.float32), made)
    with pytest.raises(UsageError, match="neither variant nor config"):
        open_base(f"{base}?varient=fp16", dtype=torch.float32)
    CoGenerator(made, load_run(run)).close()  # it is the base that the run was trained for
    with pytest.raises(UserError, match="--base-config FOLDER") as caught:
        open_base(str(file), dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_base_are_refused_by_what_they_lack(tmp_path):
    base = models("sd15")[0]
    lora = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, lora)
    with pytest.raises(UserError, match="does not hold a whole base"):
        open_base(str(lora), dtype=torch.float32, config=base)
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="cannot read the base"):
        open_base(str(tmp_path / "torn.safetensors"), dtype=torch.float32)
    file = save_single_file(tiny_text.pipeline("sd15"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has no model_index"):
        open_base(str(file), dtype=torch.float32, config=str(tmp_path))
    with pytest.raises(UserError, match=r"is .* of that kind of base"):
        open_base(str(file), dtype=torch.float32, config=models("sdxl")[0])


# ---- textual inversions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["own", "named", "a1111"])
def test_a_textual_inversion_is_what_its_token_says(form, tmp_path):
    """A token whose vector is that of the letter b: prompts with either give one image."""
    base, run = models("sd15")
    pipeline = DiffusionPipeline.from_pretrained(base)
    letter = pipeline.tokenizer("b").input_ids[1]
    vector = pipeline.text_encoder.get_input_embeddings().weight[letter].detach().clone()
    file = tmp_path / "<thing>.safetensors"
    safetensors.torch.save_file({{"own": "<thing>"}.get(form, "emb_params"): vector[None]}, file)
    text = f"<thing>={file}" if form == "named" else str(file)
    with CoGenerator.from_pretrained(base, run, device="cpu", embeddings=[text]) as generator:
        generator.pipeline.set_progress_bar_config(disable=True)
        made, plain, other = (generator(prompt, **SMALL).latents for prompt in ("a <thing> c", "a b c", "a d c"))
    assert torch.equal(made, plain) and not torch.equal(made, other)


def test_a_textual_inversion_that_does_not_fit_is_refused(tmp_path):
    base, run = models("sd15")
    wide, pickled = tmp_path / "wide.safetensors", tmp_path / "old.pt"
    safetensors.torch.save_file({"x": torch.zeros(1, 99)}, wide)
    torch.save({"x": torch.zeros(1, 16)}, pickled)
    for file, message in ((wide, "does not fit this base"), (pickled, "must be a .safetensors file")):
        with pytest.raises(UserError, match=message):
            CoGenerator.from_pretrained(base, run, device="cpu", embeddings=[str(file)])
    with pytest.raises(UserError, match="takes no textual inversions"):
        CoGenerator.from_pretrained(*models("pixart_sigma"), device="cpu", embeddings=[str(wide)])


# ---- options that bring tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_skip_of_stable_diffusion_takes_an_earlier_layer_normalised(clip_skip):
    generator = loaded("sd15")
    encoder, tokenizer = generator.pipeline.text_encoder, generator.pipeline.tokenizer
    tokens = tokenizer(PROMPT, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        states = encoder(tokens.input_ids, output_hidden_states=True).hidden_states
        by_hand = encoder.final_layer_norm(states[-(clip_skip + 1)])
    asked = {"schedule": "off", "guidance": 1.0, **SMALL}
    expected = generator(prompt_embeds=by_hand, **asked).latents
    assert torch.equal(generator(PROMPT, clip_skip=clip_skip, **asked).latents, expected)
    assert "text_model" not in encoder.__dict__
    with pytest.raises(UsageError, match="clip_skip = 2: the text encoder has 2 layers"):
        generator(PROMPT, clip_skip=2, **SMALL)


def image_adapter(network: Any, width: int = 12) -> dict[str, Any]:
    """An IP-Adapter's file for a tiny U-Net: a projection of an image's embedding to 4 tokens, and their keys and values."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    projection = {"proj.weight": normal(4 * tiny.TEXT, width), "proj.bias": normal(4 * tiny.TEXT)}
    projection |= {"norm.weight": torch.ones(tiny.TEXT), "norm.bias": torch.zeros(tiny.TEXT)}
    keys = {}
    for number, name in enumerate(network.attn_processors):
        if "attn2" in name:
            layer = network.get_submodule(name.removesuffix(".processor")).to_k
            keys |= {f"{number}.{part}_ip.weight": normal(*layer.weight.shape) for part in ("to_k", "to_v")}
    return {"image_proj": projection, "ip_adapter": keys}


def test_an_ip_adapter_acts_as_on_the_stock_pipeline_and_is_refused_where_it_cannot():
    base, run = models("sd15")
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    before = describe_base(pipeline.unet, "base")
    pipeline.unet._load_ip_adapter_weights([image_adapter(pipeline.unet)], low_cpu_mem_usage=False)
    assert describe_base(pipeline.unet, "base") == before
    embeds = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(4))
    asked: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}

    def stock(**options: Any) -> torch.Tensor:
        return pipeline(
            [PROMPT] * 2, generator=[torch.Generator().manual_seed(n) for n in (1, 2)], **asked, **options
        ).images

    expected = stock(ip_adapter_image_embeds=[embeds])
    other = stock(ip_adapter_image_embeds=[embeds.flip(0)])
    with CoGenerator(pipeline, run) as generator:
        given = {"seeds": [1, 2], "guidance": 7.5, **SMALL}
        off = generator(PROMPT, schedule="off", ip_adapter_image_embeds=[embeds], **given)
        tiny_text.close(off.latents, expected)
        alone = generator(PROMPT, schedule="off", intrinsics=False, ip_adapter_image_embeds=[embeds], **given)
        assert torch.equal(alone.latents, expected) and not torch.equal(alone.latents, other)
        for wrong, guidance in ((embeds.repeat(2, 1, 1), 7.5), (embeds, 1.0)):
            with pytest.raises(UsageError, match="ip_adapter_image_embeds have"):
                generator(PROMPT, ip_adapter_image_embeds=[wrong], **(given | {"guidance": guidance}))
        with pytest.raises(UsageError, match="gligen"):
            generator(PROMPT, cross_attention_kwargs={"gligen": {}}, **SMALL)
        with pytest.raises(UserError, match=r"load IP-Adapters .* before"):
            pipeline.unet._load_ip_adapter_weights([image_adapter(pipeline.unet)], low_cpu_mem_usage=False)
    with pytest.raises(UserError, match="GLIGEN"):
        JointDenoiser.install(tiny.sd15(attention_type="gated"))


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_two_threads_get_the_images_that_they_would_get_alone():
    generator = loaded("sd15")
    asked: list[dict[str, Any]] = [
        {"prompt": [PROMPT, "b", "c"], "seeds": [1, 2, 3], "schedule": "joint", "scheduler": "euler"},
        {"prompt": "two blue spheres", "seeds": 4, "schedule": "gaussian", "guidance": 1.0},
    ]
    alone = [generator(**given, **SMALL).latents for given in asked]
    made: dict[tuple[int, int], torch.Tensor] = {}
    together = threading.Barrier(2)

    def user(number: int) -> None:
        together.wait()
        for turn in range(2):
            made[number, turn] = generator(**asked[number], **SMALL).latents

    threads = [threading.Thread(target=user, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (number, _), latents in made.items():
        assert torch.equal(latents, alone[number])
    assert len(made) == 4


def test_a_call_within_a_call_and_another_threads_pipeline_are_refused():
    generator = loaded("sd15")
    caught: list[Exception] = []

    def attempt(run: Any) -> None:
        try:
            run()
        except UserError as error:
            caught.append(error)

    def by_hand() -> None:
        attempt(lambda: generator.pipeline([PROMPT] * 2, height=64, width=64, num_inference_steps=1))

    def callback(_: Any) -> None:
        attempt(lambda: generator(PROMPT, **SMALL))
        thread = threading.Thread(target=by_hand)
        thread.start()
        thread.join()

    generator(PROMPT, size=64, steps=1, callback=callback)
    assert ["callback of its own call" in str(error) for error in caught] == [True, False]
    assert "another thread samples with this network" in str(caught[1])
    generator(PROMPT, **SMALL)  # and is free again


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
@torch.no_grad()
def test_a_copy_of_the_network_runs_its_own_weights(adapter, tmp_path):
    network = tiny.sd15()
    if adapter:
        pipeline = tiny.PIPELINES["sd15"]()
        network = pipeline.unet
        pipeline.load_lora_weights(tiny_text.save_community_lora(pipeline, tmp_path))
    denoiser = JointDenoiser.install(network, rank=2)
    for parameter in denoiser.lora_parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    arguments = tiny.inputs(network, 4)
    denoiser.prepare(2)
    before = tiny.forward(network, arguments)

    snapshot, average = copy.deepcopy(network), torch.optim.swa_utils.AveragedModel(network)
    for parameter in network.parameters():
        parameter.mul_(1.1)
    changed = tiny.forward(network, arguments)
    assert not torch.equal(changed, before)
    assert torch.equal(tiny.forward(snapshot, arguments), before)
    assert torch.equal(average(**arguments, return_dict=False)[0], before)

    theirs = JointDenoiser.of(snapshot)
    assert theirs is not None and theirs is not denoiser and theirs.network is snapshot
    theirs.prepare(1)
    tiny.forward(snapshot, tiny.inputs(network, 2))
    assert denoiser.images == 2 and torch.equal(tiny.forward(network, arguments), changed)
    theirs.uninstall()
    assert JointDenoiser.of(snapshot) is None and JointDenoiser.of(network) is denoiser


def test_a_network_that_was_compiled_in_place_is_refused():
    base, run = models("sd15")
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.unet.compile(backend="eager")
    with pytest.raises(UserError, match="compiled already"):
        CoGenerator(pipeline, run)


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_changes_with_the_content_of_every_file_that_it_names(tmp_path):
    from infer.jobs import Request, jobs_for

    base = tmp_path / "base"
    shutil.copytree(models("sd15")[0], base)
    table, photo, mask = (tmp_path / name for name in ("w.csv", "photo.png", "mask.png"))
    header = "timestep," + ",".join(str(stage) for stage in range(1, 10))
    table.write_text(f"{header}\n500" + ",1" * 9 + "\n")
    given = tmp_path / "sample"
    for file in (photo, mask, tmp_path / "sample.json", tmp_path / "sample.depth.png", tmp_path / "t.safetensors"):
        file.write_bytes(b"one")
    request = Request(
        base=str(base),
        run="demo",
        schedule=str(table),
        image=str(photo),
        repaint=str(mask),
        given=str(given),
        repaint_maps=str(mask),
        embeddings=(f"x={tmp_path / 't.safetensors'}",),
    )

    def key() -> str:
        return jobs_for(request, "run", ["a"], [0])[0].key

    seen = [key()]
    assert key() == seen[0]
    unet = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(unet)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + 1
    config = base / "scheduler" / "scheduler_config.json"
    changes = {
        unet: safetensors.torch.save(tensors),
        config: json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}).encode(),
        table: table.read_bytes().replace(b",1\n", b",0\n"),
        tmp_path / "sample.depth.png": b"two",
    }
    for file in (photo, mask, tmp_path / "sample.json", tmp_path / "t.safetensors"):
        changes[file] = b"two"
    for file, content in changes.items():
        file.write_bytes(content)
        seen.append(key())
        assert len(set(seen)) == len(seen), file.name


def test_keys_without_files_stay_what_they_were():
    """A stored value: images that were made before are still there already."""
    from infer.jobs import Request, jobs_for

    request = Request(base="demo", run="demo", guidance=4.5)
    assert [job.key for job in jobs_for(request, "ildm@01234567", ["a red cube"], [3])] == ["a-red-cube-3-4aadfda4"]


def test_an_evaluations_files_change_with_the_content_of_bases_tables_and_judges(tmp_path):
    from infer.evaluation.generate import EvaluationOptions, EvaluationSampler, parse_methods
    from infer.evaluation.hub_metrics import ClipJudge
    from infer.evaluation.sets import prompt_set
    from shards.core.storage import Folder

    base, prompts, table = tmp_path / "base", tmp_path / "prompts.txt", tmp_path / "w.csv"
    shutil.copytree(models("sd15")[0], base)
    prompts.write_text("a\nb\n")
    header = "timestep," + ",".join(str(stage) for stage in range(1, 10))
    table.write_text(f"{header}\n500" + ",1" * 9 + "\n")
    drawing = EvaluationOptions(base=str(base), run=models("sd15")[1])

    def files() -> list[str]:
        studio = EvaluationSampler(drawing, Folder(str(tmp_path)))
        return [block.file for block in studio.blocks(parse_methods(f"base,{table}"), prompt_set("file", 2, prompts))]

    def judge() -> str:
        return ClipJudge("clip", "CLIP", str(base), None, None, None, "cpu").fingerprint()  # type: ignore[arg-type]

    before, judged = files(), judge()
    assert files() == before and judge() == judged
    table.write_text(table.read_text().replace(",1\n", ",0\n"))
    edited = files()
    assert [a == b for a, b in zip(before, edited, strict=True)] == [True, False] * 3
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"beta_end": 0.012', '"beta_end": 0.02'))
    assert not set(files()) & set(edited) and judge() != judged


def test_the_command_line_takes_one_file_and_a_textual_inversion_and_writes_what_repeats_it(tmp_path):
    import shlex

    from typer.testing import CliRunner

    from infer.__main__ import app

    base, run = models("sd15")
    file = save_single_file(tiny_text.pipeline("sd15"), tmp_path / "model.safetensors")
    safetensors.torch.save_file({"<thing>": torch.ones(1, tiny.TEXT)}, tmp_path / "thing.safetensors")
    options = ["--base-config", base, "--embedding", str(tmp_path / "thing.safetensors")]
    words = ["--base", str(file), "--run", run, *options, "--prompt", "a <thing>", "--size", "64", "--steps", "1"]
    for out in ("one", "two"):
        result = CliRunner().invoke(app, ["sample", *words, "--out", str(tmp_path / out)])
        assert result.exit_code == 0, result.output
        (about,) = [path for path in (tmp_path / out).glob("*.json") if path.stem.count(".") == 0]
        words = shlex.split(json.loads(about.read_text())["generated"]["command"])[4:]
    images = [next((tmp_path / out).glob("a-thing-*[0-9a-f].png")).read_bytes() for out in ("one", "two")]
    assert images[0] == images[1]
