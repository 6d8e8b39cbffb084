//! A thread for work that waits for a disk: one piece after the other, and few that wait.
//!
//! Threads that the runtime lends are shared by everything that blocks, the resolution of names among
//! it: what comes from clients in any number does not go there.

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::oneshot;

use crate::{Panicked, log_task};

type Job = Box<dyn FnOnce() + Send>;

/// Why work was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotDone {
    #[error("{0}: too much waits for it")]
    Full(&'static str),
    #[error(transparent)]
    Panicked(#[from] Panicked),
}

/// One thread, which ends when this is dropped and what waits is done.
pub struct Worker {
    name: &'static str,
    jobs: SyncSender<Job>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Worker({})", self.name)
    }
}

impl Worker {
    /// Starts the thread. `waiting`: pieces of work that wait at most. Errors: the system's, of making a
    /// thread.
    pub fn start(name: &'static str, waiting: usize) -> io::Result<Self> {
        let (jobs, to_do) = sync_channel::<Job>(waiting);
        let run = move || to_do.into_iter().for_each(|job| job());
        std::thread::Builder::new().name(name.into()).spawn(run)?;
        Ok(Self { name, jobs })
    }

    /// Does the work when its turn comes. Dropped, it is done all the same.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NotDone> {
        let (name, (done, result)) = (self.name, oneshot::channel());
        let job = move || {
            let outcome = catch_unwind(AssertUnwindSafe(work)).map_err(|payload| {
                let panicked = Panicked::of(name, &*payload);
                log_task(&panicked);
                panicked
            });
            // Whoever asked may have gone.
            let _ = done.send(outcome);
        };
        self.jobs.try_send(Box::new(job)).map_err(|_| NotDone::Full(name))?;
        let cut_off = |_| Err(Panicked { name, message: "the thread has ended".into() });
        Ok(result.await.unwrap_or_else(cut_off)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    // CLOUD-2758
    #[tokio::test]
    async fn one_piece_is_done_at_a_time_few_wait_and_a_panic_ends_none_but_its_own() {
        let worker = Worker::start("a worker", 1).unwrap();
        let (begun, has_begun) = mpsc::channel();
        let (go_on, going_on) = mpsc::channel::<()>();
        let first = worker.run(move || {
            begun.send(()).unwrap();
            going_on.recv().unwrap();
            1
        });
        let mut first = std::pin::pin!(first);
        assert!(futures::poll!(first.as_mut()).is_pending());
        has_begun.recv().unwrap();
        let mut second = std::pin::pin!(worker.run(|| panic!("in the work")));
        assert!(futures::poll!(second.as_mut()).is_pending());
        assert_eq!(worker.run(|| 3).await, Err(NotDone::Full("a worker")));
        go_on.send(()).unwrap();
        assert_eq!(first.await, Ok(1));
        let panicked: Result<(), NotDone> = second.await;
        assert!(matches!(panicked, Err(NotDone::Panicked(_))), "{panicked:?}");
        assert_eq!(worker.run(|| 4).await, Ok(4));
    }
}
