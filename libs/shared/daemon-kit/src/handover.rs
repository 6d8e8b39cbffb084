//! Answers over HTTP/2 of which their peer takes nothing.
//!
//! There each answer has a window of its own: a peer that leaves it closed takes all other bytes of the
//! connection, which therefore sees nothing. What shows it is that the next piece of an answer is not
//! asked for. Such an answer alone is ended, and its connection goes on.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::connections::Counts;

tokio::task_local! {
    /// Of the request that is polled.
    static CURRENT: Arc<Handover>;
}

/// Since when a piece of an answer was handed over and none was asked for.
#[derive(Debug, Default)]
pub(crate) struct Handover(Mutex<Option<Instant>>);

impl Handover {
    /// That of the request whose answer is made here; nothing where its connection bounds it.
    pub(crate) fn current() -> Option<Arc<Self>> {
        CURRENT.try_with(Arc::clone).ok()
    }

    pub(crate) fn asked(&self) {
        *self.0.lock() = None;
    }

    pub(crate) fn handed_over(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    fn since(&self) -> Option<Instant> {
        *self.0.lock()
    }
}

/// A request with its answer, until its peer has taken nothing of it for so long.
pub(crate) struct Bounded<F> {
    work: Pin<Box<F>>,
    handover: Arc<Handover>,
    stalled: Duration,
    /// Only where a piece waits.
    clock: Option<Pin<Box<Sleep>>>,
    counts: Arc<Counts>,
}

impl<F> Bounded<F> {
    pub(crate) fn new(work: F, stalled: Duration, counts: Arc<Counts>) -> Self {
        Self { work: Box::pin(work), handover: Arc::default(), stalled, clock: None, counts }
    }
}

impl<F: Future<Output = ()>> Future for Bounded<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let work = this.work.as_mut();
        if CURRENT.sync_scope(Arc::clone(&this.handover), || work.poll(cx)).is_ready() {
            return Poll::Ready(());
        }
        loop {
            let Some(since) = this.handover.since() else {
                this.clock = None;
                return Poll::Pending;
            };
            let due = since + this.stalled;
            let clock = this.clock.get_or_insert_with(|| Box::pin(sleep_until(due)));
            ready!(clock.as_mut().poll(cx));
            if Instant::now() >= due {
                this.counts.stalled.fetch_add(1, Ordering::Relaxed);
                tracing::debug!("nothing of an answer over HTTP/2 was taken for long");
                return Poll::Ready(());
            }
            clock.as_mut().reset(due);
        }
    }
}
