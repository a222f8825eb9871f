import time
from contextlib import aclosing
from statistics import median
from types import SimpleNamespace

import pytest

from decoders.condition import Condition
from decoders.cost import SHAPES_KEPT, CostModel
from decoders.engine import DenoisingEngine, EngineConfig
from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.compiling import compile_if_possible
from services.local_decoder import decoder_class
from services.presets import load_preset

SHAPE = (4, 8, 8)


def calibrated() -> CostModel:
    """Return a model of 0.1 s per step, 0.05 s per row and 0.2 s per medium."""
    cost = CostModel()
    cost.calibrate(SHAPE, {"plain": [(4, 0.3), (1, 0.15)]}, 0.2)
    return cost


def test_nothing_is_known_before_the_first_step() -> None:
    cost = CostModel()
    assert not cost.known
    assert cost.step_s(SHAPE, 2) == 0

    cost.observe_step(SHAPE, {"plain": 2}, 0.4)

    assert cost.known
    assert cost.step_s(SHAPE, 2) == pytest.approx(0.4)


def test_a_step_costs_a_fixed_part_and_one_that_grows_with_rows_and_size() -> None:
    cost = calibrated()

    assert cost.step_s(SHAPE, 16) == pytest.approx(0.1 + 16 * 0.05)
    assert cost.step_s((4, 16, 16), 1) == pytest.approx(0.1 + 4 * 0.05)
    assert cost.step_s((4, 3, 8, 8), 1) == pytest.approx(0.1 + 3 * 0.05)
    assert cost.finish_s(SHAPE, 3) == pytest.approx(0.6)


def test_a_request_costs_its_steps_with_both_halves_and_its_medium() -> None:
    assert calibrated().request_s(SHAPE, 2, 10) == pytest.approx(10 * 0.2 + 0.2)


def deep() -> CostModel:
    """Return the same model, in which keeping costs 0.1 s more and reusing takes half of all."""
    cost = CostModel()
    plain, keeping, reusing = [(1, 0.15), (4, 0.3)], [(1, 0.25), (4, 0.4)], [(1, 0.075), (4, 0.15)]
    cost.calibrate(SHAPE, {"plain": plain, "keeping": keeping, "reusing": reusing}, 0.2)
    return cost


def test_steps_that_keep_and_reuse_deep_features_cost_what_was_measured_for_them() -> None:
    cost = deep()

    assert cost.steps_s(SHAPE, 4, 1, 3) == pytest.approx(0.4)
    assert cost.steps_s(SHAPE, 4, 2, 3, done=1) == pytest.approx(2 * 0.15)
    assert cost.step_s(SHAPE, 4, 3) == pytest.approx((0.4 + 2 * 0.15) / 3)
    assert cost.request_s(SHAPE, 4, 10, 3) == pytest.approx(4 * 0.4 + 6 * 0.15 + 0.2)
    assert cost.request_s(SHAPE, 4, 10) == pytest.approx(10 * 0.3 + 0.2)


def test_the_steps_of_a_request_add_up_wherever_it_is_cut() -> None:
    cost = deep()
    for every in (1, 2, 3, 5):
        for done in range(12):
            parts = cost.steps_s(SHAPE, 2, done, every) + cost.steps_s(SHAPE, 2, 11 - done, every, done=done)
            assert parts == pytest.approx(cost.steps_s(SHAPE, 2, 11, every))


def test_a_batch_of_several_kinds_costs_one_call_of_the_network_for_each() -> None:
    assert deep().batch_step_s(SHAPE, {"keeping": 4, "reusing": 1}) == pytest.approx(0.4 + 0.075)


def test_each_kind_of_step_is_learnt_by_itself_and_a_mixed_one_in_proportion() -> None:
    cost = deep()
    for _ in range(9):
        cost.observe_step(SHAPE, {"plain": 4}, 0.3)
        cost.observe_step(SHAPE, {"keeping": 4}, 0.4)
        cost.observe_step(SHAPE, {"reusing": 4}, 0.3)

    assert cost.step_s(SHAPE, 4) == pytest.approx(0.3)
    assert cost.steps_s(SHAPE, 4, 2, 2) == pytest.approx(0.4 + 0.3)
    assert cost.error() == pytest.approx(0.0)
    for _ in range(9):
        cost.observe_step(SHAPE, {"keeping": 4, "reusing": 4}, 1.4)
    assert cost.steps_s(SHAPE, 4, 1, 2) == pytest.approx(0.8)
    assert cost.steps_s(SHAPE, 4, 1, 2, done=1) == pytest.approx(0.6)


def test_a_kind_that_nobody_took_yet_follows_its_shape() -> None:
    cost = deep()
    for _ in range(9):
        cost.observe_step(SHAPE, {"plain": 4}, 0.6)
        cost.observe_step((4, 16, 16), {"plain": 1}, 0.3)

    assert cost.steps_s(SHAPE, 4, 1, 2, done=1) == pytest.approx(2 * 0.15)


def test_without_measurements_a_step_that_reuses_is_taken_to_cost_half() -> None:
    cost = CostModel()
    cost.observe_step(SHAPE, {"reusing": 2}, 0.2)

    assert cost.step_s(SHAPE, 2) == pytest.approx(0.4)
    assert cost.steps_s(SHAPE, 2, 1, 2, done=1) == pytest.approx(0.2)


def test_a_batch_measured_faster_than_one_row_still_costs_something_per_row() -> None:
    cost = CostModel()
    cost.calibrate(SHAPE, {"plain": [(1, 0.2), (4, 0.1)]}, 0.0)

    assert 0 < cost.step_s(SHAPE, 1) < cost.step_s(SHAPE, 8)


def test_predictions_follow_a_machine_that_got_slower() -> None:
    cost = calibrated()
    for _ in range(9):
        cost.observe_step(SHAPE, {"plain": 2}, 0.4)
        cost.observe_finish(SHAPE, 1, 0.3)

    assert cost.step_s(SHAPE, 2) == pytest.approx(0.4)
    assert cost.step_s((4, 16, 16), 1) == pytest.approx(2 * 0.3)  # a new shape too
    assert cost.finish_s(SHAPE) == pytest.approx(0.3)


def test_one_slow_step_is_not_believed() -> None:
    cost = calibrated()
    for seconds in (0.2, 0.2, 5.0, 0.2):
        cost.observe_step(SHAPE, {"plain": 2}, seconds)

    assert cost.step_s(SHAPE, 2) == pytest.approx(0.2)


def test_the_error_is_the_median_of_how_far_predictions_were_off() -> None:
    cost = calibrated()
    assert cost.error() is None
    for seconds in (0.2, 0.2, 0.25, 0.2):
        cost.observe_step(SHAPE, {"plain": 2}, seconds)

    assert cost.error() == pytest.approx(0.0)
    assert max(cost._errors) == pytest.approx(0.2)


def test_sizes_that_people_ask_for_do_not_pile_up() -> None:
    cost = calibrated()
    for side in range(1, 100):
        cost.observe_step((4, side, 8), {"plain": 1}, 0.1)

    assert len(cost._ratios) == SHAPES_KEPT


def test_what_was_learnt_can_be_forgotten() -> None:
    cost = calibrated()
    cost.observe_step(SHAPE, {"plain": 2}, 0.4)
    cost.forget()

    assert (cost.known, cost.error(), cost.request_s(SHAPE, 2, 10)) == (False, None, 0.0)
    cost.observe_step(SHAPE, {"plain": 2}, 0.3)
    assert cost.step_s(SHAPE, 2) == pytest.approx(0.3)


def embedded(modality: Modality) -> DenoisingEngine:
    """Return an engine as the service has it, freshly loaded and calibrated."""
    preset = load_preset("toybox")
    decoder = decoder_class(modality).load(preset.decoder_folder(modality))
    compile_if_possible(f"{modality.value} decoder", preset.decoders[modality].compile, decoder)
    engine = DenoisingEngine(decoder, EngineConfig(max_wait_s=1e6))
    engine.calibrate()
    return engine


async def error_of(engine: DenoisingEngine, condition: Condition, wish: DecodeSettings) -> float:
    """Return ``|predicted - actual| / actual`` of a request, in the processor's time."""
    plan = engine.decoder.plan(condition, wish)
    predicted_s = engine.cost.request_s(plan.shape, plan.rows, plan.steps, plan.deep_every)
    began = time.process_time()
    async with aclosing(engine.decode(condition, wish)) as stream:
        async for _ in stream:
            pass
    actual_s = time.process_time() - began
    return abs(predicted_s - actual_s) / actual_s


@pytest.mark.parametrize("modality", list(load_preset("toybox").decoders))
async def test_the_first_request_for_an_embedded_decoder_is_predicted_within_a_fifth(
    modality: Modality, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decoders.engine.time", SimpleNamespace(perf_counter=time.process_time))
    errors = []
    for seed in range(3):
        engine = embedded(modality)
        condition = engine.decoder.encode_caption("a big red bell")
        errors.append(await error_of(engine, condition, DecodeSettings(seed=seed)))
        engine.close()

    assert median(errors) < 0.2


@pytest.mark.parametrize("modality", list(load_preset("toybox").decoders))
async def test_predictions_for_an_embedded_decoder_are_within_a_fifth_of_what_requests_take(
    modality: Modality, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processor time, and the median of many, as other programs on the machine may be busy."""
    monkeypatch.setattr("decoders.engine.time", SimpleNamespace(perf_counter=time.process_time))
    engine = embedded(modality)
    condition = engine.decoder.encode_caption("a big red bell")
    errors: dict[int, list[float]] = {1: [], 3: [], 5: []}
    larger = {"duration_s": 3.0} if modality is Modality.AUDIO else {"width_px": 96}
    wishes = [
        DecodeSettings(seed=0, steps=steps, guidance_scale=guidance, deep_every=every, **size)
        for size in ({}, larger)
        for steps, every in ((3, 1), (8, 1), (8, 3), (8, 5))
        for guidance in (1.0, 3.0)
    ]
    for wish in wishes * 2:
        errors[wish.deep_every or 1].append(await error_of(engine, condition, wish))
    stats = engine.stats()
    engine.close()

    assert {every: median(off) for every, off in errors.items() if median(off) >= 0.2} == {}
    assert stats.prediction_error is not None
    assert stats.prediction_error < 0.2
