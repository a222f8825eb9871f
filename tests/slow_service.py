"""A service that comes up in two steps and answers from a script: ``python -m tests.slow_service PORT``.

The page answers after 0.2 s, ``/health`` says ok after 0.6 s. Words come at once, media after 0.1 s each, and
files whenever asked for. A child sleeps beside it. ``--mute`` makes it end before it is ready.
"""

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MADE = {"draw": "image", "play": "audio", "video": "video"}
BEGAN = time.perf_counter()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        age = time.perf_counter() - BEGAN
        if self.path == "/health":
            self.say(200, json.dumps({"status": "ok" if age > 0.6 else "degraded"}).encode())
        else:
            self.say(200 if age > 0.2 else 503, b"page")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][0]["content"]
        self.send_response(200)
        self.end_headers()
        self.tell({"content": "yes"})
        for index, kind in enumerate(kind for word, kind in MADE.items() if word in text):
            time.sleep(0.1)
            part = {
                "index": index,
                "type": kind,
                "status": "done",
                "url": f"http://elsewhere/v1/files/{index}",
            }
            if "broken" in text:
                part |= {"status": "failed", "error": {"message": "out of paint"}}
            self.tell({"parts": [part]})
        self.wfile.write(b"data: [DONE]\n\n")

    def tell(self, delta: object) -> None:
        self.wfile.write(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode())
        self.wfile.flush()

    def say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    if "--mute" in sys.argv:
        sys.exit("patchbay: the paint is out.")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
    finally:
        child.kill()
