"""Released checkpoints become this program's folders, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from decoders.projection import OutputProjection
from decoders.writing import to_png
from encoders.imagebind import ImageBind
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Image, Modality, Video
from encoders.preprocess import PreprocessConfig
from llm.generate import Finished, GenerationOptions, SignalReady, generate
from llm.model import LanguageModel
from llm.template import MediaTokens
from services.cli import main
from services.convert import convert_imagebind, convert_nextgpt
from services.session import Session
from tests import tiny_pipelines
from tests.nextgpt_files import (
    SMALL,
    SMALL_OUTPUTS,
    read_json,
    save_pt,
    small_names,
    small_tensors,
    write_base,
)
from tests.test_imagebind import TINY
from tests.tiny_llm import user

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO
SIZES: dict[str, Any] = {"sizes": SMALL, "outputs": SMALL_OUTPUTS, "rewritten": SMALL_OUTPUTS}
EMBEDDING = "llama_model.base_model.model.model.embed_tokens.weight"
HEAD = "llama_model.base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


@pytest.fixture(scope="module")
def tensors(base: Path) -> dict[str, Tensor]:
    return small_tensors(load_file(base / "model.safetensors")["model.embed_tokens.weight"])


@pytest.fixture(scope="module")
def converted(base: Path, tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert_nextgpt(save_pt(tensors, folder / "pytorch_model.pt"), folder / "w", str(base), **SIZES)
    return folder / "w"


def original(base: Path, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    """The base as the original program has it after loading: tables grown and replaced, LoRA added in."""
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(SMALL.vocabulary, mean_resizing=False)
    state = model.state_dict()
    state["model.embed_tokens.weight"] = tensors[EMBEDDING].float()
    state["lm_head.weight"] = tensors[HEAD].float()
    for name, value in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("llama_model.base_model.model.").removesuffix(".lora_A.default.weight")
            low, high = value.float(), tensors[name.replace("lora_A", "lora_B")].float()
            state[f"{module}.weight"] = state[f"{module}.weight"] + high @ low
    model.load_state_dict(state)
    return model.eval()


def attention(tensors: dict[str, Tensor], name: str, x: Tensor, source: Tensor) -> Tensor:
    weights, biases = tensors[f"{name}.in_proj_weight"].chunk(3), tensors[f"{name}.in_proj_bias"].chunk(3)
    given = (x, source, source)
    q, k, v = (F.linear(y, w, b) for y, w, b in zip(given, weights, biases, strict=True))
    heads = []
    for query, key, value in zip(q.chunk(4, -1), k.chunk(4, -1), v.chunk(4, -1), strict=True):
        heads.append((query @ key.T / query.shape[1] ** 0.5).softmax(-1) @ value)
    return F.linear(
        torch.cat(heads, -1), tensors[f"{name}.out_proj.weight"], tensors[f"{name}.out_proj.bias"]
    )


def norm(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def linear(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def projected(tensors: dict[str, Tensor], module: str, x: Tensor) -> Tensor:
    """One signal block ``(k, width)`` through an output projection, from the file's tensors alone."""
    t = {name.removeprefix(f"{module}."): v.float() for name, v in tensors.items() if name.startswith(module)}
    memory = linear(t, "fc", x)
    for i in range(4):
        layer = f"tfm.encoder.layers.{i}"
        y = norm(t, f"{layer}.norm1", memory)
        memory = memory + attention(t, f"{layer}.self_attn", y, y)
        y = linear(t, f"{layer}.linear1", norm(t, f"{layer}.norm2", memory)).relu()
        memory = memory + linear(t, f"{layer}.linear2", y)
    memory = norm(t, "tfm.encoder.norm", memory)
    x = t["query_embs"][0]
    for i in range(4):
        layer = f"tfm.decoder.layers.{i}"
        y = norm(t, f"{layer}.norm1", x)
        x = x + attention(t, f"{layer}.self_attn", y, y)
        x = x + attention(t, f"{layer}.multihead_attn", norm(t, f"{layer}.norm2", x), memory)
        y = linear(t, f"{layer}.linear1", norm(t, f"{layer}.norm3", x)).relu()
        x = x + linear(t, f"{layer}.linear2", y)
    return linear(t, "model", norm(t, "tfm.decoder.norm", x))


def test_converted_language_model_computes_what_the_original_does(
    base: Path, tensors: dict[str, Tensor], converted: Path
) -> None:
    model = LanguageModel.load(converted / "llm")
    ids = torch.tensor([[1, 40, 7, 300, 301, 302, 303, 304, 305, 99, 337]])

    with torch.no_grad():
        logits, _ = model.forward_embeddings(model.embed(ids))
        expected = original(base, tensors)(ids).logits

    assert logits.shape == (1, 11, 338)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1


def test_without_whole_tables_the_base_keeps_its_own_words(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    file = save_pt(tensors, tmp_path / "pytorch_model.pt")
    convert_nextgpt(file, tmp_path / "w", str(base), whole_tables=False, **SIZES)
    model = LanguageModel.load(tmp_path / "w" / "llm")
    own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]

    torch.testing.assert_close(model.embed(torch.arange(300)), own[:300])
    torch.testing.assert_close(model.embed(torch.arange(300, 338)), tensors[EMBEDDING][300:].float())
    assert not (tmp_path / "w" / "llm" / "tables.safetensors").exists()


@pytest.mark.parametrize(
    ("modality", "module", "count"),
    [
        (IMAGE, "gen_text_hidden_fcs.0", 4),
        (VIDEO, "gen_text_hidden_fcs_video.0", 24),
        (AUDIO, "gen_text_hidden_fcs_audio.0", 8),
    ],
)
def test_converted_output_projections_compute_what_the_file_says(
    tensors: dict[str, Tensor], converted: Path, modality: Modality, module: str, count: int
) -> None:
    projection = OutputProjection.load(converted / "projections" / modality)
    hidden, embeddings = torch.randn(count, 32), torch.randn(count, 32)

    out = projection(hidden[None], embeddings[None])[0]

    torch.testing.assert_close(out, projected(tensors, module, hidden + embeddings), rtol=1e-4, atol=1e-4)


def test_the_input_projection_reads_every_medium(tensors: dict[str, Tensor], converted: Path) -> None:
    model = LanguageModel.load(converted / "llm")
    pooled = torch.randn(12)
    expected = F.linear(pooled, tensors["llama_proj.weight"].float(), tensors["llama_proj.bias"].float())

    for modality in (IMAGE, VIDEO, AUDIO):
        medium = MediaTokens(modality, torch.zeros(5, 12), pooled)
        batch = model.collate([[user(medium, "what is it?")]])
        ((row, slot),) = batch.media
        torch.testing.assert_close(model.embed_batch(batch)[row, slot.start], expected)
        assert slot.length == 1


def test_a_converted_model_speaks_and_asks_for_media(converted: Path) -> None:
    model = LanguageModel.load(converted / "llm")
    options = GenerationOptions(max_new_tokens=6, seed=1, required=(IMAGE, VIDEO, AUDIO))

    events = list(generate(model, [user("a bell")], options))

    signals = [event.signal for event in events if isinstance(event, SignalReady)]
    assert [(s.modality, len(s.hidden)) for s in signals] == [(IMAGE, 4), (VIDEO, 24), (AUDIO, 8)]
    assert isinstance(events[-1], Finished)


def test_a_spoken_signal_becomes_the_condition_that_was_trained(
    base: Path, tensors: dict[str, Tensor], converted: Path
) -> None:
    model = LanguageModel.load(converted / "llm")
    options = GenerationOptions(max_new_tokens=8, max_signals=1, required=(IMAGE,))
    events = list(generate(model, [user("a bell")], options))
    (signal,) = [event.signal for event in events if isinstance(event, SignalReady)]
    finished = events[-1]
    assert isinstance(finished, Finished)

    out = OutputProjection.load(converted / "projections" / "image")(
        signal.hidden[None], signal.embeddings[None]
    )[0]

    # As in training: the last layer's states where the signal's tokens are fed, and the tokens' own rows.
    ids = [*model.encode([user("a bell")], open_reply=True).ids, *finished.ids]
    at = ids.index(302)
    with torch.no_grad():
        states = original(base, tensors)(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    hidden, rows = states[0, at : at + 4], tensors[EMBEDDING][302:306].float()
    torch.testing.assert_close(signal.hidden, hidden, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(signal.embeddings, rows)
    torch.testing.assert_close(
        out, projected(tensors, "gen_text_hidden_fcs.0", hidden + rows), rtol=1e-4, atol=1e-4
    )
    assert (states[0, at - 1 : at + 3] - hidden).abs().max() > 0.1


def test_a_converted_model_survives_saving(converted: Path, tmp_path: Path) -> None:
    model = LanguageModel.load(converted / "llm")
    model.save(tmp_path)
    again = LanguageModel.load(tmp_path)
    ids = torch.tensor([[1, 40, 301, 305]])

    torch.testing.assert_close(
        again.forward_embeddings(again.embed(ids))[0], model.forward_embeddings(model.embed(ids))[0]
    )
    assert again.tokenizer.role_words == model.tokenizer.role_words


def test_the_record_names_the_source_the_base_and_every_file(converted: Path) -> None:
    record: Any = read_json(converted / "converted.json")

    source = converted.parent / "pytorch_model.pt"
    assert record["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["source"]["name"] == "pytorch_model.pt"
    assert sum(record["tensors"].values()) == 647
    assert record["absent"] == []
    assert "Vicuna-7B v0" in record["base"]["needed"]
    assert record["base"]["mean_cosine_of_embeddings"] > 0.9
    assert "not for commercial use" in record["licence"]
    files = {str(p.relative_to(converted)) for p in converted.rglob("*") if p.is_file()} - {"converted.json"}
    assert record["files"].keys() == files
    for name, digest in record["files"].items():
        assert hashlib.sha256((converted / name).read_bytes()).hexdigest() == digest["sha256"]
    assert not any(path.suffix in (".pt", ".bin") for path in converted.rglob("*"))


def test_values_are_kept_in_half_precision_bit_for_bit(tensors: dict[str, Tensor], converted: Path) -> None:
    adapter = load_file(converted / "llm" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.31.self_attn.o_proj.lora_B"

    given = tensors[f"llama_model.base_model.model.{name}.default.weight"]
    assert len(adapter) == 256
    assert torch.equal(adapter[f"base_model.model.{name}.weight"], given)
    assert given.dtype == torch.float16


def earlier(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file from before the third stage: no LoRA, and so no peft in the names."""
    return {
        name.replace("base_model.model.", ""): value
        for name, value in tensors.items()
        if ".lora_" not in name
    }


def test_a_file_from_before_lora_converts_to_a_model_without_it(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    parts = {name: v for name, v in earlier(tensors).items() if not name.startswith("gen_text")}
    record = convert_nextgpt(save_pt(parts, tmp_path / "p.pt"), tmp_path / "w", str(base), **SIZES)

    model = LanguageModel.load(tmp_path / "w" / "llm")
    assert not model.parameters_of("lora")
    assert record["absent"] == ["lora", *(f"{m} output projection" for m in SMALL_OUTPUTS)]
    assert not (tmp_path / "w" / "projections").exists()
    torch.testing.assert_close(model.embed(torch.tensor([310]))[0], tensors[EMBEDDING][310].float())


def test_a_second_name_of_the_same_tensor_is_accepted_and_another_value_is_not(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    twice = tensors | {"input_embeddings.weight": tensors[EMBEDDING]}
    convert_nextgpt(save_pt(twice, tmp_path / "a.pt"), tmp_path / "w", **SIZES)

    differing = tensors | {"input_embeddings.weight": tensors[EMBEDDING] + 1}
    with pytest.raises(ValueError, match=r"tables.embedding under two names, one of them input_embeddings"):
        convert_nextgpt(save_pt(differing, tmp_path / "b.pt"), tmp_path / "v", **SIZES)


def test_without_a_base_all_else_is_there(tensors: dict[str, Tensor], base: Path, tmp_path: Path) -> None:
    convert_nextgpt(save_pt(tensors, tmp_path / "a.pt"), tmp_path / "w", **SIZES)
    llm = tmp_path / "w" / "llm"

    assert sorted(p.name for p in llm.iterdir()) == [
        "adapter",
        "bridge.json",
        "bridge.safetensors",
        "tables.safetensors",
    ]
    with pytest.raises(ValueError, match=r"base/config.json is missing"):
        LanguageModel.load(llm)
    shutil.copytree(base, llm / "base")
    assert LanguageModel.load(llm).width == 32


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: v for n, v in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda t: t | {"visual_encoder.x": torch.zeros(1)},
            r"holds visual_encoder.x, which this layout has",
        ),
        (without("llama_proj.bias"), r"lacks llama_proj.bias of its input projection \(1 of 2 tensors\)"),
        (without(EMBEDDING), r"lacks tables.embedding of its tables"),
        (without("gen_text_hidden_fcs_audio.0.fc.bias"), r"lacks audio.fc.bias of its audio output"),
        (
            without("llama_model.base_model.model.model.layers.9.self_attn.k_proj.lora_A.default.weight"),
            r"lacks lora.model.layers.9.self_attn.k_proj.lora_A.weight of its lora \(1 of 256",
        ),
        (
            lambda t: t | {EMBEDDING: torch.zeros(336, 32)},
            r"tables.embedding has shape \(336, 32\); expected \(338, 32\)\. .* Use .*nextgpt_7b_tiva_v0",
        ),
        (
            lambda t: t | {"gen_text_hidden_fcs.0.model.weight": torch.zeros(12, 16)},
            r"image.model.weight has shape \(12, 16\); expected \(16, 16\)",
        ),
        (
            lambda t: t | {"llama_proj.bias": torch.full((32,), torch.nan)},
            r"llama_proj.bias holds values that are no",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    tensors: dict[str, Tensor], tmp_path: Path, change: Callable[..., dict[str, Tensor]], complaint: str
) -> None:
    file = save_pt(change(tensors), tmp_path / "pytorch_model.pt")

    with pytest.raises(ValueError, match=complaint):
        convert_nextgpt(file, tmp_path / "w", **SIZES)
    assert not (tmp_path / "w").exists()


def setting(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(read_json(path) | {name: value}))

    return change


def other_weights(folder: Path) -> None:
    torch.manual_seed(99)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data.normal_()
    model.save_pretrained(folder)


def more_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values: Any = read_json(path)
    values["model"]["vocab"].append(["extra", -9.0])
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (setting("hidden_size", 40), r"has hidden_size 40; .* a base with 32\. Use Vicuna-7B v0"),
        (setting("vocab_size", 320), r"has vocab_size 320; .* with 301\. Use Vicuna-7B v0"),
        (setting("vocab_size", 300), r"has vocab_size 300; .* not LLaMA itself, a later Vicuna"),
        (setting("num_hidden_layers", 40), r"num_hidden_layers 40; .* 32"),
        (
            setting("max_position_embeddings", 4096),
            r"max_position_embeddings 4096; .* a later Vicuna or Llama 2",
        ),
        (setting("model_type", "mistral"), r"model_type mistral; .* llama"),
        (more_tokens, r"tokenizer.json has 301 tokens; .* 300"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer.json is missing; .*sentencepiece"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"patchbay convert pickles"),
        (other_weights, r"mean cosine of -?0\.0\d .*; expected at least 0.5"),
    ],
)
def test_a_wrong_base_is_refused_with_what_to_use(
    base: Path,
    tensors: dict[str, Tensor],
    tmp_path: Path,
    change: Callable[[Path], object],
    complaint: str,
) -> None:
    shutil.copytree(base, tmp_path / "base")
    change(tmp_path / "base")
    file = save_pt(tensors, tmp_path / "pytorch_model.pt")

    with pytest.raises(ValueError, match=complaint):
        convert_nextgpt(file, tmp_path / "w", str(tmp_path / "base"), **SIZES)
    assert not (tmp_path / "w").exists()


def test_tokens_that_were_added_to_the_base_are_left_out(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    values: Any = read_json(path)
    values["added_tokens"].append({**values["added_tokens"][0], "id": 300, "content": "[PAD]"})
    path.write_text(json.dumps(values))

    convert_nextgpt(save_pt(tensors, tmp_path / "a.pt"), tmp_path / "w", str(tmp_path / "base"), **SIZES)

    assert LanguageModel.load(tmp_path / "w" / "llm").tokenizer.signal_ids(IMAGE) == (302, 303, 304, 305)


def test_a_base_that_is_nowhere_is_refused_with_how_to_fetch_it(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    file = save_pt(tensors, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"hf download nobody/vicuna"):
        convert_nextgpt(file, tmp_path / "w", "nobody/vicuna", **SIZES)


def test_an_earlier_result_is_never_overwritten(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "w" / "llm").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"llm is there already"):
        convert_nextgpt(save_pt(tensors, tmp_path / "a.pt"), tmp_path / "w", **SIZES)
    assert list((tmp_path / "w").iterdir()) == [tmp_path / "w" / "llm"]


def rewritten(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output projections under the names of the 2024 code, with the tables that it saves beside them."""
    names = {
        "gen_text_hidden_fcs.0.": "model.mm_output_img_projector.",
        "gen_text_hidden_fcs_video.0.": "model.mm_output_vid_projector.",
        "gen_text_hidden_fcs_audio.0.": "model.mm_output_aud_projector.",
    }
    state = {"model.embed_tokens.weight": torch.zeros(336, 32), "lm_head.weight": torch.zeros(336, 32)}
    for name, value in tensors.items():
        for old, new in names.items():
            if name.startswith(old):
                rest = name.removeprefix(old)
                layer, _, last = rest.partition(".")
                layer = {"fc": "in_fc", "model": "out_fc"}.get(layer, layer)
                state[new + layer + ("." + last if last else "")] = value
    return state


def test_of_the_rewrite_the_output_projections_are_converted(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    state = rewritten(tensors)
    assert len(state) == 3 * 129 + 2

    file = save_pt(state, tmp_path / "mm_output_projector.bin")
    record = convert_nextgpt(file, tmp_path / "w", **SIZES)

    assert record["left_out"]["names"] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert not (tmp_path / "w" / "llm").exists()
    x = torch.randn(4, 32)
    projection = OutputProjection.load(tmp_path / "w" / "projections" / "image")
    expected = projected(tensors, "gen_text_hidden_fcs.0", x)
    torch.testing.assert_close(projection(x[None], 0 * x[None])[0], expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_counterpart_in_the_rewrite_is_refused(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    group = {"model.mm_input_projector.layers.0.group_token": torch.zeros(1, 64, 16)}
    with pytest.raises(ValueError, match=r"holds model.mm_input_projector.layers.0.group_token; expected"):
        convert_nextgpt(save_pt(group, tmp_path / "a.bin"), tmp_path / "w", **SIZES)
    odd = rewritten(tensors) | {"model.vision_tower.x": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"model.vision_tower.x, which no NExT-GPT code"):
        convert_nextgpt(save_pt(odd, tmp_path / "b.bin"), tmp_path / "w", **SIZES)


def test_the_command_refuses_another_size_and_says_which_it_wants(
    tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_pt(tensors, tmp_path / "pytorch_model.pt")

    code = main(["convert", "nextgpt", str(file), "--out", str(tmp_path / "w")])

    assert code == 1
    assert "has shape (338, 32); expected (32038, 4096)" in capsys.readouterr().err


def test_a_preset_of_converted_weights_answers_a_picture_with_words_and_media(
    converted: Path, tmp_path: Path
) -> None:
    shutil.copytree(converted, tmp_path / "weights")
    imagebind_file(tmp_path / "i.pth")
    convert_imagebind(
        tmp_path / "i.pth", tmp_path / "weights", release=TINY, preprocessing=tiny_preprocessing()
    )
    for modality, pipeline in (
        ("image", tiny_pipelines.image_pipeline()),
        ("video", tiny_pipelines.video_pipeline()),
        ("audio", tiny_pipelines.audio_pipeline()),
    ):
        tiny_pipelines.saved(pipeline, tmp_path / "weights" / modality)
    decoder = {"steps": 2, "guidance_scale": 2.0}
    values = {
        "name": "converted",
        "description": "Converted weights.",
        "weights": "weights",
        "decoders": {
            "image": decoder | {"folder": "image"},
            "video": decoder | {"folder": "video"},
            "audio": decoder | {"folder": "audio"},
        },
        "generation": {"temperature": 1.5, "max_new_tokens": 150},
    }
    (tmp_path / "converted.yaml").write_text(yaml.safe_dump(values))
    bridge = load_file(tmp_path / "weights" / "llm" / "bridge.safetensors")
    head = bridge["signal_rows.head"]
    head[[2, 6, 30]] = 4 * head[6]  # so that random weights ask for media often, and as often for each kind
    save_file(bridge, tmp_path / "weights" / "llm" / "bridge.safetensors")
    content = [
        {"type": "image", "data": to_png(Image(np.zeros((20, 20, 3), np.uint8)), {})},
        {"type": "text", "text": "what is it?"},
    ]

    with Session.open(str(tmp_path / "converted.yaml")) as session:
        replies = [session.chat([{"role": "user", "content": content}], seed=seed) for seed in range(6)]

    parts = [part for reply in replies for part in reply.parts]
    assert [part.error for part in parts if part.error] == []
    assert {part.type for part in parts if part.data} == {IMAGE, VIDEO, AUDIO}
    assert any(part.text for part in parts)


def imagebind_file(path: Path) -> dict[str, Tensor]:
    torch.manual_seed(5)
    state = ImageBind(TINY).state_dict()
    torch.save(state, path)
    return state


def tiny_preprocessing() -> PreprocessConfig:
    return PreprocessConfig(
        image_size=16,
        video_clips=2,
        video_clip_seconds=0.5,
        video_clip_frames=2,
        video_crops=1,
        audio_clips=1,
        audio_clip_seconds=0.16,
        num_mel_bins=10,
        num_mel_frames=16,
    )


def test_imagebind_keeps_the_towers_that_are_asked_for(tmp_path: Path) -> None:
    state = imagebind_file(tmp_path / "imagebind_huge.pth")
    sizes: Any = {"release": TINY, "preprocessing": tiny_preprocessing()}

    record = convert_imagebind(tmp_path / "imagebind_huge.pth", tmp_path / "w", **sizes)

    encoder = ImageBindEncoder.load(tmp_path / "w" / "encoder")
    assert encoder.modalities == {IMAGE, VIDEO, AUDIO}
    kept = [name for name in state if name.split(".")[1] in ("vision", "audio")]
    assert record["tensors"] == {
        "kept": len(kept),
        "left out with their towers": len(state) - len(kept),
    }
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert record["files"].keys() == {"config.json", "model.safetensors"}


def test_imagebind_stands_for_a_video_by_the_plain_mean_of_its_clips(tmp_path: Path) -> None:
    imagebind_file(tmp_path / "i.pth")
    sizes: Any = {"release": TINY, "preprocessing": tiny_preprocessing()}
    convert_imagebind(tmp_path / "i.pth", tmp_path / "w", dtype=torch.float32, **sizes)
    encoder = ImageBindEncoder.load(tmp_path / "w" / "encoder")
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (8, 16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    video = Video(frames, 8.0)

    pooled = encoder.encode(video).pooled

    with torch.inference_mode():
        expected = encoder.model({"vision": encoder.prepare([video])})["vision"][0]
    torch.testing.assert_close(pooled, expected)
    assert pooled.norm() < 0.999
    assert encoder.encode(Image(frames[0])).pooled.norm().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        ({"extra.weight": torch.zeros(1)}, {}, r"holds extra.weight, which this layout has no place for"),
        ({"modality_heads.imu.3.weight": None}, {}, r"lacks modality_heads.imu.3.weight of its ImageBind"),
        (
            {"modality_heads.imu.3.weight": torch.zeros(2, 2)},
            {},
            r"modality_heads.imu.3.weight has shape \(2, 2\); expected \(12, 8\)",
        ),
        ({}, {"towers": ("vision", "smell")}, r"towers is vision, smell; choose from vision, text, audio"),
        ({}, {"towers": ("text",)}, r"needs CLIP's vocabulary"),
    ],
)
def test_an_imagebind_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], options: dict[str, Any], complaint: str
) -> None:
    state = {**imagebind_file(tmp_path / "i.pth"), **change}
    torch.save({name: v for name, v in state.items() if v is not None}, tmp_path / "i.pth")

    with pytest.raises(ValueError, match=complaint):
        convert_imagebind(tmp_path / "i.pth", tmp_path / "w", release=TINY, **options)
    assert not (tmp_path / "w" / "encoder").exists()


def test_the_files_hold_every_tensor_of_the_release_once(converted: Path) -> None:
    held: dict[str, int] = {}
    for path in converted.rglob("*.safetensors"):
        if "base" not in path.parts:
            with safe_open(path, framework="pt") as file:
                held[str(path.relative_to(converted))] = len(list(file.keys()))

    assert held == {
        "llm/adapter/adapter_model.safetensors": 256,
        "llm/bridge.safetensors": 2 + 3 * 2,
        "llm/tables.safetensors": 2,
        **{f"projections/{m}/model.safetensors": 129 for m in ("image", "video", "audio")},
    }
    assert len(small_names()) == 647
