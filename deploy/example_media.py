"""Make the small files that the chat page offers as examples: ``python -m deploy.example_media``.

They are drawn and synthesised by the world of Toybox, not by the model.
"""

from __future__ import annotations

import random
from pathlib import Path

from alignment.toybox.draw import draw_clip, draw_look
from alignment.toybox.sound import synthesise
from alignment.toybox.world import AUDIO_RATE_HZ, VIDEO_FPS, Clip, Look, Sound
from decoders.writing import to_mp4, to_png, to_wav
from encoders.media import Audio, Image, Video

FOLDER = Path(__file__).resolve().parent / "presets" / "toybox"


def main() -> None:
    """Write a picture, a video and a sound."""
    FOLDER.mkdir(exist_ok=True)
    look = Look(thing="bell", colour="red", size="big", count=1, place="middle", ground="sky")
    clip = Clip(thing="frog", colour="green", size="medium", ground="white", motion="right", tempo="fast")
    sound = Sound(thing="drum", pitch="low", count=3, tempo="slow", loudness="loud")
    made_by = {"made_by": "the Toybox renderer"}
    picture = Image(draw_look(look, random.Random(0)))
    (FOLDER / "picture.png").write_bytes(to_png(picture, made_by))
    video = Video(draw_clip(clip, random.Random(0)), float(VIDEO_FPS))
    (FOLDER / "video.mp4").write_bytes(to_mp4(video, made_by))
    noise = Audio(synthesise(sound, random.Random(0)), AUDIO_RATE_HZ)
    (FOLDER / "sound.wav").write_bytes(to_wav(noise, made_by))


if __name__ == "__main__":
    main()
