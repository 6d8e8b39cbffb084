//! Files that change under a running daemon.

use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Reads each second until `stop`, and tells what is there when it is another than `reported`, which
/// outlives this loop. What is being written is not what it will be, and two files are not replaced
/// in one step: it is told when two looks have found the same.
pub(crate) async fn follow<T, F>(
    reported: &Mutex<T>,
    stop: CancellationToken,
    read: impl Fn() -> F,
    send: impl Fn(&T),
) where
    T: PartialEq,
    F: Future<Output = T>,
{
    let mut seen = None;
    loop {
        tokio::select! { () = tokio::time::sleep(LOOK_EVERY) => {}, () = stop.cancelled() => return }
        let found = read().await;
        if found == *reported.lock() {
            seen = None;
        } else if seen.as_ref() == Some(&found) {
            send(&found);
            *reported.lock() = found;
            seen = None;
        } else {
            seen = Some(found);
        }
    }
}
