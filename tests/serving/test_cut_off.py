"""A server that ends while a client does not read what it streams."""

import asyncio
import socket
import threading

from serving import StandIn, settings
from spectr.serving.run import listen

REQUEST = b'{"model": "spectr", "messages": [{"role": "user", "content": "what is it"}], "stream": true}'
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(REQUEST)


async def endless(scope, receive, send):
    """An engine's application that streams more than all buffers hold."""
    if scope["type"] == "lifespan":
        return
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}}]}\n\n' % (b"x" * 65536)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    while True:
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await asyncio.sleep(0)


def test_who_does_not_read_is_left_without_a_traceback(library, capfd):
    asked, said, unread = settings(library, "ants", count=False, grace=0.0), [], socket.socket()
    unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with unread, asked.listen() as bound:

        async def end(server):
            unread.connect(bound.getsockname())
            unread.sendall(HEAD + REQUEST)
            await asyncio.sleep(0.5)  # until nothing more is sent
            server.should_exit = True
            try:
                await asyncio.sleep(60)
            finally:  # the server is done: what it wanted to send goes nowhere
                unread.close()
                await asyncio.sleep(0.1)

        served = threading.Thread(
            target=lambda: asyncio.run(listen(endless, StandIn(), asked, bound, said.append, end))
        )
        served.start()
        served.join(timeout=30)
        assert not served.is_alive()
    assert said[-1] == "stopping: 1 request cut off"
    assert capfd.readouterr().err == ""
