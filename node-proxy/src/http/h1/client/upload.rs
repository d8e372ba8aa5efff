//! The body of a request that goes out while its answer is waited for, and after that has begun.

use std::sync::Arc;
use std::time::Duration;

use http::request;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::{Progress, ReadHead, SendError, Sent, read_head};
use crate::http::body::Body;
use crate::http::h1::case::HeaderCase;
use crate::http::h1::head::Framing;
use crate::http::h1::outgoing::{Failure, Writer};
use crate::http::h1::reader::Reader;
use crate::http::h1::{CONTINUE_WAIT, Limits, expects_continue};
use crate::tcp::{self, Ending};

/// How long a request's body may go on after the end of its answer.
const LINGER: Duration = Duration::from_secs(10);
/// How long an app that stopped reading may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A request on its way to the app.
pub(super) struct Upload<T> {
    task: T,
    /// The app has asked for the body.
    go: Option<oneshot::Sender<()>>,
    uploaded: Arc<Mutex<Uploaded>>,
}

/// What is left of an upload.
#[derive(Debug, Default)]
pub(super) struct Uploaded {
    /// Of a request that is out whole.
    writer: Option<Writer>,
    /// Of one that is not.
    broken: Option<Ending<Writer>>,
    /// None: under way.
    result: Option<Result<(), Failure>>,
}

/// An upload that outlives the head of its answer.
#[derive(Debug)]
pub(super) struct Running {
    abort: Option<AbortHandle>,
    answered: Arc<Notify>,
}

impl Uploaded {
    /// The writer, if the request is out whole.
    pub(super) fn take_writer(&mut self) -> Option<Writer> {
        self.writer.take()
    }
}

impl Running {
    /// The answer has ended: what is still on its way may go on for [`LINGER`].
    pub(super) fn answered(mut self) {
        self.abort = None;
        self.answered.notify_one();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(abort) = &self.abort {
            abort.abort();
        }
    }
}

/// Makes the request one that can be sent beside the reading of its answer.
pub(super) fn upload(
    writer: Writer,
    mut head: Vec<u8>,
    mut body: Body,
    framing: Framing,
    parts: &request::Parts,
) -> Upload<impl Future<Output = ()> + Send + use<>> {
    let case = parts.extensions.get::<HeaderCase>().cloned();
    let (go, asked) = if expects_continue(parts.version, &parts.headers) {
        let (go, asked) = oneshot::channel();
        (Some(go), Some(asked))
    } else {
        (None, None)
    };
    let uploaded = Arc::new(Mutex::new(Uploaded::default()));
    let left = Arc::clone(&uploaded);
    let task = async move {
        let writer = Ending::new(writer, tcp::reset_on_close);
        let wanted = match asked {
            None => Ok(true),
            Some(asked) => match writer.all(&std::mem::take(&mut head)).await {
                // The final answer may come first: the app does not want the body.
                Ok(()) => Ok(!matches!(timeout(CONTINUE_WAIT, asked).await, Ok(Err(_)))),
                Err(failure) => Err(failure),
            },
        };
        let declined = matches!(wanted, Ok(false));
        let result = match wanted {
            Ok(true) => writer.message(head, &mut body, framing, case).await,
            Ok(false) => Err(Failure::Stalled),
            Err(failure) => Err(failure),
        };
        let mut left = left.lock();
        match result {
            Ok(()) => left.writer = Some(writer.finished()),
            Err(_) if declined => drop(writer.finished()),
            Err(_) => left.broken = Some(writer),
        }
        left.result = Some(result);
    };
    Upload { task, go, uploaded }
}

/// What an upload failed with, if it has ended so.
fn end_of(uploaded: &Mutex<Uploaded>) -> Option<Failure> {
    let mut uploaded = uploaded.lock();
    match uploaded.result.take() {
        Some(Err(failure)) => Some(failure),
        other => {
            uploaded.result = other;
            None
        }
    }
}

/// Tells an app that has begun to answer that the rest of the request's body will not come.
fn abandon(uploaded: &Mutex<Uploaded>) {
    let uploaded = uploaded.lock();
    if let (Some(Err(Failure::Body(_))), Some(writer)) = (&uploaded.result, &uploaded.broken) {
        // A connection that has failed needs no more.
        let _ = tcp::finish_writing(writer.socket());
    }
}

/// Sends the request while its answer is waited for.
pub(super) async fn stream(
    reader: &mut Reader,
    limits: &Limits,
    parts: &request::Parts,
    upload: Upload<impl Future<Output = ()> + Send + 'static>,
    progress: &mut Progress,
) -> Result<(ReadHead, Sent), SendError> {
    let Upload { task, go, uploaded } = upload;
    let mut task = Box::pin(task);
    let mut sending = true;
    let mut failed = None;
    let read = {
        let mut reading = std::pin::pin!(read_head(reader, limits, parts, go, progress));
        loop {
            tokio::select! {
                biased;
                read = &mut reading => break read,
                () = &mut task, if sending => sending = false,
            }
            match end_of(&uploaded) {
                None => {}
                Some(Failure::Body(error)) => return Err(SendError::Body(error)),
                Some(failure) => {
                    failed = Some(failure);
                    break timeout(LAST_WORDS, &mut reading).await.unwrap_or(Ok(None));
                }
            }
        }
    };
    progress.failed = failed;
    let wanted = sending && matches!(read, Ok(Some(_)));
    let running = wanted.then(|| {
        let answered = Arc::new(Notify::new());
        let ended = Arc::clone(&answered);
        let left = Arc::clone(&uploaded);
        let spawned = tokio::spawn(async move {
            tokio::select! {
                () = task => abandon(&left),
                () = async { ended.notified().await; sleep(LINGER).await } => {}
            }
        });
        Running {
            abort: Some(spawned.abort_handle()),
            answered,
        }
    });
    Ok((read, Sent::Upload(uploaded, running)))
}
