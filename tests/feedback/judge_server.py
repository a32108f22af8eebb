"""A judge on this machine: an OpenAI-compatible endpoint in a thread, that answers as a function says."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def verdict(name):
    return json.dumps({"reason": "because", "verdict": name})


def always_first(text):
    return verdict("first")


def answers_in(text):
    first = text.split("<first_answer>\n")[1].split("\n</first_answer>")[0]
    second = text.split("<second_answer>\n")[1].split("\n</second_answer>")[0]
    return first, second


def longer(text):
    first, second = answers_in(text)
    return verdict("first" if len(first) > len(second) else "second")


def better(text):
    first, second = answers_in(text)
    return verdict("first" if "good" in first else "second" if "good" in second else "tie")


@contextmanager
def judge_server(reply, status=lambda text: 200, delay=0.0, torn=lambda text: False):
    """Yields the base_url, the texts that were asked, and the keys that were sent."""
    texts, keys = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = request["messages"][0]["content"]
            texts.append(text)
            keys.append(self.headers["Authorization"])
            time.sleep(delay)
            code = status(text)
            body = {"error": {"message": f"no: {self.headers['Authorization']}"}}
            if code == 200:
                message = {"role": "assistant", "content": reply(text)}
                body = {
                    "id": "x", "object": "chat.completion", "created": 0, "model": request["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
                }  # fmt: skip
            content = json.dumps(body).encode()
            if torn(text):
                content = content[: len(content) // 2]
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", texts, keys
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
