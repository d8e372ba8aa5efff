//! Frames are found alike however they are cut, and where a plain reading finds them.

use super::{Frame, HEADER, Scan};
use crate::fuzz::{Input, segments};

pub(crate) fn frames(bytes: &[u8]) {
    let mut input = Input(bytes);
    let preface = usize::from(input.byte() % 32);
    let cuts = input.cuts();
    let bytes = input.0;
    let found = |cuts: &[usize]| {
        let mut scan = Scan::after(preface);
        let mut frames = Vec::new();
        for segment in segments(bytes, cuts) {
            scan.feed(segment, |frame| frames.push(frame));
        }
        frames
    };
    let mut plain = Vec::new();
    let mut at = preface;
    while let Some(header) = bytes.get(at..at + HEADER) {
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        plain.push(Frame {
            length,
            kind: header[3],
            flags: header[4],
            stream: u32::from_be_bytes([header[5] & 0x7f, header[6], header[7], header[8]]),
        });
        at += HEADER + length as usize;
    }
    assert_eq!(found(&[]), plain);
    assert_eq!(found(&cuts), plain);
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let data = [0, 0, 3, 0, 1, 0, 0, 0, 1, b'a', b'b', b'c'];
    let frames = [&settings[..], &ping, &data, &ping[..12]].concat();
    vec![
        [&[0, 0][..], &frames].concat(),
        [
            &[24, 2, 4, 8][..],
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            &frames,
        ]
        .concat(),
    ]
}
