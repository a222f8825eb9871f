"""What a turn may ask for, and whether all that it needs is there: looked at before anything is done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.adapters import no_adapter
from services.artefacts import ArtefactStore
from services.boxes import Box, BoxState, DecodeBox, EncodeBox, GenerateBox, not_ready
from services.errors import BadRequest, ServiceError, Unavailable
from services.messages import MEDIA, MediaPart, Message, TurnOptions
from services.presets import AdapterPreset, CostLimits

PATIENCE_S = 3.0
"""How long a request waits for a box that is not ready: for one that is nearly there, not a whole start."""

LOOK_EVERY_S = 0.2


class Admission:
    """Lets requests in that the boxes can grant, and waits a little for boxes that are nearly there."""

    def __init__(
        self,
        *,
        encode: EncodeBox,
        generate: GenerateBox,
        decode: Mapping[Modality, DecodeBox],
        store: ArtefactStore,
        cost_limits: Mapping[Modality, CostLimits],
        adapters: Mapping[str, AdapterPreset],
    ) -> None:
        self.encode = encode
        self.generate = generate
        self.decode = decode
        self.store = store
        self.cost_limits = cost_limits
        self.adapters = adapters

    def check_wishes(self, options: TurnOptions) -> None:
        """Raise BadRequest for media that nobody makes here, and for more than decoders may be asked."""
        named = [(modality, "modalities") for modality in options.modalities or ()]
        named += [(modality, f"decoders.{modality.value}") for modality in options.decoders]
        for modality, param in named:
            if modality is not Modality.TEXT and modality not in self.decode:
                made = ", ".join(("text", *(known.value for known in self.decode)))
                raise BadRequest(
                    f"This model cannot make {modality.value}; it makes {made}. Leave {modality.value} out.",
                    code="unsupported_modality",
                    param=param,
                )
        for modality, settings in options.decoders.items():
            if modality in self.cost_limits:
                self.cost_limits[modality].check(settings, modality, place=f"decoders.{modality.value}.")

    async def allowed(self, conversation: Sequence[Message], options: TurnOptions) -> frozenset[Modality]:
        """Return the media that the reply may hold, once all that it needs is ready."""
        needed: dict[str, Box] = {"language model": self.generate}
        if any(isinstance(part, MediaPart) for message in conversation for part in message.parts):
            needed["encoder"] = self.encode
        wanted = set(self.decode) if options.modalities is None else set(options.modalities)
        up = await self.ready(needed, [modality for modality in self.decode if modality in wanted])
        self.check_up(options.modalities or (), up, param="modalities")
        return frozenset(wanted & set(up))

    async def ready(self, needed: Mapping[str, Box], wanted: Sequence[Modality]) -> tuple[Modality, ...]:
        """Return the media of ``wanted`` that can be made, once ``needed`` boxes are ready.

        Waits a little where they are not, and for decoders that are being loaded. Those that are gone are
        left out of what the agent may promise.

        Raises:
            Unavailable: it took too long.

        """
        until = time.monotonic() + PATIENCE_S
        while True:
            states = {name: await box.state() for name, box in needed.items()}
            made = {modality: await self.decode[modality].state() for modality in wanted}
            missing = {name: state for name, state in states.items() if state is not BoxState.READY}
            loading = [modality for modality, state in made.items() if state is BoxState.LOADING]
            if not missing and not loading:
                return tuple(m for m in MEDIA if made.get(m) is BoxState.READY)
            if time.monotonic() >= until:
                for name, state in missing.items():
                    raise not_ready(name, state)
                way_out = (
                    self._way_out(loading) if needed else ""
                )  # a medium that is made again has no choice
                raise not_ready(f"{loading[0].value} decoder", BoxState.LOADING, way_out)
            await asyncio.sleep(LOOK_EVERY_S)

    @staticmethod
    def check_up(wanted: Sequence[Modality], up: Sequence[Modality], param: str | None) -> None:
        """Raise Unavailable for a medium of ``wanted`` that cannot be made now."""
        for modality in wanted:
            if modality is not Modality.TEXT and modality not in up:
                way_out = "" if param is None else f", or leave {modality.value} out of {param}"
                raise Unavailable(
                    f"The {modality.value} decoder is not available at the moment. Try again soon{way_out}.",
                    code="decoder_unavailable",
                    param=param,
                    retry_after_s=5,
                )

    def _way_out(self, loading: Sequence[Modality]) -> str:
        others = ["text", *(modality.value for modality in self.decode if modality not in loading)]
        return f", or ask for what is ready: modalities {others}"

    async def check_source(
        self, settings: DecodeSettings, modality: Modality, source: str | None, place: str
    ) -> None:
        """Raise a ServiceError for a wish about an earlier medium where there is none."""
        if settings.strength is None and not settings.keep_untouched:
            return
        name = "keep_untouched" if settings.strength is None else "strength"
        wish = "true" if settings.strength is None else f"{settings.strength:g}"
        param = f"{place}{name}"
        if source is None:
            raise BadRequest(
                f"{name} is {wish}, and the conversation holds no {modality.value} to start "
                f"from. Show or make one first, or leave {name} out.",
                code="no_source",
                param=param,
            )
        try:
            await asyncio.to_thread(self.store.get, source)
        except ServiceError as error:
            raise error.at(param) from error

    def check_decode(self, settings: DecodeSettings, modality: Modality, place: str = "") -> None:
        """Raise BadRequest for more than a decoder may be asked, or for LoRA that it does not have."""
        if modality in self.cost_limits:
            self.cost_limits[modality].check(settings, modality, place=place)
        if settings.lora is not None:
            self.check_adapter(settings.lora, modality, f"{place}lora")

    def check_adapter(self, name: str, modality: Modality, place: str) -> None:
        """Raise BadRequest for LoRA that is not known, or is for another box."""
        if name not in self.adapters or self.adapters[name].box != modality.value:
            raise no_adapter(name, modality.value, self.adapters).at(place)
