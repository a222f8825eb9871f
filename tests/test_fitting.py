import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alignment.embedded import captions, denoisers
from alignment.embedded.captions import CAPTION_TOKENS, WIDTH
from alignment.fitting import FitConfig, as_time, fit, plot_losses, prefer_plain_attention, time_left_s

ROOT = Path(__file__).resolve().parent.parent

CONFIG = FitConfig(num_steps=12, learning_rate=0.05, warmup_steps=2, average_decay=0.9, log_every_steps=1)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def losses_of(model: nn.Linear, stop_at: int | None = None):  # type: ignore[no-untyped-def]
    def losses(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, generator=generator)
        return {"squared": (model(x) - x[:, :2]).square().mean()}

    return losses


def test_a_run_that_was_killed_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole, broken = linear(), linear()
    fit("whole", whole, losses_of(whole), CONFIG, tmp_path / "whole")

    often = FitConfig(**{**_values(CONFIG), "checkpoint_every_s": 0.0})
    with pytest.raises(KeyboardInterrupt):
        fit("broken", broken, losses_of(broken, stop_at=7), often, tmp_path / "broken")
    resumed = linear()
    fit("resumed", resumed, losses_of(resumed), often, tmp_path / "broken")

    torch.testing.assert_close(resumed.weight, whole.weight)


def train_slowly(folder: Path, pause_s: float) -> nn.Linear:
    """Train a small model for 40 steps; also run in another process, by name."""
    model = linear()
    losses = losses_of(model)

    def slow(step: int) -> dict[str, Tensor]:
        time.sleep(pause_s)
        return losses(step)

    config = replace(CONFIG, num_steps=40, checkpoint_every_s=0.1)
    fit("slow", model, slow, config, folder)
    return model


def logged(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_process_that_is_killed_goes_on_with_the_very_losses_of_an_unbroken_one(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    code = "import sys, pathlib, tests.test_fitting as t; t.train_slowly(pathlib.Path(sys.argv[1]), 0.05)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(broken)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    log = broken / "losses.jsonl"
    deadline = time.monotonic() + 300
    while not (broken / "checkpoint.pt").exists() or len(log.read_text().splitlines()) < 12:
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with log.open("a") as torn:
        torn.write('{"step": 39, "sec')  # killed in the middle of a line
    saved = torch.load(broken / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < saved < 40

    resumed = train_slowly(broken, 0.0)
    whole = train_slowly(tmp_path / "whole", 0.0)
    assert logged(broken) == logged(tmp_path / "whole")
    assert [row["step"] for row in logged(broken)] == list(range(40))
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)


def test_the_time_left_follows_the_pace_since_the_run_was_resumed() -> None:
    config = replace(CONFIG, num_steps=100)
    assert time_left_s(config, 60, 120.0, 50, 100.0) == pytest.approx(80.0)
    assert time_left_s(replace(config, max_minutes=2.5), 60, 120.0, 50, 100.0) == pytest.approx(30.0)
    assert [as_time(s) for s in (40.4, 725, 11_100)] == ["40 s", "12 min", "3 h 05 min"]


def test_progress_is_printed_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = linear()
    fit("quiet", model, losses_of(model), replace(CONFIG, checkpoint_every_s=0.0), tmp_path)
    assert "quiet: step 6 of 12, 0 s left" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model = linear()
    fit("first", model, losses_of(model), CONFIG, tmp_path)
    again = linear()
    fit(
        "again",
        again,
        losses_of(again, stop_at=0),
        FitConfig(**{**_values(CONFIG), "num_steps": 1}),
        tmp_path,
    )

    torch.testing.assert_close(again.weight, model.weight)


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    model = linear()
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    fit("frozen", model, losses_of(model), CONFIG, tmp_path)

    assert torch.equal(model.bias, before)


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = FitConfig(num_steps=100, learning_rate=1.0, warmup_steps=10, flat_fraction=0.5)
    rates = [config.rate_at(step, 0.0) for step in (0, 9, 40, 75, 99)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.02])


def test_the_clock_ends_a_run_as_the_steps_would() -> None:
    config = FitConfig(num_steps=100, learning_rate=1.0, warmup_steps=1, flat_fraction=0.0, max_minutes=1.0)
    assert config.rate_at(1, 30.0) == pytest.approx(0.5)
    assert config.rate_at(1, 60.0) == 0.0


def test_a_gradient_that_is_not_finite_stops_the_run_and_says_what_to_do(tmp_path: Path) -> None:
    model = linear()
    with pytest.raises(FloatingPointError, match="Lower learning_rate"):
        fit("bad", model, lambda step: {"bad": model.weight.sum() * float("inf")}, CONFIG, tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model = linear()
    fit("first", model, losses_of(model), CONFIG, tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        fit("other", nn.Linear(4, 2), losses_of(model), CONFIG, tmp_path)


def test_losses_are_plotted(tmp_path: Path) -> None:
    model = linear()
    fit("plotted", model, losses_of(model), CONFIG, tmp_path)
    assert plot_losses(tmp_path).read_bytes().startswith(b"\x89PNG")


def _values(config: FitConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in FitConfig.__slots__}


def test_chance_depends_on_the_seed_and_on_the_step_alone() -> None:
    first, other = CONFIG, replace(CONFIG, seed=1)

    for step in (0, 5):
        assert first.randomness(step).random() == first.randomness(step).random()
        assert first.randomness(step).random() != other.randomness(step).random()
        assert torch.equal(
            torch.rand(2, generator=first.noise(step)), torch.rand(2, generator=first.noise(step))
        )
        assert not torch.equal(
            torch.rand(2, generator=first.noise(step)), torch.rand(2, generator=other.noise(step))
        )
    assert first.randomness(0).random() != first.randomness(5).random()


@pytest.mark.parametrize("kind", ["look", "clip", "sound"])
def test_plain_attention_changes_how_it_is_computed_and_nothing_else(
    kind: captions.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)
    denoiser = denoisers.build(kind).eval()
    tokenizer = captions.kept_tokenizer(kind, tmp_path / "tokenizer")
    text = captions.build(kind, tokenizer).eval()
    noisy = torch.randn({"look": (2, 16, 8, 8), "clip": (2, 16, 8, 8, 8), "sound": (2, 16, 16, 4)}[kind])
    states, vectors = torch.randn(2, CAPTION_TOKENS, WIDTH), torch.randn(2, WIDTH)
    fused: list[str] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Tensor, **named: object) -> Tensor:
        fused.append(kind)
        return attend(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)

    def made() -> list[Tensor]:
        fused.clear()
        with torch.no_grad():
            given = {"class_labels": vectors} if kind == "sound" else {}
            drawn = denoiser(noisy, 500, None if kind == "sound" else states, **given).sample
            ids = torch.arange(3, 3 + CAPTION_TOKENS)[None]
            return [drawn, text(ids)[0]]

    before = made()
    assert fused
    prefer_plain_attention(denoiser)
    prefer_plain_attention(text)
    torch.testing.assert_close(made(), before, rtol=1e-4, atol=1e-5)
    assert not fused
