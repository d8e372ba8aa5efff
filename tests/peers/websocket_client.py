"""A WebSocket client for websocket_server.py: URL [BYTES], of each of two headers. Prints one JSON object."""

import json
import os
import sys
import threading

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect


def main():
    url, size = sys.argv[1], int((sys.argv + ["0"])[2])
    result = {}
    try:
        talk(url, size, result)
    except InvalidStatus as error:
        result["refused"] = error.response.status_code
    print(json.dumps(result))


def talk(url, size, result):
    headers = {"X-oDD-Case": "Kept", "x-first": "1" * size, "x-second": "2" * size}
    options = {"subprotocols": ["echo"], "max_size": 64 << 20, "open_timeout": 10, "additional_headers": headers}
    with connect(url, **options) as socket:
        result["subprotocol"] = socket.subprotocol
        result["compression"] = socket.response.headers.get("Sec-WebSocket-Extensions", "").split(";")[0]
        socket.send("who")
        result["who"] = json.loads(socket.recv(timeout=5))
        socket.send("hell\u00f6")
        result["text"] = socket.recv(timeout=5)
        for size in (0, 1, 125, 126, 65535, 65536, 5_000_000):
            data = os.urandom(size)
            socket.send(data)
            result[f"binary {size}"] = socket.recv(timeout=20) == data
        socket.send(["in ", "three ", "fragments"])
        result["fragments"] = socket.recv(timeout=5)
        pong = socket.ping()
        result["pong"] = pong.wait(timeout=5)
        result["many"] = many(socket)
        socket.send("close 4321 as asked")
        try:
            socket.recv(timeout=5)
        except ConnectionClosed as closed:
            result["closed"] = [closed.rcvd.code, closed.rcvd.reason]
    with connect(url, **options) as socket:
        socket.close(1001, "going")
        result["own close"] = [socket.close_code, socket.close_reason]


def many(socket):
    """Both directions at once."""
    number = 2000
    sender = threading.Thread(target=lambda: [socket.send(f"message {i}") for i in range(number)])
    sender.start()
    right = sum(socket.recv(timeout=10) == f"message {i}" for i in range(number))
    sender.join()
    return right


if __name__ == "__main__":
    main()
