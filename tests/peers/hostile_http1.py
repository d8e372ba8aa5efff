"""Malformed and malicious HTTP/1 from a raw socket. Prints a JSON list of
{"name", "wanted": statuses, "status", "answers", "closed", "seconds", "proxy": who answered, "forged": whether the app saw
the identity that the client made up} .

Every shape that is about framing carries a second request, for /smuggled, in what it wants to be taken for
a body or for a request of its own: no server may ever see it.
"""

import json
import re
import socket
import sys
import time

HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /shape HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /shape HTTP/1.1\r\nHost: x\r\n"
BODY = b"0\r\n\r\n" + HIDDEN
REFUSED = [400]
FORGED = b"spiffe://cluster.local/ns/prod/sa/admin"


def lines():
    """First lines that some server takes for a request's, with an identity that is not the client's. To be seen as HTTP
    wherever they are sent: also on a port of which nothing is declared."""
    head = b"Host: x\r\nConnection: close\r\nwarren-client-id: " + FORGED + b"\r\n\r\n"
    for name, line, wanted in (
        ("good: empty lines first", b"\r\n\r\nGET /shape HTTP/1.1", [200]),
        ("good: a long method", b"A" * 40 + b" /shape HTTP/1.1", [200]),
        ("LF first", b"\nGET /shape HTTP/1.1", REFUSED),
        ("CR first", b"\rGET /shape HTTP/1.1", REFUSED),
        ("a space first", b" GET /shape HTTP/1.1", REFUSED),
        ("a tab first", b"\tGET /shape HTTP/1.1", REFUSED),
        ("two spaces", b"GET  /shape HTTP/1.1", REFUSED),
        ("a tab between", b"GET\t/shape\tHTTP/1.1", REFUSED),
        ("a form feed between", b"GET\x0c/shape HTTP/1.1", REFUSED),
        ("a target with a space", b"GET /sha pe HTTP/1.1", [400, 505]),
        ("a target with a control character", b"GET /sha\x01pe HTTP/1.1", REFUSED),
        ("a target with NUL", b"GET /sha\x00pe HTTP/1.1", REFUSED),
        ("version 1.2", b"GET /shape HTTP/1.2", [400, 505]),
        ("version 2.0", b"GET /shape HTTP/2.0", [400, 505]),
        ("version 9.9", b"GET /shape HTTP/9.9", [400, 505]),
        ("a version in lower case", b"GET /shape http/1.1", [400, 505]),
        ("a target too long", b"GET /" + b"a" * 300_000 + b" HTTP/1.1", [414, 431]),
    ):
        yield name, line + b"\r\n" + head, wanted
    yield "a preface that is none", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n" + HIDDEN, [400, 505]


def shapes():
    """Name, bytes, statuses that are right. For a port that is declared to be HTTP."""
    yield from lines()
    yield "no version", b"GET /shape\r\nHost: x\r\nwarren-client-id: " + FORGED + b"\r\n\r\n", REFUSED
    yield "a control character first", b"\x01" + GET + b"warren-client-id: " + FORGED + b"\r\n\r\n", REFUSED
    yield "no HTTP at all", b"EHLO mail\r\n\r\n", REFUSED
    length = b"Content-Length: %d\r\n" % len(BODY)
    yield "length and chunked", POST + length + b"Transfer-Encoding: chunked\r\n\r\n" + BODY, REFUSED
    yield "chunked and length", POST + b"Transfer-Encoding: chunked\r\n" + length + b"\r\n" + BODY, REFUSED
    yield "lengths that differ", POST + b"Content-Length: 0\r\n" + length + b"\r\n" + BODY, REFUSED
    yield "lengths in a list", POST + b"Content-Length: 0, %d\r\n\r\n" % len(BODY) + BODY, REFUSED
    for value in (b"-1", b"+5", b"0x5", b"5 5", b"5;", b"", b"1e1", b"18446744073709551621", b"99999999999999999999999999"):
        yield f"length {value.decode()!r}", POST + b"Content-Length: " + value + b"\r\n\r\n" + BODY, REFUSED
    for value in (b"chunked, identity", b"identity, chunked", b"xchunked", b"chunked, chunked", b"chunked;q=1", b"\x0bchunked", b"gzip", b"cow"):
        wanted = [400, 501]
        yield f"coding {value.decode()!r}", POST + b"Transfer-Encoding: " + value + b"\r\n\r\n" + BODY, wanted
    two = b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n"
    yield "two codings", POST + two + BODY, [400, 501]
    old = b"POST /shape HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield "chunked in HTTP/1.0", old + BODY, REFUSED
    yield "space before the colon", POST + b"Transfer-Encoding : chunked\r\n\r\n" + BODY, REFUSED
    yield "space before the colon of a length", POST + b"Content-Length : 5\r\n\r\n" + BODY, REFUSED
    yield "a folded line", POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + BODY, REFUSED
    yield "a folded first line", b"GET /shape HTTP/1.1\r\n Host: x\r\n\r\n", REFUSED
    yield "bare LF in the head", b"GET /shape HTTP/1.1\nHost: x\n\n" + HIDDEN, REFUSED
    yield "bare LF in a header", GET + b"X: a\nTransfer-Encoding: chunked\r\n\r\n" + BODY, REFUSED
    yield "bare CR in a value", GET + b"X: a\rContent-Length: 5\r\n\r\n", REFUSED
    yield "NUL in a value", GET + b"X: a\x00b\r\n\r\n", REFUSED
    yield "NUL in a name", GET + b"X\x00Y: a\r\n\r\n", REFUSED
    yield "no name", GET + b": a\r\n\r\n", REFUSED
    yield "no colon", GET + b"nothing\r\n\r\n", REFUSED
    yield "a name with a bracket", GET + b"X[1]: a\r\n\r\n", REFUSED
    yield "no Host", b"GET /shape HTTP/1.1\r\n\r\n", REFUSED
    yield "two Hosts", GET + b"Host: y\r\n\r\n", REFUSED
    yield "a Host that is none", b"GET /shape HTTP/1.1\r\nHost: a/b@c\r\n\r\n", REFUSED
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    # The head is good: perhaps there is no answer, but the connection ends and nothing is smuggled.
    for name, chunk in (
        ("chunk size 0x5", b"0x5\r\nhello\r\n0\r\n\r\n"),
        ("chunk size -5", b"-5\r\nhello\r\n0\r\n\r\n"),
        ("chunk size too large", b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        ("chunk size with a space", b"5 5\r\nhello\r\n0\r\n\r\n"),
        ("chunk ended by LF", b"5\nhello\n0\n\n"),
        ("chunk longer than said", b"5\r\nhello world\r\n0\r\n\r\n"),
        ("chunk extension with bare LF", b"5;a\nhello\r\n0\r\n\r\n"),
        ("chunk extension without end", b"5;" + b"a" * 200_000 + b"\r\nhello\r\n0\r\n\r\n"),
        ("trailer with a folded line", b"0\r\nX: a\r\n b\r\n\r\n"),
        ("trailer with a bare LF", b"0\r\nX: a\n\r\n\r\n"),
    ):
        yield name, chunked + chunk + HIDDEN, [400, 413, 431, 502, None]
    yield "a head too large", GET + b"X: " + b"a" * 300_000 + b"\r\n\r\n", [431]
    yield "many headers", GET + b"".join(b"X-%d: a\r\n" % i for i in range(5000)) + b"\r\n", [431]
    # What is odd but good must go on working.
    yield "good: chunk extension", chunked + b"5;name=value\r\nhello\r\n0\r\n\r\n", [200]
    yield "good: equal lengths", POST + b"Content-Length: 5\r\nConnection: close\r\n\r\nhello", [200]
    yield "good: absolute target", b"GET http://x/shape HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [200]


def exchange(target, data, patience):
    started = time.monotonic()
    answer, closed = b"", False
    stream = socket.create_connection(target, timeout=5)
    stream.settimeout(patience)
    try:
        stream.sendall(data)
    except OSError:
        closed = True
    try:
        while True:
            piece = stream.recv(65536)
            if not piece:
                closed = True
                break
            answer += piece
    except TimeoutError:
        pass
    except OSError:
        closed = True
    stream.close()
    statuses = [int(s) for s in re.findall(rb"(?:^|(?<=[\r\n}]))HTTP/1\.[01] (\d+)", answer)]
    return {
        "proxy": b"\r\nwarren-proxy-error:" in answer.lower(),
        "forged": FORGED in answer,
        "status": statuses[0] if statuses else None,
        "answers": len(statuses),
        "closed": closed,
        "seconds": round(time.monotonic() - started, 3),
        "said": answer[:200].decode(errors="replace"),
    }


def slow(target, first, step, pause, most):
    """Sends a byte now and then for ever."""
    started = time.monotonic()
    stream = socket.create_connection(target, timeout=5)
    stream.sendall(first)
    stream.settimeout(pause)
    answer, closed = b"", False
    while time.monotonic() - started < most and not closed:
        try:
            piece = stream.recv(65536)
            closed = not piece
            answer += piece
        except TimeoutError:
            try:
                stream.sendall(step)
            except OSError:
                closed = True
        except OSError:
            closed = True
    status = re.match(rb"HTTP/1\.[01] (\d+)", answer)
    return {
        "status": int(status[1]) if status else None,
        "answers": 1,
        "closed": closed,
        "seconds": round(time.monotonic() - started, 3),
        "said": answer[:200].decode(errors="replace"),
    }


def main():
    what, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    target = (host, port)
    results = []
    if what in ("shapes", "lines"):
        for name, data, wanted in shapes() if what == "shapes" else lines():
            # A good one is not followed by a close unless it asked for it.
            results.append({"name": name, "wanted": wanted, **exchange(target, data, 3)})
    else:
        for name, first, step in (
            ("slow request line", b"GET /sl", b"o"),
            ("slow headers", GET, b"X: a\r\n"),
            ("slow header name", GET + b"X", b"x"),
        ):
            results.append({"name": name, "wanted": [408], **slow(target, first, step, 0.2, 30)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
