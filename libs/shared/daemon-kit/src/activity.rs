//! What a connection does at the moment, and since when: the clock of one that is slow or idle.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::handover::Handover;

/// What an idle connection gets to be closed in good order.
const LINGER: Duration = Duration::from_secs(1);
/// Longest piece of an answer that is handed over at once, bytes. An answer counts as running until its
/// last piece was taken, which HTTP/2 does without being able to write it.
const PIECE_BYTES: usize = 64 * 1024;

/// How long a peer's end is held back before its request has to have come whole.
const BODY_ON_ITS_WAY: Duration = Duration::from_secs(1);

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

/// What becomes of the answer to a request whose peer has ended its side of the connection. In the extensions
/// of each request.
#[derive(Debug, Clone)]
pub struct PeerEnd(Arc<Activity>);

impl PeerEnd {
    /// Whoever ends its side of the connection has left, as one that is gone altogether: nobody waits for
    /// the answer. Else it is answered.
    pub fn is_departure(&self) {
        let mut doing = self.0.now.lock();
        doing.answers_after_end = false;
        doing.wake_reader();
    }
}

#[derive(Debug)]
struct Doing {
    phase: Phase,
    /// When the phase has lasted too long; without meaning while busy.
    until: Instant,
    http2: bool,
    /// Since when its peer takes nothing of what is to be written.
    stopped: Option<Instant>,
    /// The running request is answered also when its peer has ended its side, on HTTP/1.
    answers_after_end: bool,
    /// The running request was read to its end.
    is_read: bool,
    /// Of whoever is not told of its peer's end yet.
    reader: Option<Waker>,
}

impl Doing {
    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// Whether requests run, or the end of an answer is written still.
    fn is_busy(&self) -> bool {
        matches!(self.phase, Phase::Busy(_)) || self.phase == Phase::Idle && self.stopped.is_some()
    }
}

/// What to do at the peer's end.
enum AtEnd {
    Close,
    /// The request may have come whole, and not be read yet.
    Wait,
    Answer,
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
        let doing = Doing {
            phase: Phase::Head,
            until,
            http2: false,
            stopped: None,
            answers_after_end: false,
            is_read: false,
            reader: None,
        };
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
        doing.answers_after_end = false;
        doing.phase = match doing.phase {
            Phase::Busy(running) => Phase::Busy(running + 1),
            _ => Phase::Busy(1),
        };
        Running(Arc::clone(self))
    }

    /// The request that begins is answered also when its peer has ended its side of the connection.
    /// `is_read`: nothing more of it comes.
    pub(crate) fn answer_after_end(self: &Arc<Self>, is_read: bool) -> PeerEnd {
        let mut doing = self.now.lock();
        (doing.answers_after_end, doing.is_read) = (true, is_read);
        PeerEnd(Arc::clone(self))
    }

    fn request_read(&self) {
        self.now.lock().is_read = true;
    }

    /// The peer has ended its side.
    fn at_end(&self, reader: &Waker) -> AtEnd {
        let mut doing = self.now.lock();
        if !matches!(doing.phase, Phase::Busy(_)) || !doing.answers_after_end || doing.http2 {
            return AtEnd::Close;
        }
        doing.reader = Some(reader.clone());
        if doing.is_read { AtEnd::Answer } else { AtEnd::Wait }
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
        doing.wake_reader();
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

/// The body of a request that tells when it was read to its end.
pub(crate) struct ReadBody {
    body: Incoming,
    activity: Arc<Activity>,
}

impl ReadBody {
    pub(crate) fn new(body: Incoming, activity: Arc<Activity>) -> Self {
        Self { body, activity }
    }
}

impl hyper::body::Body for ReadBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if matches!(polled, Poll::Ready(None)) || self.body.is_end_stream() {
            self.activity.request_read();
        }
        polled
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
    /// Once its peer's end was held back.
    end_after: Option<Pin<Box<Sleep>>>,
}

impl<T> Instrumented<T> {
    pub(crate) fn new(io: T, activity: Arc<Activity>) -> Self {
        Self { io, activity, write_waits: false, end_after: None }
    }

    /// The peer has ended its side, which is told once nothing runs that it may wait for. Whether it is gone
    /// altogether the next piece for it shows.
    fn end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.activity.at_end(cx.waker()) {
            AtEnd::Close => Poll::Ready(Ok(())),
            AtEnd::Answer => Poll::Pending,
            AtEnd::Wait => {
                let wait = self.end_after.get_or_insert_with(|| Box::pin(sleep(BODY_ON_ITS_WAY)));
                wait.as_mut().poll(cx).map(Ok)
            }
        }
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
        } else if matches!(polled, Poll::Ready(Ok(()))) && buf.remaining() > 0 {
            return self.end(cx);
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
