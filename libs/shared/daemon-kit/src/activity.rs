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

/// What an idle connection gets to be closed in good order.
const LINGER: Duration = Duration::from_secs(1);

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

pub(crate) enum Look {
    Again(Instant),
    Idle(Instant),
    Over,
    Slow,
    Stalled,
}

impl Activity {
    pub(crate) fn new(head: Duration, idle: Duration, stalled: Duration) -> Self {
        let until = Instant::now() + head;
        let doing = Doing { phase: Phase::Head, until, http2: false, stopped: None };
        Self { head, idle, stalled, now: Mutex::new(doing) }
    }

    /// Whether what is to be written waits for the peer, from now on.
    pub(crate) fn write_waits(&self, waits: bool) {
        self.now.lock().stopped = waits.then(Instant::now);
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
        (!matches!(doing.phase, Phase::Busy(_))).then_some(doing.until)
    }

    pub(crate) fn look(&self, now: Instant) -> Look {
        let mut doing = self.now.lock();
        match doing.phase {
            // The end of an HTTP/2 request does not wake the connection: look again.
            Phase::Busy(_) => match doing.stopped.map(|since| since + self.stalled) {
                Some(at) if at <= now => Look::Stalled,
                at => Look::Again(at.unwrap_or(now + self.idle).min(now + self.idle)),
            },
            _ if now < doing.until => Look::Again(doing.until),
            Phase::Head => Look::Slow,
            Phase::Leaving => Look::Over,
            Phase::Idle => {
                (doing.phase, doing.until) = (Phase::Leaving, now + LINGER);
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

pub(crate) struct Answer {
    pub(crate) body: Body,
    /// Absent where the size is known.
    pub(crate) _running: Option<Running>,
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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
        Pin::new(&mut self.io).poll_flush(cx)
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
