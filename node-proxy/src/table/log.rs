//! The table on the node's disk: a proxy that restarts needs no controller.
//!
//! The file is a magic line and then records: length (4 bytes, little endian), the first 8 bytes of the
//! SHA-256 of the body, and the body, which is a `DeltaDiscoveryResponse` with the resources that were
//! taken; one without [`MORE`] says that everything of its type precedes. A type of which the
//! file does not hold everything is no use. Reading it is applying the same changes again. A thread of its own appends, so no runtime
//! ever waits for the disk; when the file has grown to twice what it holds, it is written anew and put
//! in place by rename.
//!
//! A process that takes over from another begins a file of its own; the other then leaves the name alone.
//!
//! A file that ends within a record is the file of a proxy that died while writing: what precedes is
//! used. Anything else that does not add up makes the whole file worthless: the proxy starts empty, and
//! therefore accepts nothing until the controller has sent a table.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions, rename};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use mesh_api::client::delta::MORE;
use mesh_api::proto::discovery::{DeltaDiscoveryResponse, Resource};
use prost::Message;
use sha2::{Digest, Sha256};

/// The open file.
pub struct Log {
    records: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
    behind: bool,
}

impl Log {
    /// Reads the file and begins a new one that holds the same. Returns one response per
    /// type. An unusable file is reported and counts as empty.
    pub fn open(path: &Path) -> io::Result<(Vec<DeltaDiscoveryResponse>, Log)> {
        let held = match read(path) {
            Ok(held) => held,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Held::default(),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "the kept table cannot be used; starting empty, nothing is accepted until the controller has sent one");
                Held::default()
            }
        };
        let mut responses = held.into_responses();
        responses.retain(|response| !response.system_version_info.ends_with(MORE));
        let writer = Writer::create(path.to_owned(), &responses)?;
        let (records, incoming) = sync_channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("table-log".into())
            .spawn(move || writer.run(&incoming))?;
        let log = Log {
            records: Some(records),
            thread: Some(thread),
            behind: false,
        };
        Ok((responses, log))
    }

    /// Appends what was taken from the controller. Never waits: with a disk that cannot keep up the
    /// change is not kept, which is logged; the controller will send it again after a restart.
    pub fn append(&mut self, taken: &DeltaDiscoveryResponse) {
        let Some(records) = &self.records else { return };
        match records.try_send(taken.encode_to_vec()) {
            Ok(()) => self.behind = false,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                if !std::mem::replace(&mut self.behind, true) {
                    tracing::error!("the disk does not keep up: changes of the table are not kept");
                }
            }
        }
    }
}

impl Drop for Log {
    /// Waits until everything is written.
    fn drop(&mut self) {
        self.records = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

struct Writer {
    path: PathBuf,
    file: File,
    /// Up to here the file is good.
    len: u64,
    compact_at: u64,
}

impl Writer {
    /// Puts a new file in place.
    fn create(path: PathBuf, responses: &[DeltaDiscoveryResponse]) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let temporary = path.with_extension("tmp");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        let mut out = BufWriter::new(file);
        out.write_all(MAGIC)?;
        for response in responses {
            out.write_all(&framed(&response.encode_to_vec()))?;
        }
        let mut file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        rename(&temporary, &path)?;
        let len = file.stream_position()?;
        Ok(Self {
            path,
            file,
            len,
            compact_at: len * 2 + SLACK,
        })
    }

    fn run(mut self, incoming: &Receiver<Vec<u8>>) {
        let mut failing = false;
        while let Ok(body) = incoming.recv() {
            match self.append(&body) {
                Ok(()) => failing = false,
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::error!(path = %self.path.display(), %error, "a change of the table cannot be kept");
                    }
                }
            }
        }
    }

    fn append(&mut self, body: &[u8]) -> io::Result<()> {
        let record = framed(body);
        if let Err(e) = self.file.write_all(&record) {
            // Half a record would make everything after it worthless.
            self.file.set_len(self.len)?;
            self.file.seek(SeekFrom::Start(self.len))?;
            return Err(e);
        }
        self.len += record.len() as u64;
        if self.len > self.compact_at {
            if self.is_in_place()? {
                *self = Self::create(self.path.clone(), &read(&self.path)?.into_responses())?;
            } else {
                // A newer process keeps the table; this one is about to end.
                self.compact_at = u64::MAX;
            }
        }
        Ok(())
    }

    /// Whether the file's name still leads to it.
    fn is_in_place(&self) -> io::Result<bool> {
        let (own, named) = (self.file.metadata()?, std::fs::metadata(&self.path)?);
        Ok((own.dev(), own.ino()) == (named.dev(), named.ino()))
    }
}

/// What a file amounts to.
#[derive(Default)]
struct Held {
    /// By type and name; with the number of the change, since later ones win.
    types: BTreeMap<String, Type>,
    changes: u64,
}

#[derive(Default)]
struct Type {
    complete: bool,
    resources: HashMap<String, (u64, Resource)>,
}

impl Held {
    fn take(&mut self, response: DeltaDiscoveryResponse) {
        let of_type = self.types.entry(response.type_url).or_default();
        of_type.complete |= !response.system_version_info.ends_with(MORE);
        for resource in response.resources {
            self.changes += 1;
            of_type
                .resources
                .insert(resource.name.clone(), (self.changes, resource));
        }
        for name in &response.removed_resources {
            of_type.resources.remove(name);
        }
    }

    /// One per type, also for a type without resources, the oldest change first.
    fn into_responses(self) -> Vec<DeltaDiscoveryResponse> {
        let response = |(type_url, of_type): (String, Type)| {
            let mut held: Vec<_> = of_type.resources.into_values().collect();
            held.sort_by_key(|(change, _)| *change);
            DeltaDiscoveryResponse {
                system_version_info: if of_type.complete {
                    String::new()
                } else {
                    MORE.into()
                },
                type_url,
                resources: held.into_iter().map(|(_, resource)| resource).collect(),
                ..Default::default()
            }
        };
        self.types.into_iter().map(response).collect()
    }
}

fn read(path: &Path) -> io::Result<Held> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let (held, torn) = read_from(BufReader::new(file), length)?;
    if torn {
        tracing::warn!(path = %path.display(), "the kept table ends within a change; it is used without that");
    }
    Ok(held)
}

/// Also whether it ends within a change.
fn read_from(mut file: impl Read, mut left: u64) -> io::Result<(Held, bool)> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut magic = [0; MAGIC.len()];
    if left < MAGIC.len() as u64 {
        return Err(invalid("it is too short"));
    }
    file.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(invalid("it is not a table of this version"));
    }
    left -= MAGIC.len() as u64;
    let mut held = Held::default();
    while left >= HEADER {
        let (mut len, mut sum) = ([0; 4], [0; 8]);
        file.read_exact(&mut len)?;
        file.read_exact(&mut sum)?;
        left -= HEADER;
        let len = u64::from(u32::from_le_bytes(len));
        if len > left {
            break;
        }
        let mut body = vec![0; len as usize];
        file.read_exact(&mut body)?;
        left -= len;
        if checksum(&body) != sum {
            return Err(invalid("a record's checksum is wrong"));
        }
        let response = DeltaDiscoveryResponse::decode(&body[..])
            .map_err(|_| invalid("a record is malformed"))?;
        held.take(response);
    }
    Ok((held, left > 0))
}

fn framed(body: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(HEADER as usize + body.len());
    // A message of the controller is far shorter than 4 GiB.
    record.extend_from_slice(&(body.len() as u32).to_le_bytes());
    record.extend_from_slice(&checksum(body));
    record.extend_from_slice(body);
    record
}

fn checksum(body: &[u8]) -> [u8; 8] {
    let digest: [u8; 32] = Sha256::digest(body).into();
    let mut sum = [0; 8];
    sum.copy_from_slice(&digest[..8]);
    sum
}

const MAGIC: &[u8; 16] = b"warren-table v1\n";
/// Length and checksum.
const HEADER: u64 = 12;
/// Changes that wait for the disk.
const WAITING: usize = 256;
/// A small file is not written anew for every change.
const SLACK: u64 = 1 << 20;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
