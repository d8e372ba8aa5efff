"""An HBONE server in a pod, written from the wire format alone.

Terminates mutual TLS on port 15008 and answers each CONNECT itself: it echoes the bytes of the stream
in upper case. Prints a JSON line for every stream and for every failed handshake. With `--lose PORT=N`
the first N CONNECTs to that port end their whole tunnel without an answer; with `--mute PORT` one to that port
is the last that its tunnel hears: nothing is read or sent on it any more.
"""

import argparse
import json
import socket
import ssl
import threading

import h2.config
import h2.connection
import h2.errors
import h2.events


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=15008)
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--ca", required=True)
    parser.add_argument("--lose", action="append", default=[], metavar="PORT=N")
    parser.add_argument("--mute", action="append", default=[], metavar="PORT")
    args = parser.parse_args()
    lose = {port: int(times) for port, times in (rule.split("=") for rule in args.lose)}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(args.cert, args.key)
    context.load_verify_locations(args.ca)
    context.set_alpn_protocols(["h2"])
    names = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    listener = socket.create_server(("::", args.port), family=socket.AF_INET6, dualstack_ipv6=True)
    say(event="listening")
    while True:
        raw, peer = listener.accept()
        threading.Thread(target=serve, args=(context, raw, peer, names, lose, args.mute), daemon=True).start()


def say(**fields):
    print(json.dumps(fields), flush=True)


def serve(context, raw, peer, names, lose, mute):
    address = peer[0].removeprefix("::ffff:")
    raw.settimeout(120)
    try:
        stream = context.wrap_socket(raw, server_side=True)
    except (ssl.SSLError, OSError) as error:
        say(event="handshake failed", peer=address, error=str(error))
        return
    alternative = stream.getpeercert().get("subjectAltName", ())
    uri = next((value for kind, value in alternative if kind == "URI"), None)
    server_name = names.pop() if names else None
    say(event="handshake", peer=address, identity=uri, alpn=stream.selected_alpn_protocol(), sni=server_name)
    try:
        converse(stream, address, uri, lose, mute)
    except (ssl.SSLError, OSError) as error:
        say(event="ended", peer=address, error=str(error))
    finally:
        stream.close()


def converse(stream, address, uri, lose, mute):
    config = h2.config.H2Configuration(client_side=False, validate_inbound_headers=False)
    connection = h2.connection.H2Connection(config=config)
    connection.initiate_connection()
    stream.sendall(connection.data_to_send())
    while True:
        data = stream.recv(65536)
        if not data:
            return
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                fields = {name.decode(): value.decode() for name, value in event.headers}
                say(event="stream", peer=address, identity=uri, headers=fields)
                port = fields.get(":authority", "").rpartition(":")[2]
                if lose.get(port, 0) > 0:
                    lose[port] -= 1
                    return
                if port in mute:
                    threading.Event().wait()
                classic = fields.get(":method") == "CONNECT" and ":path" not in fields
                status = "200" if classic else "400"
                connection.send_headers(event.stream_id, [(":status", status)], end_stream=not classic)
            elif isinstance(event, h2.events.DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                # Test payloads are far below the flow-control window.
                connection.send_data(event.stream_id, event.data.upper())
            elif isinstance(event, h2.events.StreamEnded):
                connection.end_stream(event.stream_id)
        stream.sendall(connection.data_to_send())


if __name__ == "__main__":
    main()
