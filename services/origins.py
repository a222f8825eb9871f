"""Where the weights of a box come from, under what terms, and what has to be done with them.

An origin is either downloaded, by `patchbay fetch`, or got by a command that a person types.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

DtypeName = Literal["float32", "float16", "bfloat16"]
Conversion = Literal["imagebind", "delta", "nextgpt", "pickles"]
WITH_BASE = ("delta", "nextgpt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Strict(BaseModel):
    """Values from outside: none is ignored, none changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _within(folder: str) -> str:
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts or path == PurePosixPath():
        raise ValueError(f"{folder!r} must be a folder within the weights, such as downloads/model")
    return folder


Folder = Annotated[str, AfterValidator(_within)]


class Download(Strict):
    """What of an origin is downloaded, and what is made of it. Folders are relative to the weights.

    Of a hub repository, those ``files`` (patterns) are put ``into`` a folder that are not ``without``; of an
    address the one file there, of which ``size_bytes`` and ``sha256`` may be known. ``about_gb`` is how large
    a repository's files are by its page, where they hold more or other than the parts that come of them.
    ``convert`` names the `patchbay convert` that makes the folders ``makes`` of them, with the ``base`` that
    another origin brings; what was converted in another folder is needed no more.
    """

    into: Folder
    files: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    size_bytes: int | None = Field(default=None, ge=1)
    about_gb: float | None = Field(default=None, gt=0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    convert: Conversion | None = None
    base: Folder | None = None
    makes: tuple[Folder, ...] = ()

    @model_validator(mode="after")
    def _conversion_is_whole(self) -> Self:
        elsewhere = self.convert not in (None, "pickles")
        if elsewhere != bool(self.makes):
            raise ValueError("makes names the folders that a conversion makes; give it with one alone")
        if (self.convert in WITH_BASE) != (self.base is not None):
            raise ValueError(f"base belongs to the conversions {' and '.join(WITH_BASE)}, and to no other")
        return self

    @property
    def fills(self) -> tuple[str, ...]:
        """The folders that hold something of use when all is done."""
        return self.makes or (self.into,)


class Origin(Strict):
    """Where the weights of a box come from, and under what terms.

    ``source`` is a hub id or an address. ``revision`` is a commit, as a branch may hold something else
    tomorrow. ``commercial`` says whether the licence allows such use, ``gated`` whether the hub asks for a
    sign-in and its terms to be accepted. ``published`` is the dtype of the files that are downloaded, by part
    of the box, as far as it is known. ``get`` is a command for what is not downloaded, in which ``{weights}``
    stands for the preset's folder, ``{preset}`` for how commands name the preset, and ``{source}`` and
    ``{revision}`` for these.
    """

    model: str
    source: str
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    licence: str
    commercial: bool
    gated: bool = False
    published: dict[str, DtypeName] = {}
    download: Download | None = None
    get: str | None = None

    @model_validator(mode="after")
    def _can_be_got(self) -> Self:
        if (self.download is None) == (self.get is None):
            raise ValueError("give either download or get, a command to type")
        if self.download is not None:
            if self.is_address == bool(self.download.files):
                raise ValueError("files are patterns of a hub repository; an address is one file")
            if not self.is_address and not _HUB_ID.fullmatch(self.source):
                raise ValueError("source must be a hub id (owner/name) or an address (https://...)")
            if not self.is_address and (self.download.size_bytes or self.download.sha256):
                raise ValueError("size_bytes and sha256 are those of an address; the hub tells its own")
            if self.is_address and self.download.about_gb:
                raise ValueError("about_gb is that of a hub repository; an address has size_bytes")
            if self.is_address and self.revision is not None:
                raise ValueError("an address has no revision; leave it out")
        if self.get is None:
            return self
        if self.revision is None and "{revision}" in self.get:
            raise ValueError("get has {revision}, and there is no revision; give one, or leave it out of get")
        try:
            self.command("", "")
        except (LookupError, ValueError) as error:
            raise ValueError(
                "get may hold {weights}, {preset}, {source} and {revision}, and other braces doubled"
            ) from error
        return self

    @property
    def is_address(self) -> bool:
        """Whether it is one file somewhere, and not a repository of the hub."""
        return self.source.startswith(("https://", "http://"))

    @property
    def terms(self) -> str:
        """Licence, source, and the revision or digest that is expected, in a sentence."""
        use = "" if self.commercial else "; NOT for commercial use"
        terms = f"{self.model}: {self.licence}{use}. From {self.source}"
        if self.revision:
            return f"{terms}; revision {self.revision}"
        if self.download is None:
            return terms
        digest = self.download.sha256
        return f"{terms}; SHA-256 {digest}" if digest else f"{terms}; no revision is known"

    @property
    def gate(self) -> str:
        """What to do before a gated one can be downloaded."""
        return f"accept its terms on https://huggingface.co/{self.source} and sign in: hf auth login"

    def command(self, weights: str, preset: str) -> str:
        """Return what to type to get it; raises LookupError or ValueError for a wrong ``get``."""
        assert self.get is not None
        return self.get.format(weights=weights, preset=preset, source=self.source, revision=self.revision)
