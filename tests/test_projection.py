import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoders.projection import OutputProjection, OutputProjectionConfig

TINY = OutputProjectionConfig(
    llm_width=12,
    out_width=10,
    num_queries=3,
    hidden_width=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    ffn_width=32,
)


def tiny() -> OutputProjection:
    torch.manual_seed(0)
    return OutputProjection(TINY)


def released(out_width: int, num_queries: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one gen_text_hidden_fcs module of nextgpt_7b_tiva_v0."""
    shapes: dict[str, tuple[int, ...]] = {
        "query_embs": (1, num_queries, 512),
        "fc.weight": (512, 4096),
        "fc.bias": (512,),
        "model.weight": (out_width, 512),
        "model.bias": (out_width,),
    }
    attentions = {"encoder": ["self_attn"], "decoder": ["self_attn", "multihead_attn"]}
    norms = {"encoder": 2, "decoder": 3}
    for half in ("encoder", "decoder"):
        for layer in range(4):
            prefix = f"tfm.{half}.layers.{layer}"
            for attention in attentions[half]:
                shapes[f"{prefix}.{attention}.in_proj_weight"] = (1536, 512)
                shapes[f"{prefix}.{attention}.in_proj_bias"] = (1536,)
                shapes[f"{prefix}.{attention}.out_proj.weight"] = (512, 512)
                shapes[f"{prefix}.{attention}.out_proj.bias"] = (512,)
            shapes[f"{prefix}.linear1.weight"] = (2048, 512)
            shapes[f"{prefix}.linear1.bias"] = (2048,)
            shapes[f"{prefix}.linear2.weight"] = (512, 2048)
            shapes[f"{prefix}.linear2.bias"] = (512,)
            for norm in range(1, norms[half] + 1):
                shapes[f"{prefix}.norm{norm}.weight"] = (512,)
                shapes[f"{prefix}.norm{norm}.bias"] = (512,)
        shapes[f"tfm.{half}.norm.weight"] = (512,)
        shapes[f"tfm.{half}.norm.bias"] = (512,)
    return shapes


@pytest.mark.parametrize(("out_width", "num_queries"), [(768, 77), (1024, 77), (512, 1)])
def test_the_layout_is_that_of_the_released_checkpoint(out_width: int, num_queries: int) -> None:
    with torch.device("meta"):
        projection = OutputProjection(
            OutputProjectionConfig(llm_width=4096, out_width=out_width, num_queries=num_queries)
        )

    shapes = {name: tuple(value.shape) for name, value in projection.state_dict().items()}

    assert len(shapes) == 129
    assert shapes == released(out_width, num_queries)


def test_the_released_checkpoint_has_its_published_size() -> None:
    with torch.device("meta"):
        projections = sum(
            parameter.numel()
            for out_width, num_queries in ((768, 77), (1024, 77), (512, 1))
            for parameter in OutputProjection(
                OutputProjectionConfig(llm_width=4096, out_width=out_width, num_queries=num_queries)
            ).parameters()
        )

    tables, lora, input_projection = 2 * 32038 * 4096, 128 * 2 * 32 * 4096, 4096 * 1024 + 4096
    assert projections + tables + lora + input_projection == 396_045_568


def test_every_query_gives_its_own_embedding() -> None:
    out = tiny()(torch.randn(2, 4, 12), torch.randn(2, 4, 12))

    assert out.shape == (2, 3, 10)
    assert (out[0, 0] - out[0, 1]).abs().max() > 1e-2
    assert tiny().query_embs.std() > 0.5


def test_states_and_embeddings_are_added_before_anything_else() -> None:
    projection = tiny()
    hidden, embeddings = torch.randn(2, 4, 12), torch.randn(2, 4, 12)

    together = projection(hidden + embeddings, torch.zeros(2, 4, 12))

    torch.testing.assert_close(projection(hidden, embeddings), together)
    assert (projection(hidden, -embeddings) - together).abs().max() > 1e-4


def test_a_copy_gate_reads_the_states_and_is_kept_in_the_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gated = OutputProjection(replace(TINY, copy_gate=True))
    torch.nn.init.normal_(gated.copy_gate.weight)
    gated.save_pretrained(tmp_path / "gated")
    tiny().save_pretrained(tmp_path / "plain")
    hidden = torch.randn(3, 4, 12)

    logits = OutputProjection.from_pretrained(tmp_path / "gated").copy_logits(hidden)

    expected = (hidden.mean(1) * gated.copy_gate.weight[0]).sum(-1) + gated.copy_gate.bias
    torch.testing.assert_close(logits, expected)
    plain = OutputProjection.from_pretrained(tmp_path / "plain")
    assert "copy_gate" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert bool((plain.copy_logits(hidden) < 0).all())


def test_it_equals_the_published_formula() -> None:
    projection = tiny()
    x = torch.randn(2, 4, 12)

    memory = projection.fc(x)
    for layer in projection.tfm.encoder.layers:
        y = layer.norm1(memory)
        memory = memory + layer.self_attn(y, y, y)[0]
        memory = memory + layer.linear2(layer.linear1(layer.norm2(memory)).relu())
    memory = projection.tfm.encoder.norm(memory)
    queries = projection.query_embs.repeat(2, 1, 1)
    for layer in projection.tfm.decoder.layers:
        y = layer.norm1(queries)
        queries = queries + layer.self_attn(y, y, y)[0]
        queries = queries + layer.multihead_attn(layer.norm2(queries), memory, memory)[0]
        queries = queries + layer.linear2(layer.linear1(layer.norm3(queries)).relu())
    expected = projection.model(projection.tfm.decoder.norm(queries))

    torch.testing.assert_close(projection(x, torch.zeros_like(x)), expected)


def test_nothing_random_happens_in_training_mode() -> None:
    projection = tiny().train()
    x = torch.randn(2, 4, 12)

    torch.testing.assert_close(projection(x, x), projection(x, x))


def test_wrong_shapes_are_named() -> None:
    projection = tiny()

    with pytest.raises(ValueError, match=r"expected the same \(B, K, D\) twice"):
        projection(torch.zeros(1, 4, 12), torch.zeros(1, 5, 12))
    with pytest.raises(
        ValueError, match="hidden is 16 wide; this projection was made for an LLM of width 12"
    ):
        projection(torch.zeros(1, 4, 16), torch.zeros(1, 4, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_queries": 0}, "num_queries is 0"),
        ({"llm_width": 2.5}, "llm_width is 2.5"),
        ({"num_heads": 5}, r"hidden_width \(512\) is not a multiple of num_heads \(5\)"),
    ],
)
def test_impossible_sizes_are_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutputProjectionConfig(**{"llm_width": 8, "out_width": 8, "num_queries": 1} | changes)


def test_a_saved_projection_comes_back_the_same(tmp_path: Path) -> None:
    projection = tiny()
    x = torch.randn(1, 4, 12)
    projection.save_pretrained(tmp_path / "image")

    again = OutputProjection.from_pretrained(tmp_path / "image")

    assert again.config == TINY
    torch.testing.assert_close(again(x, x), projection(x, x))


def test_half_precision_files_come_back_in_single_precision(tmp_path: Path) -> None:
    tiny().half().save_pretrained(tmp_path)

    assert OutputProjection.from_pretrained(tmp_path).fc.weight.dtype == torch.float32


def test_incomplete_or_foreign_folders_are_named(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())

    save_file(tensors | {"fc.weight": torch.zeros(16, 13)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its config.json(.|\n)*fc.weight"):
        OutputProjection.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"colour": 1}))
    with pytest.raises(ValueError, match="colour"):
        OutputProjection.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read"):
        OutputProjection.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        OutputProjection.from_pretrained(tmp_path)
