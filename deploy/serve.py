"""The whole service on this machine: a local Ray, the application, and an end that leaves nothing behind.

``patchbay serve`` becomes this program. What can be wrong is looked at before Ray starts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import secrets
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import FrameType

from services.doctor import expect_files, expect_free_port
from services.errors import PresetProblem, ServiceError, of_the_system
from services.footprint import bytes_to_load
from services.presets import Preset, load_preset

OBJECT_STORE_BYTES = 128 * 2**20
READY_WITHIN_S = 300.0
SLOW_BYTES_PER_S = 50e6
"""A hard disk that several processes read at once; what is slower than this is taken for a fault."""
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # after 5 a busy machine would lose its proxy
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal says stop."""
    parser = argparse.ArgumentParser(prog="patchbay serve")
    parser.add_argument("--preset", default="toybox")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    try:
        preset = load_preset(args.preset)
        expect_files(preset)
        expect_free_port(args.host, args.port)
        with tempfile.TemporaryDirectory(prefix="patchbay-", ignore_cleanup_errors=True) as folder:
            return _serve(preset, args.host, args.port, Path(folder))
    except ServiceError as error:
        print(f"patchbay: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"patchbay: {of_the_system(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _serve(preset: Preset, host: str, port: int, folder: Path) -> int:
    began = time.monotonic()
    print(f"Starting {preset.name}: {preset.description}", flush=True)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    page_folder = folder / "page"
    page_folder.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(page_folder)

    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions

    from deploy.app import AppArgs, build_app
    from services.cluster import APP_NAME

    address = f"http://{_reachable(host)}:{port}"
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        _start_ray(folder / "ray")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        serve.start(
            http_options=HTTPOptions(host=host, port=port),
            logging_config={"log_level": "ERROR", "enable_access_log": False},
        )
        app = build_app(AppArgs(preset=str(preset.file), store=(folder / "files").as_uri(), page_url=address))
        target = serve.RunTarget(app, name=APP_NAME, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        within_s = ready_within_s(preset)
        _wait_until(partial(_page_lacks, address), within_s, _expect_no_failure)
        print(f"\n  Chat page   {address}/\n  API         {address}/v1\n", flush=True)
        _wait_until(partial(_health_lacks, address), within_s, _expect_no_failure)
        print(f"Ready after {time.monotonic() - began:.0f} s. Stop with Ctrl-C.", flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        print("Stopping.", flush=True)
        _hush()
        return 0
    except (RuntimeError, RayError) as error:
        raise _why(error) from error
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if ray.is_initialized():
            with suppress(RayError):  # whatever of Serve has not come up need not go down
                serve.shutdown()
        ray.shutdown()


def _start_ray(folder: Path) -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
        )
    except Exception as error:
        logging.getLogger(__name__).debug("Ray did not start.", exc_info=True)
        raise PresetProblem(
            f"Ray could not start: {error} Free memory and processor time, then try again.",
            code="not_started",
        ) from error


def _hush() -> None:
    """Say nothing from here on: Ray reports every actor of its own that an orderly end takes away."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(silence, stream.fileno())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def ready_within_s(preset: Preset) -> float:
    """Return how long a service may take to come up: longer, the more weights it reads."""
    return READY_WITHIN_S + bytes_to_load(preset) / SLOW_BYTES_PER_S


def _wait_until(lacks: Callable[[], str], within_s: float, expect_no_failure: Callable[[], None]) -> None:
    """Return when the service lacks nothing any more."""
    deadline = time.monotonic() + within_s
    while lacking := lacks():
        expect_no_failure()
        if time.monotonic() > deadline:
            raise PresetProblem(
                f"The service did not come up within {within_s:.0f} s; it lacks {lacking}. "
                "Run `patchbay doctor` to see what is wrong.",
                code="not_ready",
            )
        time.sleep(0.2)


def _page_lacks(address: str) -> str:
    return "" if _get(f"{address}/")[0] == HTTPStatus.OK else "an answer"


def _health_lacks(address: str) -> str:
    try:
        health = json.loads(_get(f"{address}/health")[1])
    except ValueError:  # whoever answers, it is not the gateway
        return "an answer"
    return "" if health["status"] == "ok" else ", ".join(health["unavailable"])


def _get(url: str) -> tuple[int, bytes]:
    """Return status and body, and 0 where nobody answers."""
    # A proxy that the environment names is not for the way to our own service.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError:
        return 0, b""


def _expect_no_failure() -> None:
    """Raise RuntimeError once Serve has given up."""
    from ray import serve

    from services.cluster import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    if application is not None and application.status == "DEPLOY_FAILED":
        raise RuntimeError(application.message)


def _why(error: Exception) -> PresetProblem:
    """Find our own sentence in what Serve reports about a deployment that did not start."""
    from ray import serve
    from ray.exceptions import RayError

    from services.cluster import APP_NAME

    try:
        application = serve.status().applications.get(APP_NAME)
    except (RuntimeError, RayError):  # there is no Serve to ask
        application = None
    reports = [deployment.message for deployment in application.deployments.values()] if application else []
    for report in (*reports, str(error)):
        if found := re.search(r"The [\w ]+ cannot be loaded: .+", report):
            return PresetProblem(f"The service could not start: {found[0]}", code="not_started")
    reason = " ".join(" ".join(filter(None, (*reports, str(error)))).split())
    return PresetProblem(
        f"The service could not start: {reason[-600:].rstrip('.')}. Free memory and processor time and "
        "try again, or run `patchbay doctor` to see what is wrong.",
        code="not_started",
    )


if __name__ == "__main__":
    sys.exit(main())
