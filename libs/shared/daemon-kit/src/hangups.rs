//! SIGHUP: on a terminal the daemon stops as at SIGTERM, because whoever started it is gone. Else each file
//! that is followed is read at once, and one line says what came of it.

use std::fs::File;
use std::sync::LazyLock;

use nix::sys::signal::Signal;
use tokio::sync::watch;

/// How many came so far.
static HANGUPS: LazyLock<watch::Sender<u64>> = LazyLock::new(|| watch::Sender::new(0));

/// Changes with each SIGHUP that does not stop the daemon; at once where one came before this.
pub fn subscribe() -> watch::Receiver<u64> {
    let mut hangups = HANGUPS.subscribe();
    if *hangups.borrow_and_update() > 0 {
        hangups.mark_changed();
    }
    hangups
}

/// Whether this process was started on a terminal whose end is to be its own. One that is to outlive it
/// (`nohup`, `trap '' HUP`) was started with SIGHUP ignored, and that of a container is no one's to hang up.
/// To be asked before a handler of the signal is there.
pub(crate) fn on_terminal() -> bool {
    std::process::id() != 1 && !is_ignored() && File::open("/dev/tty").is_ok()
}

/// Source: `proc(5)`, `SigIgn` of `/proc/pid/status`: a mask, the first signal its lowest bit.
fn is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    mask & (1 << (Signal::SIGHUP as u32 - 1)) != 0
}

/// One came that does not stop the daemon.
pub(crate) fn received() {
    if HANGUPS.receiver_count() == 0 {
        tracing::info!("SIGHUP: there are no files to read again");
    }
    HANGUPS.send_modify(|times| *times += 1);
}
