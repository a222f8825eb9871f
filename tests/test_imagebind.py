import hashlib
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoders.imagebind import ImageBind, ImageBindConfig
from encoders.imagebind_config import AudioConfig, ImuConfig, PlaneConfig, TextConfig, VisionConfig

# sha256 over the sorted lines "name [shape]" of the released model's state dict, made by building the
# authors' own class (facebookresearch/ImageBind, models/imagebind_model.py) on the meta device.
HUGE_LAYOUT = "ab93c774127ec5618adefd3eb1102501485946040f5ca1c57ed3174f80fb08e6"
HUGE_PARAMETERS = {
    "vision": 632_829_440,
    "text": 354_032_641,
    "audio": 86_235_648,
    "depth": 21_871_872,
    "thermal": 86_211_072,
    "imu": 19_600_384,
}

TINY = ImageBindConfig(
    out_width=12,
    vision=VisionConfig(width=16, num_blocks=2, num_heads=2, image_size=16, patch_size=4),
    text=TextConfig(width=16, num_blocks=2, num_heads=4, vocabulary_size=97, context_length=13),
    audio=AudioConfig(
        width=12,
        num_blocks=2,
        num_heads=3,
        drop_path=0.1,
        num_mel_bins=10,
        num_frames=16,
        patch_size=4,
        stride=3,
    ),
    depth=PlaneConfig(width=8, num_blocks=2, num_heads=2, image_size=16, patch_size=4),
    thermal=PlaneConfig(width=12, num_blocks=1, num_heads=2, image_size=16, patch_size=8),
    imu=ImuConfig(width=8, num_blocks=2, num_heads=2, num_samples=80, drop_path=0.7),
)

# First six of twelve outputs of the authors' own class, with these sizes, weights and inputs.
EXPECTED = {
    "vision": [
        [0.005646, 0.159808, -0.338521, 0.165839, -0.007707, -0.004163],
        [-0.428633, -0.322228, -0.505233, -0.097529, 0.087997, 0.355635],
    ],
    "text": [
        [-0.687126, 8.709491, 0.742815, -6.221021, 2.575305, -5.276674],
        [-5.808988, -0.376725, -3.674015, 2.862809, -7.592048, -1.78188],
    ],
    "audio": [
        [6.94278, 4.041104, -4.743186, 9.28313, 4.853044, 0.710965],
        [10.17982, 4.758398, -1.196688, 5.638496, 2.320255, 2.58976],
    ],
    "depth": [
        [0.787015, 0.395325, -0.282555, -0.925379, 0.518841, -1.584296],
        [0.303919, 1.123579, -0.058021, -0.799903, 1.453357, -1.039062],
    ],
    "thermal": [
        [-0.403526, 2.366028, 0.847404, 5.774722, 3.729885, -3.196264],
        [3.567917, 1.51093, -2.339044, 3.237045, 4.210445, -3.150116],
    ],
    "imu": [
        [1.043207, 1.374341, -1.572099, 1.01948, -0.906215, 2.359456],
        [0.42431, 0.116211, -2.280213, -1.821826, 0.972704, 2.343797],
    ],
    "clips": [
        [-0.069913, 0.139041, -0.610943, 0.020773, 0.124549, 0.174844],
        [-0.270862, 0.048532, -0.379552, 0.077689, 0.098701, 0.018464],
    ],
}
SCALES = {"vision": 1.0, "text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}


def waves(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values in [-1, 1] that look random and depend on nothing but the name."""
    phase = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10_007
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(i * i * 0.37 + i * 1.7 + phase).reshape(shape).float()


def weight(name: str, value: Tensor) -> Tensor:
    if name.endswith("mask") or "log_logit_scale" in name:
        return value
    made = waves(name, tuple(value.shape))
    if "norm" in name or (".0.weight" in name and value.ndim == 1):
        return 0.2 * made + (1.0 if name.endswith("weight") else 0.0)
    if value.ndim == 1:
        return 0.2 * made
    return made * (0.6 if any(part in name for part in ("pos", "cls", "bias_")) else 0.5)


def tiny() -> ImageBind:
    model = ImageBind(TINY).eval()
    model.load_state_dict({name: weight(name, value) for name, value in model.state_dict().items()})
    return model


def ids() -> Tensor:
    rows = [[95, 3, 17, 40, 96], [95, 60, 61, 2, 9, 33, 21, 5, 77, 96]]
    return torch.tensor([row + [0] * (13 - len(row)) for row in rows])


def inputs() -> dict[str, Tensor]:
    return {
        "vision": waves("a", (2, 3, 16, 16)),
        "text": ids(),
        "audio": waves("b", (2, 3, 1, 10, 16)),
        "depth": waves("c", (2, 1, 16, 16)),
        "thermal": waves("d", (2, 1, 16, 16)),
        "imu": waves("e", (2, 6, 80)),
    }


def huge() -> ImageBind:
    with torch.device("meta"):
        return ImageBind(ImageBindConfig.huge())


def test_huge_has_the_names_and_shapes_of_the_release() -> None:
    state = huge().state_dict()
    lines = sorted(f"{name} {list(value.shape)}" for name, value in state.items())
    assert len(lines) == 1_311
    for line in (
        "modality_preprocessors.vision.rgbt_stem.proj.1.weight [1280, 3, 2, 14, 14]",
        "modality_preprocessors.vision.pos_embedding_helper.pos_embed [1, 257, 1280]",
        "modality_preprocessors.text.mask [77, 77]",
        "modality_preprocessors.audio.pos_embedding_helper.pos_embed [1, 229, 768]",
        "modality_preprocessors.depth.depth_stem.norm_layer.weight [384]",
        "modality_preprocessors.imu.imu_stem.proj.weight [512, 48]",
        "modality_trunks.vision.pre_transformer_layer.0.bias [1280]",
        "modality_trunks.text.blocks.23.mlp.fc1.weight [4096, 1024]",
        "modality_trunks.audio.blocks.0.attn.bias_k [1, 1, 768]",
        "modality_trunks.thermal.blocks.11.attn.in_proj_weight [2304, 768]",
        "modality_heads.text.proj.1.weight [1024, 1024]",
        "modality_heads.imu.3.weight [1024, 512]",
        "modality_postprocessors.depth.1.log_logit_scale []",
    ):
        assert line in lines
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == HUGE_LAYOUT


def test_huge_has_the_parameters_of_the_release() -> None:
    counts = dict.fromkeys(HUGE_PARAMETERS, 0)
    for name, parameter in huge().named_parameters():
        counts[name.split(".")[1]] += parameter.numel()
    assert counts == HUGE_PARAMETERS
    assert sum(counts.values()) == 1_200_781_057


@pytest.mark.parametrize("tower", [name for name in EXPECTED if name != "clips"])
def test_tower_agrees_with_the_original(tower: str) -> None:
    with torch.inference_mode():
        made = tiny()({tower: inputs()[tower]})[tower]
    assert made.shape == (2, 12)
    torch.testing.assert_close(made[:, :6], torch.tensor(EXPECTED[tower]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", [name for name in EXPECTED if name != "clips"])
def test_plain_attention_gives_the_same_values_and_gradients(tower: str) -> None:
    def embedded(plain: bool) -> tuple[Tensor, list[Tensor | None]]:
        model = tiny()
        if plain:
            model.prefer_plain_attention()
        out = model({tower: inputs()[tower]})[tower]
        out.square().sum().backward()
        return out, [parameter.grad for parameter in model.parameters()]

    (fused, wanted), (plain, found) = embedded(False), embedded(True)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_clips_of_frames_agree_with_the_original() -> None:
    with torch.inference_mode():
        made = tiny()({"vision": waves("v", (2, 3, 3, 2, 16, 16))})["vision"]
    torch.testing.assert_close(made[:, :6], torch.tensor(EXPECTED["clips"]), rtol=1e-5, atol=1e-5)


def test_towers_run_together_as_they_run_alone() -> None:
    model = tiny()
    with torch.inference_mode():
        together = model(inputs())
        for tower, value in inputs().items():
            torch.testing.assert_close(together[tower], model({tower: value})[tower])


def test_image_is_a_clip_that_stands_still() -> None:
    image = inputs()["vision"]
    clip = image[:, None, :, None].expand(-1, -1, -1, 2, -1, -1)
    model = tiny()
    with torch.inference_mode():
        torch.testing.assert_close(
            model({"vision": image})["vision"], model({"vision": clip})["vision"], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("tower", list(SCALES))
def test_first_token_of_embed_tokens_is_the_embedding(tower: str) -> None:
    model, value = tiny(), inputs()[tower]
    with torch.inference_mode():
        whole = model({tower: value})[tower]
        tokens = model.embed_tokens({tower: value})[tower]
    if tower == "text":
        assert tokens.shape == (2, 10, 12)  # the longest text has ten tokens
        first = torch.stack([tokens[0, 4], tokens[1, 9]])
    elif tower == "audio":
        assert tokens.shape == (2, 3, 1 + 3 * 5, 12)
        first = tokens[:, :, 0]
    else:
        first = tokens[:, 0]
    unit = torch.nn.functional.normalize(first, dim=-1) * SCALES[tower]
    torch.testing.assert_close(unit.mean(dim=1) if unit.ndim == 3 else unit, whole)
    assert model.logit_scale(tower) == pytest.approx(SCALES[tower], rel=1e-6)


def test_logit_scale_never_exceeds_a_hundred() -> None:
    model = tiny()
    model.load_state_dict(
        model.state_dict() | {"modality_postprocessors.text.1.log_logit_scale": torch.tensor(9.0)}
    )
    assert model.logit_scale("text") == pytest.approx(100.0)


def test_only_the_scale_of_text_is_learned() -> None:
    learned = [name for name, _ in tiny().named_parameters() if "log_logit_scale" in name]
    assert learned == ["modality_postprocessors.text.1.log_logit_scale"]


def test_what_follows_the_end_token_changes_nothing() -> None:
    model, other = tiny(), ids()
    other[0, 5:] = 50
    with torch.inference_mode():
        torch.testing.assert_close(model({"text": other})["text"], model({"text": ids()})["text"])


def test_any_subset_of_towers_can_be_built() -> None:
    config = ImageBindConfig(out_width=12, audio=TINY.audio, imu=TINY.imu)
    model = ImageBind(config)
    assert {name.split(".")[1] for name in model.state_dict()} == {"audio", "imu"}
    with pytest.raises(ValueError, match="no tower 'vision' in this model; it has audio, imu"):
        model({"vision": inputs()["vision"]})


def test_state_survives_a_safetensors_file(tmp_path: object) -> None:
    model = tiny()
    save_file(model.state_dict(), f"{tmp_path}/weights.safetensors")
    with torch.device("meta"):
        empty = ImageBind(TINY)
    empty.load_state_dict(load_file(f"{tmp_path}/weights.safetensors"), assign=True)
    with torch.inference_mode():
        torch.testing.assert_close(empty.eval()({"text": ids()})["text"], model({"text": ids()})["text"])


def test_config_survives_json() -> None:
    for config in (TINY, ImageBindConfig.huge(), ImageBindConfig.toybox(300)):
        assert ImageBindConfig.from_json(config.to_json()) == config


def test_wrong_configs_name_what_is_wrong() -> None:
    values = ImageBindConfig.toybox(300).to_json()
    with pytest.raises(ValueError, match="unexpected keyword argument 'widht'"):
        ImageBindConfig.from_json(values | {"text": {"widht": 8}})
    with pytest.raises(ValueError, match="unexpected keyword argument 'smell'"):
        ImageBindConfig.from_json(values | {"smell": {}})
    with pytest.raises(ValueError, match=r"width \(128\) is not a multiple of num_heads \(3\)"):
        ImageBindConfig.from_json(values | {"text": values["text"] | {"num_heads": 3}})
    with pytest.raises(ValueError, match="patch_size is 0"):
        ImageBindConfig.from_json(values | {"vision": values["vision"] | {"patch_size": 0}})
    with pytest.raises(ValueError, match=r"drop_path is 1\.5"):
        ImageBindConfig.from_json(values | {"audio": values["audio"] | {"drop_path": 1.5}})


@pytest.mark.parametrize("tower", list(SCALES))
def test_wrong_shapes_name_both_shapes(tower: str) -> None:
    with pytest.raises(ValueError, match=r"has shape \(2, 7\); expected \(N, "):
        tiny()({tower: torch.zeros(2, 7, dtype=torch.int64)})


def test_toybox_sizes() -> None:
    model = ImageBind(ImageBindConfig.toybox(300))
    tokens = model.embed_tokens(
        {"vision": torch.zeros(1, 4, 3, 2, 64, 64), "audio": torch.zeros(1, 1, 1, 128, 256)}
    )
    assert tokens["vision"].shape == (1, 4, 65, 128)
    assert tokens["audio"].shape == (1, 1, 129, 128)


def test_drop_path_leaves_out_whole_samples_in_training_only() -> None:
    config = ImageBindConfig(out_width=8, imu=ImuConfig(width=8, num_blocks=2, num_heads=2, drop_path=0.5))
    model = ImageBind(config)
    assert [block.drop_path for block in model.modality_trunks["imu"].blocks] == [0.0, 0.5]
    value = torch.randn(4, 6, 2000)
    model.eval()
    torch.testing.assert_close(model({"imu": value})["imu"], model({"imu": value})["imu"])
    block = model.modality_trunks["imu"].blocks[1].train()
    branch = torch.ones(64, 3, 8)
    dropped = block._dropped(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped.flatten(1).std(dim=1) == 0).all()
