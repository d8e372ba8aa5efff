"""A gRPC server without generated code: messages are bytes (JSON where the server says something).

Any service is served; the method's name says what it does:
  Unary        answers what it saw: server, method, metadata, the request's length and text
  ServerStream the request is a number n: n messages
  ClientStream answers how many messages and bytes came
  Bidi         each message comes back at once
  Fail         ends with the status in metadata `x-code`, a message, and trailing metadata
  Slow         answers after the milliseconds in metadata `x-delay`
  Flaky        fails with UNAVAILABLE for the first n calls (metadata `x-first`) of each `x-key`
"""

import argparse
import json
import threading
import time
from concurrent import futures

import grpc

CODES = {code.value[0]: code for code in grpc.StatusCode}


class Service(grpc.GenericRpcHandler):
    def __init__(self, name):
        self.name = name
        self.calls = 0
        self.keys = {}
        self.lock = threading.Lock()

    def service(self, details):
        metadata = [[key, value if isinstance(value, str) else value.hex()] for key, value in details.invocation_metadata]
        fields = dict(map(tuple, metadata))
        method = details.method

        def say(**more):
            return json.dumps({"server": self.name, "method": method, "metadata": metadata, **more}).encode()

        def begin(context):
            with self.lock:
                self.calls += 1
            context.send_initial_metadata((("x-server", self.name),))

        def unary(request, context):
            begin(context)
            context.set_trailing_metadata((("x-trailing", "kept"), ("x-trailing-bin", b"\x00\x01\xff")))
            remaining = context.time_remaining()
            return say(length=len(request), text=request[:100].decode(errors="replace"), peer=context.peer(), remaining=remaining)

        def server_stream(request, context):
            begin(context)
            for i in range(int(request)):
                yield f"message {i}".encode()

        def client_stream(requests, context):
            begin(context)
            count = size = 0
            for message in requests:
                count += 1
                size += len(message)
            return say(count=count, size=size)

        def bidi(requests, context):
            begin(context)
            for message in requests:
                yield message

        def fail(_request, context):
            begin(context)
            context.set_trailing_metadata((("x-reason", "asked to fail"),))
            context.abort(CODES[int(fields.get("x-code", "13"))], "a message with % and \u00fc")

        def early(_request, context):
            # Nothing was sent before: a response of trailers only.
            context.abort(CODES[int(fields.get("x-code", "5"))], "trailers only")

        def slow(request, context):
            begin(context)
            until = time.monotonic() + int(fields.get("x-delay", "1000")) / 1000
            while context.is_active() and time.monotonic() < until:
                time.sleep(0.01)
            return say(active=context.is_active())

        def flaky(request, context):
            with self.lock:
                key = fields.get("x-key", "")
                self.keys[key] = self.keys.get(key, 0) + 1
                nth = self.keys[key]
            if nth <= int(fields.get("x-first", "0")):
                context.abort(CODES[int(fields.get("x-code", "14"))], "not yet")
            begin(context)
            return say(nth=nth)

        def count(_request, context):
            return json.dumps({"calls": self.calls}).encode()

        name = method.rsplit("/", 1)[-1]
        if name == "ServerStream":
            return grpc.unary_stream_rpc_method_handler(server_stream)
        if name == "ClientStream":
            return grpc.stream_unary_rpc_method_handler(client_stream)
        if name == "Bidi":
            return grpc.stream_stream_rpc_method_handler(bidi)
        behaviours = {"Fail": fail, "Early": early, "Slow": slow, "Flaky": flaky, "Count": count}
        return grpc.unary_unary_rpc_method_handler(behaviours.get(name, unary))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, default=50051)
    args = parser.parse_args()
    options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.so_reuseport", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=32), handlers=(Service(args.name),), options=options)
    server.add_insecure_port(f"[::]:{args.port}")
    server.start()
    print("listening", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
