//! Files that change under a running daemon.

use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::hangups;

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Reads each second until `stop`, and tells what is there when it is another than `reported`, which
/// outlives this loop. What is being written is not what it will be, and two files are not replaced
/// in one step: it is told when two looks have found the same. At a SIGHUP it is read and told at once,
/// whatever it is; `send` gets whether it is another.
pub(crate) async fn follow<T, F>(
    reported: &Mutex<T>,
    stop: CancellationToken,
    read: impl Fn() -> F,
    send: impl Fn(&T, bool),
) where
    T: PartialEq,
    F: Future<Output = T>,
{
    let (mut seen, mut hangups) = (None, hangups::subscribe());
    loop {
        let is_asked = tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => false,
            // Their sender is never dropped.
            _ = hangups.changed() => true,
            () = stop.cancelled() => return,
        };
        let found = read().await;
        let is_new = found != *reported.lock();
        if is_asked || (is_new && seen.as_ref() == Some(&found)) {
            send(&found, is_new);
            *reported.lock() = found;
            seen = None;
        } else {
            seen = is_new.then_some(found);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::time::timeout;

    use super::*;

    // CLOUD-2976
    #[tokio::test(start_paused = true)]
    async fn at_a_sighup_what_is_there_is_told_at_once_be_it_new_or_not() {
        let there = Arc::new(Mutex::new("old"));
        let (report, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let following = {
            let (there, stop) = (Arc::clone(&there), stop.clone());
            tokio::spawn(async move {
                let reported = Mutex::new("old");
                let read = || async { *there.lock() };
                follow(&reported, stop, read, |found, is_new| report.send((*found, is_new)).unwrap()).await;
            })
        };
        // It has subscribed.
        tokio::time::sleep(LOOK_EVERY / 4).await;
        let half = LOOK_EVERY / 2;
        hangups::received();
        assert_eq!(timeout(half, heard.recv()).await.unwrap(), Some(("old", false)));
        *there.lock() = "new";
        hangups::received();
        assert_eq!(timeout(half, heard.recv()).await.unwrap(), Some(("new", true)));
        *there.lock() = "newer";
        assert_eq!(timeout(LOOK_EVERY * 3, heard.recv()).await.unwrap(), Some(("newer", true)));
        stop.cancel();
        following.await.unwrap();
    }
}
