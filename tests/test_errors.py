import errno
import pickle
from collections.abc import Callable

import pytest

from decoders.failures import DecoderOutOfMemory, QueueFull
from decoders.pixels import check_multiple
from decoders.settings import DecodeSettings, WrongSetting
from encoders.media import MediaError
from services.errors import (
    KINDS,
    BadRequest,
    NotFound,
    ServiceError,
    TooLarge,
    TooManyRequests,
    Unavailable,
    translate,
)


def test_every_error_becomes_the_four_keys_that_clients_know() -> None:
    body = BadRequest("No.", code="invalid_value", param="messages[0]").body()
    assert body == {
        "error": {
            "message": "No.",
            "type": "invalid_request_error",
            "param": "messages[0]",
            "code": "invalid_value",
        }
    }


@pytest.mark.parametrize("kind", KINDS.values())
def test_an_error_is_the_same_in_another_process(kind: type[ServiceError]) -> None:
    error = kind("Later.", code="later", param="model", retry_after_s=3)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.to_wire() == error.to_wire()


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (NotFound("Gone.", code="file_not_found"), NotFound, "file_not_found"),
        (MediaError("invalid_media", "Damaged."), BadRequest, "invalid_media"),
        (MediaError("unsupported_media", "Text."), BadRequest, "unsupported_media"),
        (MediaError("media_limit_exceeded", "Huge."), TooLarge, "media_limit_exceeded"),
        (ValueError("steps is 0."), BadRequest, "invalid_value"),
        (MemoryError(), Unavailable, "out_of_memory"),
        (DecoderOutOfMemory("Too large."), Unavailable, "decoder_oom"),
        (QueueFull(90, 60), TooManyRequests, "queue_full"),
        (OSError(errno.ENOSPC, "No space left on device"), Unavailable, "storage_full"),
    ],
)
def test_known_errors_keep_their_meaning(error: Exception, kind: type, code: str) -> None:
    known = translate(error)
    assert type(known) is kind
    assert known.code == code


@pytest.mark.parametrize(
    ("refuse", "message", "param"),
    [
        (
            lambda: DecodeSettings(num_frames=3).only("width_px", "height_px"),
            "num_frames is 3, but this decoder has no num_frames; it takes size. Leave num_frames out.",
            "num_frames",
        ),
        (
            lambda: DecodeSettings(width_px=64).only("duration_s"),
            "The width in size is 64, but this decoder has no size; it takes seconds. Leave size out.",
            "size",
        ),
        (
            lambda: check_multiple("height_px", 25, 8),
            "The height in size is 25; this decoder makes multiples of 8. Ask for 24.",
            "size",
        ),
    ],
)
def test_a_decoders_setting_is_called_what_the_request_calls_it(
    refuse: Callable[[], object], message: str, param: str
) -> None:
    with pytest.raises(WrongSetting) as refused:
        refuse()
    told = translate(refused.value)
    assert (told.status, told.code, told.message, told.param) == (400, "invalid_value", message, param)


def test_a_full_queue_says_when_to_come_back() -> None:
    known = translate(QueueFull(wait_s=72.4, allowed_s=60))
    assert (known.status, known.retry_after_s) == (429, 13)
    assert "would wait 72 s" in known.message


def test_an_unknown_error_is_a_500_that_gives_nothing_away() -> None:
    known = translate(RuntimeError("password is 1234"))
    assert known.status == 500
    assert "1234" not in known.message


def test_the_place_of_an_error_can_be_added_later() -> None:
    error = TooLarge("Huge.", code="media_limit_exceeded").at("messages[0].content[1]")
    assert isinstance(error, TooLarge)
    assert error.param == "messages[0].content[1]"
