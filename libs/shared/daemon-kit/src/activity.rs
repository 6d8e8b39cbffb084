//! What a connection does at the moment, and since when: the clock of one that is slow or idle.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::handover::Handover;

/// What an idle connection gets to be closed in good order.
const LINGER: Duration = Duration::from_secs(1);
/// Longest piece of an answer that is handed over at once, bytes. An answer counts as running until its
/// last piece was taken, which HTTP/2 does without being able to write it.
const PIECE_BYTES: usize = 64 * 1024;

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The head of a request is awaited or arriving.
    Head,
    /// Requests run, this many.
    Busy(usize),
    /// Nothing arrives.
    Idle,
    /// It was idle for too long and is being closed.
    Leaving,
}

#[derive(Debug)]
pub(crate) struct Activity {
    head: Duration,
    idle: Duration,
    stalled: Duration,
    now: Mutex<Doing>,
}

#[derive(Debug)]
struct Doing {
    phase: Phase,
    /// When the phase has lasted too long; without meaning while busy.
    until: Instant,
    http2: bool,
    /// Since when its peer takes nothing of what is to be written.
    stopped: Option<Instant>,
}

impl Doing {
    /// Whether requests run, or the end of an answer is written still.
    fn is_busy(&self) -> bool {
        matches!(self.phase, Phase::Busy(_)) || self.phase == Phase::Idle && self.stopped.is_some()
    }
}

pub(crate) enum Look {
    Again(Instant),
    Idle(Instant),
    Over,
    Slow,
    Stalled,
}

impl Activity {
    /// `since`: when its first head was begun to be waited for.
    pub(crate) fn new(since: Instant, head: Duration, idle: Duration, stalled: Duration) -> Self {
        let until = since + head;
        let doing = Doing { phase: Phase::Head, until, http2: false, stopped: None };
        Self { head, idle, stalled, now: Mutex::new(doing) }
    }

    /// Whether what is to be written waits for the peer, from now on.
    pub(crate) fn write_waits(&self, waits: bool) {
        let mut doing = self.now.lock();
        let now = Instant::now();
        doing.stopped = waits.then_some(now);
        // The end of an answer stands with the connection after its request is over.
        if doing.phase == Phase::Idle {
            doing.until = now + self.idle;
        }
    }

    /// Since when its peer takes nothing of what is to be written.
    pub(crate) fn stopped(&self) -> Option<Instant> {
        self.now.lock().stopped
    }

    pub(crate) fn begin(self: &Arc<Self>, http2: bool) -> Running {
        let mut doing = self.now.lock();
        doing.http2 = http2;
        doing.phase = match doing.phase {
            Phase::Busy(running) => Phase::Busy(running + 1),
            _ => Phase::Busy(1),
        };
        Running(Arc::clone(self))
    }

    fn bytes_arrived(&self) {
        let mut doing = self.now.lock();
        // On HTTP/2 they may be the answer to a ping.
        if doing.phase == Phase::Idle && !doing.http2 {
            (doing.phase, doing.until) = (Phase::Head, Instant::now() + self.head);
        }
    }

    /// When the phase has lasted too long.
    pub(crate) fn until(&self) -> Option<Instant> {
        let doing = self.now.lock();
        (!doing.is_busy()).then_some(doing.until)
    }

    pub(crate) fn look(&self, now: Instant) -> Look {
        let mut doing = self.now.lock();
        if doing.is_busy() {
            // The end of an HTTP/2 request does not wake the connection: look again.
            return match doing.stopped.map(|since| since + self.stalled) {
                Some(at) if at <= now => Look::Stalled,
                at => Look::Again(at.unwrap_or(now + self.idle).min(now + self.idle)),
            };
        }
        if now < doing.until {
            return Look::Again(doing.until);
        }
        match doing.phase {
            Phase::Head => Look::Slow,
            Phase::Leaving => Look::Over,
            Phase::Idle | Phase::Busy(_) => {
                // On HTTP/2 ends of answers may wait for the room that their peer gives each, and the
                // connection is over by itself once they are written.
                let patience = if doing.http2 { self.stalled } else { LINGER };
                (doing.phase, doing.until) = (Phase::Leaving, now + patience);
                Look::Idle(doing.until)
            }
        }
    }
}

/// A request, until the last byte of its answer was taken or nobody wants it any more.
pub(crate) struct Running(Arc<Activity>);

impl Drop for Running {
    fn drop(&mut self) {
        let mut doing = self.0.now.lock();
        match doing.phase {
            Phase::Busy(running) if running > 1 => doing.phase = Phase::Busy(running - 1),
            _ => (doing.phase, doing.until) = (Phase::Idle, Instant::now() + self.0.idle),
        }
    }
}

/// An answer in pieces, and its request until the last of them was taken.
pub(crate) struct Answer {
    body: Body,
    /// What of the body's last frame was not handed over.
    rest: Bytes,
    /// Where its own window may be closed.
    handover: Option<Arc<Handover>>,
    _running: Running,
}

impl Answer {
    pub(crate) fn new(body: Body, running: Running) -> Self {
        Self { body, rest: Bytes::new(), handover: Handover::current(), _running: running }
    }

    fn next_piece(&mut self) -> Frame<Bytes> {
        self.handover.iter().for_each(|handover| handover.handed_over());
        Frame::data(self.rest.split_to(self.rest.len().min(PIECE_BYTES)))
    }
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.handover.iter().for_each(|handover| handover.asked());
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(self.next_piece())));
        }
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        let Poll::Ready(Some(Ok(frame))) = polled else { return polled };
        let long = frame.into_data().map(|bytes| self.rest = bytes);
        Poll::Ready(Some(Ok(long.map_or_else(|frame| frame, |()| self.next_piece()))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (mut hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint.set_lower(hint.lower().saturating_add(rest));
        hint
    }
}

/// A stream that tells when bytes arrive, and when none are taken.
pub(crate) struct Instrumented<T> {
    io: T,
    activity: Arc<Activity>,
    write_waits: bool,
}

impl<T> Instrumented<T> {
    pub(crate) fn new(io: T, activity: Arc<Activity>) -> Self {
        Self { io, activity, write_waits: false }
    }

    fn wrote<R>(&mut self, written: Poll<R>) -> Poll<R> {
        let waits = written.is_pending();
        if std::mem::replace(&mut self.write_waits, waits) != waits {
            self.activity.write_waits(waits);
        }
        written
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Instrumented<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.activity.bytes_arrived();
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Instrumented<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.wrote(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // TLS takes what it cannot write yet.
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.wrote(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
