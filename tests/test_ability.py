from pathlib import Path

import pytest

from alignment.ability import TOPICS, Wish, _measurer, measure, table
from alignment.system import Folders, LinkName
from encoders.media import Modality
from llm.lora import LoraOptions
from tests.tiny_llm import tiny_model


def test_base_and_tuned_model_are_told_apart_by_the_adapter_alone() -> None:
    model = tiny_model(max_position_embeddings=512).eval()
    model.add_lora(LoraOptions(rank=2, alpha=2))
    fresh = measure(model.eval(), Wish("talk and questions", 2, 0))
    assert fresh["base"] == fresh["tuned"]  # fresh LoRA changes nothing

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    changed = measure(model, Wish("talk and questions", 2, 0))
    assert changed["base"] == fresh["base"]
    assert changed["tuned"]["loss"] != fresh["tuned"]["loss"]


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    links: dict[Modality, LinkName] = {Modality.IMAGE: "caption"}
    folders = Folders(encoder=tmp_path, language_model=tmp_path, projections={}, decoders={}, links=links)
    with pytest.raises(ValueError, match="holds no adapter"):
        _measurer(folders)


def test_the_table_has_a_line_per_topic_and_their_mean() -> None:
    row = {"base": {"right": 1.0, "loss": 0.01}, "tuned": {"right": 0.5, "loss": 0.03}}
    result = {"samples": 4, "seed": 0, "seconds": 1.0, "topics": dict.fromkeys(TOPICS, row)}
    assert "| talk and questions | 100.0% | 50.0% | 0.0100 | 0.0300 |" in table(result)
    assert "| **mean** | 100.0% | 50.0% | 0.0100 | 0.0300 |" in table(result)
