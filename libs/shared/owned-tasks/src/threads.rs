//! Threads for streams: each has a runtime of its own that runs one task at a time, so that what a
//! token passes on its way wakes no other thread.

use std::cell::OnceCell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use pin_project_lite::pin_project;
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

thread_local! {
    static CURRENT: OnceCell<StreamThread> = const { OnceCell::new() };
}

/// Of so many turns on threads for streams one is timed.
const TIMED_EVERY: u64 = 64;
static TURNS: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds.
static LONGEST: AtomicU64 = AtomicU64::new(0);

/// The longest of the timed turns on threads for streams since the process began, in CPU time of its
/// thread: how long others waited for their cores does not count.
pub fn longest_poll() -> Duration {
    Duration::from_nanos(LONGEST.load(Ordering::Relaxed))
}

pin_project! {
    /// Work whose turns are timed now and then.
    #[derive(Debug)]
    pub struct Timed<W> {
        #[pin]
        work: W,
    }
}

/// Times the work's turns now and then, for [`longest_poll`].
pub fn timed<W: Future>(work: W) -> Timed<W> {
    Timed { work }
}

impl<W: Future> Future for Timed<W> {
    type Output = W::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<W::Output> {
        let work = self.project().work;
        if !TURNS.fetch_add(1, Ordering::Relaxed).is_multiple_of(TIMED_EVERY) {
            return work.poll(cx);
        }
        let before = cpu_time();
        let polled = work.poll(cx);
        if let (Some(before), Some(after)) = (before, cpu_time()) {
            let took = after.saturating_sub(before).as_nanos();
            LONGEST.fetch_max(u64::try_from(took).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        polled
    }
}

/// Of this thread.
fn cpu_time() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

/// How long one task may work on before others on its thread have a turn.
const LONGEST_TURN: Duration = Duration::from_micros(500);

/// A turn of a task that may have much to do.
#[derive(Debug)]
pub struct Turn(Instant);

impl Turn {
    pub fn begin() -> Self {
        Self(Instant::now())
    }

    /// It has lasted long enough.
    pub fn is_long(&self) -> bool {
        self.0.elapsed() >= LONGEST_TURN
    }

    /// Lets others on this thread have theirs, where it is long.
    pub async fn rest(&mut self) {
        if self.is_long() {
            tokio::task::yield_now().await;
            *self = Self::begin();
        }
    }

    /// Waits for something to do. Where there is nothing yet, others have their turns meanwhile, and this
    /// one begins when there is.
    pub async fn wait<T>(&mut self, work: impl Future<Output = T>) -> T {
        let (mut work, mut has_waited) = (pin!(work), false);
        let done = poll_fn(|cx| {
            // Only then others have had theirs.
            if has_waited {
                self.0 = Instant::now();
            }
            let polled = work.as_mut().poll(cx);
            has_waited = polled.is_pending();
            polled
        });
        done.await
    }
}

/// The threads of a daemon. When the last clone goes they end, and what still runs on them with them.
#[derive(Debug, Clone)]
pub struct StreamThreads {
    threads: Arc<[StreamThread]>,
    _stop: Arc<DropGuard>,
}

/// One of them. It does not keep it running.
#[derive(Debug, Clone)]
pub struct StreamThread {
    index: usize,
    handle: Handle,
    open: Arc<AtomicUsize>,
}

/// Counts for the load of a thread until it is dropped.
#[derive(Debug)]
pub struct Load(Arc<AtomicUsize>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl StreamThreads {
    /// Starts so many threads, at least one. Errors: the system's, of making a thread or a runtime.
    pub fn start(count: usize) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let threads: io::Result<Vec<StreamThread>> =
            (0..count.max(1)).map(|index| StreamThread::start(index, stop.clone())).collect();
        let guard = stop.drop_guard();
        Ok(Self { threads: threads?.into(), _stop: Arc::new(guard) })
    }

    /// The one with the fewest connections and streams.
    pub fn least_loaded(&self) -> &StreamThread {
        let open = |thread: &&StreamThread| thread.open.load(Ordering::Relaxed);
        self.threads.iter().min_by_key(open).expect("there is at least one")
    }

    /// In the order of their index.
    pub fn iter(&self) -> impl Iterator<Item = &StreamThread> {
        self.threads.iter()
    }

    pub fn first(&self) -> &StreamThread {
        &self.threads[0]
    }

    /// The thread that this runs on, or where that is no thread for streams the least loaded one.
    pub fn here(&self) -> StreamThread {
        StreamThread::current().unwrap_or_else(|| self.least_loaded().clone())
    }
}

impl StreamThread {
    fn start(index: usize, stop: CancellationToken) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let thread = Self { index, handle: runtime.handle().clone(), open: Arc::default() };
        let own = thread.clone();
        let run = move || {
            CURRENT.with(|current| drop(current.set(own)));
            runtime.block_on(stop.cancelled());
            // A blocking call that hangs does not delay the daemon's end.
            runtime.shutdown_background();
        };
        std::thread::Builder::new().name(format!("streams-{index}")).spawn(run)?;
        Ok(thread)
    }

    /// The one that this runs on.
    pub fn current() -> Option<Self> {
        CURRENT.with(|current| current.get().cloned())
    }

    /// From 0 on, in the order of their start.
    pub fn index(&self) -> usize {
        self.index
    }

    /// What is spawned on it runs there.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// A connection or a stream more.
    pub fn load(&self) -> Load {
        self.open.fetch_add(1, Ordering::Relaxed);
        Load(Arc::clone(&self.open))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn index_on(thread: &StreamThread) -> Option<usize> {
        let look = async { StreamThread::current().map(|current| current.index()) };
        thread.handle().spawn(look).await.unwrap()
    }

    // CLOUD-1960
    #[tokio::test]
    async fn what_is_spawned_on_a_thread_runs_there_and_loads_go_to_the_least_loaded() {
        let threads = StreamThreads::start(2).unwrap();
        assert!(StreamThread::current().is_none(), "this is none of them");
        let first = threads.least_loaded().clone();
        let load = first.load();
        let second = threads.least_loaded().clone();
        assert_eq!((first.index(), second.index()), (0, 1));
        let more = [second.load(), second.load()];
        assert_eq!(threads.here().index(), 0);
        drop(more);
        assert_eq!(threads.here().index(), 1);
        drop(load);
        assert_eq!((index_on(&first).await, index_on(&second).await), (Some(0), Some(1)));
    }

    // CLOUD-1961
    #[tokio::test]
    async fn a_turn_that_takes_long_is_seen_and_one_that_waits_is_not() {
        for _ in 0..TIMED_EVERY {
            timed(async { std::thread::sleep(Duration::from_millis(1)) }).await;
        }
        assert!(longest_poll() < Duration::from_millis(50), "{:?}", longest_poll());
        // Others may take the turns that are timed.
        for _ in 0..20 * TIMED_EVERY {
            if longest_poll() >= Duration::from_millis(3) {
                break;
            }
            let begun = cpu_time().unwrap();
            timed(async { while cpu_time().unwrap() < begun + Duration::from_millis(3) {} }).await;
        }
        assert!(longest_poll() >= Duration::from_millis(3), "{:?}", longest_poll());
    }

    // CLOUD-1961
    #[tokio::test]
    async fn others_have_their_turns_while_one_has_much_to_do() {
        let others = std::rc::Rc::new(std::cell::Cell::new(0));
        let work = async {
            let mut turn = Turn::begin();
            for _ in 0..5 {
                let begun = Instant::now();
                while begun.elapsed() < LONGEST_TURN {}
                turn.rest().await;
            }
            assert!(!turn.is_long(), "it has begun anew");
            while !turn.is_long() {}
            turn.wait(std::future::ready(())).await;
            assert!(turn.is_long(), "nobody had a turn");
            turn.wait(tokio::task::yield_now()).await;
            assert!(!turn.is_long(), "others had theirs");
            others.get()
        };
        let count = async {
            loop {
                others.set(others.get() + 1);
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            had = work => assert!(had >= 4, "{had}"),
            () = count => {}
        }
    }

    // CLOUD-1960
    #[tokio::test]
    async fn with_the_last_clone_what_runs_on_them_ends() {
        let threads = StreamThreads::start(1).unwrap();
        let running = threads.least_loaded().handle().spawn(std::future::pending::<()>());
        drop(threads);
        assert!(running.await.unwrap_err().is_cancelled());
    }
}
