"""An OTLP/gRPC collector without generated code: prints a line for each span, `span TRACE_ID SPAN_ID PARENT_ID KIND SERVICE`."""

import argparse
from concurrent import futures

import grpc


def fields(data):
    """The fields of a protobuf message: number, value (an int, or bytes)."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        length = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
        yield tag >> 3, data[at:at + length]
        at += length


def all_of(data, number):
    return [value for found, value in fields(data) if found == number]


def service_of(resource):
    for attribute in all_of(resource, 1):
        key, value = (all_of(attribute, n) for n in (1, 2))
        if key == [b"service.name"]:
            return all_of(value[0], 1)[0].decode()
    return "-"


class Collector(grpc.GenericRpcHandler):
    def service(self, details):
        if details.method != "/opentelemetry.proto.collector.trace.v1.TraceService/Export":
            return None

        def export(request, _context):
            # ExportTraceServiceRequest > ResourceSpans > ScopeSpans > Span, opentelemetry-proto 1.x
            for of_resource in all_of(request, 1):
                service = service_of(all_of(of_resource, 1)[0])
                for of_scope in all_of(of_resource, 2):
                    for span in all_of(of_scope, 2):
                        found = dict(fields(span))
                        ids = [found.get(n, b"").hex() or "-" for n in (1, 2, 4)]
                        print("span", *ids, found.get(6, 0), service, flush=True)
            return b""

        return grpc.unary_unary_rpc_method_handler(export)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--port", type=int, default=4317)
    port = arguments.parse_args().port
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Collector(),))
    server.add_insecure_port(f"[::]:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
