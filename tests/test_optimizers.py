import copy

import pytest
import torch
from torch import nn

from alignment.optimizers import Optimizer
from llm.model import SignalRows


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(64, 48), nn.Linear(48, 40), nn.Unflatten(1, (40, 1, 1)), nn.Conv2d(40, 32, 1),
        nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def optimizer_of(model: nn.Module, *, muon: bool, factors: dict[str, float] | None = None) -> Optimizer:
    return Optimizer(
        model, learning_rate=0.1, factors=factors or {}, muon=muon, betas=(0.9, 0.95), weight_decay=0.0
    )


def take_step(model: nn.Module, optimizer: Optimizer, seed: int = 0) -> None:
    ids = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(seed))
    model(ids).square().mean().backward()
    optimizer.step()


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach() - before[name] for name, value in model.named_parameters()}


@pytest.mark.parametrize("shape", [(40, 48), (32, 8, 3, 3)])
def test_muon_moves_every_direction_of_a_matrix_alike(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 40, bias=False) if len(shape) == 2 else nn.Conv2d(8, 32, 3, bias=False)
    rows, columns = shape[0], layer.weight[0].numel()
    lengths = torch.linspace(1, 0.1, rows)
    left, right = (torch.linalg.qr(torch.randn(size, rows)).Q for size in (rows, columns))
    layer.weight.grad = ((left * lengths) @ right.T).reshape(shape)
    before = layer.weight.detach().clone()
    optimizer_of(layer, muon=True).step()

    change = torch.linalg.svdvals((layer.weight.detach() - before).flatten(1))
    assert change[-1] > 0.4 * change[0]  # of the gradient it is a tenth
    assert change.square().mean().sqrt() == pytest.approx(0.1 * 0.2 * columns**0.5, rel=0.3)


def test_tables_and_thin_matrices_are_left_to_adamw() -> None:
    ours, theirs = network(), network()
    take_step(ours, optimizer_of(ours, muon=True))
    take_step(theirs, optimizer_of(theirs, muon=False))

    same = [
        name
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
        if torch.equal(a, b)
    ]
    assert same == ["0.weight", "1.bias", "3.bias", "5.weight", "5.bias"]


def test_rows_of_many_signals_are_a_table_and_no_matrix() -> None:
    """Else a step turns all of them alike, and 16 tokens a signal hardly learn when to begin."""
    rows = [
        SignalRows(50, torch.randn(64, 48, generator=torch.Generator().manual_seed(1)), torch.ones(64, 48))
    ]
    rows.append(copy.deepcopy(rows[0]))
    for table, muon in zip(rows, (True, False), strict=True):
        (table.embedding[3].sum() + table.head[:7].square().sum()).backward()
        optimizer_of(table, muon=muon).step()

    for ours, theirs in zip(rows[0].parameters(), rows[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("muon", [False, True])
def test_a_factor_slows_down_what_its_name_begins_with(muon: bool) -> None:
    model = network()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = optimizer_of(model, muon=muon, factors={"3.": 0.0})
    optimizer.set_rate(0.1)
    take_step(model, optimizer)

    still = [name for name, change in moved(model, before).items() if not change.any()]
    assert still == ["3.weight", "3.bias"]


def test_a_restored_optimiser_goes_on_as_if_never_stopped() -> None:
    whole, broken = network(), network()
    first, stopped = optimizer_of(whole, muon=True), optimizer_of(broken, muon=True)
    for seed in range(2):
        take_step(whole, first, seed)
        take_step(broken, stopped, seed)
    resumed = network()
    resumed.load_state_dict(broken.state_dict())
    going_on = optimizer_of(resumed, muon=True)
    going_on.restore(stopped.state())
    take_step(whole, first, 2)
    take_step(resumed, going_on, 2)

    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_checkpoint_of_another_recipe_is_refused() -> None:
    model = network()
    state = optimizer_of(model, muon=False).state()
    with pytest.raises(ValueError, match=r"1 optimisers, and this run has 2.*remove the folder"):
        optimizer_of(model, muon=True).restore(state)
