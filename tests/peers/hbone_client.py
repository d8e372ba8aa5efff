"""An HBONE (or warren/1, warren/2) client, written from the wire format alone.

Opens a mutual-TLS connection, one CONNECT stream, sends bytes, ends its half, reads to the end; with another method,
a request without a body.
Prints one JSON object: {"tls": "ok"|error, "alpn", "peer": URI, "status", "headers", "answer"}.
"""

import argparse
import json
import socket
import ssl
import sys

import h2.config
import h2.connection
import h2.events
import h2.settings


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--connect", required=True, help="address of the peer's port 15008")
    parser.add_argument("--port", type=int, default=15008)
    parser.add_argument("--cert")
    parser.add_argument("--key")
    parser.add_argument("--ca", required=True)
    parser.add_argument("--alpn", default="h2")
    parser.add_argument("--sni", help="none: no server name is sent, as HBONE wants it")
    parser.add_argument("--authority", required=True)
    parser.add_argument("--forwarded", help="value of the header `forwarded`")
    parser.add_argument("--send", default="", help="bytes to send once the stream is open")
    parser.add_argument("--method", default="CONNECT")
    parser.add_argument("--header", action="append", default=[], help="name=value")
    parser.add_argument("--tls12", action="store_true", help="offer nothing newer than TLS 1.2")
    parser.add_argument("--timeout", type=float, default=10)
    return parser.parse_args()


def tls_context(args):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The name is a SPIFFE URI, which this library does not compare: the test does.
    context.check_hostname = False
    context.load_verify_locations(args.ca)
    if args.tls12:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    if args.cert:
        context.load_cert_chain(args.cert, args.key)
    context.set_alpn_protocols([args.alpn])
    return context


def main():
    args = arguments()
    result = {}
    try:
        raw = socket.create_connection((args.connect, args.port), timeout=args.timeout)
        stream = tls_context(args).wrap_socket(raw, server_hostname=args.sni)
        result["alpn"] = stream.selected_alpn_protocol()
        names = stream.getpeercert().get("subjectAltName", ())
        result["peer"] = next((value for kind, value in names if kind == "URI"), None)
        # With TLS 1.3 a server's refusal of our certificate arrives after our side is done.
        exchange(stream, args, result)
        result.setdefault("tls", "ok")
    except ssl.SSLError as error:
        result["tls"] = f"{error.reason or error}"
    except (OSError, EOFError) as error:
        result["tls"] = f"{type(error).__name__}: {error}"
    print(json.dumps(result))


def exchange(stream, args, result):
    config = h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
    connection = h2.connection.H2Connection(config=config)
    connection.initiate_connection()
    stream_id = connection.get_next_available_stream_id()
    headers = [(":method", args.method)]
    if args.method != "CONNECT":
        headers += [(":scheme", "https"), (":path", "/")]
    headers.append((":authority", args.authority))
    if args.forwarded:
        headers.append(("forwarded", args.forwarded))
    headers += [tuple(header.split("=", 1)) for header in args.header]
    is_request = args.method != "CONNECT"
    connection.send_headers(stream_id, headers, end_stream=is_request)
    stream.sendall(connection.data_to_send())
    answer = b""
    ended = False
    while not ended:
        data = stream.recv(65536)
        if not data:
            if "status" not in result:
                raise EOFError("closed before an answer")
            break
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                result["tls"] = "ok"
                fields = {name.decode(): value.decode() for name, value in event.headers}
                result["status"] = int(fields.pop(":status"))
                result["headers"] = fields
                if result["status"] != 200:
                    ended = True
                elif not is_request:
                    connection.send_data(stream_id, args.send.encode(), end_stream=True)
            elif isinstance(event, h2.events.DataReceived):
                answer += event.data
                connection.acknowledge_received_data(event.flow_controlled_length, stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                ended = True
            elif isinstance(event, h2.events.StreamReset):
                result["reset"] = int(event.error_code)
                ended = True
            elif isinstance(event, h2.events.ConnectionTerminated):
                result["goaway"] = int(event.error_code)
        stream.sendall(connection.data_to_send())
    result["answer"] = answer.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
