"""What is no released checkpoint, or does not fit its base, is named, and nothing is written."""

from __future__ import annotations

import functools
import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import IncompleteSnapshotError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from encoders.media import Modality
from llm.model import LanguageModel
from services.cli import main
from services.convert import convert_nextgpt
from tests.nextgpt_files import (
    EMBEDDING,
    SIZES,
    SMALL,
    read_json,
    rewritten,
    save_pt,
    small_tensors,
    write_base,
)

IMAGE = Modality.IMAGE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


@pytest.fixture(scope="module")
def tensors(base: Path) -> dict[str, Tensor]:
    return small_tensors(load_file(base / "model.safetensors")["model.embed_tokens.weight"])


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
            r"llama_proj.bias holds values that are not finite numbers",
        ),
        (
            lambda t: t | {"llama_proj.weight": t["llama_proj.weight"] / 0},
            r"llama_proj.weight holds values that are not finite numbers",
        ),
        (
            lambda t: t | {"llama_proj.bias": t["llama_proj.bias"].double()},
            r"llama_proj.bias is float64; expected float16, bfloat16 or float32",
        ),
        (
            lambda t: {f"module.{name}": value for name, value in t.items()},
            r"All of these begin with 'module', as if a wrapper had been saved",
        ),
        (
            lambda t: {"modality_heads.audio.0.bias": torch.zeros(2)},
            r"It looks like ImageBind: patchbay convert imagebind\. Use pytorch_model.pt",
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


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_shard_less(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def a_layer_less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors")


def fewer_rows(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")


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
        (setting("model_type", "mistral"), r"model_type 'mistral'; .* 'llama'"),
        (setting("num_hidden_layers", "32"), r"has num_hidden_layers '32'; .* a base with 32\."),
        (setting("intermediate_size", 7), r"has model\.layers\.0\.mlp\.\w+\.weight of shape .*asks for \("),
        (setting("num_attention_heads", 0), r"config.json describes no model that can be built: "),
        (a_layer_less, r"base lacks model\.layers\.1\.\S+; its config.json asks for \(.*whole folder"),
        (more_tokens, r"tokenizer.json has 301 tokens; .* 300"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer; .* Copy tokenizer.model from"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"patchbay convert pickles"),
        (
            lambda folder: (folder / "config.json").write_text("{oops"),
            r"config.json is not JSON, or is cut off",
        ),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            r"config.json holds a list; expected an obj",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer.json is no tokenizer: "),
        (cut_off, r"model.safetensors is not a whole safetensors file"),
        (a_shard_less, r"index.json names 1 file that .* lacks: model-00002-of-00002.safetensors\. Copy or"),
        (fewer_rows, r"has shape \(300, 32\), and its config.json says \(301, 32\)"),
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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (setting("vocab_size", 300), r"has vocab_size 300; .* a base with 301\. Put the base there .*--base"),
        (setting("max_position_embeddings", 4096), r"max_position_embeddings 4096; .* with 256\."),
        (setting("model_type", "mistral"), r"has model_type mistral; .* with llama\."),
    ],
)
def test_a_wrong_base_beside_a_checkpoint_that_was_converted_without_one_is_refused(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path, change: Callable[[Path], object], complaint: str
) -> None:
    convert_nextgpt(save_pt(tensors, tmp_path / "a.pt"), tmp_path / "w", **SIZES)
    folder = tmp_path / "w" / "llm"
    shutil.copytree(base, folder / "base")
    assert LanguageModel.from_pretrained(folder).tokenizer.base_vocabulary == SMALL.base_vocabulary
    change(folder / "base")
    with pytest.raises(ValueError, match=complaint):
        LanguageModel.from_pretrained(folder)


def test_tokens_that_were_added_to_the_base_are_left_out(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    values: Any = read_json(path)
    values["added_tokens"].append({**values["added_tokens"][0], "id": 300, "content": "[PAD]"})
    path.write_text(json.dumps(values))

    convert_nextgpt(save_pt(tensors, tmp_path / "a.pt"), tmp_path / "w", str(tmp_path / "base"), **SIZES)

    assert LanguageModel.from_pretrained(tmp_path / "w" / "llm").tokenizer.signal_ids(IMAGE) == (
        302,
        303,
        304,
        305,
    )


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("a.pt", r"a.pt is a file; expected the folder of Vicuna-7B v0 .* Give that folder, or a hub id"),
        (
            "https://hub/lmsys/vicuna-7b",
            r"no hub id either, which looks like owner/name\. .* Give its",
        ),
    ],
)
def test_a_base_that_can_be_none_is_not_looked_for(
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = save_pt(tensors, Path("a.pt"))

    with pytest.raises(ValueError, match=complaint):
        convert_nextgpt(file, tmp_path / "w", given, **SIZES)


def test_a_path_that_is_empty_is_refused_before_anything_is_written(
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pt(tensors, Path("a.pt"))

    for words in (["a.pt", "--out", ""], ["a.pt", "--out", "w", "--base", " "], ["", "--out", "w"]):
        with pytest.raises(SystemExit):
            main(["convert", "nextgpt", *words])
        assert "it is empty; expected a path" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_base_that_is_nowhere_is_refused_with_how_to_fetch_it(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    file = save_pt(tensors, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"`patchbay convert delta` made, .* hf download nobody/vicuna"):
        convert_nextgpt(file, tmp_path / "w", "nobody/vicuna", **SIZES)


def test_a_base_whose_download_was_broken_off_is_refused_with_how_to_go_on(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def partly(*args: object, **options: object) -> str:
        raise IncompleteSnapshotError("3 of 14 files are missing", snapshot_path="x")

    monkeypatch.setattr("huggingface_hub.snapshot_download", partly)
    with pytest.raises(
        ValueError, match=r"in part: its download was broken off\. .* hf download some/vicuna"
    ):
        convert_nextgpt(save_pt(tensors, tmp_path / "a.pt"), tmp_path / "w", "some/vicuna", **SIZES)


def test_an_earlier_result_is_never_overwritten(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "w" / "llm").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"llm is there already"):
        convert_nextgpt(save_pt(tensors, tmp_path / "a.pt"), tmp_path / "w", **SIZES)
    assert list((tmp_path / "w").iterdir()) == [tmp_path / "w" / "llm"]


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


def test_a_base_for_the_rewrite_is_refused_as_it_would_not_be_used(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    file = save_pt(rewritten(tensors), tmp_path / "mm_output_projector.bin")
    with pytest.raises(ValueError, match=r"only the output projections .* Leave --base .* out"):
        convert_nextgpt(file, tmp_path / "w", str(base), **SIZES)


def small_command(file: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command as if the release were small."""
    monkeypatch.setattr("services.convert.convert_nextgpt", functools.partial(convert_nextgpt, **SIZES))
    return main(["convert", "nextgpt", str(file), "--out", str(out)])


def test_a_place_that_cannot_be_written_is_one_line_and_leaves_nothing(
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = save_pt(tensors, tmp_path / "pytorch_model.pt")
    (tmp_path / "taken").write_text("mine")

    assert small_command(file, tmp_path / "taken", monkeypatch) == 1
    assert small_command(file, tmp_path / "taken" / "below", monkeypatch) == 1
    assert small_command(file, tmp_path / ("w" * 300), monkeypatch) == 1

    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith(
        f"patchbay: Nothing was converted, as {tmp_path}/taken cannot be written: File exists"
    )
    assert "Not a directory" in second
    assert "File name too long" in third
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_disk_that_gets_full_is_said_and_leaves_nothing(
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = save_pt(tensors, tmp_path / "pytorch_model.pt")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, former[1]))
    try:
        assert small_command(file, tmp_path / "a" / "w", monkeypatch) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, ignored)

    assert "w cannot be written: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    file = save_pt(tensors, tmp_path / "pytorch_model.pt")
    replace = Path.replace

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    def interrupted_later(self: Path, target: Path) -> Path:
        if target.name == "projections":
            raise KeyboardInterrupt
        return replace(self, target)

    if moment == "writing":
        monkeypatch.setattr("services.convert.output_side.write_folders", interrupted)
    else:
        monkeypatch.setattr(Path, "replace", interrupted_later)

    assert small_command(file, tmp_path / "w", monkeypatch) == 130

    assert capsys.readouterr().err == "patchbay: interrupted\n"
    assert list(tmp_path.iterdir()) == [file]


def test_the_record_of_an_earlier_conversion_is_kept(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    words = {name: value for name, value in tensors.items() if not name.startswith("gen_text")}
    convert_nextgpt(save_pt(words, tmp_path / "a.pt"), tmp_path / "w", **SIZES)
    record = (tmp_path / "w" / "converted.json").read_bytes()

    with pytest.raises(ValueError, match=r"converted.json is there already"):
        convert_nextgpt(save_pt(rewritten(tensors), tmp_path / "b.bin"), tmp_path / "w", **SIZES)
    assert (tmp_path / "w" / "converted.json").read_bytes() == record
