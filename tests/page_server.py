"""The chat page and the API in one process: ``python -m tests.page_server PRESET FOLDER PORT``."""

import sys
from pathlib import Path

import uvicorn

from services.artefacts import ArtefactStore
from services.chat_page import build_page
from services.gateway import build_gateway, with_page
from services.local import local_agent
from services.presets import Example, load_preset


def main(preset_file: str, folder: str, port: int) -> None:
    preset = load_preset(preset_file)
    preset = preset.model_copy(update={"examples": (Example(text="draw, play and film a bell"),)})
    store = ArtefactStore(Path(folder).as_uri())
    api = build_gateway(preset, local_agent(preset, store), store)
    page = build_page(preset, f"http://127.0.0.1:{port}", lifespan=api.router.lifespan_context)
    uvicorn.run(with_page(api, page), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
