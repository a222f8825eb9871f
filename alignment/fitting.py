"""One training loop for every part: schedule, average, checkpoints, log and progress.

It knows parameters, losses and files. What is trained, on what, is the caller's business.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.optimizers import Optimizer

LossFunction = Callable[[int], Mapping[str, Tensor]]


def training_device() -> torch.device:
    """Return where :func:`fit` trains: the first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_precision() -> torch.autocast:
    """Return the context in which forward passes of a training step run: bfloat16 where that is safe."""
    return torch.autocast(training_device().type, torch.bfloat16)


def prefer_plain_attention(model: PreTrainedModel | UNet2DConditionModel | UNet3DConditionModel) -> None:
    """Let ``model`` attend in single operations where that trains faster: on a CPU.

    The backward pass of PyTorch's fused attention takes a third of a step there, or more, for short rows.
    """
    if training_device().type != "cpu":
        return
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation("eager")
    else:
        model.set_attn_processor(AttnProcessor())


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How long and how fast to train. Immutable; checked when it is made.

    ``max_minutes`` ends a run early on a slow machine: the learning rate then follows the clock
    instead of the step count, so that the run still ends at rate zero. ``muon`` lets Muon train the
    matrices, see :mod:`alignment.optimizers`. ``seed`` decides the order of the data and the noise;
    :func:`fit` itself draws nothing.
    """

    num_steps: int
    learning_rate: float
    warmup_steps: int = 100
    flat_fraction: float = 0.3
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    average_decay: float | None = None
    max_minutes: float | None = None
    checkpoint_every_s: float = 60.0
    log_every_steps: int = 20
    betas: tuple[float, float] = (0.9, 0.95)
    muon: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        if not 0 <= self.flat_fraction < 1:
            raise ValueError(f"flat_fraction is {self.flat_fraction}; it must be in [0, 1).")

    def randomness(self, step: int) -> random.Random:
        """Return the source of chance of a step: other seeds and other steps draw other things."""
        return random.Random(f"{self.seed}-{step}")

    def noise(self, step: int) -> torch.Generator:
        """Return the source of the noise of a step, on the CPU."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + step)

    def rate_at(self, step: int, elapsed_s: float) -> float:
        """Learning rate of a step: linear warm-up, flat, then linear to zero."""
        done = step / self.num_steps
        if self.max_minutes is not None:
            done = max(done, elapsed_s / (60 * self.max_minutes))
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = min(1.0, max(0.0, (1 - done) / (1 - self.flat_fraction)))
        return self.learning_rate * warm * fall


class WeightAverage:
    """Exponential moving average of parameters, with the usual correction for the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the parameters as they are now."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in module.named_parameters():
            if name in self.values:
                self.values[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the parameters with their average."""
        for name, parameter in module.named_parameters():
            if name in self.values:
                parameter.copy_(self.values[name])


def fit(
    name: str,
    module: nn.Module,
    loss_function: LossFunction,
    config: FitConfig,
    folder: Path,
    *,
    rates: Mapping[str, float] | None = None,
) -> None:
    """Train the parameters of ``module`` that require gradients, resuming where a former run stopped.

    Args:
        name: shown in the progress bar.
        module: what is trained; with ``average_decay`` it holds the averaged weights at the end. It is
            on :func:`training_device` while it is trained, and on the CPU afterwards.
        loss_function: step -> losses by name; their sum is minimised. It must draw its data from
            the step number, so that a resumed run sees what an unbroken one would, and move it to
            :func:`training_device`.
        config: length and rates.
        folder: receives ``checkpoint.pt`` (weights, average, optimiser, step) and ``losses.jsonl``. Where
            a run was killed, the losses after its last checkpoint are measured and written again.
        rates: factors on the learning rate by parameter-name prefix; 1 where none matches.

    Raises:
        FloatingPointError: when a gradient is not finite; that step is not applied.

    """
    folder.mkdir(parents=True, exist_ok=True)
    module.to(training_device())
    optimizer = Optimizer(
        module,
        learning_rate=config.learning_rate,
        factors=rates or {},
        muon=config.muon,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    average = WeightAverage(module, config.average_decay) if config.average_decay is not None else None
    first_step, elapsed_before = _resume(folder, module, optimizer, average)
    _forget_losses(folder / "losses.jsonl", first_step)
    started = saved = time.monotonic()
    log = (folder / "losses.jsonl").open("a")
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    with Progress(*columns, refresh_per_second=0.5) as progress, log:
        task = progress.add_task(name, total=config.num_steps, completed=first_step, losses="")
        for step in range(first_step, config.num_steps):
            elapsed = elapsed_before + time.monotonic() - started
            if config.max_minutes is not None and elapsed > 60 * config.max_minutes:
                break
            rate = config.rate_at(step, elapsed)
            optimizer.set_rate(rate)
            losses = loss_function(step)
            total = torch.stack(list(losses.values())).sum()
            total.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
            if not math.isfinite(norm.item()):
                raise FloatingPointError(
                    f"Gradient norm is {norm.item()} at step {step} (loss {total.item():.4g}). This step was "
                    f"not applied. Lower learning_rate ({config.learning_rate:g}) and run again; it resumes."
                )
            optimizer.step()
            if average is not None:
                average.update(module, step)
            if step % config.log_every_steps == 0:
                values = {key: round(value.item(), 5) for key, value in losses.items()}
                log.write(
                    json.dumps({"step": step, "seconds": round(elapsed, 3), "rate": rate, **values}) + "\n"
                )
                log.flush()
                progress.update(task, losses=" ".join(f"{k} {v:.4g}" for k, v in values.items()))
            progress.update(task, completed=step + 1)
            if time.monotonic() - saved > config.checkpoint_every_s:
                _save(folder, module, optimizer, average, step + 1, elapsed)
                saved = time.monotonic()
                if not progress.console.is_terminal:  # a log file shows no bar
                    left = time_left_s(config, step + 1, elapsed, first_step, elapsed_before)
                    print(f"{name}: step {step + 1} of {config.num_steps}, {as_time(left)} left", flush=True)
    if first_step < config.num_steps:
        elapsed = elapsed_before + time.monotonic() - started
        _save(folder, module, optimizer, average, config.num_steps, elapsed)
    if average is not None:
        average.copy_to(module)
    module.to("cpu")


def time_left_s(
    config: FitConfig, step: int, elapsed_s: float, first_step: int, elapsed_before_s: float
) -> float:
    """Return how long a run will still take, at the pace since it was started or resumed."""
    pace = (elapsed_s - elapsed_before_s) / max(1, step - first_step)
    left = pace * (config.num_steps - step)
    return left if config.max_minutes is None else min(left, max(0.0, 60 * config.max_minutes - elapsed_s))


def as_time(seconds: float) -> str:
    """Return seconds as a person says them: 40 s, 12 min or 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def plot_losses(folder: Path) -> Path:
    """Draw every loss of ``losses.jsonl`` over the steps; return the PNG's path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(9, 5))
    for key in sorted({key for row in rows for key in row} - {"step", "seconds", "rate"}):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), label=key, linewidth=0.8)
    axis.set(xlabel="step", yscale="log", title=folder.name)
    if axis.lines:  # a run of a few steps may have logged none
        axis.legend(ncols=3, fontsize=6, loc="upper right")
    figure.tight_layout()
    path = folder / "losses.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _forget_losses(path: Path, first_step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint, and a line that it did not end."""
    if not path.exists():
        return
    whole = [line for line in path.read_text().split("\n")[:-1] if json.loads(line)["step"] < first_step]
    path.write_text("".join(f"{line}\n" for line in whole))


def begin_from(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint from which :func:`fit` goes on as if it had reached ``weights`` after one step.

    The optimiser starts afresh; parameters of the module that are not among ``weights`` stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value.detach().float().clone() for name, value in weights.items()}
    _write(folder, {"weights": kept, "average": kept, "optimizer": None, "step": 1, "elapsed_s": 0.0})


def _save(
    folder: Path,
    module: nn.Module,
    optimizer: Optimizer,
    average: WeightAverage | None,
    step: int,
    elapsed_s: float,
) -> None:
    state = {
        "weights": _trained(module),
        "average": average.values if average is not None else {},
        "optimizer": optimizer.state(),
        "step": step,
        "elapsed_s": elapsed_s,
    }
    _write(folder, state)


def _write(folder: Path, state: Mapping[str, object]) -> None:
    partial = folder / "checkpoint.pt.partial"
    torch.save(state, partial)
    partial.replace(folder / "checkpoint.pt")


def _resume(
    folder: Path, module: nn.Module, optimizer: Optimizer, average: WeightAverage | None
) -> tuple[int, float]:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True, map_location=training_device())
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in state["weights"].items():
            if name not in own or own[name].shape != value.shape:
                raise ValueError(
                    f"{path} holds {name} of shape {tuple(value.shape)}, which this model does not have. "
                    f"It is of another configuration: remove the folder or choose another run name."
                )
            own[name].copy_(value)
    if state["optimizer"] is not None:
        optimizer.restore(state["optimizer"])
    if average is not None:
        average.values = state["average"]
    return int(state["step"]), float(state["elapsed_s"])
