"""A WebSocket server: every message comes back; `close CODE REASON` closes with that; `who` tells the handshake."""

import argparse
import json
import socket

from websockets.sync.server import serve


def talk(connection):
    for message in connection:
        if isinstance(message, str) and message.startswith("close "):
            _, code, reason = message.split(" ", 2)
            connection.close(int(code), reason)
            return
        elif message == "who":
            request = connection.request
            headers = [[name, value] for name, value in request.headers.raw_items()]
            connection.send(json.dumps({"path": request.path, "headers": headers}))
        else:
            connection.send(message)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    listener = socket.create_server(("::", args.port), family=socket.AF_INET6, dualstack_ipv6=True)
    with serve(talk, sock=listener, subprotocols=["second", "echo"], max_size=64 << 20) as server:
        print("listening", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
