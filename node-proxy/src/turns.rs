//! Whose turn it is on a thread: a workload with many connections must not make another wait for all of them.
//!
//! The runtime serves what is ready in the order in which it became ready, many tasks between two looks for new
//! events. So each pod, and each caller in the tunnels to a node, works for a slice of time, and leaves what is left to
//! the next round, behind a look for events, as long as others are active on the thread too. A tunnel itself does a
//! bounded piece of work at a time ([`Paced`]). Who has the thread alone is not held up: what many connections
//! write together costs less.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::slices;

/// Microseconds of work of one party in a round.
const SLICE: u64 = 200;
/// What a step counts as on a thread that is not shared, where it is not worth a look at the clock.
const STEP: u64 = 50;
/// Who works for less than one part in so many of the time does not hold others up.
const MODEST: u32 = 4;
/// For so long after another party was active a thread counts as shared.
const SHARED: Duration = Duration::from_millis(100);
/// Bytes that a tunnel or a relay reads, or writes, before it lets others work.
const PIECE: usize = 32 * 1024;

/// The work of one party on its thread.
#[derive(Debug, Default)]
pub struct Turns {
    /// Microseconds in this round.
    spent: AtomicU64,
    round: AtomicU64,
    last: Mutex<Last>,
}

/// As of the begin of the round.
#[derive(Debug, Default)]
struct Last {
    begun: Option<Instant>,
    changes: u64,
}

/// Who is active on a thread.
#[derive(Clone, Copy)]
struct Thread {
    /// Who worked last.
    party: usize,
    /// How often that changed.
    changes: u64,
    shared_until: Option<Instant>,
}

thread_local! {
    static THREAD: Cell<Thread> = const {
        Cell::new(Thread { party: 0, changes: 0, shared_until: None })
    };
}

impl Turns {
    /// Runs a connection or stream in turns with those of others on the thread. Boxed at once: a task is moved several
    /// times until it lies where it runs.
    pub fn take(self: Arc<Self>, future: impl Future<Output = ()>) -> impl Future<Output = ()> {
        let mut future = Box::pin(future);
        let mut waits = None;
        poll_fn(move |cx| {
            if !self.may_work(&mut waits) {
                return next_round(cx);
            }
            let begun = is_shared().then(Instant::now);
            let polled = future.as_mut().poll(cx);
            let spent = begun.map_or(STEP, |begun| micros(begun.elapsed()));
            self.spent.fetch_add(spent.max(1), Ordering::Relaxed);
            polled
        })
    }

    /// `false`: in the next round. `waits`: the round that was left to others of the party.
    fn may_work(self: &Arc<Self>, waits: &mut Option<u64>) -> bool {
        let mut thread = THREAD.get();
        let party = Arc::as_ptr(self) as usize;
        if thread.party != party {
            thread.party = party;
            thread.changes += 1;
            THREAD.set(thread);
        }
        let round = self.round.load(Ordering::Relaxed);
        if waits.take() == Some(round) {
            // The first that is back: the next round has begun.
            self.begin(thread.changes, Instant::now());
            return true;
        }
        let spent = self.spent.load(Ordering::Relaxed);
        if spent < SLICE {
            return true;
        }
        let now = Instant::now();
        if self.is_free(&mut thread, spent, now) {
            self.begin(thread.changes, now);
            return true;
        }
        *waits = Some(round);
        false
    }

    /// Whether nobody is made to wait, as far as can be known.
    fn is_free(&self, thread: &mut Thread, spent: u64, now: Instant) -> bool {
        let last = self.last.lock();
        if last.begun.is_some() && thread.changes != last.changes {
            thread.shared_until = Some(now + SHARED);
        } else if thread.shared_until.is_some_and(|until| until < now) {
            thread.shared_until = None;
        }
        THREAD.set(*thread);
        let most = Duration::from_micros(spent) * MODEST;
        thread.shared_until.is_none() || last.begun.is_none_or(|begun| now - begun >= most)
    }

    fn begin(&self, changes: u64, now: Instant) {
        slices::look();
        self.round.fetch_add(1, Ordering::Relaxed);
        self.spent.store(0, Ordering::Relaxed);
        *self.last.lock() = Last {
            begun: Some(now),
            changes,
        };
    }
}

fn is_shared() -> bool {
    THREAD.get().shared_until.is_some()
}

/// Comes back after the thread has looked for events.
fn next_round<T>(cx: &mut Context<'_>) -> Poll<T> {
    let woken = pin!(tokio::task::yield_now()).poll(cx);
    debug_assert!(woken.is_pending(), "it is never ready at once");
    Poll::Pending
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A connection that many streams share: on a thread that is shared it pauses after each piece, so that whoever drives
/// it does not work off all that has come, or waits to be sent, at once.
#[derive(Debug)]
pub struct Paced<T> {
    io: T,
    read: usize,
    written: usize,
}

impl<T> Paced<T> {
    /// Nothing is done yet.
    pub fn new(io: T) -> Self {
        Self {
            io,
            read: 0,
            written: 0,
        }
    }
}

/// Lets others work after each piece, on a thread that is shared. `done`: bytes since the last pause.
pub async fn pause(done: &mut usize) {
    poll_fn(|cx| {
        if pauses(done, cx) {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
}

/// Whether it is time to pause; then whoever asks is woken in the next round.
fn pauses(done: &mut usize, cx: &mut Context<'_>) -> bool {
    let pauses = *done >= PIECE && is_shared();
    if *done >= PIECE {
        *done = 0;
    }
    pauses && next_round::<()>(cx).is_pending()
}

impl<T: AsyncRead + Unpin> AsyncRead for Paced<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if pauses(&mut this.read, cx) {
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buffer);
        match read {
            Poll::Ready(_) => this.read += buffer.filled().len() - before,
            Poll::Pending => this.read = 0,
        }
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Paced<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if pauses(&mut this.written, cx) {
            return Poll::Pending;
        }
        let written = ready!(Pin::new(&mut this.io).poll_write(cx, bytes))?;
        this.written += written;
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if pauses(&mut this.written, cx) {
            return Poll::Pending;
        }
        let written = ready!(Pin::new(&mut this.io).poll_write_vectored(cx, bytes))?;
        this.written += written;
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use tokio::task::{LocalSet, yield_now};

    use super::*;

    /// A fifth of a slice.
    fn work() {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_micros(SLICE / 5) {
            std::hint::spin_loop();
        }
    }

    /// Steps of many tasks of one party between two steps of the one task of another.
    fn between(crowd: &Arc<Turns>, one: &Arc<Turns>) -> usize {
        let steps = Rc::new(RefCell::new(Vec::new()));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let local = LocalSet::new();
        for _ in 0..50 {
            let steps = Rc::clone(&steps);
            local.spawn_local(Arc::clone(crowd).take(async move {
                loop {
                    steps.borrow_mut().push("crowd");
                    work();
                    yield_now().await;
                }
            }));
        }
        let own = Rc::clone(&steps);
        let one = local.spawn_local(Arc::clone(one).take(async move {
            for _ in 0..20 {
                own.borrow_mut().push("one");
                yield_now().await;
            }
        }));
        runtime.block_on(local.run_until(one)).unwrap();
        let steps = steps.borrow();
        let mut longest = 0;
        let mut row = 0;
        // The first rounds tell that the thread is shared.
        for step in steps.iter().skip_while(|step| **step == "crowd").skip(1) {
            row = if *step == "crowd" { row + 1 } else { 0 };
            longest = longest.max(row);
        }
        longest
    }

    #[test]
    fn a_crowd_takes_turns_with_who_is_alone() {
        // What is known of a thread is its own.
        let on_a_thread = |crowd: Arc<Turns>, one: Arc<Turns>| {
            let thread = std::thread::spawn(move || between(&crowd, &one));
            thread.join().unwrap()
        };
        let crowd = Arc::new(Turns::default());
        let longest = on_a_thread(Arc::clone(&crowd), Arc::default());
        assert!(longest <= 10, "{longest} steps in a row");
        let crowd = Arc::new(Turns::default());
        let longest = on_a_thread(Arc::clone(&crowd), crowd);
        assert!(
            longest >= 25,
            "of one party all are served: {longest} steps in a row"
        );
    }

    #[test]
    fn who_is_alone_is_never_held_up_and_who_is_modest_neither() {
        let turns = Arc::new(Turns::default());
        let works = |turns: &Arc<Turns>| {
            let may = turns.may_work(&mut None);
            turns.spent.fetch_add(STEP, Ordering::Relaxed);
            may
        };
        assert!((0..1000).all(|_| works(&turns)));
        let other = Arc::new(Turns::default());
        for _ in 0..20 {
            assert!(works(&other), "it works for a part of the time only");
            let taken = (0..100).take_while(|_| works(&turns)).count();
            assert!(taken < 100, "the thread is shared");
            std::thread::sleep(Duration::from_micros(STEP) * (MODEST + 1));
        }
    }

    #[tokio::test]
    async fn a_shared_connection_pauses_after_each_piece() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut paced = Paced::new(near);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let bytes = vec![0; 4 * PIECE];
        far.write_all(&bytes).await.unwrap();
        let mut buffer = vec![0; PIECE];
        // Alone: all of it at once.
        for _ in 0..2 {
            paced.read_exact(&mut buffer).await.unwrap();
        }
        let until = Instant::now() + Duration::from_secs(60);
        THREAD.set(Thread {
            shared_until: Some(until),
            ..THREAD.get()
        });
        let mut write = |length: usize| {
            let written = Pin::new(&mut paced).poll_write(&mut cx, &bytes[..length]);
            matches!(written, Poll::Ready(Ok(_)))
        };
        assert!(write(PIECE));
        assert!(!write(PIECE), "a piece is written");
        assert!(write(1) && write(PIECE), "in the next round");
        let all = async {
            for _ in 0..2 {
                paced.read_exact(&mut buffer).await.unwrap();
            }
        };
        all.await;
    }
}
