"""A gRPC client without generated code, for grpc_server.py. Prints one JSON object.

  kinds TARGET          all four kinds of call, metadata, errors, deadline, cancellation, a large message
  call TARGET METHOD    one unary call; --metadata k=v, --timeout, --text
  tally TARGET METHOD N N unary calls over one channel: how many each server answered, and codes
"""

import argparse
import collections
import json
import os
import threading
import time

# Names are in the pod's hosts file.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")

import grpc  # noqa: E402


def open_channel(target):
    # What the mesh does is measured, not what the library tries again.
    options = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
    channel = grpc.insecure_channel(target, options=options)
    grpc.channel_ready_future(channel).result(timeout=15)
    return channel


def plain(metadata):
    return sorted([key, value if isinstance(value, str) else value.hex()] for key, value in metadata or ())


def failure(error):
    return {
        "code": error.code().value[0],
        "details": error.details(),
        "initial": plain(error.initial_metadata()),
        "trailing": plain(error.trailing_metadata()),
    }


def unary(channel, method, text=b"hello", metadata=(), timeout=10):
    try:
        answer, call = channel.unary_unary(method).with_call(text, timeout=timeout, metadata=metadata)
        said = json.loads(answer)
        return {"code": 0, "answer": said, "initial": plain(call.initial_metadata()), "trailing": plain(call.trailing_metadata())}
    except grpc.RpcError as error:
        return failure(error)


def bidi(channel):
    """Each message is sent only when the one before has come back."""
    back = threading.Semaphore(1)

    def messages():
        for i in range(50):
            back.acquire(timeout=5)
            yield f"{i}:".encode() + b"x" * (i * 100)

    got = 0
    for i, message in enumerate(channel.stream_stream("/mesh.Test/Bidi")(messages(), timeout=10)):
        if message != f"{i}:".encode() + b"x" * (i * 100):
            return f"message {i} is {message[:20]!r}"
        got += 1
        back.release()
    return got


def cancelled(channel):
    call = channel.stream_stream("/mesh.Test/Bidi")(iter(lambda: time.sleep(0.05) or b"x", None))
    next(call)
    call.cancel()
    try:
        next(call)
    except grpc.RpcError as error:
        return error.code().value[0]
    return None


def kinds(channel):
    metadata = (("x-text", "kept as it is"), ("x-data-bin", b"\x00\x01\xfe\xff"), ("x-twice", "1"), ("x-twice", "2"))
    stream = channel.unary_stream("/mesh.Test/ServerStream")(b"200", timeout=10)
    started = time.monotonic()
    deadline = unary(channel, "/mesh.Test/Slow", metadata=(("x-delay", "5000"),), timeout=0.3)
    deadline["waited"] = time.monotonic() - started
    return {
        "unary": unary(channel, "/mesh.Test/Unary", metadata=metadata),
        "large": unary(channel, "/mesh.Test/Unary", text=b"y" * (4 << 20)),
        "server_stream": [message.decode() for message in stream],
        "client_stream": json.loads(channel.stream_unary("/mesh.Test/ClientStream")(iter([b"z" * 1000] * 100), timeout=10)),
        "bidi": bidi(channel),
        "empty_bidi": len(list(channel.stream_stream("/mesh.Test/Bidi")(iter(()), timeout=10))),
        "fail": unary(channel, "/mesh.Test/Fail", metadata=(("x-code", "9"),)),
        "early": unary(channel, "/mesh.Test/Early", metadata=(("x-code", "7"),)),
        "deadline": deadline,
        "cancelled": cancelled(channel),
    }


def tally(channel, method, number, metadata):
    servers, codes = collections.Counter(), collections.Counter()
    for _ in range(number):
        result = unary(channel, method, metadata=metadata)
        codes[str(result["code"])] += 1
        if result["code"] == 0:
            servers[result["answer"]["server"]] += 1
    return {"servers": servers, "codes": codes}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("kinds", "call", "tally"))
    parser.add_argument("target")
    parser.add_argument("method", nargs="?", default="/mesh.Test/Unary")
    parser.add_argument("number", nargs="?", type=int, default=1)
    parser.add_argument("--metadata", action="append", default=[], help="key=value")
    parser.add_argument("--timeout", type=float, default=10)
    parser.add_argument("--text", default="hello")
    args = parser.parse_args()
    metadata = tuple(tuple(pair.split("=", 1)) for pair in args.metadata)
    with open_channel(args.target) as channel:
        if args.what == "kinds":
            result = kinds(channel)
        elif args.what == "call":
            result = unary(channel, args.method, args.text.encode(), metadata, args.timeout)
        else:
            result = tally(channel, args.method, args.number, metadata)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
