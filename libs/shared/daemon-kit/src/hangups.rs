//! SIGHUP: on a terminal the daemon stops as at SIGTERM, because whoever started it is gone. Else each file
//! that is followed is read at once, and one line says what came of it.

use std::io::{IsTerminal, stderr, stdin, stdout};
use std::sync::LazyLock;

use tokio::sync::watch;

/// How many came so far.
static HANGUPS: LazyLock<watch::Sender<u64>> = LazyLock::new(|| watch::Sender::new(0));

/// Changes with each SIGHUP from now on that does not stop the daemon.
pub fn subscribe() -> watch::Receiver<u64> {
    HANGUPS.subscribe()
}

/// Whether this process was started on a terminal, and not away from it as `nohup` and services are.
pub(crate) fn on_terminal() -> bool {
    stdin().is_terminal() || stdout().is_terminal() || stderr().is_terminal()
}

/// One came that does not stop the daemon.
pub(crate) fn received() {
    if HANGUPS.receiver_count() == 0 {
        tracing::info!("SIGHUP: there are no files to read again");
    }
    HANGUPS.send_modify(|times| *times += 1);
}
