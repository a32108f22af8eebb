"""The label page: Gradio around a `Desk`, for one machine, without anything from outside.

Gradio's own page asks Google for fonts and reports that it was started. Telemetry is off here, and every response
forbids the browser to load anything from elsewhere. Texts stand in text boxes, which hold no HTML.
"""

import hmac
import ipaddress
import os
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from trl_ext.feedback.desk import Desk, View

CRITERIA = Path(__file__).parent / "criteria" / "helpful_honest_harmless.txt"
NEED_EXTRA = "the label page needs Gradio: pip install 'trl_ext[label]'."
LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "trl_ext_label_token"
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
WELCOME = (
    "You will see a conversation and two answers to it. Press 1 to 5 for how much better the left or the right one is "
    "(3 is a tie), 0 if both are bad, s to skip, u to undo.\n"
    "Every label is saved at once. Close the window whenever you like; under the same name you go on where you were."
)
# Choice, key, what stands on the button
BUTTONS = (
    ("left_much", "1", "Left much better"),
    ("left", "2", "Left better"),
    ("tie", "3", "Tie"),
    ("right", "4", "Right better"),
    ("right_much", "5", "Right much better"),
    ("both_bad", "0", "Both bad"),
    ("skip", "s", "Skip"),
    ("undo", "u", "Undo"),
)
# A key counts once for what is on the page: the next one is taken when `acts` has changed, or after three seconds.
KEYS = """<script>
(() => {
  const keys = __KEYS__;
  let pending = null, since = 0;
  document.addEventListener("keydown", (event) => {
    const name = keys[event.key.toLowerCase()];
    if (!name || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = event.target;
    if (at && (at.tagName === "INPUT" || at.tagName === "TEXTAREA") && !at.disabled && !at.readOnly) return;
    const acts = document.querySelector("#acts textarea, #acts input");
    const button = document.getElementById("choice-" + name);
    if (!acts || !button) return;
    event.preventDefault();
    if (pending === acts.value && Date.now() - since < 3000) return;
    pending = acts.value; since = Date.now();
    button.click();
  });
})();
</script>"""
STYLE = """
footer { display: none !important; }
#acts, #shown { display: none !important; }
textarea:disabled { opacity: 1 !important; -webkit-text-fill-color: currentColor !important; }
"""
REMEMBER = """(name) => {
  const url = new URL(window.location);
  url.searchParams.set("annotator", name);
  window.history.replaceState(null, "", url);
  if (document.activeElement) document.activeElement.blur();
}"""


def build_page(desk: Desk, criteria: str) -> Any:
    """The page, as Gradio blocks.

    Args:
        desk: What it shows and does.
        criteria: Text that stands on the side.

    Raises:
        ImportError: Gradio is missing.
    """
    gradio = _gradio()
    fixed = {"interactive": False, "lines": 4, "max_lines": 24}
    with gradio.Blocks(title="Which answer is better?", analytics_enabled=False, fill_width=True) as page:
        with gradio.Column() as start:
            gradio.Textbox(WELCOME, label="Which answer is better?", interactive=False, lines=4, elem_id="welcome")
            with gradio.Row():
                who = gradio.Textbox(label="Your name", placeholder="letters, digits, . - _", elem_id="who", scale=3)
                begin = gradio.Button("Begin", variant="primary", elem_id="begin", scale=1)
        message = gradio.Textbox(show_label=False, container=False, interactive=False, elem_id="message", visible=False)
        with gradio.Row(visible=False) as work:
            with gradio.Column(scale=4):
                progress = gradio.Textbox(show_label=False, container=False, interactive=False, elem_id="progress")
                conversation = gradio.Textbox(label="Conversation", elem_id="conversation", **fixed)
                with gradio.Row():
                    left = gradio.Textbox(label="Left", elem_id="left", **fixed)
                    right = gradio.Textbox(label="Right", elem_id="right", **fixed)
                with gradio.Row():
                    buttons = {
                        name: gradio.Button(f"{text} ({key})", elem_id=f"choice-{name}", min_width=75, size="sm")
                        for name, key, text in BUTTONS
                    }
            with gradio.Column(scale=1, min_width=220):
                gradio.Textbox(criteria, label="Criteria", interactive=False, lines=4, max_lines=40, elem_id="criteria")
        shown = gradio.Textbox(elem_id="shown", visible="hidden")
        acts = gradio.Textbox(elem_id="acts", visible="hidden")
        outputs = [start, work, message, progress, conversation, left, right, shown, acts, who]
        options = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

        def show(view: View) -> list[Any]:
            return [
                gradio.update(visible=False),
                gradio.update(visible=True),
                gradio.update(value=view.message, visible=bool(view.message)),
                view.progress(),
                view.conversation,
                view.left,
                view.right,
                view.pair,
                str(view.acts),
                view.annotator,
            ]

        def told(step: Callable[[], View]) -> list[Any]:
            """What a step shows; what is wrong with a name or a file stands above the page."""
            try:
                return show(step())
            except (ValueError, OSError) as error:
                unchanged = [gradio.skip()] * 7
                return [gradio.update(visible=True), gradio.update(visible=False), _told(gradio, error), *unchanged]

        def open_page(request: gradio.Request) -> list[Any]:  # type: ignore[name-defined]
            name = request.query_params.get("annotator")
            if not name:
                return [gradio.skip()] * len(outputs)
            return told(lambda: desk.view(name))

        def start_with(name: str) -> list[Any]:
            return told(lambda: desk.view(name.strip()))

        def act(choice: str, name: str, pair: str, seen: str) -> list[Any]:
            if choice == "undo":
                return told(lambda: desk.undo(name, int(seen or 0)))
            return told(lambda: desk.act(name, pair, choice) if pair else desk.view(name))

        page.load(open_page, None, outputs, **options)
        for event in (begin.click, who.submit):
            event(start_with, [who], outputs, **options).then(None, [who], None, js=REMEMBER)
        for name, button in buttons.items():
            button.click(partial(act, name), [who, shown, acts], outputs, **options)
    return page


def _told(gradio: Any, error: Exception) -> Any:
    return gradio.update(value=str(error), visible=True)


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(NEED_EXTRA) from error
    return gradio


Message = MutableMapping[str, Any]


class Gate:
    """ASGI middleware: who may come in, and what a browser may load.

    Without a token only requests to this machine's own names are answered, so that no other site's page can reach the
    server by a name that it points here. With a token, `?token=...` opens the door, and a cookie keeps it open.

    Args:
        app: The application behind.
        token: None: no token is asked for.
    """

    def __init__(self, app: Any, token: str | None):
        self.app, self.token = app, token

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Pass a request on, or answer it with 403."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}
        by_query = self.token is not None and self._is_token(_query_token(scope))
        if not (by_query or self._may_enter(headers)):
            await self._refuse(scope, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                if by_query:
                    cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                    added.append((b"set-cookie", cookie.encode()))
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self.app(scope, receive, send_guarded)

    def _may_enter(self, headers: dict[str, str]) -> bool:
        if self.token is None:
            return _host_name(headers.get("host", "")) in LOOPBACK
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        return cookie is not None and self._is_token(cookie.value)

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())

    async def _refuse(self, scope: Message, send: Callable[[Message], Awaitable[None]]) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        why = "Open the address with the token that the server printed." if self.token else "Open it by 127.0.0.1."
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": why.encode()})


def _query_token(scope: Message) -> str:
    return parse_qs(scope.get("query_string", b"").decode("latin1")).get("token", [""])[0]


def _host_name(host: str) -> str:
    return host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises:
        ValueError: The port is taken, or the address is none of this machine.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"port={port} must be between 0 and 65535.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a killed server's port is free at once
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        raise ValueError(
            f"cannot listen on host={host}, port={port}: {error.strerror or error}. Another label page may run there: "
            "stop it, or give another port; 0 takes a free one."
        ) from error
    return listener


def serve(
    desk: Desk,
    criteria: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
    tell: Callable[[str], None] = print,
    until: Callable[[], bool] | None = None,
) -> None:
    """Serve the label page until it is stopped.

    Args:
        desk: What it shows and does.
        criteria: Text on the side.
        host: Where it listens. Anything but this machine's own address needs a token.
        port: Where it listens; 0: a free one.
        token: Default: none on 127.0.0.1, a random one elsewhere.
        tell: Gets the line with the address.
        until: Asked every second; once it says so the page stops by itself.

    Raises:
        ValueError: See `bind`; a token that is too short.
        ImportError: Gradio is missing.
    """
    if token is not None and (
        len(token) < 16 or not token.isascii() or not token.replace("-", "").replace("_", "").isalnum()
    ):
        raise ValueError("the token must have at least 16 letters, digits, '-' or '_': leave it out for a random one.")
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    gradio = _gradio()
    import uvicorn
    from fastapi import FastAPI

    with bind(host, port) as listener:
        keys = {key: name for name, key, _ in BUTTONS}
        app = gradio.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            build_page(desk, criteria),
            path="/",
            footer_links=[],
            ssr_mode=False,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=STYLE,
            head=KEYS.replace("__KEYS__", str(keys)),
        )
        server = uvicorn.Server(uvicorn.Config(Gate(app, token), log_level="warning", lifespan="on"))
        name = f"[{host}]" if ":" in host else host
        query = "" if token is None else f"?token={token}"
        tell(f"label page: http://{name}:{listener.getsockname()[1]}/{query}")
        over = threading.Event()
        if until is not None:
            threading.Thread(target=_stop_when, args=(server, until, over), daemon=True).start()
        try:
            server.run(sockets=[listener])
        finally:
            over.set()


def _stop_when(server: Any, until: Callable[[], bool], over: threading.Event) -> None:
    while not over.wait(1.0):
        if until():
            over.wait(1.0)  # the browser learns that nothing is left
            server.should_exit = True
            return
