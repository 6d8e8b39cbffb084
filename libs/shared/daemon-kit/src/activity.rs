//! What a connection does at the moment, and since when: the clock of one that is slow or idle.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::http::Request;
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
/// How long after its peer's end a request may take to have come whole.
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

#[derive(Debug)]
struct Doing {
    phase: Phase,
    /// When the phase has lasted too long; without meaning while busy.
    until: Instant,
    http2: bool,
    /// Since when its peer takes nothing of what is to be written.
    stopped: Option<Instant>,
    /// Of the request that began last, on HTTP/1 the only one.
    last: Last,
    /// Of whoever is not told of its peer's end yet.
    reader: Option<Waker>,
}

#[derive(Debug, Default)]
struct Last {
    number: u64,
    /// Its answer is still waited for when its peer has ended its side.
    answered_after_end: bool,
    /// Nothing more of it comes, or is asked for.
    is_read: bool,
}

/// What to do at the peer's end.
enum AtEnd {
    Close,
    /// The request of this number may have come whole, and not be read yet.
    Wait(u64),
    Answer,
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
        let (last, reader) = (Last::default(), None);
        let doing = Doing { phase: Phase::Head, until, http2: false, stopped: None, last, reader };
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
            doing.wake_reader();
        }
    }

    /// Since when its peer takes nothing of what is to be written.
    pub(crate) fn stopped(&self) -> Option<Instant> {
        self.now.lock().stopped
    }

    pub(crate) fn begin(self: &Arc<Self>, http2: bool) -> Running {
        let mut doing = self.now.lock();
        doing.http2 = http2;
        doing.last = Last { number: doing.last.number + 1, ..Last::default() };
        doing.phase = match doing.phase {
            Phase::Busy(running) => Phase::Busy(running + 1),
            _ => Phase::Busy(1),
        };
        Running(Arc::clone(self))
    }

    /// The request that has just begun is answered also when its peer has ended its side of the connection.
    /// Returns the request with what is to be told of that.
    pub(crate) fn answer_after_end(self: &Arc<Self>, mut request: Request<Incoming>) -> Request<ReadBody> {
        let number = {
            let mut doing = self.now.lock();
            doing.last.answered_after_end = true;
            doing.last.is_read = request.body().is_end_stream();
            doing.last.number
        };
        let end = PeerEnd { activity: Arc::clone(self), number };
        request.extensions_mut().insert(end.clone());
        request.map(|body| ReadBody { body, end: Some(end) })
    }

    /// The peer has ended its side.
    fn at_end(&self, reader: &Waker) -> AtEnd {
        let mut doing = self.now.lock();
        if doing.http2 || !doing.last.answered_after_end || !doing.is_busy() {
            return AtEnd::Close;
        }
        doing.reader = Some(reader.clone());
        if doing.last.is_read || doing.phase == Phase::Idle {
            return AtEnd::Answer;
        }
        AtEnd::Wait(doing.last.number)
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

/// What becomes of the answer to a request whose peer has ended its side of the connection. In the extensions
/// of each that is answered then.
#[derive(Debug, Clone)]
pub struct PeerEnd {
    activity: Arc<Activity>,
    number: u64,
}

impl PeerEnd {
    /// Whoever ends its side of the connection has left, as one that is gone altogether: nobody waits for the
    /// answer.
    pub fn is_departure(&self) {
        self.change(|last| last.answered_after_end = false);
    }

    fn change(&self, change: impl FnOnce(&mut Last)) {
        let mut doing = self.activity.now.lock();
        if doing.last.number == self.number {
            change(&mut doing.last);
            doing.wake_reader();
        }
    }
}

/// The body of a request that tells when nothing more of it comes, or is asked for.
pub(crate) struct ReadBody {
    body: Incoming,
    /// Absent where nobody is to be told.
    end: Option<PeerEnd>,
}

impl From<Incoming> for ReadBody {
    fn from(body: Incoming) -> Self {
        Self { body, end: None }
    }
}

impl ReadBody {
    fn read(&mut self) {
        if let Some(end) = self.end.take() {
            end.change(|last| last.is_read = true);
        }
    }
}

impl Drop for ReadBody {
    fn drop(&mut self) {
        self.read();
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
            self.read();
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
    /// When the request of this number has to have come whole, once its peer has ended its side.
    whole_by: Option<(u64, Pin<Box<Sleep>>)>,
}

impl<T> Instrumented<T> {
    pub(crate) fn new(io: T, activity: Arc<Activity>) -> Self {
        Self { io, activity, write_waits: false, whole_by: None }
    }

    /// The peer has ended its side, which is told once nothing runs that it may wait for. Whether it is gone
    /// altogether the next pieces for it show.
    fn at_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.activity.at_end(cx.waker()) {
            AtEnd::Close => Poll::Ready(Ok(())),
            AtEnd::Answer => Poll::Pending,
            AtEnd::Wait(number) => {
                let before = self.whole_by.take().filter(|(of, _)| *of == number);
                let begin = || (number, Box::pin(sleep(BODY_ON_ITS_WAY)));
                let (_, whole_by) = self.whole_by.insert(before.unwrap_or_else(begin));
                whole_by.as_mut().poll(cx).map(Ok)
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
            return self.at_end(cx);
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
