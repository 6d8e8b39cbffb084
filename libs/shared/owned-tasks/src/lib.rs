//! Tasks and threads with an owner, so that no panic ends one unseen.
//!
//! A daemon spawns through this crate only; `cargo xtask tidy` finds what does not. A *loop* lives
//! as long as the daemon or as what it watches: it is started again when it panics, and until it
//! runs well whoever reads [`Loops::problem`], or is told, shows what it watched as not ready. A
//! *task* ends by itself: its panic is a value ([`Panicked`]) for whoever waits for it. Either way
//! the panic is logged here, once.

mod threads;
mod worker;

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::FutureExt;
use parking_lot::Mutex;
use pool_registry_types::Backoff;
use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

pub use crate::threads::{Load, StreamThread, StreamThreads, Turn, longest_poll, timed};
pub use crate::worker::{NotDone, Worker};

/// Before a loop is started again, by how often it has panicked and has not run well since.
const PAUSES: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
/// A loop that was started again is well once it has run for this long.
const WELL_AFTER: Duration = Duration::from_secs(5);
/// Characters of a panic's message that are kept.
const LONGEST_MESSAGE: usize = 400;

/// Work that panicked. What is shown of it does not hold the panic's message, which may quote what was
/// worked on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a defect in: {name}; see the log")]
pub struct Panicked {
    pub name: &'static str,
    /// For the log only; at most 400 characters.
    pub message: String,
}

impl Panicked {
    fn of(name: &'static str, payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let message = text.unwrap_or("a panic without a message").chars().take(LONGEST_MESSAGE).collect();
        Self { name, message }
    }

    /// The same panic again, for an owner further up.
    pub fn resume(self) -> ! {
        std::panic::resume_unwind(Box::new(self.message))
    }
}

/// Why there is no result of work that runs by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfinished {
    #[error(transparent)]
    Panicked(Panicked),
    /// The runtime that it ran on has ended before, as at the end of a daemon: no defect.
    #[error("{0}: cut off, what it ran on has ended")]
    CutOff(&'static str),
}

// What wraps work is no `async fn`: such a one keeps what it was called with beside what it awaits, so
// that each layer doubles the size of a task. Seen: a relay of 46 KB, of which less than 1 KB was its own.

fn catch<T>(name: &'static str, work: impl Future<Output = T>) -> impl Future<Output = Result<T, Panicked>> {
    let caught = AssertUnwindSafe(work).catch_unwind();
    caught.map(move |outcome| outcome.map_err(|payload| Panicked::of(name, &*payload)))
}

// ---- tasks ----

/// Awaits the work here. Its panic is logged and returned, for work whose outcome somebody waits for.
pub fn caught<T>(
    name: &'static str,
    work: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Panicked>> {
    catch(name, work).map(|outcome| outcome.inspect_err(log_task))
}

fn log_task(panicked: &Panicked) {
    tracing::error!(task = panicked.name, reason = panicked.message, "a task has panicked");
}

/// Spawns work that ends by itself and that nobody waits for, but the tracker at the end.
pub fn task(tracker: &TaskTracker, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
    // It is logged, and there is nobody else to tell.
    tracker.spawn(caught(name, Box::pin(work)).map(drop));
}

/// The same on a thread for streams, where it counts as one.
pub fn task_on(
    tracker: &TaskTracker,
    thread: &StreamThread,
    name: &'static str,
    work: impl Future<Output = ()> + Send + 'static,
) {
    let load = thread.load();
    // It is logged, and there is nobody else to tell.
    let work = timed(caught(name, Box::pin(work))).map(move |_| drop(load));
    tracker.spawn_on(work, thread.handle());
}

/// Runs work on another runtime. What is returned awaits it; dropped, the work ends there too.
pub fn elsewhere<T: Send + 'static>(
    runtime: &Handle,
    name: &'static str,
    work: impl Future<Output = T> + Send + 'static,
) -> Awaited<AbortOnDropHandle<Result<T, Panicked>>> {
    Awaited { name, running: AbortOnDropHandle::new(runtime.spawn(caught(name, work))) }
}

/// Awaits work that runs by itself, by its handle.
#[derive(Debug)]
pub struct Awaited<H> {
    name: &'static str,
    running: H,
}

impl<T, H: Future<Output = Result<Result<T, Panicked>, JoinError>> + Unpin> Future for Awaited<H> {
    type Output = Result<T, Unfinished>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let name = self.name;
        self.running.poll_unpin(cx).map(|ended| match ended {
            Ok(result) => result.map_err(Unfinished::Panicked),
            // Its panics are caught: it was cancelled.
            Err(_) => Err(Unfinished::CutOff(name)),
        })
    }
}

/// Spawns work whose end the handle's holder looks at: a panic is logged here and is the handle's
/// error too.
pub fn watched<T: Send + 'static>(
    name: &'static str,
    work: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    watched_on(&Handle::current(), name, work)
}

/// The same on another runtime.
pub fn watched_on<T: Send + 'static>(
    runtime: &Handle,
    name: &'static str,
    work: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    runtime.spawn(caught(name, work).map(|outcome| outcome.unwrap_or_else(|panicked| panicked.resume())))
}

/// Begins work that is done to its end also when whoever awaits it has gone. What is returned awaits it.
pub fn uninterrupted<T: Send + 'static>(
    name: &'static str,
    work: impl Future<Output = T> + Send + 'static,
) -> Awaited<JoinHandle<Result<T, Panicked>>> {
    Awaited { name, running: tokio::spawn(caught(name, Box::pin(work))) }
}

/// Work that waits for a disk or reckons for long, on a thread that may. Dropped, it runs on. Where no
/// thread came to it before the runtime ended, this never resolves: whoever awaits it ends with the runtime.
pub async fn blocking<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Panicked> {
    match unblocked(name, tokio::task::spawn_blocking(work).await) {
        Ok(done) => Ok(done),
        Err(Unfinished::Panicked(panicked)) => Err(panicked),
        Err(Unfinished::CutOff(_)) => std::future::pending().await,
    }
}

/// The same on a thread of another runtime's, which may end before the one of whoever awaits it.
pub async fn blocking_on<T: Send + 'static>(
    runtime: &Handle,
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unfinished> {
    unblocked(name, runtime.spawn_blocking(work).await)
}

fn unblocked<T>(name: &'static str, ended: Result<T, JoinError>) -> Result<T, Unfinished> {
    ended.map_err(|error| match error.try_into_panic() {
        Ok(payload) => {
            let panicked = Panicked::of(name, &*payload);
            log_task(&panicked);
            Unfinished::Panicked(panicked)
        }
        Err(_) => Unfinished::CutOff(name),
    })
}

// ---- loops ----

/// Runs what `make` makes until it ends by itself. When it panics `send` hears of it at once, and it
/// is made anew after a pause, unless `stop` comes first; `send` hears `None` when it runs well again.
pub async fn keep<L: Future<Output = ()>>(
    name: &'static str,
    stop: &CancellationToken,
    mut make: impl FnMut() -> L,
    mut send: impl FnMut(Option<&Panicked>),
) {
    let (mut panics, mut is_down) = (0_u32, false);
    loop {
        // Making it may panic too.
        let work = async {
            let made = make();
            made.await
        };
        let mut running = std::pin::pin!(catch(name, work));
        let mut ended = None;
        if is_down {
            ended = timeout(WELL_AFTER, running.as_mut()).await.ok();
            if !matches!(ended, Some(Err(_))) {
                panics = 0;
                send(None);
            }
        }
        let ended = match ended {
            Some(ended) => ended,
            None => running.await,
        };
        let Err(panicked) = ended else { return };
        let pause = PAUSES.after(panics);
        panics = panics.saturating_add(1);
        log_loop(&panicked, pause);
        is_down = true;
        send(Some(&panicked));
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause) => {}
        }
    }
}

fn log_loop(panicked: &Panicked, pause: Duration) {
    let pause_ms = pause.as_millis();
    tracing::error!(
        task = panicked.name,
        reason = panicked.message,
        pause_ms,
        "a loop has panicked and is started again"
    );
}

/// The loops that a whole daemon needs, and which of them are down. Cheap to copy: one for each
/// process.
#[derive(Debug, Clone, Default)]
pub struct Loops(Arc<Mutex<BTreeMap<&'static str, usize>>>);

/// One loop that is down, for as long as this lives.
struct Down {
    loops: Loops,
    name: &'static str,
}

impl Drop for Down {
    fn drop(&mut self) {
        let mut down = self.loops.0.lock();
        match down.get_mut(self.name) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(down.remove(self.name)),
        }
    }
}

impl Loops {
    fn down(&self, name: &'static str) -> Down {
        *self.0.lock().entry(name).or_default() += 1;
        Down { loops: self.clone(), name }
    }

    /// Why the daemon is not ready: its loops that have panicked and do not run well again.
    pub fn problem(&self) -> Option<String> {
        let down = self.0.lock();
        let names: Vec<&str> = down.keys().copied().collect();
        (!names.is_empty()).then(|| format!("a defect in: {}; started again, see the log", names.join(", ")))
    }

    /// [`keep`], with this telling what is down.
    pub async fn keep<L: Future<Output = ()>>(
        &self,
        name: &'static str,
        stop: &CancellationToken,
        make: impl FnMut() -> L,
    ) {
        let mut down = None;
        let send = |panicked: Option<&Panicked>| match panicked {
            Some(_) => {
                down.get_or_insert_with(|| self.down(name));
            }
            None => down = None,
        };
        keep(name, stop, make, send).await;
    }

    /// Spawns [`Self::keep`].
    pub fn start<L: Future<Output = ()> + Send + 'static>(
        &self,
        tracker: &TaskTracker,
        name: &'static str,
        stop: &CancellationToken,
        make: impl FnMut() -> L + Send + 'static,
    ) -> JoinHandle<()> {
        let (loops, stop) = (self.clone(), stop.clone());
        tracker.spawn(async move { loops.keep(name, &stop, make).await })
    }

    /// Runs `work` on a thread of its own until it returns, and again after a pause when it panics.
    /// Nobody joins the thread. It counts as up from the moment at which it is started again.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn thread(&self, name: &'static str, mut work: impl FnMut() + Send + 'static) -> std::io::Result<()> {
        let loops = self.clone();
        let run = move || {
            let mut panics = 0_u32;
            loop {
                let started = Instant::now();
                let Err(payload) = catch_unwind(AssertUnwindSafe(&mut work)) else { return };
                if started.elapsed() >= WELL_AFTER {
                    panics = 0;
                }
                let pause = PAUSES.after(panics);
                panics = panics.saturating_add(1);
                let _down = loops.down(name);
                log_loop(&Panicked::of(name, &*payload), pause);
                std::thread::sleep(pause);
            }
        };
        std::thread::Builder::new().name(name.into()).spawn(run).map(drop)
    }
}

/// Spawns [`keep`], for a loop whose owner shows by itself what is not ready.
pub fn start<L: Future<Output = ()> + Send + 'static>(
    tracker: &TaskTracker,
    name: &'static str,
    stop: &CancellationToken,
    make: impl FnMut() -> L + Send + 'static,
    send: impl FnMut(Option<&Panicked>) + Send + 'static,
) {
    let stop = stop.clone();
    tracker.spawn(async move { keep(name, &stop, make, send).await });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;

    use tokio::sync::Notify;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Waits in small steps, under whichever clock there is.
    async fn until(what: &str, is: impl Fn() -> bool) {
        let waiting = async {
            while !is() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(timeout(PATIENCE, waiting).await.is_ok(), "{what}");
    }

    // CLOUD-2918
    #[test]
    fn work_that_no_thread_came_to_before_its_runtime_ended_has_not_panicked() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let handle = runtime.handle().clone();
        runtime.shutdown_background();
        let _entered = handle.enter();
        assert_eq!(blocking("a look", || ()).now_or_never(), None);
        let elsewhere = blocking_on(&handle, "a look", || ()).now_or_never();
        assert_eq!(elsewhere, Some(Err(Unfinished::CutOff("a look"))));
    }

    // CLOUD-1145
    #[tokio::test(start_paused = true)]
    async fn a_loop_that_panics_is_down_at_once_started_again_and_well_after_a_while() {
        let (loops, tracker, stop) = (Loops::default(), TaskTracker::new(), CancellationToken::new());
        let starts = Arc::new(AtomicU32::new(0));
        let (count, ended) = (Arc::clone(&starts), stop.clone());
        let make = move || {
            let (nth, ended) = (count.fetch_add(1, Ordering::Relaxed), ended.clone());
            async move {
                assert!(nth >= 2, "start {nth}");
                ended.cancelled().await;
            }
        };
        let began = tokio::time::Instant::now();
        let handle = loops.start(&tracker, "the watch", &stop, make);
        until("it is down", || loops.problem().is_some()).await;
        assert!(loops.problem().is_some_and(|why| why.contains("the watch")), "{loops:?}");
        until("it is started again", || starts.load(Ordering::Relaxed) == 3).await;
        assert!(began.elapsed() >= Duration::from_millis(600), "a pause, and one of twice its length");
        assert!(loops.problem().is_some(), "it has not proven itself yet");
        until("it is well", || loops.problem().is_none()).await;
        assert!(began.elapsed() >= WELL_AFTER);
        stop.cancel();
        tracker.close();
        assert!(timeout(PATIENCE, tracker.wait()).await.is_ok(), "the stop ends it");
        assert!(timeout(PATIENCE, handle).await.is_ok());
        assert_eq!(starts.load(Ordering::Relaxed), 3);
    }

    // CLOUD-1145
    #[tokio::test(start_paused = true)]
    async fn whoever_watches_hears_of_the_panic_and_the_stop_ends_the_pause() {
        async fn fails() {
            panic!("number {}", 7)
        }
        let stop = CancellationToken::new();
        let (mut heard, mut starts) = (Vec::new(), 0);
        let make = || {
            starts += 1;
            fails()
        };
        let send = |panicked: Option<&Panicked>| {
            heard.push(panicked.cloned());
            if heard.len() == 8 {
                stop.cancel();
            }
        };
        let began = tokio::time::Instant::now();
        keep("a loop", &stop, make, send).await;
        assert_eq!(starts, 8);
        let all = heard.iter().map(|panicked| panicked.as_ref().expect("it is never well"));
        assert!(all.clone().all(|panicked| panicked.message == "number 7" && panicked.name == "a loop"));
        assert!(all.clone().all(|panicked| !panicked.to_string().contains('7')), "only the log has its text");
        // 0.2 + 0.4 + 0.8 + 1.6 + 3.2 + 5 + 5, and none after the stop.
        let paused = began.elapsed();
        assert!(paused >= Duration::from_millis(16_200) && paused < Duration::from_secs(17), "{paused:?}");
    }

    // CLOUD-1145
    #[tokio::test]
    async fn what_a_loop_receives_by_is_kept_over_a_panic() {
        let (send, receive) = tokio::sync::mpsc::channel(4);
        let receive = Arc::new(tokio::sync::Mutex::new(receive));
        let taken = Arc::new(Mutex::new(Vec::new()));
        for n in [1, 0, 2] {
            send.send(n).await.unwrap();
        }
        drop(send);
        let make = || {
            let (receive, taken) = (Arc::clone(&receive), Arc::clone(&taken));
            async move {
                while let Some(n) = receive.lock().await.recv().await {
                    taken.lock().push(10 / n);
                }
            }
        };
        keep("a reader", &CancellationToken::new(), make, |_| {}).await;
        assert_eq!(*taken.lock(), [10, 5], "but for the one that it cannot take");
    }

    // CLOUD-1145
    #[tokio::test]
    async fn whoever_waits_for_a_task_that_panics_has_an_answer() {
        async fn divides(by: u32) -> Result<u32, String> {
            Ok(10 / by)
        }
        let answer =
            async |by| caught("a probe", divides(by)).await.unwrap_or_else(|why| Err(why.to_string()));
        assert_eq!(answer(5).await, Ok(2));
        assert_eq!(answer(0).await, Err("a defect in: a probe; see the log".into()));
        let zero = 0;
        let panicked = blocking("a look", move || 10 / zero).await.unwrap_err();
        assert_eq!((panicked.name, panicked.message.as_str()), ("a look", "attempt to divide by zero"));
        let unfinished = uninterrupted("a change", divides(0)).await.unwrap_err();
        assert!(matches!(unfinished, Unfinished::Panicked(panicked) if panicked.name == "a change"));
        assert_eq!(watched("a change", divides(2)).await.unwrap(), Ok(5));
        assert!(watched("a change", divides(0)).await.is_err_and(|error| error.is_panic()));
    }

    // CLOUD-1145
    #[tokio::test]
    async fn a_task_nobody_waits_for_ends_for_its_tracker_and_what_is_uninterrupted_goes_on() {
        let tracker = TaskTracker::new();
        task(&tracker, "an order", async { panic!("no such pool") });
        tracker.close();
        assert!(timeout(PATIENCE, tracker.wait()).await.is_ok());
        let (go, done) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let work = {
            let (go, done) = (Arc::clone(&go), Arc::clone(&done));
            async move {
                go.notified().await;
                done.notify_one();
            }
        };
        assert!(timeout(Duration::from_millis(20), uninterrupted("a change", work)).await.is_err());
        go.notify_one();
        assert!(timeout(PATIENCE, done.notified()).await.is_ok());
    }

    // CLOUD-1942
    #[tokio::test]
    async fn work_whose_runtime_ends_was_cut_off_and_has_not_panicked() {
        let threads = StreamThreads::start(1).unwrap();
        let begun = Arc::new(Notify::new());
        let begins = Arc::clone(&begun);
        let work = async move {
            begins.notify_one();
            std::future::pending::<()>().await;
        };
        let running = elsewhere(threads.first().handle(), "a lane", work);
        begun.notified().await;
        drop(threads);
        let ended = timeout(PATIENCE, running).await.expect("it ends with its thread");
        assert_eq!(ended, Err(Unfinished::CutOff("a lane")));
    }

    // CLOUD-1145
    #[test]
    fn a_thread_that_panics_is_down_for_a_pause_and_begins_again() {
        let loops = Loops::default();
        let (send, starts) = mpsc::channel();
        let (seen, mut nth) = (loops.clone(), 0);
        let work = move || {
            nth += 1;
            send.send((nth, seen.problem())).unwrap();
            assert!(nth >= 3, "start {nth}");
        };
        loops.thread("driver", work).unwrap();
        assert_eq!(starts.recv_timeout(PATIENCE).unwrap(), (1, None));
        let began = Instant::now();
        while loops.problem().is_none() {
            assert!(began.elapsed() < PATIENCE, "it is not shown");
            std::thread::sleep(Duration::from_millis(1));
        }
        let later: Vec<_> = starts.iter().collect();
        assert_eq!(later, [(2, None), (3, None)], "up again each time, and over when the work has ended");
    }
}
