//! Asking a lab's daemon.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use super::names::LabName;
use super::requests::{Answer, Request};
use crate::error::{Context, Error, Result};

/// Asks and prints the notes on the way.
pub(crate) fn ask(lab: &LabName, request: &Request) -> Result<()> {
    let paths = lab.paths();
    if !paths.dir().exists() {
        return Err(Error::new(format!(
            "there is no lab {lab}; start one with `warren lab up --name {lab} -f FILE`, or see \
             `warren lab list`"
        )));
    }
    let dead = |e: std::io::Error| {
        Error::new(format!(
            "the daemon of lab {lab} does not answer ({e}); its log is {}; `warren lab down --name \
             {lab}` cleans up",
            paths.daemon_log().display()
        ))
    };
    let mut stream = UnixStream::connect(paths.socket()).map_err(dead)?;
    let line = serde_json::to_string(request).context("request")? + "\n";
    stream.write_all(line.as_bytes()).map_err(dead)?;
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(dead)?;
        match serde_json::from_str::<Answer>(&line).context("answer")? {
            Answer::Note(note) => super::view::say(note),
            Answer::Done => return Ok(()),
            Answer::Failed(why) => return Err(Error::new(why)),
        }
    }
    Err(dead(std::io::ErrorKind::UnexpectedEof.into()))
}
