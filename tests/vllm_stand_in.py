"""A server that speaks vLLM's protocol, in a thread: one that answers by a rule, and one that samples from the model.

Every request that does something is written down in `events`. `faults` are taken from the front, one for each
completion request.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "base"


def counting(model: str, path: str | None, body: dict, index: int) -> tuple[list[int], list[float], str]:
    """A completion that tells what was asked: as many tokens as the seed says, then the end."""
    length = min(body["seed"] % 3 + index, body["max_tokens"] - 1)
    ids = [body["prompt"][0]] * length + [body["stop_token_ids"][0]]
    return ids, [-0.5 - index] * len(ids), "stop"


class StandIn:
    """`with StandIn() as server:` and `server.url`.

    Args:
        answer: (model, path of the adapter or None, body, index) -> ids, log-probabilities, reason of the end.
        version, max_model_len: What it says of itself.
        port: Of a server that is started again.
    """

    def __init__(self, answer=counting, version="0.32.0", max_model_len=512, port=0, load=None, unload=None):
        self.answer, self.version, self.max_model_len = answer, version, max_model_len
        self.on_load, self.on_unload = load or (lambda name, path: None), unload or (lambda name: None)
        self.loaded: dict[str, str] = {}
        self.events: list[tuple[str, str]] = []
        self.bodies: list[dict] = []
        self.faults: list[str] = []
        self.tokenize = None
        self.lock = threading.Lock()
        self.port = port

    def __enter__(self) -> "StandIn":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def start(self) -> None:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                stand_in.get(self)

            def do_POST(self):
                stand_in.post(self)

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            allow_reuse_address = True
            daemon_threads = True
            connections: set = set()

            def get_request(self):
                request = super().get_request()
                self.connections.add(request[0])
                return request

        self.http = Server(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """As when the process is killed: connections that are kept alive break too, and adapters are gone."""
        import contextlib
        import socket

        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
        for connection in list(self.http.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.http.connections.clear()
        self.loaded.clear()

    # ------------------------------------------------------------------ answers

    @staticmethod
    def send(handler, content, status=200, cut=None) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:cut])
        if cut is not None:
            handler.close_connection = True

    def refuse(self, handler, message: str, status: int) -> None:
        self.send(handler, {"error": {"message": message, "type": "Error", "code": status}}, status)

    def get(self, handler) -> None:
        if handler.path == "/health":
            self.send(handler, "")
        elif handler.path == "/version":
            self.send(handler, {"version": self.version})
        elif handler.path == "/v1/models":
            base = {"id": BASE, "parent": None, "root": "/models/base", "max_model_len": self.max_model_len}
            with self.lock:
                adapters = [{"id": name, "parent": BASE, "root": path} for name, path in self.loaded.items()]
            self.send(handler, {"object": "list", "data": [base, *adapters]})
        else:
            self.refuse(handler, "Not Found", 404)

    def post(self, handler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if handler.path == "/v1/load_lora_adapter":
            self.load(handler, body["lora_name"], body["lora_path"])
        elif handler.path == "/v1/unload_lora_adapter":
            self.unload(handler, body["lora_name"])
        elif handler.path == "/v1/completions":
            self.complete(handler, body)
        elif handler.path == "/tokenize" and self.tokenize is not None:
            self.send(handler, {"tokens": self.tokenize(body["prompt"]), "count": 0})
        else:
            self.refuse(handler, "Not Found", 404)

    def load(self, handler, name: str, path: str) -> None:
        with self.lock:
            if name in self.loaded:
                self.refuse(handler, f"The lora adapter '{name}' has already been loaded.", 400)
                return
            if not (Path(path) / "adapter_model.safetensors").is_file():
                self.refuse(handler, f"No adapter found for {path}", 404)
                return
            try:
                self.on_load(name, path)
            except Exception as error:
                self.refuse(handler, str(error), 500)
                return
            self.loaded[name] = path
            self.events.append(("load", name))
        self.send(handler, f"Success: LoRA adapter '{name}' added successfully.")

    def unload(self, handler, name: str) -> None:
        with self.lock:
            if self.loaded.pop(name, None) is None:
                self.refuse(handler, f"The lora adapter '{name}' cannot be found.", 404)
                return
            self.on_unload(name)
            self.events.append(("unload", name))
        self.send(handler, f"Success: LoRA adapter '{name}' removed successfully.")

    def complete(self, handler, body: dict) -> None:
        model = body["model"]
        with self.lock:
            if model != BASE and model not in self.loaded:
                self.refuse(handler, f"The model `{model}` does not exist.", 404)
                return
            if not self.events or self.events[-1] != ("generate", model):
                self.events.append(("generate", model))
            self.bodies.append(body)
            fault = self.faults.pop(0) if self.faults else None
            path = self.loaded.get(model)
            choices = []
            for index in range(body["n"]):
                ids, logps, reason = self.answer(model, path, body, index)
                choices.append(
                    {
                        "index": index,
                        "text": "",
                        "token_ids": ids,
                        "prompt_token_ids": body["prompt"],
                        "logprobs": {"token_logprobs": logps, "tokens": [""] * len(ids)},
                        "finish_reason": reason,
                    }
                )
        if fault == "failed":
            self.refuse(handler, "EngineDeadError", 500)
            return
        if fault == "refused":
            self.refuse(handler, "This model's maximum context length is 8 tokens.", 400)
            return
        if fault == "closed":
            handler.close_connection = True
            handler.connection.close()
            return
        change(choices, fault)
        self.send(handler, {"id": "cmpl", "choices": choices}, cut=40 if fault == "torn" else None)


def change(choices: list[dict], fault: str | None) -> None:
    """Make an answer wrong in one way."""
    first = choices[0]
    if fault == "reordered":
        choices.reverse()
    elif fault == "short":
        choices.pop()
    elif fault == "twice":
        choices[-1]["index"] = 0
    elif fault == "few logprobs":
        first["logprobs"]["token_logprobs"] = first["logprobs"]["token_logprobs"][:-1]
    elif fault == "no logprobs":
        first["logprobs"] = None
    elif fault == "nan":
        first["logprobs"]["token_logprobs"][0] = float("nan")
    elif fault == "aborted":
        first["finish_reason"] = "abort"
    elif fault == "too long":
        first["token_ids"] = [5] * 1000
        first["logprobs"]["token_logprobs"] = [-1.0] * 1000
    elif fault == "no ids":
        del first["token_ids"]
    elif fault == "another prompt":
        first["prompt_token_ids"] = [0, *first["prompt_token_ids"]]
    elif fault == "another end":
        first["token_ids"][-1] = 12345
    elif fault == "behind the end":
        first["token_ids"].append(5)
        first["logprobs"]["token_logprobs"].append(-1.0)
        first["finish_reason"] = "length"
    elif fault == "cut":
        first["token_ids"], first["logprobs"]["token_logprobs"], first["finish_reason"] = [7], [-1.0], "length"
    elif fault == "empty":
        first["token_ids"], first["logprobs"]["token_logprobs"], first["finish_reason"] = [], [], "stop"
    elif fault is not None and fault not in ("torn",):
        raise AssertionError(fault)


class Sampling:
    """Samples by transformers from a base in a folder and the adapters that plain PEFT loads from published folders.

    `StandIn(**Sampling(folder).hooks())`. `off`, nats, is added to every log-probability that it tells; `ignore` lets
    it sample from the bare base; `raw` tells those of temperature 1.
    """

    def __init__(self, folder: Path, off: float = 0.0, ignore: bool = False, raw: bool = False):
        self.base = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.peft = None
        self.off, self.ignore, self.raw = off, ignore, raw

    def hooks(self) -> dict:
        return {"answer": self.answer, "load": self.load, "unload": self.unload}

    def load(self, name: str, path: str) -> None:
        with torch.random.fork_rng():  # PEFT draws numbers first, and the trainer in this process has its own to draw
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=name).eval()
            else:
                self.peft.load_adapter(path, adapter_name=name)
                self.peft.eval()

    def unload(self, name: str) -> None:
        if len(self.peft.peft_config) > 1:
            self.peft.delete_adapter(name)
        else:
            self.base, self.peft = self.peft.unload(), None

    @torch.no_grad()
    def answer(self, model: str, path: str | None, body: dict, index: int) -> tuple[list[int], list[float], str]:
        generator = torch.Generator().manual_seed((body["seed"] + index) % 2**63)
        ids, logps = list(body["prompt"]), []
        if path is not None:
            self.peft.set_adapter(model)
        for _ in range(body["max_tokens"]):
            logits = self._logits(ids, path is None or self.ignore)
            logp = (logits / body["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(logp.exp(), 1, generator=generator))
            told = logits.log_softmax(-1) if self.raw else logp
            ids.append(token)
            logps.append(float(told[token]) + self.off)
            if token in body["stop_token_ids"]:
                return ids[len(body["prompt"]) :], logps, "stop"
        return ids[len(body["prompt"]) :], logps, "length"

    def _logits(self, ids: list[int], bare: bool) -> torch.Tensor:
        inputs = torch.tensor([ids])
        if self.peft is None:
            return self.base(inputs).logits[0, -1].float()
        if bare:
            with self.peft.disable_adapter():
                return self.peft(inputs).logits[0, -1].float()
        return self.peft(inputs).logits[0, -1].float()
