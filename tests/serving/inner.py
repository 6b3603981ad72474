"""What stands in for an engine's own application, and requests to the gateway around it."""

import asyncio
import json

CHAT = {"model": "spectr", "messages": [{"role": "user", "content": "what is it"}]}
WHOLE = {
    "id": "x",
    "object": "chat.completion",
    "model": "inside",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}


async def _send(send, status, body, kind=b"application/json", more=()):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    for part in more:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": body})


class Inner:
    """An application with fixed answers, which records its requests."""

    def __init__(self):
        self.status, self.body, self.kind, self.more = 200, json.dumps(WHOLE).encode(), b"application/json", ()
        self.asked, self.raises, self.waits = [], None, False

    async def __call__(self, scope, receive, send):
        message = await receive() if scope["method"] == "POST" else {"body": b""}
        self.asked.append((scope["path"], dict(scope["headers"]), message["body"]))
        if self.waits:
            assert (await receive())["type"] == "http.disconnect"
            await asyncio.sleep(60)
        if self.raises:
            raise self.raises
        await _send(send, self.status, self.body, self.kind, self.more)


def chat(ask, key=None, policy=None, **extras):
    return ask("POST", "/v1/chat/completions", key, policy, json={**CHAT, **extras})


def error_of(answer, status, code, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    return error["message"]
