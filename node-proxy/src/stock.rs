//! Sockets of one network namespace, made by the agent ahead of their use.
//!
//! A process without capabilities cannot make a socket in a pod's namespace, nor set `IP_TRANSPARENT` on
//! it. So each pod, and the node itself, has a [`Stock`] of unconnected sockets that the agent made; the
//! broker's client fills it up ([`Supply::wants`], [`Stock::open_request`], [`Stock::fill`]). An empty
//! stock means waiting until the caller's deadline, never an error at once: the agent may be restarting.
//!
//! A finished socket is as good as a new one: `connect(AF_UNSPEC)` makes it unconnected and unbound
//! again, with the options the agent set (`docs/architecture.md`, "Sockets"). [`Stock::give_back`] takes
//! only sockets whose connection is over on both sides, so nothing in flight is lost.
//!
//! Levels: a stock is filled up to 30 s of what was lately taken and not given back, at least a small floor;
//! of what is given back it keeps a burst more, so that many short connections go round with the same
//! sockets. All stocks together hold at most a quarter of the descriptors that are not in use; beyond that a stock
//! still gets its floor and what is being waited for, so that a busy pod cannot starve another.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mesh_api::seqpacket::MAX_FDS;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use socket2::SockRef;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::recycle::Outcome;
use crate::process;
use crate::tcp::set_options;

mod recycle;
#[cfg(test)]
mod tests;

/// Sockets kept ready where nothing has been taken lately.
const FLOOR_V4: usize = 8;
/// As [`FLOOR_V4`], for namespaces that have IPv6.
const FLOOR_V6: usize = 2;
/// How long the stock is to last at the recent rate.
const LASTS_SECONDS: f64 = 30.0;
/// Sockets whose last acknowledgement is awaited; more are closed, and end by themselves.
const MOST_FINISHING: usize = 256;
/// Sockets of that many seconds are kept when they come back, for the next burst.
const BURST_SECONDS: f64 = 0.5;
/// Time constant of the rates' exponential averages.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// How long a count of the descriptors is used.
const COUNT_HOLDS: Duration = Duration::from_millis(100);

/// The stock of one namespace. Taken from by any thread.
#[derive(Debug)]
pub struct Stock {
    supply: Arc<Supply>,
    owner: Arc<str>,
    v4: Shelf,
    v6: Shelf,
}

/// Sockets of one address family.
#[derive(Debug)]
struct Shelf {
    floor: AtomicUsize,
    state: Mutex<ShelfState>,
    filled: Notify,
}

#[derive(Debug)]
struct ShelfState {
    sockets: Vec<OwnedFd>,
    /// Given back, but for the last acknowledgement of their connections.
    finishing: Vec<OwnedFd>,
    /// Taken less given back.
    net: Rate,
    /// Taken.
    gross: Rate,
    /// Takers that wait now.
    waiting: usize,
    /// A request is under way.
    requested: bool,
}

/// What all stocks share: the bound on their sum, and the list of those that need filling.
#[derive(Debug)]
pub struct Supply {
    descriptor_limit: usize,
    /// Counts the descriptors of the process.
    open: fn() -> usize,
    /// When they were counted last, and how many there were.
    counted: Mutex<Option<(Instant, usize)>>,
    /// Tells the time. Tests bring their own.
    now: fn() -> Instant,
    stocked: AtomicUsize,
    wants: Mutex<HashSet<Want>>,
    wanted: Notify,
    metrics: Metrics,
}

/// A stock that is below half of its level, or empty and waited for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Want {
    /// The pod's UID; empty for the node's own namespace.
    pub owner: Arc<str>,
    /// IPv6 sockets.
    pub v6: bool,
}

impl Stock {
    /// An empty stock. `owner` is the pod's UID, empty for the node's own namespace.
    pub fn new(supply: Arc<Supply>, owner: Arc<str>, has_v6: bool) -> Self {
        let stock = Self {
            supply,
            owner,
            v4: Shelf::new(FLOOR_V4),
            v6: Shelf::new(0),
        };
        stock.set_has_v6(has_v6);
        stock.want_if_low(false);
        stock
    }

    /// Whether IPv6 sockets are kept ready. They can be taken in any case.
    pub fn set_has_v6(&self, has_v6: bool) {
        let floor = if has_v6 { FLOOR_V6 } else { 0 };
        self.v6.floor.store(floor, Ordering::Relaxed);
        self.want_if_low(true);
    }

    /// Takes a socket: unconnected, unbound, non-blocking, with [`set_options`] done. Waits while there is none; `None` at the
    /// deadline.
    pub async fn take(&self, v6: bool, deadline: Instant) -> Option<OwnedFd> {
        let shelf = self.shelf(v6);
        if let Some(socket) = self.pop(v6) {
            return Some(socket);
        }
        let _waiting = Waiting::new(shelf);
        loop {
            let mut filled = pin!(shelf.filled.notified());
            // Registered before the second look, so that a socket that comes in between is not missed.
            filled.as_mut().enable();
            if let Some(socket) = self.pop(v6) {
                return Some(socket);
            }
            self.want(v6);
            tokio::time::timeout_at(deadline, filled).await.ok()?;
        }
    }

    /// Returns a socket after use. It is kept if its connection is over on both sides and the stock has
    /// room; otherwise it is closed, which delivers what is still in flight.
    pub fn give_back(&self, socket: OwnedFd, v6: bool) {
        let shelf = self.shelf(v6);
        let mut state = shelf.state.lock();
        let outcome = recycle::reset(&socket);
        if outcome == Outcome::Finishing && state.finishing.len() < MOST_FINISHING {
            state.finishing.push(socket);
        } else {
            self.take_back(shelf, &mut state, socket, outcome);
        }
    }

    /// Takes back sockets whose last acknowledgement has come meanwhile.
    fn take_back_finished(&self, shelf: &Shelf, state: &mut ShelfState) {
        for socket in std::mem::take(&mut state.finishing) {
            match recycle::reset(&socket) {
                Outcome::Finishing => state.finishing.push(socket),
                outcome => self.take_back(shelf, state, socket, outcome),
            }
        }
    }

    fn take_back(&self, shelf: &Shelf, state: &mut ShelfState, socket: OwnedFd, outcome: Outcome) {
        let usable = outcome == Outcome::Reset;
        if usable {
            state.net.add(-1.0, (self.supply.now)());
        }
        let have = state.sockets.len();
        let kept = usable
            && have < self.most(shelf, state)
            && (have < shelf.floor.load(Ordering::Relaxed) || self.supply.room() > 0);
        if kept {
            state.sockets.push(socket);
            self.supply.stocked.fetch_add(1, Ordering::Relaxed);
            shelf.filled.notify_one();
        }
        self.supply.metrics.returned(kept);
    }

    /// Sockets that are ready.
    pub fn available(&self, v6: bool) -> usize {
        self.shelf(v6).state.lock().sockets.len()
    }

    /// How many sockets to ask the agent for, if the stock is low and no request is under way. The
    /// request then is, until [`Stock::fill`] or [`Stock::forget_requests`].
    pub fn open_request(&self, v6: bool) -> Option<u32> {
        let shelf = self.shelf(v6);
        let mut state = shelf.state.lock();
        self.take_back_finished(shelf, &mut state);
        let level = self.level(shelf, &mut state);
        let have = state.sockets.len();
        if state.requested || !shelf.is_low(&state, level) {
            return None;
        }
        let floor = shelf.floor.load(Ordering::Relaxed);
        let due = state.waiting.max(floor).saturating_sub(have);
        let missing = (level + state.waiting).saturating_sub(have);
        let count = missing.min(due.max(self.supply.room())).min(MAX_FDS);
        if count == 0 {
            return None;
        }
        state.requested = true;
        // In range: at most MAX_FDS.
        Some(count as u32)
    }

    /// Takes in the answer to a request. The sockets get the options that every connection has here, once
    /// in their lives: they stay when a socket is used again.
    pub fn fill(&self, v6: bool, sockets: Vec<OwnedFd>) {
        for socket in &sockets {
            if let Err(error) = set_options(SockRef::from(socket)) {
                // The connection works without them.
                tracing::debug!(owner = %self.owner, %error, "options of a socket");
            }
        }
        let shelf = self.shelf(v6);
        let count = sockets.len();
        let mut state = shelf.state.lock();
        state.requested = false;
        state.sockets.extend(sockets);
        self.supply.stocked.fetch_add(count, Ordering::Relaxed);
        drop(state);
        for _ in 0..count {
            shelf.filled.notify_one();
        }
        // An answer without sockets is a refusal: asked again at the next tick, not in a loop.
        if count > 0 {
            self.want_if_low(v6);
        }
    }

    /// The connection on which requests were under way is gone.
    pub fn forget_requests(&self) {
        for v6 in [false, true] {
            self.shelf(v6).state.lock().requested = false;
            self.want_if_low(v6);
        }
    }

    /// Called about once a second: closes what is no longer wanted and asks again where an answer
    /// fell short.
    pub fn tick(&self) {
        for v6 in [false, true] {
            let shelf = self.shelf(v6);
            let mut state = shelf.state.lock();
            self.take_back_finished(shelf, &mut state);
            let most = self.most(shelf, &mut state);
            let surplus = state.sockets.len().saturating_sub(most);
            let closed: Vec<OwnedFd> = state.sockets.drain(..surplus).collect();
            drop(state);
            self.supply.stocked.fetch_sub(surplus, Ordering::Relaxed);
            drop(closed);
            self.want_if_low(v6);
        }
    }

    fn pop(&self, v6: bool) -> Option<OwnedFd> {
        let shelf = self.shelf(v6);
        let mut state = shelf.state.lock();
        let socket = state.sockets.pop()?;
        let now = (self.supply.now)();
        state.net.add(1.0, now);
        state.gross.add(1.0, now);
        let level = self.level(shelf, &mut state);
        let low = shelf.is_low(&state, level);
        drop(state);
        self.supply.stocked.fetch_sub(1, Ordering::Relaxed);
        if low {
            self.want(v6);
        }
        Some(socket)
    }

    fn want_if_low(&self, v6: bool) {
        let shelf = self.shelf(v6);
        let mut state = shelf.state.lock();
        let level = self.level(shelf, &mut state);
        let low = shelf.is_low(&state, level);
        drop(state);
        if low {
            self.want(v6);
        }
    }

    /// How many sockets are to be ready.
    fn level(&self, shelf: &Shelf, state: &mut ShelfState) -> usize {
        let lasting = state.net.per_second((self.supply.now)()) * LASTS_SECONDS;
        // A float to integer cast saturates.
        let lasting = lasting.ceil() as usize;
        shelf.floor.load(Ordering::Relaxed).max(lasting)
    }

    /// How many may be ready.
    fn most(&self, shelf: &Shelf, state: &mut ShelfState) -> usize {
        let burst = state.gross.per_second((self.supply.now)()) * BURST_SECONDS;
        // A float to integer cast saturates.
        self.level(shelf, state).max(burst.ceil() as usize)
    }

    fn want(&self, v6: bool) {
        self.supply.want(&self.owner, v6);
    }

    fn shelf(&self, v6: bool) -> &Shelf {
        if v6 { &self.v6 } else { &self.v4 }
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        let left = self.available(false) + self.available(true);
        self.supply.stocked.fetch_sub(left, Ordering::Relaxed);
    }
}

impl Shelf {
    fn new(floor: usize) -> Self {
        Self {
            floor: AtomicUsize::new(floor),
            state: Mutex::new(ShelfState {
                sockets: Vec::new(),
                finishing: Vec::new(),
                net: Rate::new(),
                gross: Rate::new(),
                waiting: 0,
                requested: false,
            }),
            filled: Notify::new(),
        }
    }

    fn is_low(&self, state: &ShelfState, level: usize) -> bool {
        let have = state.sockets.len();
        have < state.waiting || have < level.div_ceil(2)
    }
}

/// Counts a taker as waiting until dropped.
struct Waiting<'a>(&'a Shelf);

impl<'a> Waiting<'a> {
    fn new(shelf: &'a Shelf) -> Self {
        shelf.state.lock().waiting += 1;
        Self(shelf)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state.lock().waiting -= 1;
    }
}

/// An exponential average of events a second, never below zero.
#[derive(Debug)]
struct Rate {
    per_second: f64,
    at: Instant,
}

impl Rate {
    fn new() -> Self {
        Self {
            per_second: 0.0,
            at: Instant::now(),
        }
    }

    fn add(&mut self, events: f64, now: Instant) {
        let decayed = self.per_second(now);
        self.per_second = (decayed + events / RATE_WINDOW.as_secs_f64()).max(0.0);
    }

    fn per_second(&mut self, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.at);
        self.per_second *= (-elapsed.as_secs_f64() / RATE_WINDOW.as_secs_f64()).exp();
        self.at = now;
        self.per_second
    }
}

impl Supply {
    /// `descriptor_limit` is the process's own.
    pub fn new(descriptor_limit: u64, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            descriptor_limit: usize::try_from(descriptor_limit).unwrap_or(usize::MAX),
            open: process::open_descriptors,
            counted: Mutex::default(),
            now: Instant::now,
            stocked: AtomicUsize::new(0),
            wants: Mutex::default(),
            wanted: Notify::new(),
            metrics,
        })
    }

    /// Waits until a stock is low, and returns all that are.
    pub async fn wants(&self) -> Vec<Want> {
        loop {
            let wants = std::mem::take(&mut *self.wants.lock());
            if !wants.is_empty() {
                return wants.into_iter().collect();
            }
            self.wanted.notified().await;
        }
    }

    /// Sockets in all stocks.
    pub fn stocked(&self) -> usize {
        self.stocked.load(Ordering::Relaxed)
    }

    fn want(&self, owner: &Arc<str>, v6: bool) {
        let want = Want {
            owner: Arc::clone(owner),
            v6,
        };
        if self.wants.lock().insert(want) {
            self.wanted.notify_one();
        }
    }

    /// What was counted lately: asking the kernel costs several microseconds, and the bound is a rough one.
    fn open_descriptors(&self) -> usize {
        let now = (self.now)();
        let mut counted = self.counted.lock();
        match *counted {
            Some((at, count)) if now.saturating_duration_since(at) < COUNT_HOLDS => count,
            _ => {
                let count = (self.open)();
                *counted = Some((now, count));
                count
            }
        }
    }

    /// How many more sockets all stocks together may hold beyond their floors.
    fn room(&self) -> usize {
        let stocked = self.stocked();
        let elsewhere = self.open_descriptors().saturating_sub(stocked);
        let bound = self.descriptor_limit.saturating_sub(elsewhere) / 4;
        bound.saturating_sub(stocked)
    }
}

/// Metrics of all stocks.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    recycled: Counter,
    returned: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "broker_sockets_recycled",
            "Sockets that went back to their stock after use",
            metrics.recycled.clone(),
        );
        registry.register(
            "broker_sockets_returned",
            "Sockets given back after use, by what became of them",
            metrics.returned.clone(),
        );
        metrics
    }

    fn returned(&self, kept: bool) {
        if kept {
            self.recycled.inc();
        }
        let result = if kept { "kept" } else { "closed" };
        self.returned.get_or_create(&[("result", result)]).inc();
    }
}
