"""Released checkpoints become this program's folders, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
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
from encoders.media import Image, Modality
from llm.generate import Finished, GenerationOptions, SignalReady, generate
from llm.model import LanguageModel
from llm.template import MediaTokens
from services.convert import convert_imagebind, convert_nextgpt
from services.session import Session
from tests import tiny_pipelines
from tests.imagebind_files import imagebind_file, tiny_preprocessing
from tests.nextgpt_files import (
    EMBEDDING,
    HEAD,
    SIZES,
    SMALL,
    SMALL_OUTPUTS,
    earlier,
    llama_pieces,
    read_json,
    rewritten,
    save_pt,
    small_names,
    small_tensors,
    write_base,
    write_sentencepiece,
)
from tests.test_imagebind import TINY
from tests.tiny_llm import user

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO


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
    model = LanguageModel.from_pretrained(converted / "llm")
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
    model = LanguageModel.from_pretrained(tmp_path / "w" / "llm")
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
    projection = OutputProjection.from_pretrained(converted / "projections" / modality)
    hidden, embeddings = torch.randn(count, 32), torch.randn(count, 32)

    out = projection(hidden[None], embeddings[None])[0]

    torch.testing.assert_close(out, projected(tensors, module, hidden + embeddings), rtol=1e-4, atol=1e-4)


def test_the_input_projection_reads_every_medium(tensors: dict[str, Tensor], converted: Path) -> None:
    model = LanguageModel.from_pretrained(converted / "llm")
    pooled = torch.randn(12)
    expected = F.linear(pooled, tensors["llama_proj.weight"].float(), tensors["llama_proj.bias"].float())

    for modality in (IMAGE, VIDEO, AUDIO):
        medium = MediaTokens(modality, torch.zeros(5, 12), pooled)
        batch = model.collate([[user(medium, "what is it?")]])
        ((row, slot),) = batch.media
        torch.testing.assert_close(model.embed_batch(batch)[row, slot.start], expected)
        assert slot.length == 1


def test_a_converted_model_speaks_and_asks_for_media(converted: Path) -> None:
    model = LanguageModel.from_pretrained(converted / "llm")
    options = GenerationOptions(max_new_tokens=6, seed=1, required=(IMAGE, VIDEO, AUDIO))

    events = list(generate(model, [user("a bell")], options))

    signals = [event.signal for event in events if isinstance(event, SignalReady)]
    assert [(s.modality, len(s.hidden)) for s in signals] == [(IMAGE, 4), (VIDEO, 24), (AUDIO, 8)]
    assert isinstance(events[-1], Finished)


def test_a_spoken_signal_becomes_the_condition_that_was_trained(
    base: Path, tensors: dict[str, Tensor], converted: Path
) -> None:
    model = LanguageModel.from_pretrained(converted / "llm")
    options = GenerationOptions(max_new_tokens=8, max_signals=1, required=(IMAGE,))
    events = list(generate(model, [user("a bell")], options))
    (signal,) = [event.signal for event in events if isinstance(event, SignalReady)]
    finished = events[-1]
    assert isinstance(finished, Finished)

    out = OutputProjection.from_pretrained(converted / "projections" / "image")(
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
    model = LanguageModel.from_pretrained(converted / "llm")
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 40, 301, 305]])

    torch.testing.assert_close(
        again.forward_embeddings(again.embed(ids))[0], model.forward_embeddings(model.embed(ids))[0]
    )
    assert again.tokenizer.role_words == model.tokenizer.role_words


def test_a_bridge_to_another_part_leaves_a_converted_model_its_words(
    tensors: dict[str, Tensor], converted: Path, tmp_path: Path
) -> None:
    LanguageModel.from_pretrained(converted / "llm").save_bridge(tmp_path, converted / "llm" / "base")

    again = LanguageModel.from_pretrained(converted / "llm", bridge=tmp_path)

    torch.testing.assert_close(again.embed(torch.arange(300)), tensors[EMBEDDING][:300].float())
    assert again.parameters_of("lora")


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


def test_tensors_of_several_precisions_keep_their_own(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    mixed = tensors | {"llama_proj.weight": tensors["llama_proj.weight"].float() / 3}
    convert_nextgpt(save_pt(mixed, tmp_path / "a.pt"), tmp_path / "w", **SIZES)

    bridge = load_file(tmp_path / "w" / "llm" / "bridge.safetensors")
    assert torch.equal(bridge["projectors.image.project.weight"], mixed["llama_proj.weight"])
    assert bridge["signal_rows.head"].dtype == torch.float16


def test_a_file_from_before_lora_converts_to_a_model_without_it(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    parts = {name: v for name, v in earlier(tensors).items() if not name.startswith("gen_text")}
    record = convert_nextgpt(save_pt(parts, tmp_path / "p.pt"), tmp_path / "w", str(base), **SIZES)

    model = LanguageModel.from_pretrained(tmp_path / "w" / "llm")
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
        LanguageModel.from_pretrained(llm)
    shutil.copytree(base, llm / "base")
    assert LanguageModel.from_pretrained(llm).width == 32


def test_a_base_with_a_tokenizer_of_sentencepiece_alone_is_converted(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    words = ["\u2581a", "\u2581", "a", *(f"<piece{i}>" for i in range(SMALL.base_vocabulary - 262))]
    write_sentencepiece(tmp_path / "base" / "tokenizer.model", llama_pieces(words))

    convert_nextgpt(save_pt(tensors, tmp_path / "a.pt"), tmp_path / "w", str(tmp_path / "base"), **SIZES)

    tokenizer = LanguageModel.from_pretrained(tmp_path / "w" / "llm").tokenizer
    assert tokenizer.encode_text(" a") == [260, 259]
    assert tokenizer.signal_ids(IMAGE) == (302, 303, 304, 305)


def test_of_the_rewrite_the_output_projections_are_converted(
    tensors: dict[str, Tensor], converted: Path, tmp_path: Path
) -> None:
    state = rewritten(tensors)
    assert len(state) == 3 * 129 + 2
    state["model.mm_input_projector.layers.0.group_token"] = torch.zeros(1, 64, 16)

    file = save_pt(state, tmp_path / "mm_output_projector.bin")
    record = convert_nextgpt(file, tmp_path / "w", **SIZES)

    assert record["left_out"]["names"] == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.mm_input_projector.layers.0.group_token",
    ]
    of_release = json.loads((converted / "converted.json").read_text())["base"]
    assert record["base"] == {**dict.fromkeys(of_release), "needed": "Vicuna-7B v1.5"}
    assert json.loads((tmp_path / "w" / "converted.json").read_text()) == record
    assert not (tmp_path / "w" / "llm").exists()
    x = torch.randn(4, 32)
    projection = OutputProjection.from_pretrained(tmp_path / "w" / "projections" / "image")
    expected = projected(tensors, "gen_text_hidden_fcs.0", x)
    torch.testing.assert_close(projection(x[None], 0 * x[None])[0], expected, rtol=1e-4, atol=1e-4)


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
